"""`scripts/rounds.sh`: what it calls, and two rounds on the tiny model, killed in the middle and started again."""

import fcntl
import itertools
import json
import os
import re
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest

from nca_align.store.checkpoints import whole_checkpoints

ROOT = Path(__file__).resolve().parents[1]
TRAINING = [
    "--max_steps", "20", "--save_strategy", "steps", "--save_steps", "1", "--learning_rate", "1e-2",
    "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1", "--lora_target_modules", "q_proj",
]  # fmt: skip
SCORER = "def length(completions, **kwargs): return [len(c[0]['content']) / 10 for c in completions]\n"


@pytest.fixture(scope="module")
def rounds(model_dir, tmp_path_factory):
    """Start the script in a folder of its own name; keywords are its variables."""
    folder = tmp_path_factory.mktemp("rounds")
    (folder / "rounds_scorer.py").write_text(SCORER)
    (folder / "prompts.txt").write_text("Hi\nWhat is the best way?\nThe weather?\nTell me about the dog.\n")
    environment = os.environ | {
        "MODEL": model_dir, "PROMPTS": str(folder / "prompts.txt"), "HELD_OUT": str(folder / "prompts.txt"),
        "SCORER": "rounds_scorer:length", "ROUNDS": "2", "K": "3", "TOKENS": "8", "PYTHONPATH": str(folder),
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "cache"),
        "PATH": f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}",  # of this environment, active or not
    }  # fmt: skip

    def start(name: str, *flags: str, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "rounds.sh"), *TRAINING, *flags],
            env=environment | {"OUT": str(folder / name)} | variables,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    return folder, start


# Stands for `nca-align` and `accelerate`: notes its arguments, and leaves what the real one would.
STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >> "$CALLS"
while [ $# -gt 0 ]; do
    case $1 in
        --output) touch "$2" ;;
        --output_dir) mkdir -p "$2"; touch "$2/trainer_state.json" ;;
    esac
    shift
done
"""


@pytest.fixture
def calls(rounds, tmp_path):
    """Run the script with stand-ins for the commands; gives the arguments of each call, by their names."""
    for name in ("nca-align", "accelerate"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)

    def run(out: str, *flags: str, **variables: str) -> list[dict[str, str]]:
        noted = tmp_path / "calls"
        noted.write_text("")
        path = f"{tmp_path}:{os.environ['PATH']}"
        finish(rounds[1](out, *flags, PATH=path, CALLS=str(noted), MODEL="base", **variables))
        lines = [line.split() for line in noted.read_text().splitlines()]
        return [{"command": line[1]} | dict(itertools.pairwise(line[2:])) for line in lines]

    return run


@pytest.mark.parametrize("reference", ["first", "moving"])
def test_each_policy_samples_for_the_next(calls, reference, tmp_path):
    out = tmp_path / "out"
    seen = calls(str(out), "--learning_rate", "7", REFERENCE=reference, ROUNDS="3")
    train = [call for call in seen if call["command"] == "launch"]
    policies = ["base", *(f"{out}/round-{n}" for n in (1, 2, 3))]
    assert [call["--output_dir"] for call in train] == policies[1:]
    starts = policies[:3] if reference == "moving" else ["base"] * 3
    assert [call["--model_name_or_path"] for call in train] == starts
    assert [call["--dataset_name"] for call in train] == [f"{out}/samples-{n}.jsonl" for n in (1, 2, 3)]
    assert {call["--learning_rate"] for call in train} == {"7"}
    drawn = {call["--output"]: call["--model_name_or_path"] for call in seen if call["command"] == "sample"}
    assert drawn == (
        {f"{out}/samples-{n}.parquet": policies[n - 1] for n in (1, 2, 3)}
        | {f"{out}/held-out-{n}.parquet": policies[n] for n in range(4)}
    )
    last = seen[-1]
    assert (last["command"], last["--model_name_or_path"], last["--reference"]) == ("evaluate", policies[3], "base")


def test_a_finished_training_is_skipped_and_half_a_checkpoint_goes(calls, tmp_path):
    out = tmp_path / "out"
    for folder in ("round-1/checkpoint-5", "round-2/checkpoint-5", "round-2/checkpoint-6"):
        (out / folder).mkdir(parents=True)
    for file in ("round-1/trainer_state.json", "round-2/checkpoint-5/trainer_state.json"):
        (out / file).touch()
    train = [call for call in calls(str(out)) if call["command"] == "launch"]
    assert [call["--output_dir"] for call in train] == [f"{out}/round-2"]
    assert train[0]["--resume_from_checkpoint"] == "true"
    assert sorted(path.name for path in (out / "round-2").glob("checkpoint-*")) == ["checkpoint-5"]
    assert (out / "round-1" / "checkpoint-5").exists()


def finish(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said[-3000:]
    return said


def table(said: str) -> list[str]:
    """The last table that was printed."""
    lines = said.splitlines()
    return lines[max(i for i, line in enumerate(lines) if line.startswith("policy ")) :]


@pytest.fixture(scope="module")
def whole(rounds) -> tuple[Path, list[str]]:
    """Two rounds without interruption: their folder and table."""
    folder, start = rounds
    said = finish(start("whole"))
    assert "round-2 holds no checkpoint" in said
    return folder / "whole", table(said)


@pytest.mark.slow
def test_two_rounds_end_in_a_table(whole):
    folder, lines = whole
    assert [line.split()[0] for line in lines[2:4]] == ["round-1", "round-2"]
    assert "0.00 ± 0.00" in lines[1]
    rows = list(json.loads((folder / "table.json").read_text()).values())
    assert [row["completions"] for row in rows] == [12, 12, 12]
    assert rows[0]["kl"] == [0, 0]
    assert len({tuple(row["reward"]) for row in rows}) == 3
    first, second = ((folder / f"samples-{n}.jsonl").read_text() for n in (1, 2))
    assert first != second


@pytest.mark.slow
def test_killed_in_the_middle_of_training_and_started_again(whole, rounds):
    folder, start = rounds
    process, run = start("killed", ROUNDS="1"), folder / "killed" / "round-1"
    while not whole_checkpoints(run):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (run / "trainer_state.json").exists()
    (run / "checkpoint-999").mkdir()  # as a kill leaves it that comes while a checkpoint is written
    said = finish(start("killed", ROUNDS="1"))
    assert "round-1 holds no checkpoint" not in said
    steps = [line["step"] for line in json.loads((run / "trainer_state.json").read_text())["log_history"]]
    assert steps[-1] == 20
    of_all = [line.split() for line in whole[1]]
    assert [line.split() for line in table(said)][:3] == of_all[:3]
    assert of_all[2][0] == "round-1"


@pytest.mark.slow
def test_another_run_in_the_folder_is_refused(rounds):
    folder, start = rounds
    (folder / "busy").mkdir()
    with open(folder / "busy" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start("busy")
        assert re.search(r"another run is at work in \S+busy; wait for it", process.communicate(timeout=600)[0])
    assert process.returncode == 1


def test_an_unknown_reference_is_refused(rounds):
    process = rounds[1]("unknown", REFERENCE="last")
    assert "REFERENCE is last; it must be first or moving" in process.communicate(timeout=600)[0]
    assert process.returncode == 2
