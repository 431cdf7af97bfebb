"""The options, model and data that decide a run's result, and the refusal of a checkpoint that had others."""

import json
from collections.abc import Iterable
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from torch import nn

from ..config import NCAConfig
from ..errors import UserError, nearest
from ..models.policy import base_model
from ..own_losses import OwnLoss
from ..store.fingerprints import columns_fingerprint, source_text, weights_fingerprint
from ..store.provenance import changed_names, refuse_changes
from .reference import adapter_hash, adapter_options, computed_config, model_hash
from .reference_cache import TOKENS
from .sharded import own_class
from .streams import deals_shards

# Options that may change between a run and its continuation: the same training, if at times up to rounding. A finished
# cell of `nca-align compare` also stays finished when they do.
FREE = {
    # where things go, what is logged, evaluated and kept
    "output_dir", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "report_to", "disable_tqdm", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node",
    "logging_nan_inf_filter", "log_level", "log_level_replica", "include_num_input_tokens_seen",
    "skip_memory_metrics", "debug", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
    "per_device_eval_batch_size", "prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object",
    "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "save_strategy", "save_steps",
    "save_total_limit", "save_on_each_node", "save_only_model", "push_to_hub", "hub_token", "hub_private_repo",
    "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision", "do_train", "do_eval", "do_predict",
    "resume_from_checkpoint", "resume_changed", "nonfinite", "collapse_nats", "startup_checks",
    "on_invalid",  # the rows that are left tell it
    # how the work is dealt out: processes, kernels, memory, loading
    "per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size",
    "average_tokens_across_devices", "layout", "tokens_per_forward", "gradient_checkpointing",
    "gradient_checkpointing_kwargs", "activation_checkpointing", "activation_checkpointing_kwargs",
    "activation_offloading", "torch_empty_cache_steps", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "use_liger_kernel", "liger_kernel_config", "use_cache", "pad_to_multiple_of",
    "precompute_ref_log_probs", "precompute_ref_batch_size", "dataset_num_proc", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "dataloader_in_order", "accelerator_config", "parallelism_config",
    "deepspeed", "fsdp", "fsdp_config", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
    "ddp_static_graph", "ddp_backend", "ddp_timeout", "local_rank", "restore_callback_states_from_checkpoint",
    "remove_unused_columns", "length_column_name",
}  # fmt: skip
# These are kept in the optimizer's and the scheduler's state, which would silently win over a new value.
FIXED = {
    "learning_rate", "weight_decay", "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2",
    "adam_epsilon",
}  # fmt: skip
_STREAM_ROWS = 8  # of a stream that are read to know it again
_NOT_OF_THE_MODEL = ("token", "use_auth_token", "proxies")  # how it is fetched; secrets stay out of checkpoints
_CONTENT = (*TOKENS, "rewards")


def at_start(model: nn.Module) -> dict[str, Any]:
    """What a policy is known by that FSDP hides once it has split the weights; the main process alone hashes them."""
    base, is_main = base_model(model), PartialState().is_main_process
    start: dict[str, Any] = {"model.dtype": str(base.dtype)}
    if is_main and not base.config.name_or_path:  # built in memory: no folder or repository tells it
        start["model"] = model_hash(model, trained=True)[:16]
    if is_main and "ref" in getattr(model, "peft_config", {}):
        start["adapter.ref"] = adapter_hash(model, "ref")[:16]  # a reference that no model folder holds
    return start


def run_identity(
    args: NCAConfig, model: nn.Module, dataset, processes: int, start: dict[str, Any], reference: str | None = None
) -> dict[str, Any]:
    """What decides a run's result, as JSON values: `args` without `FREE`, the batch, the model, adapter and data.

    Args:
        args: as the trainer settled them.
        model: the policy, with its adapters if it has any.
        dataset: tokenised training rows; a stream is known by its first rows.
        processes: of the launch; only the prompts of a whole step count, not how they are dealt to processes.
        start: `at_start` of the policy, before its weights were split.
        reference: `reference.model_hash` of a `ref_model` that was given.
    """
    identity = {name: value for name, value in args.to_dict().items() if name not in FREE}
    identity |= loss_sources(args.loss_type)
    kwargs = args.model_init_kwargs
    if isinstance(kwargs, dict):
        identity["model_init_kwargs"] = {name: kwargs[name] for name in kwargs if name not in _NOT_OF_THE_MODEL}
    if reference is not None:
        identity["ref_model"] = reference[:16]
    identity["global_batch_size"] = args.train_batch_size * args.gradient_accumulation_steps * processes
    if args.train_sampling_strategy == "group_by_length":  # there the order of the rows depends on it
        identity["prompts_a_process"] = args.train_batch_size * args.gradient_accumulation_steps
    base = base_model(model)
    identity["model"] = weights_fingerprint(base.config.name_or_path)
    about = computed_config(base) | {"class": own_class(base).__name__}
    identity |= {f"model.{key}": value for key, value in about.items()} | start
    for name, adapter in getattr(model, "peft_config", {}).items():
        identity |= {f"adapter.{name}.{key}": value for key, value in adapter_options(adapter).items()}
    if isinstance(dataset, Dataset):
        identity["data"] = f"{len(dataset)} rows, {columns_fingerprint(dataset, _CONTENT)[:16]}"
    else:
        rows = [{name: row[name] for name in _CONTENT if name in row} for row in dataset.take(_STREAM_ROWS)]
        first = Dataset.from_list(rows)
        identity["data"] = f"stream, {columns_fingerprint(first, _CONTENT)[:16]}"
        # Shards are read side by side by those to whom they are dealt, so the rows of a step depend on these
        if deals_shards(dataset, processes):
            identity["processes"] = processes
        if dataset.num_shards > 1 and args.dataloader_num_workers > 1:
            identity["dataloader_num_workers"] = args.dataloader_num_workers
    return json.loads(json.dumps(identity, default=str, sort_keys=True))


def loss_sources(loss_types: Iterable[str]) -> dict[str, str | None]:
    """`loss_type.NAME` → the source of each loss of one's own; None where its name finds another, or none."""
    own = [name for name in loss_types if isinstance(name, OwnLoss)]
    return {f"loss_type.{name}": source_text(name.function) if name.is_found_by_name else None for name in own}


def refuse_another_run(old: dict[str, Any], new: dict[str, Any], allowed: list[str], checkpoint: str) -> None:
    """Raise where `new` isn't the run that `checkpoint` belongs to, unless each difference is allowed by name.

    Args:
        old, new: `run_identity` of the checkpoint and of this run.
        allowed: `resume_changed`.
        checkpoint: its name.

    Raises:
        UserError: options, model or data changed, each with its old and new value; a loss that isn't found by its
            name; or `allowed` holds an unknown name.
    """
    known = old.keys() | new.keys()
    for name in allowed:
        if name not in known:
            raise UserError(
                f"`resume_changed` holds {name!r}, which is not a part of a run's "
                f"identity{nearest(name, sorted(known))}; give names as the refusal shows them"
            )
    for name, value in new.items():
        if name.startswith("loss_type.") and value is None and name not in allowed:
            raise UserError(
                f"{checkpoint} can't be resumed with `loss_type` {name.removeprefix('loss_type.')}. Its name doesn't "
                "find the function, so it may be another than the checkpoint's. Define it by `def` at the top of a "
                f"module, or allow it by name: `--resume_changed '{name}'`"
            )
    changed = changed_names(old, new)
    refuse_changes(
        f"{checkpoint} belongs to a run with other options", old, new,
        "the optimizer's state in the checkpoint keeps the old values, so they can't change within a run: go back to "
        "them, or start a new run from the checkpoint's weights, with `model_name_or_path` set to it",
        [name for name in changed if name in FIXED], show=_short,
    )  # fmt: skip
    changed = [name for name in changed if name not in allowed]
    refuse_changes(
        f"{checkpoint} belongs to another run", old, new,
        "go back to what it was, choose another `output_dir`, or allow it by name: "
        f"`--resume_changed {' '.join(changed)}`",
        changed, show=_short,
    )  # fmt: skip


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
