"""`nca-align evaluate --implicit`: the aligned model as a reward model, whole and token by token."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from ... import progress
from ...batching.collator import objective_tensors, padded
from ...batching.tokenization import tokenize_dataset
from ...batching.tokenized_rows import masks_of
from ...config import NCAConfig, prompt_limit
from ...data import DataOptions, held_out_split, read_reward_dataset
from ...evaluation.intervals import Interval
from ...evaluation.process_rewards import step_rewards
from ...evaluation.ranking import Completions, compare_scores, length_residual, pair_kinds, ratio_intervals
from ...models.loading import ModelSource, run_record
from ...models.logprobs import differences, token_logps
from ...models.policy import as_reference
from ...options import Dtype, dtype_option, option, require_at_least_1, require_positive
from ...store.files import check_writable, replacing, write_json
from ...training.objective_metrics import objective_metrics
from ...training.outcomes import are_labels, outcome_figures
from . import process_rewards as process
from .implicit_table import ImplicitEvaluation, as_json, print_process, print_ranking
from .references import check_vocabulary, require_reference

LENGTH = "length"


@dataclass(kw_only=True)
class ImplicitOptions(process.ProcessOptions, DataOptions):
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
        self.check()
        self.min_completions = self.min_completions or 1
        self.max_prompt_length = prompt_limit(self.max_prompt_length, self.max_length)


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


def evaluate_implicit(
    logratios: Sequence[Sequence[Tensor]],
    rewards: Sequence[Sequence[float]],
    beta: float,
    objectives: Mapping[str, Tensor] | None = None,
) -> ImplicitEvaluation:
    """How well implicit rewards order completions, and how much of that is length.

    Four scores of a completion of T tokens, r = β Σ_t (log π − log π_ref): `implicit` is r, `per token` r / T,
    `less length` r without what length explains (`ranking.length_residual`), and `length` T itself, the baseline.

    Args:
        logratios: for each of B prompts K tensors (T,), nats.
        rewards: for each prompt K rewards.
        beta: implicit reward per nat.
        objectives: of several rewards each by name, (B, K) with NaN for a gap; see `objective_metrics`.
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
    outcomes: dict[str, float] = {}
    if are_labels(data.rewards, data.valid):
        outcomes = outcome_figures(whole[data.valid].tolist(), data.rewards[data.valid].tolist())
    return ImplicitEvaluation(
        len(rewards), int(data.valid.sum()), int(kinds["pairs"].sum()), int(kinds["like_length"].sum()), beta, found,
        less_length, float(data.mean_rewards.mean()), float(data.best_rewards.mean()), outcomes,
        _by_objective(whole, data, beta, objectives or {}),
    )  # fmt: skip


def _by_objective(
    whole: Tensor, data: Completions, beta: float, objectives: Mapping[str, Tensor]
) -> dict[str, Interval]:
    """The `objective_metrics` of training's evaluations, with intervals over the prompts that each counts."""
    batch = {"objectives": objectives, "valid": data.valid, "lengths": data.lengths}
    rows = objective_metrics(whole / beta, torch.zeros_like(whole), batch, beta, correlations=True)
    return ratio_intervals({name: torch.stack([value * weight, weight], 1) for name, (value, weight) in rows.items()})


def write_token_scores(
    name: str,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    logratios: Sequence[Sequence[Tensor]],
    beta: float,
    steps: Sequence[Sequence[tuple[list[int], int]]] | None = None,
) -> None:
    """One line a completion: `row`, `completion` (both from 0), `reward`, `implicit_reward`, and for its T tokens
    `tokens` and `token_rewards`, β (log π − log π_ref). Tokens that the model did not write, such as a tool's result,
    have none and are left out. With `steps` also `token_steps`, the step of each token from 0, and `step_rewards`, the
    sums over a step's tokens.
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
                if steps is not None:
                    numbers, count = steps[i][k]
                    line |= {
                        "token_steps": numbers,
                        "step_rewards": step_rewards(beta * tokens, numbers, count).tolist(),
                    }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def implicit(options: ImplicitOptions) -> ImplicitEvaluation:
    """Evaluate the aligned model as a reward model, print the table, and write what was asked for.

    Source: the step scores are those of arXiv 2412.01981 (Free Process Rewards without Process Labels).
    """
    for key in ("output", "token_scores"):
        if (name := getattr(options, key)) is not None:
            check_writable(Path(name), key)
    source = ModelSource.of(options.model_name_or_path, trust_remote_code=options.trust_remote_code)
    tokenizer = source.load_tokenizer()
    solutions, others, chosen_on = _solutions(options, tokenizer), None, "as given"
    if options.first_error is not None and options.threshold is None:
        name = options.threshold_dataset or options.dataset_name
        others = _solutions(replace(options, dataset_name=name, split=options.threshold_split), tokenizer)
        chosen_on = process.threshold_source(options)
        process.check_others(solutions, others, chosen_on)
        chosen_on = f"chosen on {chosen_on}"
    rows = solutions.rows
    beta = options.beta or run_record(options.model_name_or_path).get("beta") or NCAConfig.beta
    both = [*rows, *(others.rows if others else ())]
    logratios = token_logratios(options.model_name_or_path, options.reference, both, options)
    logratios, other_logratios = logratios[: len(rows)], logratios[len(rows) :]
    found = evaluate_implicit(logratios, [row["rewards"] for row in rows], beta, objective_tensors(rows))
    if options.rescales is not None:  # of labels, scaled ones are no more than 0 at times
        found = replace(found, outcomes={})
    if options.steps is not None or options.answers is not None:
        found = replace(found, process=process.evaluate_process(
            solutions, logratios, beta, options.threshold, others, other_logratios
        ))  # fmt: skip
    if options.token_scores is not None:
        write_token_scores(options.token_scores, tokenizer, rows, logratios, beta, solutions.steps)
    if options.output is not None:
        write_json(Path(options.output), as_json(found))
    print_ranking(found)
    if found.process is not None:
        print_process(found.process, chosen_on, chooses=not found.is_single)
    return found


def _solutions(options: ImplicitOptions, tokenizer: Any) -> process.Solutions:
    """The rows that the options name, tokenised, with their steps, answers and first errors."""
    texts = load_rows(options)
    limits = options.max_prompt_length, options.max_length
    dataset, notices = tokenize_dataset(texts, tokenizer, *limits, name="data", on_invalid=options.on_invalid)
    for notice in notices:
        print(notice, file=sys.stderr)
    rows = list(dataset)
    return process.read_solutions(options, tokenizer, rows, [texts[row["row_number"]] for row in rows])
