"""Stop at any moment, and go on exactly: what a checkpoint needs beside transformers' own files, and how it stops.

A checkpoint of transformers holds weights, optimizer, random states and the log. To go on *exactly* a run also needs
what was summed up since its last log line, an evaluation that was cut off, and to know whose checkpoint it is:
`nca_align.json` in it holds these.
"""

import functools
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from ..errors import UnsupportedError, UserError, notify
from ..progress import close_bars
from ..store.checkpoints import (
    MANIFEST,
    explain_read_errors,
    explain_write_errors,
    find_checkpoint,
    read_manifest,
    remove_half_written,
    whole_checkpoints,
)
from ..store.files import sync, write_json
from . import adapters, moving_reference
from .row_weights import begin_epoch
from .run_identity import refuse_another_run, run_identity
from .stopping import StopSignals


def reads_checkpoint(method: Callable) -> Callable:
    """Decorates a method of the trainer by which transformers reads the checkpoint that a run goes on from."""

    @functools.wraps(method)
    def explained(trainer: Any, *args, **kwargs):
        with explain_read_errors(trainer._resume.folder, trainer.args.output_dir):
            return method(trainer, *args, **kwargs)

    return explained


class EvaluationInterrupted(Exception):
    """SIGTERM or Ctrl-C came during an evaluation, which is done anew after the run is resumed."""


class Resume(TrainerCallback):
    """What a trainer does with its checkpoints, and when it is stopped: its callback, which its own calls go to.

    Args:
        trainer: an NCATrainer. Used of it are its arguments, state, accelerator, model and training rows, what it and
            transformers have summed up for the next log line (`_log`, `_guard`, `_tr_loss` …), and `_save_checkpoint`.
    """

    def __init__(self, trainer: Trainer):
        self.trainer: Any = trainer
        self.stop = StopSignals()
        self.owes_evaluation = False
        self.steps_without_loss = 0  # that don't count in the mean loss of the run
        self._deferred = False
        self._identity: dict[str, Any] | None = None
        self.folder: Path | None = None  # the checkpoint that the run goes on from
        self._loaded: dict[str, Any] = {}  # its manifest
        self._steps_planned = 0  # by the run that wrote it
        trainer.add_callback(self)

    # Finding a checkpoint

    def find(self, wanted: str | os.PathLike | bool | None) -> str | None:
        """The checkpoint that `train(resume_from_checkpoint=wanted)` goes on from.

        Raises:
            UserError: see `find_checkpoint`, or it can't be read or belongs to another run.
        """
        self.folder, self._loaded = None, {}
        args, model = self.trainer.args, self.trainer.accelerator.unwrap_model(self.trainer.model)
        why_not = adapters.why_not_resumed(model) or moving_reference.why_not_resumed(self.trainer)
        if wanted is None or wanted is False:
            if why_not is not None and args.save_strategy != "no":
                notify(f"No checkpoint of this run can be resumed: {why_not}.")
            return None
        self.folder = folder = find_checkpoint(wanted, args.output_dir)
        if why_not is not None:
            raise UnsupportedError(f"{folder} can't be resumed: {why_not}; start the run anew")
        self._loaded = read_manifest(folder)
        # transformers reads it too, but where an error of this file could be any other
        with explain_read_errors(folder, args.output_dir):
            self._steps_planned = TrainerState.load_from_json(str(folder / "trainer_state.json")).max_steps
        moving_reference.require_reference(self.trainer, folder)
        self._refuse_another_run(folder)
        PartialState().wait_for_everyone()  # before a process removes what another may be looking at
        if args.should_save:
            remove_half_written(args.output_dir)
        notify(f"The run goes on from {folder}.")
        return str(folder)

    def _refuse_another_run(self, folder: Path) -> None:
        if "identity" not in self._loaded:
            notify(f"{folder} has no {MANIFEST}: whether it belongs to this run, and all of its sums, can't be known.")
            return
        refusal: list[str | None] = [None]
        if PartialState().is_main_process:  # processes hold different shards, and only need to agree
            try:
                new, args = self.run_identity(), self.trainer.args
                refuse_another_run(self._loaded["identity"], new, args.resume_changed, folder.name)
            except UserError as error:
                refusal = [str(error)]
        broadcast_object_list(refusal, from_process=0)
        if refusal[0] is not None:
            raise UserError(refusal[0])

    def run_identity(self) -> dict[str, Any]:
        """`run_identity` of the trainer, by the main process alone: computed once, with its β of now."""
        if self._identity is None:
            t = self.trainer
            model = t.accelerator.unwrap_model(t.model)
            reference = t._reference_hash if t._reference_given else None
            processes = t.accelerator.num_processes
            self._identity = run_identity(t.args, model, t.train_dataset, processes, t._start, reference)
            self._identity |= t.reward_options or {}
        return self._identity | {"beta": self.trainer.beta}

    def position(self, max_steps: int, epochs: int, epochs_done: int, batches_done: int) -> tuple[int, int]:
        """The epochs that a resumed run has behind it, and the batches of its own that it has of the next one.

        transformers would add a step to a run that has all of its steps, and takes a stream's passes for one.
        """
        state, args = self.trainer.state, self.trainer.args
        state.compute_steps(args, max_steps)  # as given now, and not as in the checkpoint
        if state.global_step >= max_steps:
            return epochs, batches_done
        if isinstance(self.trainer.train_dataset, IterableDataset) and not args.ignore_data_skip:
            # There the epoch is the passes before this one, and this one's steps over all of the run's
            epochs_done = math.ceil(state.epoch) - 1
            batches_done = round((state.epoch - epochs_done) * self._steps_planned) * args.gradient_accumulation_steps
        return epochs_done, batches_done

    # Saving

    @contextmanager
    def saving(self, output: Path) -> Iterator[None]:
        """Around transformers' writing of a checkpoint: it is whole or recognised, and older ones go after that."""
        trainer, args = self.trainer, self.trainer.args
        folder = output / f"checkpoint-{trainer.state.global_step}"
        limit, args.save_total_limit = args.save_total_limit, None  # not before the new one is whole
        model_only = args.save_only_model
        args.save_only_model = model_only and not self.stop.stopping  # what a stop leaves is to be gone on from
        try:
            with explain_write_errors(folder.name, folder, lambda: self._give_up(folder)):
                if args.should_save:
                    folder.mkdir(parents=True, exist_ok=True)
                    write_json(folder / MANIFEST, {"complete": False})
                yield
                moving_reference.save_reference(trainer, folder)
                processes = gather_object([self._sums_so_far()])  # also waits for all files
                if args.should_save:
                    files = [file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST]
                    for file in files:
                        sync(file)
                    about = {
                        "complete": True,
                        "model_only": args.save_only_model,
                        "files": {str(file.relative_to(folder)): file.stat().st_size for file in files},
                        "run": {"processes": processes, "owes_evaluation": self.owes_evaluation},
                        "identity": self.run_identity(),
                    }
                    write_json(folder / MANIFEST, about)
        finally:
            args.save_total_limit, args.save_only_model = limit, model_only
        trainer.accelerator.wait_for_everyone()
        if args.push_to_hub:
            trainer._push_from_checkpoint(str(folder))
        if args.should_save:
            best = trainer.state.best_model_checkpoint
            rotate_checkpoints(str(output), limit, best_model_checkpoint=best, use_mtime=True)

    def _give_up(self, folder: Path) -> str:
        """Remove a checkpoint that could not be written, and say what is left."""
        shutil.rmtree(folder, ignore_errors=True)
        whole = list(whole_checkpoints(folder.parent).values())
        left = f"{whole[-1].name} is whole" if whole else "there is no earlier one"
        return (
            f"what was written of it is removed, {left}: make room, and go on from there with "
            "`resume_from_checkpoint: true`"
        )

    def _sums_so_far(self) -> dict[str, Any]:
        """What this process has summed up since the last log line, and what the last line of all needs."""
        t = self.trainer
        return {
            "loss": t._tr_loss.item(),
            "total_loss": t._total_loss_scalar,
            "last_logged": t._globalstep_last_logged,
            "steps_without_loss": self.steps_without_loss,
            "collapse_told": t._guard.collapse_told,
            **t._log.state(),
        }

    def _restore_sums(self, processes: list[dict[str, Any]]) -> None:
        """This process's own sums; where their number is another now, all of them on the main one."""
        t, index = self.trainer, self.trainer.accelerator.process_index
        if len(processes) == t.accelerator.num_processes:
            own, parts = processes[index], [processes[index]]
        else:
            own = processes[0] | {"loss": sum(p["loss"] for p in processes) / len(processes)}  # each is to be averaged
            parts = processes if index == 0 else []
        t._tr_loss += own["loss"]
        t._total_loss_scalar = own["total_loss"]
        t._globalstep_last_logged = own["last_logged"]
        self.steps_without_loss = own["steps_without_loss"]
        t._guard.collapse_told = own["collapse_told"]
        t._log.restore(parts)

    # Stopping

    def noting_signals(self) -> AbstractContextManager[None]:
        """Around training: SIGTERM only leaves a note, and Ctrl-C too where `saves_on_interrupt` says so."""
        interrupt = (signal.SIGINT,) if self.trainer.saves_on_interrupt else ()
        then = "the run saves at the end of this step and stops; press it again to stop at once, without saving"
        return self.stop.noted(signal.SIGTERM, *interrupt, then=then)

    def leave(self, owing_evaluation: bool = False) -> NoReturn:
        """End this process, with all others; an evaluation that was cut off is in no checkpoint yet.

        Raises:
            SystemExit: always.
        """
        step = self.trainer.state.global_step
        if owing_evaluation and step and not self._owed_already(step):
            self.owes_evaluation = True
            self.trainer._save_checkpoint(self.trainer.model_wrapped, None)
        done = f"checkpoint-{step} is written in {self.trainer.args.output_dir}, and `resume_from_checkpoint: true` "
        done = f"{done}goes on from it" if step else "no step was done yet, and nothing is lost"
        close_bars()
        notify(f"{self.stop.name}: {done} (exit code {self.stop.exit_code}).")
        self.trainer.accelerator.wait_for_everyone()
        raise SystemExit(self.stop.exit_code)

    def _owed_already(self, step: int) -> bool:
        """Whether the run goes on from this step's checkpoint: writing it anew would put the only one at risk."""
        own = Path(self.trainer.args.output_dir, f"checkpoint-{step}").resolve()
        owing = self._loaded.get("run", {}).get("owes_evaluation", False)
        return owing and self.folder is not None and self.folder.resolve() == own

    # Callbacks

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, run = self.trainer, self._loaded.get("run")
        self.steps_without_loss = state.global_step
        if run is None:
            return
        self._restore_sums(run["processes"])
        moving_reference.load_reference(trainer, self.folder)
        if run["owes_evaluation"]:
            self.owes_evaluation = False
            control.should_evaluate, control.should_save = True, False  # this step's checkpoint is what it goes on from
            trainer._maybe_log_save_evaluate(
                trainer._tr_loss, None, trainer.model_wrapped, trial=None, epoch=state.epoch,
                ignore_keys_for_eval=None, start_time=0.0,
            )  # fmt: skip

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        begin_epoch(train_dataloader, args.seed if args.data_seed is None else args.data_seed, int(state.epoch))

    def on_step_end(self, args, state, control, **kwargs):
        ends_epoch = control.should_training_stop or float(state.epoch).is_integer()
        if self.stop.stopping and not ends_epoch:
            control.should_save = True
        elif ends_epoch and (control.should_save or self.stop.stopping):  # with what is logged and evaluated at its end
            control.should_save = False
            self._deferred = True

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self._deferred
        self._deferred = False

    def on_save(self, args, state, control, **kwargs):
        if self.stop.stopping or (not args.save_only_model and self.stop.agree()):  # also where it came in the save
            self.leave()
