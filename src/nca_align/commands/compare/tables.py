"""A comparison's tables: rows out of the cells' `trainer_state.json`, and settings chosen on validation rows alone."""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ...errors import UserError
from ..report.frontier import COMPARED, Curve, compared_name, mean_and_interval, reward_at_kl
from .grid import KEYS, Cell

Row = dict[str, Any]
Candidates = dict[tuple, list[float | None]]  # settings → the metric of each seed
Seeds = Mapping[tuple, Collection[Any]]  # settings → the seeds that the grid has of them
SPLITS = ("train", "validation", "test")  # of train log-ratios alone
# column → name in the log, behind `eval_SPLIT_`
FIGURES = {
    **{name: f"generation/{name}" for name in (
        "reward", "reward_error", "kl", "kl_error", "win_rate", "win_rate_error", "tokens", "tokens_error",
        "distinct_1", "distinct_2", "cut",
    )},
    "logratio_best": "logratios/best", "logratio_worst": "logratios/worst",
    "accuracy": "rewards/accuracies", "kendall_tau": "rewards/kendall_tau",
}  # fmt: skip
COLUMNS = ("cell", *KEYS, "split", "step", *FIGURES, "minutes")
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
        if self.column not in FIGURES:
            raise UserError(f"`metric` of `select` is {self.metric!r}; it must be one of {', '.join(FIGURES)}")
        if self.at_kl is not None and not (isinstance(self.at_kl, (int, float)) and 0 < self.at_kl < math.inf):
            raise UserError(f"`at_kl` of `select` is {self.at_kl!r}; it must be a finite number of nats, above 0")

    @property
    def column(self) -> str:
        """The metric's column."""
        return next((name for name, logged in FIGURES.items() if logged == self.metric), self.metric)


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
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    found: dict[tuple[str, int], Row] = {}
    minutes: dict[int, float] = {}
    for line in log:
        if "minutes" in line:
            minutes[line["step"]] = line["minutes"]
        for split in SPLITS:
            figures = {name: line[f"eval_{split}_{logged}"] for name, logged in FIGURES.items()
                       if f"eval_{split}_{logged}" in line}  # fmt: skip
            if figures:
                found.setdefault((split, line["step"]), {}).update(figures)
    return [
        {"cell": cell.name, **cell.settings, "split": split, "step": step, **figures, "minutes": minutes.get(step)}
        for (split, step), figures in sorted(found.items())
    ]


def seeds_of(cells: Iterable[Cell]) -> Seeds:
    """The seeds that each of the settings is to be run with."""
    found: dict[tuple, list[Any]] = {}
    for cell in cells:
        found.setdefault(_settings(cell.settings), []).append(cell.settings["seed"])
    return found


def select(validation: ValidationRows, selection: Selection, seeds: Seeds) -> dict[tuple, dict[str, Any]]:
    """For each of what is compared, the settings whose mean over seeds is highest on validation.

    Settings of which one of the `seeds` is missing aren't chosen, nor those of which a run has no finite value: one
    that diverged, or never came to `at_kl`.

    Returns:
        (method, strategy, num_completions) → `settings`, `values` (one a seed), and `candidates`, the number of
        settings that there was to choose from.
    """
    chosen = {}
    for group, candidates in _candidates(validation, selection, seeds).items():
        known = {
            settings: [value for value in values if value is not None]
            for settings, values in candidates.items()
            if None not in values
        }
        if known:
            best = max(known, key=lambda settings: fmean(known[settings]))
            chosen[group] = {"settings": dict(best), "values": known[best], "candidates": len(known)}
    return chosen


def left_out(rows: Sequence[Row], selection: Selection, seeds: Seeds) -> list[str]:
    """A line for each of what is compared of which settings had no part in the choice."""
    lines = []
    why = f"a run isn't finished or has no finite `{selection.column}`"
    if selection.at_kl is not None:
        why += f" at a KL of {selection.at_kl:g}, which it may never have come to"
    for candidates in _candidates(ValidationRows.of(rows), selection, seeds).values():
        lacking = sum(None in values for values in candidates.values())
        name = compared_name(dict(next(iter(candidates))))
        if lacking == len(candidates):
            lines.append(f"Nothing chosen of {name}: of each setting {why}.")
        elif lacking:
            lines.append(f"{lacking} of {len(candidates)} settings of {name} had no part in the choice: {why}.")
    return lines


def _candidates(validation: ValidationRows, selection: Selection, seeds: Seeds) -> dict[tuple, Candidates]:
    """What is compared → its candidates; None for a run that isn't there, isn't finite, or never came to the KL."""
    runs = _by_settings(validation.rows)
    found: dict[tuple, Candidates] = {}
    for settings, own in seeds.items():
        values = [
            _value(runs[settings][seed], selection.column, selection.at_kl) if seed in runs.get(settings, {}) else None
            for seed in own
        ]
        found.setdefault(tuple(dict(settings)[name] for name in COMPARED), {})[settings] = values
    return found


def selected_rows(rows: Sequence[Row], selection: Selection, seeds: Seeds) -> list[Row]:
    """A row for each of what is compared: what validation chose, and what the test split says of that.

    Figures are means over seeds, with their 95 % t-intervals `_low` and `_high` (empty for a single seed).
    """
    test = _by_settings(row for row in rows if row["split"] == "test")
    table = []
    for found in select(ValidationRows.of(rows), selection, seeds).values():
        line: Row = {**found["settings"], "seeds": len(found["values"]), "candidates": found["candidates"]}
        line |= _figure(f"validation_{selection.column}", found["values"])
        runs = test[tuple(found["settings"].items())].values()
        for name in _REPORTED:
            line |= _figure(f"test_{name}", [_value(run, name) for run in runs])
        if selection.at_kl is not None:
            line |= _figure("test_reward_at_kl", [_value(run, "reward", selection.at_kl) for run in runs])
        line |= _figure("minutes", [run[-1]["minutes"] for run in runs])
        table.append(line)
    return table


def _by_settings(rows: Iterable[Row]) -> dict[tuple, dict[Any, list[Row]]]:
    """Settings without the seed → seed → that run's rows."""
    found: dict[tuple, dict[Any, list[Row]]] = {}
    for row in rows:
        found.setdefault(_settings(row), {}).setdefault(row["seed"], []).append(row)
    return found


def _settings(row: Row) -> tuple:
    return tuple((name, row[name]) for name in KEYS if name != "seed")


def _value(rows: list[Row], column: str, at_kl: float | None = None) -> float | None:
    """One run's value of `column`, at its end or where it came to `at_kl`; None for one that isn't finite."""
    rows = sorted(rows, key=lambda row: row["step"])
    if at_kl is None:
        value = rows[-1].get(column)
    else:
        points = [(row["step"], row["kl"], row[column]) for row in rows if "kl" in row and column in row]
        value = reward_at_kl(Curve("", tuple(points)), at_kl)
    return value if value is not None and math.isfinite(value) else None


def _figure(name: str, values: Sequence[float | None]) -> Row:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):  # a mean over some of the seeds would be of other runs
        return {name: None, f"{name}_low": None, f"{name}_high": None}
    mean, low, high, n = mean_and_interval(known)
    return {name: mean, f"{name}_low": low if n > 1 else None, f"{name}_high": high if n > 1 else None}
