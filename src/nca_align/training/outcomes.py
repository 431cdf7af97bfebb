"""How well σ(r) tells right completions from wrong ones, over all of an evaluation, whatever their prompt."""

from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..reward_tensors import logratios

_BINS = 10


@torch.no_grad()
def label_metrics(
    logps: Tensor, ref_logps: Tensor, labels: Tensor, mask: Tensor, beta: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Means of right and of wrong completions as (value, weight), as `metrics.row_metrics` has them.

    `rewards/right` and `rewards/wrong` are the mean r, `logratios/right` and `logratios/wrong` the mean log-ratio in
    nats. A label y counts as y of a right completion and 1 − y of a wrong one: means are over completions.

    Args:
        logps, ref_logps, labels, mask: (B, K), labels from 0 (wrong) to 1 (right).
        beta: implicit reward per nat.

    Returns:
        Metric name to (value, weight), both (B,).
    """
    ratios = logratios(logps, ref_logps, mask)
    right = torch.where(mask, labels, 0).to(ratios.dtype)
    metrics: dict[str, tuple[Tensor, Tensor]] = {}
    for name, share in (("right", right), ("wrong", mask.to(right.dtype) - right)):
        weight = share.sum(1)
        mean = (ratios * share).sum(1) / weight.clamp(min=1e-9)
        metrics |= {f"logratios/{name}": (mean, weight), f"rewards/{name}": (beta * mean, weight)}
    return metrics


class Outcomes:
    """The implicit rewards and labels of an evaluation's completions, and their figures over all processes."""

    def __init__(self) -> None:
        self._values: list[Tensor] = []

    @torch.no_grad()
    def add(self, logps: Tensor, ref_logps: Tensor, labels: Tensor, mask: Tensor, beta: float, counted: Tensor) -> None:
        """Add completions, as `label_metrics` has them, of the prompts that are `counted`: (B,) bool."""
        rewards, mask = beta * logratios(logps, ref_logps, mask), mask & counted.unsqueeze(1)
        self._values.append(torch.stack([rewards[mask].double(), labels[mask].double()]).cpu())

    def clear(self) -> None:
        self._values.clear()

    def gather(self) -> dict[str, float]:
        """`outcome_figures` of what all processes have added since the last call; every process must call it."""
        own = torch.cat(self._values, 1).tolist() if self._values else [[], []]
        self.clear()
        parts = gather_object([own])
        rewards, labels = ([value for part in parts for value in part[i]] for i in (0, 1))
        return outcome_figures(rewards, labels) if rewards else {}


def outcome_figures(rewards: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Accuracy of the sign, AUC and calibration of p = σ(r) as the chance that a completion is right.

    - `outcome/accuracy`: share of the completions that are right where r > 0 and wrong where r < 0; r = 0 is half.
    - `outcome/auc`: chance that a right completion, of any prompt, has a higher r than a wrong one; equal r are half.
      Absent where all are right, or all wrong.
    - `outcome/brier`: mean (p − y)².
    - `outcome/ece`: mean over completions of |mean p − mean y| of its bin, of ten equal bins of p; 1 is in the last.

    A label y within (0, 1) counts as y of a right completion and 1 − y of a wrong one in the first two.

    Args:
        rewards: N implicit rewards.
        labels: N labels from 0 to 1.
    """
    r, y = (torch.tensor(values, dtype=torch.float64) for values in (rewards, labels))
    p, n = r.sigmoid(), len(r)
    figures = {
        "outcome/accuracy": float((0.5 + (y - 0.5) * r.sign()).mean()),
        "outcome/brier": float((p - y).square().mean()),
    }
    bins = (p * _BINS).long().clamp(max=_BINS - 1)
    gaps = torch.zeros(_BINS, dtype=torch.float64).index_add(0, bins, p - y)
    figures["outcome/ece"] = float(gaps.abs().sum()) / n
    values, place = r.unique(return_inverse=True)
    right, wrong = (torch.zeros(len(values), dtype=torch.float64).index_add(0, place, share) for share in (y, 1 - y))
    pairs = float(right.sum() * wrong.sum())
    if pairs:
        below = wrong.cumsum(0) - wrong
        figures["outcome/auc"] = float((right * (below + wrong / 2)).sum()) / pairs
    return figures


def are_labels(rewards: Tensor, mask: Tensor) -> bool:
    """Whether all rewards lie from 0 to 1."""
    return bool((((rewards >= 0) & (rewards <= 1)) | ~mask).all())
