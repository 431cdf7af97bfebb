"""Two checks before the first step: the log-probabilities are the model's own, and the policy is its reference.

They find a wrong layout, an unknown scale of the logits, leaked attention, dropout that is left on, and an adapter
whose copy lacks a part. With each of these a run trains on wrong numbers and says nothing.
"""

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..batching.attention import is_peft_model
from ..batching.collator import Batch, RewardCollator
from ..batching.token_ids import check_dataset, check_padding
from ..errors import PackingError, UnsupportedError, UserError, notify
from ..losses import LABELS
from ..models.policy import base_model, eval_mode
from ..models.vocabulary import refuse_unsaved_rows, token_rows
from .layout import choose_layout
from .own_logits import Difference, Logps, Row, compare, look_ahead, own_logps, row_beyond_window, sample_rows, subtract
from .rounding import Rounding, rounding
from .sharded import reshard

_OFF = "`startup_checks: false` trains all the same"


class StartupChecks:
    """What a trainer checks once, under `startup_checks`; it also gives the collator its layout, vocabulary and rows.

    Args:
        trainer: an NCATrainer. Used of it are its arguments, model, data, collator, accelerator and log-probabilities.
        models: those that read the batches.

    Raises:
        UserError: the data or the padding has a token that the models have no row for, or a new row would not be saved.
    """

    def __init__(self, trainer: Any, models: list[nn.Module]):
        self.trainer = trainer
        self._requested = trainer.data_collator.layout
        self._reason = choose_layout(trainer.data_collator, models, trainer.args)
        self._model_checked = self._reference_checked = False
        refuse_unsaved_rows(trainer.model)
        trainer.data_collator.labels = not LABELS.isdisjoint(trainer.args.loss_type)
        trainer.data_collator.min_completions = trainer.args.min_completions
        rows = trainer.data_collator.vocabulary = min(map(token_rows, models))
        check_padding(trainer._tokenizer, rows)
        for name in ("train", "eval"):
            check_dataset(getattr(trainer, f"{name}_dataset", None), rows, trainer._tokenizer, name)

    # Against the model itself

    def check_model(self, model: nn.Module, gradients: bool) -> None:
        """Once: the log-probabilities of the first rows are those of the model's own logits; all processes alike.

        Under `layout: auto`, a packed row that doesn't give them is given up for padded ones.

        Args:
            model: which runs, as it is wrapped.
            gradients: whether they are compared for a packed row, too.

        Raises:
            NotImplementedError: they are others, in the layout that was asked for or in any.
        """
        trainer, collator = self.trainer, self.trainer.data_collator
        if self._model_checked:
            return
        self._model_checked = True
        if not trainer.args.startup_checks:
            notify(f"{self._layout}; not checked (`startup_checks: false`).")
            return
        policy, base = trainer.model, base_model(trainer.accelerator.unwrap_model(model))
        bounds = rounding(policy, base, trainer.accelerator.mixed_precision)
        long_row, uncovered = row_beyond_window(trainer.train_dataset, base.config.get_text_config())
        batches = [sample_rows(trainer.train_dataset)] + ([[long_row]] if long_row else [])
        packed = collator.layout == "prefix_shared"
        trained = [p for p in policy.parameters() if p.requires_grad] if packed and gradients else []
        device = trainer.accelerator.device
        with eval_mode(policy), trainer.accelerator.autocast():
            ahead, *_ = self._worst((look_ahead(model, base, batches[0][0], device), 0.0, 0.0))
            if not ahead <= bounds.completion:
                raise UnsupportedError(
                    f"`model` is a {type(base).__name__}, whose logits change by {ahead:.2g} nats with a token that "
                    "comes after them. So a completion has no log-probability: use a causal language model."
                )
            own = [own_logps(model, base, rows, device, () if i else trained) for i, rows in enumerate(batches)]
            found, refusal = self._compare(model, base, batches, own, trained)
            if not _holds(found, bounds) and packed:
                packed_row, collator.layout = _figures(found, bounds), "padded"
                own = [(logps, ()) for logps, _ in own]
                found, _ = self._compare(model, base, batches, own)
                self._refuse(model, found, bounds)
                if self._requested == "prefix_shared":
                    if refusal:
                        raise refusal
                    raise UnsupportedError(
                        "`layout: prefix_shared` does not give the log-probabilities of the model's own logits on the "
                        f"first rows ({packed_row}). {type(base).__name__} mixes positions in a way that it can't "
                        "follow. Use `layout: padded`, which does."
                    )
                self._reason = (
                    refusal.obstacle
                    if refusal
                    else f"since prefix_shared does not give the model's own log-probabilities ({packed_row})"
                )
        reshard(model)
        self._refuse(model, found, bounds)
        compared = trained and collator.layout == "prefix_shared"
        within = f", gradients within {found[2]:.1e} of their norm" if compared else ""
        notify(
            f"{self._layout}; agrees with the model's own logits on the first rows: tokens within {found[0]:.1e} "
            f"nats{within}.{uncovered}"
        )

    @property
    def _layout(self) -> str:
        """Layout, why it is this one, and what a forward has, in words."""
        collator = self.trainer.data_collator
        text, most = f"Layout: {collator.layout}, {self._reason}", collator.tokens_per_forward
        if most is None:
            return text
        if collator.layout == "prefix_shared":
            return f"{text}, in pieces of up to {most} tokens"
        return f"{text}; a forward has rows of up to {most} tokens together, or one that is longer"

    def _refuse(self, model: nn.Module, found: Difference, bounds: Rounding) -> None:
        if _holds(found, bounds):
            return
        collator = self.trainer.data_collator
        base = base_model(self.trainer.accelerator.unwrap_model(model))
        if type(collator) is not RewardCollator:
            raise UnsupportedError(
                f"`data_collator` is a {type(collator).__name__}, whose batches do not give the log-probabilities of "
                f"the model's own logits on the first rows ({_figures(found, bounds)}). Leave it out."
            )
        raise UnsupportedError(
            f"`model` is a {type(base).__name__}, whose log-probabilities in `layout: {collator.layout}` are not those "
            f"of its own logits on the first rows ({_figures(found, bounds)}). Training would be wrong. Use another "
            f"model, and please report this one; {_OFF}."
        )

    def _compare(
        self,
        model: nn.Module,
        base: PreTrainedModel,
        batches: Sequence[Sequence[Row]],
        own: Sequence[tuple[Logps, Sequence[Tensor]]],
        trained: Sequence[nn.Parameter] = (),
    ) -> tuple[Difference, PackingError | None]:
        """The worst `compare` of all processes; infinite where the model refuses a packed row, with the refusal."""
        refusal, found = None, (math.inf, math.inf, 0.0)
        try:
            found = compare(
                model, base, batches, self.trainer.data_collator, own, self.trainer.accelerator.device, trained
            )
        except PackingError as error:
            refusal = error
        return self._worst(found), refusal

    def _worst(self, difference: Difference) -> Difference:
        """Of all processes, which decide together; a NaN anywhere stays one."""
        worst = torch.tensor(gather_object([difference]), dtype=torch.float64).amax(0)
        return tuple(worst.tolist())

    # Against the reference

    def check_reference(self, model: nn.Module) -> None:
        """Once, before the first step of a run that isn't resumed: every log-ratio is 0 within rounding.

        The policy is in training mode where no dropout is wanted, so that one that is left shows, too.

        Args:
            model: the policy as it is wrapped.

        Raises:
            UserError: a log-ratio isn't 0, and no reference was given that explains it.
        """
        trainer = self.trainer
        if self._reference_checked:
            return
        self._reference_checked = True
        if not trainer.args.startup_checks or trainer.state.global_step:
            return
        if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
            model = trainer.model  # under `torch_compile` another mode would be compiled
        rows = list(islice(trainer.train_dataset, 2))
        device = trainer.accelerator.device
        batch = send_to_device(trainer.data_collator(rows), device)
        # no run is another for having been checked
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            reference = trainer._reference_logps(batch)
            off, nats = self._log_ratio(model, batch, reference, training=trainer.args.disable_dropout)
            if off and trainer.args.disable_dropout:
                with_dropout, (off, nats) = nats, self._log_ratio(model, batch, reference, training=False)
                if not off:
                    notify(
                        f"The log-ratios at the start are up to {with_dropout:.2g} nats in training mode and 0 without "
                        f"it: {type(base_model(trainer.accelerator.unwrap_model(model))).__name__} has dropout, or "
                        "other noise, that `disable_dropout: true` doesn't turn off."
                    )
        if not off:
            return
        if trainer._reference_given:
            notify(f"The log-ratios at the start are up to {nats:.2g} nats: the `ref_model` given is another model.")
            return
        raise UserError(
            f"The log-ratios at the start are up to {nats:.2g} nats, but the policy should be its reference: "
            f"{self._why(batch)}. {_OFF[0].upper() + _OFF[1:]}."
        )

    def _log_ratio(self, model: nn.Module, batch: Batch, reference: Tensor, training: bool) -> tuple[bool, float]:
        """Whether a completion's log-ratio is more than rounding, on any process; and the largest, nats."""
        trainer = self.trainer
        with eval_mode(trainer.model), trainer.accelerator.autocast():
            trainer.model.train(training)
            logps = trainer._batch_logps(model, batch, with_aux_loss=False)[0]
        ratios = subtract(logps, reference)[batch["valid"]]
        base = base_model(trainer.accelerator.unwrap_model(model))
        bounds = rounding(trainer.model, base, trainer.accelerator.mixed_precision)
        # a copy, of the model or of its adapter, computes the same; a new adapter and cached values do not quite
        copied = "ref_logps" not in batch and "ref" in getattr(trainer.model, "peft_config", {"ref": None})
        allowed = (bounds.same if copied else bounds.completion) * batch["lengths"][batch["valid"]].sqrt()
        off = bool((~(ratios.abs() <= allowed)).any())
        parts = gather_object([(off, float(ratios.abs().max()))])
        return any(off for off, _ in parts), float(torch.tensor([nats for _, nats in parts]).max())

    def _why(self, batch: Batch) -> str:
        trainer = self.trainer
        if "ref_logps" in batch and not trainer.precompute_ref_logps:
            return "the data set's column `ref_logps` is of another model; leave it out"
        if not is_peft_model(trainer.model):
            return "its weights changed after the trainer was made; make the trainer after them"
        model = trainer.accelerator.unwrap_model(trainer.model)
        adapter = model.peft_config[model.active_adapters[0]]
        kind, start = adapter.peft_type.value, getattr(adapter, "init_lora_weights", None)
        if "ref" in model.peft_config:
            return f"the copy of the {kind} adapter that training goes on from is not the same; please report this"
        if start is False:
            return "`init_lora_weights: false` starts the adapter with random weights; leave it out"
        return (
            f"a new {kind} adapter does not start as the model that it is put on; give `get_peft_model(model, config)` "
            "as `model`, so that its start is the reference, or initialise it to change nothing"
        )


def _holds(found: Difference, bounds: Rounding) -> bool:
    token, completion, gradient = found
    return token <= bounds.token and completion <= bounds.completion and gradient <= bounds.gradient


def _figures(found: Difference, bounds: Rounding) -> str:
    """What is out of bounds, in words."""
    token, completion, gradient = found
    pairs = [
        (f"a token differs by {token:.2g} nats, where rounding explains {bounds.token:.2g}", token <= bounds.token),
        (
            f"a completion differs by {completion:.2g} nats times the root of its tokens, where rounding explains "
            f"{bounds.completion:.2g}",
            completion <= bounds.completion,
        ),
        (
            f"gradients differ by {gradient:.2g}, relative, where rounding explains {bounds.gradient:g}",
            gradient <= bounds.gradient,
        ),
    ]
    return next(text for text, holds in pairs if not holds)
