"""One process at a time on one output: a lock that the system lets go of however the process ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError
from .files import can_be_written

try:
    import fcntl
except ImportError:  # Windows has no flock: there two commands on one output are the user's to avoid
    fcntl = None  # type: ignore[assignment]


@contextmanager
def alone_at(output: Path) -> Iterator[None]:
    """Within it no other process works on `output`, by a lock on a hidden file beside it; its folder is made.

    Raises:
        UserError: another process has it, or nothing can be written there.
    """
    path = output.with_name(f".{output.name}.lock")
    with can_be_written(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _lock(path)
        except BlockingIOError as error:
            raise UserError(
                f"another command is at work on `output` {output}; wait for it, or choose another `output`"
            ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # before the lock goes: whoever has this file open by then looks again
            path.unlink()
        os.close(descriptor)


def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is not None:
                _flock(descriptor)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the one that had it removed it meanwhile


def _flock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # some network file systems have no locks: then as without flock
        pass
