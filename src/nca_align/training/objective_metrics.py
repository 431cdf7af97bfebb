"""What is logged of several rewards: how the policy orders completions by each, and how they go together."""

import torch
from torch import Tensor

from ..batching.collator import Batch
from ..reward_tensors import better_pairs, logratios


@torch.no_grad()
def objective_metrics(
    logps: Tensor, ref_logps: Tensor, batch: Batch, beta: float, correlations: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each of several rewards, where there are some, as `row_metrics` has the reward that is trained on.

    - `objectives/NAME/accuracies`: `rewards/accuracies` by this reward; a completion without it is left out.
    - `objectives/NAME/corr_length`, `objectives/NAME/corr_OTHER`: Pearson's correlation within the prompt, of those
      completions that have both; no weight where either is constant.

    Args:
        logps, ref_logps: (B, K), nats.
        batch: with `objectives`, `valid`, `lengths`.
        beta: implicit reward per nat.
        correlations: whether they are wanted; they don't change with the policy.
    """
    objectives, mask = batch.get("objectives", {}), batch["valid"]
    if len(objectives) < 2:
        return {}
    ratios = logratios(logps, ref_logps, mask)
    higher = better_pairs(beta * ratios, mask)
    others = {"length": batch["lengths"], **objectives}
    metrics = {}
    for name, values in objectives.items():
        better = better_pairs(values, mask)  # never of a gap, which is NaN
        pairs = better.sum((1, 2))
        metrics[f"objectives/{name}/accuracies"] = ((better & higher).sum((1, 2)) / pairs.clamp(min=1), pairs > 0)
        others.pop(name)
        for other, own in others.items() if correlations else ():
            metrics[f"objectives/{name}/corr_{other}"] = _correlation(values.float(), own.float(), mask)
    return {name: (value.to(ratios.dtype), weight.to(ratios.dtype)) for name, (value, weight) in metrics.items()}


def _correlation(x: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) Pearson's correlation within a row, over the True of `mask` where both are numbers; and where it exists."""
    there = mask & x.isfinite() & y.isfinite()
    constant = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    centred = []
    for values in (x, y):
        first = values.masked_fill(~there, -torch.inf).amax(1, keepdim=True)
        constant |= ~(there & (values != first)).any(1)
        mean = torch.where(there, values, 0).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
        centred.append(torch.where(there, values - mean, 0))
    a, b = centred
    scale = (a.square().sum(1) * b.square().sum(1)).sqrt()
    return torch.where(constant, 0, (a * b).sum(1) / scale.clamp(min=1e-30)), ~constant
