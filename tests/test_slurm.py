"""`scripts/slurm/train.sbatch`: a run that outlives its time limit, on a real SLURM of this machine; when it stops."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import slurm
from conftest import reward_rows
from nca_align.store.checkpoints import step_reached, whole_checkpoints
from test_stopping import checkpoint

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "slurm" / "train.sbatch"
LAUNCH = """
distributed_type: MULTI_GPU
use_cpu: true
num_processes: 2
mixed_precision: 'no'
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Run the script here, with stand-ins for SLURM's commands: `start` is what a start of the run does."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, body in {
        "srun": 'echo "$@" > "$RUN/srun"; bash -c "$START"',
        "python": 'eval "${ASKED:-}"; cat "$RUN/step" 2> /dev/null || echo 0',
        "scontrol": 'case "$1 $2" in "show step") [ -e "$RUN/srun" ] ;; "show hostnames") echo here ;; '
        '*) echo "$@" >> "$RUN/requeued" ;; esac',
        "scancel": '[ ! -e "$RUN/srun" ] || echo "$@" >> "$RUN/signalled"',  # without an error where no step is
    }.items():  # fmt: skip
        (commands / name).write_text(f"#!/bin/bash\n{body}\n")
        (commands / name).chmod(0o755)
    run = tmp_path / "run"
    run.mkdir()

    def start(what: str, **variables: str) -> tuple[int, str, bool]:
        """Exit code, what was said, and whether it was queued again."""
        for name in ("requeued", "srun"):
            (run / name).unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", "-c", 'echo $$ > "$RUN/script"; exec bash "$@"', "", str(SCRIPT), str(run), "--max_steps", "9"],
            capture_output=True, text=True, timeout=60, cwd=tmp_path,
            env=os.environ | {
                "PATH": f"{commands}:{os.environ['PATH']}", "START": what, "RUN": str(run), "SLURM_JOB_ID": "7",
                "SLURM_JOB_NODELIST": "here", "HF_DATASETS_CACHE": str(tmp_path / "cache"),
            } | variables,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, (run / "requeued").exists()

    return start


SIGNAL = 'kill -USR1 $(cat "$RUN/script"); '
LIMIT = SIGNAL + 'until grep -q "TERM 7.0" "$RUN/signalled"; do sleep 0.01; done; '
CANCEL = SIGNAL.replace("USR1", "TERM") + "sleep 0.2; "


def test_progress_is_queued_again_whatever_the_exit_code(job):
    for code in (0, 1, 75, 143):
        left, said, again = job(f'echo $(($(cat "$RUN/step" 2> /dev/null || echo 0) + 5)) > "$RUN/step"; exit {code}')
        assert (left, again) == (0, True), said
    assert "The run is at step 20, and not at its end: it is queued again." in said


def test_the_end_is_not_queued_again(job):
    assert job('echo end > "$RUN/step"; exit 1')[::2] == (0, False)
    assert job("exit 2")[::2] == (2, False)  # nothing was left to do
    assert job("exit 0")[::2] == (0, False)


def test_an_error_without_progress_is_not_queued_again(job):
    code, said, again = job("exit 2")
    assert (code, again) == (2, False)
    assert "There is no checkpoint since step 0: it is not queued again." in said
    assert job('echo 5 > "$RUN/step"; exit 1')[2]
    assert job("exit 1")[::2] == (1, False)
    assert job("exit 0")[::2] == (1, False)


def test_the_time_limit_is_a_sigterm_and_without_progress_it_counts(job, tmp_path):
    for _ in range(2):
        code, said, again = job(f"{LIMIT} exit 143")
        assert (code, again) == (0, True), said
        assert "The time limit came before a new checkpoint was there" in said
    assert job(f'{LIMIT} echo 3 > "$RUN/step"; exit 75')[2]  # progress: counted anew
    assert [job(f"{LIMIT} exit 143")[2] for _ in range(3)] == [True, True, False]
    assert (tmp_path / "run" / "signalled").read_text().splitlines()[0] == "--signal=TERM 7.0"


def test_an_idle_start_counts_where_the_run_left_no_folder(job, tmp_path):
    assert job(f'{LIMIT} rm -r "$RUN"; exit 143')[2]
    assert (tmp_path / "run" / ".idle-starts").read_text().count("\n") == 1


def test_a_cancelled_job_is_not_queued_again(job):
    code, said, again = job(f'{CANCEL} echo 5 > "$RUN/step"; exit 75')
    assert (code, again) == (75, False)
    assert "The job was cancelled: it is not queued again. The last whole checkpoint is of step 5." in said


def test_the_limit_itself_is_no_cancellation(job):
    """SLURM sends SIGTERM to the script at the limit too, where a save takes longer."""
    assert job(f'{LIMIT} {CANCEL} echo 5 > "$RUN/step"; exit 143')[2]
    assert job(f"{LIMIT} {CANCEL} exit 143")[2]


def test_a_limit_that_comes_before_the_run_starts_is_not_forgotten(job, tmp_path):
    wait = 'until grep -qs "TERM 7.0" "$RUN/signalled"; do sleep 0.01; done; '
    code, said, again = job(f"{wait} exit 143", ASKED=f"[ -e $RUN/signalled ] || {SIGNAL}")
    assert (code, again) == (0, True), said
    assert "The time limit came before a new checkpoint was there" in said


def test_the_reference_pass_is_progress(job, tmp_path):
    shard = 'mkdir -p "$HF_DATASETS_CACHE/nca_align_reference/key"; touch "$(mktemp -u "$_/XXXXXX.parquet")"; '
    for _ in range(4):
        code, said, again = job(f"{LIMIT} {shard} exit 143")
        assert (code, again) == (0, True), said
        assert "The reference log-probabilities are under way: it is queued again." in said
    assert not job(f"{shard} exit 1")[2]
    assert [job(f"{LIMIT} exit 143")[2] for _ in range(3)] == [True, True, False]


def test_a_lengthened_run_may_reach_the_limit_before_its_first_checkpoint(job, tmp_path):
    (tmp_path / "run" / "step").write_text("end\n")
    assert [job(f"{LIMIT} exit 143")[2] for _ in range(3)] == [True, True, False]


def test_the_launch_file_is_looked_for_and_the_processes_are_told(job, tmp_path):
    code, said, again = job("exit 0", PROCESSES="2", SLURM_NNODES="3")
    assert (code, again) == (2, False)
    assert "ACCELERATE is `configs/accelerate/fsdp2.yaml`, which is not a file seen from" in said
    assert not (tmp_path / "run" / "srun").exists()
    (tmp_path / "own.yaml").touch()
    said = job("exit 0", PROCESSES="2", SLURM_NNODES="3", ACCELERATE="own.yaml")[1]
    assert "Processes: 6, 2 on each of 3 machines." in said
    assert (tmp_path / "run" / "srun").read_text().startswith("--wait=600 ")


def test_how_far_a_run_is(tmp_path):
    assert step_reached(tmp_path / "none") == 0
    checkpoint(tmp_path, 4, model_only=False)
    assert step_reached(tmp_path) == 4
    half = checkpoint(tmp_path, 6, model_only=False)
    (half / "nca_align.json").write_text('{"complete": false}')
    checkpoint(tmp_path, 8, model_only=True)
    assert step_reached(tmp_path) == 4
    (tmp_path / "trainer_state.json").write_text('{"global_step": 3}')  # of an earlier, shorter run
    assert step_reached(tmp_path) == 4
    (tmp_path / "trainer_state.json").write_text('{"global_step": 8}')
    assert step_reached(tmp_path) == "end"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if why := slurm.why_not():
        pytest.skip(why)
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


STAND_IN = """
import os, signal, sys, time
from pathlib import Path

run = Path(sys.argv[sys.argv.index("--output_dir") + 1])
if (run / "checkpoint-4").exists():
    (run / "trainer_state.json").write_text('{"global_step": 4}')
    sys.exit()
(run / "checkpoint-4").mkdir(parents=True)
(run / "checkpoint-4" / "trainer_state.json").write_text("{}")
(run / "checkpoint-4" / "nca_align.json").write_text('{"complete": true}')
if "killed" in run.name:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(300)
"""


@pytest.mark.long
def test_a_killed_run_goes_on_and_a_cancelled_job_stays_so(cluster, tmp_path):
    """What a real SLURM does, with a stand-in for the training."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)

    def submit(name: str) -> str:
        return subprocess.run(
            ["sbatch", "--parsable", "--time=20", f"--output={tmp_path / name}.out", str(SCRIPT), str(tmp_path / name)],
            env=cluster | {"PROGRAM": str(tmp_path / "stand_in.py"), "PROCESSES": "1"}, cwd=tmp_path, check=True,
            capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip

    def wait(job: str, *states: str) -> dict[str, str]:
        until = time.monotonic() + 300
        while (found := slurm.state(cluster, job))["JobState"] not in states:
            assert time.monotonic() < until, found
            time.sleep(0.5)
        return found

    killed = submit("killed")
    assert wait(killed, "COMPLETED", "FAILED", "CANCELLED")["Restarts"] == "1"
    said = (tmp_path / "killed.out").read_text()
    assert "The run is at step 4, and not at its end: it is queued again." in said
    assert "The run has come to its end." in said

    cancelled = submit("cancelled")
    until = time.monotonic() + 120
    while not (tmp_path / "cancelled" / "checkpoint-4" / "nca_align.json").exists():
        assert time.monotonic() < until
        time.sleep(0.2)
    subprocess.run(["scancel", cancelled], env=cluster, check=True)
    assert wait(cancelled, "COMPLETED", "FAILED", "CANCELLED", "PENDING")["JobState"] == "CANCELLED"
    said = (tmp_path / "cancelled.out").read_text()
    assert "The job was cancelled: it is not queued again. The last whole checkpoint is of step 4." in said


@pytest.mark.long
def test_a_run_outlives_its_time_limit_bit_for_bit(cluster, tmp_path, model_dir):
    """Two processes by accelerate, on a real SLURM: signalled before the limit, queued again, and at its end."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, reward_rows(24))))
    (tmp_path / "launch.yaml").write_text(LAUNCH)
    flags = {
        "model_name_or_path": model_dir, "dataset_name": tmp_path / "rows.jsonl", "report_to": "none",
        "bf16": "false", "max_steps": 300, "per_device_train_batch_size": 2, "save_strategy": "no", "use_peft": "true",
        "lora_dropout": 0.1, "validation_fraction": 0, "max_length": 128, "gradient_checkpointing": "false",
        "logging_steps": 10, "show_answers": 0,
    }  # fmt: skip
    argv = [part for name, value in flags.items() for part in (f"--{name}", str(value))]

    def submit(name: str, pace: float, *own: str) -> str:
        environment = cluster | {
            "ACCELERATE": str(tmp_path / "launch.yaml"), "PROGRAM": str(ROOT / "tests" / "paced.py"), "PROCESSES": "2",
            "PACE": str(pace), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        return subprocess.run(
            ["sbatch", "--parsable", "--exclusive", f"--output={tmp_path / name}.out", *own, str(SCRIPT),
             str(tmp_path / name), *argv],
            env=environment, cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip

    def end(job: str, name: str) -> tuple[dict[str, str], str]:
        until = time.monotonic() + 1200
        while (found := slurm.state(cluster, job))["JobState"] in ("PENDING", "RUNNING", "COMPLETING"):
            assert time.monotonic() < until
            time.sleep(1)
        said = (tmp_path / f"{name}.out").read_text()
        assert found["JobState"] == "COMPLETED", said
        return found, said

    cut = submit("cut", 0.7, "--time=4", "--signal=B:USR1@60")
    whole = submit("whole", 0, "--time=60")
    found, said = end(cut, "cut")
    end(whole, "whole")
    stops = re.findall(r"SIGTERM: checkpoint-(\d+) is written", said)
    assert stops
    assert int(found["Restarts"]) == len(stops)
    assert all(0 < int(step) < 300 for step in stops)
    assert said.count("it is queued again") == len(stops)
    assert said.count("The run goes on from") == len(stops)
    assert "The run has come to its end." in said
    assert not whole_checkpoints(tmp_path / "whole")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert {name: value.numpy().tobytes() for name, value in one.items()} == {
        name: value.numpy().tobytes() for name, value in two.items()
    }
