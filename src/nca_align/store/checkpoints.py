"""Checkpoints on disk: which are whole, and writing them so that a kill or a full disk is seen afterwards.

`nca_align.json` in a checkpoint says "not complete" from before its first other file until after the last is on disk.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object

from ..errors import UserError, one_line
from .files import read_json

MANIFEST = "nca_align.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# what the errors of safetensors and torch say that are no OSError
_WRITE_ERRORS = ("I/O error", "No space left", "PytorchStreamWriter", "inline_container")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `nca_align.json` in `folder` says; nothing where there is none, or no readable one."""
    try:
        return dict(read_json(folder / MANIFEST))
    except (OSError, ValueError, TypeError):
        return {}


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint was written to its end and has all of it; of another trainer's, whether its state is there.

    transformers writes `trainer_state.json` last, but other processes may still be writing then.
    """
    if not (folder / "trainer_state.json").is_file():
        return False
    if not (folder / MANIFEST).exists():
        return True
    manifest = read_manifest(folder)
    files = manifest.get("files", {})
    return bool(manifest.get("complete")) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items()
    )


def whole_checkpoints(output_dir: str | os.PathLike) -> dict[int, Path]:
    """The whole checkpoints in `output_dir` by their step, the oldest first."""
    named = ((_NAME.fullmatch(folder.name), folder) for folder in Path(output_dir).glob("checkpoint-*"))
    return dict(sorted((int(name[1]), folder) for name, folder in named if name and is_whole(folder)))


def how_to_go_on(output_dir: str | os.PathLike) -> str | None:
    """What the whole checkpoints in `output_dir` can be used for, in words; None where there is none."""
    whole = list(whole_checkpoints(output_dir).values())
    if not whole:
        return None
    with_state = [folder for folder in whole if not read_manifest(folder).get("model_only")]
    if not with_state:
        return (
            f"{whole[-1]} holds weights alone; give another `output_dir`, with `model_name_or_path: {whole[-1]}` to "
            "train on from them"
        )
    last = with_state[-1]
    wanted = "true" if last == whole[-1] else last
    return f"{last} is the last checkpoint: the same command with `resume_from_checkpoint: {wanted}` goes on from it"


def step_reached(output_dir: str | os.PathLike) -> int | Literal["end"]:
    """The step that the run in `output_dir` can be gone on from, 0 for none, or that it has come to its end.

    At its end, and not before, a run writes its state beside the model.
    """
    whole = whole_checkpoints(output_dir)
    last = max((step for step, folder in whole.items() if not read_manifest(folder).get("model_only")), default=0)
    try:
        ended = int(read_json(Path(output_dir) / "trainer_state.json")["global_step"])
    except (OSError, ValueError, TypeError, KeyError):
        return last
    return "end" if ended >= last else last


def last_common_checkpoint(output_dir: str | os.PathLike) -> Path | None:
    """The last checkpoint that is whole where every process looks; all processes come here together."""
    own = whole_checkpoints(output_dir)
    common = set.intersection(*(set(steps) for steps in gather_object([list(own)])))
    return own[max(common)] if common else None


def other_checkpoint(folder: Path, output_dir: str | os.PathLike) -> str:
    """The advice which checkpoint in `output_dir` to go on from in the place of `folder`: the last that has all."""
    others = [
        other
        for other in whole_checkpoints(output_dir).values()
        if other.resolve() != folder.resolve() and not read_manifest(other).get("model_only")
    ]
    if others:
        return f"the last other one is {others[-1]}: give it as `resume_from_checkpoint`"
    return f"{output_dir} holds no other one: leave `resume_from_checkpoint` out to start anew"


def find_checkpoint(wanted: str | os.PathLike | bool, output_dir: str) -> Path:
    """The checkpoint that `resume_from_checkpoint: wanted` means, which is whole; all processes come here together.

    Raises:
        UserError: there is none, it is half written, or it holds the model alone.
    """
    last = last_common_checkpoint(output_dir)
    if wanted is True and last is None:
        raise UserError(
            f"`resume_from_checkpoint` is true, but `output_dir` {output_dir} holds no whole checkpoint; "
            "leave it out to start anew"
        )
    folder = last if last and wanted is True else Path(str(wanted))
    if not is_whole(folder):
        instead = f"the last whole one is {last}" if last else f"{output_dir} holds no whole one"
        raise UserError(
            f"`resume_from_checkpoint` {folder} is not a whole checkpoint: a save was cut off, or files are "
            f"missing; {instead}"
        )
    if read_manifest(folder).get("model_only"):
        raise UserError(
            f"`resume_from_checkpoint` {folder} holds the model alone, as `save_only_model` asked, and no state to go "
            f"on from; {other_checkpoint(folder, output_dir)}. Or give its weights as `model_name_or_path`."
        )
    return folder


def remove_half_written(output_dir: str | os.PathLike) -> None:
    """Remove what saves that were cut off have left; not what is no checkpoint of ours."""
    for half in Path(output_dir).glob("checkpoint-*"):
        if read_manifest(half).get("complete") is False:
            shutil.rmtree(half, ignore_errors=True)


@contextmanager
def explain_write_errors(what: str, folder: Path, advice: Callable[[], str]) -> Iterator[None]:
    """Around writing `what`: a full disk and its like become one sentence that ends with `advice`.

    Raises:
        UserError: writing failed.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not any(text in str(error) for text in _WRITE_ERRORS):
            raise
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free / 2**20
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)[:200]
        raise UserError(f"{what} can't be written: {reason} ({free:,.1f} MiB free in {there}); {advice()}") from error


@contextmanager
def explain_read_errors(folder: Path | None, output_dir: str) -> Iterator[None]:
    """Around reading the checkpoint `folder`, if any, to go on from it: what can't be loaded becomes one sentence.

    Raises:
        UserError: loading failed; `NCA_ALIGN_TRACEBACK=1` shows where.
    """
    try:
        yield
    except Exception as error:
        if folder is None or os.environ.get("NCA_ALIGN_TRACEBACK") or isinstance(error, torch.OutOfMemoryError):
            raise
        # torch's own text on a pickle advises to load it without this safeguard
        reason = type(error).__name__ if "weights_only" in str(error) else one_line(error)[:200]
        raise UserError(
            f"`resume_from_checkpoint` {folder} can't be loaded ({reason}). It is damaged, or of another model or "
            f"trainer; {other_checkpoint(folder, output_dir)} (NCA_ALIGN_TRACEBACK=1 shows where)"
        ) from error
