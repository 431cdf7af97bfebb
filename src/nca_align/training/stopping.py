"""SIGTERM and Ctrl-C: they leave a note, which the processes exchange once a step, and a step is never cut."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy
from functools import partial
from multiprocessing import context, popen_fork, popen_spawn_posix
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from ..config import NCAConfig
from ..store.checkpoints import how_to_go_on

# What a process exits with that was stopped after it had saved: "try again" in BSD's sysexits.h, and 128 + SIGINT.
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
PREEMPTED = EXIT_CODES[signal.SIGTERM]
# A parent ends a worker by this signal. A SIGTERM would merge with one that waits already. macOS lacks it.
_END: Any = getattr(signal, "SIGRTMIN", None)
_PATIENCE = 5.0  # seconds that a worker has to end by itself, as in PyTorch
_CLEAR_LINE = "\r\x1b[K"
_NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class StopSignals:
    """The signals that ask a run to stop."""

    def __init__(self) -> None:
        self._had: signal.Signals | None = None  # the first one that this process had
        self.stopping = False  # all processes have agreed to stop

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self._had is not None

    @property
    def name(self) -> str:
        """What stops the run, in words; where another process alone had it, it is what schedulers send."""
        return _NAMES[self._had or signal.SIGTERM]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self._had or signal.SIGTERM]

    def agree(self) -> bool:
        """Whether any process was asked to stop; all processes come here together."""
        self.stopping = self.stopping or any(gather_object([self.asked]))
        return self.stopping

    @contextmanager
    def noted(self, *numbers: signal.Signals, then: str = "") -> Iterator[None]:
        """Within it the signals `numbers` only leave a note; a Ctrl-C after that is a KeyboardInterrupt.

        Args:
            then: what is said at once on Ctrl-C; after SIGTERM nobody sits there who would press it again.
        """
        self._had, self.stopping = None, False
        if threading.current_thread() is not threading.main_thread():  # Python has signals in that one alone
            yield
            return
        speaks = PartialState().is_main_process

        def note(number: int, frame: Any) -> None:
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._had = self._had or signal.Signals(number)
            if number == signal.SIGINT and speaks:  # print may be in the midst of another line
                # on a terminal it clears the bar that it stands on
                os.write(2, f"{_CLEAR_LINE * sys.stderr.isatty()}Ctrl-C: {then}\n".encode())

        # a shell has told the jobs in its background to ignore Ctrl-C, which is meant for another one
        heard = [n for n in numbers if n != signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
        before = {number: signal.signal(number, note) for number in heard}
        try:
            yield
        finally:
            # Once a process has gone, torchrun sends SIGTERM to the others, which are on their way
            leaving = self.stopping and PartialState().num_processes > 1
            for number, handler in before.items():  # None: not from Python
                signal.signal(number, signal.SIG_IGN if leaving else handler or signal.SIG_DFL)


def follow_launcher() -> None:
    """Where `accelerate launch` started this process, its end is a SIGTERM here: it passes on none (accelerate 1.15).

    Not elsewhere: a run of `nohup` outlives its shell.
    """
    if sys.platform == "linux" and "ACCELERATE_DYNAMO_MODE" in os.environ:
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG


def spare_workers(loader: Any) -> Any:
    """`loader`, whose worker processes go on where a signal to stop reaches them too, so that the step can end.

    torchrun, a terminal and SLURM signal a process with all of its children. Programs that a worker starts block the
    signals too. Workers are spawned where a fork server would fork them. A server that was started with the signals
    blocked would pass that on to every process that it forks.
    """
    own = getattr(loader, "base_dataloader", loader)  # within accelerate's
    own.worker_init_fn = partial(_work_on, own.worker_init_fn)
    if _END and own.num_workers:
        given = own.multiprocessing_context or multiprocessing
        forks = given.get_start_method() == "fork"
        spared = copy(multiprocessing.get_context("fork" if forks else "spawn"))
        spared.Process = _Forked if forks else _Spawned  # type: ignore[attr-defined]
        own.multiprocessing_context = spared
    return loader


class _Spared(BaseProcess):
    """A worker that blocks the signals from its first moment on, in all of its threads, which inherit that.

    A signal to a process goes to any thread that doesn't block it. A worker may have such threads before its
    `worker_init_fn` runs: PyTorch starts some where `torch.set_num_threads` was called before the fork.
    """

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {*EXIT_CODES, _END})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Ended(popen_fork.Popen):
    def terminate(self) -> None:
        """End a worker that is left, for PyTorch and Python; one that is stuck is killed."""
        for number in (_END, signal.SIGKILL):
            with suppress(RuntimeError):  # PyTorch raises it on each SIGCHLD until a worker that was killed is reaped
                self._send_signal(number)  # type: ignore[attr-defined]
                if self.wait(_PATIENCE) is not None:
                    return
        self.poll()


class _SpawnedEnded(_Ended, popen_spawn_posix.Popen): ...


class _Forked(_Spared, context.ForkProcess):
    _Popen: Any = _Ended


class _Spawned(_Spared, context.SpawnProcess):
    _Popen: Any = _SpawnedEnded


def _work_on(own: Callable[[int], Any] | None, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _END:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, _END})  # Python's resource tracker unblocks some
        threading.Thread(target=_end_with_the_parent, daemon=True).start()
    if own is not None:
        own(worker)


def _end_with_the_parent() -> None:
    """End once the parent is gone or has sent `_END`."""
    parent = multiprocessing.parent_process()
    while parent is not None and parent.is_alive():
        if signal.sigtimedwait({_END}, 5):
            break
    os._exit(0)


def what_is_left(args: NCAConfig, began: float) -> str:
    """What a run that was cut off leaves, in words: its model, its last checkpoint, or what came before its first step.

    Args:
        args: of the run.
        began: when it did, in seconds since the epoch.
    """
    folder = Path(str(args.output_dir))
    state = folder / "trainer_state.json"  # is written after the model
    if state.exists() and state.stat().st_mtime >= began:
        return f"the trained model is in {folder}"
    left = how_to_go_on(folder) or f"{folder} holds no checkpoint to go on from, and the same command begins anew"
    kept = "; finished shards of the reference log-probabilities stay" if args.precompute_ref_log_probs else ""
    return left + kept
