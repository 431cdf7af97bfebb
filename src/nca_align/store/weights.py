"""The weights in a saved model's folder, read back before anyone is told that they are there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..errors import UserError, one_line

_PATTERNS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin", "adapter_model.bin")


@contextmanager
def read_back(folder: str | os.PathLike) -> Iterator[None]:
    """Around saving a model into `folder`, on the process that writes it.

    Raises:
        UserError: after it no weights were written there, or a file of theirs can't be read.
    """
    before = _states(Path(folder))
    yield
    written = [path for path, state in _states(Path(folder)).items() if before.get(path) != state]
    if not written:
        raise UserError(
            f"no weights were written to {folder}. Resume from the last checkpoint. Under DeepSpeed's ZeRO-3 add "
            "`zero3_save_16bit_model: true` to accelerate's file, which gathers them."
        )
    for path in written:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt") as file:  # which compares the file's length with what it should hold
                    file.keys()
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{path} can't be read after it was written ({one_line(error)[:200]}). Make room, and resume from "
                    "the last checkpoint, which is as it was."
                ) from error


def _states(folder: Path) -> dict[Path, tuple[int, ...]]:
    """What tells a file that was written anew, also where a file system counts whole seconds."""
    states = {path: path.stat() for pattern in _PATTERNS for path in folder.glob(pattern)}
    return {path: (state.st_mtime_ns, state.st_size, state.st_ino) for path, state in states.items()}
