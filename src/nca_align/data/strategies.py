"""What a method is given of each prompt's K rewarded completions: all, some, or preference pairs; TRL's own formats."""

import random
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from datasets import Dataset, concatenate_datasets

from ..errors import UserError, UserTypeError
from .formats.pairs import HARD_REWARDS
from .loading import with_template_arguments
from .messages import content_kind, has_context
from .schema import PROMPT_COLUMNS, REWARD_COLUMNS
from .token_ids import MASK

PAIRS = ("best_random", "best_worst", "best_each", "all_pairs")
STRATEGIES = ("rewards", "first_N", "best_plus_N", *PAIRS)
_COUNTED = re.compile(r"(first|best_plus)_([1-9]\d*)")


def check_strategy(name: str) -> str:
    """`name`, if it is one of `STRATEGIES`.

    Raises:
        ValueError: it is none.
    """
    counted = _COUNTED.fullmatch(name) if isinstance(name, str) else None
    if name in ("rewards", *PAIRS) or counted:
        return name
    raise UserError(
        f"`strategy` is {name!r}; it must be one of {', '.join(STRATEGIES)}, with a number for N: first_2, best_plus_1"
    )


def select_indices(rewards: Sequence[float], strategy: str, draw: random.Random) -> list[list[int]]:
    """The rows that one prompt's completions become, each a list of their places.

    - `rewards`: one row of all K. `first_N`: one row of the first N. `best_plus_N`: one row of the best and N others,
      drawn at random ("best plus n suboptimal", Figure 4 of the paper).
    - `best_worst`, `best_random`: one pair of the best with the worst, or with a worse one drawn at random;
      `best_each`: the best with each worse one; `all_pairs`: every pair of unequal rewards. The better one is first; a
      tie makes no pair, and of several best completions the first is taken.

    Args:
        rewards: K numbers.
        strategy: a name that `check_strategy` lets through.
        draw: what random strategies draw from.

    Returns:
        No row where too few completions, or none with unequal rewards, are there.

    Source: arXiv 2402.05369, the comparison of reward and preference data and Figure 4.
    """
    places = range(len(rewards))
    best = max(places, key=lambda i: rewards[i])
    worse = [i for i in places if rewards[i] < rewards[best]]
    if strategy == "rewards":
        return [list(places)]
    if counted := _COUNTED.fullmatch(strategy):
        count = int(counted[2])
        if counted[1] == "first":
            return [list(places[:count])] if count <= len(rewards) else []
        others = [i for i in places if i != best]
        return [[best, *sorted(draw.sample(others, count))]] if count <= len(others) else []
    if strategy == "all_pairs":
        return [[i, j] for i in places for j in places if rewards[i] > rewards[j]]
    if not worse or strategy == "best_each":
        return [[best, i] for i in worse]
    other = draw.choice(worse) if strategy == "best_random" else min(worse, key=lambda i: rewards[i])
    return [[best, other]]


def select_completions(dataset: Dataset, strategy: str, seed: int = 42) -> Dataset:
    """Reward rows of what `strategy` takes; preference pairs are K = 2 with rewards 1 and 0.

    Args:
        dataset: `prompt, completions, rewards`, and `tools`, `chat_template_kwargs` if any, which are kept. Of rows of
            token ids `completion_mask` is, too.
        strategy: one of `STRATEGIES`.
        seed: of the random ones; each row draws from it and its own number, whatever the others are.

    Returns:
        `prompt, completions, rewards`: of `best_each` and `all_pairs` several rows a prompt.

    Raises:
        ValueError: another strategy, or one by which no row is left.
    """
    if check_strategy(strategy) == "rewards":
        masks = [MASK] if MASK in dataset.column_names else []
        return dataset.select_columns([*REWARD_COLUMNS, *masks, *_prompt_columns(dataset)])

    def select(row: dict[str, Any], places: list[int]) -> dict[str, Any]:
        rewards = list(HARD_REWARDS) if strategy in PAIRS else [row["rewards"][i] for i in places]
        taken = {"prompt": row["prompt"], "completions": [row["completions"][i] for i in places], "rewards": rewards}
        if MASK in row:  # null where the model wrote all
            taken[MASK] = [row[MASK][i] if row[MASK] else [1] * len(row["completions"][i]) for i in places]
        return taken

    return _make_rows(dataset, strategy, seed, select)


def to_preference_pairs(dataset: Dataset, strategy: str = "best_worst", seed: int = 42) -> Dataset:
    """Preference pairs as TRL's DPOTrainer takes them, from K rewarded completions a prompt.

    Args:
        dataset: as of `select_completions`.
        strategy: best_worst, best_random, best_each or all_pairs, as in `select_indices`.
        seed: of best_random.

    Returns:
        `prompt, chosen, rejected`, in the prompt's own format (text or messages), `score_chosen` and `score_rejected`.
        A prompt whose rewards are all equal makes no pair.

    Raises:
        ValueError: another strategy, no pair at all, or a completion of which the model didn't write all.

    Example:
        >>> rows = Dataset.from_dict({"prompt": ["2 + 2 ="], "completions": [[" 4", " 5"]], "rewards": [[1.0, 0.0]]})
        >>> to_preference_pairs(rows)[0]["chosen"]
        ' 4'
    """
    if strategy not in PAIRS:
        raise UserError(f"`strategy` is {strategy!r}; a preference pair comes from one of {', '.join(PAIRS)}")
    refuse_masked(dataset)

    def pair(row: dict[str, Any], places: list[int]) -> dict[str, Any]:
        (chosen, rejected), (high, low) = ([row[name][i] for i in places] for name in ("completions", "rewards"))
        return {
            "prompt": row["prompt"], "chosen": chosen, "rejected": rejected,
            "score_chosen": float(high), "score_rejected": float(low),
        }  # fmt: skip

    return _make_rows(dataset, strategy, seed, pair)


def to_unpaired(dataset: Dataset, threshold: float | None = None) -> Dataset:
    """Desirable and undesirable completions as TRL's KTOTrainer takes them.

    Args:
        dataset: as of `select_completions`.
        threshold: the reward above which a completion is desirable, below which it is not; None for the mean of its
            prompt's rewards. One whose reward equals it is left out.

    Returns:
        `prompt, completion, label`, a row a completion.

    Raises:
        ValueError: no completion is left, or the model didn't write all of one.

    Example:
        >>> rows = Dataset.from_dict({"prompt": ["2 + 2 ="], "completions": [[" 4", " 5"]], "rewards": [[1.0, 0.0]]})
        >>> to_unpaired(rows)["label"][:]
        [True, False]
    """
    refuse_masked(dataset)

    def border(rewards: list[float]) -> float:
        return sum(rewards) / len(rewards) if threshold is None else threshold

    def label(row: dict[str, Any], places: list[int]) -> dict[str, Any]:
        (i,) = places
        desirable = row["rewards"][i] > border(row["rewards"])
        return {"prompt": row["prompt"], "completion": row["completions"][i], "label": desirable}

    def each(rewards: list[float], strategy: str, draw: random.Random) -> list[list[int]]:
        return [[i] for i, reward in enumerate(rewards) if reward != border(rewards)]

    return _make_rows(dataset, "unpaired", 0, label, each)


def _make_rows(dataset: Dataset, strategy: str, seed: int, make, pick=select_indices) -> Dataset:
    if not isinstance(dataset, Dataset):
        raise UserTypeError(f"`dataset` is a {type(dataset).__name__}, but must be a Dataset: give one split")
    function = partial(_make_batch, strategy=strategy, seed=seed, make=make, pick=pick)
    made = dataset.map(
        function, batched=True, with_indices=True, remove_columns=dataset.column_names, load_from_cache_file=False,
        desc=f"Taking {strategy}",
    )  # fmt: skip
    if not len(made):
        raise UserError(f"`strategy` {strategy} leaves no row: every prompt has too few completions, or equal rewards")
    numbers, made = made["row"], made.remove_columns("row")
    if not _prompt_columns(dataset):
        return made
    shared = dataset.select(numbers).select_columns(_prompt_columns(dataset))
    if "chat_template_kwargs" in shared.column_names:
        shared = with_template_arguments(shared, {})  # TRL takes an empty mapping, but no None
    return concatenate_datasets([made, shared], axis=1)


def refuse_masked(dataset: Any) -> None:
    """Refuse rows that TRL's trainers can't take as they are: token ids, and what the model didn't write all of.

    They tokenise by themselves, and make the masks of completions by their lengths, so that no row can hold one.

    Raises:
        UserError: it names the first row.
    """
    row = next(iter(dataset), None) if isinstance(dataset, Dataset) else None
    if row is None or content_kind(row["prompt"]) == "text":
        return
    if content_kind(row["prompt"]) == "token ids":
        raise UserError(
            "`dataset` holds token ids, but TRL's trainers read text; give its prompts and completions as text"
        )
    for i, completions in enumerate(dataset["completions"]):
        for k, completion in enumerate(completions):
            if has_context(completion):
                raise UserError(
                    f"row {i}: `completions[{k}]` is not one turn of the assistant. TRL's trainers train on all that "
                    "stands in it, such as a tool's result. Leave such rows out, or train by NCATrainer, which takes "
                    "that as context."
                )


def _prompt_columns(dataset: Dataset) -> list[str]:
    """What a prompt is rendered with beside its messages."""
    return [name for name in PROMPT_COLUMNS if name in dataset.column_names]


def _make_batch(batch: dict[str, list], numbers: list[int], *, strategy: str, seed: int, make, pick) -> dict[str, list]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    made = [
        make(row, places) | {"row": number}
        for number, row in zip(numbers, rows, strict=True)
        for places in pick(row["rewards"], strategy, random.Random(f"{seed} {number}"))
    ]
    return {name: [row[name] for row in made] for name in (made[0] if made else {})}
