"""The record of what made a file: commands with their options, versions of libraries, the commit."""

import json
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

KEY = b"nca_align"
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate")


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
