"""What a row's messages hold, and what of it a chat template leaves out."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from ..data.cleaning import REASONING
from ..errors import InvalidRowError

THINK_TAG = re.compile(r"</?think(?:ing)?>")


def calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The calls of a message, as far as they are objects."""
    calls = message.get("tool_calls")
    return [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []


def function_of(call: dict[str, Any]) -> dict[str, Any]:
    """What holds the name and arguments of a call: its `function`, or itself."""
    function = call.get("function")
    return function if isinstance(function, dict) else call


def call_arguments(call: dict[str, Any]) -> Any:
    """The arguments of a message's call as an object, also where they are JSON text, as in OpenAI's protocol.

    Without any it is an empty one. What is no object stays as it is.
    """
    given: Any = function_of(call).get("arguments") or {}
    with suppress(TypeError, ValueError):
        parsed = json.loads(given)
        return parsed if isinstance(parsed, dict) else given
    return given


def refuse_left_out(messages: Sequence[dict[str, Any]], text: str, where: str, context: bool = False) -> None:
    """Refuse a text without a part of its messages: what is trained on is what stands in the row.

    Args:
        messages: of text.
        text: what the chat template makes of them.
        where: the messages, as the beginning of an error.
        context: look for calls and for the results of tools alone, since templates may leave out earlier reasoning.

    Raises:
        InvalidRowError: it names the turn and the field.
    """
    for j, message in enumerate(messages):
        if context:
            kept = ("content", "tool_calls") if message.get("role") == "tool" else ("tool_calls",)
            message = {name: message[name] for name in kept if name in message}
        parts: dict[str, list] = {name: [message[name]] for name in REASONING if isinstance(message.get(name), str)}
        if isinstance(message.get("content"), str):
            parts["content"] = THINK_TAG.split(message["content"])
        parts["tool_calls"] = [value for call in calls_of(message) for value in _call_values(call, text)]
        for name, values in parts.items():
            if not all(_stands_in(text, value) for value in values):
                _refuse(where, j, name)


def refuse_calls_left_out(
    messages: Sequence[dict[str, Any]], first: int, text: str, render: Callable[[list[dict[str, Any]]], str], where: str
) -> None:
    """Refuse a text that is the same without one of its calls, whose words may stand elsewhere in it.

    Args:
        messages: of text.
        first: the message to begin with; an error counts turns from it.
        text: what `render` makes of the messages.
        where: the messages from `first`, as the beginning of an error.

    Raises:
        InvalidRowError: it names the turn.
    """
    for j, message in enumerate(messages[first:], first):
        calls = calls_of(message)
        for i in range(len(calls)):
            own = {"content": ""} | message | {"tool_calls": calls[:i] + calls[i + 1 :]}
            if not own["tool_calls"]:
                del own["tool_calls"]
            without = None
            with suppress(InvalidRowError):  # a template that needs the call reads it
                without = render([*messages[:j], own, *messages[j + 1 :]])
            if without == text:
                _refuse(where, j - first, "tool_calls")


def _refuse(where: str, turn: int, name: str) -> NoReturn:
    raise InvalidRowError(
        f"{where} turn {turn} has `{name}`, which the chat template leaves out. The model would see other text than "
        "the row's. Use a template that keeps it, or take it out of the row",
        cause=f"{name} left out by the chat template",
    )


def _stands_in(text: str, value: str | float) -> bool:
    """Whether the text holds a value, as it is or as JSON or Python has it; a number not as a part of another."""
    if not isinstance(value, str):
        return re.search(rf"(?<![\d.]){re.escape(str(value))}(?!\.?\d)", text) is not None
    value = value.strip()
    escaped = (json.dumps(value, ensure_ascii=False), json.dumps(value), repr(value))
    return value in text or any(own[1:-1] in text for own in escaped)


def _call_values(call: dict[str, Any], text: str) -> Iterator[str | float]:
    """A call's name, and the names, the strings and the numbers of its arguments, unless `text` has their JSON text."""
    arguments = call_arguments(call)
    yield str(function_of(call).get("name", ""))
    given = function_of(call).get("arguments")
    if isinstance(given, str) and given.strip() in text:
        return
    if isinstance(arguments, dict):
        yield from map(str, arguments)
    yield from (leaf for leaf in _leaves(arguments) if not isinstance(leaf, (bool, type(None))))


def strings_in(value: Any) -> Iterator[str]:
    """Each text in a value of JSON, however deep, but for the names of an object."""
    return (leaf for leaf in _leaves(value) if isinstance(leaf, str))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value


def shared_length(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # by halves, since Python compares texts faster than characters
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
