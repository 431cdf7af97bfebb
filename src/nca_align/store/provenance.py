"""What made a file of samples or scores: content fingerprints, versions, and where they are written down."""

import glob
import hashlib
import json
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .files import visible_files

KEY = b"nca_align"
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")
_CHUNK = 1 << 20


def weights_fingerprint(name: str | None, revision: str | None = None) -> str | None:
    """An identity of a model that changes with its weights, adapter, tokenizer or chat template.

    Args:
        name: a folder, or a model id of the Hub.
        revision: of the id.

    Returns:
        For a folder a hash of its files (64 evenly spaced megabytes of those that are larger), independent of place
        and dates, of an adapter with its base model; for an id the id with its revision.
    """
    if name is None or not Path(name).is_dir():
        return f"{name}@{revision}" if revision else name
    digest = hashlib.sha256()
    for file in sorted(Path(name).iterdir()):
        if not file.is_file() or file.suffix in (".png", ".md", ".log") or file.name in _NOT_THE_MODEL:
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with open(file, "rb") as handle:
            for offset in range(0, size, max(_CHUNK, size // 64)):
                handle.seek(offset)
                digest.update(handle.read(_CHUNK))
    base = _adapter_base(Path(name))
    if base is not None:
        digest.update(f"base:{base}\n".encode())
    return digest.hexdigest()[:16]


# Trainers leave these beside the model: times and the state of training, which say nothing about what it computes.
_NOT_THE_MODEL = {
    "training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "all_results.json",
    "train_results.json", "eval_results.json", "validation_indices.json",
}  # fmt: skip


def _adapter_base(folder: Path) -> str | None:
    """The fingerprint of the model that an adapter's folder names as its base; None of any other folder."""
    try:
        about = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = about["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):  # what is wrong with it, loading says
        return None
    return weights_fingerprint(base, about.get("revision"))


def data_fingerprint(rows: Iterable[dict]) -> str:
    """A hash of the rows' content, whatever file or format they came from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def files_fingerprint(name: str) -> str:
    """A hash of the file, folder or pattern of files that is here, whole; of a data set of the Hub its name."""
    path = Path(name).expanduser()
    found = visible_files(path) if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    digest = hashlib.sha256()
    # `datasets` writes cache-….arrow beside data that was saved to disk
    files = [own for own in sorted(found) if own.is_file() and not own.match("cache-*.arrow")]
    for own in files:
        with open(own, "rb") as file:
            digest.update(f"{own.relative_to(path) if path.is_dir() else own.name}:".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16] if files else name


def versions(*packages: str) -> dict[str, str]:
    """Versions of this package and of those of `packages` that are installed."""
    found = {}
    for package in ("nca-align", *packages):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def commit() -> str | None:
    """The library's commit where it runs from a git checkout, with `-dirty` where a tracked file differs."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # else it is installed somewhere below another's checkout
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def sidecar(output: Path) -> Path:
    """Where the provenance of a JSONL file stands; a Parquet file carries its own."""
    return output.with_name(output.name + ".meta.json")


def read_provenance(path: str | Path) -> list[dict[str, Any]]:
    """The commands that made `path`, oldest first, each with its `config`; empty where none can be read."""
    path = Path(path)
    if not path.is_file():
        return []
    try:
        if path.suffix == ".parquet":
            text = (pq.read_schema(path).metadata or {}).get(KEY)
        else:
            text = sidecar(path).read_text() if sidecar(path).exists() else None
        return json.loads(text) if text else []
    except (pa.ArrowInvalid, ValueError):  # an empty or broken file
        return []


def seed_of(*place: int) -> int:
    """A seed of 31 bits (what every engine and server takes) for a place in the run."""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:4]) >> 1
