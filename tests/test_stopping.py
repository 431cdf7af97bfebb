"""Ctrl-C: the first one saves at the end of the step, a second one stops at once, and the last words are true."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from itertools import islice
from multiprocessing.popen_fork import Popen
from pathlib import Path
from threading import Event, Thread, Timer, main_thread

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback

from conftest import reward_rows
from nca_align import NCAConfig, NCATrainer
from nca_align.commands.train import command
from nca_align.commands.train.checks import checkpoint_to_go_on_from
from nca_align.commands.train.command import main
from nca_align.errors import UserError
from nca_align.store.checkpoints import whole_checkpoints
from nca_align.training import reference_cache, stopping
from nca_align.training.stopping import StopSignals, spare_workers, what_is_left
from signalled import NEVER, start_training
from test_resume import finish
from test_trainer import trainer


def interrupt(times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGINT)


class At(TrainerCallback):
    """Ctrl-C, once or several times, at the first such event of a step."""

    def __init__(self, event: str, step: int, times: int):
        self._left = 1

        def act(args, state, control, **kwargs):
            if state.global_step == step and self._left:
                self._left -= 1
                interrupt(times)

        setattr(self, event, act)


@pytest.fixture
def command_of(model_dir, tmp_path, monkeypatch):
    """Run `nca-align train` here, with options and with callbacks; its exit code."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, reward_rows(12))))
    options = {
        "model_name_or_path": model_dir, "dataset_name": tmp_path / "rows.jsonl", "use_cpu": "true", "bf16": "false",
        "report_to": "none", "max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "no",
        "output_dir": tmp_path / "run", "validation_fraction": 0.25, "max_length": 128, "disable_tqdm": "true",
        "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1,
    }  # fmt: skip
    own, callbacks = NCATrainer.__init__, []

    def with_callbacks(self, *args, **kwargs):
        own(self, *args, **kwargs)
        for callback in callbacks:
            self.add_callback(callback)

    monkeypatch.setattr(NCATrainer, "__init__", with_callbacks)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def run(*added, **changed) -> int:
        callbacks[:] = added
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return main([part for key, value in (options | changed).items() for part in (f"--{key}", str(value))])
        except SystemExit as left:
            return left.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    return run


def test_the_first_one_saves_and_the_run_goes_on_from_there(command_of, tmp_path, capfd, caplog):
    assert command_of(At("on_step_begin", 1, 1)) == 130
    error, output = capfd.readouterr().err, caplog.text
    assert "Ctrl-C: the run saves at the end of this step and stops; press it again to stop at once" in error
    assert (
        f"Ctrl-C: checkpoint-2 is written in {tmp_path / 'run'}, and `resume_from_checkpoint: true` goes on" in output
    )
    assert "(exit code 130)" in output
    assert list(whole_checkpoints(tmp_path / "run")) == [2]
    assert command_of(resume_from_checkpoint="true") == 0
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in log if "eval_loss" in line] == [2, 4]


def test_the_loaders_workers_go_on_and_end_with_their_parent(command_of, patient, tmp_path, caplog):
    """torchrun, a terminal and SLURM signal all processes of the run, not Python's parent of the workers."""
    workers = []

    class OfAll(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                workers.extend(multiprocessing.active_children())
                assert len(workers) == 2  # and no process that an earlier test left
                signal_from_outside(*(worker.pid for worker in workers))
                os.kill(os.getpid(), signal.SIGTERM)

    more = {"eval_strategy": "no", "dataloader_num_workers": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 9}
    assert command_of(OfAll(), max_steps=-1, per_device_train_batch_size=1, **more) == 75
    assert list(whole_checkpoints(tmp_path / "run")) == [2]
    for worker in workers:
        worker.terminate()  # as PyTorch and Python end one that is left
        worker.join(60)
        assert worker.exitcode == 0


def signal_from_outside(*processes: int) -> None:
    for name in ("-INT", "-TERM"):
        subprocess.run(["kill", name, *map(str, processes)], check=True)


class SignalledWhenRead(Dataset):
    """Each item is read in a worker that was signalled just before."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        signal_from_outside(os.getpid())
        return index


@pytest.fixture
def patient(monkeypatch):
    """A worker has a minute to end by itself."""
    monkeypatch.setattr(stopping, "_PATIENCE", 60.0)


def check_worker(start_method: str) -> None:
    loader = spare_workers(DataLoader(SignalledWhenRead(), num_workers=1, multiprocessing_context=start_method))
    batches = iter(loader)
    (worker,) = batches._workers
    signal_from_outside(worker.pid)
    assert torch.cat(list(islice(batches, 5))).tolist() == [0, 1, 2, 3, 4]
    os.kill(worker.pid, signal.SIGSTOP)  # so that the next two signals wait there together
    os.waitid(os.P_PID, worker.pid, os.WSTOPPED)
    signal_from_outside(worker.pid)
    Timer(1, os.kill, (worker.pid, signal.SIGCONT)).start()
    worker._popen.terminate()  # as Python's exit does, and PyTorch by `Process.terminate`
    worker.join(60)
    assert worker.exitcode == 0


def test_a_worker_goes_on_from_its_first_moment_on(patient, monkeypatch):
    """Before its `worker_init_fn` it may have threads already, and a signal goes to any that doesn't block it."""
    starts, own = Popen._launch, torch.set_num_threads

    def launch(self, process):
        starts(self, process)
        signal_from_outside(self.pid)

    def early_thread(number):  # the first that PyTorch's worker loop does after its handlers are set
        Thread(target=Event().wait, daemon=True).start()
        signal_from_outside(os.getpid())
        own(number)

    monkeypatch.setattr(Popen, "_launch", launch)
    monkeypatch.setattr(torch, "set_num_threads", early_thread)
    check_worker("fork")


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_so_it_does_however_it_was_started(start_method, patient):
    check_worker(start_method)
    other = multiprocessing.get_context(start_method).Process(target=time.sleep, args=(1000,))
    other.start()
    other.terminate()  # the fork server, which such a worker would have launched, blocks no signals
    other.join(60)
    assert other.exitcode == -signal.SIGTERM


def test_stuck_workers_are_killed(monkeypatch):
    """Each of them, though PyTorch raises an error for one that was killed."""
    monkeypatch.setattr(stopping, "_PATIENCE", 0.5)
    batches = iter(spare_workers(DataLoader(SignalledWhenRead(), num_workers=2, multiprocessing_context="fork")))
    for worker in batches._workers:
        os.kill(worker.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, worker.pid, os.WSTOPPED)
    for worker in batches._workers:
        worker._popen.terminate()
    assert [worker.exitcode for worker in batches._workers] == [-signal.SIGKILL] * 2


def test_a_worker_can_be_ended_where_ctrl_c_came_while_it_started(patient, monkeypatch):
    starts = Popen._launch

    def launch(self, process):
        starts(self, process)
        signal.pthread_kill(main_thread().ident, signal.SIGINT)  # to that one, which blocks it

    monkeypatch.setattr(Popen, "_launch", launch)
    loader = spare_workers(DataLoader(SignalledWhenRead(), num_workers=1, multiprocessing_context="fork"))
    with pytest.raises(KeyboardInterrupt):
        iter(loader)
    (worker,) = multiprocessing.active_children()
    worker._popen.terminate()
    worker.join(60)
    assert worker.exitcode == 0


@pytest.mark.parametrize(
    ("event", "step", "checkpoints"),
    [("on_step_begin", 1, []), ("on_prediction_step", 2, []), ("on_train_begin", 0, []), ("on_step_begin", 3, [2])],
)
def test_a_second_one_stops_at_once_and_promises_no_checkpoint_that_is_not_there(
    event, step, checkpoints, command_of, tmp_path, capfd
):
    saves = {"save_strategy": "steps", "save_steps": 2} if checkpoints else {}
    assert command_of(At(event, step, 2), **saves) == 130
    said = capfd.readouterr().err
    assert list(whole_checkpoints(tmp_path / "run")) == checkpoints
    words = f"{tmp_path / 'run'} holds no checkpoint to go on from, and the same command begins anew"
    if checkpoints:
        words = (
            "checkpoint-2 is the last checkpoint: the same command with `resume_from_checkpoint: true` goes on from it"
        )
    assert said.rstrip().endswith(words)
    assert "nca-align train: interrupted; " in said


def checkpoint(folder: Path, step: int, model_only: bool) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text("{}")
    (path / "nca_align.json").write_text(json.dumps({"complete": True, "model_only": model_only}))
    return path


@pytest.mark.parametrize(
    ("model_only", "words"),
    [
        (
            [True, True],
            "{1} holds weights alone; give another `output_dir`, with `model_name_or_path: {1}` to train on",
        ),
        ([False, True], "{0} is the last checkpoint: the same command with `resume_from_checkpoint: {0}` goes on"),
        ([True, False], "{1} is the last checkpoint: the same command with `resume_from_checkpoint: true` goes on"),
    ],
)
def test_weights_alone_are_nothing_to_go_on_from(model_only, words, tmp_path):
    """Said alike when the run is cut off, and when the same command is given again."""
    paths = [checkpoint(tmp_path, step, only) for step, only in zip((2, 4), model_only, strict=True)]
    args = NCAConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert words.format(*paths) in what_is_left(args, time.time())
    with pytest.raises(UserError, match=r"holds checkpoints of an earlier run \(checkpoint-4\)") as refused:
        checkpoint_to_go_on_from(args)
    assert words.format(*paths) in str(refused.value)


@pytest.mark.parametrize("stops", [False, True])
def test_signals_are_as_before_once_a_single_process_stops(stops):
    """A caller may catch SystemExit, and do more."""
    signals, numbers = StopSignals(), (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        with suppress(SystemExit), signals.noted(*numbers):
            assert [signal.getsignal(number) for number in numbers] != before
            signals.stopping = stops
            raise SystemExit(75)
        assert [signal.getsignal(number) for number in numbers] == before
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_a_handler_that_is_not_pythons_is_replaced_by_the_default(monkeypatch):
    own = signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: own(number, handler) and None)
    with StopSignals().noted(signal.SIGUSR1):
        pass
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_during_an_evaluation_it_is_cut_and_owed(command_of, tmp_path, capfd, caplog):
    assert command_of(At("on_prediction_step", 2, 1)) == 130
    assert "Ctrl-C: checkpoint-2 is written" in caplog.text
    assert command_of(resume_from_checkpoint="true") == 0
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in log if "eval_loss" in line] == [2, 4]


def test_before_the_first_step_nothing_is_saved_and_nothing_promised(command_of, tmp_path, capfd, caplog):
    assert command_of(At("on_prediction_step", 0, 1), eval_on_start="true") == 130
    assert "Ctrl-C: no step was done yet, and nothing is lost (exit code 130)" in caplog.text
    assert not whole_checkpoints(tmp_path / "run")


@pytest.mark.parametrize("times", [1, 2])
def test_during_a_save(times, command_of, tmp_path, capfd, caplog, monkeypatch):
    """The first one lets it end, and the run stops there; after the second it is no checkpoint."""
    own, calls = Trainer._save_optimizer_and_scheduler, []

    def save(self, *args):
        if not calls:
            interrupt(times)
        calls.append(args)
        return own(self, *args)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", save)
    assert command_of(save_strategy="steps", save_steps=2, eval_strategy="no") == 130
    assert list(whole_checkpoints(tmp_path / "run")) == ([2] if times == 1 else [])
    if times == 1:
        assert "Ctrl-C: checkpoint-2 is written" in caplog.text
    else:
        assert "holds no checkpoint to go on from" in capfd.readouterr().err


def test_in_the_reference_pass_finished_shards_stay(command_of, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(reference_cache, "ROWS_PER_SHARD", 4)
    own = reference_cache.ReferenceCache.write

    def write(self, *args):
        own(self, *args)
        interrupt()

    monkeypatch.setattr(reference_cache.ReferenceCache, "write", write)
    assert command_of(precompute_ref_log_probs="true") == 130
    assert "begins anew; finished shards of the reference log-probabilities stay" in capfd.readouterr().err
    assert len(list((tmp_path / "cache").rglob("*.parquet"))) == 1


def test_while_the_model_is_saved_that_ends_first(command_of, tmp_path, capfd, monkeypatch):
    own = command._save

    def save(*args):
        interrupt()
        own(*args)

    monkeypatch.setattr(command, "_save", save)
    assert command_of() == 130
    error = capfd.readouterr().err
    assert "Ctrl-C: the run stops once its model is saved" in error
    assert f"nca-align train: interrupted; the trained model is in {tmp_path / 'run'}" in error
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_in_python_it_stays_a_keyboard_interrupt(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    nca = trainer(tmp_path, callbacks=[At("on_step_begin", 1, 1)])
    with pytest.raises(KeyboardInterrupt):
        nca.train()
    assert signal.getsignal(signal.SIGINT) is handler
    assert not whole_checkpoints(tmp_path)


@pytest.mark.slow
def test_a_job_in_the_background_goes_on_ignoring_ctrl_c(tmp_path, monkeypatch):
    """A shell without job control starts it so: the Ctrl-C is meant for what runs in front."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        nca = trainer(tmp_path, callbacks=[At("on_step_begin", 1, 1)], max_steps=2)
        nca.saves_on_interrupt = True
        nca.train()
        assert nca.state.global_step == 2
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def launch(model_dir, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, reward_rows(12))))
    options = {
        "model_name_or_path": model_dir, "dataset_name": tmp_path / "rows.jsonl", "use_cpu": "true", "bf16": "false",
        "report_to": "none", "num_train_epochs": 12, "per_device_train_batch_size": 1, "save_strategy": "no",
        "output_dir": tmp_path / "run", "validation_fraction": 0, "max_length": 128, "resume_from_checkpoint": "true",
        "gradient_checkpointing": "false",
    }  # fmt: skip

    def start(processes: int = 0, interrupt: str = NEVER, **own) -> subprocess.Popen:
        return start_training(options | own, processes, signal.SIGINT, interrupt)

    return start


@pytest.mark.slow
@pytest.mark.parametrize(("times", "ends_with"), [(1, "(exit code 130)."), (2, "the same command begins anew")])
def test_a_process_exits_with_130_without_a_traceback(times, ends_with, launch, tmp_path):
    said = finish(launch(interrupt=f"0 5 {times}"), code=130)
    assert said.rstrip().endswith(ends_with)
    assert "Traceback" not in said
    assert list(whole_checkpoints(tmp_path / "run")) == ([6] if times == 1 else [])


@pytest.mark.slow
def test_one_of_two_processes_stops_both_at_the_same_step(launch, tmp_path):
    said = finish(launch(2, interrupt="1 5 1"), code=1)
    assert said.count("checkpoint-6 is written") == 1
    assert re.search(r"exitcode\s*: 130", said)
    assert list(whole_checkpoints(tmp_path / "run")) == [6]
    finish(launch(2))
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 72


@pytest.mark.slow
def test_ctrl_c_of_torchrun_is_passed_on_and_all_save(launch, tmp_path):
    """As from a terminal: the launcher alone gets it, since its processes are in sessions of their own."""
    process = launch(2, num_train_epochs=10_000, logging_steps=1)
    for line in process.stdout:
        if "step " in line and "loss" in line:
            break
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=600)[0]
    assert "Ctrl-C: the run saves at the end of this step" in said
    (step,) = whole_checkpoints(tmp_path / "run")
    assert f"Ctrl-C: checkpoint-{step} is written" in said
