"""One job at a time on an output: a file beside it names the owner, whose heartbeat shows that it lives.

Not by a lock: on some network file systems a lock does nothing. Nor by clocks, which differ between machines: a job
that finds another machine's owner watches its file, and takes over once no heartbeat has come for `DEAD_AFTER` seconds.
On the owner's own machine it is enough that its process is gone.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UserError
from ..progress import between_bars
from .files import can_be_written

HEARTBEAT, DEAD_AFTER = 15.0, 120.0  # seconds
_UNKNOWN = "unknown"
_KEYS = {"host", "process", "since", "place", "started", "token"}


@contextmanager
def own_file(output: Path, key: str = "output") -> Iterator[None]:
    """Within it no other job works on the file `output`, which the option `key` names; its folder is made.

    Raises:
        UserError: another job owns it, or nothing can be written there.
    """
    with _owning(output.with_name(f".{output.name}.owner"), output, key):
        yield


@contextmanager
def own_folder(output: Path, key: str = "output_dir") -> Iterator[None]:
    """As `own_file`, for all that a folder holds. It is made, and goes again where it stays empty."""
    was_there = output.exists()
    try:
        with _owning(output / "_owner", output, key):  # transformers sends no file of such a name to the Hub
            yield
    finally:
        if not was_there:
            with suppress(OSError):  # not empty, as a rule
                output.rmdir()


@contextmanager
def _owning(file: Path, output: Path, key: str) -> Iterator[None]:
    """`file` is ours within it, and goes afterwards."""
    ours = _this_process()
    with can_be_written(output, key):
        file.parent.mkdir(parents=True, exist_ok=True)
        while not _create(file, ours):
            _displace(file, output, key)
    done = threading.Event()
    heart = threading.Thread(target=_beat, args=(file, ours, output, key, done), daemon=True)
    heart.start()
    try:
        yield
    finally:
        done.set()
        heart.join()
        with suppress(OSError):
            if _owner(_read(file)) == ours:
                file.unlink()


def _this_process() -> dict[str, Any]:
    """What an owner's file says. `place` is where process numbers count: a machine since its start, a container."""
    place = [socket.gethostname()]
    with suppress(OSError):
        place += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return {
        "host": place[0], "process": os.getpid(), "since": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "place": place, "started": _started(os.getpid()), "token": uuid.uuid4().hex,
    }  # fmt: skip


def _started(process: int) -> str | None:
    """When a process of this machine was started, in its kernel's ticks; None where it is gone.

    Without it a number that was given anew would be taken for the owner. It is `_UNKNOWN` where there is no /proc, and
    where that hides other users' processes.
    """
    try:
        state, *others = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return None
        except OSError:  # another user's
            pass
        return _UNKNOWN
    return None if state in "ZX" else others[18]  # a zombie has ended, and its parent hasn't looked yet


def _create(file: Path, ours: dict[str, Any]) -> bool:
    """Make the owner's file, unless there is one."""
    try:
        with open(file, "x", encoding="utf-8") as new:
            try:
                new.write(json.dumps(ours) + "\n")
                new.flush()
                os.fsync(new.fileno())
            except OSError:  # no space: without its line it would name nobody
                file.unlink()
                raise
    except FileExistsError:
        return False
    return True


def _read(file: Path) -> tuple[str, int] | None:
    """The text of an owner's file and when it last changed, in ns; None where there is none."""
    try:
        with open(file, encoding="utf-8", errors="replace") as there:
            return there.read(), os.fstat(there.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _owner(found: tuple[str, int] | None) -> dict[str, Any]:
    """Whom an owner's file names: its first line. One that is being written, or is damaged, names nobody."""
    try:
        owner = json.loads(found[0].partition("\n")[0] if found else "")
    except ValueError:
        return {}
    whole = isinstance(owner, dict) and owner.keys() >= _KEYS and isinstance(owner["process"], int)
    return owner if whole else {}


def _displace(file: Path, output: Path, key: str) -> None:
    """Take a dead owner's file away.

    Raises:
        UserError: the owner lives.
    """
    found = _read(file)
    if found is None:
        return
    owner, ours = _owner(found), _this_process()
    here = owner.get("place") == ours["place"]
    started = _started(owner["process"]) if here else _UNKNOWN
    if here and started == owner["started"]:
        _refuse(owner, output, key)
    if started == _UNKNOWN:
        _watch(file, found, output, key)
    began = time.monotonic()
    with _owning(file.with_name(f"{file.name}.heir"), output, key):  # one job alone may take it away
        if _read(file) == found and not _slow(began):
            _say(f"{_named(owner)}, which owned `{key}` {output}, is dead: this job takes it over")
            file.unlink()


def _slow(began: float) -> bool:
    """Whether the disk took so long since `began` that it would hold an owner's heartbeat back as well."""
    return time.monotonic() - began > DEAD_AFTER / 4


def _watch(file: Path, found: tuple[str, int], output: Path, key: str) -> None:
    """Wait until no heartbeat has come for `DEAD_AFTER` seconds, in which the disk answered all the time.

    Raises:
        UserError: one came.
    """
    owner = _owner(found)
    _say(
        f"{_named(owner)} owns `{key}` {output}: it is taken for dead if it gives no heartbeat within {DEAD_AFTER:g} "
        "seconds"
    )
    until = time.monotonic() + DEAD_AFTER
    while time.monotonic() < until:
        began = time.monotonic()
        time.sleep(min(1.0, DEAD_AFTER / 20))
        now = _read(file)
        if now is None:  # it has ended
            return
        if now != found:
            _refuse(_owner(now), output, key)
        if _slow(began):
            until = time.monotonic() + DEAD_AFTER


def _say(line: str) -> None:
    with between_bars():
        print(line, file=sys.stderr, flush=True)


def _named(owner: dict[str, Any]) -> str:
    return f"process {owner['process']} on {owner['host']}" if owner else "another job"


def _refuse(owner: dict[str, Any], output: Path, key: str) -> NoReturn:
    since = f", since {owner['since']}" if owner else ""
    raise UserError(
        f"`{key}` {output} belongs to another job: {_named(owner)}{since}. Wait for it, or choose another `{key}`. A "
        f"dead job is taken over, from another machine after {DEAD_AFTER:g} seconds."
    )


def _beat(file: Path, ours: dict[str, Any], output: Path, key: str, done: threading.Event) -> None:
    """Touch the owner's file now and then, which takes no space; where another job has taken over, this one ends.

    It may have been stopped for minutes, and two jobs would write over each other.
    """
    while not done.wait(HEARTBEAT):
        with suppress(OSError):  # the disk is away for a moment
            found = _read(file)
            if found is None and file.parent.exists() and _create(file, ours):  # somebody removed it
                continue
            if (owner := _owner(_read(file))).get("token", ours["token"]) != ours["token"]:
                _say(
                    f"error: {_named(owner)} has taken over `{key}` {output}, since this job gave no heartbeat for "
                    f"{DEAD_AFTER:g} seconds; it ends here"
                )
                os._exit(2)
            os.utime(file)
