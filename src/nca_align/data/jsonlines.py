"""JSON Lines read one by one, where a line may be broken."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import BOM, as_utf8, bad_byte, open_plain
from .validation import DROP

logger = logging.getLogger("nca_align")


class UnreadableLine(UserError):
    """A line, or a whole JSON file, that can't be read; its text is the whole message."""


def _read_line(line: bytes, i: int, file: str) -> dict[str, Any]:
    try:
        line.decode()
        value = _parse(line.strip())
    except UnicodeDecodeError as error:
        raise UnreadableLine(
            f"row {i} of {file} is not UTF-8 text ({bad_byte(error)}). Save it as UTF-8 (from Latin-1, {as_utf8(file)} "
            f"does it), or {DROP}"
        ) from None
    except ValueError as error:  # broken JSON, or escapes that are no text
        reason = (
            f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else "half a character"
        )
        raise UnreadableLine(
            f"row {i} of {file} is not readable JSON ({reason}); mend or remove this line, or {DROP}"
        ) from None
    if not isinstance(value, dict):
        raise UnreadableLine(
            f"row {i} of {file} is a JSON {type(value).__name__}; every line must be an object with the row's columns"
        )
    return value


def _lines(file: str) -> Iterator[tuple[bytes, dict[str, Any] | UnreadableLine]]:
    """Each line that isn't blank, with its row, or with what is wrong with it."""
    with open_plain(file) as lines:
        for i, line in enumerate(lines):
            line = line if i else line.removeprefix(BOM)
            if line.strip():
                try:
                    yield line, _read_line(line, i, file)
                except UnreadableLine as error:
                    yield line, error


def read_lines(files: list[str], drop: bool) -> Iterator[dict[str, Any]]:
    """The rows of JSONL files, lazily.

    Args:
        files: paths; a list, so that `datasets` may share them out.
        drop: whether an unreadable line is left out with a warning.
    """
    for file in files:
        for _, row in _lines(file):
            if not isinstance(row, UnreadableLine):
                yield row
            elif drop:
                logger.warning("left out: %s", row)
            else:
                raise row


def read_files(files: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of JSON files, of lists and of lines."""
    for file in files:
        if not is_list(file):
            yield from read_lines([file], drop=False)
            continue
        with open_plain(file) as opened:
            yield from json.loads(opened.read().removeprefix(BOM))


def _parse(text: bytes) -> Any:
    """The JSON value of `text`; a ValueError where it is none, or holds half a character."""
    value = json.loads(text)
    if _may_hold_half_a_character(text):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def _may_hold_half_a_character(text: bytes) -> bool:
    r"""Whether surrogates (`\ud83d\ude00`) are in it: one alone is half a character, no text."""
    return b"\\ud" in text or b"\\uD" in text


def is_plain(file: str) -> bool:
    """Whether all of a file is UTF-8 text without a surrogate."""
    with open_plain(file) as lines:
        for line in lines:
            try:
                line.decode()
            except UnicodeDecodeError:
                return False
            if _may_hold_half_a_character(line):
                return False
    return True


def check_json(files: list[str]) -> None:
    """Find what can't be read in files that `datasets` refused.

    Raises:
        UnreadableLine: for the first line, or the file where it is one JSON list.
    """
    for file in files:
        if not is_list(file):
            for _ in read_lines([file], drop=False):
                pass
            continue
        try:
            with open_plain(file) as opened:
                text = opened.read()
            text.decode()
            rows = _parse(text)
        except UnicodeDecodeError as error:
            raise UnreadableLine(
                f"{file} is not UTF-8 text ({bad_byte(error)}). Save it as UTF-8; from Latin-1, {as_utf8(file)} does it"
            ) from None
        except UnicodeEncodeError:
            raise UnreadableLine(f"{file} holds half a character (a surrogate alone); mend the file") from None
        except ValueError as error:
            raise UnreadableLine(f"{file} is not readable JSON ({error}); mend the file") from None
        for i, row in enumerate(rows):
            if not isinstance(row, dict):
                raise UnreadableLine(f"row {i} of {file} is a JSON {type(row).__name__}; every row must be an object")


def copy_sound_lines(files: list[str], folder: str) -> tuple[list[str], int]:
    """Copies in `folder` of JSONL files without their unreadable lines, and the number of those.

    Raises:
        UnreadableLine: a file that is one JSON list; it has no lines to leave out.
    """
    copies, left_out = [], 0
    for number, file in enumerate(files):
        if is_list(file):
            check_json([file])
        copies.append(str(Path(folder) / f"{number}.jsonl"))
        with open(copies[-1], "wb") as copy:
            for line, row in _lines(file):
                if isinstance(row, UnreadableLine):
                    left_out += 1
                else:
                    copy.write(line.rstrip(b"\n") + b"\n")
    logger.warning("left out %d unreadable lines of %s", left_out, ", ".join(files))
    return copies, left_out


def is_list(file: str) -> bool:
    """Whether a JSON file is one list of rows."""
    with open_plain(file) as opened:
        return opened.read(100).removeprefix(BOM).lstrip().startswith(b"[")
