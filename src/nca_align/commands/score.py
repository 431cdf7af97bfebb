"""`nca-align score`: completions to `rewards`, from a model, a classifier, a Python function, or several of them."""

import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from datasets import Features, List, Value

from ..data.columns import COLUMNS_HELP, parse_columns
from ..data.prompts import load_completions
from ..errors import UserError, cli_main
from ..models.loading import model_fingerprint, torch_dtype
from ..options import Dtype, dtype_option, option, parse, require_at_least_1
from ..processes import Processes
from ..rewards.scorers import ScorerSpec, check_weights, column_names, open_scorers
from ..store.fingerprints import data_fingerprint
from ..store.provenance import read_provenance, versions
from ..store.row_files import read_rows
from ..store.shards import ShardFunction, run_sharded


@dataclass
class ScoreOptions:
    """Options of `nca-align score`."""

    dataset_name: str = option("rows of `prompt` and `completions`, or any format that training reads")
    output: str = option("the file to write, .parquet or .jsonl")
    scorer: list[str] = option(
        "`module:function` (TRL's reward-function signature), `pipeline:MODEL:LABEL` for a classifier, or a reward "
        "model's folder or id. A reward model of several outputs is `reward:MODEL:LABEL`. May repeat",
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
    columns: list[str] = option(COLUMNS_HELP, [], action="extend")

    def __post_init__(self):
        self.columns = parse_columns(self.columns)
        require_at_least_1(self, "batch_size", "shard_size")
        if not self.scorer:
            raise UserError("`scorer` is missing: name a reward model, pipeline:MODEL:LABEL or module:function")
        check_weights(self.scorer_weights, len(self.scorer))


def score(options: ScoreOptions) -> dict[str, int]:
    """Score every completion and write `options.output`: the input's columns, `rewards`, and `score_NAME` for each.

    It finds the scorers, reads the data, and compares both with what `output` holds. Only then it opens the scorers and
    scores what is left, a shard at a time. Of a launch, each process scores its share of the shards.

        rewards_i = Σ_s weight_s · score_s,i over the scorers s that gave completion i a score

    Returns:
        What was counted: `rows`, `completions`, `failed` (rows left out by `on_error: drop`).

    Raises:
        UserError: whatever the user can mend, in one sentence.
    """
    processes = Processes.of_launch()
    specs = [ScorerSpec.parse(scorer) for scorer in options.scorer]
    for spec in specs:  # a name that is misspelt is told before all the data is read
        spec.check(options.trust_remote_code)
    sources = {spec.name: spec.fingerprint() for spec in specs if spec.kind == "function"}  # before any model loads
    dataset = processes.in_turn(
        lambda: load_completions(options.dataset_name, options.dataset_config, options.split, options.columns)
    )
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

    def config() -> dict[str, Any]:
        return {
            "scorers": [spec.identity() for spec in specs],
            "weights": options.scorer_weights or [1.0] * len(names),
            "tokenizer": model_fingerprint(options.tokenizer), "dtype": options.dtype,
            "shard_size": options.shard_size, "data": data_fingerprint(dataset),
        }  # fmt: skip

    about = {"scorers": options.scorer, "data": options.dataset_name, "versions": versions("torch", "transformers")}
    counts = run_sharded(
        options.output, dataset, Features({**kept, **new}), open_when_needed,
        {"command": "score", "config": processes.once(config), "about": about, "sources": sources},
        history=read_provenance(options.dataset_name),
        shard_size=options.shard_size, drop_failed=options.on_error == "drop", processes=processes,
    )  # fmt: skip
    if not processes.first:
        return counts
    print(f"{options.output}: {counts['rows']} rows, {counts['completions']} completions", file=sys.stderr)
    dtype = torch_dtype(options.dtype)
    rounded = any(spec.kind != "function" for spec in specs) and dtype.itemsize < 4
    columns = _columns(options.output, ["rewards", *names])
    print(summary(columns, counts["failed"], str(dtype).removeprefix("torch.") if rounded else None), file=sys.stderr)
    return counts


def _columns(file: str, names: list[str]) -> dict[str, list[list[float | None]]]:
    if file.endswith(".parquet"):
        return pq.read_table(file, columns=names).to_pydict()
    rows = read_rows(Path(file))
    return {name: [row[name] for row in rows] for name in names}


def summary(columns: dict[str, list[list[float | None]]], failed: int, rounded: str | None = None) -> str:
    """What the rewards of scored rows are like, in a few lines: their mean, spread and ties, and what has no score.

    Args:
        columns: `rewards`, and each scorer's scores by its column; K numbers a row.
        failed: rows that are left out, since they couldn't be scored.
        rounded: the dtype of models that run in fewer than 32 bits, where there are such.
    """
    rows = [np.array(rewards, dtype=float) for rewards in columns["rewards"]]
    several = [rewards for rewards in rows if len(rewards) > 1]
    lines = [f"rewards: mean {np.concatenate(rows).mean():.3g}"]
    if several:
        spread = np.mean([np.ptp(rewards) for rewards in several])
        pairs = sum(len(rewards) * (len(rewards) - 1) // 2 for rewards in several)
        ties = sum(math.comb(n, 2) for rewards in several for n in Counter(rewards.tolist()).values())
        equal = sum(np.ptp(rewards) == 0 for rewards in several)
        lines[0] += f", spread within a prompt {spread:.3g} (highest − lowest, the mean)"
        lines.append(
            f"ties: {_share(ties, pairs, 'pairs')}; all rewards equal: {_share(equal, len(several), 'prompts')}"
        )
        if ties and rounded:
            lines.append(f"models ran in {rounded}, which rounds scores: `--dtype float32` tells more of them apart")
    lines.append(f"not scored and left out: {_share(failed, len(rows) + failed, 'rows')}")
    for name, own in columns.items():
        scores = [score for row in own for score in row]
        if None in scores:
            lines.append(f"skipped by {name}: {_share(scores.count(None), len(scores), 'completions')}")
    return "\n".join(lines)


def _share(n: int, total: int, what: str) -> str:
    return f"{n:,} of {total:,} {what} ({n / total:.1%})"


@cli_main("nca-align score")
def main(argv: list[str] | None = None) -> None:
    """Parse the options and score."""
    (options,) = parse([ScoreOptions], argv, "nca-align score", "rewards for the completions of each prompt")
    score(options)
