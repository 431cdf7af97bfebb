"""What a server's answer means: completions, a pause before another try, a row that failed, or the end of the run.

docs/servers.md has the forms that servers give, with their sources.
"""

import json
import re
import time
from collections.abc import Collection, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from ...errors import InvalidRowError, UserError
from .options import Sample, cut_at_stop

# Keys that hold what the row says: without one it would be another prompt
_OF_ROW = {"messages", "prompt", "tools", "add_generation_prompt", "continue_final_message"}
_CUT = {"length", "max_tokens", "model_length", "model_context_window_exceeded"}
_BROKEN = {"abort", "cancelled", "error", "insufficient_system_resource", "network_error"}
_NO_CREDIT = {"insufficient_quota", "insufficient_balance", "1113"}
_FILTERED = re.compile(
    r"content[\W_]?(filter|policy|management)|moderat|flagged|safety|(?<!case-)sensitive|prohibited|blocklist|recitation|\b1301\b",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(
    r"context[\W_]?(length|size|window)|exceed_context|(input|prompt) tokens?\b|token count|too long|too many tokens|"
    r"too large for model|tokens allowed",
    re.IGNORECASE,
)
_CODES = {
    "rate_limit": 429, "exhausted": 429, "quota": 429, "overloaded": 503, "unavailable": 503, "authentication": 401,
    "permission": 403, "context_length": 400, "content_filter": 400, "invalid": 400,
}  # fmt: skip


class Refused(UserError):
    """The server won't answer any request of this run; `keys` are those of the request that it doesn't take."""

    def __init__(self, text: str, keys: Collection[str] = ()):
        super().__init__(text)
        self.keys = set(keys)


class FailedRow(InvalidRowError):
    """A row that the server doesn't answer, whatever it does with others; by `cause` such rows are counted."""

    def __init__(self, cause: str, text: str):
        super().__init__(text)
        self.cause = cause


class TryAgain(Exception):
    """An answer to ask for again.

    Args:
        reason: what came instead.
        after: seconds to wait, as the server says.
        of_server: the server is away or busy, so that no row can be the reason.
    """

    def __init__(self, reason: str, after: float | None = None, of_server: bool = False):
        super().__init__(reason)
        self.after, self.of_server = after, of_server


class Reply(NamedTuple):
    """What came over HTTP."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def read_reply(reply: Reply, url: str, sent: Collection[str], accepted: Collection[str] = ()) -> dict[str, Any]:
    """The JSON object of an answer that is no error; an error's code is what its body says, else the status.

    Args:
        reply: the answer.
        url: the address that was asked.
        sent: keys of the request.
        accepted: keys of requests that the server has answered, so that it takes them.

    Raises:
        TryAgain: the server is busy or broken, or this is no JSON.
        FailedRow: it refuses what this request says.
        Refused: it refuses all requests. `keys` are those of `sent` that it doesn't take.
    """
    try:
        body = json.loads(reply.body)
    except (ValueError, RecursionError):
        body = None
    error = _error_of(body)
    if reply.status < 300 and error is None:
        if not isinstance(body, dict):
            raise TryAgain(f"it answered no JSON object: {_short(reply.body)}")
        return body
    code = _code_of(error, reply.status)
    reason = f"HTTP {reply.status}{'' if code == reply.status else f' with the code {code}'}: {_short(reply.body)}"
    if code == 402 or _NO_CREDIT.intersection(map(str, _values(error, ("code", "type")))):
        raise Refused(
            f"the server at {url} has no credit or quota for this key ({reason}); what is done is kept, and the same "
            "command goes on once it has"
        )
    refused = f"the server at {url} refused the request ({reason})"
    said = "\n".join(map(str, _values(error, ("code", "type", "status", "message", "msg", "detail", "description"))))
    said = said or reply.body[:2000].decode(errors="replace")
    keys = _named_keys(error, reply.body) & set(sent)
    if code == 500 and keys:  # what a server says of its validator's refusal
        code = 422
    if code == 413 or (code == 429 and "request too large" in said.lower()):  # for the limit of a minute
        raise FailedRow("too long", refused)
    if code in (408, 409, 425, 429, 498) or (code >= 500 and code not in (501, 505)):
        after = retry_after(reply.headers)
        after = next((_seconds(delay) for delay in _values(error, ("retryDelay",))), None) if after is None else after
        raise TryAgain(reason, after, of_server=code in (429, 498, 503, 529))
    if (code in (400, 422, 451) and _FILTERED.search(said)) or (code == 403 and re.search("flagged|moderat", said)):
        raise FailedRow("content filter", refused)
    if code in (400, 422):
        if _TOO_LONG.search(said):
            raise FailedRow("too long", refused)
        keys = keys or {key for key in sent if key != "model" and _names(said, key)}
        if keys := keys - _OF_ROW - set(accepted):
            raise Refused(refused, keys=keys)
        raise FailedRow(f"refused by HTTP {code}", refused)
    fix = {
        401: "; set OPENAI_API_KEY to a key that it takes", 403: "; set OPENAI_API_KEY to a key that may do this",
        404: "; look at `base_url`, which may need /v1 at its end, and at `model_name_or_path`",
    }.get(code, "")  # fmt: skip
    if 300 <= code < 400:
        fix = f"; it is at {reply.headers.get('location')}: give that address as `base_url`"
    raise Refused(f"the server at {url} refused the request ({reason}){fix}")


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
    raise TryAgain(f"it answered something else than completions: {_short(json.dumps(answer).encode())}")


def read_models(answer: dict[str, Any]) -> list[str]:
    """The names of a server's models.

    Raises:
        Refused: they aren't there.
    """
    models = answer.get("data")
    if isinstance(models, list) and all(isinstance(one, dict) and "id" in one for one in models):
        return [str(one["id"]) for one in models]
    raise Refused(f"the server answered something else than its models ({_short(json.dumps(answer).encode())})")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds by `retry-after-ms` or `Retry-After`, which is a number of seconds or a date (RFC 9110, 10.2.3)."""
    if (milliseconds := _seconds(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    if (seconds := _seconds(text)) is not None:
        return seconds
    try:
        return max(0.0, parsedate_to_datetime(str(text)).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _seconds(text: Any) -> float | None:
    """Of a text such as `1.5` or `1.5s`."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d+)?)s?\s*", text, re.ASCII) if isinstance(text, str) else None
    return float(match[1]) if match else None


def _error_of(body: Any) -> Any:
    """The error in a body: `{"error": …}`, that in a list, `{"object": "error", …}` or `{"detail": …}`; else None."""
    if isinstance(body, list):
        return next((error for error in map(_error_of, body[:10]) if error is not None), None)
    if not isinstance(body, dict) or body.get("choices"):
        return None
    if str(body.get("object")).lower() == "error":
        return body
    return next((body[key] for key in ("error", "errors", "detail") if body.get(key)), None)


def _code_of(error: Any, status: int) -> int:
    """The HTTP status that an error in a body stands for; where it says none, the answer's own, or 502 for a 200."""
    values = [str(value) for value in _values(error, ("code", "status", "type"))]
    if numbers := [value for value in values if re.fullmatch(r"[45]\d\d", value, re.ASCII)]:
        return int(numbers[0])
    words = " ".join(values).lower()
    return status if status >= 300 else next((code for word, code in _CODES.items() if word in words), 502)


def _values(node: Any, names: Collection[str], depth: int = 6) -> Iterator[Any]:
    """Texts and numbers under these names, the outer ones first; not what is echoed of the request."""
    if depth == 0:
        return
    if isinstance(node, str) and depth == 6 and "message" in names:  # an error that is its message
        yield node
    if isinstance(node, list):
        for item in node[:20]:
            yield from _values(item, names, depth - 1)
    if isinstance(node, dict):
        yield from (node[name] for name in names if isinstance(node.get(name), (str, int)))
        for name, item in node.items():
            if name != "input":
                yield from _values(item, names, depth - 1)


def _named_keys(error: Any, body: bytes) -> set[str]:
    """Keys that a refusal names by `param` or by a validator's `loc`.

    Args:
        error: as `_error_of` gives it.
        body: the whole body, where a validator's list may stand as text within a text.
    """
    text = body[:20_000].decode(errors="replace").replace("\\", "")
    located = re.findall(r"""\bloc['"]?:\s*[\[(]['"]body['"],\s*['"](\w+)['"]""", text)
    return {str(value).split(".")[0] for value in _values(error, ("param",))} | set(located)


def _names(message: str, key: str) -> bool:
    """Whether a message names a key, and does not just have the word in it, as it may have `stop` or `seed`."""
    own = re.escape(key)
    if "_" in key:
        return re.search(rf"(?<!\w){own}(?!\w)", message) is not None
    noun = "(parameter|field|argument)"
    named = rf"""["'`]{own}["'`]|(->\s*|\bbody\.|\b{noun}s?:?\s+){own}\b|\b{own}\s+{noun}\b"""
    return re.search(named, message) is not None


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


def _short(body: bytes) -> str:
    return " ".join(body[:2000].decode(errors="replace").split())[:300]
