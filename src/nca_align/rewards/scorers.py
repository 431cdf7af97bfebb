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
    """Raise a ValueError where `weights` aren't a finite number a scorer, or none at all."""
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
        failed: dict[int, str] = {}
        table: dict[str, list] = {}
        for name, scorer in self._scorers.items():
            try:
                table[name] = _score_rows(scorer, rows)
            except Exception as error:
                if _is_of_all_rows(error):
                    raise
                table[name] = []  # a row that it can't score: find which, and keep the others
                for i, row in enumerate(rows):
                    try:
                        table[name] += _score_rows(scorer, [row])
                    except Exception as error:
                        if _is_of_all_rows(error):
                            raise
                        failed[first_row + i] = f"`{name}` raised {type(error).__name__}: {one_line(error)[:200]}"
                        table[name].append([None] * len(row["completions"]))
        result = Shard([], Counter(completions=0), failed)
        for i, row in enumerate(rows):
            scores = {name: table[name][i] for name in self._scorers}
            problem = _problem(scores)
            if first_row + i in failed or problem:
                failed.setdefault(first_row + i, problem)
                continue
            rewards = [
                sum(weight * score for weight, score in zip(self._weights, given, strict=True) if score is not None)
                for given in zip(*scores.values(), strict=True)
            ]
            result.counts["completions"] += len(rewards)
            result.rows.append({**row, "rewards": rewards, **scores})
        result.failed = dict(sorted(failed.items()))
        return result


def _is_of_all_rows(error: Exception) -> bool:
    return isinstance(error, UserError) and not isinstance(error, InvalidRowError)


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


def _score_rows(scorer: Scorer, rows: list[dict]) -> list[list[float | None]]:
    counts = [len(row["completions"]) for row in rows]
    flat = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
    columns = {
        key: [row[key] for row in flat] for key in rows[0] if key not in ("prompt", "completions", "completion_ids")
    }
    completions = [completion for row in rows for completion in row["completions"]]
    scores = iter(scorer([row["prompt"] for row in flat], completions, columns))
    return [list(islice(scores, count)) for count in counts]


def _problem(scores: dict[str, list]) -> str:
    for name, values in scores.items():
        for k, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                return f"`{name}` gave {value} for completion {k}; a score must be a finite number, or None to skip"
    for k, given in enumerate(zip(*scores.values(), strict=True)):
        if all(value is None for value in given):
            return f"every scorer skipped completion {k} (None); at least one must score it"
    return ""
