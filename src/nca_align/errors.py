"""What a user is told: notices, and one clear sentence instead of a traceback for a mistake; a bug keeps its own."""

import difflib
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from .progress import between_bars, closing_bars, without_library_bars

LABEL_FIX = (
    "divide ratings by their highest value, leave out `scale_rewards`, or take another loss; for pairs also "
    "`preference: hard`"
)
_PATIENCE = 3.0  # seconds that a process waits for the first of its launch to say what is wrong


class UserError(ValueError):
    """A mistake that the user can mend; its text is the whole message. Every such mistake is one of these classes.

    The classes below are also what Python calls such a mistake, for a caller's `except`.
    """


class UserTypeError(UserError, TypeError):
    """A value of the wrong type."""


class UnsupportedError(UserError, NotImplementedError):
    """Options, models or data that can't be used together."""


class PackingError(UnsupportedError):
    """A model that can't take a packed row, with the reason in words that end a sentence."""

    def __init__(self, obstacle: str):
        super().__init__(f"`layout: prefix_shared` can't be used here: {obstacle}. Use `layout: padded`.")
        self.obstacle = obstacle


class InvalidRowError(UserError):
    """One row that can't be used, whatever the others are.

    Args:
        text: the whole message.
        cause: a few words under which such rows are counted.
        place: the split's name, and the row's number in it, from 0; None where the text doesn't name them.
    """

    def __init__(self, text: str, *, cause: str = "unusable row", place: tuple[str, int] | None = None):
        super().__init__(text)
        self.cause, self.place = cause, place

    def named(self, row: int) -> UserError:
        """The error of a run that stops at this row of the data set."""
        return UserError(f"row {row}: {self}")


class NotFoundError(UserError, FileNotFoundError):
    """A file or folder that doesn't exist."""


class HubError(UserError, ConnectionError):
    """A repository that the Hub did not give."""


def notify(message: str) -> None:
    """One line for the user, once whatever the number of processes; logging shows warnings without being set up."""
    from accelerate import PartialState  # loads torch

    if PartialState().is_main_process:
        with between_bars():
            logging.getLogger("nca_align").warning(message)


@functools.cache
def notify_once(message: str) -> None:
    """`notify`, but not a second time in this process: of what many configurations or cells say alike."""
    notify(message)


def one_line(error: BaseException) -> str:
    """The text of `error` in one line, by the name of its class where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


def first_few(items: Sequence[object], most: int = 5) -> str:
    """The first `most` of `items` in words, and an ellipsis where there are more."""
    return ", ".join(map(str, items[:most])) + (", …" if len(items) > most else "")


def nearest(name: str, names: Iterable[str]) -> str:
    """` (did you mean X?)` for the one of `names` that is most like `name` or goes on from it, or nothing."""
    bare = name.lstrip("-")  # dashes make all flags alike
    known = {other.lstrip("-"): other for other in names}
    close = difflib.get_close_matches(bare, known, n=1) or [o for o in known if len(bare) > 2 and o.startswith(bare)]
    return f" (did you mean `{known[close[0]]}`?)" if close else ""


@contextmanager
def as_user_error(
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
        if os.environ.get("NCA_ALIGN_TRACEBACK") or isinstance(error, UserError) or not known():
            raise
        raise UserError(f"{what} failed: {one_line(error)} (NCA_ALIGN_TRACEBACK=1 shows where)") from error


def cli_main(prog: str, goes_on: str = "the same command goes on from here") -> Callable[[Callable], Callable]:
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
            first = os.environ.get("RANK", "0") == "0"  # of all processes of a launch
            try:
                with without_library_bars(None if first else True), closing_bars():
                    return main(argv) or 0
            except KeyboardInterrupt as interrupt:  # with what its command knows of how to go on
                if first:
                    beside = "\n" * sys.stderr.isatty()  # where ^C stands
                    print(f"{beside}{prog}: interrupted; {interrupt if interrupt.args else goes_on}", file=sys.stderr)
                return 130
            except UserError as error:
                if not first:  # the same mistake, as a rule: the first one says it, and the launcher ends this one
                    time.sleep(_PATIENCE)
                print(f"{prog}: error: {one_line(error)}", file=sys.stderr)
                return 2

        return wrapped

    return decorate
