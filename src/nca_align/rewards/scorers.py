"""Scorers by what `--scorer` names: a function, a classifier or a reward model; and rewards for rows by several."""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from ..data.validation import LARGEST
from ..errors import InvalidRowError, UserError, one_line
from ..models.loading import model_fingerprint
from ..store.fingerprints import source_fingerprint
from ..store.shards import Shard
from ..user_functions import find_function, function_name, names_a_function
from .reward_functions import function_scorer
from .reward_models import Scorer, check_config, model_scorer


@dataclass(frozen=True)
class ScorerSpec:
    """One scorer, as it was named and not yet opened.

    Args:
        kind: a Python function of TRL's reward-function signature, a text classifier, or a reward model.
        name: `module:function`, or the model's folder or id.
        label: of a classifier, whose probability is the score, or of a reward model's output where it has several.
        given: the function, where it was handed over itself.
    """

    kind: Literal["function", "classifier", "reward model"]
    name: str
    label: str | None = None
    given: Callable | None = None

    @classmethod
    def parse(cls, scorer: str | Callable) -> "ScorerSpec":
        """From `module:function`, `pipeline:MODEL:LABEL`, a reward model's name, `reward:MODEL:LABEL` or a function."""
        if not isinstance(scorer, str):
            return cls("function", function_name(scorer), given=scorer)
        if scorer.startswith("pipeline:"):
            model, _, label = scorer.removeprefix("pipeline:").partition(":")
            return cls("classifier", model, label or None)
        if named := re.fullmatch("reward:(.+):([^:]+)", scorer):
            return cls("reward model", named[1], named[2])
        return cls("function" if names_a_function(scorer) else "reward model", scorer)

    def function(self) -> Callable:
        """The function itself.

        Raises:
            UserError: it isn't there.
        """
        return self.given or find_function(self.name, "scorer")

    def identity(self) -> str | None:
        """Its name, with a fingerprint of its weights where it is a model that is here."""
        if self.kind == "function":
            return self.name
        prefix = "pipeline" if self.kind == "classifier" else "reward" if self.label else None
        return ":".join(filter(None, (prefix, model_fingerprint(self.name), self.label)))

    def fingerprint(self) -> str | None:
        """What changes with its weights or, of a function, with the file that it is written in."""
        return source_fingerprint(self.function()) if self.kind == "function" else self.identity()

    def check(self, trust_remote_code: bool = False) -> None:
        """Look for what `open` would open, without opening it, where much is to be computed before it.

        Raises:
            UserError: a function that isn't there, or a model whose configuration isn't there or says other outputs.
        """
        if self.kind == "function":
            self.function()
        else:
            check_config(self.name, self.label, self.kind == "classifier", trust_remote_code)

    def open(self, tokenizer: str | None, batch_size: int, dtype: str, trust_remote_code: bool) -> Scorer:
        """The scorer itself; the arguments are those of `ScoreOptions`.

        Raises:
            UserError: it isn't there, or is no scorer.
        """
        if self.kind == "function":
            return function_scorer(self.function(), self.name, tokenizer)
        return model_scorer(self.name, self.label, self.kind == "classifier", batch_size, dtype, trust_remote_code)


def column_names(specs: Sequence[ScorerSpec]) -> list[str]:
    """`score_NAME` for each scorer: its function, label or model, with a number where two are alike."""
    names: list[str] = []
    for spec in specs:
        last = spec.label or (spec.name.rpartition(":")[2] if spec.kind == "function" else spec.name)
        base = "score_" + re.sub(r"\W+", "_", os.path.basename(last.rstrip("/"))).strip("_")
        count = sum(name == base or re.fullmatch(re.escape(base) + r"_\d+", name) is not None for name in names)
        names.append(f"{base}_{count + 1}" if count else base)
    return names


def check_weights(weights: Any, scorers: int) -> None:
    """Raise a UserError where `weights` aren't a finite number a scorer, or none at all."""
    if weights and isinstance(weights, Sequence) and len(weights) != scorers:
        raise UserError(f"`scorer_weights` has {len(weights)} values for {scorers} scorers; give one each, or none")
    if not isinstance(weights, Sequence) or not all(_is_finite(weight) for weight in weights):
        raise UserError(f"`scorer_weights` is {weights!r}; they must be finite numbers, one a scorer")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Scorers:
    """Rewards for rows, by one or several scorers.

    Args:
        scorers: name of a score → scorer.
        weights: one each.
    """

    def __init__(self, scorers: dict[str, Scorer], weights: list[float]):
        self._scorers, self._weights = scorers, weights

    def score_rows(self, rows: list[dict], first_row: int = 0) -> Shard:
        """Rows with their rewards and scores, and by their numbers from `first_row` on why others have none."""
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
            if (largest := max(map(abs, rewards), default=0.0)) > LARGEST:
                result.failed[first_row + i] = f"a reward is ±{largest:g}; it must lie within ±{LARGEST:g}"
                continue
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
