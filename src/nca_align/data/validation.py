"""What a row is and must be, and how single values are read; every refusal names the field."""

import json
import math
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from ..errors import LABEL_FIX, InvalidRowError
from .messages import content_kind, other_part, plain_conversation

MISSING = "missing score"
DROP = "drop such rows with `--on_invalid drop` (in YAML `on_invalid: drop`)"
LARGEST = 1e30  # of a reward: training divides them by α in float32, which ends at 3.4e38
_KINDS = {"text": "text", "messages": "a list of messages", "token ids": "a list of token ids"}
_NO_NUMBER = {"", "n/a", "na", "none", "null"}
_TRUTH = {"true": 1.0, "false": 0.0}


@dataclass
class Row:
    """One prompt with its rewarded completions: the result of every converter.

    Args:
        prompt: text or messages.
        completions: K completions of the same kind.
        rewards: K floats.
        notes: a few words for each completion that was left out or repaired.
        gaps: the objectives of `reward_weights` that are left out, for all completions.
        extra: values that replace kept columns of the same name.
    """

    prompt: str | list
    completions: list
    rewards: list[float]
    notes: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


class RowError(InvalidRowError):
    """One row is invalid.

    Args:
        field: where in the row, such as `rewards[1]`.
        cause: a few words under which such rows are counted.
        detail: the value and what is required, a phrase that follows the field's name.

    `row` is the source row, from 0, where it is another than the one that is being converted.
    """

    row: int | None = None

    def __init__(self, field: str, cause: str, detail: str):
        super().__init__(f"`{field}` {detail}", cause=cause)
        self.field = field


def _show(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _wrong_type(field: str, value: Any, required: str) -> RowError:
    if value is None:
        return RowError(field, "missing value", f"is null; it must be {required}")
    return RowError(field, "wrong type", f"is {_show(value)} ({type(value).__name__}); it must be {required}")


def is_truth(value: Any) -> bool:
    """Whether it is True or False, or their text, as a CSV has them."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _TRUTH)


def read_number(value: Any, field: str) -> float | None:
    """`value` as a finite float, from a number or its text; None where it is missing (null, "N/A", empty).

    True is 1, and False 0.

    Raises:
        RowError: text that is no number, another type, NaN or infinity.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in _NO_NUMBER):
        return None
    if not isinstance(value, (int, float, str, Decimal)):
        raise _wrong_type(field, value, "a number")
    if isinstance(value, str) and is_truth(value):
        return _TRUTH[value.strip().lower()]
    try:
        number = float(value)
    except ValueError:
        raise RowError(field, "reward is no number", f"is {_show(value)}; it must be a number") from None
    if not math.isfinite(number):
        raise RowError(field, "reward not finite", f"is {number}; it must be a finite number")
    if abs(number) > LARGEST:
        raise RowError(
            field, "reward too large", f"is {number}; it must lie within ±{LARGEST}: divide all rewards by one number"
        )
    return number


def required_number(value: Any, field: str) -> float:
    """`read_number`, but a missing value is an error too."""
    number = read_number(value, field)
    if number is None:
        raise RowError(field, MISSING, f"is {_show(value)}, a missing score; every completion needs a number")
    return number


def is_absent(completion: Any, reward: Any) -> tuple[bool, bool]:
    """Whether a completion is null or an empty cell, and whether its reward is missing: null, NaN, empty or "N/A"."""
    no_text = completion is None or (isinstance(completion, str) and not completion.strip())
    no_number = reward is None or (isinstance(reward, str) and reward.strip().lower() in _NO_NUMBER)
    return no_text, no_number or (isinstance(reward, float) and math.isnan(reward))


def check_pair(completion: Any, reward: Any, k: int) -> None:
    """Refuse a completion without its reward, and a reward without its completion, by both names."""
    no_text, no_number = is_absent(completion, reward)
    if no_number and not no_text and not isinstance(reward, float):  # NaN is told as such
        said = f"is {_show(reward)}, a missing score; every completion needs a number, and `completions[{k}]` is there"
        raise RowError(f"rewards[{k}]", MISSING, said)
    if no_text and not no_number:
        said = (
            f"is {_show(completion)}, an empty completion; it must have content, as `rewards[{k}]` is {_show(reward)}"
        )
        raise RowError(f"completions[{k}]", "empty completion", said)


def optional_score(value: Any, field: str) -> float | None:
    """`read_number` for data sets that publish missing scores: NaN, the null of a table of floats, is missing too."""
    return None if isinstance(value, float) and math.isnan(value) else read_number(value, field)


def read_list(value: Any, field: str) -> list:
    """`value` as a list, from a list or from text that holds a JSON list (a CSV cell)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError(
                field,
                "unreadable JSON",
                f"is not readable JSON list ({error}); write Parquet, or lists by `json.dumps`",
            ) from None
    if not isinstance(value, list):
        raise _wrong_type(field, value, "a list")
    return value


def read_conversation(value: Any, field: str) -> str | list:
    """Text as it is, and a list of messages from a list or from text that holds it as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            return value  # text may begin with a bracket
        return plain_conversation(parsed) if parsed and isinstance(parsed[0], dict) else value
    if not isinstance(value, (str, list)):
        raise _wrong_type(field, value, "text or a list of messages")
    return value


def read_text(value: Any, field: str) -> str:
    """`value`, which must be text."""
    if not isinstance(value, str):
        raise _wrong_type(field, value, "text")
    return value


def user_message(value: Any, field: str) -> dict[str, str]:
    """A user's message from text."""
    return {"role": "user", "content": read_text(value, field)}


def assistant_message(value: Any, field: str) -> list[dict[str, str]]:
    """A completion of one assistant message from text, which must not be blank."""
    check_filled(read_text(value, field), field)
    return [{"role": "assistant", "content": value}]


def check_filled(value: str | list, field: str) -> None:
    """Refuse a completion without content: chat templates strip white space, and no token would be left to score."""
    if not (value.strip() if isinstance(value, str) else value):
        raise RowError(field, "empty completion", f"is {_show(value)}, an empty completion; it must have content")


def _check_messages(messages: list, field: str) -> None:
    for j, message in enumerate(messages):
        here = f"{field}[{j}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _wrong_type(here, message, "a message {role, content}")
        content = message.get("content")
        if isinstance(content, list) and (kind := other_part(content)) is not None:
            raise RowError(
                f"{here}.content",
                "part that is no text",
                f"holds a part of the type {kind!r}; only parts of the type 'text' can be trained on",
            )
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise _wrong_type(f"{here}.content", content, "text")


def _check_prompt(prompt: str | list) -> None:
    if not isinstance(prompt, (str, list)):
        raise _wrong_type("prompt", prompt, "text or a list of messages")
    if not (prompt.strip() if isinstance(prompt, str) else prompt):
        raise RowError("prompt", "empty prompt", f"is {_show(prompt)}; it must not be empty")
    if isinstance(prompt, list):
        (_check_ids if content_kind(prompt) == "token ids" else _check_messages)(prompt, "prompt")


def _check_ids(ids: list, field: str) -> None:
    for j, token in enumerate(ids):
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise RowError(f"{field}[{j}]", "no token id", f"is {_show(token)}; it must be a token id, from 0")


def _check_completion(completion: str | list, kind: str, field: str) -> None:
    if not isinstance(completion, (str, list)):
        raise _wrong_type(field, completion, _KINDS[kind])
    check_filled(completion, field)
    if (own := content_kind(completion)) != kind:
        raise RowError(
            field,
            "text and messages mixed",
            f"is {_KINDS[own]}, but the prompt is {_KINDS[kind]}; both must be of one kind",
        )
    if own == "token ids":
        _check_ids(list(completion), field)
    elif isinstance(completion, list):
        _check_messages(completion, field)
        for j, message in enumerate(completion):
            if message["role"] != "tool" and not message.get("tool_calls"):
                check_filled(message["content"], f"{field}[{j}].content")


def check_count(count: int, least: int, why: str = "") -> None:
    """Refuse a row that has fewer than `least` completions; `why` says how it came to that."""
    if count < least:
        number = {1: "one", 2: "two"}.get(least, str(least))
        alone = " to compare (`loss_type: outcome` trains on one, read with `min_completions: 1`)" if least == 2 else ""
        raise RowError(
            "completions",
            f"fewer than {number} completions",
            f"has {count}{why}; there must be at least {number}{alone}",
        )


def check_labels(rewards: list[float]) -> None:
    """Refuse rewards outside [0, 1]."""
    for k, reward in enumerate(rewards):
        if not 0 <= reward <= 1:
            raise RowError(
                f"rewards[{k}]",
                "no label from 0 to 1",
                f"is {reward:g}; `loss_type` outcome needs labels from 0 (wrong) to 1 (right): {LABEL_FIX}",
            )


def check_row(prompt: str | list, completions: list, rewards: list, least: int = 2) -> None:
    """Refuse what can't be trained on.

    Args:
        prompt: text, a list of messages {role, content}, or one of token ids; not empty.
        completions: K completions of the prompt's kind, none blank.
        rewards: K finite numbers.
        least: fewest completions.

    Raises:
        RowError: for the first thing that is wrong.
    """
    _check_prompt(prompt)
    for name, value in (("completions", completions), ("rewards", rewards)):
        if not isinstance(value, list):
            raise _wrong_type(name, value, "a list")
    if len(completions) != len(rewards):
        raise RowError(
            "rewards", "unequal lengths", f"has {len(rewards)} values for {len(completions)} completions; give one each"
        )
    check_count(len(completions), least)
    for k, completion in enumerate(completions):
        _check_completion(completion, content_kind(prompt), f"completions[{k}]")
    for k, reward in enumerate(rewards):
        required_number(reward, f"rewards[{k}]")
