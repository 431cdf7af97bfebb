"""What `nca-align evaluate --implicit` found, as a table for a terminal and as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from math import isnan, nan
from typing import Any

from rich.console import Console

from ...evaluation.intervals import Interval
from ...evaluation.ranking import LENGTH_MATCH
from ...pages.terminal import print_rows
from .process_rewards import ProcessEvaluation


@dataclass(frozen=True)
class ImplicitEvaluation:
    """What `--implicit` found.

    Args:
        prompts, completions, pairs, like_length: how many; pairs are those with unequal rewards.
        beta: implicit reward per nat.
        figures: by score and figure, see `ranking.ranking_metrics`.
        less_length: each score's figures less those of `length`.
        random, best: mean reward of a completion chosen at random, and of the best.
        outcomes: `outcome_figures` of rewards from 0 to 1, which are read as labels; empty of others.
        objectives: `objective_metrics` by its names, where there are several rewards.
        process: what `steps` and `answers` give, or None.
    """

    prompts: int
    completions: int
    pairs: int
    like_length: int
    beta: float
    figures: dict[str, dict[str, Interval]]
    less_length: dict[str, dict[str, Interval]]
    random: float
    best: float
    outcomes: dict[str, float] = field(default_factory=dict)
    objectives: dict[str, Interval] = field(default_factory=dict)
    process: ProcessEvaluation | None = None

    @property
    def is_single(self) -> bool:
        """Whether no prompt has two completions, so that none is compared with another or chosen."""
        return self.completions == self.prompts


def as_json(found: ImplicitEvaluation) -> dict[str, Any]:
    """Intervals by their names, and null for NaN, which JSON has not."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return plain(dict(vars(value)))
        if isinstance(value, Interval):
            ends = {"value": value.mean, "low": value.low, "high": value.high}
            return {name: None if isnan(end) else end for name, end in ends.items()}
        if isinstance(value, float) and isnan(value):
            return None
        return {name: plain(inner) for name, inner in value.items()} if isinstance(value, dict) else value

    return plain(found)


_SHOWN = {  # figure: (what a line of the table is called, format of the value, whether its bounds are shown)
    "pairs": ("pairs right, %", "{:.1%}", True),
    "like_length": ("  of like length", "{:.1%}", True),
    "better_longer": ("  better one longer", "{:.1%}", False),
    "better_shorter": ("  better one shorter", "{:.1%}", False),
    "balanced": ("  balanced", "{:.1%}", True),
    "partial": ("partial corr., %", "{:.1%}", True),
    "gain": ("best of K: gain, %", "{:.1%}", True),
    "reward": ("  mean reward", "{:.3f}", False),
    "tokens": ("  mean tokens", "{:.0f}", False),
}


_OUTCOMES = ("auc", "accuracy", "brier", "ece")


def _percent(share: float) -> str:
    return "–" if isnan(share) else f"{100 * share:.1f} %"


def print_ranking(found: ImplicitEvaluation) -> None:
    """Figures by score, shares with their 95 % intervals, for a terminal of 80 columns; of single completions none."""
    if found.is_single:
        print(f"{found.prompts} prompts with one completion each; β {found.beta:g}, mean reward {found.random:.3f}")
    else:
        _print_comparison(found)
    if found.outcomes:
        auc, accuracy, brier, ece = (found.outcomes.get(f"outcome/{name}", nan) for name in _OUTCOMES)
        print(
            f"as labels: AUC {_percent(auc)}, sign right {_percent(accuracy)},\n"
            f"Brier score {brier:.3f}, calibration error {ece:.3f}"
        )
    if found.objectives and not found.is_single:
        _print_objectives(found.objectives)


def _print_comparison(found: ImplicitEvaluation) -> None:
    print(
        f"{found.prompts} prompts, {found.completions} completions, {found.pairs} pairs with unequal rewards,\n"
        f"{found.like_length} of them of like length (within {LENGTH_MATCH - 1:.0%}); β {found.beta:g}\n"
        "in brackets: 95 % intervals over prompts\n"
    )
    rows = [
        (label, *(_cell(values[figure], form, bounds) for values in found.figures.values()))
        for figure, (label, form, bounds) in _SHOWN.items()
    ]
    print_rows(("", *found.figures), rows, console=Console(width=120))  # it is narrower, but never cut
    pairs, gain = (_cell(found.less_length["implicit"][name], "{:+.1%}", True) for name in ("pairs", "gain"))
    print(
        f"\nimplicit less length: pairs right {pairs}, best-of-K gain {gain}\n"
        f"mean reward at random {found.random:.3f}, of the best {found.best:.3f}"
    )


def _print_objectives(found: Mapping[str, Interval]) -> None:
    """By each of several rewards the pairs that `implicit` orders right, and how the reward goes with length."""
    print("\nimplicit by each reward; equal scores are wrong here, as in the training log\n")
    names = [
        own.removeprefix("objectives/").removesuffix("/accuracies") for own in found if own.endswith("/accuracies")
    ]
    rows = []
    for name in names:
        right, length = (found[f"objectives/{name}/{figure}"] for figure in ("accuracies", "corr_length"))
        rows.append((name, _cell(right, "{:.1%}", True), _cell(length, "{:+.1%}", True)))
    print_rows(("", "pairs right, %", "corr. with length, %"), rows, console=Console(width=120))


def _cell(interval: Interval, form: str, bounds: bool) -> str:
    """A value, and its bounds in whole percents."""
    if isnan(interval.mean):
        return "–"
    value = form.format(interval.mean).replace("%", "")
    return f"{value} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]" if bounds else value


def print_process(found: ProcessEvaluation, source: str, chooses: bool = True) -> None:
    """Mean rewards by choice, if any `chooses`, and ProcessBench's figures; `source` is where τ comes from."""
    if not isnan(found.steps):
        print(f"\n{found.steps:.1f} steps a completion")
    if chooses:
        print("\nmean reward of the chosen answer, 95 % t-intervals over prompts")
        cells = [(name, interval.text(".3f")) for name, interval in found.chosen.items()]
        print_rows(("chosen by", "reward"), cells, console=Console(width=80))
    if found.first_errors is not None:
        errors = found.first_errors
        print(f"\nfirst wrong step, τ = {found.threshold:.4g} {source}")
        for name, interval, count in (
            ("wrong solutions", errors.wrong, errors.counts[0]), ("right solutions", errors.right, errors.counts[1]),
            ("F1", errors.f1, sum(errors.counts)),
        ):  # fmt: skip
            bounds = f"[{100 * interval.low:.0f}, {100 * interval.high:.0f}]"
            print(f"  {name:<16}{100 * interval.mean:5.1f} % {bounds:<10} of {count}")
