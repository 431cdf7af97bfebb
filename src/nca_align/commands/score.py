"""`nca-align score`: completions to `rewards`, from a model, a classifier, a Python function, or several of them."""

import sys
from dataclasses import dataclass
from typing import Literal

from datasets import Features, List, Value

from ..data.prompts import load_completions
from ..errors import UserError, cli_main
from ..models.loading import model_fingerprint
from ..options import Dtype, dtype_option, option, parse, require_at_least_1
from ..rewards.scorers import ScorerSpec, check_weights, column_names, open_scorers
from ..store.fingerprints import data_fingerprint
from ..store.provenance import read_provenance, versions
from ..store.shards import ShardFunction, run_sharded


@dataclass
class ScoreOptions:
    """Options of `nca-align score`."""

    dataset_name: str = option("rows of `prompt` and `completions`, or any format that training reads")
    output: str = option("the file to write, .parquet or .jsonl")
    scorer: list[str] = option(
        "may repeat. `module:function` (TRL's reward-function signature), `pipeline:MODEL:LABEL`, "
        "or a reward model's folder or id",
        action="extend",
    )
    scorer_weights: list[float] = option("one a scorer, 1 by default", [], action="extend")
    dataset_config: str | None = option("configuration of a data set of the Hub", None)
    split: str = option("split of a data set that has several", "train")
    tokenizer: str | None = option("tokenizer whose `completion_ids` functions are given; none by default", None)
    on_error: Literal["stop", "drop"] = option(
        "rows that can't be scored: stop, once all others are done and kept, or drop and count them", "stop"
    )
    dtype: Dtype = dtype_option("of reward models and classifiers; auto: bfloat16 on a GPU, float32 on a CPU")
    trust_remote_code: bool = option("run code that comes with a model", False)
    batch_size: int = option("completions a batch of a model", 16)
    shard_size: int = option("rows a shard, the unit in which work is kept", 64)

    def __post_init__(self):
        require_at_least_1(self, "batch_size", "shard_size")
        if not self.scorer:
            raise UserError("`scorer` is missing: name a reward model, pipeline:MODEL:LABEL or module:function")
        check_weights(self.scorer_weights, len(self.scorer))


def score(options: ScoreOptions) -> dict[str, int]:
    """Score every completion and write `options.output`: the input's columns, `rewards`, and `score_NAME` for each.

    It finds the scorers, reads the data, and compares both with what `output` holds. Only then it opens the scorers and
    scores what is left, a shard at a time.

        rewards_i = Σ_s weight_s · score_s,i over the scorers s that gave completion i a score

    Returns:
        What was counted: `rows`, `completions`, `failed` (rows left out by `on_error: drop`).

    Raises:
        UserError: whatever the user can mend, in one sentence.
    """
    specs = [ScorerSpec.parse(scorer) for scorer in options.scorer]
    sources = {spec.name: spec.fingerprint() for spec in specs if spec.kind == "function"}  # before any model loads
    dataset = load_completions(options.dataset_name, options.dataset_config, options.split)
    names = column_names(specs)
    new = {name: List(Value("float64")) for name in ("rewards", *names)}
    kept = {name: kind for name, kind in dataset.features.items() if name not in new}
    dataset = dataset.select_columns(list(kept))

    def open_when_needed() -> ShardFunction:
        scorers = open_scorers(
            options.scorer, options.scorer_weights, options.tokenizer, options.batch_size, options.dtype,
            options.trust_remote_code,
        )  # fmt: skip
        return lambda shard, first_row, rows, progress: scorers.score_rows(rows, first_row)

    config = {
        "scorers": [spec.identity() for spec in specs],
        "weights": options.scorer_weights or [1.0] * len(names),
        "tokenizer": model_fingerprint(options.tokenizer), "dtype": options.dtype,
        "shard_size": options.shard_size, "data": data_fingerprint(dataset),
    }  # fmt: skip
    about = {"scorers": options.scorer, "data": options.dataset_name, "versions": versions("torch", "transformers")}
    counts = run_sharded(
        options.output, dataset, Features({**kept, **new}), open_when_needed,
        {"command": "score", "config": config, "about": about, "sources": sources},
        history=read_provenance(options.dataset_name),
        shard_size=options.shard_size, drop_failed=options.on_error == "drop",
    )  # fmt: skip
    left_out = f", {counts['failed']} rows left out that could not be scored" if counts["failed"] else ""
    print(f"{options.output}: {counts['rows']} rows, {counts['completions']} completions{left_out}", file=sys.stderr)
    return counts


@cli_main("nca-align score")
def main(argv: list[str] | None = None) -> None:
    """Parse the options and score."""
    (options,) = parse([ScoreOptions], argv, "nca-align score", "rewards for the completions of each prompt")
    score(options)
