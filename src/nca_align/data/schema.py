"""The column types of converted rows."""

import re
from typing import Any

from datasets import Features, Json, LargeList, List, Value

from .flat import SHARED
from .formats import Format

RESULT = ("prompt", "completions", "rewards")
_MESSAGE = {"role": Value("string"), "content": Value("string")}


def is_replaced(column: str, fmt: Format) -> bool:
    """Whether a source column gives way to the result's."""
    return re.fullmatch(fmt.replaces, column) is not None


def result_features(source: Features, fmt: Format, chat: bool) -> Features:
    """The types of the result: kept columns as they are, messages with the fields that the source's have."""
    kept = {name: feature for name, feature in source.items() if not is_replaced(name, fmt) and name not in RESULT}
    for name, feature in kept.items():
        if name in SHARED:
            kept[name] = Json() if _is_text(feature) else feature
        elif fmt.grouped:
            kept[name] = List(feature)
    text = List(_message(source, fmt)) if chat else Value("string")
    return Features(kept | {"prompt": text, "completions": List(text), "rewards": List(Value("float64"))})


def is_final(features: Features, chat: bool) -> bool:
    """Whether rows in our own format have their final types, so that they need no rewriting."""
    prompt, completions, rewards = (features[name] for name in RESULT)
    if not (_is_list(completions) and _is_list(rewards)) or any(_is_text(features.get(name)) for name in SHARED):
        return False
    same = _is_list if chat else _is_text
    numbers = isinstance(rewards.feature, Value) and rewards.feature.dtype.startswith("float")
    return same(prompt) and same(completions.feature) and numbers


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
