"""NCATrainer: TRL's DPOTrainer on K rewarded completions per prompt.

For each step, transformers' loop calls `get_batch_samples`, `training_step` for each micro-batch, `_get_grad_norm`
before the update, and `log`. The methods stand in that order, a step's before those that it calls.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import IterableDataset
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer
from trl.models import prepare_deepspeed

from .batching.collator import Batch, Chunk, RewardCollator
from .batching.tokenization import tokenize_dataset
from .config import NCAConfig
from .errors import notify
from .models.loading import disable_nf4_repacking
from .models.logprobs import add_token_logps, forward_chunk, sum_by_completion
from .models.policy import base_model
from .progress import closing_bars, without_library_bars
from .store.checkpoints import explain_read_errors
from .training import adapters, arguments, console, gradients, reference, reference_cache, row_weights, sharded, streams
from .training.dropout import disable_functional_dropout
from .training.guards import StepGuard
from .training.metrics import MetricLog
from .training.model_card import write_model_card
from .training.objective import Objective
from .training.resume import EvaluationInterrupted, Resume, reads_checkpoint
from .training.run_identity import at_start
from .training.saved_names import mapped
from .training.saving import may_be_pushed, saving_model
from .training.startup_checks import StartupChecks
from .training.stopping import spare_workers
from .user_functions import short_name


class NCATrainer(DPOTrainer):
    """Aligns a model on prompts with K rewarded completions each, by InfoNCA, NCA or another listwise loss.

    It takes any K, with a reward for each completion. A preference pair is K = 2 with rewards 1 and 0. It differs from
    TRL's `DPOTrainer` in this data, in its losses, and in how it computes log-probabilities. It inherits all else.

        >>> nca = NCATrainer(model, args=NCAConfig("run", max_steps=1), train_dataset=rows, processing_class=tokenizer)
        >>> _ = nca.train()  # doctest: +ELLIPSIS
        step 1/1  loss 1.3863 ...

    Args:
        model, ref_model, args, train_dataset, eval_dataset, processing_class, callbacks, optimizers,
            quantization_config, peft_config: as DPOTrainer's. `args` may be a plain `DPOConfig`. Data sets hold
            `prompt, completions, rewards`, or any format that `load_reward_dataset` knows.
        data_collator: None or a `RewardCollator`.
        compute_metrics: not supported; the metrics over completions are logged in any case.

    Raises:
        TypeError, ValueError, NotImplementedError: arguments or data that can't be trained on, in one sentence.
    """

    _tag_names = ["nca-align"]  # noqa: RUF012 (as in TRL)
    _name = "NCA"
    model: PreTrainedModel
    args: Any  # an NCAConfig, with what transformers has made of its texts
    data_collator: RewardCollator
    ref_model: Any
    _signature_columns: Any
    reward_options: Any = None  # how a command made the rewards out of its data, for the run's record and its card
    saves_on_interrupt = False  # whether the first Ctrl-C within `train` saves at the end of the step, as SIGTERM does
    loss_is_scaled_for_ga = True  # compute_loss divides by the prompts of the whole accumulation window

    @without_library_bars()
    def __init__(
        self,
        model,
        ref_model=None,
        args: DPOConfig | None = None,
        data_collator: RewardCollator | None = None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        compute_metrics: Callable | None = None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
    ):
        args = NCAConfig.of(args, model)
        arguments.check_arguments(args, data_collator, compute_metrics, train_dataset)
        train_dataset, eval_dataset = arguments.prepare_datasets(args, model, train_dataset, eval_dataset)
        self._is_set_up, self._reference_given = False, ref_model is not None  # a checkpoint belongs to it
        adapters.check_adapter(model, peft_config)
        self._adapter_config = None if self._reference_given else adapters.let_copy_start_plainly(model)
        self._tag_names = [*self._tag_names, *map(short_name, args.loss_type)]  # of the model and its card
        self._log = MetricLog()
        with arguments.adapter_on_head(), sharded.references_by_layer(self):
            super().__init__(
                model=model,
                ref_model=ref_model if self._reference_given else reference.frozen_copy(model, peft_config, args),
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        self._set_up()
        self._signature_columns = arguments.batch_columns(args, self.train_dataset, self.eval_dataset)
        self._guard = StepGuard(self.accelerator, args)
        console.attach(self)
        self._resume = Resume(self)

    def _set_up(self) -> None:
        """The models' heads, the collator and the layout, once the models are there and before their first forward."""
        if self._is_set_up:
            return
        self._is_set_up = True
        if not self._reference_given:
            adapters.set_up_reference_adapter(self.model, self._adapter_config, self.args.precompute_ref_log_probs)
        adapters.read_as_saved(self.model)
        arguments.check_model(self.model, self.args.max_length, self.accelerator.parallelism_config, self.train_dataset)
        kept = [self.ref_model] if self.ref_model is not None else []  # a compiled model has no truth value
        models = [self.model, *(self.accelerator.unwrap_model(model, keep_torch_compile=False) for model in kept)]
        for model in models:
            add_token_logps(base_model(model))
            disable_nf4_repacking(model)
            if self.args.disable_dropout:
                disable_functional_dropout(base_model(model))
        # Before any forward: bitsandbytes repacks its weights there on a CPU
        if self.precompute_ref_logps or self._reference_given:
            self._reference_hash = reference.model_hash(models[-1], trained=not self._reference_given)
        if not isinstance(self.data_collator, RewardCollator):  # TRL's
            args = self.args
            self.data_collator = RewardCollator(
                self._tokenizer.pad_token_id, args.layout, args.tokens_per_forward, args.pad_to_multiple_of
            )
        self._start = at_start(self.model)
        self._checks = StartupChecks(self, models)
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # those have no usable model before they wrap it
            self._checks.check_model(self.model, gradients=True)

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Any known format → `prompt_ids, completion_ids, rewards`; what this returned comes back as it is."""
        if arguments.is_prepared(next(iter(dataset), {}), args):
            return dataset
        if self._is_set_up:  # one for `evaluate()`; the constructor converts its own before it loads the model
            dataset = arguments.reward_rows(dataset, dataset_name, args)
        state = PartialState()
        with state.main_process_first(), state.local_main_process_first():  # a cache may be shared, or each node's own
            dataset, notices = tokenize_dataset(
                dataset, self._tokenizer, args.max_prompt_length, args.max_length, args.length_column_name,
                args.dataset_num_proc, dataset_name, training=dataset_name == "train", on_invalid=args.on_invalid,
            )  # fmt: skip
        for notice in notices:
            notify(notice)
        return dataset

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        """`dataset` with a column `ref_logps`, cached or computed shard by shard; a stream keeps the live reference."""
        self._set_up()
        if isinstance(dataset, IterableDataset) or "ref_logps" in dataset.column_names:
            return dataset
        with ExitStack() as stack:
            model = self.model if self.ref_model is None else self.ref_model
            if model is self.model is self.model_wrapped and self.is_deepspeed_enabled:  # before training
                model = prepare_deepspeed(model, self.accelerator)  # places and gathers it
                stack.callback(model.destroy)  # its hooks would get in the way of the training engine's
            elif model is self.model and self.is_fsdp_enabled:
                model = sharded.split(model, self.accelerator)
            self._checks.check_model(model, gradients=False)
            key = (self._reference_hash, str(self.accelerator.mixed_precision), str(self.model.dtype))
            compute = partial(self.compute_ref_log_probs, model)
            batch_size = self.args.precompute_ref_batch_size or 4 * batch_size  # no activations are kept
            return reference_cache.add_reference_logps(
                dataset, key, compute, self.data_collator, batch_size, self.accelerator, name
            )

    def _get_dataloader(self, dataset, description, batch_size, *args, **kwargs):
        if isinstance(dataset, IterableDataset):
            loader = streams.stream_loader(dataset, self.data_collator, batch_size, self.args, self.accelerator)
        else:
            loader = super()._get_dataloader(dataset, description, batch_size, *args, **kwargs)
        return spare_workers(loader)

    # One training step

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of one step, and what they are averaged over, `Objective.count_prompts`."""
        drop_last = self.args.dataloader_drop_last
        batches = row_weights.weighted_batches(epoch_iterator, num_batches, self.accelerator, drop_last)
        if isinstance(self.train_dataset, IterableDataset):
            batches = streams.fill_window(batches, num_batches, self.accelerator)
            self.control.should_epoch_stop |= not batches  # transformers would ask for all of `max_steps`
        counts = sum(map(self._objective.count_prompts, batches), torch.zeros(3, dtype=torch.float64, device=device))
        return batches, self.accelerator.reduce(counts, "sum")

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch, in one forward, or in several of at most `tokens_per_forward` with a backward each."""
        self._checks.check_reference(model)
        if not self.data_collator.in_pieces:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            model.train()
            if hasattr(self.optimizer, "train") and callable(self.optimizer.train):  # schedule-free optimizers
                self.optimizer.train()
            with self.maybe_activation_offload_context:
                loss = self._step_by_chunk(model, self._prepare_inputs(inputs), num_items_in_batch)
            gradients.empty_cache(self.args.torch_empty_cache_steps, self.state.global_step)
        if hasattr(self, "_tr_loss"):  # within `train`, not where a step is called by itself
            self._guard.add_loss(loss, self._tr_loss)
        return loss

    def _step_by_chunk(self, model: nn.Module, batch: Batch, counts: Tensor | None) -> Tensor:
        objective, ref_logps = self._objective, self._reference_logps(batch)
        forward = partial(self._chunk_logps, model, batch=batch)
        loss = partial(objective.loss_share, ref_logps=ref_logps, batch=batch, counts=counts)
        logps, aux_loss = gradients.backward_by_chunk(
            batch, forward, loss, objective.separable, self.accelerator, model, self._in_step
        )
        self._record(logps, aux_loss, ref_logps, batch)
        return loss(logps, aux_loss)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the window's prompts; the K log-probabilities are the outputs."""
        logps, aux_loss = self._batch_logps(model, inputs)
        ref_logps = self._reference_logps(inputs)
        loss = self._objective.loss_share(logps, aux_loss, ref_logps, inputs, num_items_in_batch)
        self._record(logps, aux_loss, ref_logps, inputs)
        return (loss, {"logps": logps.detach()}) if return_outputs else loss

    def _batch_logps(self, model: nn.Module, batch: Batch, with_aux_loss: bool = True) -> tuple[Tensor, Tensor | None]:
        """(B, K) log-probabilities of a batch, nats, chunk after chunk, and its load-balancing loss."""
        forward = partial(self._chunk_logps, model, batch=batch, with_aux_loss=with_aux_loss)
        return gradients.logps_by_chunk(batch, forward, self._in_step)

    def _chunk_logps(
        self, model: nn.Module, chunk: Chunk, batch: Batch, with_aux_loss: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """(B, K) log-probabilities of a chunk, zeros for what is not in it, and the use of its experts, if any."""
        outputs = forward_chunk(model, chunk, with_experts=with_aux_loss and self.aux_loss_enabled)
        logps = sum_by_completion(outputs.token_logps, chunk["completion_index"], batch["rewards"].shape)
        use = outputs.expert_use
        return logps.to(self.accelerator.device), None if use is None else use.to(self.accelerator.device)

    @property
    def _in_step(self) -> bool:
        """Whether all processes must come to each of a batch's forwards together."""
        return self.data_collator.in_pieces and (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _reference_logps(self, batch: Batch) -> Tensor:
        if "ref_logps" in batch:
            return batch["ref_logps"]
        return self.compute_ref_log_probs(reference.live_model(self.model, self.ref_model), batch)

    @torch.no_grad()
    def compute_ref_log_probs(self, model: nn.Module, inputs: Batch) -> Tensor:
        """(B, K) log-probabilities under the reference: its own model, the adapter as it came, or the bare base."""
        with reference.reference_mode(self.model, self.ref_model, self.accelerator, not self.state.global_step):
            return self._batch_logps(model, inputs, with_aux_loss=False)[0]

    @property
    def _objective(self) -> Objective:
        return Objective(
            self.loss_types, self.loss_weights, self.args.alpha, self.beta, self.args.negative_weight,
            self.router_aux_loss_coef, self.accelerator.num_processes, self.args.completion_mean,
        )  # fmt: skip

    def _record(self, logps, aux_loss, ref_logps, batch: Batch) -> None:
        """Add these prompts to the means that are logged."""
        training = self.model.training
        finite = self._log.add(training, self._objective, logps, aux_loss, ref_logps, batch)
        if training:
            self._guard.add_rows(batch.get("row_numbers"), finite)

    def _get_grad_norm(self, model, grad_norm=None):
        """The one place between a step's gradients and its update: what isn't finite goes no further."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        step, asked = self.state.global_step + 1, self._resume.stop.asked
        skip, self._resume.stop.stopping = self._guard.check(grad_norm, step, asked)
        if not skip:
            return grad_norm
        model.zero_grad()  # without gradients no optimizer moves anything
        self._guard.restore_loss(self._tr_loss)
        self._globalstep_last_logged += 1  # by which transformers divides the next logged loss
        self._resume.steps_without_loss += 1
        return 0.0

    # A run: how it starts, saves and goes on

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As transformers', exactly as if the run had not stopped; `True` takes the last checkpoint that is whole.

        Raises:
            UserError: no whole checkpoint, one that can't be loaded, or options, model or data that are not its own.
            SystemExit: with code 75, after SIGTERM and a checkpoint at the end of the step; with 130 after Ctrl-C.
        """
        checkpoint = self._resume.find(resume_from_checkpoint)
        with self._resume.noting_signals(), closing_bars(), without_library_bars():
            return super().train(checkpoint, *args, **kwargs)

    @reads_checkpoint
    def _init_training_state(self, max_steps, steps_an_epoch, num_train_epochs, checkpoint, trial):
        done, steps = super()._init_training_state(max_steps, steps_an_epoch, num_train_epochs, checkpoint, trial)
        return self._resume.position(max_steps, num_train_epochs, done, steps) if checkpoint else (done, steps)

    def _prepare_for_training(self, max_steps, train_dataloader, checkpoint):
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled) and self.accelerator.num_processes > 1:
            # else DDP doesn't wrap a model that `evaluate()` has used before, and each process trains its own
            vars(self.model).pop("_is_accelerate_prepared", None)
        read = self._resume.folder if self.is_deepspeed_enabled else None  # by a function of transformers, in here
        with explain_read_errors(read, self.args.output_dir):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, checkpoint)
        self._checks.check_model(prepared[0], gradients=False)  # of a sharded one, before a batch has its layout
        return prepared

    _load_from_checkpoint = reads_checkpoint(mapped(DPOTrainer._load_from_checkpoint))
    _load_best_model = mapped(DPOTrainer._load_best_model)
    _load_optimizer_and_scheduler = reads_checkpoint(DPOTrainer._load_optimizer_and_scheduler)
    _load_scaler = reads_checkpoint(DPOTrainer._load_scaler)
    _load_rng_state = reads_checkpoint(DPOTrainer._load_rng_state)

    def save_model(self, output_dir=None, _internal_call=False):
        with saving_model(self, output_dir, _internal_call):
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial):
        with self._resume.saving(Path(self._get_output_dir(trial))):
            super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder):
        if may_be_pushed(Path(checkpoint_folder)):
            super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        write_model_card(self, model_name, dataset_name, tags)

    # Evaluation

    def _evaluate(self, trial, ignore_keys, skip_scheduler=False):
        if skip_scheduler and self.state.global_step:  # `eval_on_start` of a run that is resumed
            return {}
        try:
            return arguments.with_best_metric(self, super()._evaluate(trial, ignore_keys, skip_scheduler))
        except EvaluationInterrupted:
            self._resume.leave(owing_evaluation=True)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        with reference.around_evaluation(self, eval_dataset):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """Metrics as `evaluate()` has them, of the same kinds of data; no predictions, for no logits are kept."""
        with reference.around_evaluation(self, test_dataset):
            test_dataset = self._prepare_dataset(test_dataset, self.processing_class, self.args, "test")
            if self.precompute_ref_logps:
                test_dataset = self._precompute_ref_logps(test_dataset, "test", self.args.per_device_eval_batch_size)
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        self._log.evaluation.clear()
        if isinstance(dataloader.dataset, IterableDataset):
            dataloader = streams.even_batches(dataloader, self.accelerator)
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._log.evaluation.gather()
        if means:
            output.metrics[f"{metric_key_prefix}_loss"] = self._objective.mean(means)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self.is_in_train and self._resume.stop.agree():
            raise EvaluationInterrupted
        batch = self._prepare_inputs(inputs)
        batch["weights"] = row_weights.last_batch_weights(batch, self.accelerator, self.args.dataloader_drop_last)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, batch).detach(), None, None

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.is_in_train and "loss" in logs:  # transformers' own line, which every process comes to
            logs.update(self._log.gather())
            self._guard.watch(logs, self.state.global_step)
        if "train_loss" in logs:  # of the whole run, also where it was resumed
            steps = self.state.global_step - self._resume.steps_without_loss
            logs["train_loss"] = self._total_loss_scalar / max(steps, 1)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Batch) -> int:
        return 6 * inputs["num_tokens"] * self.model.num_parameters(exclude_embeddings=True)
