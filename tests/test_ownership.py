"""One job at a time on an output: who owns it is told, a dead owner is displaced, a live one never."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import reward_rows
from nca_align.commands.train.command import main as train
from nca_align.errors import UserError
from nca_align.store import ownership
from nca_align.store.ownership import own_file, own_folder

HOLD = """
import sys
from pathlib import Path
from nca_align.store import ownership

ownership.HEARTBEAT = 0.05
ownership._this_process = (lambda own: lambda: {**own(), "place": sys.argv[3:] or own()["place"]})(
    ownership._this_process)
with getattr(ownership, sys.argv[1])(Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""
ELSEWHERE = ["another", "machine"]


@pytest.fixture
def hold(tmp_path):
    """Start a process that owns an output until its input ends; `place` says that it is another machine's."""
    started = []

    def start(how: str = "own_file", output: Path = tmp_path / "out.jsonl", place: list[str] = ()) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, how, str(output), *place],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def quick(monkeypatch):
    """A dead owner is one of half a second."""
    monkeypatch.setattr(ownership, "HEARTBEAT", 0.05)
    monkeypatch.setattr(ownership, "DEAD_AFTER", 0.5)


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "out.jsonl"


def owner_file(output: Path) -> Path:
    return output.with_name(f".{output.name}.owner")


def owner(output: Path) -> dict:
    return json.loads(owner_file(output).read_text().partition("\n")[0])


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def leave(output: Path, **about) -> None:
    """The file of an owner that is no more, as `about` says otherwise than this process."""
    owner_file(output).write_text(json.dumps(ownership._this_process() | about) + "\n")


def test_the_owner_is_named_and_nothing_is_left(output):
    with own_file(output):
        assert owner(output)["process"] == os.getpid()
        message = rf"`output` {output} belongs to another job: process {os.getpid()} on \S+, since \d{{4}}-.* UTC\. W"
        with pytest.raises(UserError, match=message), own_file(output):
            pass
        with own_file(output.with_name("other.jsonl")):
            pass
    assert list(output.parent.iterdir()) == []


def test_another_process_is_refused_at_once_and_a_kill_lets_go(output, hold):
    process, began = hold(), time.monotonic()
    with pytest.raises(UserError, match=rf"belongs to another job: process {process.pid} on "), own_file(output):
        pass
    assert time.monotonic() - began < ownership.DEAD_AFTER / 2
    process.kill()  # and not yet waited for: a zombie
    wait_until(lambda: ownership._started(process.pid) is None)
    with own_file(output):
        assert owner(output)["process"] == os.getpid()


def test_a_live_owner_on_another_machine_is_told_by_its_heartbeat(output, hold, quick, capsys):
    process = hold(place=ELSEWHERE)
    with pytest.raises(UserError, match=f"belongs to another job: process {process.pid} on "), own_file(output):
        pass
    assert owner(output)["process"] == process.pid
    assert (
        f"owns `output` {output}: it is taken for dead if it gives no heartbeat within 0.5" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "text", [None, b"", b'{"host": "an', b"null", b"7", b"[]", b'{"host": "another"}', b"\xff\xfe", b"[" * 9]
)
def test_a_dead_owner_on_another_machine_is_displaced_after_a_while(text, output, quick, capsys):
    leave(output, place=ELSEWHERE, host="another", process=7)
    if text is not None:  # cut off in its first line
        owner_file(output).write_bytes(text)
    began = time.monotonic()
    with own_file(output):
        assert 0.5 <= time.monotonic() - began < 60  # `DEAD_AFTER` is 120 by default
        assert owner(output)["process"] == os.getpid()
    said = capsys.readouterr().err
    name = "process 7 on another" if text is None else "another job"
    assert f"{name} owns `output` {output}: it is taken for dead if" in said
    assert f"{name}, which owned `output` {output}, is dead: this job takes it over" in said
    assert list(output.parent.iterdir()) == []


def test_a_disk_that_stands_still_kills_no_owner(output, quick, monkeypatch):
    """Its heartbeat is held back as long as the other's look at it."""
    leave(output, place=ELSEWHERE)
    read, looks = ownership._read, []

    def slow(file):
        looks.append(file)
        found = read(file)
        if len(looks) == 4:
            time.sleep(1)
            threading.Timer(0.2, os.utime, [owner_file(output)]).start()
        return found

    monkeypatch.setattr(ownership, "_read", slow)
    with pytest.raises(UserError, match="belongs to another job"), own_file(output):
        pass
    assert len(looks) > 4


def test_another_users_process_is_told_by_its_heartbeat_where_it_is_hidden(output, quick, monkeypatch):
    """A /proc mounted with hidepid, where process 1 stands for another user's."""
    leave(output, process=1, started="7")
    read = Path.read_text

    def hidden(path, *args, **kwargs):
        if path == Path("/proc/1/stat"):
            raise FileNotFoundError(path)
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", hidden)
    threading.Timer(0.2, os.utime, [owner_file(output)]).start()
    with pytest.raises(UserError, match="belongs to another job: process 1 on"), own_file(output):
        pass


def test_a_full_disk_leaves_no_file_that_names_nobody(output, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"), own_file(output):
        pass
    assert list(output.parent.iterdir()) == []


def test_an_owner_that_ends_while_it_is_watched(output, hold, quick, monkeypatch):
    monkeypatch.setattr(ownership, "DEAD_AFTER", 60)
    leave(output, place=ELSEWHERE)
    threading.Timer(0.3, owner_file(output).unlink).start()
    with own_file(output):
        assert owner(output)["process"] == os.getpid()


@pytest.mark.parametrize("about", [{"process": 2**22 + 1}, {"started": "1"}])
def test_a_process_that_is_gone_or_another_one_of_its_number(about, output, monkeypatch):
    monkeypatch.setattr(ownership, "_watch", lambda *args: pytest.fail("watched on its own machine"))
    leave(output, **about)
    with own_file(output):
        assert owner(output)["process"] == os.getpid()


def test_of_many_that_displace_a_dead_owner_one_has_it(output, quick):
    leave(output, process=2**22 + 1)
    began, had, refused = threading.Barrier(8), [], []

    def take():
        began.wait()
        try:
            with own_file(output):
                had.append(owner(output)["token"])
                wait_until(lambda: len(refused) == 7)
        except UserError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(had), len(refused)) == (1, 7)


def test_one_that_was_made_since_it_was_looked_at_stays(output, monkeypatch):
    """Another job displaced the dead owner between this one's look and its move."""
    leave(output, process=2**22 + 1)
    read, looks = ownership._read, []

    def late(file):
        text = read(file)
        if not looks:
            leave(output, token="the other's")
        looks.append(file)
        return text

    monkeypatch.setattr(ownership, "_read", late)
    with pytest.raises(UserError, match="belongs to another job"), own_file(output):
        pass
    assert owner(output)["token"] == "the other's"
    assert [path.name for path in output.parent.iterdir()] == [owner_file(output).name]


def test_a_job_that_died_while_it_took_over_is_displaced_too(output):
    leave(output, process=2**22 + 1)
    owner_file(output).rename(output.with_name(".out.jsonl.owner.heir"))
    leave(output, process=2**22 + 2)
    with own_file(output):
        assert owner(output)["process"] == os.getpid()
    assert list(output.parent.iterdir()) == []


def test_one_that_was_stopped_for_long_ends_when_it_goes_on(output, hold, quick):
    process = hold(place=ELSEWHERE)
    os.kill(process.pid, signal.SIGSTOP)
    with own_file(output):
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(10) == 2
        assert owner(output)["process"] == os.getpid()


def test_a_file_that_was_removed_by_hand_comes_again(output, quick):
    with own_file(output):
        owner_file(output).unlink()
        wait_until(owner_file(output).exists)
        assert owner(output)["process"] == os.getpid()
    assert list(output.parent.iterdir()) == []


def test_heartbeats_come(output, quick):
    with own_file(output):
        text, seen, began = owner_file(output).read_text(), set(), time.monotonic()
        wait_until(lambda: seen.add(owner_file(output).stat().st_mtime_ns) or len(seen) == 5)
        assert time.monotonic() - began > 3 * ownership.HEARTBEAT
        assert owner_file(output).read_text() == text


def test_a_folder_is_made_and_goes_where_it_stays_empty(tmp_path):
    folder = tmp_path / "runs" / "one"
    with own_folder(folder), pytest.raises(UserError, match=f"`output_dir` {folder} belongs to"), own_folder(folder):
        pass
    assert not folder.exists()
    folder.mkdir()
    with own_folder(folder):
        assert [file.name for file in folder.iterdir()] == ["_owner"]
    assert list(folder.iterdir()) == []


@pytest.mark.slow
def test_a_training_owns_its_folder(tmp_path, model_dir, hold, capsys):
    """Refused while another job is there, before anything is read; afterwards it is nobody's."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, reward_rows(8))))
    flags = {
        "model_name_or_path": model_dir, "dataset_name": tmp_path / "rows.jsonl", "max_steps": 1, "report_to": "none",
        "output_dir": tmp_path / "run", "save_strategy": "no", "show_answers": 0, "validation_fraction": 0,
    }  # fmt: skip
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    process = hold("own_folder", tmp_path / "run")
    assert train(argv) == 2
    assert re.search(rf"`output_dir` \S+run belongs to another job: process {process.pid} on", capsys.readouterr().err)
    process.communicate()  # its input ends
    assert train(argv) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not list((tmp_path / "run").glob("*owner*"))
