"""Every field of TRL's `DPOConfig`, which has transformers' `TrainingArguments`, and what becomes of it here.

A field *works* (a run with another value than its default, and what shows it), is *proven by* a launch, is *refused*,
 or is *idle*: named as an option without effect. `test_every_option.py` goes through the table.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isclose
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig
from transformers import PreTrainedModel, TrainerState
from transformers.trainer_pt_utils import BatchRebalanceSampler

from conftest import reward_rows
from nca_align import NCATrainer
from nca_align.store.checkpoints import read_manifest


@dataclass
class Run:
    """What a training leaves behind for the table to look at.

    Args:
        trainer: after `train`.
        metrics: that `train` returned.
        batches: rows of each micro-batch of training, of each of the evaluations, and of each of the cached reference.
        row_numbers: of the training's rows, as they came.
        widths: tokens of the rows of each chunk.
        calls: what a stub of the Hub or of a tracker was called with, by function.
        seen: noted while it trained.
    """

    trainer: NCATrainer
    metrics: dict[str, float] = field(default_factory=dict)
    batches: dict[str, list[int]] = field(default_factory=lambda: {"train": [], "eval": [], "reference": []})
    row_numbers: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    calls: dict[str, list[dict]] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> TrainerState:
        return self.trainer.state

    @property
    def model(self) -> PreTrainedModel:
        return self.trainer.model

    def logged(self, name: str) -> list[float]:
        return [line[name] for line in self.state.log_history if name in line]

    def steps_with(self, name: str) -> list[int]:
        return [line["step"] for line in self.state.log_history if name in line]

    @property
    def group(self) -> dict[str, Any]:
        """What the optimizer updates by."""
        return self.trainer.optimizer.param_groups[0]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in Path(self.trainer.args.output_dir).glob("checkpoint-*"))

    @property
    def layer(self) -> Any:
        return self.model.model.layers[1]


@dataclass
class Works:
    """It works.

    Args:
        run: the run in `RUNS` that has it.
        value: another than its default.
        shows: what shows it; None where it was read, while the run trained, by a library or by us, and no more is to be
            seen on one process.
    """

    run: str
    value: Any
    shows: Callable[[Run], bool] | None = None


@dataclass
class ProvenBy:
    """It works on several processes, as a test that starts them shows: `file.py::function`.

    What it starts, a `launched*.py`, proves by `require_changed` that the field has another value than its default.
    """

    where: str


@dataclass
class Refused:
    """NCAConfig refuses it, or the trainer, with these options beside it; `says` is a part of the sentence."""

    value: Any
    says: str
    beside: dict[str, Any] = field(default_factory=dict)


@dataclass
class Idle:
    """It has no effect, with these options beside it, and is named with what it needs."""

    value: Any
    needs: str
    beside: dict[str, Any] = field(default_factory=dict)


@dataclass
class IdleInCommand:
    """The same of `nca-align train` alone: a script may read it by itself."""

    value: str
    needs: str


ROWS = [row | {"other": i} for i, row in enumerate(reward_rows(8, [3, 2]))]
# The runs of the table, and what they have beside its values
RUNS: dict[str, dict[str, Any]] = {
    "epochs": {},
    "steps": {"eval_strategy": "steps", "nonfinite": "skip", "metric_for_best_model": "rewards/best"},
    "by length": {"layout": "padded", "max_steps": 4, "save_strategy": "steps"},
    "moving": {"max_steps": 2},
    "experts": {"max_steps": 1},
    "too large": {"max_steps": 2, "per_device_train_batch_size": 4},
    "cached": {"max_steps": 2},
    "workers": {"max_steps": 3, "per_device_train_batch_size": 3, "eval_strategy": "no"},  # of eight rows
    "resumed": {"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
    "tracked": {"max_steps": 1},
    "hub": {"max_steps": 1, "save_strategy": "steps", "save_steps": 1},
    "from a folder": {"max_steps": 1, "layout": "padded"},  # the other layout has an attention of its own
    "compiled": {"max_steps": 1},
}
SLOW = ("compiled",)
_PREDICTIONS = "predictions, which NCATrainer doesn't keep"
_NO_LOSS = "but no loss here reads it"
_DDP = ProvenBy("test_two_processes.py::test_what_is_said_of_ddp_reaches_it")
_POLICY_ALONE = "but it casts the policy and not its reference"


def _displacement(run: Run) -> float:
    """How far the weights went."""
    moved = zip(run.model.parameters(), run.seen["weights"], strict=True)
    return float(sum((now.detach() - before).square().sum() for now, before in moved).sqrt())


def _is_weighted(run: Run) -> bool:
    """The first loss is 0.5 NCA + 2 Plackett-Luce of a policy that is its reference: 2 log 2, and the mean of log K!"""
    orders = [math.lgamma(len(ROWS[i]["rewards"]) + 1) for i in run.row_numbers[:2]]
    return isclose(run.logged("loss")[0], 0.5 * 2 * math.log(2) + 2 * sum(orders) / len(orders), rel_tol=1e-4)


def _has_moved(run: Run) -> bool:
    """Once in two steps, by a quarter of the way to the policy."""
    weights = zip(run.trainer.ref_model.parameters(), run.seen["weights"], run.model.parameters(), strict=True)
    return all(torch.allclose(moved, 0.75 * began + 0.25 * now) for moved, began, now in weights)


TABLE: dict[str, Works | ProvenBy | Refused | Idle | IdleInCommand] = {
    # Data, batches and steps
    "per_device_train_batch_size": Works("epochs", 2, lambda run: set(run.batches["train"]) == {2}),
    "gradient_accumulation_steps": Works("epochs", 2, lambda run: len(run.batches["train"]) == 2 * run.state.max_steps),
    "num_train_epochs": Works("epochs", 2.0, lambda run: run.logged("epoch")[-1] == 2 and run.state.max_steps == 4),
    "max_steps": Works("steps", 5, lambda run: run.state.global_step == 5),
    "auto_find_batch_size": Works("too large", True, lambda run: run.batches["train"] == [4, 3, 3]),
    "dataloader_drop_last": Works("workers", True, lambda run: set(run.batches["train"]) == {3}),
    "dataloader_num_workers": Works("workers", 1, lambda run: run.seen["loader"].num_workers == 1),
    "dataloader_pin_memory": Works("workers", False, lambda run: not run.seen["loader"].pin_memory),
    "dataloader_persistent_workers": Works("workers", True, lambda run: run.seen["loader"].persistent_workers),
    "dataloader_prefetch_factor": Works("workers", 3, lambda run: run.seen["loader"].prefetch_factor == 3),
    "dataloader_multiprocessing_context": Works(
        "workers", "fork", lambda run: run.seen["loader"].multiprocessing_context.get_start_method() == "fork"
    ),
    "dataloader_in_order": Works("workers", False, lambda run: not run.seen["loader"].in_order),
    "remove_unused_columns": Works("cached", False, lambda run: "other" in run.seen["columns"]),
    "label_names": Idle(["rewards"], _PREDICTIONS),
    "train_sampling_strategy": Works(
        "by length", "batch_rebalance", lambda run: isinstance(run.seen["loader"].batch_sampler, BatchRebalanceSampler)
    ),
    "length_column_name": Works("by length", "tokens", lambda run: "tokens" in run.trainer.train_dataset.column_names),
    "seed": Works("epochs", 7, lambda run: run.seen["torch seed"] == 7),
    "data_seed": Works("epochs", 9, lambda run: run.row_numbers[:8] == run.seen["order of the data seed"]),
    "dataset_num_proc": Works("cached", 2),
    "max_length": Works("by length", 32, lambda run: max(run.widths) == 32),
    "truncation_mode": Refused("keep_end", "are always kept"),
    "pad_to_multiple_of": Works("by length", 16, lambda run: all(width % 16 == 0 for width in run.widths)),
    "pad_token": Works("by length", "<s>", lambda run: run.trainer.data_collator.pad_token_id == 1),
    "padding_free": Idle(True, "TRL's collator; here `layout: prefix_shared` is the layout without padding"),
    "accelerator_config": Works(
        "steps",
        {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
        lambda run: run.seen["accumulation"]["sync_each_batch"],
    ),
    # The loss and the reference
    # test_loss_options.py has their values, and the gradients', by a loop
    "loss_type": Works("cached", ["nca", "plackett_luce"], _is_weighted),
    "loss_weights": Works("cached", [0.5, 2.0], _is_weighted),
    "beta": Works(
        "cached",
        0.7,
        lambda run: isclose(run.logged("rewards/best")[1], 0.7 * run.logged("logratios/best")[1], rel_tol=1e-4),
    ),
    "router_aux_loss_coef": Works(
        "experts",
        0.3,
        lambda run: isclose(run.logged("loss")[0], 2 * math.log(2) + 0.3 * run.logged("aux_loss")[0], rel_tol=1e-4),
    ),
    # else the policy would be its reference yet
    "disable_dropout": Works("moving", False, lambda run: abs(run.logged("logratios/best")[0]) > 1e-3),
    "label_smoothing": Refused(0.1, _NO_LOSS),
    "label_smoothing_factor": Refused(0.1, _NO_LOSS),
    "f_divergence_type": Refused("js_divergence", _NO_LOSS),
    "f_alpha_divergence_coef": Refused(0.7, _NO_LOSS),
    "ld_alpha": Refused(0.5, _NO_LOSS),
    "use_weighting": Refused(True, _NO_LOSS),
    "discopop_tau": Refused(0.1, _NO_LOSS),
    "average_tokens_across_devices": Refused(False, "a loss is the mean over the prompts of all processes"),
    "neftune_noise_alpha": Refused(5.0, "its noise is in the policy alone"),
    "precompute_ref_log_probs": Works("cached", True, lambda run: run.trainer.ref_model is None),
    "precompute_ref_batch_size": Works("cached", 5, lambda run: run.batches["reference"][0] == 5),
    "sync_ref_model": Works("moving", True, _has_moved),
    "ref_model_mixup_alpha": Works("moving", 0.25, _has_moved),
    "ref_model_sync_steps": Works("moving", 2, _has_moved),
    # The optimizer
    "learning_rate": Works("epochs", 3e-3, lambda run: run.group["initial_lr"] == 3e-3),
    "lr_scheduler_type": Works(
        "epochs", "cosine_with_min_lr", lambda run: isclose(run.logged("learning_rate")[-1], 1.5e-3)
    ),
    "lr_scheduler_kwargs": Works("epochs", {"min_lr": 1e-3}, lambda run: isclose(run.group["lr"], 1e-3)),
    "warmup_steps": Works("epochs", 1, lambda run: run.seen["lr at the start"] == 0),
    "optim": Works("by length", "sgd", lambda run: type(run.trainer.optimizer.optimizer) is torch.optim.SGD),
    "optim_args": Works("by length", "momentum=0.5", lambda run: run.group["momentum"] == 0.5),
    "optim_target_modules": Idle(["q_proj"], "an `optim` of the GaLore or APOLLO family"),
    "weight_decay": Works("epochs", 0.1, lambda run: run.group["weight_decay"] == 0.1),
    "adam_beta1": Works("epochs", 0.8, lambda run: run.group["betas"][0] == 0.8),
    "adam_beta2": Works("epochs", 0.9, lambda run: run.group["betas"][1] == 0.9),
    "adam_epsilon": Works("epochs", 1e-6, lambda run: run.group["eps"] == 1e-6),
    # four steps of SGD with a momentum of a half
    "max_grad_norm": Works(
        "by length",
        0.01,
        lambda run: 0 < _displacement(run) < 4 * 2 * 0.01 * 1e-3 < 1e-3 * min(run.logged("grad_norm")),
    ),
    # Precision, memory and kernels
    "use_cpu": Works("epochs", True, lambda run: run.model.device.type == "cpu"),
    "bf16": Works("by length", True, lambda run: run.seen["dtypes"] == {torch.bfloat16}),
    "fp16": Refused(True, "a CPU doesn't train in float16"),
    "bf16_full_eval": Refused(True, _POLICY_ALONE),
    "fp16_full_eval": Refused(True, _POLICY_ALONE),
    "tf32": Refused(True, "this machine has no GPU that computes in TF32"),
    "activation_checkpointing": Works("cached", False, lambda run: not run.model.is_gradient_checkpointing),
    "activation_checkpointing_kwargs": Works(
        "steps", {"every_n_layers": 2}, lambda run: not run.layer.gradient_checkpointing
    ),
    "gradient_checkpointing": Works("epochs", False, lambda run: not run.model.is_gradient_checkpointing),
    "gradient_checkpointing_kwargs": Works(
        "by length",
        {"use_reentrant": True},
        lambda run: run.layer._gradient_checkpointing_func.keywords["use_reentrant"],
    ),
    "activation_offloading": Refused(True, "asks to keep activations on the CPU, but training is on the CPU"),
    "torch_compile": Works("compiled", True, lambda run: hasattr(run.trainer.ref_model, "_orig_mod")),
    "torch_compile_backend": Works("compiled", "eager", lambda run: run.seen["compiled by"].backend.value == "EAGER"),
    "torch_compile_mode": Works(
        "compiled", "reduce-overhead", lambda run: run.seen["compiled by"].mode == "reduce-overhead"
    ),
    "use_liger_kernel": Refused(True, "liger-kernel is not installed"),
    "liger_kernel_config": Idle({"rope": True}, "`use_liger_kernel: true`"),
    "use_cache": Works("epochs", True, lambda run: run.model.config.use_cache),
    "torch_empty_cache_steps": Works("steps", 2, lambda run: run.seen["emptied"] == [0, 2, 4]),
    "full_determinism": Works("steps", True, lambda run: run.seen["deterministic"]),
    # Logging
    "logging_strategy": Works("epochs", "epoch", lambda run: run.steps_with("loss") == [2, 4]),
    "logging_steps": Works("steps", 2, lambda run: run.steps_with("loss") == [1, 2, 4, 5]),  # and the last
    "logging_first_step": Works("steps", True, lambda run: run.steps_with("loss")[0] == 1),
    "log_on_each_node": Works("steps", False),
    "logging_nan_inf_filter": Works("by length", True),
    "include_num_input_tokens_seen": Refused(True, "`num_tokens` in each log line counts them"),
    "log_level": Works("epochs", "error", lambda run: run.seen["verbosity"] == logging.ERROR),
    "log_level_replica": Works("epochs", "error"),
    "disable_tqdm": Works("epochs", True),
    "report_to": Works("tracked", ["trackio"], lambda run: len(run.calls["init"]) == 1),
    "run_name": Works("tracked", "third", lambda run: run.calls["init"][0]["name"] == "third"),
    "project": Works("tracked", "aligned", lambda run: run.calls["init"][0]["project"] == "aligned"),
    "trackio_space_id": Works("tracked", "me/space", lambda run: run.calls["init"][0]["space_id"] == "me/space"),
    "trackio_bucket_id": Works("tracked", "me/bucket", lambda run: run.calls["init"][0]["bucket_id"] == "me/bucket"),
    "trackio_static_space_id": Works("tracked", False, lambda run: "freeze" not in run.calls),
    "debug": Works("steps", "underflow_overflow", lambda run: bool(run.model.model.embed_tokens._forward_hooks)),
    "skip_memory_metrics": Works("steps", False, lambda run: "train_mem_cpu_alloc_delta" in run.metrics),
    # Evaluation
    "eval_strategy": Works("epochs", "epoch", lambda run: run.steps_with("eval_loss") == [4]),  # after the delay
    "eval_steps": Works("steps", 3, lambda run: run.steps_with("eval_loss") == [0, 3, 5]),  # and the last
    "eval_delay": Works("epochs", 1.5, lambda run: run.steps_with("eval_loss") == [4]),
    "eval_on_start": Works("steps", True, lambda run: run.steps_with("eval_loss")[0] == 0),
    "per_device_eval_batch_size": Works("epochs", 3, lambda run: run.batches["eval"] == [3, 2]),
    "prediction_loss_only": Idle(True, _PREDICTIONS),
    "eval_do_concat_batches": Idle(False, _PREDICTIONS),
    "eval_use_gather_object": Idle(True, _PREDICTIONS),
    "eval_accumulation_steps": Idle(2, _PREDICTIONS),
    "include_for_metrics": Idle(["loss"], _PREDICTIONS),
    "batch_eval_metrics": Idle(True, _PREDICTIONS),
    # Checkpoints
    "output_dir": Works("epochs", "own folder", lambda run: run.checkpoints == ["checkpoint-4"]),
    "save_strategy": Works("epochs", "epoch", lambda run: run.checkpoints == ["checkpoint-4"]),
    "save_steps": Works("by length", 3, lambda run: run.checkpoints == ["checkpoint-3", "checkpoint-4"]),
    "save_total_limit": Works("epochs", 1, lambda run: len(run.checkpoints) == 1),
    "save_only_model": Works(
        "by length",
        True,
        lambda run: read_manifest(Path(run.trainer.args.output_dir, "checkpoint-3"))["model_only"],
    ),
    "save_on_each_node": Works("epochs", True),
    "enable_jit_checkpoint": Refused(True, "NCATrainer saves on SIGTERM by itself"),
    "load_best_model_at_end": Works("epochs", True, lambda run: run.state.best_model_checkpoint.endswith("-4")),
    "metric_for_best_model": Works(
        "epochs", "rewards/best", lambda run: run.state.best_metric == run.logged("eval_rewards/best")[-1]
    ),
    "greater_is_better": Works(
        "steps",
        False,
        # of the two after the start, which transformers doesn't count
        lambda run: run.state.best_metric == min(rewards := run.logged("eval_rewards/best")[1:]) < max(rewards),
    ),
    "ignore_data_skip": Works("resumed", True, lambda run: run.row_numbers[:4] == run.seen["first rows"]),
    "restore_callback_states_from_checkpoint": Works("resumed", True, lambda run: run.seen["callback"].count == 4),
    "resume_from_checkpoint": Works("resumed", "checkpoint-2", lambda run: len(run.batches["train"]) == 4 + 2),
    # The Hub
    "push_to_hub": Works("hub", True, lambda run: len(run.calls["upload_folder"]) == 2),
    "hub_model_id": Works("hub", "me/aligned", lambda run: run.calls["create_repo"][0]["repo_id"] == "me/aligned"),
    "hub_token": Works("hub", "hf_x", lambda run: all(c["token"] == "hf_x" for cs in run.calls.values() for c in cs)),
    "hub_private_repo": Works("hub", True, lambda run: run.calls["create_repo"][0]["private"]),
    "hub_strategy": Works(
        "hub", "all_checkpoints", lambda run: run.calls["upload_folder"][1]["path_in_repo"] == "checkpoint-1"
    ),
    "hub_always_push": Works("hub", True),
    "hub_revision": Works("hub", "trial", lambda run: {c["revision"] for c in run.calls["upload_folder"]} == {"trial"}),
    # Models from a folder
    "model_init_kwargs": Works(
        "from a folder", {"attn_implementation": "eager"}, lambda run: run.model.config._attn_implementation == "eager"
    ),
    "trust_remote_code": Works("from a folder", True),
    # Processes
    "ddp_find_unused_parameters": _DDP,
    "ddp_bucket_cap_mb": _DDP,
    "ddp_broadcast_buffers": _DDP,
    "ddp_static_graph": _DDP,
    "ddp_backend": _DDP,
    "ddp_timeout": Idle(77, "an accelerator: transformers hands it on there alone"),
    "fsdp": ProvenBy("test_launch.py::test_fsdp2_trains_like_one_process"),
    "fsdp_config": ProvenBy("test_launch.py::test_fsdp2_trains_like_one_process"),
    "deepspeed": ProvenBy("test_launch.py::test_deepspeed_trains_like_one_process"),
    "parallelism_config": Refused(ParallelismConfig(tp_size=2), "processes can't share a batch of prompt trees"),
    "local_rank": Idle(0, "transformers 4; today the launcher's environment tells it"),
    # Of scripts
    "do_train": IdleInCommand("true", "TRL's own script"),
    "do_eval": IdleInCommand("true", "`eval_strategy` steps or epoch"),
    "do_predict": Idle(True, _PREDICTIONS),
}
