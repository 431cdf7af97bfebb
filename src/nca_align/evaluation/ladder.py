"""Ladders: the ends of one method's runs with several β, and methods compared at equal KL between those ends.

A *rung* is the end of one run: its KL from the reference in nats, and figures such as its reward. A *ladder* is the
rungs of one method and one pairing key, which is a seed or whatever else methods share, with a different β each. Rows
of any source make ladders: nothing here reads a file or knows a command.

Between two rungs a figure is taken straight in √KL. The policies π ∝ π_ref · exp(t·r) have the most reward of all
with their KL. Near the start their KL is t²·Var(r)/2, their gain in reward is t·Var(r), and a completion's log-ratio is
t·(r − E r). So √KL, reward and log-ratio are all in proportion to t, and the latter two are straight in √KL.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from statistics import fmean, stdev
from typing import Any

from .intervals import mean_and_interval, paired_p

Row = Mapping[str, Any]
_ERRORS = 2.0  # standard errors by which a run's KL has to fall to have doubled back


@dataclass(frozen=True)
class Rung:
    """The end of one run.

    Args:
        kl: KL(π || π_ref) in nats.
        values: column → figure.
        beta: the setting that the ladder varies.
        is_start: this is no run's end but the reference itself, at KL 0.
    """

    kl: float
    values: Mapping[str, float]
    beta: float | None = None
    is_start: bool = False


Ladder = Mapping[Hashable, Sequence[Rung]]  # pairing key → its rungs


@dataclass(frozen=True)
class Difference:
    """A method less the reference method in one column at one KL, paired by key.

    Args:
        method, reference, kl, column: what is compared, at how many nats.
        difference: the mean over pairs; NaN where it isn't known.
        error: its standard error, s / √n.
        low, high: the ends of its simultaneous (Bonferroni) t-interval.
        p, p_holm: of a two-sided paired t-test, alone and adjusted by Holm.
        n: pairs of which both ladders span the KL.
        missing: pairs of which one ladder doesn't.
        from_start: pairs of which a value lies between the reference itself and a ladder's first rung.
    """

    method: Any
    reference: Any
    kl: float
    column: str
    difference: float
    error: float
    low: float
    high: float
    p: float
    p_holm: float
    n: int
    missing: int
    from_start: int


def ladders_of(
    rows: Iterable[Row],
    columns: Sequence[str],
    *,
    method: Callable[[Row], Any] = itemgetter("method"),
    key: str = "seed",
    beta: str = "beta",
    kl: str = "kl",
    start: Mapping[str, float] | None = None,
) -> dict[Any, dict[Any, list[Rung]]]:
    """Method → pairing key → its ladder in the order of KL, from rows of which each is the end of one run.

    Args:
        rows: mappings with the columns that `key`, `beta` and `kl` name. A run without a finite KL is on no rung.
        columns: figures to take over; a missing one is NaN.
        method: what a row's run is one of; runs with the same one differ in key and β alone.
        key: the column of what methods share, such as the seed.
        beta: the column of what the ladder varies.
        kl: the column of the KL, in nats.
        start: the figures of the reference; with them each ladder begins at KL 0, and `Difference.from_start` counts
            the pairs that this first rung is used for.

    Example:
        >>> ends = [{"method": "nca", "seed": 1, "beta": 1 / kl, "kl": kl, "reward": kl**0.5} for kl in (4.0, 1.0)]
        >>> [rung.kl for rung in ladders_of(ends, ["reward"])["nca"][1]]
        [1.0, 4.0]
    """
    found: dict[Any, dict[Any, list[Rung]]] = {}
    for row in rows:
        rungs = found.setdefault(method(row), {}).setdefault(row[key], [])
        if math.isfinite(own := _number(row.get(kl))):
            rungs.append(Rung(own, {name: _number(row.get(name)) for name in columns}, _number(row.get(beta))))
    first = [] if start is None else [Rung(0.0, start, is_start=True)]
    return {
        name: {own: sorted([*first, *rungs], key=lambda rung: rung.kl) for own, rungs in ladder.items()}
        for name, ladder in found.items()
    }


def ladder_value(rungs: Sequence[Rung], column: str, kl: float) -> float | None:
    """The column at `kl` nats, between the two rungs around it straight in √KL; the mean of rungs with one KL.

    The rungs are taken in the order of their KLs, whatever their β: `out_of_order` tells where that isn't β's order.

    Returns:
        The figure; None where no rung lies at or below `kl`, or none at or above, or one of those has no figure.
    """
    around = _around(rungs, kl)
    if around is None:
        return None
    below, above = (fmean(rung.values.get(column, math.nan) for rung in side) for side in around)
    value = straight_in_root_kl(kl, (around[0][0].kl, below), (around[1][0].kl, above))
    return value if math.isfinite(value) else None


def straight_in_root_kl(kl: float, below: tuple[float, float], above: tuple[float, float]) -> float:
    """The figure at `kl` nats, between two points of KL and figure; the first one's where both have one KL."""
    low, here, high = (math.sqrt(max(own, 0.0)) for own in (below[0], kl, above[0]))  # an estimate may be below 0
    return below[1] + (above[1] - below[1]) * ((here - low) / (high - low) if high > low else 0.0)


def ladder_values(ladder: Ladder, column: str, kl: float) -> dict[Any, float]:
    """Pairing key → `ladder_value`, without those that have none."""
    found = {key: ladder_value(rungs, column, kl) for key, rungs in ladder.items()}
    return {key: value for key, value in found.items() if value is not None}


def paired_differences(a: Mapping[Any, float], b: Mapping[Any, float]) -> list[float]:
    """a − b of each key that both have, in the order of `a`."""
    return [value - b[key] for key, value in a.items() if key in b]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's step-down method, in the order given; NaN stays NaN and counts as no comparison.

    The i-th smallest of m, from 0, becomes the largest (m − j)·p_j of j ≤ i, at most 1. Rejecting those below α keeps
    the chance of any wrong rejection at α, whatever the tests' dependence.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, least = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(known):
        adjusted[i] = least = max(least, min(1.0, (len(known) - rank) * p))
    return adjusted


def compare_at_kl(
    ladders: Mapping[Any, Ladder],
    reference: Any,
    columns: Sequence[str],
    kls: Sequence[float],
    *,
    level: float = 0.95,
    partial: bool = False,
) -> list[Difference]:
    """Each method less `reference`, in each column at each KL, paired by key.

    The comparisons of one column, those with all methods at all KLs, are one family of m. Their p-values are adjusted
    by Holm. Their intervals are Bonferroni's, t-intervals at 1 − (1 − level)/m: they hold all together with
    probability `level`. Holm rejects a little more, so that `p_holm` may be below 1 − `level` where an interval just
    holds 0.

    Args:
        ladders: from `ladders_of`; it has `reference`.
        reference: the method that the others are compared with.
        columns: figures of the rungs.
        kls: nats.
        level: coverage of the intervals of one column together.
        partial: take the pairs that are known where others are missing. Which ladders span a KL depends on how the
            runs went, so that a mean over these alone is of a selection.

    Returns:
        One for each method, KL and column, in the order of columns, KLs and `ladders`; with NaN where the pairs are
        fewer than `partial` allows.

    Example:
        >>> def end(method, seed, kl, ahead):
        ...     return {"method": method, "seed": seed, "beta": 1 / kl, "kl": kl, "reward": kl**0.5 + ahead}
        >>> ends = [end("dpo", seed, kl, 0) for seed in (1, 2) for kl in (1.0, 4.0)]
        >>> ends += [end("nca", seed, kl, seed) for seed in (1, 2) for kl in (1.0, 4.0)]
        >>> (nca,) = compare_at_kl(ladders_of(ends, ["reward"]), "dpo", ["reward"], kls=[2.0])
        >>> round(nca.difference, 3)  # the mean over the two seeds
        1.5
    """
    found = []
    for column in columns:
        family = [
            (method, kl, *_pairs(ladders, method, reference, column, kl, partial))
            for kl in kls for method in ladders if method != reference
        ]  # fmt: skip
        p_values = [paired_p(differences) for _, _, differences, *_ in family]
        one_level = 1 - (1 - level) / max(1, sum(map(math.isfinite, p_values)))
        for own, p, p_holm in zip(family, p_values, holm(p_values), strict=True):
            method, kl, differences, n, missing, from_start = own
            mean = low = high = error = math.nan
            if differences:
                mean, low, high, _ = mean_and_interval(differences, one_level)
                error = stdev(differences) / math.sqrt(n) if n > 1 else math.nan
            found.append(
                Difference(method, reference, kl, column, mean, error, low, high, p, p_holm, n, missing, from_start)
            )
    return found


def common_kls(ladders: Mapping[Any, Ladder], reference: Any) -> list[float]:
    """Two KLs to compare at, a quarter and three quarters along the common span in √KL, with two digits.

    The common span is the part of the reference method's that the most other methods span, each with all of its
    ladders; of several such parts, the widest in √KL.

    Returns:
        KLs in nats; one where both round to the same, the middle as it is where both round out of the span; none where
        `reference` shares no span with any other method.
    """
    spans = {method: _span(ladder) for method, ladder in ladders.items()}
    first, last = spans[reference]
    ends = sorted({end for span in spans.values() for end in span if first <= end <= last})
    best = (1, 0.0, 0.0, 0.0)  # methods, width, and from where to where
    for i, low in enumerate(ends):
        for high in ends[i + 1 :]:
            count = sum(own[0] <= low and high <= own[1] for own in spans.values())
            best = max(best, (count, math.sqrt(high) - math.sqrt(low), low, high))
    if best[0] < 2:
        return []
    *_, low, high = best
    roots = (math.sqrt(low) + share * (math.sqrt(high) - math.sqrt(low)) for share in (0.25, 0.75))
    rounded = dict.fromkeys(float(f"{root**2:.2g}") for root in roots)
    inside = [kl for kl in rounded if low <= kl <= high]
    return inside or [((math.sqrt(low) + math.sqrt(high)) / 2) ** 2]


def out_of_order(rungs: Sequence[Rung]) -> bool:
    """Whether the KLs neither only fall nor only rise with β: neighbours in KL are then no neighbours in β."""
    kls = [rung.kl for rung in sorted(rungs, key=lambda rung: rung.beta or 0.0) if not rung.is_start]
    return kls != sorted(kls) and kls != sorted(kls, reverse=True)


def doubled_back(kls: Sequence[float], errors: Sequence[float]) -> int | None:
    """The evaluation from which a run came back: where its KL was highest, if its end is clearly lower.

    Args:
        kls: KL in nats of one run's evaluations, in the order of steps.
        errors: their standard errors; NaN counts as 0.

    Returns:
        The evaluation's place, from 0; None unless the end is lower by more than two standard errors of the
        difference, √(a² + b²) of the two errors a and b.
    """
    known = [i for i, kl in enumerate(kls) if math.isfinite(kl)]
    if not known:
        return None
    top, end = max(known, key=lambda i: kls[i]), known[-1]
    errors_of_both = [errors[i] if math.isfinite(errors[i]) else 0.0 for i in (top, end)]
    return top if kls[top] - kls[end] > _ERRORS * math.hypot(*errors_of_both) else None


def _pairs(
    ladders: Mapping[Any, Ladder], method: Any, reference: Any, column: str, kl: float, partial: bool
) -> tuple[list[float], int, int, int]:
    """Paired differences, how many pairs are known and how many not, and how many of the known use the start."""
    both = [ladders[method], ladders[reference]]
    values = [ladder_values(ladder, column, kl) for ladder in both]
    n, every = len(values[0].keys() & values[1].keys()), len(both[0].keys() | both[1].keys())
    from_start = sum(any(_uses_start(ladder[key], kl) for ladder in both) for key in values[0] if key in values[1])
    known = paired_differences(*values) if partial or n == every else []
    return known, n, every - n, from_start


def _uses_start(rungs: Sequence[Rung], kl: float) -> bool:
    return any(rung.is_start for side in _around(rungs, kl) or () for rung in side)


def _around(rungs: Sequence[Rung], kl: float) -> tuple[list[Rung], list[Rung]] | None:
    """The nearest rungs at or below `kl` and those at or above: those at it, where there are any."""
    below = max((rung.kl for rung in rungs if rung.kl <= kl), default=None)
    above = min((rung.kl for rung in rungs if rung.kl >= kl), default=None)
    if below is None or above is None:
        return None
    return [rung for rung in rungs if rung.kl == below], [rung for rung in rungs if rung.kl == above]


def _span(ladder: Ladder) -> tuple[float, float]:
    """From where to where in KL all ladders of one method have rungs around; infinite to 0 where one has none."""
    low = max((min((rung.kl for rung in rungs), default=math.inf) for rungs in ladder.values()), default=math.inf)
    high = min((max((rung.kl for rung in rungs), default=0.0) for rungs in ladder.values()), default=0.0)
    return max(low, 0.0), max(high, 0.0)


def _number(value: Any) -> float:
    return math.nan if value in (None, "") else float(value)
