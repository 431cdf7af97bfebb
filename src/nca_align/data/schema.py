"""What a format is, the columns of converted rows, and what became of each row: counts by cause."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, Json, LargeList, List, Value

from ..errors import UserError
from .options import DataOptions
from .validation import DROP, Row

REWARD_COLUMNS = ("prompt", "completions", "rewards")
PROMPT_COLUMNS = ("tools", "chat_template_kwargs")  # belong to the prompt: rows that differ in them are other prompts
NONE = r"(?!)"  # a pattern that matches nothing
Convert = Callable[[dict[str, Any], DataOptions], Row]
_MESSAGE = {"role": Value("string"), "content": Value("string")}
# Columns beside each row while it is converted, so that a cached conversion still knows what it met. They say what is
# wrong with an invalid row, why a row is dropped, what happened to its completions, and which rewards it lacks.
NOTES = Features({
    "_problem": Value("string"), "_cause": Value("string"), "_notes": List(Value("string")),
    "_gaps": List(Value("string")),
})  # fmt: skip
FIX = f"mend the row, or {DROP}"


@dataclass(frozen=True)
class Format:
    """One way that public data sets are laid out.

    Args:
        name: what reports call it.
        needs: the columns that tell it, as an error lists them.
        convert: from a row as a dict to a `Row`; raises `RowError`.
        prompts, answers: patterns of the columns that the prompt and its answers are read from. The result replaces
            them and keeps all others; `sample`, which makes new answers, leaves the answers out.
        conversations: a pattern of the columns whose messages the result takes over, with all their fields.
        scores: the names that `score` and a weight of `reward_weights` may have, from a few rows; None where there is
            no choice.
        objectives: those that a list of weights is for, in the data's order.
        settle: the options with what a few rows decide.
        grouped: True where a row is one completion, and the rows of a prompt are put together first.
        matches: whether a few rows are of this format; None where they are so with all columns that it needs.
    """

    name: str
    needs: str
    convert: Convert
    prompts: str = NONE
    answers: str = NONE
    conversations: str = NONE
    scores: Callable[[list[dict[str, Any]]], set[str]] | None = None
    objectives: Callable[[list[dict[str, Any]]], list[str]] | None = None
    settle: Callable[[list[dict[str, Any]], DataOptions], DataOptions] = lambda rows, options: options
    grouped: bool = False
    matches: Callable[[list[dict[str, Any]], DataOptions], bool] | None = None


def data_format(name: str, needs: str, **more: Any) -> Callable[[Convert], Format]:
    """Decorate a converter: it becomes the `Format` with these fields."""
    return partial(Format, name, needs, **more)


def is_replaced(column: str, fmt: Format) -> bool:
    """Whether a source column gives way to the result's."""
    return re.fullmatch(f"{fmt.prompts}|{fmt.answers}", column) is not None


def result_features(source: Features, fmt: Format, kind: str, objectives: Iterable[str] = ()) -> Features:
    """The types of the result: kept columns as they are, messages with the fields that the source's have.

    Args:
        source: the types of the data.
        fmt: its format.
        kind: of the prompts, see `messages.content_kind`.
        objectives: columns of K numbers that join them, or take the place of others.
    """
    kept = {
        name: feature for name, feature in source.items() if not is_replaced(name, fmt) and name not in REWARD_COLUMNS
    }
    for name, feature in kept.items():
        if name in PROMPT_COLUMNS:
            kept[name] = Json() if _is_text(feature) else feature
        elif fmt.grouped:
            kept[name] = List(feature)
    kept |= dict.fromkeys(objectives, List(Value("float64")))
    text = {"text": Value("string"), "token ids": List(Value("int64"))}.get(kind) or List(_message(source, fmt))
    return Features(kept | {"prompt": text, "completions": List(text), "rewards": List(Value("float64"))})


def _message(source: Features, fmt: Format) -> Any:
    """The one type of the source's messages; JSON, which takes any fields, where they differ or stand in text."""
    found = []
    for name, feature in source.items():
        if re.fullmatch(fmt.conversations, name):
            text = _is_text(feature) and name != "prompt" and not fmt.grouped
            while _is_list(feature):
                feature = feature.feature
            feature = Json() if text else feature
            if isinstance(feature, (dict, Json)) and feature not in found:
                found.append(feature)
    return found[0] if len(found) == 1 else Json() if found else _MESSAGE


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _is_list(feature: Any) -> bool:
    return isinstance(feature, (List, LargeList))


@dataclass(frozen=True)
class DataReport:
    """What became of one split; nothing is left out that isn't counted here.

    Args:
        name: of the split.
        format: the name of the recognised format.
        rows: prompts before anything was dropped.
        kept: prompts after it.
        dropped: prompts by cause.
        completions: completions of the kept prompts that were left out or repaired, by cause.
        gaps: kept prompts that one of several rewards is left out of, by its name.
    """

    name: str
    format: str
    rows: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    completions: dict[str, int] = field(default_factory=dict)
    gaps: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"`{self.name}` ({self.format}): {self.kept} of {self.rows} prompts kept"
        if self.dropped:
            text += f"; dropped: {show_counts(self.dropped)}"
        if self.completions:
            text += f"; single completions left out or repaired: {show_counts(self.completions)}"
        if self.gaps:
            text += f"; prompts with a reward left out: {show_counts(self.gaps)}"
        return text


def show_counts(counts: Mapping[str, int]) -> str:
    """`3 missing score, 1 empty completion`, the most frequent first."""
    return ", ".join(f"{n} {cause}" for cause, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def read_notes(converted: Dataset, options: DataOptions, fmt: str, name: str) -> tuple[np.ndarray, DataReport]:
    """The rows to keep, and the report, from the columns of `NOTES`.

    Raises:
        ValueError: a row is invalid and `on_invalid` is `raise`, or no row is left.
    """
    dropped: Counter[str] = Counter()
    completions: Counter[str] = Counter()
    gaps: Counter[str] = Counter()
    keep, problems, first = [], 0, ""
    for batch in converted.select_columns(list(NOTES)).with_format("arrow").iter(100_000):
        sound = pc.is_null(batch["_cause"])
        keep.append(sound.to_numpy())
        dropped.update(_tally(batch["_cause"]))
        completions.update(_tally(pc.list_flatten(batch["_notes"].filter(sound))))
        gaps.update(_tally(pc.list_flatten(batch["_gaps"].filter(sound))))
        found = batch["_problem"].drop_null()
        problems += len(found)
        first = first or (found[0].as_py() if len(found) else "")
    if first and options.on_invalid == "raise":
        more = f" ({problems - 1} more rows are invalid)" if problems > 1 else ""
        raise UserError(f"`{name}`, {first}{more}; {FIX}")
    indices = np.flatnonzero(np.concatenate(keep))
    report = DataReport(name, fmt, len(converted), len(indices), dict(dropped), dict(completions), dict(gaps))
    if not len(indices):
        raise UserError(f"{report}; at least one must be left" + (f" ({first})" if first else ""))
    return indices, report


def _tally(values: Any) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in pc.value_counts(values.drop_null()).to_pylist()}
