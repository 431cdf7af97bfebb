"""Connections that end: each by its deadline, and all of them when another thread says so."""

import contextlib
import functools
import io
import socket
import ssl
import threading
import time
import urllib.request
import weakref
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any, NoReturn


class Connections(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens connections, each for one request, whose `timeout` is for all of its answer, however that comes.

    Another thread can shut them down at any time, while they are opened too: a request may take minutes, which no end
    should wait for.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._adding = threading.Lock()
        self._shut = False

    def http_open(self, request: Any) -> Any:
        return self.do_open(self._connection_of(HTTPConnection), request)

    def https_open(self, request: Any) -> Any:
        return self.do_open(self._connection_of(HTTPSConnection), request, context=self._certificates)

    def shut_down(self) -> None:
        """Shut all connections down, and any that is opened later."""
        self._shut = True
        with self._adding:
            opened = list(self._sockets)
        for one in opened:
            with contextlib.suppress(OSError):  # it has ended by itself
                socket.socket.shutdown(one, socket.SHUT_RDWR)  # TLS' own drops a state that its thread may be using

    def _keep(self, opened: socket.socket) -> None:
        with self._adding:
            self._sockets.add(opened)
        if self._shut:
            opened.close()
            raise ConnectionAbortedError

    @functools.cached_property
    def _certificates(self) -> ssl.SSLContext:
        keep = self._keep

        class Kept(ssl.SSLSocket):
            def do_handshake(self, block: bool = False) -> None:
                keep(self)
                super().do_handshake(block)

        context = ssl.create_default_context()
        context.sslsocket_class = Kept
        return context

    def _connection_of(self, kind: type[HTTPConnection]) -> Any:
        def opened(host: str, timeout: float, **settings: Any) -> HTTPConnection:
            connection: Any = kind(host, timeout=timeout, **settings)
            deadline = _Deadline(timeout)
            connection._create_connection = functools.partial(self._connect, deadline)  # http.client's place for it
            connection.response_class = deadline.response
            return connection

        return opened

    def _connect(self, deadline: "_Deadline", address: tuple[str, int], *_: Any) -> socket.socket:
        """A socket that is connected to one of the addresses of a host; as `socket.create_connection`, but kept."""
        failed: OSError = OSError(f"{address[0]} has no address")
        for family, kind, protocol, _name, target in socket.getaddrinfo(*address, 0, socket.SOCK_STREAM):
            opened = socket.socket(family, kind, protocol)
            try:
                self._keep(opened)
                opened.settimeout(deadline.left())
                opened.connect(target)
                opened.settimeout(deadline.left())  # for what is sent
                return opened
            except OSError as error:
                opened.close()
                failed = error
        raise failed


class _Deadline:
    def __init__(self, seconds: float):
        self._seconds, self._until = seconds, time.monotonic() + seconds

    def left(self) -> float:
        """Seconds to it; above 0.

        Raises:
            TimeoutError: there are none.
        """
        left = self._until - time.monotonic()
        if left <= 0:
            self.end()
        return left

    def end(self) -> NoReturn:
        """Raise what an answer that didn't come in time is."""
        raise TimeoutError(f"no whole answer in {self._seconds:g} seconds")

    def response(self, opened: socket.socket, *arguments: Any, **settings: Any) -> HTTPResponse:
        """The answer that comes on a socket."""
        source: Any = _Timed(opened, self)
        return HTTPResponse(source, *arguments, **settings)


class _Timed(io.RawIOBase):
    """What comes on a socket, until a deadline."""

    def __init__(self, opened: socket.socket, deadline: _Deadline):
        self._socket, self._deadline = opened, deadline
        self._bytes: Any = opened.makefile("rb", buffering=0)

    def makefile(self, mode: str) -> io.BufferedReader:
        """As of a socket; it is all that `HTTPResponse` asks of one."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._socket.settimeout(self._deadline.left())
        try:
            return self._bytes.readinto(buffer)
        except TimeoutError:
            self._deadline.end()

    def close(self) -> None:
        self._bytes.close()
        super().close()
