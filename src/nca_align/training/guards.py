"""Guards of the numbers: a loss or gradient that isn't finite, and a policy that gives up even the best completions."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor

from ..config import NCAConfig
from ..errors import UnsupportedError, UserError, first_few, notify
from ..losses import LABELS

# As many steps left out one after another mean that the weights are broken, and no row.
MOST_SKIPPED = 10


class StepGuard:
    """Looks once an optimizer step whether its loss and gradient are finite, and names the rows where they are not.

    Micro-batches only note flags on the device; a step costs one small reduction and one synchronisation.

    Args:
        accelerator: the trainer's.
        args: of which `nonfinite` ("stop", or "skip" to leave the step out) and `collapse_nats` (the best completion's
            mean log-ratio below minus this many nats is told, once) are read.

    Raises:
        NotImplementedError: "skip" under DeepSpeed.
    """

    def __init__(self, accelerator: Accelerator, args: NCAConfig):
        if args.nonfinite == "skip" and accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise UnsupportedError(
                "`nonfinite: skip` can't be used with DeepSpeed, whose backward pass updates the weights; use "
                "`nonfinite: stop`."
            )
        self.accelerator = accelerator
        self.args = args
        self.collapse_told = False
        # of this step: the rows' numbers and which are finite, and which losses are
        self._rows: list[tuple[list[int] | None, Tensor]] = []
        self._losses: list[Tensor] = []
        self._skipped = 0

    def add_rows(self, numbers: list[int] | None, finite: Tensor) -> None:
        """Note a micro-batch's rows, by their numbers in the training split, and which are finite, (B,) bool."""
        self._rows.append((numbers, finite))

    def add_loss(self, loss: Tensor, logged: Tensor) -> None:
        """Note a micro-batch's loss, and what the losses since the last log line added up to before it."""
        if not self._losses:
            self._logged = logged.clone()
        self._losses.append(loss.detach().isfinite())

    def restore_loss(self, logged: Tensor) -> None:
        """Take this step's losses back out of the sum that is logged, in place."""
        logged.copy_(self._logged)

    def check(self, grad_norm: Any, step: int, stopping: bool) -> tuple[bool, bool]:
        """Before an optimizer step, on all processes: whether to leave it out, and whether any process is `stopping`.

        Args:
            grad_norm: the gradient's norm over all parameters, a tensor or a number; None where it isn't known.
            step: the number of the optimizer step, for the message.
            stopping: whether this process was asked to stop.

        Raises:
            UserError: the loss or the gradient isn't finite, and such a step isn't to be left out.
        """
        rows, losses, self._rows, self._losses = self._rows, self._losses, [], []
        device = self.accelerator.device
        norm = getattr(grad_norm, "full_tensor", lambda: grad_norm)()  # of sharded parameters
        norm = torch.as_tensor(0.0 if norm is None else norm, device=device)
        finite = [flag.all().to(device) for flag in (*losses, *(flag for _, flag in rows))]
        flags = torch.stack([*(~flag for flag in finite), ~norm.isfinite()])
        flags = torch.stack([flags[:-1].any(), flags[-1], torch.tensor(stopping, device=device)]).float()
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.reduce(flags, "sum")
        loss_broken, gradient_broken, any_stopping = (value > 0 for value in flags.tolist())
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.is_enabled() and not loss_broken:
            gradient_broken = False  # fp16's gradient scaling overflows now and then, and leaves the step out itself
        if not (loss_broken or gradient_broken):
            self._skipped = 0
            return False, any_stopping
        self._skipped += 1
        sentence = self._sentence(rows, step, loss_broken)
        if self.args.nonfinite == "stop":
            raise UserError(
                f"{sentence}. Look at these rows, and lower `learning_rate` or `max_grad_norm`. "
                "`resume_from_checkpoint: true` goes on from the last checkpoint, and `nonfinite: skip` leaves such "
                "steps out"
            )
        if self._skipped == MOST_SKIPPED:
            raise UserError(
                f"{sentence}, and so in {MOST_SKIPPED} steps one after another: the weights are no longer sound. Go on "
                "from an earlier checkpoint (`resume_from_checkpoint`), with a lower `learning_rate`"
            )
        notify(f"{sentence}: the step is left out (`nonfinite: skip`).")
        return True, any_stopping

    def _sentence(self, rows: list[tuple[list[int] | None, Tensor]], step: int, loss_broken: bool) -> str:
        """What isn't finite in which rows; all processes come here together."""
        own = [pair for numbers, finite in rows for pair in zip(numbers or [], finite.tolist(), strict=False)]
        parts = gather_object(own)
        broken = sorted({number for number, finite in parts if not finite})
        if broken:
            rows_ = f"row{'s' * (len(broken) > 1)} {_list(broken)} of the training split"
            return f"Step {step}: the log-probabilities of {rows_} are not finite"
        all_rows = sorted({number for number, _ in parts})
        where = f"rows {_list(all_rows)} of the training split" if all_rows else "rows that carry no `row_number`"
        return f"Step {step}: the {'loss' if loss_broken else 'gradient'} of {where} is not finite"

    def watch(self, logs: Mapping[str, float], step: int) -> None:
        """Warn, once, when the best completions' mean log-ratio since the last log falls below `-collapse_nats`.

        Of losses that read labels they are the right ones: the best of a prompt may be wrong, and is to fall.
        """
        which, of_all, hold = "best", "prompts", "`loss_type: [nca, sft]` or, under NCA, `negative_weight` below 1"
        if not LABELS.isdisjoint(self.args.loss_type):
            which, of_all, hold = "right", "completions", "`loss_type: [outcome, sft]`"
        best = logs.get(f"logratios/{which}")
        if self.collapse_told or best is None or not best < -self.args.collapse_nats:
            return
        self.collapse_told = True
        notify(
            f"Step {step}: the {which} completion's log-ratio is {best:.1f} nats, the mean over {of_all}, below the "
            f"-{self.args.collapse_nats:g} of `collapse_nats`: even the {which} answers become unlikely, and samples "
            "degrade with them. Look at samples of a checkpoint; lower `learning_rate`, raise `beta`, or hold the "
            f"{which} completion up with {hold}."
        )


def _list(numbers: list[int]) -> str:
    return first_few(numbers, 32) + (f" ({len(numbers)} in all)" if len(numbers) > 32 else "")
