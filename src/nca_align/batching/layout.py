"""Which layout a model can take, and the check of the packed row against padded."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel

from .attention import prefix_sharing_obstacle, share_prefixes
from .collator import RewardCollator

__all__ = ["compare", "judge", "obstacle", "sample_rows", "share_prefixes"]


def obstacle(models: list[PreTrainedModel], policy: nn.Module, pad_to_multiple_of: int | None) -> str | None:
    """Why a packed row can't be used, in words that end a sentence; None where it can."""
    for config in getattr(policy, "peft_config", {}).values():
        if config.is_prompt_learning:
            return f"{config.peft_type.value} puts virtual tokens in front of a row"
    if pad_to_multiple_of:
        return f"`pad_to_multiple_of` {pad_to_multiple_of} asks for padding"
    return next(filter(None, map(prefix_sharing_obstacle, models)), None)


def sample_rows(dataset: Any) -> list[dict[str, Any]]:
    """The first two rows, cut to a size that fits wherever the model does: the check keeps whole activations."""
    return [
        {
            "prompt_ids": row["prompt_ids"][-64:],
            "completion_ids": [completion[:48] for completion in row["completion_ids"][:3]],
            "rewards": row["rewards"][:3],
        }
        for row in itertools.islice(dataset, 2)
    ]


def compare(
    rows: list[dict[str, Any]],
    collator: RewardCollator,
    compute: Callable[[dict[str, Any], torch.Size], tuple[torch.Tensor, Any]],
    policy: nn.Module,
    device: torch.device,
    gradients: bool,
) -> tuple[float, float]:
    """How far the packed row is from padded on `rows`, relative to padded: log-probabilities, and their gradient.

    Args:
        compute: (chunk, (B, K)) to (B, K) log-probabilities, nats.
        policy: whose trainable parameters' gradients are compared, all together by their norm. A sum of the
            log-probabilities with unequal weights is what is differentiated: log-probabilities alone can agree to 1e-3
            where a convolution's gradient is off by a quarter.
        gradients: False to leave them out (0).
    """
    parameters = [p for p in policy.parameters() if p.requires_grad] if gradients else []
    results = []
    for layout in ("padded", "prefix_shared"):
        batch = send_to_device(replace(collator, layout=layout, completions_per_forward=None)(rows), device)
        (chunk,) = batch["chunks"]
        with torch.set_grad_enabled(bool(parameters)):
            logps = compute(chunk, batch["rewards"].shape)[0]
            weights = torch.linspace(0.5, 1.5, logps.numel(), device=logps.device).view_as(logps)
            loss = (weights * logps).sum()
            grads = torch.autograd.grad(loss, parameters, materialize_grads=True) if parameters else ()
        results.append((logps.detach(), grads))
    (padded, padded_grads), (packed, packed_grads) = results
    norm = sum(float(g.float().square().sum()) for g in padded_grads)
    pairs = zip(padded_grads, packed_grads, strict=True)
    difference = sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)
    return (
        float((packed - padded).abs().max() / padded.abs().max()),
        (difference / norm if norm else difference) ** 0.5,
    )


def judge(
    differences: list[tuple[float, float]], mixed_precision: str, *dtypes: torch.dtype | None
) -> tuple[bool, str]:
    """Whether all processes' `compare` found no more than rounding explains, and the figures in words.

    Args:
        dtypes: those that the model computes in.
    """
    half = mixed_precision in ("bf16", "fp16") or bool({*dtypes} & {torch.bfloat16, torch.float16})
    products = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    half |= any(own.fp32_precision not in ("none", "ieee") for own in products)  # TF32, or bfloat16 on the CPU
    allowed = (2e-2, 1e-1) if half else (1e-4, 1e-3)
    worst = torch.tensor(differences, dtype=torch.float64).amax(0).tolist()  # a NaN anywhere stays one
    figures = f"log-probabilities within {worst[0]:.1e}, gradients within {worst[1]:.1e}, relative"
    return all(value <= limit for value, limit in zip(worst, allowed, strict=True)), figures
