"""Data files as people have them: their kind, by name or content; compressed ones; and text that isn't UTF-8."""

import csv
import hashlib
import io
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import datasets
import pyarrow as pa

from ..errors import UserError, one_line
from ..store.files import new_folder

KINDS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
    ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
_TABLES = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}  # by a file's first bytes
_COMPRESSED = (".gz", ".zst", ".bz2")
_CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}  # by a file's first bytes
BOM = b"\xef\xbb\xbf"
_HEAD = 4096  # bytes that say what a file is


def plain_name(file: str | Path) -> str:
    """A file's name without the ending of a compression."""
    path = Path(file)
    return path.stem if path.suffix in _COMPRESSED else path.name


def suffix_of(file: str | Path) -> str:
    """The ending of a file's plain name, such as `.jsonl` of `rows.jsonl.gz`."""
    return Path(plain_name(file)).suffix


def kind_of(file: str) -> str | None:
    """What a file is: json, parquet, arrow or csv, by its name, else by its beginning; None for none of them."""
    suffix = suffix_of(file)
    if suffix in KINDS or suffix == ".txt":  # a prompt may begin with a bracket
        return KINDS.get(suffix)
    if not os.path.isfile(file):
        return None
    refuse_utf16(file)
    with open_plain(file) as opened:
        head = opened.read(_HEAD)
    if kind := _table(head):
        return kind
    if head.removeprefix(BOM).lstrip()[:1] in (b"{", b"["):
        return "json"
    first = head.removeprefix(BOM).decode(errors="ignore").split("\n")[:1]
    return "csv" if not suffix and b"\0" not in head and len(next(csv.reader(first), [])) > 1 else None


def _table(head: bytes) -> str | None:
    return next((kind for magic, kind in _TABLES.items() if head.startswith(magic)), None)


def is_blank(file: str) -> bool:
    """Whether a file has no bytes, unpacked, or a few of white space alone."""
    with open_plain(file) as opened:
        return not opened.read(_HEAD).strip()


@contextmanager
def open_plain(file: str | Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked where its first ones say that it is compressed.

    Raises:
        UserError: it can't be unpacked.
    """
    with open(file, "rb") as opened:
        codec = _codec(opened.read(4))
        opened.seek(0)
        if codec is None:
            yield opened
            return
        try:
            yield io.BufferedReader(pa.CompressedInputStream(opened, codec))  # type: ignore[type-var]
        except (OSError, EOFError, pa.ArrowException) as error:
            raise UserError(f"{file} can't be unpacked as {codec}: {one_line(error)[:200]}; mend the file") from error


def _codec(head: bytes) -> str | None:
    return next((codec for magic, codec in _CODECS.items() if head.startswith(magic)), None)


def _codec_of(file: str) -> str | None:
    with open(file, "rb") as opened:
        return _codec(opened.read(4))


def _is_compressed(file: str) -> bool:
    return Path(file).suffix in _COMPRESSED or _codec_of(file) is not None  # `datasets` would go by the name


def unpacked(files: Sequence[str], folder: Path | None) -> list[str]:
    """`files` where none is compressed, else a plain copy of each, kept beside what `datasets` caches.

    Args:
        files: all of one data set.
        folder: they lie in; the copies lie alike in one of their own. None for files from anywhere.
    """
    if not any(map(_is_compressed, files)):
        return list(files)
    about = [(os.path.abspath(file), (stat := os.stat(file)).st_size, stat.st_mtime_ns) for file in files]
    digest = hashlib.sha256(repr(about).encode()).hexdigest()[:16]
    kept = Path(datasets.config.HF_DATASETS_CACHE) / "nca-align-unpacked" / digest
    names = [
        f"{i}-{plain_name(file)}" if folder is None else str(Path(file).relative_to(folder).with_name(plain_name(file)))
        for i, file in enumerate(files)
    ]
    if not kept.exists():
        try:
            with new_folder(kept) as new:
                for file, name in zip(files, names, strict=True):
                    (new / name).parent.mkdir(parents=True, exist_ok=True)
                    with open_plain(file) as source, open(new / name, "wb") as copy:
                        shutil.copyfileobj(source, copy, 1 << 20)
                    shutil.copystat(file, new / name)  # its time is in the key of `datasets`' cache
        except OSError as error:
            if not kept.exists():  # else another process was first
                raise UserError(
                    f"{files[0]} can't be unpacked in {kept.parent}: {error.strerror}; make room there, or name "
                    "another folder by `HF_DATASETS_CACHE`"
                ) from error
    return [str(kept / name) for name in names]


def refuse_utf16(file: str) -> None:
    """Raise where text is UTF-16 or UTF-32, as spreadsheets and PowerShell write it."""
    with open_plain(file) as opened:
        head = opened.read(_HEAD)
    if _table(head):
        return
    nul = [half.count(b"\0") / max(1, len(half)) for half in (head[::2], head[1::2])]  # a letter's other byte
    marked = head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"))
    if marked or max(nul) > 0.5:
        name = "UTF-32" if min(nul) > 0.25 else "UTF-16"
        order = "" if marked else "BE" if nul[0] > nul[1] else "LE"
        raise UserError(f"{file} is {name} text; save it as UTF-8 by {as_utf8(file, name + order)}")


def refuse_other_text(file: str) -> None:
    """Raise for the first line that is no UTF-8."""
    with open_plain(file) as lines:
        for i, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"line {i} of {file} is not UTF-8 text ({bad_byte(error)}). Save it as UTF-8; from Latin-1, "
                    f"{as_utf8(file)} does it."
                ) from None


def as_utf8(file: str, encoding: str = "LATIN1") -> str:
    """The command, in back-ticks, that writes text of another encoding as UTF-8 into a new file beside it."""
    codec = _codec_of(file)
    convert = f"iconv -f {encoding} -t UTF-8"
    old, new = (shlex.quote(str(path)) for path in (file, Path(file).with_name(f"utf8-{plain_name(file)}")))
    if codec is None:
        return f"`{convert} {old} > {new}`"
    return f"`{ {'bz2': 'bzip2'}.get(codec, codec) } -dc {old} | {convert} > {new}`"


def bad_byte(error: UnicodeDecodeError) -> str:
    """Which byte is no text, and where."""
    return f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
