"""What a server's answer means: no error, a pause before another try, a row that failed, or the end of the run.

docs/guide/servers.md has the forms that servers give, with their sources.
"""

import json
import re
import time
from collections.abc import Collection, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from ...errors import InvalidRowError, UserError

# Keys that hold what the row says: without one it would be another prompt
_OF_ROW = {"messages", "prompt", "tools", "add_generation_prompt", "continue_final_message"}
_NO_CREDIT = {"insufficient_quota", "insufficient_balance", "1113"}
_FILTERED = re.compile(  # whole words: there are keys such as `safety_identifier`, and names are case sensitive
    r"\bcontent[\W_]?(filter|policy|policies|management|safety)|\bmoderat(ion|ed)|\bflagged\b|policy_?violation|"
    r"\bsafety (system|filter|polic|settings|reasons|check)|\bcontent exists risk\b|"
    r"\b(sensitive|inappropriate|prohibited)[\W_](content|words?)\b|\bdata_?inspection|\busage polic|"
    r"\bblocklist\b|\brecitation\b|敏感",
    re.IGNORECASE,
)
_FILTERED_CODE = re.compile(rf"{_FILTERED.pattern}|\b(sensitive|safety|1301)\b", re.IGNORECASE)
_TOO_LONG = re.compile(
    r"context[\W_]?(length|size|window)|exceed_context|(input|prompt) tokens?\b|token count|too long|too many tokens|"
    r"too large for model|tokens allowed",
    re.IGNORECASE,
)
_LIMIT = re.compile(r"\bmax_(completion_)?tokens\W{0,3} must be (at most|less than)")  # whatever the prompt is
# Of a key's value; else a refusal may be of the key itself
_VALUE = re.compile(
    r"unsupported.value|too (large|big|small|high|low|many)|at (most|least)|(less|greater|more|larger|smaller) than|"
    r"maximum|minimum|\bm(ust|ay|ight) be\b|should be|between|\brange\b|above|below|exceed|only the default|[≤≥]|[<>]=",
    re.IGNORECASE,
)
_UNKNOWN = re.compile(
    r"unknown|unsupported|not (be )?(supported|permitted|allowed|recogni[sz]ed|implemented|available)|unrecogni[sz]ed|"
    r"unexpected|\bextra|cannot find|does not (support|accept|take)|forbidden|prohibited|additional propert",
    re.IGNORECASE,
)
_OF_N = re.compile(  # words for a single completion that don't name `n`
    r"\b(only (one|a single|1)|multiple|more than (one|1)) (\w+ )?(choice|completion|candidate|sequence)|"
    r"\bn (must be|has to be|should be|can only be|is not supported)\b|\bn ?(=|==|>) ?1\b",
    re.IGNORECASE,
)
_CODES = {
    "rate_limit": 429, "exhausted": 429, "quota": 429, "overloaded": 503, "unavailable": 503, "authentication": 401,
    "permission": 403, "context_length": 400, "content_filter": 400, "invalid": 400,
}  # fmt: skip


class Refused(UserError):
    """The server won't answer any request of this run.

    Args:
        text: the message.
        keys: those of the request that it doesn't take.
        value: whether it may take them with other values.
    """

    def __init__(self, text: str, keys: Collection[str] = (), value: bool = False):
        super().__init__(text)
        self.keys, self.value = set(keys), value


class FailedRow(InvalidRowError):
    """A row that the server doesn't answer, whatever it does with others; by `cause` such rows are counted."""

    def __init__(self, cause: str, text: str):
        super().__init__(text, cause=cause)

    @property
    def refused(self) -> bool:
        """Whether the server gave no reason that is known to be the row's own."""
        return self.cause.startswith("refused")


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
            raise TryAgain(f"its answer is not a JSON object: {short(reply.body)}")
        return body
    code = _code_of(error, reply.status)
    reason = f"HTTP {reply.status}{'' if code == reply.status else f' with the code {code}'}: {short(reply.body)}"
    if code == 402 or _NO_CREDIT.intersection(map(str, _values(error, ("code", "type")))):
        raise Refused(
            f"the server at {url} has no credit or quota for this key ({reason}). What is done is kept, and the same "
            "command goes on once there is some"
        )
    refused = f"the server at {url} refused the request ({reason})"
    said = "\n".join(map(str, _values(error, ("code", "type", "status", "message", "msg", "detail", "description"))))
    said = said or reply.body[:2000].decode(errors="replace")
    keys = (_named_keys(error, reply.body) | ({"n"} if _OF_N.search(said) else set())) & set(sent)
    if code == 500 and keys:  # what a server says of its validator's refusal
        code = 422
    if code == 413 or (code == 429 and "request too large" in said.lower()):  # for the limit of a minute
        raise FailedRow("too long", refused)
    if code in (408, 409, 425, 429, 498) or (code >= 500 and code not in (501, 505)):
        after = retry_after(reply.headers)
        after = next((_seconds(delay) for delay in _values(error, ("retryDelay",))), None) if after is None else after
        raise TryAgain(reason, after, of_server=code in (429, 498, 503, 529))
    filters = code in (400, 403, 422, 451)
    if filters and _FILTERED_CODE.search("\n".join(map(str, _values(error, ("code", "type", "status"))))):
        raise FailedRow("content filter", refused)
    if code in (400, 422):
        if _TOO_LONG.search(said) and not _LIMIT.search(said):
            raise FailedRow("too long", refused)
        keys = keys or {key for key in sent if key != "model" and _names(said, key)}
        # what it has taken is refused for one row's value; but `n` for all, whichever row is answered first
        keys -= _OF_ROW | (set(accepted) - {"n"})
        if "model" in keys:
            raise Refused(f"the server at {url} refused the request ({reason}); look at `model_name_or_path`")
        if keys:
            raise Refused(refused, keys, value=bool(_VALUE.search(said) or not _UNKNOWN.search(said)))
    if filters and _FILTERED.search(said):
        raise FailedRow("content filter", refused)
    if code in (400, 422):
        raise FailedRow(f"refused by HTTP {code}", refused)
    fix = {
        401: "; set OPENAI_API_KEY to a key that it takes", 403: "; set OPENAI_API_KEY to a key that may do this",
        404: "; look at `base_url`, which may need /v1 at its end, and at `model_name_or_path`",
    }.get(code, "")  # fmt: skip
    if 300 <= code < 400:
        fix = f"; it is at {reply.headers.get('location')}: give that address as `base_url`"
    if code == 403 and error is None:  # as Cloudflare's and proxies' pages do
        fix = "; perhaps this is no API, but what stands before it: look at `base_url`, and at OPENAI_API_KEY"
    raise Refused(f"the server at {url} refused the request ({reason}){fix}")


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


def short(body: bytes) -> str:
    """The beginning of a body in one line."""
    return " ".join(body[:2000].decode(errors="replace").split())[:300]
