"""Requests to a server over HTTP, tried again while it is busy or broken, within limits of time and memory."""

import json
import math
import os
import random
import threading
import time
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from ...errors import UserError, one_line
from ...store.provenance import versions
from .answers import Refused, Reply, TryAgain, read_reply
from .connections import Connections
from .options import EngineOptions

_T = TypeVar("_T")
_LONGEST_PAUSE = 60.0
_LARGEST_ANSWER = 64 * 2**20
_AGENT = f"nca-align/{versions().get('nca-align')}"  # hosts behind Cloudflare bar urllib's own


class NoAnswer(UserError):
    """All tries of a request failed.

    Args:
        text: the message.
        of_server: the server is away or busy, which is no request's fault.
        alone: the server has answered others since the first of these tries failed.
    """

    def __init__(self, text: str, of_server: bool, alone: bool):
        super().__init__(text)
        self.of_server, self.alone = of_server, alone


class Client:
    """Asks one server, from several threads.

    Args:
        options: `base_url`, `timeout` and `retries`. `OPENAI_API_KEY` of the environment goes along.
    """

    def __init__(self, options: EngineOptions):
        self.base_url = api_base_url(options)
        self.timeout, self.retries = options.timeout, options.retries
        self.accepted: set[str] = set()  # keys of the requests that were answered
        self._answered = 0.0  # when the last one was
        self._connections = Connections()
        self._opener = urllib.request.build_opener(self._connections, _AnyStatus)
        self._ended, self._ending = threading.Event(), threading.Lock()
        self._end: BaseException | None = None

    def end(self, error: BaseException) -> BaseException:
        """End all requests and pauses: none is tried any more, each raises what this returns, the first `error`."""
        with self._ending:
            self._end = self._end or error
        self._ended.set()
        self._connections.shut_down()
        return self._end

    def check(self) -> None:
        """Raise the error that ended all requests, where there was one."""
        if self._end:
            raise self._end

    def ask(self, path: str, body: dict[str, Any] | None, read: Callable[[dict[str, Any]], _T]) -> _T:
        """What `read` makes of an answer's JSON object.

        A try that failed is followed by another after 0.5, 1, 2 … seconds, at most a minute, half of it by chance; or
        after as long as the server says. While a busy server answers other requests, tries are counted anew.

        Args:
            path: of the request, such as `/models`.
            body: sent as JSON by POST; None is a GET.
            read: raises `TryAgain` where the answer is to be asked for again.

        Raises:
            FailedRow, Refused: see `read_reply`.
            NoAnswer: no try was answered.
        """
        url = _joined(self.base_url, path)
        failures, first, last = 0, math.inf, math.inf
        while True:
            self.check()
            try:
                answer = read(read_reply(self._reply(url, body), url, (body or {}).keys(), self.accepted))
            except TryAgain as error:
                failed = error
            else:
                self.accepted.update(body or ())
                self._answered = time.monotonic()
                return answer
            self.check()  # perhaps it was broken off by the end
            if failed.of_server and self._answered > last:  # busy with others, of which it has answered some since
                failures, first = 0, math.inf
            failures, last = failures + 1, time.monotonic()
            first = min(first, last)
            if (failed.after or 0) > self.timeout:
                raise Refused(
                    f"the server at {url} asks to wait {failed.after:.0f} seconds ({failed}), longer than `timeout` "
                    f"{self.timeout:g}. What is done is kept, and the same command goes on"
                )
            if failures > self.retries:
                raise NoAnswer(
                    f"the server at {url} does not answer ({failed}; tries: {failures}). What is done is kept, and the "
                    "same command goes on once the server runs",
                    of_server=failed.of_server, alone=self._answered > first,
                )  # fmt: skip
            pause = min(_LONGEST_PAUSE, 0.5 * 2 ** (failures - 1)) * random.uniform(0.5, 1)
            self._wait(pause if failed.after is None else failed.after + random.uniform(0, 0.5))

    def _wait(self, seconds: float) -> None:
        self._ended.wait(seconds)

    def _reply(self, url: str, body: dict[str, Any] | None) -> Reply:
        """The answer to one request, whatever its status.

        Raises:
            TryAgain: none came, or it was cut, too slow or too large.
        """
        headers = {"Content-Type": "application/json", "User-Agent": _AGENT}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        data = None if body is None else json.dumps(body).encode()
        connected = False
        try:
            with self._opener.open(urllib.request.Request(url, data, headers), timeout=self.timeout) as response:
                connected = True
                parts, size = [], 0
                while part := response.read1(2**16):
                    parts.append(part)
                    size += len(part)
                    if size > _LARGEST_ANSWER:
                        raise TryAgain(f"its answer is longer than {_LARGEST_ANSWER // 2**20} MiB")
                return Reply(response.status, response.headers, b"".join(parts))
        except (OSError, HTTPException, ValueError) as error:  # no connection, a broken one, or no HTTP
            cause = getattr(error, "reason", error)
            cause = cause if isinstance(cause, BaseException) else error
            away = not connected and isinstance(cause, OSError)
            away = away and not isinstance(cause, (TimeoutError, ConnectionResetError, BrokenPipeError))
            raise TryAgain(one_line(cause), of_server=away) from error


class _AnyStatus(urllib.request.HTTPErrorProcessor):
    """Answers of every status as they are: no exceptions, and no redirects, which would lose the body of a POST."""

    def http_response(self, request: Any, response: Any) -> Any:
        return response

    https_response = http_response


def api_base_url(options: EngineOptions) -> str:
    """The address that requests begin with: `base_url` as it stands, with /v1 where it names a host alone."""
    parts = urlsplit(str(options.base_url))
    path = parts.path.rstrip("/") or "/v1"
    for ending in ("/chat/completions", "/completions", "/models"):  # an address that was copied whole
        path = path.removesuffix(ending)
    return urlunsplit(parts._replace(path=path))


def _joined(base_url: str, path: str) -> str:
    parts = urlsplit(base_url)
    return urlunsplit(parts._replace(path=parts.path + path))
