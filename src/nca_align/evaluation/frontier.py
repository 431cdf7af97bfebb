"""Paths of runs: reward against KL, evaluation by evaluation, from the rows of a comparison."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .comparison_rows import Row, Setting, metric_of, runs_of, step_of
from .ladder import straight_in_root_kl


@dataclass(frozen=True)
class Curve:
    """One run, one seed: (step, KL in nats, reward) of each of its evaluations, in the order of steps."""

    seed: Any
    points: tuple[tuple[int, float, float], ...]


def curve_of(seed: Any, rows: Iterable[Row], column: str = "reward") -> Curve:
    """One run's curve, of its rows in the order of steps; those without a finite KL or figure are left out."""
    points = [(step_of(row), metric_of(row, "kl"), metric_of(row, column)) for row in rows]
    return Curve(seed, tuple(point for point in points if all(map(math.isfinite, point))))


def curves_of(rows: Iterable[Row], split: str = "test") -> dict[Setting, list[Curve]]:
    """Settings → one curve a seed, from the rows of `comparison.csv`; rows without a reward or a KL are left out.

    Example:
        >>> run = {"method": "nca", "seed": 1, "split": "test"}
        >>> rows = [run | {"step": step, "kl": 4.0 * step, "reward": step} for step in (0, 1)]
        >>> curves_of(rows)[("method", "nca"),][0].points  # (step, KL, reward)
        ((0, 0.0, 0.0), (1, 4.0, 1.0))
    """
    found = {
        setting: [curve for seed, own in runs.items() if (curve := curve_of(seed, own)).points]
        for setting, runs in runs_of(rows, split).items()
    }
    return {setting: curves for setting, curves in found.items() if curves}


def reward_at_kl(curve: Curve, kl: float) -> float | None:
    """The reward where the run first came to `kl`, between the evaluations around that place straight in √KL.

    The best policies of a given KL gain in proportion to √KL near the start. For a tilt by exp(t·r), KL is t²·Var(r)/2
    and the gain is t·Var(r). A straight line in the KL itself would lie below a run's curve. It would lie further below
    that of a fast run, which has few evaluations there.

    Args:
        curve: one run.
        kl: nats.

    Returns:
        The reward; None where the run never came to `kl`, or was beyond it at its first evaluation already.

    Source: Gao et al., "Scaling Laws for Reward Model Overoptimization", 2023, for reward as a function of √KL.

    Example:
        >>> run = {"method": "nca", "seed": 1, "split": "test"}
        >>> rows = [run | {"step": step, "kl": 4.0 * step, "reward": step} for step in (0, 1)]
        >>> ((curve,),) = curves_of(rows).values()
        >>> reward_at_kl(curve, 1.0)  # half-way in √KL
        0.5
    """
    first = next((i for i, (_, here, _) in enumerate(curve.points) if here >= kl), None)
    if first is None or (first == 0 and curve.points[0][1] > kl):
        return None
    return straight_in_root_kl(kl, curve.points[max(first - 1, 0)][1:], curve.points[first][1:])
