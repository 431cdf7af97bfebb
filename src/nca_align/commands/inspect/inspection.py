"""What `nca-align inspect` measures of a split."""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset, List, Value

from ... import progress
from ...batching.collator import RewardCollator
from ...batching.row_tokens import truncate
from ...batching.tokenization import rows_that_become_tokens, tokenize_dataset
from ...batching.tokenized_rows import masks_of
from ...data import DataReport
from ...data.cleaning import text_of
from . import reward_stats as stats
from .objectives import Objective, compare_objectives, read_objectives
from .options import InspectOptions


@dataclass(frozen=True)
class Tokens:
    """Token counts as training sees them.

    Args:
        prompt_lengths, lengths: (B,) and (ΣK,) before truncation.
        written: (ΣK,) those of `lengths` that the model wrote, which are trained on.
        kept_prompt_lengths, kept_lengths: after it: a prompt's beginning is cut, and a completion's end.
        padded, unique: positions of the two layouts, one prompt a batch.
        notices: what tokenisation has to say.
    """

    prompt_lengths: np.ndarray
    lengths: np.ndarray
    written: np.ndarray
    kept_prompt_lengths: np.ndarray
    kept_lengths: np.ndarray
    padded: int
    unique: int
    notices: list[str]

    @property
    def prompts_cut(self) -> int:
        """How many prompts lose their beginning."""
        return int((self.kept_prompt_lengths < self.prompt_lengths).sum())

    @property
    def completions_cut(self) -> int:
        """How many completions lose their end."""
        return int((self.kept_lengths < self.lengths).sum())

    @property
    def lost(self) -> float:
        """The share of all tokens that is cut, each prompt's counted once."""
        total = self.prompt_lengths.sum() + self.lengths.sum()
        return float(1 - (self.kept_prompt_lengths.sum() + self.kept_lengths.sum()) / total)


@dataclass(frozen=True)
class Inspection:
    """All that is known of a split.

    Args:
        options: what was asked for.
        report: what reading it left out.
        counts: (B,) K of each prompt.
        rewards, lengths: (ΣK,) of the completions; lengths in `unit`.
        repeated_prompts: rows whose prompt an earlier row has.
        unfinished: completions that `nca-align sample` cut; None where the data does not say.
        objectives: the several rewards that `rewards` are the sum of; none where there is one.
        correlation: of rewards and lengths within prompts.
        rank_lengths: mean length by rank, of the commonest K.
        alphas: the α table, with the α that was asked for and the one that is suggested; empty of labels.
        suggested: None where no α makes a difference.
        target: the effective number that the suggestion comes to.
    """

    options: InspectOptions
    report: DataReport | None
    counts: np.ndarray
    rewards: np.ndarray
    lengths: np.ndarray
    unit: str
    repeated_prompts: int
    unfinished: int | None
    duplicates: stats.Duplicates
    pairs: stats.Pairs
    objectives: list[Objective]
    correlation: float | None
    rank_lengths: list[float]
    alphas: list[stats.AlphaRow]
    suggested: float | None
    target: float
    tokens: Tokens | None

    @property
    def at_given_alpha(self) -> stats.AlphaRow | None:
        """What the α that was asked for makes of the rewards; None of labels."""
        return next((row for row in self.alphas if row.alpha == self.options.alpha), None)


def inspect(dataset: Dataset, options: InspectOptions, tokenizer=None, report: DataReport | None = None) -> Inspection:
    """Measure rows `prompt, completions, rewards`.

    Raises:
        ValueError: `target_effective` is out of reach, or a row can't be tokenised.
    """
    prompts: list[int] = []  # hashes: whether texts are equal is all that is asked
    completions: list[int] = []
    characters: list[int] = []
    rewards: list[float] = []
    counts: list[int] = []
    for batch in dataset.select_columns(["prompt", "completions", "rewards"]).iter(1000):
        prompts += [hash(repr(prompt)) for prompt in batch["prompt"]]
        for row in batch["completions"]:
            counts.append(len(row))
            completions += [hash(repr(completion)) for completion in row]
            characters += [len(text_of(completion)) for completion in row]
        rewards += [reward for row in batch["rewards"] for reward in row]
    k = np.array(counts)
    r = stats.as_training_sees(np.array(rewards, dtype=float), k)
    tokens = None if tokenizer is None else count_tokens(dataset, tokenizer, options)
    lengths = np.array(characters) if tokens is None else tokens.written

    weights = options.reward_weights if isinstance(options.reward_weights, list) else options.weights
    low, high = stats.effective_range(r, k)
    target = (low + high) / 2 if options.target_effective is None else options.target_effective
    suggested, wanted = None, set[float]()
    if options.alpha is not None:
        suggested = None if low == high and options.target_effective is None else stats.suggest_alpha(r, k, target)
        wanted = {options.alpha, *([suggested] if suggested else []), *stats.alpha_grid(r, k)}
    return Inspection(
        options=options, report=report, counts=k, rewards=r, lengths=lengths,
        unit="characters" if tokens is None else "tokens", repeated_prompts=stats.repeated(prompts),
        unfinished=_count_truncated(dataset), duplicates=stats.find_duplicates(completions, r, k),
        pairs=stats.compare_pairs(r, lengths, k),
        objectives=compare_objectives(read_objectives(dataset), weights, r, lengths, k),
        correlation=stats.within_correlation(r, lengths, k),
        rank_lengths=stats.lengths_by_rank(r, lengths, k), alphas=stats.alpha_table(r, k, sorted(wanted)),
        suggested=suggested, target=target, tokens=tokens,
    )  # fmt: skip


def _count_truncated(dataset: Dataset) -> int | None:
    if dataset.features.get("truncated") != List(Value("bool")):
        return None
    return sum(sum(row or []) for row in dataset["truncated"])


def trained_rows(dataset: Dataset, tokenizer, options: InspectOptions) -> Dataset:
    """The rows that training doesn't drop as they become tokens."""
    return rows_that_become_tokens(
        dataset, tokenizer, max_prompt_length=options.max_prompt_length, max_length=options.max_length,
        num_proc=options.dataset_num_proc, name=options.dataset_train_split, on_invalid=options.on_invalid,
    )  # fmt: skip


def count_tokens(dataset: Dataset, tokenizer, options: InspectOptions) -> Tokens:
    """Tokenise as training does, and count what it would cut, pad and share."""
    dataset, notices = tokenize_dataset(
        dataset, tokenizer, None, None, num_proc=options.dataset_num_proc, name=options.dataset_train_split
    )
    pack = RewardCollator(pad_token_id=0, layout="prefix_shared")
    prompt_lengths: list[tuple[int, int]] = []  # whole and kept
    lengths: list[tuple[int, int, int]] = []  # whole, kept and written
    padded = unique = untrained = 0
    columns = ("prompt_ids", "completion_ids", "completion_mask")
    rows = dataset.select_columns([column for column in columns if column in dataset.column_names])
    for row in progress.bar(len(rows), "row", iterable=rows, desc="Counting tokens", leave=False):
        prompt, completions = row["prompt_ids"], row["completion_ids"]
        kept, short = truncate(prompt, completions, options.max_prompt_length, options.max_length)
        prompt_lengths.append((len(prompt), len(kept)))
        masks = masks_of(row)
        lengths += zip(map(len, completions), map(len, short), map(sum, masks), strict=True)
        untrained += sum(not any(mask[: len(own)]) for mask, own in zip(masks, short, strict=True))
        padded += len(short) * (len(kept) + max(map(len, short)) - 1)  # a last token is a target only, and no position
        (chunk,) = pack.chunks([{"prompt_ids": kept, "completion_ids": short}])
        unique += chunk["input_ids"].numel()
    if untrained:
        notices.append(
            f"`max_length` {options.max_length} leaves only context of {untrained} completions, such as a tool's "
            "result: training refuses their rows, or drops them with `on_invalid: drop`."
        )
    (p, kept_p), (n, kept_n, written) = np.array(prompt_lengths).T, np.array(lengths).T
    return Tokens(p, n, written, kept_p, kept_n, padded, unique, notices)
