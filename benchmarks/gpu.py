"""A training step of a 7B model on one card: K = 4 completions of 512 tokens on a prompt of 512.

    python benchmarks/gpu.py            on a machine with a CUDA device; ten minutes, 24 GB
    python benchmarks/gpu.py --tiny     the same code on a tiny shape, on any machine: no figures

The shape is Mistral 7B's with random weights: NF4 where bitsandbytes is installed, LoRA of rank 16 on all linear
layers (PEFT's where it is installed), bf16, gradient checkpointing, NCA with the reference cached. It needs torch,
transformers and this repository, and neither TRL nor an installed `nca_align`. Measured are step time and peak memory:

    padded, SDPA                    four rows of 1,024 tokens
    padded, FlashAttention          where flash-attn is installed
    prefix_shared, varlen           one row of 2,560 tokens, torch.nn.attention.varlen in one call a layer
    prefix_shared, SDPA             the same row, an SDPA call a segment

interleaved in random order, and how far their log-probabilities and gradients are from the first's. An optimizer's
states are not in the step; their size is added to the peak where it is compared with 24 GB.
"""

import argparse
import importlib.util
import random
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # not necessarily installed
from machine import RESULTS, provenance, write_result
from nca_align.batching import attention
from nca_align.batching.collator import RewardCollator
from nca_align.losses import nca_loss
from nca_align.models.logprobs import add_token_logps

RANK = 16
# As `layout: auto` allows half precision
LOGPS_TOLERANCE, GRADIENT_TOLERANCE = 2e-2, 1e-1
MODEL_KEYS = ("input_ids", "attention_mask", "position_ids", "segments", "token_index", "target_ids")


@dataclass(frozen=True)
class Shape:
    config: dict[str, Any]
    prompt: int
    completions: int
    completion: int


MISTRAL_7B = Shape(
    {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": None,
    },
    prompt=512, completions=4, completion=512,
)  # fmt: skip
TINY = Shape(
    {
        "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "sliding_window": None,
    },
    prompt=24, completions=4, completion=16,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A way to compute the step: layout, attention implementation, and whether torch's varlen kernels may be used."""

    layout: str
    implementation: str
    varlen: bool = False


ROWS = {
    "padded, SDPA": Row("padded", "sdpa"),
    "padded, FlashAttention": Row("padded", "flash_attention_2"),
    "prefix_shared, varlen": Row("prefix_shared", "prefix_shared_over_sdpa", varlen=True),
    "prefix_shared, SDPA": Row("prefix_shared", "prefix_shared_over_sdpa"),
}


class LoRALinear(nn.Module):
    """LoRA around a linear layer, where PEFT is not installed."""

    def __init__(self, base: nn.Module, device: torch.device):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, RANK, bias=False, device=device, dtype=torch.bfloat16)
        self.up = nn.Linear(RANK, base.out_features, bias=False, device=device, dtype=torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def build_model(shape: Shape, device: torch.device) -> tuple[nn.Module, PreTrainedModel, dict[str, str]]:
    """(the model to call, the base model in it, what it is made of); bf16 weights are never held whole."""
    torch.manual_seed(0)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(MistralConfig(**shape.config), dtype=torch.bfloat16)
    base.set_attn_implementation("sdpa")
    quantised = importlib.util.find_spec("bitsandbytes") is not None
    for name, module in list(base.named_modules()):
        if quantised and isinstance(module, nn.Linear) and name != "lm_head":
            base.set_submodule(name, _nf4_linear(module, device))
    for name, parameter in list(base.named_parameters()):
        if parameter.is_meta:
            parent, _, leaf = name.rpartition(".")
            value = (
                _random(parameter.shape, device) if parameter.dim() > 1 else torch.ones_like(parameter, device=device)
            )
            setattr(base.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
    base.model.rotary_emb = type(base.model.rotary_emb)(base.config).to(device)  # buffers alone
    base.requires_grad_(False)
    base.is_loaded_in_4bit = quantised  # PEFT looks here
    base.gradient_checkpointing_enable({"use_reentrant": False})
    add_token_logps(base)
    model, adapter = _with_lora(base, device)
    return model, base, {"weights": "NF4" if quantised else "bf16 (NF4 skipped: no bitsandbytes)", "adapter": adapter}


def _nf4_linear(linear: nn.Linear, device: torch.device) -> nn.Module:
    import bitsandbytes as bnb

    quantised = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    weight = _random(linear.weight.shape, device)
    quantised.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=quantised).to(device)
    return quantised


def _random(shape: torch.Size, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02


def _with_lora(base: PreTrainedModel, device: torch.device) -> tuple[nn.Module, str]:
    """Both factors random, so that the gradient of either says something."""
    if importlib.util.find_spec("peft") is not None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=RANK, lora_alpha=RANK, lora_dropout=0.0, target_modules="all-linear", init_lora_weights=False,
            task_type="CAUSAL_LM",
        )  # fmt: skip
        model, adapter = get_peft_model(base, config, autocast_adapter_dtype=False), "LoRA r 16, PEFT"
    else:
        for name, module in list(base.named_modules()):
            if name != "lm_head" and hasattr(module, "in_features"):
                base.set_submodule(name, LoRALinear(module, device))
        model, adapter = base, "LoRA r 16, this script's own (no peft)"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = _random(parameter.shape, device)
            if "lora_B" in name or ".up." in name:
                parameter.data *= 0.1
    return model, adapter


def skipped(row: Row, device: torch.device) -> str | None:
    if row.implementation == "flash_attention_2" and not (device.type == "cuda" and is_flash_attn_2_available()):
        return "flash-attn is not installed" if device.type == "cuda" else "no CUDA device"
    if row.varlen and device.type != "cuda":
        return "no CUDA device"
    return None


def build_step(
    model: nn.Module, base: PreTrainedModel, shape: Shape, device: torch.device
) -> Callable[[Row], tuple[torch.Tensor, torch.Tensor]]:
    """A function from a row to its (loss, (1, K) log-probabilities), gradients left on the parameters."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, shape.config["vocab_size"], (length,), generator=generator).tolist()

    example = {
        "prompt_ids": ids(shape.prompt),
        "completion_ids": [ids(shape.completion) for _ in range(shape.completions)],
        "rewards": [float(k) for k in range(shape.completions)],
        # about what a random model gives them
        "ref_logps": [-shape.completion * float(torch.tensor(shape.config["vocab_size"]).log())] * shape.completions,
    }

    def step(row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        batch = RewardCollator(pad_token_id=2, layout=row.layout)([example])
        (chunk,) = batch["chunks"]
        inputs = {
            name: chunk[name].to(device) if isinstance(chunk[name], torch.Tensor) else chunk[name]
            for name in MODEL_KEYS
            if name in chunk
        }
        token_logps = model(**inputs, row_length=chunk["input_ids"].shape[1]).token_logps
        logps = torch.zeros(batch["rewards"].numel(), dtype=torch.float64, device=device)
        logps = logps.index_add(0, chunk["completion_index"].to(device), token_logps.double())
        logps = logps.view(batch["rewards"].shape).float()
        loss = nca_loss(logps, batch["ref_logps"].to(device), batch["rewards"].to(device), alpha=1.0, beta=0.01).mean()
        loss.backward()
        return loss.detach(), logps.detach()

    attention.share_prefixes(base)  # registers what the rows choose from

    takes_varlen = attention._varlen_takes

    def run(row: Row) -> tuple[torch.Tensor, torch.Tensor]:
        base.set_attn_implementation(row.implementation)
        attention._varlen_takes = takes_varlen if row.varlen else lambda *tensors: False
        model.train()
        model.zero_grad(set_to_none=True)
        return step(row)

    return run


def measure(shape: Shape, device: torch.device, repeats: int) -> dict[str, Any]:
    model, base, parts = build_model(shape, device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    step = build_step(model, base, shape, device)
    rows: dict[str, dict[str, Any]] = {name: {"skipped": skipped(row, device)} for name, row in ROWS.items()}
    static = torch.cuda.memory_allocated() if device.type == "cuda" else None
    reference: tuple[torch.Tensor, torch.Tensor] | None = None
    for name, row in ROWS.items():
        if rows[name]["skipped"]:
            print(f"{name}: skipped, {rows[name]['skipped']}", flush=True)
            continue
        try:
            step(row)  # a warm-up, with its compilations
            if device.type == "cuda":
                model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            loss, logps = step(row)
        except torch.OutOfMemoryError as error:
            rows[name]["skipped"] = f"out of memory: {str(error).splitlines()[0]}"
            continue
        gradient = torch.cat([p.grad.flatten().float().cpu() for p in trainable])  # off the card, whose peak counts
        reference = reference or (logps, gradient)
        rows[name] = {"loss": float(loss), "seconds": []} | _agreement(logps, gradient, *reference)
        if device.type == "cuda":
            reserved = torch.cuda.max_memory_reserved() + 8 * sum(p.numel() for p in trainable)  # Adam's two moments
            rows[name] |= {
                "static_bytes": static,
                "peak_bytes": torch.cuda.max_memory_allocated(),
                "reserved_with_optimizer_bytes": reserved,
                "fits_24_gb": reserved <= 24e9,
            }
    running = [name for name in rows if not rows[name].get("skipped")]
    generator = random.Random(0)
    for _ in range(repeats):
        for name in generator.sample(running, len(running)):
            _synchronise(device)
            start = time.perf_counter()
            step(ROWS[name])
            _synchronise(device)
            rows[name]["seconds"].append(time.perf_counter() - start)
    for name in running:
        seconds = rows[name]["seconds"]
        rows[name] |= {"median": statistics.median(seconds), "spread": [min(seconds), max(seconds)]}
        print(f"{name}: {rows[name]}", flush=True)
    return {
        "model": parts | {"config": shape.config, "trainable_parameters": sum(p.numel() for p in trainable)},
        "example": {"prompts": [shape.prompt], "completions": [[shape.completion] * shape.completions]},
        "rows": rows,
    }


def _agreement(logps, gradient, reference_logps, reference_gradient) -> dict[str, Any]:
    """Distances to the first row's, relative: the largest of the K log-probabilities, and the gradient's by norm."""
    logps_off = float(((logps - reference_logps) / reference_logps).abs().max())
    gradient_off = float((gradient - reference_gradient).norm() / reference_gradient.norm())
    agrees = logps_off <= LOGPS_TOLERANCE and gradient_off <= GRADIENT_TOLERANCE
    return {"logps_off": logps_off, "gradient_off": gradient_off, "agrees": agrees}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on any machine; writes only to --output")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder of the result file; benchmarks/results by default")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not (cuda or options.tiny):
        print("7B shape: skipped, there is no CUDA device; no result is written")
        return
    device = torch.device("cuda" if cuda else "cpu")
    card = torch.cuda.get_device_name() if cuda else "cpu"
    result = measure(TINY if options.tiny else MISTRAL_7B, device, options.repeats)
    folder = options.output or (None if options.tiny else RESULTS)
    if folder is not None:
        command = shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
        result = {"card": card} | result | provenance(command, "peft", "bitsandbytes", "flash-attn")
        name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
        write_result(folder, f"gpu-{'tiny-' if options.tiny else ''}{name}", result)
    disagreeing = [name for name, row in result["rows"].items() if row.get("agrees") is False]
    if disagreeing:
        sys.exit(f"too far from the first row: {', '.join(disagreeing)}")


if __name__ == "__main__":
    main()
