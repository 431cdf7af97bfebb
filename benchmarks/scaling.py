"""The memory that a run needs, by the arithmetic of `nca-align train --dry_run`; and that arithmetic checked.

    python benchmarks/scaling.py           # the tables of docs/guide/scaling.md
    python benchmarks/scaling.py --check   # against measured peaks of small models on this CPU, each in its own process

What is counted is said in `nca_align.models.memory` and `nca_align.training.card_memory`. A fifth more is for what
isn't: temporary buffers of one operation, fragmentation and the CUDA context.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlamaConfig, MistralConfig, MixtralConfig

from nca_align.models.memory import GIB
from nca_align.training.card_memory import Quantisation
from nca_align.training.launch import Launch
from nca_align.training.memory_plan import Planner, Setup

MODELS = {
    "7B": MistralConfig(sliding_window=None, architectures=["MistralForCausalLM"]),
    "8x7B": MixtralConfig(architectures=["MixtralForCausalLM"]),
    "70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256, architectures=["LlamaForCausalLM"],
    ),
}  # fmt: skip
LORA = LoraConfig(
    r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    task_type="CAUSAL_LM",
)  # fmt: skip
NF4, ALONE = Quantisation(4), Launch()
PROMPT = COMPLETION = 512


def example(k: int, prompt: int = PROMPT, completion: int = COMPLETION) -> dict[str, Any]:
    """A prompt with K completions that share no token, which only their lengths matter of."""
    completions = [[3 + i, *range(100, 99 + completion)] for i in range(k)]
    return {"prompt_ids": list(range(100, 100 + prompt)), "completion_ids": completions}


@cache
def planner(name: str, layout: str = "prefix_shared", dtype: torch.dtype = torch.bfloat16) -> Planner:
    return Planner(MODELS[name], [example(4)], dtype, LORA, layout, mixed=torch.bfloat16)


def setup(launch: Launch = ALONE, **own: Any) -> Setup:
    """One prompt a forward, 32 a step, as the recipes have it."""
    given = {
        "batch_size": 1, "accumulation": max(1, 32 // launch.processes), "tokens_per_forward": None,
        "max_length": None, "checkpointing": True, "optim": "adamw_torch_fused", "use_peft": False,
        "quantisation": None, "precomputes": True, "syncs_each_batch": True,
    }  # fmt: skip
    return Setup(launch, **given | own)


QLORA = {"use_peft": True, "quantisation": NF4, "optim": "paged_adamw_32bit"}
FSDP2, SYNC = "`accelerate/fsdp2.yaml`", "`sync_each_batch`"
MIXTRAL = "`recipes/nca_mixtral8x7b_ultrainteract.yaml`"
# machine, GB of a card, what, its model and setup, what to start from
MACHINES = (
    ("one card of 24 GB", 24, "7B, QLoRA", setup(**QLORA), "`configs/nca_mistral7b.yaml`, `accelerate/one_gpu.yaml`"),
    ("one card of 80 GB", 80, "7B, LoRA in bf16", setup(use_peft=True), "the same without `load_in_4bit`"),
    ("one card of 80 GB", 80, "70B, QLoRA", setup(**QLORA), "the same with the model's name"),
    ("eight of 24 GB", 24, "7B, QLoRA", setup(Launch(8), **QLORA), "the same, `accelerate/multi_gpu.yaml`"),
    ("eight of 24 GB", 24, "7B, full", setup(Launch(8, "FSDP2")), f"{FSDP2} with {SYNC}"),
    ("eight of 80 GB", 80, "7B, full", setup(Launch(8, "FSDP2"), syncs_each_batch=False), FSDP2),
    ("eight of 80 GB", 80, "8x7B, LoRA in bf16", setup(Launch(8, "FSDP2"), use_peft=True), FSDP2),
    ("two machines of eight 80 GB cards", 80, "8x7B, full", setup(Launch(16, "FSDP2"), syncs_each_batch=False),
     f"{MIXTRAL}, {FSDP2}, `num_machines: 2`"),
    ("two machines of eight 80 GB cards", 80, "8x7B, full", setup(Launch(16, "FSDP2")), f"the same with {SYNC}"),
    ("four of them", 80, "70B, full", setup(Launch(32, "FSDP2")), "the same, `num_machines: 4`"),
)  # fmt: skip


def tables() -> None:
    for lines in (held_table(), batch_table(), machine_table()):
        print("\n".join(lines), end="\n\n")


def held_table() -> Iterator[str]:
    yield ("| | weights | bf16 | NF4, the rest bf16 | LoRA r 16 in fp32, its gradients and Adam | QLoRA in all | "
           "full fine-tuning in fp32 with Adam |")  # fmt: skip
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for name in MODELS:
        lora, qlora = (planner(name).held(own) for own in (setup(use_peft=True), setup(**QLORA)))
        full = planner(name, dtype=torch.float32).held(setup())
        yield (
            f"| {name} | {full['weights'] / 4e9:.1f} B | {_gib(lora['weights'])} | {_gib(qlora['weights'])} | "
            f"{_gib(sum(lora.values()) - lora['weights'])} | {_gib(sum(qlora.values()))} | {_gib(sum(full.values()))} |"
        )


def batch_table() -> Iterator[str]:
    yield "| bf16, gradient checkpointing | K = 2 | K = 4 | K = 16 | K = 16, `tokens_per_forward: 2048` |"
    yield "| --- | --- | --- | --- | --- |"
    for name in MODELS:
        for layout in ("padded", "prefix_shared"):
            cells = [_gib(batch(name, layout, k)) for k in (2, 4, 16)]
            yield f"| {name}, {layout} | {' | '.join([*cells, _gib(batch(name, layout, 16, 2048))])} |"


def batch(name: str, layout: str, k: int, per_forward: int | None = None) -> float:
    """Bytes of one prompt's forward and backward, of a model that is sharded and computes in bf16."""
    plan = planner(name, layout)
    plan.rows = [example(k)]
    return sum(plan.kept(setup(Launch(8, "FSDP2"), tokens_per_forward=per_forward)).peak(True))


def machine_table() -> Iterator[str]:
    yield "| machine | model | held | the batch | in all, with a fifth more | start from |"
    yield "| --- | --- | --- | --- | --- | --- |"
    yield "| no GPU | 135M, LoRA | | | | `configs/quickstart.yaml` |"
    for machine, size, what, own, start in MACHINES:
        dtype = torch.bfloat16 if own.use_peft else torch.float32
        plan = planner(what.split(",")[0], dtype=dtype)
        plan.rows = [example(4)]
        memory = plan.memory(own)
        batch = sum(memory.parts[part] for part in ("activations", "head"))
        fits = "" if memory.needed <= size * 1e9 else ": **does not fit**"
        yield (
            f"| {machine} | {what} | {_gib(memory.total - batch)} | {_gib(batch)} | {_gib(memory.needed)}{fits} | "
            f"{start} |"
        )


def _gib(value: float) -> str:
    return f"{value / GIB:.1f}"


# The check

SMALL = {
    "wide": {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
             "num_key_value_heads": 2},
    "deep": {"num_hidden_layers": 12, "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4,
             "num_key_value_heads": 4},
}  # fmt: skip
CASES = [
    (name, layout, k, checkpointing)
    for name in SMALL
    for layout in ("padded", "prefix_shared")
    for k, checkpointing in ((2, False), (8, False), (8, True))
]
LENGTH = 256


def small(name: str) -> LlamaConfig:
    return LlamaConfig(vocab_size=8000, max_position_embeddings=4096, architectures=["LlamaForCausalLM"], **SMALL[name])


def computed(name: str, layout: str, k: int, checkpointing: bool) -> float:
    """Bytes above the model with its gradients, by the arithmetic."""
    plan = Planner(small(name), [example(k, LENGTH, LENGTH)], torch.float32, None, layout, device="cpu")
    return sum(plan.kept(setup()).peak(checkpointing))


def measure(name: str, layout: str, k: int, checkpointing: bool) -> int:
    """Bytes by which a forward and backward of the trainer's own batch rise above the model with its gradients."""
    from transformers import LlamaForCausalLM

    from machine import peak_memory
    from nca_align.batching.attention import share_prefixes
    from nca_align.batching.collator import RewardCollator
    from nca_align.models.logprobs import add_token_logps, forward_chunk

    model = LlamaForCausalLM(small(name)).train()
    add_token_logps(model)
    if layout == "prefix_shared":
        share_prefixes(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step(completions: int, length: int) -> None:
        (chunk,) = RewardCollator(0, layout).chunks([example(completions, length, length)])
        forward_chunk(model, chunk).token_logps.sum().backward()

    step(2, 16)  # what a first step sets up once
    measured = peak_memory(lambda: step(k, LENGTH))
    if measured is None:
        sys.exit("the peak is read from Linux's /proc/self/clear_refs, which isn't here")
    return measured[1]


def check() -> None:
    print("| 256 + 256 tokens, fp32, CPU | arithmetic, MB | measured, MB | measured / arithmetic |")
    print("| --- | --- | --- | --- |")
    for name, layout, k, checkpointing in CASES:
        expected = computed(name, layout, k, checkpointing)
        done = subprocess.run(
            [sys.executable, __file__, "--measure", json.dumps([name, layout, k, checkpointing])],
            check=True, capture_output=True, text=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        )  # fmt: skip
        found = int(done.stdout.splitlines()[-1])
        kind = f"{name}, {layout}, K = {k}{', checkpointing' if checkpointing else ''}"
        print(f"| {kind} | {expected / 1e6:.0f} | {found / 1e6:.0f} | {found / expected:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure small models here")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(measure(*json.loads(arguments.measure)))
    elif arguments.check:
        check()
    else:
        tables()


if __name__ == "__main__":
    main()
