"""Which layout a run has, packed (`prefix_shared`) or padded, and the check of the one against the other.

What in a model is in the way of packing stands in `batching.attention.prefix_sharing_obstacle`.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

from ..batching.attention import prefix_sharing_obstacle, share_prefixes
from ..batching.collator import Batch, Chunk, RewardCollator
from ..errors import UnsupportedError, notify
from ..models.policy import base_model, eval_mode

# a chunk and its batch to (B, K) log-probabilities, nats
Compute = Callable[[Chunk, Batch], tuple[Tensor, Any]]
Row = dict[str, Any]


def obstacle(models: list[nn.Module], pad_to_multiple_of: int | None) -> str | None:
    """Why a packed row can't be used, in words that end a sentence; None where it can."""
    if pad_to_multiple_of:
        return f"`pad_to_multiple_of` {pad_to_multiple_of} asks for padding"
    return next(filter(None, map(prefix_sharing_obstacle, models)), None)


def choose_layout(collator: RewardCollator, models: list[nn.Module]) -> str | None:
    """Give the collator the layout that it asks for, or under "auto" the one that the models allow.

    Args:
        collator: with `layout` "auto", "prefix_shared" or "padded".
        models: those that read the batches, with their adapters; they are prepared for packed rows.

    Returns:
        What was asked for, where `verify` is to follow.

    Raises:
        NotImplementedError: "prefix_shared", and something is in its way.
    """
    requested = collator.layout
    reason = None if requested == "padded" else obstacle(models, collator.pad_to_multiple_of)
    if reason and requested == "prefix_shared":
        raise UnsupportedError(f"`layout: prefix_shared` can't be used here: {reason}. Use `layout: padded`.")
    if requested == "padded" or reason:
        collator.layout = "padded"
        notify(f"Layout: padded, {reason or 'as asked for'}.")
        return None
    for model in models:
        share_prefixes(base_model(model))
    collator.layout = "prefix_shared"
    return requested


def verify(
    requested: str,
    dataset: Any,
    collator: RewardCollator,
    compute: Compute,
    policy: nn.Module,
    accelerator: Accelerator,
    gradients: bool,
) -> None:
    """Compare the packed row with padded on the first rows, and go back to padded under "auto"; all processes alike.

    Args:
        requested: what `choose_layout` returned.
        dataset: tokenised rows.
        compute, policy, gradients: see `compare`.

    Raises:
        NotImplementedError: "prefix_shared", and they don't agree.
    """
    with eval_mode(policy), accelerator.autocast():
        difference = compare(sample_rows(dataset), collator, compute, policy, accelerator.device, gradients)
    base = base_model(accelerator.unwrap_model(policy))
    quantization = getattr(base.config, "quantization_config", None)
    agrees, figures = judge(
        gather_object([difference]), accelerator.mixed_precision,
        base.dtype, getattr(quantization, "bnb_4bit_compute_dtype", None),  # NF4 computes in its own
        *(parameter.dtype for parameter in policy.parameters() if parameter.requires_grad),  # TRL's QLoRA: bf16
    )  # fmt: skip
    if agrees:
        notify(f"Layout: prefix_shared, each shared token once; agrees with padded on the first rows: {figures}.")
    elif requested == "prefix_shared":
        raise UnsupportedError(
            f"`layout: prefix_shared` does not agree with padded on the first rows ({figures}): "
            f"{type(base).__name__} mixes positions in a way that it can't follow. Use `layout: padded`."
        )
    else:
        collator.layout = "padded"
        notify(f"Layout: padded, since prefix_shared does not agree with it on the first rows ({figures}).")


def sample_rows(dataset: Any) -> list[Row]:
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
    rows: list[Row],
    collator: RewardCollator,
    compute: Compute,
    policy: nn.Module,
    device: torch.device,
    gradients: bool,
) -> tuple[float, float]:
    """How far the packed row is from padded on `rows`, relative to padded: log-probabilities, and their gradient.

    Args:
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
            logps = compute(chunk, batch)[0]
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
