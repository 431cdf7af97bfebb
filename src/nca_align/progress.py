"""Bars where there is a terminal, and lines that don't stick to them; plain text elsewhere."""

import logging
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

# By which the libraries are told to show no bars, before they are imported
_VARIABLES = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
_open: weakref.WeakSet = weakref.WeakSet()


def shows_bars() -> bool:
    """Whether stderr can show a bar: a terminal or a notebook."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def bar(total: int | None, unit: str, shown: bool = True, **options: Any) -> tqdm:
    """A progress bar on stderr, which writes nothing where `shows_bars` or `shown` is false.

    Args:
        total: of what is counted; None where it isn't known.
        unit: what is counted.
        shown: whether this process shows it.
        **options: tqdm's.
    """
    made = tqdm(total=total, unit=f" {unit}", dynamic_ncols=True, disable=not (shown and shows_bars()), **options)
    _open.add(made)
    return made


def close_bars() -> None:
    """End the lines of all open bars: what is said next is not followed by them."""
    for left in list(_open):
        left.close()


@contextmanager
def closing_bars() -> Iterator[None]:
    """Ends the lines of the bars that an error or an interrupt leaves open, before more is said."""
    try:
        yield
    finally:
        close_bars()


@contextmanager
def between_bars() -> Iterator[None]:
    """Around writing to the terminal: the bars step aside, and are drawn again below."""
    with tqdm.external_write_mode():
        yield


def print_line(line: str) -> None:
    """Print a line, which doesn't stick to a bar."""
    with between_bars():
        print(line, flush=True)


class LineHandler(logging.StreamHandler):
    """Writes log records to stdout, which don't stick to a bar."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        with between_bars():
            super().emit(record)


@contextmanager
def without_library_bars(hidden: bool | None = None) -> Iterator[None]:
    """Within it datasets, transformers and the Hub show no bars of their own.

    Args:
        hidden: whether they are hidden; by default where `shows_bars` is false.
    """
    if hidden is None:
        hidden = not shows_bars()
    if not hidden:
        yield
        return
    unset = [name for name in _VARIABLES if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, "1"))
    shown = []
    for is_shown, hide, show in _switches():
        if is_shown():
            hide()
            shown.append(show)
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)
        for show in shown:
            show()


def _switches() -> Iterator[tuple[Any, Any, Any]]:
    """Whether bars are shown, hiding and showing them, of the libraries that are imported by now."""
    if "datasets" in sys.modules:
        from datasets import utils

        yield utils.is_progress_bar_enabled, utils.disable_progress_bars, utils.enable_progress_bars
    if "transformers" in sys.modules:  # and with it the Hub's
        from transformers.utils import logging as theirs

        yield theirs.is_progress_bar_enabled, theirs.disable_progress_bar, theirs.enable_progress_bar
