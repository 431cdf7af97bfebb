"""Means and how far they may be off: standard errors over prompts, and confidence intervals over seeds."""

import math
from collections.abc import Iterable, Sequence
from functools import cache
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

    Example:
        >>> mean_and_interval([0.1, 0.2, 0.3]).text()
        '0.200 ± 0.248'
    """
    n, mean = len(values), fmean(values)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = t_quantile(level, n - 1) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_p(differences: Sequence[float]) -> float:
    """The p-value of a two-sided t-test that the mean of `differences` is 0; NaN for fewer than two."""
    n = len(differences)
    if n < 2:
        return math.nan
    mean, error = fmean(differences), stdev(differences) / math.sqrt(n)
    if not error:
        return 0.0 if mean else 1.0
    return _between(math.atan(abs(mean) / error / math.sqrt(n - 1)), math.pi / 2, n - 1)


def detectable_difference(
    spread: float, n: int, comparisons: int = 1, power: float = 0.8, level: float = 0.95
) -> float:
    """The smallest true mean difference that a paired two-sided t-test finds with probability `power`.

    Args:
        spread: standard deviation of one pair's difference, in the figure's units.
        n: pairs.
        comparisons: tests that the level is divided among (Bonferroni).
        power: the chance of p < (1 − level) / comparisons.
        level: of all tests together.

    Returns:
        A difference in the units of `spread`; infinite for fewer than two pairs.

    Source: the noncentral t-distribution, as an integral over the chi distribution of the estimated spread.
    """
    if n < 2:
        return math.inf
    degrees = n - 1
    critical = t_quantile(1 - (1 - level) / comparisons, degrees)
    wide = 8 / math.sqrt(2 * degrees)
    low, high = max(0.0, 1 - wide), 1 + wide
    ratio = (low + high) / 2 + (high - low) / 2 * _NODES  # estimated spread / spread
    density = np.exp((degrees - 1) * np.log(ratio) - degrees * (ratio**2 - 1) / 2) * _WEIGHTS
    density /= density.sum()
    shift_low, shift_high = 0.0, critical * high + 10  # of the difference, in standard errors
    for _ in range(80):
        shift = (shift_low + shift_high) / 2
        found = sum(w * (_normal(shift - critical * r) + _normal(-shift - critical * r))
                    for w, r in zip(density, ratio, strict=True))  # fmt: skip
        shift_low, shift_high = (shift, shift_high) if found < power else (shift_low, shift)
    return shift_high * spread / math.sqrt(n)


@cache
def t_quantile(level: float, degrees: int) -> float:
    """The t for which P(|T| < t) = `level` in Student's distribution with that many degrees of freedom."""
    low, high = 0.0, math.pi / 2  # of the angle atan(t / √degrees), which is bounded
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _between(0.0, middle, degrees) < level else (low, middle)
    return math.tan(high) * math.sqrt(degrees)


def _between(low: float, high: float, degrees: int) -> float:
    """P(low < angle < high), where |T| = √degrees · tan(angle).

    The angle's density is in proportion to its cosine to the power degrees − 1.
    """
    half = (high - low) / 2
    integral = half * float(_WEIGHTS @ np.cos(low + half * (1 + _NODES)) ** (degrees - 1))
    return 2 / math.sqrt(math.pi) * math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) * integral


def _normal(z: float) -> float:
    """P(Z < z) of the normal distribution."""
    return math.erfc(-z / math.sqrt(2)) / 2
