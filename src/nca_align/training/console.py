"""What a run shows on the console: a bar where there is a terminal, and one line for each log."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from .. import progress
from .log_schedule import LogSchedule
from .metrics import prefixes

_SIDES = ("best", "worst", "right", "wrong")
_ROUNDING = 1e-4  # nats; a cached reference differs by so much in float32
# metric → how it is shown; the log has all of them
_SHOWN = {
    "loss": "loss {:.4f}",
    "rewards/accuracies": "ranking accuracy {:.0%}",
    "logratios/best": "log-ratio best {:+.2f}",
    "logratios/worst": "worst {:+.2f}",
    "logratios/right": "log-ratio right {:+.2f}",
    "logratios/wrong": "wrong {:+.2f}",
    "outcome/auc": "right above wrong {:.0%}",
    "generation/reward": "own answers' reward {:+.3f}",
    "generation/win_rate": "win rate {:.0%}",
}


def attach(trainer) -> None:
    """Give `trainer` the console and the schedule of its logs, in the place of transformers' bar or printer."""
    theirs = PrinterCallback if trainer.args.disable_tqdm else DEFAULT_PROGRESS_CALLBACK
    # the last one: a user may have given another of the same
    trainer.remove_callback([own for own in trainer.callback_handler.callbacks if type(own) is theirs][-1])
    for callback in (Console(lambda: trainer._resume.steps_without_loss), LogSchedule(trainer)):
        trainer.add_callback(callback)


class Console(TrainerCallback):
    """One line a log, of the figures that a reader looks for; the whole dictionary goes to the trackers and the file.

    Tokens a second are those of the steps alone, of all processes together. The time left is that of the steps so far,
    with what was evaluated and saved between them.

    Args:
        steps_without_loss: how many steps of the run its mean loss leaves out.
    """

    def __init__(self, steps_without_loss: Callable[[], int] = lambda: 0) -> None:
        self._steps_without_loss = steps_without_loss
        self._bar: tqdm | None = None
        self._evaluation_bar: tqdm | None = None
        self._first_step = 0  # of this part of the run
        self._seconds = 0.0  # of the steps since the last line
        self._tokens: float | None = None  # until the last line; of a resumed run they aren't known before its first

    def on_train_begin(self, args, state, control, **kwargs):
        self._began, self._seconds, self._first_step = time.monotonic(), 0.0, state.global_step
        self._tokens = None if state.global_step else 0.0
        shown = state.is_world_process_zero and not args.disable_tqdm
        self._bar = progress.bar(state.max_steps, "step", shown, initial=state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self._step_began = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        self._seconds += time.monotonic() - self._step_began
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self._evaluation_bar is None:
            shown = state.is_world_process_zero and not args.disable_tqdm
            total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
            self._evaluation_bar = progress.bar(total, "batch", shown, desc="Evaluation", leave=False)
        self._evaluation_bar.update()

    def on_evaluate(self, args, state, control, **kwargs):
        if self._evaluation_bar is not None:
            self._evaluation_bar.close()
            self._evaluation_bar = None

    def on_predict(self, args, state, control, metrics, **kwargs):
        self.on_evaluate(args, state, control)

    def on_train_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.on_evaluate(args, state, control)  # its bar has had its last batch
        if not state.is_world_process_zero:
            return
        for line in self._lines(state, logs):
            progress.print_line(line)

    def _lines(self, state, logs: Mapping[str, Any]) -> list[str]:
        at = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}  " if state.max_steps else ""
        if "loss" in logs:
            return [at + "  ".join([*_figures(logs), *self._speed(state, logs)])]
        if evaluated := prefixes(logs):
            return [f"{at}{name}:  {'  '.join(_figures(logs, prefix))}" for prefix, name in evaluated.items()]
        if "train_loss" in logs:
            steps, seconds = state.global_step - self._first_step, logs.get("train_runtime", 0.0)
            counted = state.global_step - self._steps_without_loss()
            which = "all" if counted == state.global_step else f"{counted} of the"
            over = "" if counted == steps else f" over {which} {state.global_step} steps of the run"
            return [f"{steps} steps in {tqdm.format_interval(seconds)}, mean loss {logs['train_loss']:.4f}{over}"]
        own = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in logs.items())
        return [at + "  ".join(own)]

    def _speed(self, state, logs: Mapping[str, Any]) -> list[str]:
        """Tokens a second since the last line, and the time left."""
        tokens, before = logs.get("num_tokens"), self._tokens
        seconds, self._tokens, self._seconds = self._seconds, tokens, 0.0
        speed = []
        if tokens is not None and before is not None and seconds > 0:
            speed.append(f"{(tokens - before) / seconds:,.0f} tokens/s")
        done, left = state.global_step - self._first_step, state.max_steps - state.global_step
        if done > 0:
            speed.append(f"{tqdm.format_interval((time.monotonic() - self._began) / done * left)} left")
        return speed


def _figures(logs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The metrics of `_SHOWN` that a log has; nothing is ranked where nothing has moved."""
    shown = {name: text for name, text in _SHOWN.items() if prefix + name in logs}
    if not has_moved(logs, prefix):
        shown = {name: text for name, text in shown.items() if name not in ("rewards/accuracies", "outcome/auc")}
    return [text.format(logs[prefix + name]) for name, text in shown.items()]


def has_moved(logs: Mapping[str, Any], prefix: str = "") -> bool:
    """Whether the policy differs from its reference in a log by more than rounding, by which chance ranks pairs."""
    ratios = [logs[name] for which in _SIDES if (name := f"{prefix}logratios/{which}") in logs]
    return not ratios or any(abs(ratio) > _ROUNDING for ratio in ratios)
