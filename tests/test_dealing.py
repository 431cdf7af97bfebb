"""`sample` and `score` on several processes: each makes its shards, and the file is that of one process."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from datasets import Dataset, Features, Value

from conftest import reward_rows
from nca_align import processes, progress
from nca_align.commands.sample.command import sample
from nca_align.commands.sample.options import SampleOptions
from nca_align.commands.sample.server import server_engine
from nca_align.commands.score import ScoreOptions, score
from nca_align.errors import UserError
from nca_align.models.loading import default_device
from nca_align.processes import Processes
from nca_align.store import shards
from stand_ins import http_server

SCORER = "nca_align.scorers:vader"


def launch(made: Path, *argv: object, count: int = 2, pause: float = 0.0) -> subprocess.Popen:
    """`nca-align ARGV` by torchrun."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count),
         str(Path(__file__).with_name("dealt.py")), *map(str, argv)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MADE": str(made), "PAUSE": str(pause)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def lines(made: Path) -> list[list[str]]:
    """(rank, process, shard) of each shard so far."""
    return [line.split() for line in made.read_text().splitlines()] if made.exists() else []


@pytest.fixture
def sampling(tmp_path, model_dir) -> dict:
    (tmp_path / "prompts.txt").write_text("\n".join(f"What is {i}?" for i in range(21)))
    return {
        "dataset_name": str(tmp_path / "prompts.txt"), "model_name_or_path": model_dir, "num_completions": 3,
        "max_new_tokens": 6, "batch_size": 2, "shard_size": 2,
    }  # fmt: skip


@pytest.fixture
def scoring(tmp_path) -> dict:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, reward_rows(13))))
    return {"dataset_name": str(tmp_path / "rows.jsonl"), "scorer": [SCORER], "shard_size": 2}


def flags(options: dict) -> list[str]:
    return [part for name, value in options.items()
            for part in (f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)]))]  # fmt: skip


@pytest.mark.slow
def test_two_processes_sample_what_one_does_killed_on_the_way_and_gone_on_from_by_one(sampling, tmp_path, capsys):
    output, made = tmp_path / "two.parquet", tmp_path / "made"
    running = launch(made, "sample", *flags(sampling), "--output", output, pause=0.5)
    while not any(rank == "1" for rank, *_ in lines(made)) or len(lines(made)) < 3:
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.05)
    killed = {process for rank, process, _ in lines(made) if rank == "1"}
    os.kill(int(killed.pop()), signal.SIGKILL)
    said = running.communicate(timeout=600)[0]
    assert running.returncode != 0
    assert "src/nca_align" not in said  # torchrun's own traceback alone
    assert {(rank, int(shard) % 2) for rank, _, shard in lines(made)} == {("0", 0), ("1", 1)}
    assert 3 <= len(list((tmp_path / "two.parquet.parts").glob("*.parquet"))) < 11
    assert not output.exists()
    sample(SampleOptions(output=str(output), **sampling))  # its owner is dead
    assert "is dead: this job takes it over" in capsys.readouterr().err
    sample(SampleOptions(output=str(tmp_path / "one.parquet"), **sampling))
    assert output.read_bytes() == (tmp_path / "one.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "one.parquet", "prompts.txt", "two.parquet"]


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_began_and_one_speaks(scoring, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    output, made, write = tmp_path / "two.jsonl", tmp_path / "made", shards._write

    def killing(path, *rest):
        if path.stem == "000002":
            raise Killed
        write(path, *rest)

    monkeypatch.setattr(shards, "_write", killing)
    with pytest.raises(Killed):
        score(ScoreOptions(output=str(output), **scoring))
    monkeypatch.setattr(shards, "_write", write)
    running = launch(made, "score", *flags(scoring), "--output", output)
    said = running.communicate(timeout=600)[0]
    assert running.returncode == 0, said
    assert sorted((rank, int(shard)) for rank, _, shard in lines(made)) == [
        ("0", 2), ("0", 4), ("0", 6), ("1", 3), ("1", 5),
    ]  # fmt: skip
    assert said.count(f"{output}: 13 rows, 52 completions") == 1
    assert said.count("rewards: mean") == 1
    score(ScoreOptions(output=str(tmp_path / "one.jsonl"), **scoring))
    assert output.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    refused = launch(made, "score", *flags(scoring | {"shard_size": 3}), "--output", output)
    said = refused.communicate(timeout=600)[0]
    assert refused.returncode != 0
    assert said.count("nca-align score: error: ") == 1
    assert "of another configuration: `shard_size` 2 there and 3 here" in said


def test_each_process_takes_its_share_and_none_is_left_out(monkeypatch):
    """By what the launcher says, without a launch."""
    monkeypatch.setattr(processes, "_group", lambda: None)
    assert Processes.of_launch() == Processes(0, 1)
    monkeypatch.setenv("WORLD_SIZE", "8")  # of something else
    assert Processes.of_launch() == Processes(0, 1)
    monkeypatch.setenv("RANK", "3")
    assert Processes.of_launch() == Processes(3, 8)
    assert not Processes.of_launch().first
    left = list(range(21))
    assert sorted(i for index in range(8) for i in left[index::8]) == left


@pytest.mark.parametrize(("count", "own"), [(1, 8), (3, 2), (16, 1)])
def test_the_processes_share_a_servers_requests(count, own, tmp_path, monkeypatch):
    """Each asks for its part, at least one."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(count))
    under_way, most, counting, full = [0], [], threading.Lock(), threading.Event()

    def answer(path, body):
        with counting:
            under_way[0] += 1
            most.append(under_way[0])
            if under_way[0] == own:
                full.set()
        full.wait(60)
        time.sleep(0.05)  # for one too many
        with counting:
            under_way[0] -= 1
        return 200, {}, {"choices": [{"message": {"content": "a"}}] * 4}

    rows = {i: {"prompt": [{"role": "user", "content": str(i)}]} for i in range(20)}
    with http_server(answer) as url:
        options = SampleOptions(dataset_name="none", output="none", base_url=url, model_name_or_path="m", concurrency=8)
        server_engine(options, "m")(options, 0, rows, lambda done: None)
    assert max(most) == own
    assert options.shards_at_once == own + 1


@pytest.mark.parametrize(
    ("launch", "total", "initial", "desc"),
    [
        (Processes(0, 1), 13, 0, None),
        (Processes(0, 3), 5, 0, "Process 1 of 3"),
    ],
)
def test_a_bar_says_whose_rows_it_counts(launch, total, initial, desc, tmp_path, monkeypatch):
    said = []

    class Seen(BaseException):
        pass

    def bar(total, unit, shown, initial, desc):
        said.append((total, initial, desc))
        raise Seen

    monkeypatch.setattr(Processes, "once", lambda self, work: work())
    monkeypatch.setattr(progress, "bar", bar)
    features = Features({"a": Value("int64")})
    with pytest.raises(Seen):
        shards.run_sharded(
            str(tmp_path / "out.jsonl"), Dataset.from_dict({"a": range(13)}), features, lambda: None,
            {"command": "c", "config": {}}, shard_size=2, processes=launch,
        )  # fmt: skip
    assert said == [(total, initial, desc)]


def test_a_process_whose_first_one_has_gone_ends_and_says_so(monkeypatch, capsys):
    def gone(*args, **kwargs):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(processes, "_group", lambda: None)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", gone)
    monkeypatch.setattr("torch.distributed.barrier", gone)
    for call in (lambda: Processes(1, 2).once(lambda: 1), lambda: Processes(1, 2).wait()):
        with pytest.raises(SystemExit) as left:
            call()
        assert left.value.code == 1
        assert capsys.readouterr().err == "rank 1 ends: another process of this launch has gone\n"


@pytest.mark.skipif(sys.platform != "linux", reason="by Linux's options of sockets")
def test_the_machines_of_a_launch_are_probed():
    """Of all connections that are there, and nothing else is touched."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as own:
        assert not own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        processes._probe_machines()
        assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60
        other, _ = server.accept()
        with other:
            own.sendall(b"there")
            assert other.recv(5) == b"there"


def test_a_process_loads_onto_the_card_that_it_has_taken(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    assert default_device() == "cuda:3"


@pytest.mark.parametrize(
    ("local", "each", "visible", "own"),
    [
        ("1", 1, "4,5,6,7", "5"),
        ("1", 2, "4,5,6,7", "6,7"),
        ("2", 1, "", "2"),
        ("3", 1, "", None),
        ("2", 2, "4,5", None),
    ],
)
def test_an_engine_of_own_processes_sees_its_cards(local, each, visible, own, monkeypatch):
    monkeypatch.setattr(processes, "_group", lambda: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    for name, value in {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": local, "CUDA_VISIBLE_DEVICES": visible,
                        "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    if own is None:
        with pytest.raises(UserError, match=rf"process {int(local) + 1} of this machine needs {each} cards of its own"):
            processes.show_own_cards(each)
        return
    processes.show_own_cards(each)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own
    assert "TORCHELASTIC_USE_AGENT_STORE" not in os.environ


def test_an_engine_of_one_process_sees_all_cards(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    processes.show_own_cards(2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"
