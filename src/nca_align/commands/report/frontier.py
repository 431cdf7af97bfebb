"""Reward against KL: curves of runs from the rows of a comparison, rewards at equal KL, and intervals over seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, stdev
from typing import Any, NamedTuple

# What a cell is besides its seed. A comparison's table has these of its columns, or some of them.
SETTINGS = ("method", "strategy", "alpha", "beta", "learning_rate", "num_completions")
Setting = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Curve:
    """One run, one seed: (step, KL in nats, reward) of each of its evaluations, in the order of steps."""

    seed: str
    points: tuple[tuple[int, float, float], ...]

    @property
    def reach(self) -> float:
        """The highest KL that the run came to."""
        return max(kl for _, kl, _ in self.points)


class Interval(NamedTuple):
    """A mean over seeds and its confidence interval."""

    mean: float
    low: float
    high: float
    n: int


def setting_of(row: Mapping[str, str]) -> Setting:
    """The settings of a row of `comparison.csv` or `selected.csv`, alike for all seeds of one cell."""
    return tuple((name, _plain(row[name])) for name in SETTINGS if row.get(name))


def curves_of(rows: Iterable[Mapping[str, str]], split: str = "test") -> dict[Setting, list[Curve]]:
    """Settings → one curve a seed, from the rows of `comparison.csv`; rows without a reward or a KL are left out."""
    found: dict[Setting, dict[str, dict[int, tuple[float, float]]]] = {}
    for row in rows:
        if row.get("split") != split or not row.get("reward") or not row.get("kl"):
            continue
        kl, reward = float(row["kl"]), float(row["reward"])
        if math.isfinite(kl) and math.isfinite(reward):
            seeds = found.setdefault(setting_of(row), {})
            seeds.setdefault(row.get("seed", ""), {})[int(float(row["step"]))] = (kl, reward)
    return {
        setting: [
            Curve(seed, tuple((step, *point) for step, point in sorted(points.items())))
            for seed, points in sorted(seeds.items())
        ]
        for setting, seeds in found.items()
    }


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
    before: tuple[float, float] | None = None
    for _, here, reward in curve.points:
        if here == kl:
            return reward
        if here > kl:
            if before is None:
                return None
            share = (_root(kl) - _root(before[0])) / (_root(here) - _root(before[0]))
            return before[1] + share * (reward - before[1])
        before = here, reward
    return None


def _root(kl: float) -> float:
    return math.sqrt(max(kl, 0.0))  # an estimate near 0 may fall below it


def common_reach(groups: Iterable[Sequence[Curve]]) -> float | None:
    """The highest KL that every run of all groups came to, rounded down to two digits; None without any above 0."""
    reach = min((curve.reach for curves in groups for curve in curves), default=0.0)
    if reach <= 0:
        return None
    unit = 10.0 ** (math.floor(math.log10(reach)) - 1)
    for units in (math.floor(reach / unit * (1 + 1e-12)), math.floor(reach / unit) - 1):
        rounded = float(f"{units * unit:.12g}")
        if rounded <= reach:
            return rounded
    return reach


def over_steps(
    rows: Iterable[Mapping[str, str]], setting: Setting, column: str, split: str = "test"
) -> list[tuple[int, Interval]]:
    """(step, mean over seeds) of a column of `comparison.csv` at each step that all seeds of `setting` have."""
    values: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.get("split") == split and setting_of(row) == setting and row.get(column):
            value = float(row[column])
            if math.isfinite(value):
                values.setdefault(int(float(row["step"])), {})[row.get("seed", "")] = value
    most = max(map(len, values.values()), default=0)
    return [(step, mean_and_interval([*own.values()])) for step, own in sorted(values.items()) if len(own) == most]


def ends(
    rows: Iterable[Mapping[str, str]], setting: Setting, column: str, split: str = "test"
) -> dict[str, tuple[int, float]]:
    """Seed → the last step of its run and a column's value there; empty where one has no finite value."""
    last: dict[str, tuple[int, float]] = {}
    for row in rows:
        if row.get("split") == split and setting_of(row) == setting:
            seed, step = row.get("seed", ""), int(float(row["step"]))
            if step >= last.get(seed, (0, 0.0))[0]:
                last[seed] = step, float(row.get(column) or math.nan)
    return last if all(math.isfinite(value) for _, value in last.values()) else {}


def mean_and_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """The mean and its two-sided t-interval: mean ± t · s / √n, with n − 1 degrees of freedom.

    Args:
        values: one a seed, at least one.
        level: the interval's coverage where the values are independent and normal.

    Returns:
        Mean, low, high, n; of a single value the interval is unbounded, for it says nothing of the spread.
    """
    n, mean = len(values), fmean(values)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = t_quantile(level, n - 1) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def t_quantile(level: float, degrees: int) -> float:
    """The t for which P(|T| < t) = `level` in Student's distribution with that many degrees of freedom."""
    low, high = 0.0, math.pi / 2  # of the angle atan(t / √degrees), in which the distribution is a finite sum
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return math.tan(high) * math.sqrt(degrees)


def _within(angle: float, degrees: int) -> float:
    """P(|T| < √degrees · tan(angle)); Abramowitz and Stegun 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    if degrees == 1:
        return 2 * angle / math.pi
    term = total = cosine if odd else 1.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


@cache
def _plain(value: str) -> str:
    """`0.50`, `5e-1` and `.5` are one setting."""
    try:
        return f"{float(value):g}"
    except ValueError:
        return value


# What is compared; the other settings are chosen for each of these
COMPARED = ("method", "strategy", "num_completions")


def compared_name(row: Mapping[str, Any]) -> str:
    """What a row is of, of what is compared: `nca rewards`, `nca rewards K 2`."""
    count = row.get("num_completions")
    return " ".join([*(f"{row[name]}" for name in COMPARED[:2] if row.get(name)), *([f"K {count}"] if count else [])])
