"""What is in an answer that is no error: completions, of which some may have failed, or a server's models."""

import json
import re
from typing import Any

from .answers import Refused, TryAgain, short
from .options import Sample, cut_at_stop

_CUT = {"length", "max_tokens", "model_length", "model_context_window_exceeded"}
_BROKEN = {"abort", "cancelled", "error", "insufficient_system_resource", "network_error"}
_FILTERED = re.compile(r"content.?filter|safety|sensitive|prohibited|blocklist|recitation|moderat|spii|image_safety")


def read_samples(answer: dict[str, Any], chat: bool, stop: list[str]) -> list[Sample]:
    """The completions of an answer; those that the server broke off are left out, to be asked for again.

    Args:
        answer: from `read_reply`.
        chat: whether a choice holds a message; else a text.
        stop: strings that end a completion.

    Raises:
        TryAgain: there is none.
    """
    choices = answer.get("choices")
    read = [_sample(choice, chat, stop) for choice in choices] if isinstance(choices, list) else []
    if samples := [one for one in read if one is not None]:
        return samples
    raise TryAgain(f"its answer holds no completions: {short(json.dumps(answer).encode())}")


def read_models(answer: dict[str, Any]) -> list[str]:
    """The names of a server's models.

    Raises:
        Refused: they aren't there.
    """
    models = answer.get("data")
    if isinstance(models, list) and all(isinstance(one, dict) and "id" in one for one in models):
        return [str(one["id"]) for one in models]
    raise Refused(f"the server's answer is not a list of its models ({short(json.dumps(answer).encode())})")


def _sample(choice: Any, chat: bool, stop: list[str]) -> Sample | None:
    """A choice as a completion, which may have failed; None where the server broke it off, or it is no choice."""
    if not isinstance(choice, dict):
        return None
    message = choice.get("message") if chat else choice
    reason = str(choice.get("finish_reason") or "").lower()
    if not (isinstance(message, dict) or reason) or choice.get("error") or reason in _BROKEN:
        return None
    message = message if isinstance(message, dict) else {}
    content = message.get("content" if chat else "text")
    text, stopped = cut_at_stop(_text(content), stop)
    cut = reason in _CUT and not stopped
    failed = None
    if _FILTERED.match(reason):
        failed = "content filter"
    elif message.get("tool_calls"):
        failed = "tool call"
    elif not text.strip() and not stopped:
        if cut:
            failed = "cut before any text"
        elif message.get("refusal"):
            failed = "refusal"
        elif not isinstance(content, str):
            failed = "no text"
    return Sample("" if failed else text, cut, failed, _has_thought(message, content))


def _has_thought(message: dict[str, Any], content: Any) -> bool:
    parts = content if isinstance(content, list) else []
    return any(_kind(part) == "thinking" for part in parts) or any(
        bool(message.get(name)) for name in ("reasoning", "reasoning_content")
    )


def _kind(part: Any) -> Any:
    return part.get("type", "text") if isinstance(part, dict) else None


def _text(content: Any) -> str:
    """The text of an answer, which may come in parts; half a surrogate pair, which no file can hold, is U+FFFD."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if _kind(part) == "text"]
        content = "".join(text for text in texts if isinstance(text, str))
    return (content if isinstance(content, str) else "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
