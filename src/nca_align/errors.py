"""One clear sentence instead of a traceback for a user's mistake, and the traceback still for a bug."""

import dis
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType


class UserError(ValueError):
    """A mistake that the user can mend; its text is the whole message."""


def one_line(error: BaseException) -> str:
    """The text of `error` in one line, by the name of its class where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def refused_by(
    what: str, known: Callable[[], bool] = lambda: True, also: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """What a library refuses before any work is done is told in one sentence; `NCA_ALIGN_TRACEBACK=1` shows all of it.

    Args:
        what: what was being done, the sentence's beginning.
        known: whether nothing has been done yet, asked when an error comes; afterwards errors pass as they are.
        also: classes of its own by which the library refuses.
    """
    refusals: tuple[type[Exception], ...] = (
        ValueError, TypeError, AttributeError, KeyError, ImportError, RuntimeError, OSError, *also,
    )  # fmt: skip
    try:
        yield
    except refusals as error:
        if os.environ.get("NCA_ALIGN_TRACEBACK") or is_users_mistake(error) or not known():
            raise
        raise UserError(f"{what} failed: {one_line(error)} (NCA_ALIGN_TRACEBACK=1 shows where)") from error


def is_users_mistake(error: BaseException) -> bool:
    """True for a `UserError`, and for a ValueError, TypeError, NotImplementedError or OSError that a `raise`
    statement of this package gave: what validation says. The same classes out of torch, or out of an expression of
    ours that failed, are bugs and keep their traceback.
    """
    if isinstance(error, UserError):
        return True
    if not isinstance(error, (ValueError, TypeError, NotImplementedError, OSError)):
        return False
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_globals.get("__name__", "").split(".")[0] != __package__:
        return False
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _not_of_kernels(record: logging.LogRecord) -> bool:
    """False for bitsandbytes' word on a kernel that it does without, which would stand before any command's own."""
    return "kernels-community" not in str(record.msg)


def command(prog: str, goes_on: str = "the same command goes on from here") -> Callable[[Callable], Callable]:
    """Decorate a `main(argv)`: a user's mistake is one sentence on stderr and the exit code 2.

    Args:
        prog: what the sentence begins with, such as `nca-align sample`.
        goes_on: how to go on after Ctrl-C.

    Returns:
        A decorator. The decorated `main(argv=None)` returns an exit code: 0, 2 for a user's mistake, 130 for Ctrl-C.
    """

    def decorate(main: Callable) -> Callable:
        @functools.wraps(main)
        def wrapped(argv: list[str] | None = None) -> int:
            logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_not_of_kernels)
            try:
                return main(argv) or 0
            except KeyboardInterrupt:
                print(f"\n{prog}: interrupted; {goes_on}", file=sys.stderr)
                return 130
            except Exception as error:
                if not is_users_mistake(error):
                    raise
                print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
                return 2

        return wrapped

    return decorate
