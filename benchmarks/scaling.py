"""The memory that a training step needs, by arithmetic, for models that don't fit here; and the arithmetic checked.

    python benchmarks/scaling.py           # the tables of docs/scaling.md
    python benchmarks/scaling.py --check   # against measured peaks of small models on this CPU, each in its own process

All sizes are bytes, `tokens` those that one forward holds. What is counted is stated at each function; temporary
buffers of one operation, fragmentation and the CUDA context (about 0.5 GB) are not.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass

GIB = 1 << 30
NF4 = 0.516  # bytes a weight: 4 bits, a scale of 8 bits for each 64, one of 32 bits for each 16,384
LOGITS_BUDGET = 2 * GIB  # nca_align.models.logprobs, on a card


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder; `experts` MLPs in each layer, of which `active` run for a token."""

    layers: int
    hidden: int
    mlp: int
    kv: int  # key-value heads × their size
    vocabulary: int
    experts: int = 1
    active: int = 1

    @property
    def linear(self) -> int:
        """Weights of the layers."""
        attention = 2 * self.hidden * (self.hidden + self.kv)
        return self.layers * (attention + 3 * self.hidden * self.mlp * self.experts)

    @property
    def quantised(self) -> int:
        """Those that `load_in_4bit` quantises: transformers 5 holds all experts in one tensor, which stays as it is."""
        experts = 3 * self.layers * self.hidden * self.mlp * self.experts if self.experts > 1 else 0
        return self.linear - experts

    @property
    def embeddings(self) -> int:
        return 2 * self.hidden * self.vocabulary

    @property
    def weights(self) -> int:
        return self.linear + self.embeddings + self.hidden * (2 * self.layers + 1)

    def adapter(self, rank: int) -> int:
        """LoRA on all linear layers, each expert's too."""
        attention = 2 * self.hidden + (self.hidden + self.kv) * 2 + 2 * self.hidden
        mlp = 3 * (self.hidden + self.mlp) * self.experts
        return self.layers * rank * (attention + mlp)


SHAPES = {
    "7B": Shape(32, 4096, 14336, 1024, 32000),
    "8x7B": Shape(32, 4096, 14336, 1024, 32000, experts=8, active=2),
    "70B": Shape(80, 8192, 28672, 1024, 128256),
}


def qlora(shape: Shape, rank: int = 16) -> float:
    """NF4 linear layers, all else in bf16; adapters in fp32 with gradients and Adam's two moments."""
    return shape.quantised * NF4 + (shape.weights - shape.quantised) * 2 + shape.adapter(rank) * 16


def lora(shape: Shape, rank: int = 16) -> float:
    """A bf16 model, and adapters as above."""
    return shape.weights * 2 + shape.adapter(rank) * 16


def full(shape: Shape) -> float:
    """fp32 weights, gradients and Adam's two moments, to be divided by the processes that they are sharded over."""
    return shape.weights * 16


def tokens(layout: str, k: int, prompt: int = 512, completion: int = 512, per_forward: int | None = None) -> int:
    """Positions in one forward of one prompt with K completions."""
    k = min(k, per_forward or k)
    return k * (prompt + completion) if layout == "padded" else prompt + k * (completion + 1)


def layer_activations(shape: Shape, size: int = 2) -> int:
    """What autograd keeps of one layer, a token, in elements of `size` bytes.

    Two norms: input, normalised and output (6 hidden; in fp32 where the model is bf16: one more each); queries, their
    attention's output and its copy (3 hidden); keys and values (2 kv); the gate, activation, up and product of the MLP
    (4 mlp for each active expert).
    """
    norms = 6 * shape.hidden + (2 * shape.hidden if size == 2 else 0)
    return size * (norms + 3 * shape.hidden + 2 * shape.kv + 4 * shape.mlp * shape.active)


def gathered(shape: Shape, layout: str, k: int, prompt: int, completion: int, size: int = 2) -> int:
    """Keys and values that the packed row copies in a layer: each segment's own and those of its path."""
    return 0 if layout == "padded" else size * 2 * shape.kv * (prompt + k * (prompt + completion + 1))


def activations(
    shape: Shape, layout: str, k: int, prompt: int = 512, completion: int = 512, *, per_forward: int | None = None,
    checkpointing: bool = True, size: int = 2, budget: int = LOGITS_BUDGET,
) -> float:  # fmt: skip
    """The most that one forward and backward keep.

    With checkpointing each layer keeps its input, and one layer at a time all of the above and its gradient. At the end
    of the forward the logits of the labelled positions and their gradient are there as well, in fp32 up to `budget`.
    """
    held = min(k, per_forward or k)
    n = tokens(layout, k, prompt, completion, per_forward)
    logits = min(2 * 4 * held * completion * shape.vocabulary, budget)
    layer = n * layer_activations(shape, size) + gathered(shape, layout, held, prompt, completion, size)
    if not checkpointing:
        return shape.layers * layer + logits
    return shape.layers * n * shape.hidden * size + max(1.5 * layer, logits)


def tables() -> None:
    print("| | weights | bf16 | NF4, the rest bf16 | LoRA r 16, its gradients and Adam | QLoRA in all | "
          "full fine-tuning in fp32 with Adam |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, shape in SHAPES.items():
        adapter = shape.adapter(16) * 16
        print(f"| {name} | {shape.weights / 1e9:.1f} B | {_gib(shape.weights * 2)} | {_gib(qlora(shape) - adapter)} | "
              f"{_gib(adapter)} | {_gib(qlora(shape))} | {_gib(full(shape))} |")  # fmt: skip
    print("\n| bf16, gradient checkpointing | K = 2 | K = 4 | K = 16 | K = 16, `completions_per_forward: 4` |")
    print("| --- | --- | --- | --- | --- |")
    for name, shape in SHAPES.items():
        for layout in ("padded", "prefix_shared"):
            cells = [_gib(activations(shape, layout, k)) for k in (2, 4, 16)]
            cells.append(_gib(activations(shape, layout, 16, per_forward=4)))
            print(f"| {name}, {layout} | {' | '.join(cells)} |")


def _gib(value: float) -> str:
    return f"{value / GIB:.1f}"


# The check

SMALL = {
    "wide": Shape(4, 512, 2048, 128, 8000),
    "deep": Shape(12, 256, 1024, 256, 8000),
}
CASES = [
    (name, layout, k, checkpointing)
    for name in SMALL
    for layout in ("padded", "prefix_shared")
    for k, checkpointing in ((2, False), (8, False), (8, True))
]
PROMPT, COMPLETION = 256, 256


def measure(name: str, layout: str, k: int, checkpointing: bool) -> int:
    """Bytes by which a forward and backward of the trainer's own batch rise above the model with its gradients."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from machine import peak_memory
    from nca_align.batching.attention import share_prefixes
    from nca_align.batching.collator import RewardCollator
    from nca_align.models.logprobs import add_token_logps

    shape = SMALL[name]
    head = 64
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers, num_attention_heads=shape.hidden // head,
            num_key_value_heads=shape.kv // head, max_position_embeddings=4096,
        )
    ).train()  # fmt: skip
    add_token_logps(model)
    if layout == "prefix_shared":
        share_prefixes(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, shape.vocabulary, (length,), generator=generator).tolist()

    def step(completions: int, length: int) -> None:
        row = {
            "prompt_ids": ids(length), "completion_ids": [ids(length) for _ in range(completions)],
            "rewards": [float(i) for i in range(completions)],
        }  # fmt: skip
        (chunk,) = RewardCollator(pad_token_id=0, layout=layout)([row])["chunks"]
        kept = ("input_ids", "attention_mask", "position_ids", "segments", "token_index", "target_ids")
        inputs = {key: chunk[key] for key in kept if key in chunk}
        model(**inputs, row_length=chunk["input_ids"].shape[1]).token_logps.sum().backward()

    step(2, 16)  # what a first step sets up once
    measured = peak_memory(lambda: step(k, PROMPT))
    if measured is None:
        sys.exit("the peak is read from Linux's /proc/self/clear_refs, which isn't here")
    return measured[1]


def check() -> None:
    print("| 256 + 256 tokens, fp32, CPU | arithmetic, MB | measured, MB | measured / arithmetic |")
    print("| --- | --- | --- | --- |")
    for name, layout, k, checkpointing in CASES:
        expected = activations(
            SMALL[name], layout, k, PROMPT, COMPLETION, checkpointing=checkpointing, size=4, budget=4 * GIB
        )
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
