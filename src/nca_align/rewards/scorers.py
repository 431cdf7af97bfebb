"""Rewards for rows, by one or several scorers, each named by a spec."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from ..errors import InvalidRowError, UserError, one_line
from ..store.shards import Advance, Shard
from .reward_models import Scorer
from .spec import ScorerSpec, column_names


def check_weights(weights: Any, scorers: int) -> None:
    """Raise a UserError where `weights` aren't a finite number a scorer, or none at all."""
    if weights and isinstance(weights, Sequence) and len(weights) != scorers:
        raise UserError(f"`scorer_weights` has {len(weights)} values for {scorers} scorers; give one each, or none")
    if not isinstance(weights, Sequence) or not all(_is_finite(weight) for weight in weights):
        raise UserError(f"`scorer_weights` is {weights!r}; they must be finite numbers, one a scorer")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Scorers:
    """Rewards for rows, by one or several scorers: what `shards.run_sharded` calls for each shard.

    Args:
        scorers: name of a score → scorer.
        weights: one each.
    """

    def __init__(self, scorers: dict[str, Scorer], weights: list[float]):
        self._scorers, self._weights = scorers, weights

    def __call__(self, shard: int, first_row: int, rows: list[dict], advance: Advance) -> Shard:
        result = Shard([], Counter(completions=0))
        table = {name: _score_rows(scorer, rows) for name, scorer in self._scorers.items()}
        for i, row in enumerate(rows):
            scores = {name: values[i] for name, values in table.items()}
            if problem := _problem(scores):
                result.failed[first_row + i] = problem
                continue
            rewards = [
                sum(weight * score for weight, score in zip(self._weights, given, strict=True) if score is not None)
                for given in zip(*scores.values(), strict=True)
            ]
            result.counts["completions"] += len(rewards)
            result.rows.append({**row, "rewards": rewards, **scores})
        return result


def open_scorers(
    specs: Sequence[str | Callable],
    weights: list[float] | None = None,
    tokenizer: str | None = None,
    batch_size: int = 16,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Scorers:
    """What gives rows of `prompt`, `completions` and other columns their `rewards`.

    Arguments are as in `ScoreOptions`; a scorer may be the function itself too.

    Raises:
        ValueError: `weights` that aren't a finite number each.
        UserError: a scorer that isn't there.
    """
    check_weights(weights or [], len(specs))
    parsed = [ScorerSpec.parse(spec) for spec in specs]
    opened = [spec.open(tokenizer, batch_size, dtype, trust_remote_code) for spec in parsed]
    return Scorers(dict(zip(column_names(parsed), opened, strict=True)), weights or [1.0] * len(opened))


def _score_rows(scorer: Scorer, rows: list[dict]) -> list[Any]:
    """K scores of each row; where the scorer raises, it is called row by row, and a row's error stands for its scores.

    Raises:
        UserError: what is wrong with all rows alike.
    """
    repeated = [row for row in rows for _ in row["completions"]]
    completions = [completion for row in rows for completion in row["completions"]]
    try:
        scores = iter(scorer(repeated, completions))
    except Exception as error:
        if isinstance(error, UserError) and not isinstance(error, InvalidRowError):
            raise
        return [error] if len(rows) == 1 else [found for row in rows for found in _score_rows(scorer, [row])]
    return [list(islice(scores, len(row["completions"]))) for row in rows]


def _problem(scores: dict[str, Any]) -> str:
    """Why these scores of a row can't be used; empty where they can."""
    for name, values in scores.items():
        if isinstance(values, Exception):
            return f"`{name}` raised {type(values).__name__}: {one_line(values)[:200]}"
        for k, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                return f"`{name}` gave {value} for completion {k}; a score must be a finite number, or None to skip"
    for k, given in enumerate(zip(*scores.values(), strict=True)):
        if all(value is None for value in given):
            return f"every scorer skipped completion {k} (None); at least one must score it"
    return ""
