"""The record of what made a file (commands, options, versions, commit), and the refusal where it is another's."""

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError

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


def changed_names(recorded: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """The names under which two records differ, in order."""
    return sorted(name for name in {*recorded, *asked} if recorded.get(name) != asked.get(name))


def refuse_changes(
    what: str,
    recorded: Mapping[str, Any],
    asked: Mapping[str, Any],
    advice: str,
    names: Sequence[str] | None = None,
    form: str = "{} → {}",
    show: Callable[[Any], str] = repr,
) -> None:
    """Refuse to go on with what was made by other options, data or models, each named with its old and new value.

    Args:
        what: is of another run, the sentence's beginning.
        recorded: what made it.
        asked: what this run would make it of.
        advice: the sentence's end.
        names: of what differs; by default all of `changed_names`.
        form: of an old and a new value.
        show: text of a value.

    Raises:
        UserError: something differs.
    """
    names = changed_names(recorded, asked) if names is None else names
    pairs = {name: _lines_that_differ(recorded.get(name), asked.get(name)) for name in names}
    differences = [f"`{name}` {form.format(*map(show, pair))}" for name, pair in pairs.items()]
    if differences:
        raise UserError(f"{what}: {', '.join(differences)}; {advice}")


def _lines_that_differ(old: Any, new: Any) -> tuple[Any, Any]:
    """Two values, of texts of several lines only the lines that the other hasn't."""
    if not (isinstance(old, str) and isinstance(new, str) and "\n" in old + new):
        return old, new
    lines = [[line.strip() for line in text.split("\n")] for text in (old, new)]
    own, others = ("; ".join(dict.fromkeys(line for line in lines[i] if line not in lines[1 - i])) for i in (0, 1))
    return own, others
