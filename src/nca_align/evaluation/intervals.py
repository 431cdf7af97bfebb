"""Means and how far they may be off: standard errors over prompts, and confidence intervals over seeds."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from numpy.polynomial.legendre import leggauss

_NODES, _WEIGHTS = leggauss(100)  # an integral over −1 … 1 as a sum


class Estimate(NamedTuple):
    """A mean over prompts and its standard error; NaN where it isn't known."""

    mean: float
    error: float

    def text(self, form: str = ".3f") -> str:
        """`0.71 ± 0.04`, or the mean alone."""
        return plus_minus(self.mean, self.error, form)

    def interval(self, n: int) -> "Interval":
        """Its 95 % t-interval where it is over `n` prompts; unbounded where the error isn't known."""
        half = t_quantile(0.95, n - 1) * self.error if n > 1 and math.isfinite(self.error) else math.inf
        return Interval(self.mean, self.mean - half, self.mean + half, n)


class Interval(NamedTuple):
    """A mean over `n` seeds or prompts, or a figure made of means, and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int

    def text(self, form: str | None = None) -> str:
        """`0.71 ± 0.04`; by default with three digits of the mean or of the half, whichever is more."""
        half = self.high - self.mean
        largest = max(abs(self.mean), half if math.isfinite(half) else 0.0)
        decimals = min(max(2 - math.floor(math.log10(largest)), 0), 4) if largest else 0
        return plus_minus(self.mean, half, form or f".{decimals}f")


UNKNOWN = Estimate(math.nan, math.nan)


def plus_minus(mean: float, half: float, form: str) -> str:
    """`+0.10 ± 0.07` with the format `+.2f`; the mean alone where the half isn't finite."""
    spread = f" ± {half:{form.lstrip('+')}}" if math.isfinite(half) else ""
    return f"{mean:{form}}{spread}"


def mean_over_prompts(values: Iterable[Sequence[float]]) -> Estimate:
    """Mean over prompts of each prompt's mean over its completions; prompts are what is independent.

        m_b = mean_k values[b][k],   mean = mean_b m_b,   error = std_b(m_b) / √B

    Args:
        values: B sequences of one or more numbers.

    Returns:
        The mean and its standard error, NaN for a single prompt.
    """
    means = [fmean(row) for row in values]
    return Estimate(fmean(means), stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan)


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
    low, high = 0.0, math.pi / 2  # of the angle atan(t / √degrees), which is bounded
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < level else (low, middle)
    return math.tan(high) * math.sqrt(degrees)


def _within(angle: float, degrees: int) -> float:
    """P(|T| < √degrees · tan(angle)): the angle's density is in proportion to its cosine to the power degrees − 1."""
    integral = angle / 2 * float(_WEIGHTS @ np.cos(angle / 2 * (1 + _NODES)) ** (degrees - 1))
    return 2 / math.sqrt(math.pi) * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) * integral
