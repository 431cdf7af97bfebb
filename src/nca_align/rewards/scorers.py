"""Rewards for rows, by one or several scorers, each named by a spec."""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from ..errors import InvalidRowError, UserError, one_line
from ..store.fingerprints import weights_fingerprint
from ..store.shards import Advance, Shard
from .reward_functions import find_function, function_scorer, is_function
from .reward_models import Scorer, check_config, pipeline_scorer, reward_model


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
            pairs = zip(self._weights, scores.values(), strict=True)
            weighted = [[None if value is None else weight * value for value in values] for weight, values in pairs]
            rewards = [sum(v for v in values if v is not None) for values in zip(*weighted, strict=True)]
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
    scorers: dict[str, Scorer] = {}
    for name, spec in zip(column_names([_name(spec) for spec in specs]), specs, strict=True):
        if callable(spec):
            scorers[name] = function_scorer(spec, _name(spec), tokenizer)
        elif is_function(spec):
            scorers[name] = function_scorer(find_function(spec), spec, tokenizer)
        elif spec.startswith("pipeline:"):
            _, model, label = _parts(spec)
            scorers[name] = pipeline_scorer(model, label or None, batch_size, dtype, trust_remote_code)
        else:
            scorers[name] = reward_model(spec, batch_size, dtype, trust_remote_code)
    return Scorers(scorers, weights or [1.0] * len(scorers))


def _name(spec: str | Callable) -> str:
    """`module:function` of a function."""
    function = getattr(spec, "func", spec)  # a partial's own
    return spec if isinstance(spec, str) else f"{function.__module__}:{getattr(function, '__qualname__', 'scorer')}"


def column_names(specs: list[str]) -> list[str]:
    """`score_NAME` for each scorer: its function, label or model, with a number where two are alike."""
    names: list[str] = []
    for spec in specs:
        last = spec.rpartition(":")[2] if is_function(spec) or spec.startswith("pipeline:") else spec
        base = "score_" + re.sub(r"\W+", "_", os.path.basename(last.rstrip("/"))).strip("_")
        count = sum(name == base or re.fullmatch(re.escape(base) + r"_\d+", name) is not None for name in names)
        names.append(f"{base}_{count + 1}" if count else base)
    return names


def scorer_identity(spec: str) -> str | None:
    """A scorer's name, with a fingerprint of its weights where it is a model that is here."""
    if is_function(spec):
        return spec
    prefix, model, label = _parts(spec)
    return ":".join(filter(None, (prefix, weights_fingerprint(model), label)))


def _parts(spec: str) -> tuple[str, str, str]:
    """`pipeline:MODEL:LABEL`, or a reward model's name alone between two empty ones."""
    if not spec.startswith("pipeline:"):
        return "", spec, ""
    model, _, label = spec.removeprefix("pipeline:").partition(":")
    return "pipeline", model, label


def check_scorers(specs: Sequence[str], trust_remote_code: bool = False) -> None:
    """Look for what `open_scorers` would open, without opening it, where much is to be computed before it.

    Raises:
        UserError: a function that isn't there, or a model whose configuration isn't there or says other outputs.
    """
    for spec in specs:
        if is_function(spec):
            find_function(spec)
        else:
            prefix, model, label = _parts(spec)
            check_config(model, label or None, bool(prefix), trust_remote_code)


def _score_rows(scorer: Scorer, rows: list[dict]) -> list[list[float | None]]:
    counts = [len(row["completions"]) for row in rows]
    flat = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
    columns = {
        key: [row[key] for row in flat] for key in rows[0] if key not in ("prompt", "completions", "completion_ids")
    }
    completions = [completion for row in rows for completion in row["completions"]]
    scores = list(scorer([row["prompt"] for row in flat], completions, columns))
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + count)
    return [scores[a:b] for a, b in pairwise(ends)]


def _problem(scores: dict[str, list]) -> str:
    for name, values in scores.items():
        for k, value in enumerate(values):
            if value is not None and not math.isfinite(value):
                return f"`{name}` gave {value} for completion {k}; a score must be a finite number, or None to skip"
    for k, given in enumerate(zip(*scores.values(), strict=True)):
        if all(value is None for value in given):
            return f"every scorer skipped completion {k} (None); at least one must score it"
    return ""
