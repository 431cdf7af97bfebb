"""The same training whatever the launch: one process, DDP, FSDP2, ZeRO-2 and ZeRO-3, and what interferes.

`launched.py` runs many cases in one launch. What they are is a covering array: each pair of options comes together.
"""

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import reward_rows
from launched import FACTORS, PROCESSES
from nca_align.store.checkpoints import whole_checkpoints

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sysconfig.get_path("scripts")  # DeepSpeed looks for ninja on PATH
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu",
    "PATH": f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', '')}",
}  # fmt: skip
TRAIN = {
    "bf16": "false", "use_cpu": "true", "logging_steps": 1, "learning_rate": "2e-3", "save_strategy": "no",
    "report_to": "none", "gradient_checkpointing": "false", "max_length": 128, "beta": 0.1, "alpha": 0.5,
    "num_train_epochs": 1, "eval_strategy": "epoch", "validation_fraction": 0.22, "disable_tqdm": "true",
    "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "lr_scheduler_type": "constant",
    "loss_type": "plackett_luce", "tokens_per_forward": 40, "use_peft": "true", "lora_r": 4,
    "lora_target_modules": "all-linear",
}  # fmt: skip
# Values in the order of FACTORS. NF4 is for whole copies: its packed weights are not sharded here.
WHOLE = (
    ("full", "cached", "padded", 20, "ragged", 17, "plackett_luce"),
    ("full", "live", "prefix_shared", None, "four", 16, "nca"),
    ("lora", "cached", "padded", None, "four", 17, "nca"),
    ("lora", "cached", "prefix_shared", 20, "ragged", 16, "nca"),
    ("lora", "live", "padded", 20, "four", 16, "plackett_luce"),
    ("nf4", "cached", "prefix_shared", None, "ragged", 17, "nca"),
    ("nf4", "live", "padded", None, "four", 17, "plackett_luce"),
    ("nf4", "live", "prefix_shared", 20, "ragged", 16, "plackett_luce"),
)
SHARDED = (
    ("full", "cached", "padded", None, "four", 17, "nca"),
    ("full", "cached", "prefix_shared", 20, "ragged", 16, "nca"),
    ("full", "live", "prefix_shared", 20, "four", 16, "plackett_luce"),
    ("lora", "cached", "prefix_shared", None, "ragged", 16, "plackett_luce"),
    ("lora", "live", "padded", 20, "ragged", 16, "plackett_luce"),
    ("lora", "live", "padded", 20, "ragged", 17, "nca"),
    ("lora", "live", "prefix_shared", None, "four", 17, "plackett_luce"),
)
# Times, and what counts repeated rows too
NOT_COMPARED = (
    "runtime",
    "preparation_time",
    "per_second",
    "total_flos",
    "num_tokens",
    "epoch",
    "step",
    "learning_rate",
)


@pytest.mark.parametrize(("cases", "weights"), [(WHOLE, ("full", "lora", "nf4")), (SHARDED, ("full", "lora"))])
def test_each_pair_of_options_comes_together(cases, weights):
    factors = FACTORS | {"weights": weights}
    for one, other in itertools.combinations(range(len(factors)), 2):
        wanted = set(itertools.product(*(list(factors.values())[i] for i in (one, other))))
        assert {(case[one], case[other]) for case in cases} == wanted


def run(command: list[str], environment: dict[str, str], timeout: int) -> subprocess.CompletedProcess:
    """`command`, ended with all its processes where it hangs."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except BaseException:
        process.terminate()  # torchrun then ends its workers, which are in sessions of their own, within 30 s
        process.communicate(timeout=60)
        raise
    assert process.returncode == 0, errors[-4000:]
    return subprocess.CompletedProcess(command, 0, output, errors)


def torchrun(processes: int) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def same(one: dict[str, float], other: dict[str, float]) -> None:
    """Two log lines: losses to 1e-5, and every metric."""
    names = [name for name in one if not any(part in name for part in NOT_COMPARED)]
    assert set(names) <= set(other)
    for name in names:
        # log-ratios are differences of sums of about 100 nats in fp32
        tolerance = 1e-5 if "loss" in name else 1e-4
        assert other[name] == pytest.approx(one[name], rel=0 if "loss" in name else 1e-5, abs=tolerance), name


# Cases in one launch


@pytest.fixture(scope="module")
def launch(model_dir, tmp_path_factory) -> Callable[[str, tuple], dict[str, tuple[dict, dict]]]:
    """(launch, cases) to the result and the final weights of each case, run once."""

    @cache
    def results(name: str, cases: tuple) -> dict[str, tuple[dict, dict]]:
        folder = tmp_path_factory.mktemp(name)
        named = {" ".join(map(str, case)): dict(zip(FACTORS, case, strict=True)) for case in cases}
        (folder / "cases.json").write_text(json.dumps({"model": model_dir, "launch": name, "cases": named}))
        launcher = [sys.executable] if name == "one" else torchrun(PROCESSES[name])
        command = [*launcher, "tests/launched.py", str(folder / "cases.json"), str(folder)]
        # DeepSpeed compiles for two minutes when it is first used
        run(command, {"HF_DATASETS_CACHE": str(folder / "cache")}, timeout=900)
        return {
            case: (
                json.loads((folder / case / "result.json").read_text()),
                load_file(next((folder / case).glob("*model.safetensors"))),
            )
            for case in named
        }

    return results


def check(alone: dict[str, tuple[dict, dict]], launched: dict[str, tuple[dict, dict]]) -> None:
    assert alone.keys() == launched.keys()
    worst_loss = worst_weight = 0.0
    for case, (result, weights) in alone.items():
        other, other_weights = launched[case]
        losses = [line["loss"] for line in result["log"]]
        assert len(losses) == (4 if " 16 " in case else 6), case
        assert len(set(losses)) == len(losses), case
        if other["before"] is not None:
            assert other["before"]["eval_loss"] == pytest.approx(result["before"]["eval_loss"], abs=1e-5)
        for line, other_line in zip(result["log"], other["log"], strict=True):
            same(line, other_line)
            worst_loss = max(worst_loss, abs(line["loss"] - other_line["loss"]))
        for evaluation in (*result["evaluations"][1:], *other["evaluations"]):  # whatever the batch size
            same(result["evaluations"][0], evaluation)
        assert weights.keys() == other_weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(other_weights[name], value, rtol=1e-5, atol=2e-6)
            worst_weight = max(worst_weight, float((other_weights[name] - value).abs().max()))
    print(f"{len(alone)} cases: losses within {worst_loss:.1e} a step, final weights within {worst_weight:.1e}")


@pytest.mark.slow
def test_ddp_trains_like_one_process(launch):
    check(launch("one", WHOLE), launch("ddp", WHOLE))


@pytest.mark.slow
def test_fsdp2_trains_like_one_process(launch):
    check(launch("one", SHARDED), launch("fsdp2", SHARDED))


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs deepspeed, in an environment of its own: make test-deepspeed",
)
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed_trains_like_one_process(stage, launch):
    check(launch("one", SHARDED), launch(stage, SHARDED))


# The command


def train(output: Path, processes: int, **options) -> tuple[list[dict], dict[str, torch.Tensor]]:
    arguments = [part for name, value in (TRAIN | options).items() for part in (f"--{name}", str(value))]
    command = [*torchrun(processes), "scripts/train.py", "--output_dir", str(output), *arguments]
    finished = run(command, {"HF_DATASETS_CACHE": str(output / "cache")}, timeout=600)
    assert finished.stdout.count("What moved") == 1, "each process told its own story"
    state = json.loads((output / "trainer_state.json").read_text())
    return state["log_history"], load_file(next(output.glob("*model.safetensors")))


@pytest.mark.slow
def test_the_command_on_two_processes_trains_like_on_one(model_dir, tmp_path):
    """19 rows in global batches of 8, and 5 to evaluate: neither last batch divides, and K is ragged."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, reward_rows(24, [4, 2, 3, 5]))))
    options = {"model_name_or_path": model_dir, "dataset_name": rows}
    log, weights = train(tmp_path / "1", 1, gradient_accumulation_steps=4, **options)
    other_log, other_weights = train(tmp_path / "2", 2, gradient_accumulation_steps=2, **options)
    assert len(json.loads((tmp_path / "2" / "validation_indices.json").read_text())) == 5
    assert len({line["loss"] for line in log if "loss" in line}) == 3
    assert any("eval_loss" in line for line in log)
    for line, other_line in zip(log, other_log, strict=True):
        same(line, other_line)
    for name, value in weights.items():  # Adam turns rounding of small gradients into steps
        torch.testing.assert_close(other_weights[name], value, rtol=1e-4, atol=1e-5)


# Ended from outside


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the end of a parent is a signal on Linux alone")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_accelerate_launch_is_a_sigterm_for_the_run(end, model_dir, tmp_path):
    """accelerate passes no signal on: its child would train on, with nobody to stop it."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, reward_rows(24, [4, 2]))))
    output, said = tmp_path / "run", tmp_path / "said.txt"
    own = {
        "model_name_or_path": model_dir, "dataset_name": rows, "output_dir": output, "max_steps": 100_000,
        "num_train_epochs": 100_000, "save_strategy": "steps", "save_steps": 20, "save_total_limit": 1,
        "eval_strategy": "no", "logging_steps": 1000,
    }  # fmt: skip
    flags = [part for name, value in (TRAIN | own).items() for part in (f"--{name}", str(value))]
    launcher = [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no",
    ]  # fmt: skip
    environment = ENVIRONMENT | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    with said.open("w") as file:
        process = subprocess.Popen(
            [*launcher, "scripts/train.py", *flags], cwd=ROOT, env=environment, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
    try:
        assert wait_for(lambda: list(output.glob("checkpoint-*")), 120), said.read_text()[-4000:]
        process.send_signal(end)
        assert process.wait(timeout=30) == -end  # the launcher alone
        assert wait_for(lambda: "goes on from it (exit code 75)" in said.read_text(), 60), said.read_text()[-4000:]
        assert wait_for(lambda: not alive(process.pid), 60), "the run trains on"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    step = max(whole_checkpoints(output))
    assert f"SIGTERM: checkpoint-{step} is written" in said.read_text()


def alive(group: int) -> bool:
    """Whether any process of a group is left that is no zombie: who adopted it may not have looked yet."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, _, own = path.read_text().rpartition(")")[2].split()[:3]
            if int(own) == group and state != "Z":
                return True
    return False


def wait_for(ready: Callable[[], object], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True
