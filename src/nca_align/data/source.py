"""Raw data from where it lies, and one sentence where it can't be read."""

import csv
import glob
import io
import itertools
import logging
import os
import shlex
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from ..errors import HubError, NotFoundError, UserError, notify_once, one_line
from ..store.files import visible_files
from .columns import code_revision
from .files import (
    KINDS,
    is_blank,
    kind_of,
    open_plain,
    plain_name,
    refuse_other_text,
    refuse_utf16,
    suffix_of,
    unpacked,
)
from .json_types import as_texts, with_fractions
from .jsonlines import UnreadableLine, check_json, copy_sound_lines, is_list, is_plain, read_files, read_lines
from .tables import BUILDERS, folder_columns, load_tables


def open_dataset(path: str, name: str | None, streaming: bool, drop: bool) -> tuple[dict[str, Any], int]:
    """The data set at `path` as it is.

    Args:
        path: a Hub id, a file, a pattern of files, or a folder.
        name: the configuration of a Hub data set.
        streaming: read lazily.
        drop: leave out the unreadable lines of JSONL files, instead of refusing the first.

    Returns:
        The splits by name, and the number of unreadable lines that were left out.

    Raises:
        FileNotFoundError: `path` looks like a file, and there is none.
        ConnectionError: `path` is a Hub id that can't be had.
        ValueError: files of several kinds or of an unknown one, or that can't be read.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
            saved = load_from_disk(str(local))
            splits = dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
            return {key: split.to_iterable_dataset() if streaming else split for key, split in splits.items()}, 0
        files = sorted(str(file) for file in visible_files(local) if suffix_of(file) in KINDS)
        if files:
            kind = _kind(files, path)
            copies = unpacked(files, local)
            folder = str(local) if copies == files else os.path.commonpath([Path(copy).parent for copy in copies])
            return _load(path, kind, files, streaming, (folder, name), {}), 0
        files = sorted(str(file) for file in visible_files(local) if not suffix_of(file) and kind_of(str(file)))
        return _open_files(path, files, streaming, drop)
    files = [str(local)] if local.is_file() else sorted(glob.glob(str(local), recursive=True))
    if files:
        return _open_files(path, files, streaming, drop)
    if path.startswith(("/", ".", "~")) or suffix_of(local) in KINDS or path.count("/") > 1 or glob.has_magic(path):
        raise NotFoundError(f"`dataset_name` is {path!r}, and there is no such file; give the path of one")
    return _open_hub(path, name, streaming), 0


def _open_hub(path: str, name: str | None, streaming: bool) -> dict[str, Any]:
    try:
        return dict(load_dataset(path, name, streaming=streaming))
    except OSError as error:  # offline, unknown, gated, an HTTP error
        raise HubError(
            f"`dataset_name` is {path!r}, which is not a file here and can't be loaded from the Hugging Face Hub "
            f"({one_line(error)[:200]}). `dataset_name` also takes a local path."
        ) from error
    except (ValueError, RuntimeError, DatasetGenerationError) as error:  # RuntimeError: a data set that is a script
        raise UserError(f"`dataset_name` {path!r} can't be read: {_reason(error)}") from error


def _kind(files: list[str], path: str) -> str:
    if files and all(map(is_blank, files)):
        raise UserError(f"`dataset_name` is {path!r}, which is empty; it must have at least one row")
    kinds = {kind_of(file) or "" for file in files}
    if len(kinds) != 1 or "" in kinds:
        found = ", ".join(sorted({suffix_of(file) or plain_name(file) for file in files})) or "none of these"
        hint = ""
        if found == ".txt":
            hint = (
                f"; if its lines are prompts, draw completions by `nca-align sample --dataset_name {shlex.quote(path)} "
                "--model_name_or_path MODEL --output samples.jsonl`"
            )
        raise UserError(
            f"`dataset_name` is {path!r}, which holds {found}; it must be files of one kind, of {', '.join(KINDS)}"
            f"{hint}"
        )
    if not kinds & BUILDERS.keys():
        for file in files:
            refuse_utf16(file)
        if named := dict.fromkeys(name for file in files for name in folder_columns(file, _root(path))):
            notify_once(
                f"`dataset_name` {path}: the names of its folders hold the columns {', '.join(named)}, which are read "
                "of Parquet and Arrow files alone; rows are read without them."
            )
    return str(kinds.pop())


def _open_files(path: str, files: list[str], streaming: bool, drop: bool) -> tuple[dict[str, Any], int]:
    kind = _kind(files, path)
    lines = kind == "json" and not any(suffix_of(file) == ".json" or is_list(file) for file in files)
    if streaming and lines:
        return {"train": IterableDataset.from_generator(read_lines, gen_kwargs={"files": files, "drop": drop})}, 0
    try:
        return _load(path, kind, files, streaming, (kind,), {"data_files": {"train": unpacked(files, None)}}), 0
    except UnreadableLine:
        if not drop:
            raise
    with tempfile.TemporaryDirectory() as folder:
        copies, left_out = copy_sound_lines(files, folder)
        return _load(path, kind, copies, False, (kind,), {"data_files": {"train": copies}}), left_out


def _load(path: str, kind: str, files: list[str], streaming: bool, what: tuple, arguments: dict) -> dict[str, Any]:
    if kind == "csv" and streaming:  # what is wrong further on would come in the midst of training
        for file in files:
            refuse_other_text(file)
    log = logging.getLogger("datasets")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it logs an error of its own for what is one sentence below
    try:
        if kind == "csv":
            arguments = arguments | _csv_as_text(path, files[0])
        elif kind == "json" and not all(map(is_plain, files)):  # `datasets` would fail late, or not at all
            check_json(files)
        try:
            if kind in BUILDERS:
                return load_tables(kind, what, arguments, streaming, _root(path))
            splits = dict(load_dataset(*what, streaming=streaming, **arguments))
            if kind == "json":
                _refuse_columns(path, next(iter(next(iter(splits.values()))), {}))
                features = next(iter(splits.values())).features
                if features and (texts := as_texts(features)) != features:
                    return _read_as(texts, what, arguments, streaming)
            return splits
        except (DatasetGenerationError, ValueError, pa.ArrowTypeError) as error:
            if kind != "json" or isinstance(error, UserError):
                raise
            check_json(files)
            if isinstance(error.__cause__ or error, pa.ArrowTypeError):  # of one block, so that nothing is begun
                return _read_as(_types_of(files), what, arguments, streaming)
            # The types are those of the file's beginning: whole numbers there may be fractions further on, times texts.
            begun = next(iter(load_dataset(*what, streaming=True, **arguments).values()))
            features = with_fractions(begun.features)
            if (texts := as_texts(features)) != features:
                return _read_as(texts, what, arguments, streaming)
            return dict(load_dataset(*what, streaming=streaming, **arguments, features=features))
    except UserError:
        raise
    except (DatasetGenerationError, StopIteration, ValueError, OSError, RuntimeError, pa.ArrowException) as error:
        # `datasets` says so where it meets no rows.
        if not any(map(os.path.getsize, files)) or "corresponds to no data" in str(error):
            raise UserError(f"`dataset_name` is {path!r}, which is empty; it must have at least one row") from None
        if isinstance(error.__cause__ or error, UnicodeDecodeError):
            for file in files:
                refuse_other_text(file)
        raise UserError(f"`dataset_name` is {path!r}, which can't be read as {kind}: {_reason(error)}") from error
    finally:
        log.setLevel(level)


def _reason(error: Exception) -> str:
    return one_line(error.__cause__ or error)[:300]


def _csv_as_text(path: str, file: str) -> dict[str, Any]:
    """All columns as text: an answer "12" or "N/A" is text, and the numbers are read where numbers belong."""
    with open_plain(file) as opened, io.TextIOWrapper(opened, "utf-8-sig", newline="") as lines:
        first = lines.readline()
        separator = max(",;\t", key=first.count)  # as spreadsheets of other languages write it
        header, *rows = itertools.islice(csv.reader(itertools.chain([first], lines), delimiter=separator), 2)
    if rows and len(rows[0]) > len(header):  # pandas would take the first cells for an index, and shift the others
        raise UserError(
            f"`dataset_name` is {path!r}, which can't be read as csv: row 0 has {len(rows[0])} cells for {len(header)} "
            "columns. Give each column a name in the first line."
        )
    # pandas, which writes its index under no name, reads it under this one
    names = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
    return {"features": Features({name: Value("string") for name in names}), "na_filter": False, "sep": separator}


def _root(path: str) -> Path:
    """The folder below which the names of folders say something of the data."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    return next(own for own in local.parents if not glob.has_magic(str(own)))


def _refuse_columns(path: str, row: dict[str, Any]) -> None:
    """Refuse a table that pandas wrote column by column, which reads as one row."""
    by_index = {frozenset(own) if isinstance(own, dict) else None for own in row.values()}
    split = {"columns", "data"} <= row.keys() <= {"columns", "data", "index"}
    if split or (len(by_index) == 1 and all(map(str.isdigit, by_index.pop() or "-"))):
        raise UserError(
            f"`dataset_name` is {path!r}, which holds a table by its columns, as pandas' `to_json` writes it. Write it "
            "by rows: `to_json(PATH, orient='records', lines=True)`."
        )


def _types_of(files: list[str]) -> Features:
    """The types of JSON files by their first rows, with all numbers fractions.

    A list may hold whole numbers and a null, and a later one in its block fractions. Arrow's reader of JSON (26.0)
    miscounts such a list. Otherwise it reads blocks of different types, which `datasets` doesn't merge.
    """
    rows = list(itertools.islice(read_files(files), 1000))
    columns = dict.fromkeys(name for row in rows for name in row)
    read = Dataset.from_dict({name: [row.get(name) for row in rows] for name in columns})
    return as_texts(with_fractions(read.features))


def _read_as(features: Features, what: tuple, arguments: dict, streaming: bool) -> dict[str, Any]:
    """The splits of JSON files with these types, which Arrow's reader would not give them."""
    found: dict[str, Any] = {}
    for name, files in load_dataset_builder(*what, **arguments).config.data_files.items():
        own = {"files": list(files)}
        if streaming:
            found[name] = IterableDataset.from_generator(read_files, features, own)
            continue
        state = [(file, (stat := os.stat(file)).st_size, stat.st_mtime_ns) for file in files]
        key = Hasher.hash(("nca_align texts", code_revision(), state, str(features)))
        found[name] = Dataset.from_generator(read_files, features, gen_kwargs=own, fingerprint=key)
    return found
