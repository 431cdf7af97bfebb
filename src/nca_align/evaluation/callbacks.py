"""Evaluations in the midst of a run of any trainer, TRL's own too: by generation, and of K rewarded completions."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainerCallback

from ..batching.collator import padded
from ..batching.tokenization import tokenize_dataset
from ..errors import UnsupportedError, UserError
from ..models.loading import disable_nf4_repacking
from ..models.logprobs import completion_logps
from ..models.policy import (
    adapter_merged,
    as_reference,
    base_model,
    eval_mode,
    refuse_trained_biases,
    refuse_virtual_tokens,
)
from ..models.sampling import decoding_precision
from ..reward_tensors import check_rows
from ..store.fingerprints import columns_fingerprint
from ..training.metrics import EvaluationMeans, calibration, row_metrics
from ..training.outcomes import are_labels, label_metrics
from ..training.reference_cache import TOKENS, ReferenceCache
from .evaluator import GenerationEvaluator, Reference, reference_model


def log_within_step(trainer: Trainer, values: dict[str, float]) -> None:
    """A line of its own in the log, which leaves the step's own line, due after the callbacks, as it is."""
    due = trainer.control.should_log
    # transformers' own: TRL's adds, and empties, the training metrics that are still being collected
    Trainer.log(trainer, values)
    trainer.control.should_log = due


class _EvaluationCallback(TrainerCallback):
    """What both have in common: when they run, and how they log: in each line a key begins with `mark`."""

    _draws = False  # whether the model writes answers

    def __init__(
        self, trainer: Trainer, steps: Iterable[int] | None, reference: Reference | None, starts_as_reference: bool,
        mark: str,
    ):  # fmt: skip
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise UnsupportedError(
                f"{type(self).__name__} runs the model outside of training, and a model sharded by FSDP or DeepSpeed "
                "can't do that. Leave it out, or evaluate the saved model (`nca-align evaluate`)."
            )
        self._trainer: Any = trainer
        self._steps = None if steps is None else frozenset(steps)
        self._reference = reference
        self._starts_as_reference = starts_as_reference
        self._mark = mark
        model = trainer.accelerator.unwrap_model(trainer.model)
        self._known_reference(model)
        disable_nf4_repacking(base_model(model))  # a forward without gradients, and training would stand still

    def measure(self, model: nn.Module) -> dict[str, float]:
        """What is logged."""
        raise NotImplementedError

    def on_step_end(self, args, state, control, **kwargs):
        if self._steps is not None and state.global_step in self._steps:
            self._run()

    on_train_begin = on_step_end  # of step 0; a run that is resumed has its step's line already

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        """Also adds to `metrics`, so that `metric_for_best_model` and early stopping can go by it."""
        if self._steps is None and (values := self._run()) and metrics is not None:
            metrics.update(values)

    def _run(self) -> dict[str, float]:
        """Measure and log; nothing where this step of training has its line already.

        That is so for the second of several `eval_dataset`, and for `eval_on_start` of a run that is resumed.
        """
        trainer = self._trainer
        step, log = trainer.state.global_step, trainer.state.log_history
        here = (line for line in log if line["step"] == step)
        if trainer.is_in_train and any(key.startswith(self._mark) for line in here for key in line):
            return {}
        model = trainer.accelerator.unwrap_model(trainer.model)
        with decoding_precision(trainer.accelerator) if self._draws else trainer.accelerator.autocast():
            values = self.measure(model)
        log_within_step(trainer, values)
        return values

    def _reference_of(self, model: nn.Module) -> Reference:
        """The given one, the trainer's, or the model with its adapter switched off; at the start perhaps `model`."""
        if self._starts_as_reference and self._trainer.state.global_step == 0:
            return model
        return self._known_reference(model)

    def _known_reference(self, model: nn.Module) -> Reference:
        known = self._reference if self._reference is not None else getattr(self._trainer, "ref_model", None)
        if known is not None:
            unwrap = self._trainer.accelerator.unwrap_model
            known = unwrap(known) if isinstance(known, nn.Module) else known
            if isinstance(known, nn.Module) and base_model(known) is base_model(model):
                raise UserError(
                    f"`reference` of {type(self).__name__} is the model that is trained, so the model would be "
                    "measured against itself. Give a copy of it from before training."
                )
            return known
        if not hasattr(model, "peft_config"):
            raise UserError(
                f"`reference` is missing for {type(self).__name__}: the trainer holds no reference model, and the "
                "model has no adapter to switch off. Give one, or set `precompute_ref_log_probs: false`."
            )
        refuse_trained_biases(model)
        return partial(as_reference, model)


class GenerationCallback(_EvaluationCallback):
    """Answers held-out prompts and logs `eval_NAME_generation/reward`, `…/kl`, `…/win_rate`, and more.

    Args:
        trainer: any transformers Trainer.
        evaluators: name → evaluator; with one of them alone, named "", the metrics are `eval_generation/…`.
        steps: steps after which it runs, 0 before the first; None for wherever the trainer evaluates.
        reference: what KL and wins are measured against; by default the trainer's reference, or the bare base model.
        starts_as_reference: the policy is its reference until the first step, as with a fresh adapter: at step 0 the
            reference's answers are then the policy's too.

    Raises:
        NotImplementedError: a launch that shards the model.
        ValueError: nothing that could be the reference, or the trained model as `reference`.
        UserError: an adapter that puts virtual tokens in front; a prompt that is too long for the model.

    Example:
        >>> def length(completions, **columns):
        ...     return [float(len(completion)) for completion in completions]
        >>> evaluator = GenerationEvaluator(rows, tokenizer, length, num_completions=2, max_new_tokens=4)
        >>> trainer.add_callback(GenerationCallback(trainer, {"": evaluator}, reference=reference))
    """

    _draws = True

    def __init__(
        self,
        trainer: Trainer,
        evaluators: Mapping[str, GenerationEvaluator],
        steps: Iterable[int] | None = None,
        reference: Reference | None = None,
        starts_as_reference: bool = False,
    ):
        self._evaluators = dict(evaluators)
        first = next(iter(self._evaluators))
        super().__init__(trainer, steps, reference, starts_as_reference, f"{_prefix(first)}generation/reward")
        refuse_virtual_tokens(trainer.model)
        for evaluator in self._evaluators.values():
            evaluator.check_room(trainer.accelerator.unwrap_model(trainer.model))

    def measure(self, model: nn.Module) -> dict[str, float]:
        reference = self._reference_of(model)
        values: dict[str, float] = {}
        for name, evaluator in self._evaluators.items():
            values |= evaluator(model, reference).log(_prefix(name))
        return values


class RankingCallback(_EvaluationCallback):
    """The metrics of K rewarded completions (`metrics.row_metrics`, `calibration`) for trainers that don't log them.

    Logs `eval_NAME_rewards/rank_1`, `eval_NAME_logratios/best` and the others.

    Args:
        trainer: any transformers Trainer.
        datasets: name → rows of `prompt, completions, rewards`; one alone named "" logs `eval_…`.
        tokenizer: the model's.
        alpha, beta: as in `NCAConfig`, α None for no targets.
        steps, reference, starts_as_reference: as in `GenerationCallback`.
        batch_size: completions at a time.
        max_length: tokens of prompt and completion that are kept; None for all.
        reference_key: what tells the reference from others, by which its log-probabilities are kept on disk for other
            runs; None where they aren't.

    Raises:
        NotImplementedError: a launch that shards the model, or more than one process.
        ValueError: nothing that could be the reference.

    Example:
        >>> callback = RankingCallback(trainer, {"": rows}, tokenizer, alpha=0.3, beta=0.1, reference=reference)
        >>> trainer.add_callback(callback)
    """

    def __init__(
        self,
        trainer: Trainer,
        datasets: Mapping[str, Dataset],
        tokenizer: Any,
        *,
        alpha: float | None,
        beta: float,
        steps: Iterable[int] | None = None,
        reference: Reference | None = None,
        starts_as_reference: bool = False,
        batch_size: int = 32,
        max_length: int | None = None,
        reference_key: tuple[str, ...] | None = None,
    ):
        mark = f"{_prefix(next(iter(datasets)))}logratios/"
        super().__init__(trainer, steps, reference, starts_as_reference, mark)
        if trainer.args.world_size > 1:
            raise UnsupportedError(
                f"RankingCallback runs in one process, but there are {trainer.args.world_size}. Give the rows to "
                "NCATrainer as `eval_dataset`, which logs the same."
            )
        self._alpha, self._beta, self._batch_size = alpha, beta, batch_size
        tokenized = {
            name: tokenize_dataset(dataset, tokenizer, None, max_length, name=name or "eval")[0]
            for name, dataset in datasets.items()
        }
        self._rows: dict[str, list[dict[str, Any]]] = {name: list(rows) for name, rows in tokenized.items()}
        self._caches: dict[str, ReferenceCache] = {}
        if reference_key is not None:
            for name, rows in tokenized.items():
                key = ("ranking", *reference_key, columns_fingerprint(rows, TOKENS))
                self._caches[name] = ReferenceCache(key, len(rows))
        self._reference_logps: dict[str, list[list[float]]] = {}

    def measure(self, model: nn.Module) -> dict[str, float]:
        values: dict[str, float] = {}
        reference = self._reference_of(model)
        for name, rows in self._rows.items():
            if name not in self._reference_logps:
                self._reference_logps[name] = self._logps_of_reference(name, model, reference)
            policy = self._reference_logps[name]
            if reference is not model:
                with eval_mode(model), adapter_merged(model):
                    policy = completion_logps(model, rows, self._batch_size)
            rewards = [row["rewards"] for row in rows]
            valid = padded([[True] * len(own) for own in rewards], torch.bool)
            logps, ref_logps, scores = map(padded, (policy, self._reference_logps[name], rewards))
            labels = are_labels(scores, valid)
            check_rows(scores, valid, self._alpha or 1.0, self._beta, least=2 - labels)
            means, about = EvaluationMeans(), (logps, ref_logps, scores, valid)
            figures = row_metrics(*about, self._alpha, self._beta)
            if self._alpha is not None:
                figures |= calibration(*about, self._alpha, self._beta)
            if labels:
                figures |= label_metrics(*about, self._beta)
                means.outcomes.add(*about, self._beta, valid.any(1))
            means.add(figures)
            values |= {f"{_prefix(name)}{key}": value for key, value in means.gather().items()}
        return values

    def _logps_of_reference(self, name: str, model: nn.Module, reference: Reference) -> list[list[float]]:
        """Of each row K numbers in nats, from the disk as far as they are there."""
        rows, cache = self._rows[name], self._caches.get(name)
        with eval_mode(model), reference_model(reference, model) as other:
            if cache is None:
                return completion_logps(other, rows, self._batch_size)
            for start, end, file in cache.missing():
                cache.write(file, completion_logps(other, rows[start:end], self._batch_size))
        return cache.read()


def _prefix(name: str) -> str:
    return f"eval_{name}_" if name else "eval_"
