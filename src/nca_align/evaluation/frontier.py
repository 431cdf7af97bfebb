"""Reward against KL: curves of runs from the rows of a comparison, and their rewards at equal KL."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, Context
from typing import Any

import numpy as np

from .comparison_rows import Row, Setting, metric_of, runs_of, step_of

_MOST_KL = 3  # KLs to compare at beside the common reach


@dataclass(frozen=True)
class Curve:
    """One run, one seed: (step, KL in nats, reward) of each of its evaluations, in the order of steps."""

    seed: Any
    points: tuple[tuple[int, float, float], ...]

    @property
    def max_kl(self) -> float:
        """The highest KL that the run came to."""
        return max(kl for _, kl, _ in self.points)


def curve_of(seed: Any, rows: Iterable[Row], column: str = "reward") -> Curve:
    """One run's curve, of its rows in the order of steps; those without a finite KL or figure are left out."""
    points = [(step_of(row), metric_of(row, "kl"), metric_of(row, column)) for row in rows]
    return Curve(seed, tuple(point for point in points if all(map(math.isfinite, point))))


def curves_of(rows: Iterable[Row], split: str = "test") -> dict[Setting, list[Curve]]:
    """Settings → one curve a seed, from the rows of `comparison.csv`; rows without a reward or a KL are left out."""
    found = {
        setting: [curve for seed, own in runs.items() if (curve := curve_of(seed, own)).points]
        for setting, runs in runs_of(rows, split).items()
    }
    return {setting: curves for setting, curves in found.items() if curves}


def reward_at_kl(curve: Curve, kl: float) -> float | None:
    """The reward where the run first came to `kl`, between the evaluations around that place straight in √KL.

    The best policies of a given KL gain in proportion to √KL near the start (of a tilt by exp(t·r), KL is t²·Var(r)/2
    and the gain t·Var(r)), so that a straight line in the KL itself would lie below the curve of a fast run, with few
    evaluations there, and less so below that of a slow one.

    Args:
        curve: one run.
        kl: nats.

    Returns:
        The reward; None where the run never came to `kl`, or was beyond it at its first evaluation already.

    Source: Gao et al., "Scaling Laws for Reward Model Overoptimization", 2023, for reward as a function of √KL.
    """
    first = next((i for i, (_, here, _) in enumerate(curve.points) if here >= kl), None)
    if first is None or (first == 0 and curve.points[0][1] > kl):
        return None
    around = curve.points[max(first - 1, 0) : first + 1]
    roots = [math.sqrt(max(here, 0.0)) for _, here, _ in around]  # an estimate near 0 may fall below it
    return float(np.interp(math.sqrt(kl), roots, [reward for *_, reward in around]))


def common_kl(groups: Iterable[Sequence[Curve]]) -> float | None:
    """The highest KL that every run of all groups came to, rounded down to two digits; None without any above 0."""
    reach = min((curve.max_kl for curves in groups for curve in curves), default=0.0)
    two_digits = Context(prec=2, rounding=ROUND_DOWN)
    return float(two_digits.create_decimal(repr(reach))) if reach > 0 else None


def equal_kls(groups: Mapping[Setting, Sequence[Curve]]) -> list[float]:
    """KLs to compare at: what all runs came to, and up to three round ones that all seeds of two settings came to."""
    reaches = sorted((min(curve.max_kl for curve in curves) for curves in groups.values()), reverse=True)
    common = common_kl(groups.values())
    found = [] if common is None else [common]
    if len(reaches) > 1 and reaches[1] > 0:
        first = math.floor(math.log10(reaches[1]))
        rounds = [m * 10.0**e for e in range(first - 1, first + 1) for m in (1, 2, 5)]
        found += [kl for kl in rounds if (common or 0) * 1.2 < kl <= reaches[1]][-_MOST_KL:]
    return found
