"""Rows for `sample` and `score`: prompts out of any format that training reads, or out of a text file."""

import re
from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features, Json, List

from ..errors import UserError
from .columns import map_columns
from .conversion import convert_dataset
from .files import open_plain, refuse_other_text, refuse_utf16, suffix_of
from .formats import FORMATS
from .message_columns import with_plain_messages
from .messages import content_kind
from .options import DataOptions
from .source import open_dataset
from .splits import held_out_split, select_split
from .validation import read_conversation

# Columns that answer the prompt: `sample` makes new answers, so these don't go along.
_ANSWERS = re.compile("|".join(["completions|rewards|truncated|score_.*", *(fmt.answers for fmt in FORMATS.values())]))

_ANY_NUMBER = DataOptions(min_completions=1)  # of completions


def load_raw(name: str, config: str | None = None, split: str = "train", columns: Sequence[str] = ()) -> Dataset:
    """The rows as they stand, of a text file (one prompt a line) or of anything that training reads.

    `columns` is the option of this name; so of the functions below.

    Raises:
        UserError: a text file that can't be read, or no rows.
        ValueError, OSError: what `nca_align.data` says of other sources.
    """
    if suffix_of(name) == ".txt":
        try:
            refuse_utf16(name)
            refuse_other_text(name)
            with open_plain(name) as file:
                lines = [line.strip() for line in file.read().decode("utf-8-sig").split("\n")]
        except OSError as error:
            raise UserError(f"`dataset_name` {name} can't be read: {error.strerror}") from error
        dataset = Dataset.from_dict({"prompt": [line for line in lines if line]})
    else:
        splits, _ = open_dataset(name, config, streaming=False, drop=False)
        dataset = select_split(splits, split)
    if len(dataset) == 0:
        raise UserError(f"`dataset_name` {name} has no rows; it must have at least one prompt")
    return with_plain_messages(map_columns(dataset, columns, split), split)  # type: ignore[return-value]


def held_out_split_name(name: str, config: str | None) -> str:
    """The split of `name` that isn't trained on; the only one where there is one alone.

    Raises:
        ValueError, OSError: no such split, or several; what `nca_align.data` says of the source.
    """
    if suffix_of(name) == ".txt":
        return "train"  # as a file of any other kind is called
    splits, _ = open_dataset(name, config, streaming=False, drop=False)
    return held_out_split(splits)


def load_prompts(name: str, config: str | None, split: str, columns: Sequence[str] = ()) -> Dataset:
    """Rows with a `prompt` (text or messages) and any columns beside it that don't answer it."""
    dataset = load_raw(name, config, split, columns)
    if "prompt" not in dataset.column_names or {"response", "chosen"} & set(dataset.column_names):
        # it finds the prompt, and puts rows together that share one
        dataset = convert_dataset(dataset, _ANY_NUMBER, name=split, source=name)[0]
    dataset = dataset.remove_columns([name for name in dataset.column_names if _ANSWERS.fullmatch(name)])
    for i, prompt in enumerate(dataset["prompt"]):
        if not prompt or not isinstance(prompt, (str, list)) or content_kind(prompt) == "token ids":
            raise UserError(f"row {i}: `prompt` is {prompt!r}; it must be text or a list of messages, and not empty")
    if isinstance(first := dataset[0]["prompt"], str) and isinstance(read_conversation(first, "prompt"), list):
        features = Features({**dataset.features, "prompt": List(Json())})  # a CSV holds messages as text
        dataset = dataset.map(_read_prompt, features=features, desc="Reading prompts")
    return dataset


def _read_prompt(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": read_conversation(row["prompt"], "prompt")}


def load_completions(name: str, config: str | None, split: str, columns: Sequence[str] = ()) -> Dataset:
    """Rows with `prompt` and `completions`, rewarded already or not."""
    dataset = load_raw(name, config, split, columns)
    own = {"prompt", "completions"} <= set(dataset.column_names)
    if not own or isinstance(dataset[0]["completions"], str):  # a CSV holds lists as text
        dataset = convert_dataset(dataset, _ANY_NUMBER, name=split, source=name)[0]
    for i, completions in enumerate(dataset["completions"]):
        if not isinstance(completions, list) or not completions:
            raise UserError(f"row {i}: `completions` is {completions!r}; it must be a list of at least one")
        if content_kind(completions[0]) == "token ids":
            raise UserError(f"row {i}: `completions` are token ids, which can't be read here; give them as text")
    return dataset
