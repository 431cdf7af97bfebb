"""A data set's columns of messages, by whatever names those have, as {role, content}: before formats are matched."""

import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Json, LargeList, List, Value

from .columns import code_revision
from .messages import FUNCTION_CALL, ROLES, plain_completions, plain_conversation

_COLUMNS = re.compile(r"prompt|completions?|response|chosen|rejected|trajectory|A\d+")
_ANSWERS = ({"completions"}, {"completion"}, {"response"}, {"chosen", "rejected"})
_TEXTS = (Value("string"), Value("large_string"))
_OTHER = rf'"from" ?:|"role": ?"({"|".join(ROLES)})"|"content": ?\[|"{FUNCTION_CALL}":'  # in messages as JSON text


def with_plain_messages(
    dataset: Dataset | IterableDataset, name: str, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """`dataset` with its conversations as `plain_conversation` has them; itself where they are so already.

    `conversations`, ShareGPT's column, becomes `prompt` where answers stand beside it, after the text of a column
    `system`, which LLaMA-Factory's data have.

    Args:
        dataset: one split, or a stream.
        name: of the split, for the progress bar.
        num_proc: processes to map with.
    """
    features = dataset.features
    columns = set(next(iter(dataset), {})) if features is None else set(features)
    system = False
    if "conversations" in columns and "prompt" not in columns and any(answers <= columns for answers in _ANSWERS):
        dataset = dataset.rename_column("conversations", "prompt")
        columns = columns - {"conversations"} | {"prompt"}
        features, system = dataset.features, "system" in columns
    found = [column for column in sorted(columns) if _COLUMNS.fullmatch(column)]
    if features is not None:
        own = {"prompt"} if system else set()
        found = [column for column in found if column in own or _may_differ(dataset, features, column)]
        features = Features(dict(features) | {column: _plain_type(features[column], column) for column in found})
    if not found:
        return dataset
    arguments: dict[str, Any] = {"num_proc": num_proc, "desc": f"Reading the messages of {name}"}
    return dataset.map(
        _plain_columns,
        batched=True,
        features=features,
        fn_kwargs={"columns": found, "revision": code_revision(), "system": system},
        **(arguments if isinstance(dataset, Dataset) else {}),
    )


def _plain_columns(batch: Mapping[str, list], columns: list[str], revision: str, system: bool) -> dict[str, list]:
    made = {
        column: list(map(plain_completions if column == "completions" else plain_conversation, batch[column]))
        for column in columns
    }
    if system:
        made["prompt"] = list(map(_after_system, batch["system"], made["prompt"]))
    return made


def _after_system(text: Any, prompt: Any) -> Any:
    if not text or not isinstance(prompt, list):
        return prompt
    return [{"role": "system", "content": text}, *prompt]


def _message_type(feature: Any) -> tuple[Any, int]:
    """What the lists of a column hold, and how deep they are."""
    depth = 0
    while isinstance(feature, (List, LargeList)):
        feature, depth = feature.feature, depth + 1
    return feature, depth


def _depth(column: str) -> int:
    return 2 if column == "completions" else 1


def _may_differ(dataset: Dataset | IterableDataset, features: Features, column: str) -> bool:
    """Whether a column has messages in another form, by its type, and where that does not tell by what is in it."""
    message, depth = _message_type(features[column])
    if isinstance(message, dict):
        if {"from", "value"} <= message.keys():
            return True
        if not {"role", "content"} <= message.keys():
            return False
        if depth != _depth(column) or message["content"] not in _TEXTS or FUNCTION_CALL in message:
            return True
    elif not isinstance(message, Json):
        return False
    if isinstance(dataset, IterableDataset):
        return True
    for batch in dataset.select_columns([column]).with_format("arrow").iter(10_000):
        if _holds_other(batch[column], column == "completions"):
            return True
    return False


def _holds_other(array: Any, completions: bool) -> bool:
    """Whether messages, objects or JSON text, have another form."""
    while pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        array = pc.list_flatten(array)
    if pa.types.is_struct(array.type):
        roles = pc.struct_field(array, "role")
        return bool(pc.any(pc.is_in(roles, pa.array(ROLES, roles.type))).as_py())
    pattern = _OTHER + (r"|^\{" if completions else "")
    texts = pa.chunked_array([chunk.storage for chunk in getattr(array, "chunks", [array])], pa.string())
    return bool(pc.any(pc.match_substring_regex(texts, pattern)).as_py())


def _plain_type(feature: Any, column: str) -> Any:
    """The type of a column once its messages are plain."""
    message, depth = _message_type(feature)
    if isinstance(message, Json):  # which takes any of them
        return feature
    if message.get("content", message.get("value")) in _TEXTS and FUNCTION_CALL not in message:
        others = {key: kind for key, kind in message.items() if key not in ("role", "content", "from", "value")}
        message = {"role": Value("string"), "content": Value("string"), **others}
    else:
        message = Json()  # calls may differ, and parts that are no text are refused by their names
    for _ in range(max(depth, _depth(column))):
        message = List(message)
    return message
