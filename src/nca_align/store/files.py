"""Files that are whole or not there, and outputs: looked at before the work that is for them."""

import csv
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ..errors import UserError


@contextmanager
def replacing(path: Path, mode: str = "w", temporary: Path | None = None) -> Iterator[IO[Any]]:
    """A file to write, text in UTF-8 or bytes (`wb`), that takes the place of `path` once all of it is on the disk.

    Args:
        path: the file.
        mode: as of `open`.
        temporary: where it is written meanwhile, for those whose `path` other processes write too.
    """
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    try:
        encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
        with open(temporary, mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which is called `path` once all is in it; what ends half-way leaves none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield new
        new.chmod(0o755)
        new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def sync(path: Path) -> None:
    """Onto the disk: a machine that goes down keeps no more than that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> Any:
    """What a JSON file says."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any, ensure_ascii: bool = True) -> None:
    """`value` as JSON in the place of `path` at once, or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=ensure_ascii, default=str) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """A CSV file of `rows` in the place of `path`; an empty field where there is no value."""
    names = list(columns or dict.fromkeys(name for row in rows for name in row))
    returns = any("\r" in str(value) for row in rows for value in row.values())  # which `csv` leaves without quotes
    with replacing(path) as file:
        table = csv.DictWriter(
            file, names, lineterminator="\n", quoting=csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
        )
        table.writeheader()
        table.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@contextmanager
def can_be_written(path: Path, key: str = "output") -> Iterator[None]:
    """Around the first writing at `path`, which the option `key` names.

    Raises:
        UserError: the system refuses it.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"`{key}` {path} can't be written: {error.strerror}; choose a place that can be written to"
        ) from error


def check_writable(path: Path, key: str = "output") -> None:
    """Refuse a file that can't be written, before the work that it is for; its folder is made.

    Raises:
        UserError: it is a folder, or the system refuses to write in its folder.
    """
    with can_be_written(path, key):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=path.parent).close()


def require_folder_of(file: str, key: str = "output") -> None:
    """Refuse a file whose folder is not there.

    Raises:
        UserError: the option `key` names such a file.
    """
    if not Path(file).resolve().parent.is_dir():
        raise UserError(f"`{key}` is {file!r}, whose folder does not exist; make it, or choose another file")


def visible_files(folder: Path) -> list[Path]:
    """What is in the folder and those below it, in no order; hidden ones (.git, .ipynb_checkpoints) are no data."""
    found = folder.rglob("*")
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
