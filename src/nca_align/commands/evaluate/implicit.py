"""`nca-align evaluate --implicit`: the aligned model as a reward model, whole and token by token."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from math import isnan
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from torch import Tensor, nn

from ... import progress
from ...batching.collator import masks_of, padded
from ...batching.tokenization import tokenize_dataset
from ...config import NCAConfig, prompt_limit
from ...data import DataOptions, held_out_split, read_reward_dataset
from ...evaluation.intervals import Interval
from ...evaluation.ranking import LENGTH_MATCH, Completions, compare_scores, length_residual, pair_kinds
from ...models.loading import ModelSource, run_record
from ...models.logprobs import differences, token_logps
from ...models.policy import as_reference
from ...options import Dtype, dtype_option, option, require_at_least_1, require_positive
from ...pages.terminal import print_rows
from ...store.files import check_writable, replacing, write_json
from .references import check_vocabulary, require_reference

LENGTH = "length"


@dataclass(kw_only=True)
class ImplicitOptions(DataOptions):
    """Options of `nca-align evaluate --implicit`."""

    implicit: bool = option("what chooses this evaluation", True)
    dataset_name: str = option("rewarded completions or preferences, in any format that training reads")
    model_name_or_path: str = option("the aligned model, or the folder of its adapter")
    reference: str | None = option(
        "the model before training; of an adapter by default its base with the adapter off", None
    )
    beta: float | None = option(
        "implicit reward per nat, which no order depends on; by default the run's, or else 0.01", None
    )
    dataset_config: str | None = option("configuration of a data set of the Hub", None)
    split: str | None = option("by default the data's held-out split, or all of a file that is one split", None)
    validation_fraction: float = option(
        "with `split: validation`, the share that training held out (its default: 0.05)", 0.0
    )
    max_length: int | None = option("tokens of prompt and completion, as in training", 1024)
    max_prompt_length: int | None = option("tokens kept of a prompt, its end; half of `max_length` by default", None)
    dtype: Dtype = dtype_option()
    trust_remote_code: bool = option("run code that comes with a model", False)
    batch_size: int = option("completions a forward", 16)
    output: str | None = option("JSON file of all figures with their intervals", None)
    token_scores: str | None = option("JSONL file of every completion's tokens with their implicit rewards", None)

    def __post_init__(self):
        super().__post_init__()
        require_at_least_1(self, "batch_size")
        require_positive(self, "beta")
        self.max_prompt_length = prompt_limit(self.max_prompt_length, self.max_length)


@dataclass(frozen=True)
class ImplicitEvaluation:
    """What `--implicit` found.

    Args:
        prompts, completions, pairs, like_length: how many; pairs are those with unequal rewards.
        beta: implicit reward per nat.
        figures: by score and figure, see `ranking.ranking_metrics`.
        less_length: each score's figures less those of `length`.
        random, best: mean reward of a completion chosen at random, and of the best.
    """

    prompts: int
    completions: int
    pairs: int
    like_length: int
    beta: float
    figures: dict[str, dict[str, Interval]]
    less_length: dict[str, dict[str, Interval]]
    random: float
    best: float


def load_rows(options: ImplicitOptions) -> Dataset:
    """The rows to evaluate on, `prompt, completions, rewards`: the split asked for, or the held-out or only one."""
    splits = read_reward_dataset(
        options.dataset_name, split=options.split, name=options.dataset_config, options=options
    ).dataset
    return splits[held_out_split(splits)]  # with `split` given it is the only one


def token_logratios(
    policy: str, reference: str | None, rows: Sequence[dict[str, Any]], options: ImplicitOptions
) -> list[list[Tensor]]:
    """log π(y_t | x, y_<t) − log π_ref(y_t | x, y_<t) of every token of every completion, nats.

    Args:
        policy, reference: models or adapters' folders; None for what the adapter was trained from.
        rows: `prompt_ids`, `completion_ids`.
        options: for `dtype`, `trust_remote_code`, `batch_size`.

    Returns:
        For each row K tensors (T,).

    Raises:
        UserError: a whole model without a reference, or a reference with another vocabulary.
    """
    aligned = ModelSource.of(policy, trust_remote_code=options.trust_remote_code)
    before = None
    if reference is not None:
        before = ModelSource.of(reference, key="reference", trust_remote_code=options.trust_remote_code)
        check_vocabulary(aligned, before)
    require_reference(aligned, before)

    def logps(model: nn.Module, name: str) -> list[list[Tensor]]:
        with progress.bar(len(rows), "row", desc=f"Log-probabilities, {name}", leave=False) as bar:
            return token_logps(model, rows, options.batch_size, bar.update)

    model = aligned.load_policy(options.dtype)
    pi = logps(model, "aligned")
    if before is None:
        with as_reference(model):
            ref = logps(model, "reference")
    else:
        del model  # one at a time: two large models may not fit
        model = before.load_policy(options.dtype)
        ref = logps(model, "reference")
    return differences(pi, ref)


def evaluate_implicit(logratios: Sequence[Sequence[Tensor]], rewards: Sequence[Sequence[float]], beta: float):
    """How well implicit rewards order completions, and how much of that is length.

    Four scores of a completion of T tokens, r = β Σ_t (log π − log π_ref): `implicit` is r, `per token` r / T,
    `less length` r without what length explains (`ranking.length_residual`), and `length` T itself, the baseline.

    Args:
        logratios: for each of B prompts K tensors (T,), nats.
        rewards: for each prompt K rewards.
        beta: implicit reward per nat.

    Returns:
        An `ImplicitEvaluation`.
    """
    lengths = [[len(tokens) for tokens in row] for row in logratios]
    data = Completions.of(rewards, lengths)
    whole = padded([[beta * float(tokens.double().sum()) for tokens in row] for row in logratios])
    scores = {
        "implicit": whole,
        "per token": whole / data.lengths.clamp(min=1),
        "less length": length_residual(whole, data),
        LENGTH: data.lengths,
    }
    found, less_length = compare_scores(scores, data, LENGTH)
    kinds = pair_kinds(data)
    return ImplicitEvaluation(
        len(rewards), int(data.valid.sum()), int(kinds["pairs"].sum()), int(kinds["like_length"].sum()), beta, found,
        less_length, float(data.mean_rewards.mean()), float(data.best_rewards.mean()),
    )  # fmt: skip


def write_token_scores(
    name: str, tokenizer, rows: Sequence[dict[str, Any]], logratios: Sequence[Sequence[Tensor]], beta: float
) -> None:
    """One line a completion: `row`, `completion` (both from 0), `reward`, `implicit_reward`, and for its T tokens
    `tokens` and `token_rewards`, β (log π − log π_ref), whose sum over a step is that step's score. Tokens that the
    model did not write, such as a tool's result, have none and are left out.
    """
    with replacing(Path(name)) as file:
        for i, (row, ratios) in enumerate(zip(rows, logratios, strict=True)):
            for k, (ids, mask, tokens) in enumerate(zip(row["completion_ids"], masks_of(row), ratios, strict=True)):
                values = (beta * tokens.double()).tolist()
                texts = tokenizer.batch_decode([[token] for token in compress(ids, mask)])
                line = {
                    "row": i, "completion": k, "reward": row["rewards"][k], "implicit_reward": sum(values),
                    "tokens": texts, "token_rewards": values,
                }  # fmt: skip
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def implicit(options: ImplicitOptions) -> ImplicitEvaluation:
    """Evaluate the aligned model as a reward model, print the table, and write what was asked for.

    Source: the step scores are those of arXiv 2412.01981 (Free Process Rewards without Process Labels).
    """
    for key in ("output", "token_scores"):
        if (name := getattr(options, key)) is not None:
            check_writable(Path(name), key)
    dataset = load_rows(options)
    source = ModelSource.of(options.model_name_or_path, trust_remote_code=options.trust_remote_code)
    tokenizer = source.load_tokenizer()
    dataset, notices = tokenize_dataset(dataset, tokenizer, options.max_prompt_length, options.max_length, name="data")
    for notice in notices:
        print(notice, file=sys.stderr)
    rows = list(dataset)
    beta = options.beta or run_record(options.model_name_or_path).get("beta") or NCAConfig.beta
    logratios = token_logratios(options.model_name_or_path, options.reference, rows, options)
    found = evaluate_implicit(logratios, [row["rewards"] for row in rows], beta)
    if options.token_scores is not None:
        write_token_scores(options.token_scores, tokenizer, rows, logratios, beta)
    if options.output is not None:
        write_json(Path(options.output), _as_json(found))
    print_ranking(found)
    return found


def _as_json(found: ImplicitEvaluation) -> dict[str, Any]:
    """Intervals by their names, and null for NaN, which JSON has not."""

    def plain(value: Any) -> Any:
        if isinstance(value, Interval):
            ends = {"value": value.mean, "low": value.low, "high": value.high}
            return {name: None if isnan(end) else end for name, end in ends.items()}
        return {name: plain(inner) for name, inner in value.items()} if isinstance(value, dict) else value

    return plain(dict(vars(found)))


_SHOWN = {  # figure: (what a line of the table is called, format of the value, whether its bounds are shown)
    "pairs": ("pairs right, %", "{:.1%}", True),
    "like_length": ("  of like length", "{:.1%}", True),
    "better_longer": ("  better one longer", "{:.1%}", False),
    "better_shorter": ("  better one shorter", "{:.1%}", False),
    "balanced": ("  balanced", "{:.1%}", True),
    "partial": ("partial corr., %", "{:.1%}", True),
    "gain": ("best of K: gain, %", "{:.1%}", True),
    "reward": ("  mean reward", "{:.3f}", False),
    "tokens": ("  mean tokens", "{:.0f}", False),
}


def print_ranking(found: ImplicitEvaluation) -> None:
    """Figures by score, shares with their 95 % intervals, for a terminal of 80 columns."""
    print(
        f"{found.prompts} prompts, {found.completions} completions, {found.pairs} pairs with unequal rewards,\n"
        f"{found.like_length} of them of like length (within {LENGTH_MATCH - 1:.0%}); β {found.beta:g}\n"
        "in brackets: 95 % intervals over prompts\n"
    )
    rows = [
        (label, *(_cell(values[figure], form, bounds) for values in found.figures.values()))
        for figure, (label, form, bounds) in _SHOWN.items()
    ]
    print_rows(("", *found.figures), rows, console=Console(width=120))  # it is narrower, but never cut
    pairs, gain = (_cell(found.less_length["implicit"][name], "{:+.1%}", True) for name in ("pairs", "gain"))
    print(
        f"\nimplicit less length: pairs right {pairs}, best-of-K gain {gain}\n"
        f"mean reward at random {found.random:.3f}, of the best {found.best:.3f}"
    )


def _cell(interval: Interval, form: str, bounds: bool) -> str:
    """A value, and its bounds in whole percents."""
    if isnan(interval.mean):
        return "–"
    value = form.format(interval.mean).replace("%", "")
    return f"{value} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]" if bounds else value
