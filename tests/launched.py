"""Trains cases one after another in every process of one launch, and writes down what came out; for test_launch.py.

    torchrun --nproc_per_node 2 tests/launched.py CASES.json OUTPUT

`CASES.json`: the `model` folder, the `launch` (one, ddp, zero2, zero3 or fsdp2) and `cases`, a dict of the options in
`FACTORS` by name. Each case first proves that its launch, layout and reference are what it says they are.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from conftest import require_changed, reward_rows
from nca_align import NCAConfig, NCATrainer
from nca_align.errors import UserError
from nca_align.processes import leave_launch

# 17 rows in batches of two leave the second of two processes a last batch of nothing but repeats; 16 divide
FACTORS: dict[str, tuple] = {
    "weights": ("full", "lora", "nf4"),
    "reference": ("live", "cached"),
    "layout": ("padded", "prefix_shared"),
    "per_forward": (None, 20),  # cuts prompts and completions into several parts
    "k": ("four", "ragged"),
    "rows": (16, 17),
    "loss": ("nca", "plackett_luce"),  # chunk by chunk, the second takes two passes
}
PROCESSES = {"one": 1, "ddp": 2, "zero2": 2, "zero3": 2, "fsdp2": 2}


class Proof(TrainerCallback):
    """Fails a run whose first step isn't launched as it should be."""

    def __init__(self, launch: str):
        self.launch = launch
        self.trainer: Any = None

    def on_step_begin(self, args, state, control, **kwargs):
        wrapped = self.trainer.model_wrapped
        parameters = list(self.trainer.model.parameters())
        assert self.trainer.accelerator.num_processes == PROCESSES[self.launch]
        assert isinstance(wrapped, DistributedDataParallel) == (self.launch == "ddp")
        assert all(isinstance(p, DTensor) for p in parameters) == (self.launch == "fsdp2")
        if self.launch.startswith("zero"):
            require_changed(args, "deepspeed")
            assert type(wrapped).__name__ == "DeepSpeedEngine"
            assert wrapped.zero_optimization_stage() == int(self.launch[-1])
        if self.launch == "zero3":  # this process's half of each
            assert all(p.ds_tensor.numel() <= (p.ds_numel + 1) // 2 for p in parameters)
        if self.launch == "fsdp2":
            require_changed(args, "fsdp", "fsdp_config")
            plugin = self.trainer.accelerator.state.fsdp_plugin
            assert plugin.state_dict_type.name == args.fsdp_config["state_dict_type"] == "SHARDED_STATE_DICT"
            assert sum(p.to_local().numel() for p in parameters) < 0.6 * sum(p.numel() for p in parameters)


def check_pieces(batches: list[list[tuple[bool, int]]], processes: int) -> None:
    """That prompts and completions were cut into several parts, of which processes had unequal numbers.

    Args:
        batches: of each of this process, its pieces in order: whether others read it, and how many terms it has.
        processes: in this launch.
    """
    of_all = gather_object([batches])
    assert len(of_all) == processes
    for own in of_all:
        assert any(pieces[:2] == [(True, 0)] * 2 for pieces in own)  # a prompt, whose first part is trained last
    assert any(read and terms for own in of_all for pieces in own for read, terms in pieces)  # a completion
    assert processes == 1 or any(len(one) != len(other) for one, other in zip(*of_all, strict=True))


def gloo_threads() -> list[str]:
    return [name for own in Path("/proc/self/task").glob("*/comm") if "gloo" in (name := own.read_text())]


def layers_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LlamaDecoderLayer)]


class Trainer(NCATrainer):
    """Fails a reference pass under FSDP2 that isn't split by layers, as TRL's isn't; notes the pieces of batches."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        pieces = [(getattr(own.get("segments"), "read", False), len(own["token_index"])) for own in inputs["chunks"]]
        self.batches = [*getattr(self, "batches", []), pieces]
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_ref_log_probs(self, model, inputs):
        if self.is_fsdp_enabled:
            layers = layers_of(model)
            assert layers
            assert all(isinstance(layer, FSDPModule) for layer in layers)
            assert all(isinstance(parameter, DTensor) for layer in layers for parameter in layer.parameters())
        return super().compute_ref_log_probs(model, inputs)

    def _chunk_logps(self, model, chunk, batch, with_aux_loss=True):
        if self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch"):  # no card has whole gradients
            for layer in layers_of(self.model):
                for own in layer._get_fsdp_state()._fsdp_param_group.fsdp_params:
                    assert getattr(own, "_unsharded_param", own.sharded_param).grad is None
        return super()._chunk_logps(model, chunk, batch, with_aux_loss)


def launch_options(launch: str, in_chunks: bool) -> dict[str, Any]:
    """What the config says of the launch."""
    if launch == "fsdp2":
        kwargs = {"sync_each_batch": in_chunks}
        own = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "SHARDED_STATE_DICT"}
        return {"fsdp": True, "fsdp_config": own, "accelerator_config": {"gradient_accumulation_kwargs": kwargs}}
    if not launch.startswith("zero"):
        return {}
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    zero = {
        "stage": int(launch[-1]),
        "stage3_param_persistence_threshold": 0,  # else parameters as small as these are kept whole everywhere
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    return {
        "deepspeed": dict.fromkeys((*automatic, "gradient_clipping"), "auto")
        | {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
    }


def train(case: dict[str, Any], launch: str, model: str, output: Path) -> dict[str, Any]:
    """One run of two epochs, evaluated before and after it; its log and, beside it, its final weights."""
    dataset = reward_rows(case["rows"] + 5, 4 if case["k"] == "four" else [4, 2, 3, 5])
    args = NCAConfig(
        str(output), bf16=False, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1,
        alpha=0.5, beta=0.1, loss_type=case["loss"], layout=case["layout"], max_length=128, num_train_epochs=2,
        precompute_ref_log_probs=case["reference"] == "cached", tokens_per_forward=case["per_forward"],
        per_device_train_batch_size=2, gradient_accumulation_steps=4 // PROCESSES[launch],
        # plain descent shows a wrong scale of the gradients, which Adam and clipping would hide
        optim="sgd", learning_rate=0.02, lr_scheduler_type="constant", max_grad_norm=1e6,
        gradient_checkpointing=False, **launch_options(launch, case["per_forward"] is not None),
    )  # fmt: skip
    if launch == "fsdp2":  # accelerate shards only where there are cards, and runs DDP on a CPU without a word
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    quantization = None
    if case["weights"] == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    torch.manual_seed(0)
    proof = Proof(launch)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(dataset[5:]),
        eval_dataset=Dataset.from_list(dataset[:5]),
        processing_class=AutoTokenizer.from_pretrained(model),
        quantization_config=quantization,
        peft_config=None if case["weights"] == "full" else LoraConfig(r=4, target_modules="all-linear"),
        callbacks=[proof],
    )
    if case["weights"] == "nf4":  # TRL holds the adapter in bfloat16, whose rounding would hide what is compared
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    proof.trainer = trainer
    assert trainer.data_collator.layout == case["layout"]
    assert ("ref_logps" in trainer.train_dataset.column_names) == (case["reference"] == "cached")
    if launch.startswith("zero"):
        with pytest.raises(UserError, match="`evaluate` before `train`"):
            trainer.evaluate()
        before = None
    else:
        before = trainer.evaluate()
    trainer.train()
    if case["layout"] == "prefix_shared" and case["per_forward"] is not None:
        check_pieces(trainer.batches, PROCESSES[launch])
    trainer.save_model(str(output))
    evaluations = [trainer.evaluate(Dataset.from_list(dataset[:5]))]  # as new rows, whose reference isn't cached
    for size in (1, 2, 3):
        trainer.args.per_device_eval_batch_size = size
        evaluations.append(trainer.evaluate())
    log = [line for line in trainer.state.log_history if "loss" in line]
    return {"before": before, "log": log, "evaluations": evaluations}


def main(cases_file: str, output: str) -> None:
    plan = json.loads(Path(cases_file).read_text())
    if plan["launch"].startswith("zero"):
        import deepspeed

        deepspeed.init_distributed("gloo")  # accelerate does so only where there are cards
    for name, case in plan["cases"].items():
        folder = Path(output) / name
        result = train(case, plan["launch"], plan["model"], folder)
        if PartialState().is_main_process:
            (folder / "result.json").write_text(json.dumps(result))
        for variable in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
            os.environ.pop(variable, None)
    if PROCESSES[plan["launch"]] > 1:
        assert gloo_threads() or not Path("/proc").is_dir()
        leave_launch()
        assert plan["launch"] == "fsdp2" or not gloo_threads()  # torch keeps the meshes of FSDP2


if __name__ == "__main__":
    main(*sys.argv[1:])
