"""What a run shows: one line a log, whole dictionaries for the trackers alone, and plain text without a terminal."""

import fcntl
import io
import json
import logging
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import datasets
import pytest
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from conftest import reward_rows
from nca_align import progress
from nca_align.training.console import Console
from test_trainer import trainer

ROOT = Path(__file__).resolve().parents[1]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Tracker(TrainerCallback):
    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append(dict(logs))


def test_a_log_is_one_line_and_trackers_get_all_of_it(tmp_path, capsys):
    tracker = Tracker()
    nca = trainer(tmp_path, eval_rows=reward_rows(2, seed=5), logging_steps=1, max_steps=3, callbacks=[tracker])
    nca.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    second = [line for line in nca.state.log_history if "loss" in line][1]
    assert len(lines) == 4
    assert "ranking accuracy" not in lines[0]  # before the first update
    for part in (
        "step 2/3", f"loss {second['loss']:.4f}", f"ranking accuracy {second['rewards/accuracies']:.0%}",
        f"log-ratio best {second['logratios/best']:+.2f}", f"worst {second['logratios/worst']:+.2f}", "tokens/s",
        "left",
    ):  # fmt: skip
        assert part in lines[1]
    assert lines[2].endswith("00:00 left")
    evaluated = next(line for line in nca.state.log_history if "eval_loss" in line)
    assert lines[3].startswith("step 3/3  held-out:  loss")
    assert f"ranking accuracy {evaluated['eval_rewards/accuracies']:.0%}" in lines[3]
    assert {"grad_norm", "learning_rate", "rewards/rank_1", "target/entropy"} <= tracker.lines[0].keys()


def test_tokens_a_second_are_of_the_steps_alone(tmp_path, monkeypatch):
    """Evaluations and saves between the steps make no run look slow."""
    clock = [0.0]
    monkeypatch.setattr("nca_align.training.console.time.monotonic", lambda: clock[0])
    console, nca = Console(), trainer(tmp_path, max_steps=4)
    state, of = nca.state, (nca.args, nca.state, nca.control)
    state.max_steps = 4
    console.on_train_begin(*of)
    for step in (1, 2):
        console.on_step_begin(*of)
        clock[0] += 2.0
        state.global_step = step
        console.on_step_end(*of)
        clock[0] += 100.0  # an evaluation
    (line,) = console._lines(state, {"loss": 1.0, "num_tokens": 600})
    assert "150 tokens/s" in line
    assert line.endswith("03:24 left")  # 204 seconds for two steps, and as many left


@pytest.mark.parametrize(("left_out", "over"), [(0, ""), (1, " over 6 of the 7 steps of the run")])
def test_a_mean_loss_that_leaves_steps_out_says_so(left_out, over, tmp_path):
    console, nca = Console(lambda: left_out), trainer(tmp_path)
    nca.state.global_step = 7
    assert console._lines(nca.state, {"train_loss": 2.0, "train_runtime": 61.0}) == [
        f"7 steps in 01:01, mean loss 2.0000{over}"
    ]


def test_several_evaluation_sets_generation_and_a_users_own_log_are_told(tmp_path):
    console, nca = Console(), trainer(tmp_path)
    nca.state.max_steps, nca.state.global_step = 100, 7
    lines = console._lines(nca.state, {"eval_a_loss": 1.0, "eval_a_logratios/best": 0.5, "eval_a_loss/nca": 1.0})
    assert lines == ["step   7/100  a:  loss 1.0000  log-ratio best +0.50"]
    # a mixture of experts has a loss beside
    lines = console._lines(nca.state, {"eval_loss": 1.0, "eval_aux_loss": 2.0, "eval_logratios/best": 0.5})
    assert lines == ["step   7/100  held-out:  loss 1.0000  log-ratio best +0.50"]
    # at β = 0.01 a whole run moves the loss in its fourth digit after the point
    shown = [console._lines(nca.state, {"eval_loss": loss, "eval_logratios/best": 0.0}) for loss in (1.3863, 1.3861)]
    assert shown[0] != shown[1]
    lines = console._lines(nca.state, {"eval_generation/reward": 0.25, "eval_generation/win_rate": 0.625})
    assert lines == ["step   7/100  held-out:  own answers' reward +0.250  win rate 62%"]
    assert console._lines(nca.state, {"mine": 0.123456, "name": "x"}) == ["step   7/100  mine 0.1235  name x"]


def test_where_nothing_moved_nothing_is_ranked(tmp_path):
    console, nca = Console(), trainer(tmp_path)
    logs = {"eval_loss": 1.0, "eval_rewards/accuracies": 0.0, "eval_logratios/best": 0.0, "eval_logratios/worst": 0.0}
    assert "ranking" not in console._lines(nca.state, logs)[0]
    assert "ranking accuracy 0%" in console._lines(nca.state, logs | {"eval_logratios/worst": 0.1})[0]


@pytest.mark.parametrize("disable", [True, False])
def test_it_replaces_transformers_own_and_leaves_a_users(disable, tmp_path):
    theirs = PrinterCallback if disable else ProgressCallback
    kinds = [type(callback) for callback in trainer(tmp_path, disable_tqdm=disable).callback_handler.callbacks]
    assert kinds.count(Console) == 1
    assert theirs not in kinds
    own = theirs()
    assert own in trainer(tmp_path, disable_tqdm=disable, callbacks=[own]).callback_handler.callbacks


def test_without_a_terminal_there_are_no_bars_and_no_control_characters(tmp_path, capfd):
    own = {"disable_tqdm": False, "precompute_ref_log_probs": True, "save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, eval_rows=reward_rows(2, seed=5), **own).train()
    assert (tmp_path / "checkpoint-2").exists()
    output, error = capfd.readouterr()
    assert "step 3/3" in output
    for said in (output, error):
        assert "\r" not in said
        assert "\x1b" not in said
        assert "it/s" not in said
    # what the libraries show elsewhere stays as it was
    assert datasets.is_progress_bar_enabled()
    assert transformers_logging.is_progress_bar_enabled()


def test_a_line_does_not_stick_to_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("sys.stdout", terminal)
    handler = progress.LineHandler()
    with progress.closing_bars():
        bar = progress.bar(3, "step")
        assert not bar.disable
        bar.update()
        progress.print_line("a line")
        handler.emit(logging.LogRecord("x", logging.WARNING, "x", 1, "a notice", None, None))
    shown = terminal.getvalue()
    assert shown.endswith("\n")  # the bar is closed
    for text in ("a line\n", "a notice\n"):
        before = shown[: shown.index(text)]
        assert before.endswith("\r")  # the bar was wiped, and the line begins at the left


@pytest.mark.slow
def test_on_a_terminal_there_is_a_bar_and_every_line_is_whole(model_dir, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, reward_rows(24))))
    flags = {
        "model_name_or_path": model_dir, "dataset_name": tmp_path / "rows.jsonl", "use_cpu": "true", "bf16": "false",
        "report_to": "none", "max_steps": 3, "per_device_train_batch_size": 2, "output_dir": tmp_path / "run",
        "max_length": 128, "collapse_nats": 1e-9, "save_strategy": "no",
    }  # fmt: skip
    arguments = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))  # rows and columns; none by default
    process = subprocess.Popen(
        [sys.executable, "-m", "nca_align", "train", *arguments], stdout=child, stderr=child, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    os.close(child)
    said = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # the other end is closed
            break
        said += part
    assert process.wait() == 0, said.decode()
    shown = said.decode()
    assert "3/3 [" in shown  # the bar
    lines = [line.split("\r")[-1] for line in shown.replace("\r\n", "\n").split("\n")]  # as a terminal leaves them
    assert len([line for line in lines if line.startswith("step ")]) == 4
    assert not [line for line in lines if "it/s]step" in line or ("s/step]" in line and "loss" in line)]
