"""The types by which JSON is read, where those of Arrow would change what is written."""

from typing import Any

from datasets import Features, Json, LargeList, List, Value

from .messages import FUNCTION_CALL
from .token_ids import ID_COLUMNS

# What a chat template writes as it stands, where 1 is another text than 1.0
_WRITTEN = {"tools", "tool_calls", FUNCTION_CALL, "chat_template_kwargs"}


def as_texts(features: Features) -> Features:
    """The types of JSON's columns, which has no times: Arrow takes texts for them that are like "2026-01-31".

    Calls and tools with a fraction somewhere stay as written: for Arrow, 1 in one row is 1.0 beside 1.5 in another.
    """
    return _retyped(_as_written(features, ("float",)), "timestamp", "string")


def _as_written(feature: Any, kinds: tuple[str, ...], named: bool = False) -> Any:
    """A type with JSON for calls, tools and arguments of the template that hold numbers of these `kinds`."""
    if isinstance(feature, (List, LargeList)):
        return List(_as_written(feature.feature, kinds, named))
    if named and _holds(feature, kinds):
        return Json()
    if isinstance(feature, dict):
        return type(feature)({key: _as_written(own, kinds, key in _WRITTEN) for key, own in feature.items()})
    return feature


def _holds(feature: Any, kinds: tuple[str, ...]) -> bool:
    if isinstance(feature, dict):
        return any(_holds(own, kinds) for own in feature.values())
    if isinstance(feature, (List, LargeList)):
        return _holds(feature.feature, kinds)
    return isinstance(feature, Value) and feature.dtype.startswith(kinds)


def with_fractions(features: Features) -> Features:
    """The types with all whole numbers as fractions, but for token ids and their masks, and calls and tools."""
    features = _as_written(features, ("int", "float"))
    return Features(
        {name: own if _holds_ids(name, own) else _retyped(own, "int64", "float64") for name, own in features.items()}
    )


def _holds_ids(name: str, feature: Any) -> bool:
    while isinstance(feature, (List, LargeList)):
        feature = feature.feature
    return name in ID_COLUMNS and isinstance(feature, Value)


def _retyped(feature: Any, old: str, new: str) -> Any:
    """A type whose values of the type `old`, or those whose name begins so, are of the type `new`."""
    if isinstance(feature, dict):
        return type(feature)({name: _retyped(inner, old, new) for name, inner in feature.items()})
    if isinstance(feature, (List, LargeList)):
        return List(_retyped(feature.feature, old, new))
    return Value(new) if isinstance(feature, Value) and feature.dtype.startswith(old) else feature
