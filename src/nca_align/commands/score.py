"""`nca-align score`: completions to `rewards`, from a model, a classifier, a Python function, or several of them."""

import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from datasets import Features, List, Value

from ..data.prompts import load_completions
from ..errors import UserError, command, one_line
from ..options import parse
from ..rewards.reward_functions import find_function, function_scorer, is_function, source_fingerprint
from ..rewards.reward_models import Scorer, check_config, pipeline_scorer, reward_model
from ..store.provenance import data_fingerprint, read_provenance, versions, weights_fingerprint
from ..store.shards import Shard, run_sharded
from .sample.engine import Advance


@dataclass
class ScoreOptions:
    """Options of `nca-align score`."""

    dataset_name: str = field(
        metadata={"help": "rows of `prompt` and `completions`, or any format that training reads"}
    )
    output: str = field(metadata={"help": "the file to write, .parquet or .jsonl"})
    scorer: list[str] = field(
        metadata={"help": "may repeat. `module:function` (TRL's reward-function signature), `pipeline:MODEL:LABEL`, "
                  "or a reward model's folder or id", "action": "extend"},
    )  # fmt: skip
    scorer_weights: list[float] = field(
        default_factory=list, metadata={"help": "one a scorer, 1 by default", "action": "extend"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a data set of the Hub"})
    split: str = field(default="train", metadata={"help": "split of a data set that has several"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "tokenizer whose `completion_ids` functions are given; none by default"}
    )
    on_error: Literal["stop", "drop"] = field(
        default="stop",
        metadata={"help": "rows that can't be scored: stop, once all others are done and kept, or drop and count them"},
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto", metadata={"help": "of reward models and classifiers; auto: bfloat16 on a GPU, float32 on a CPU"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with a scorer's model"})
    batch_size: int = field(default=16, metadata={"help": "completions a batch of a model"})
    shard_size: int = field(default=64, metadata={"help": "rows a shard, the unit in which work is kept"})

    def __post_init__(self):
        for name in ("batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` is {getattr(self, name)}; it must be at least 1")
        if not self.scorer:
            raise UserError("`scorer` is missing: name a reward model, pipeline:MODEL:LABEL or module:function")
        check_weights(self.scorer_weights, len(self.scorer))


def check_weights(weights: Any, scorers: int) -> None:
    """Raise a ValueError where `weights` aren't a finite number a scorer, or none at all."""
    if weights and isinstance(weights, Sequence) and len(weights) != scorers:
        raise UserError(f"`scorer_weights` has {len(weights)} values for {scorers} scorers; give one each, or none")
    if not isinstance(weights, Sequence) or not all(_is_finite(weight) for weight in weights):
        raise UserError(f"`scorer_weights` is {weights!r}; they must be finite numbers, one a scorer")


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def score(options: ScoreOptions) -> dict[str, int]:
    """Score every completion and write `options.output`: the input's columns, `rewards`, and `score_NAME` for each.

        rewards_i = Σ_s weight_s · score_s,i over the scorers s that gave completion i a score

    Returns:
        What was counted: `rows`, `completions`, `failed` (rows left out by `on_error: drop`).

    Raises:
        UserError: whatever the user can mend, in one sentence.
    """
    functions = {spec: find_function(spec) for spec in options.scorer if is_function(spec)}  # before any model loads
    dataset = load_completions(options.dataset_name, options.dataset_config, options.split)
    names = column_names(options.scorer)
    new = {name: List(Value("float64")) for name in ("rewards", *names)}
    kept = {name: kind for name, kind in dataset.features.items() if name not in new}
    dataset = dataset.select_columns(list(kept))

    def start() -> Scorers:
        return open_scorers(
            options.scorer, options.scorer_weights, options.tokenizer, options.batch_size, options.dtype,
            options.trust_remote_code,
        )  # fmt: skip

    config = {
        "scorers": [scorer_identity(spec) for spec in options.scorer],
        "weights": options.scorer_weights or [1.0] * len(names),
        "tokenizer": weights_fingerprint(options.tokenizer), "dtype": options.dtype,
        "shard_size": options.shard_size, "data": data_fingerprint(dataset),
    }  # fmt: skip
    about = {"scorers": options.scorer, "data": options.dataset_name, "versions": versions("torch", "transformers")}
    sources = {spec: source_fingerprint(function) for spec, function in functions.items()}
    counts = run_sharded(
        options.output, dataset, Features({**kept, **new}), start,
        {"command": "score", "config": config, "about": about, "sources": sources},
        history=read_provenance(options.dataset_name),
        shard_size=options.shard_size, drop_failed=options.on_error == "drop",
    )  # fmt: skip
    left_out = f", {counts['failed']} rows left out that could not be scored" if counts["failed"] else ""
    print(f"{options.output}: {counts['rows']} rows, {counts['completions']} completions{left_out}", file=sys.stderr)
    return counts


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
            except UserError:
                raise
            except Exception:  # a row that it can't score: find which, and keep the others
                table[name] = []
                for i, row in enumerate(rows):
                    try:
                        table[name] += _score_rows(scorer, [row])
                    except UserError:
                        raise
                    except Exception as error:
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


@command("nca-align score")
def main(argv: list[str] | None = None) -> None:
    """Parse the options and score."""
    (options,) = parse([ScoreOptions], argv, "nca-align score", "rewards for the completions of each prompt")
    score(options)


if __name__ == "__main__":
    sys.exit(main())
