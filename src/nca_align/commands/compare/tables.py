"""A comparison's tables: rows out of the cells' `trainer_state.json`, and settings chosen on validation rows alone."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ...errors import UserError
from ...evaluation.comparison_folder import is_done
from ...evaluation.comparison_rows import (
    COMPARED,
    SETTINGS,
    Row,
    Runs,
    Setting,
    metric_of,
    runs_of,
    setting_name,
    setting_of,
)
from ...evaluation.endpoints import ladder_names
from ...evaluation.frontier import curve_of, reward_at_kl
from ...evaluation.intervals import mean_and_interval
from ...options import is_positive
from ...store.files import read_json
from .grid import KEYS, Cell

Candidates = dict[Setting, list[float]]  # settings → the metric of each seed
Seeds = Mapping[Setting, Collection[Any]]  # settings → the seeds that the grid has of them
SPLITS = ("train", "validation", "test")  # of train log-ratios alone
# column → name in the log, behind `eval_SPLIT_`
METRICS = {
    **{name: f"generation/{name}" for name in (
        "reward", "reward_error", "kl", "kl_error", "win_rate", "win_rate_error", "tokens", "tokens_error",
        "distinct_1", "distinct_2", "cut",
    )},
    "logratio_best": "logratios/best", "logratio_worst": "logratios/worst",
    "accuracy": "rewards/accuracies", "kendall_tau": "rewards/kendall_tau",
    "auc": "outcome/auc", "brier": "outcome/brier", "ece": "outcome/ece",
}  # fmt: skip
COLUMNS = ("cell", *KEYS, "split", "step", *METRICS, "minutes")
_REPORTED = ("reward", "kl", "win_rate", "tokens", "cut", "distinct_2", "logratio_best", "accuracy")


@dataclass(frozen=True)
class Selection:
    """How settings are chosen, the key `select` of a comparison.

    Args:
        metric: a column of `comparison.csv`, or its name in the log, of which more is better.
        at_kl: choose by the metric where a run first came to this KL, nats; None for the end of the run.
    """

    metric: str = "generation/reward"
    at_kl: float | None = None

    def __post_init__(self):
        if self.column not in METRICS:
            raise UserError(f"`metric` of `select` is {self.metric!r}; it must be one of {', '.join(METRICS)}")
        if self.at_kl is not None and not is_positive(self.at_kl):
            raise UserError(f"`at_kl` of `select` is {self.at_kl!r}; it must be a finite number of nats, above 0")

    @property
    def column(self) -> str:
        """The metric's column."""
        return next((name for name, logged in METRICS.items() if logged == self.metric), self.metric)


@dataclass(frozen=True)
class Endpoints:
    """How methods are compared at equal KL between the ends of their runs, the key `endpoints` of a comparison.

    Args:
        reference: the method that the others are compared with, by its name in `endpoints.csv`; by default the first.
        at_kl: KLs in nats; by default `common_kls` chooses two.
    """

    reference: str | None = None
    at_kl: list[float] = field(default_factory=list)

    def __post_init__(self):
        if not isinstance(self.at_kl, list):
            object.__setattr__(self, "at_kl", [self.at_kl])
        for kl in self.at_kl:
            if not is_positive(kl):
                raise UserError(f"`at_kl` of `endpoints` is {kl!r}; it must be a finite number of nats, above 0")

    def check(self, cells: Iterable[Cell]) -> None:
        """Refuse a reference that the grid has no ladder of.

        Raises:
            UserError: it is no method with at least two β.
        """
        names = [*ladder_names(cell.settings for cell in cells).values()]
        if self.reference is not None and self.reference not in names:
            raise UserError(
                f"`reference` of `endpoints` is {self.reference!r}; it must be a method with at least two β in the "
                f"grid: {', '.join(names) or 'there is none'}"
            )


@dataclass(frozen=True)
class ValidationRows:
    """Rows of the validation split and of no other: all that selection is given."""

    rows: tuple[Row, ...]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "ValidationRows":
        """Those among `rows`."""
        return cls(tuple(row for row in rows if row["split"] == "validation"))


def rows_of(cell: Cell, folder: Path) -> list[Row]:
    """A row a split and evaluation, of what the cell's `trainer_state.json` says and nothing else."""
    log = read_json(folder / "trainer_state.json")["log_history"]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    minutes: dict[int, float] = {}
    for line in log:
        if "minutes" in line:
            minutes[line["step"]] = line["minutes"]
        for split in SPLITS:
            metrics = {name: line[f"eval_{split}_{logged}"] for name, logged in METRICS.items()
                       if f"eval_{split}_{logged}" in line}  # fmt: skip
            if metrics:
                found.setdefault((split, line["step"]), {}).update(metrics)
    return [
        {"cell": cell.name, **cell.settings, "split": split, "step": step, **metrics, "minutes": minutes.get(step)}
        for (split, step), metrics in sorted(found.items())
    ]


def finished_rows(cells: Iterable[Cell], output: Path) -> list[Row]:
    """The rows of all cells of the comparison in `output` that are finished."""
    return [row for cell in cells if is_done(cell.folder(output)) for row in rows_of(cell, cell.folder(output))]


def seeds_of(cells: Iterable[Cell]) -> Seeds:
    """The seeds that each of the settings is to be run with."""
    found: dict[Setting, list[Any]] = {}
    for cell in cells:
        found.setdefault(setting_of(cell.settings), []).append(cell.settings["seed"])
    return found


def select(validation: ValidationRows, selection: Selection, seeds: Seeds) -> dict[tuple, dict[str, Any]]:
    """For each of what is compared, the settings whose mean over seeds is highest on validation.

    Settings of which one of the `seeds` is missing aren't chosen, nor those of which a run has no finite value: one
    that diverged, or never came to `at_kl`.

    Returns:
        a value for each of `COMPARED` → `settings`, `values` (one a seed), and `candidates`, the number of
        settings that there was to choose from.
    """
    chosen = {}
    rows = {setting_of(row): row for row in validation.rows}
    for group, candidates in _candidates(validation, selection, seeds).items():
        known = {setting: values for setting, values in candidates.items() if all(map(math.isfinite, values))}
        if known:
            best = max(known, key=lambda setting: fmean(known[setting]))
            settings = {name: rows[best].get(name) for name in SETTINGS}
            chosen[group] = {"settings": settings, "values": known[best], "candidates": len(known)}
    return chosen


def unselected_settings(rows: Sequence[Row], selection: Selection, seeds: Seeds) -> list[str]:
    """A line for each of what is compared of which settings had no part in the choice."""
    lines = []
    why = f"a run isn't finished or has no finite `{selection.column}`"
    if selection.at_kl is not None:
        why += f" at a KL of {selection.at_kl:g}, which it may never have come to"
    for candidates in _candidates(ValidationRows.of(rows), selection, seeds).values():
        lacking = sum(not all(map(math.isfinite, values)) for values in candidates.values())
        name = setting_name(dict(next(iter(candidates))), COMPARED)
        if lacking == len(candidates):
            lines.append(f"Nothing chosen of {name}: of each setting {why}.")
        elif lacking:
            lines.append(f"{lacking} of {len(candidates)} settings of {name} had no part in the choice: {why}.")
    return lines


def _candidates(validation: ValidationRows, selection: Selection, seeds: Seeds) -> dict[tuple, Candidates]:
    """What is compared → its candidates; NaN for a run that isn't there, isn't finite, or never came to the KL."""
    runs = runs_of(validation.rows, "validation")
    found: dict[tuple, Candidates] = {}
    for setting, own in seeds.items():
        values = _values(runs.get(setting, {}), selection.column, selection.at_kl)
        compared = tuple(dict(setting).get(name) for name in COMPARED)
        found.setdefault(compared, {})[setting] = [values.get(seed, math.nan) for seed in own]
    return found


def selected_rows(rows: Sequence[Row], selection: Selection, seeds: Seeds) -> list[Row]:
    """A row for each of what is compared: what validation chose, and what the test split says of that.

    Figures are means over seeds, with their 95 % t-intervals `_low` and `_high` (empty for a single seed).
    """
    test = runs_of(rows)
    table: list[Row] = []
    for found in select(ValidationRows.of(rows), selection, seeds).values():
        runs = test[setting_of(found["settings"])]
        columns: dict[str, tuple[str, float | None]] = {f"test_{name}": (name, None) for name in _REPORTED}
        if selection.at_kl is not None:
            columns["test_reward_at_kl"] = "reward", selection.at_kl
        columns["minutes"] = "minutes", None
        metrics = {f"validation_{selection.column}": found["values"]}
        metrics |= {name: [*_values(runs, *column).values()] for name, column in columns.items()}
        line = {**found["settings"], "seeds": len(found["values"]), "candidates": found["candidates"]}
        for name, values in metrics.items():
            line |= _mean_and_ends(name, values)
        table.append(line)
    return table


def _values(runs: Runs, column: str, at_kl: float | None) -> dict[Any, float]:
    """Seed → its run's value of `column`, at its end or where it came to `at_kl`; NaN where there is none."""
    if at_kl is None:
        return {seed: metric_of(rows[-1], column) for seed, rows in runs.items()}
    rewards = {seed: reward_at_kl(curve_of(seed, rows, column), at_kl) for seed, rows in runs.items()}
    return {seed: math.nan if reward is None else reward for seed, reward in rewards.items()}


def _mean_and_ends(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """The mean over seeds under its name, and its ends; empty where a seed has no value, for it'd be of other runs."""
    mean = low = high = None
    if values and all(map(math.isfinite, values)):
        mean, *ends, n = mean_and_interval(values)
        low, high = ends if n > 1 else (None, None)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
