"""Names of splits, and a held-out one where the data has none."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from ..errors import UserError

_TRAINING = ("train", "train_prefs")
_HELD_OUT = ("validation", "validation_prefs", "test", "test_prefs", "eval", "dev")


def split_validation(dataset: Dataset, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset | None, list[int]]:
    """Hold out a share of the prompts, always the same ones, and never a prompt that training sees.

    A prompt's place is a hash of `seed` and its text, so that neither the rows' order nor the machine matters, and
    rows that are added later hardly move the others.

    Args:
        dataset: rows with a `prompt`; rows of an equal prompt go to the same side.
        fraction: share of the different prompts in [0, 1); ⌊fraction · prompts⌋ are held out.
        seed: another seed holds out others.

    Returns:
        `train`, `validation` (None where no whole prompt comes to it), and the rows of `dataset`, from 0, that are
        held out.

    Raises:
        ValueError: `fraction` is outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UserError(f"`fraction` is {fraction}; it must be at least 0 and less than 1")
    places = np.fromiter(
        (
            _place(prompt, seed)
            for batch in dataset.with_format(None).select_columns("prompt").iter(1000)
            for prompt in batch["prompt"]
        ),
        np.uint64,
        count=len(dataset),
    )
    prompts = np.unique(places)
    count = int(fraction * len(prompts))
    if not count:
        return dataset, None, []
    held_out = places < prompts[count]
    indices = np.flatnonzero(held_out)
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(indices), indices.tolist()


def _place(prompt: Any, seed: int) -> int:
    text = json.dumps([seed, prompt], sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode("ascii"), digest_size=8).digest(), "big")


def is_training(name: str) -> bool:
    """Whether a split of this name is one to train on."""
    return name in _TRAINING


def is_held_out(name: str) -> bool:
    """Whether a split of this name is one to evaluate on."""
    return name in _HELD_OUT


def training_split(names: list[str], given: str | None = None) -> str | None:
    """The split that is trained on: the one `given`, or one called so, or the only one; None where none of it says.

    Raises:
        ValueError: there is none of the name `given`.
    """
    if given is not None:
        return find_split(names, given)
    return next(filter(is_training, names), names[0] if len(names) == 1 else None)


def find_split(names: Mapping[str, Any] | list[str], name: str) -> str:
    """The split called `name`, or else the only one that has the same purpose (`train` for `train_prefs`, and so on).

    Raises:
        ValueError: there is none; lists those that there are.
    """
    if name in names:
        return name
    for family in (_TRAINING, _HELD_OUT):
        present = [other for other in family if other in names]
        if name in family and len(present) == 1:
            return present[0]
    more = ", or hold more rows out by `validation_fraction`" if name in _HELD_OUT else ""
    raise UserError(f"the split `{name}` is not in the data set, which has {', '.join(names)}; name one of these{more}")


def held_out_split(names: Mapping[str, Any] | list[str]) -> str:
    """The split to evaluate on: the held-out one, or the only one that there is.

    Raises:
        ValueError: there are several, and none or more than one of them is held out.
    """
    if len(names) == 1:
        return next(iter(names))
    try:
        return find_split(names, "test")
    except ValueError:
        held_out = [name for name in names if name in _HELD_OUT]
        which = f"{' and '.join(held_out)} are held out" if held_out else "none is known to be held out"
        raise UserError(
            f"the data set has the splits {', '.join(names)}, of which {which}; choose one by `split`"
        ) from None


def select_split(dataset: Mapping[str, Any], name: str) -> Any:
    """The split of a `DatasetDict` that `find_split` finds."""
    return dataset[find_split(dataset, name)]
