"""One process at a time on one output: a lock that the system lets go of however the process ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError
from .files import can_be_written


@contextmanager
def lock_output(output: Path) -> Iterator[None]:
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


# Not by the library `filelock`, of which `datasets` takes any version. Where a disk has no locks, 3.10 to 3.20 say that
# another process has it; 4.3 raises what it raises where nothing can be written. 3.29 removes the file after the work,
# and the others leave it. Up to 3.20 a lock counts on a file that was removed meanwhile.
def _lock(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:  # some network file systems have no locks: there two commands are the user's to avoid
            pass
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        os.close(descriptor)  # the one that had it removed it meanwhile
