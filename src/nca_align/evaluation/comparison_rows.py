"""Rows of a comparison, in memory or from `comparison.csv`: grouped by settings and seed, and named."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..user_functions import short_name
from .intervals import Interval, mean_and_interval

# What a cell is besides its seed. A comparison's table has these of its columns, or some of them.
SETTINGS = ("method", "strategy", "alpha", "beta", "learning_rate", "num_completions", "reward_weights")
COMPARED = (
    "method",
    "strategy",
    "num_completions",
    "reward_weights",
)  # the other settings are chosen for each of these
_SIGNS = {"alpha": "α ", "beta": "β ", "learning_rate": "lr ", "num_completions": "K ", "reward_weights": "w "}
Setting = tuple[tuple[str, str], ...]
Row = Mapping[str, Any]
Runs = Mapping[Any, Sequence[Row]]  # seed → the rows of its run, in the order of steps


def setting_of(row: Row) -> Setting:
    """The settings that a row has, alike for all seeds of one cell and whether read from a file or not."""
    return tuple((name, _plain(row[name])) for name in SETTINGS if row.get(name) not in (None, ""))


def runs_of(rows: Iterable[Row], split: str = "test") -> dict[Setting, dict[Any, list[Row]]]:
    """Settings → seed → that run's rows of `split`, in the order of steps."""
    found: dict[Setting, dict[Any, list[Row]]] = {}
    for row in rows:
        if row.get("split") == split:
            found.setdefault(setting_of(row), {}).setdefault(row.get("seed", ""), []).append(row)
    return {
        setting: {seed: sorted(runs[seed], key=step_of) for seed in sorted(runs)} for setting, runs in found.items()
    }


def step_of(row: Row) -> int:
    """The row's step."""
    return int(float(row["step"]))


def metric_of(row: Row, column: str) -> float:
    """A column of the row; NaN where it is empty."""
    return math.nan if row.get(column) in (None, "") else float(row[column])


def interval_of(row: Row, column: str) -> Interval:
    """A figure of a row of `selected.csv` with its ends, NaN where one seed has none."""
    mean, low, high = (metric_of(row, name) for name in (column, f"{column}_low", f"{column}_high"))
    return Interval(mean, low, high, int(row["seeds"]))


def over_steps(runs: Runs, column: str) -> list[tuple[int, Interval]]:
    """(step, mean over seeds) of a column at each step that all seeds of one setting have."""
    values: dict[int, list[float]] = {}
    for rows in runs.values():
        for row in rows:
            if math.isfinite(value := metric_of(row, column)):
                values.setdefault(step_of(row), []).append(value)
    most = max(map(len, values.values()), default=0)
    return [(step, mean_and_interval(own)) for step, own in sorted(values.items()) if len(own) == most]


def final_values(runs: Runs, column: str) -> dict[Any, tuple[int, float]]:
    """Seed → the last step of its run and a column's value there; empty where one has no finite value."""
    last = {seed: (step_of(rows[-1]), metric_of(rows[-1], column)) for seed, rows in runs.items()}
    return last if all(math.isfinite(value) for _, value in last.values()) else {}


def setting_name(row: Row, names: Sequence[str] = SETTINGS) -> str:
    """`nca rewards α 0.3 K 2`: those of `names` that the row has."""
    return " ".join(_SIGNS.get(name, "") + value for name, value in setting_of(row) if name in names)


def labels(settings: Sequence[Setting]) -> dict[Setting, str]:
    """A name for each: its method, and those settings in which rows of one method differ.

    A loss of one's own goes by its function's name, unless another method has that name.
    """
    named = {}
    methods = {dict(setting).get("method", "run") for setting in settings}
    short = Counter(map(short_name, methods))
    for setting in settings:
        own = {"method": "run", **dict(setting)}
        alike = [dict(other) for other in settings if dict(other).get("method", "run") == own["method"]]
        differ = {name for name in SETTINGS[1:] if len({other.get(name) for other in alike}) > 1}
        if "num_completions" in differ:
            own.setdefault("num_completions", "all")
        parts = [_SIGNS.get(name, "") + own[name] for name in SETTINGS if name in own and name in differ]
        method = short_name(own["method"])
        named[setting] = ", ".join([method if short[method] == 1 else own["method"], *parts])
    return named


def _plain(value: Any) -> str:
    """`0.50`, `5e-1` and 0.5 are one setting."""
    try:
        return f"{float(value):.12g}"
    except ValueError:
        return value
