"""What a run logged: metrics over steps, by rank, and whose prompts they are of."""

import math
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from typing import Any

from ..training import metrics

Log = Sequence[Mapping[str, Any]]  # a trainer's `log_history`
Curve = tuple[list[float], list[float]]  # steps and values


def logged(log: Log, metric: str) -> Curve:
    """Steps and finite values of a metric; of a step logged twice, as after a resumed run, the last."""
    values = {line["step"]: float(line[metric]) for line in log if isinstance(line.get(metric), int | float)}
    values = {step: value for step, value in sorted(values.items()) if math.isfinite(value)}
    return list(values), list(values.values())


def error_bars(log: Log, metric: str) -> list[tuple[float, float]] | None:
    """Two standard errors to either side of each of the metric's values, where `METRIC_error` was logged."""
    errors = dict(zip(*logged(log, f"{metric}_error"), strict=True))
    points = zip(*logged(log, metric), strict=True)
    arms = [(value, 2 * errors.get(step, math.nan)) for step, value in points]
    return [(value - arm, value + arm) for value, arm in arms] if errors else None


def rank_name(rank: int) -> str:
    """A rank in a legend: "best", "2.", "3." …"""
    return "best" if rank == 1 else f"{rank}."


def by_rank(log: Log, name: str, prefix: str = "") -> dict[int, Curve]:
    """Rank (1 the best) → (steps, values) of `name` ("rewards" or "logratios") in a `log_history`."""
    curves = (logged(log, f"{prefix}{name}/rank_{rank}") for rank in count(1))
    return dict(enumerate(takewhile(lambda curve: curve[0], curves), 1))


def last_evaluation(log: Log, step: int | None = None) -> Mapping[str, Any] | None:
    """The log's last line of an evaluation, or the one at `step`, where the best model was that is kept."""
    lines = [line for line in log if "eval_loss" in line]
    return next((line for line in reversed(lines) if step is None or line["step"] == step), None)


def prefixes(log: Log) -> dict[str, str]:
    """Prefix of a log's metrics → whose they are; see `training.metrics.prefixes`."""
    return metrics.prefixes(name for line in log for name in line)
