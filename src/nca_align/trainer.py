"""NCATrainer: TRL's DPOTrainer on K rewarded completions per prompt. The only file that knows TRL's internals."""

import dataclasses
import textwrap
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import IterableDataset
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from trl import DPOConfig, DPOTrainer
from trl.models import prepare_deepspeed
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import create_model_from_path, get_config_model_id, global_then_local_main_first, use_adapter

from .batching import layout
from .batching.collator import RewardCollator
from .batching.tokenization import tokenize_dataset
from .config import NCAConfig
from .errors import UnsupportedError, UserError, UserTypeError, notify
from .models.adapters import base_model
from .models.loading import disable_nf4_repacking
from .models.logprobs import add_token_logps
from .store.checkpoints import read_errors_told
from .training.chunked_step import backward, gradient_sync, restore_rng, rng_restored, rng_state
from .training.epoch_tail import last_batch, prepare_to_skip, repeated_rows
from .training.guards import StepGuard
from .training.metrics import PromptMeans, calibration, row_metrics
from .training.objective import Objective, count_prompts
from .training.reference import add_reference_logps, reference_hash
from .training.resume import EvaluationCut, Resume
from .training.setup import own_reference, reward_rows, settle

_FORWARD_KEYS = ("input_ids", "attention_mask", "position_ids", "segments", "token_index", "target_ids")


class NCATrainer(DPOTrainer):
    """Aligns a model on prompts with K rewarded completions each, by InfoNCA, NCA or another listwise loss.

    It differs from TRL's `DPOTrainer` in its data (any K, with a reward per completion; a preference pair is K = 2 with
    rewards 1 and 0), its losses, and how their log-probabilities are computed; all else is inherited.

        trainer = NCATrainer(model="…", args=NCAConfig(alpha=0.3, beta=0.01), train_dataset=dataset)
        trainer.train()

    Args:
        model, ref_model, args, train_dataset, eval_dataset, processing_class, callbacks, optimizers,
            quantization_config, peft_config: as DPOTrainer's. `args` may be a plain `DPOConfig`. Data sets hold
            `prompt, completions, rewards`, or any format that `load_reward_dataset` knows.
        data_collator: None or a `RewardCollator`.
        compute_metrics: not supported; the metrics over completions are logged in any case.

    Raises:
        TypeError, ValueError, NotImplementedError: arguments or data that can't be trained on, in one sentence.
    """

    _tag_names = ["nca-align", "nca"]  # noqa: RUF012 (as in TRL)
    _name = "NCA"
    _paper = {  # noqa: RUF012
        "title": "Noise Contrastive Alignment of Language Models with Explicit Rewards",
        "id": "2402.05369",
        "citation": textwrap.dedent("""\
            @inproceedings{chen2024noise,
                title     = {{Noise Contrastive Alignment of Language Models with Explicit Rewards}},
                author    = {Huayu Chen and Guande He and Lifan Yuan and Ganqu Cui and Hang Su and Jun Zhu},
                year      = 2024,
                booktitle = {Advances in Neural Information Processing Systems 37 (NeurIPS 2024)},
                eprint    = {2402.05369},
            }"""),
    }
    model: PreTrainedModel
    args: Any  # an NCAConfig, with what transformers has made of its texts
    data_collator: RewardCollator
    ref_model: Any
    # compute_loss divides by the prompts of the whole accumulation window
    loss_is_scaled_for_ga = True

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
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = NCAConfig(f"{name.split('/')[-1]}-NCA")
        args, changes = NCAConfig.of(args)
        if changes:
            notify(changes)
        if data_collator is not None and not isinstance(data_collator, RewardCollator):
            raise UserTypeError(
                f"`data_collator` is a {type(data_collator).__name__}, but NCATrainer needs a RewardCollator, which "
                "lays out K completions a prompt; leave it out."
            )
        if compute_metrics is not None:
            raise UnsupportedError(
                "`compute_metrics` can't be used with NCATrainer, which builds no logits; its metrics over completions "
                "are logged in any case, and a callback's `on_evaluate` receives them."
            )
        if train_dataset is None:
            raise UserError("`train_dataset` is None, but NCATrainer needs one, also to evaluate only.")
        # Before the model is loaded, so that an invalid row costs no waiting
        train_dataset = reward_rows(train_dataset, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: reward_rows(dataset, name) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = reward_rows(eval_dataset, "eval")
        evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        settle(args, model, [train_dataset, *evaluated])
        self._reference_given = ref_model is not None  # a checkpoint belongs to it
        if ref_model is None:
            ref_model = own_reference(model, peft_config, args)
        self._rebalancer: BatchRebalanceSampler | None = None
        self._tokens_here = 0  # read by the model on this process
        self._given_collator = data_collator
        self._set_up = False
        self._sums = {"train": PromptMeans(), "eval": PromptMeans()}
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self._set_up_layout()
        self._guard = StepGuard(self.accelerator, args.nonfinite, args.collapse_nats)
        self._resume = Resume(self)
        self.add_callback(self._resume)

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Any known format → `prompt_ids, completion_ids, rewards`; a data set that has them comes back as it is."""
        if {"prompt_ids", "completion_ids", "rewards"} <= set(next(iter(dataset))):
            return dataset
        if self._set_up:  # one for `evaluate()`; the constructor converts its own before it loads the model
            dataset = reward_rows(dataset, dataset_name)
        with global_then_local_main_first():
            dataset, notices = tokenize_dataset(
                dataset, self._tokenizer, args.max_prompt_length, args.max_length, args.length_column_name,
                num_proc=args.dataset_num_proc, name=dataset_name,
            )  # fmt: skip
        for notice in notices:
            notify(notice)
        return dataset

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [
                "prompt_ids", "completion_ids", "rewards", "ref_logps", "row_number", self.args.length_column_name,
            ]  # fmt: skip

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if isinstance(sampler, BatchRebalanceSampler):  # else its epochs have an order of their own
            sampler.seed = seed
            self._rebalancer = sampler
        if isinstance(sampler, LengthGroupedSampler):  # else a resumed epoch has another order
            own: Any = sampler
            own.set_epoch = lambda epoch: setattr(own, "generator", torch.Generator().manual_seed(seed + epoch))
        return sampler

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if self._rebalancer is not None:
            prepare_to_skip(loader.batch_sampler, self._rebalancer)
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        """The micro-batches of one step, and what they are averaged over: prompts, and tokens of best completions."""
        batches = []
        for _ in range(num_batches):
            try:
                batch = next(epoch_iterator)
            except StopIteration:
                break
            batch["weights"] = self._row_weights(batch)
            batches.append(batch)
        self._leave_out_repeated(batches)
        counts = sum(map(count_prompts, batches), torch.zeros(2, dtype=torch.float64, device=device))
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return batches, counts

    def _leave_out_repeated(self, batches: list[dict[str, Any]]) -> None:
        """Weight 0 for the rows that `batch_rebalance` repeats to fill an epoch's last step."""
        if self._rebalancer is None or not self.accelerator.gradient_state.end_of_dataloader:
            return
        repeated = repeated_rows(self._rebalancer)
        for batch in batches:
            for i, row in enumerate(batch.get("row_numbers", [])):
                if row in repeated:
                    batch["weights"][i] = 0

    def _row_weights(self, batch: dict[str, Any]) -> torch.Tensor:
        """(B,) 1 for each prompt, and 0 for those that accelerate repeats to even out an epoch's last batch."""
        size, device = len(batch["rewards"]), batch["rewards"].device
        weights = torch.ones(size, device=device)
        state = self.accelerator.gradient_state
        rebalanced = self.model.training and self.args.train_sampling_strategy == "batch_rebalance"
        if state.end_of_dataloader and not rebalanced:
            remainder, total = last_batch(state.active_dataloader, self.args.dataloader_drop_last)
            if remainder:
                real = remainder - self.accelerator.process_index * (total // self.accelerator.num_processes)
                weights[max(0, real) :] = 0
        return weights

    # Layout

    def _set_up_layout(self) -> None:
        """The model's head, its layout and the collator, once the model is there and before its first forward."""
        if self._set_up:
            return
        self._set_up = True
        args = self.args
        self._objective = Objective(self.loss_types, self.loss_weights, args.alpha, args.beta, args.negative_weight)
        self.data_collator = self._given_collator or RewardCollator(
            pad_token_id=self._tokenizer.pad_token_id,
            completions_per_forward=self.args.completions_per_forward,
            pad_to_multiple_of=self.args.pad_to_multiple_of,
        )
        models = [base_model(self.model)]
        if self.ref_model is not None:
            models.append(base_model(self.accelerator.unwrap_model(self.ref_model)))
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise UserError(
                "`model` has no parameter that is trained; load an adapter with `is_trainable=True`, or give a "
                "`peft_config`."
            )
        for model in models:
            add_token_logps(model)
            disable_nf4_repacking(model)
        # Before any forward: bitsandbytes repacks its weights there on a CPU
        if self.precompute_ref_logps or self._reference_given:
            self._reference_hash = reference_hash(models[-1] if self.ref_model is not None else self.model)
        self._layout_to_verify: str | None = None
        if self._given_collator is None:
            self._choose_layout(models)

    def _choose_layout(self, models: list[PreTrainedModel]) -> None:
        requested = self.args.layout
        obstacle = None
        if requested != "padded":
            obstacle = layout.obstacle(models, self.model, self.args.pad_to_multiple_of)
            if obstacle and requested == "prefix_shared":
                raise UnsupportedError(f"`layout: prefix_shared` can't be used here: {obstacle}. Use `layout: padded`.")
        if requested == "padded" or obstacle:
            notify(f"Layout: padded, {obstacle or 'as asked for'}.")
            return
        for model in models:
            layout.share_prefixes(model)
        self.data_collator.layout = "prefix_shared"
        self._layout_to_verify = requested
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):  # those have no usable model before they wrap it
            self._verify_layout(self.model, gradients=True)

    def _verify_layout(self, model: nn.Module, gradients: bool) -> None:
        """Compare the packed row with padded on the first rows, once; all processes decide alike."""
        requested, self._layout_to_verify = self._layout_to_verify, None
        was_training = self.model.training
        self.model.eval()
        with self.accelerator.autocast():
            difference = layout.compare(
                layout.sample_rows(self.train_dataset), self.data_collator,
                partial(self._chunk_logps, model, auxiliary=False), self.model, self.accelerator.device, gradients,
            )  # fmt: skip
        self.model.train(was_training)
        quantization = getattr(
            base_model(self.accelerator.unwrap_model(self.model)).config, "quantization_config", None
        )
        agrees, figures = layout.judge(
            gather_object([difference]), self.accelerator.mixed_precision,
            self.model.dtype, getattr(quantization, "bnb_4bit_compute_dtype", None),  # NF4 computes in its own
            *(parameter.dtype for parameter in self.model.parameters() if parameter.requires_grad),  # TRL's QLoRA: bf16
        )  # fmt: skip
        if agrees:
            notify(f"Layout: prefix_shared, each shared token once; agrees with padded on the first rows: {figures}.")
        elif requested == "prefix_shared":
            raise UnsupportedError(
                f"`layout: prefix_shared` does not agree with padded on the first rows ({figures}): "
                f"{type(base_model(self.model)).__name__} mixes positions in a way that it can't follow. "
                "Use `layout: padded`."
            )
        else:
            self.data_collator.layout = "padded"
            notify(f"Layout: padded, since prefix_shared does not agree with it on the first rows ({figures}).")

    # Log-probabilities

    def _chunk_logps(
        self, model: nn.Module, chunk: dict[str, Any], shape: torch.Size, auxiliary: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, K) log-probabilities of a chunk's completions, zeros for all others, and its load-balancing loss."""
        inputs = {name: chunk[name] for name in _FORWARD_KEYS if name in chunk}
        if auxiliary and self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        outputs = model(**inputs, row_length=chunk["input_ids"].shape[1])
        token_logps = outputs.token_logps
        # in float64, since a float32 `index_add` on a CPU adds one by one: 1e-3 nats off after 300 tokens
        logps = torch.zeros(shape.numel(), dtype=torch.float64, device=token_logps.device)
        logps = logps.index_add(0, chunk["completion_index"].to(token_logps.device), token_logps.double())
        return logps.view(shape).float().to(self.accelerator.device), outputs.aux_loss

    @torch.no_grad()
    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """(B, K) log-probabilities under the reference: its own model, the adapter as it came, or the bare base."""
        shape = inputs["rewards"].shape
        adapter: Any = nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            policy = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
        was_training = self.model.training
        self.model.eval()  # the reference has no dropout, and nothing to checkpoint
        try:
            with adapter, self.accelerator.autocast():
                chunks = self._in_step(inputs["chunks"])
                parts = [own * self._chunk_logps(model, chunk, shape, auxiliary=False)[0] for chunk, own in chunks]
                return torch.stack(parts).sum(0)
        finally:
            self.model.train(was_training)

    def _reference_logps(self, inputs: dict[str, Any]) -> torch.Tensor:
        if "ref_logps" in inputs:
            return inputs["ref_logps"]
        if self.ref_model is None and not is_peft_model(self.model):
            raise UserError(
                "This data set has no cached reference log-probabilities, and `precompute_ref_log_probs` keeps no "
                "reference model in memory; give `ref_model`, or set `precompute_ref_log_probs: false`."
            )
        return self.compute_ref_log_probs(self.ref_model or self.model, inputs)

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        """`dataset` with a column `ref_logps`, cached or computed shard by shard; a stream keeps the live reference."""
        self._set_up_layout()
        if isinstance(dataset, IterableDataset) or "ref_logps" in dataset.column_names:
            return dataset
        model, engine = self.ref_model or self.model, None
        if self.ref_model is None and self.is_deepspeed_enabled and self.model_wrapped is self.model:
            model = engine = prepare_deepspeed(self.model, self.accelerator)  # places and gathers it before training
        if self._layout_to_verify:
            self._verify_layout(model, gradients=False)
        per_forward = self.args.completions_per_forward
        try:
            return add_reference_logps(
                dataset,
                key=(self._reference_hash, str(self.accelerator.mixed_precision), str(self.model.dtype)),
                compute=lambda batch: self.compute_ref_log_probs(model, batch),
                # no activations are kept, so there is room for more at a time
                collator=dataclasses.replace(
                    self.data_collator, completions_per_forward=per_forward and 4 * per_forward
                ),
                batch_size=self.args.precompute_ref_batch_size or 4 * batch_size,
                accelerator=self.accelerator,
                name=name,
            )
        finally:
            if engine is not None:
                engine.destroy()  # its hooks on the model would get in the way of the training engine's

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the window's prompts; the K log-probabilities are the outputs."""
        shape = inputs["rewards"].shape
        logps, auxiliary = 0.0, None
        for chunk, own in self._in_step(inputs["chunks"]):
            chunk_logps, chunk_auxiliary = self._chunk_logps(model, chunk, shape)
            logps = logps + own * chunk_logps
            if chunk_auxiliary is not None:
                share = own * len(chunk["completion_index"]) / sum(len(c["completion_index"]) for c in inputs["chunks"])
                auxiliary = share * chunk_auxiliary + (0.0 if auxiliary is None else auxiliary)
        ref_logps = self._reference_logps(inputs)
        loss = self._weighted_loss(logps, ref_logps, inputs, num_items_in_batch)
        if auxiliary is not None:
            loss = loss + self._auxiliary_loss(auxiliary, inputs, num_items_in_batch)
        self._record(logps, ref_logps, auxiliary, inputs)
        return (loss, {"logps": logps.detach()}) if return_outputs else loss

    def _weighted_loss(self, logps, ref_logps, inputs, counts: torch.Tensor | None) -> torch.Tensor:
        loss = self._objective.share(logps, ref_logps, inputs, counts)
        # gradients are averaged over processes, each of which holds its share of the sum
        return loss if counts is None else loss * self.accelerator.num_processes

    def _auxiliary_loss(self, auxiliary: torch.Tensor, inputs, counts: torch.Tensor | None) -> torch.Tensor:
        share = 1.0
        if counts is not None:
            share = inputs["weights"].sum() / counts[0].to(auxiliary.dtype) * self.accelerator.num_processes
        return self.router_aux_loss_coef * share * auxiliary.to(self.accelerator.device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-batch, all completions at once, or `completions_per_forward` at a time with a backward each."""
        if self._layout_to_verify:
            self._verify_layout(model, gradients=False)
        if self.args.completions_per_forward is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            model.train()
            if hasattr(self.optimizer, "train") and callable(self.optimizer.train):  # schedule-free optimizers
                self.optimizer.train()
            inputs = self._prepare_inputs(inputs)
            with self.maybe_activation_offload_context:
                loss = self._chunked_step(model, inputs, num_items_in_batch)
        if hasattr(self, "_tr_loss"):  # within `train`, not where a step is called by itself
            self._guard.add_loss(loss, self._tr_loss)
        return loss

    def _chunked_step(self, model, inputs: dict[str, Any], counts: torch.Tensor | None) -> torch.Tensor:
        """Exact gradients with the activations of one chunk: d loss / d logp_i, times d logp_i, chunk by chunk.

        A separable loss (NCA) has d loss / d logp_i from logp_i alone. The others first take all K without a gradient.
        """
        chunks, shape = inputs["chunks"], inputs["rewards"].shape
        terms = sum(len(chunk["completion_index"]) for chunk in chunks)
        ref_logps = self._reference_logps(inputs)
        logps = torch.zeros(shape, device=self.accelerator.device)
        in_step = self._in_step(chunks)
        states: list = [None] * len(in_step)
        if not self._objective.separable:
            checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
            with torch.no_grad(), checkpointing, self.compute_loss_context_manager():
                for i, (chunk, own) in enumerate(in_step):
                    states[i] = rng_state(self.accelerator.device)
                    logps += own * self._chunk_logps(model, chunk, shape, auxiliary=False)[0]
        total_auxiliary = None
        for chunk, own in in_step[len(chunks) :]:
            with gradient_sync(self.accelerator, model, last=False):
                backward(self.accelerator, own * self._chunk_logps(model, chunk, shape)[0].sum())
        for i, chunk in enumerate(chunks):
            mine = torch.zeros(shape.numel(), dtype=torch.bool, device=logps.device)
            mine = mine.index_fill(0, chunk["completion_index"], True).view(shape)
            with gradient_sync(self.accelerator, model, last=i == len(chunks) - 1):
                with self.compute_loss_context_manager(), rng_restored(states[i], self.accelerator.device):
                    live, auxiliary = self._chunk_logps(model, chunk, shape)
                loss = self._weighted_loss(torch.where(mine, live, logps), ref_logps, inputs, counts)
                if auxiliary is not None:
                    auxiliary = auxiliary * len(chunk["completion_index"]) / terms
                    loss = loss + self._auxiliary_loss(auxiliary, inputs, counts)
                    total_auxiliary = auxiliary.detach() + (0.0 if total_auxiliary is None else total_auxiliary)
                backward(self.accelerator, loss)
            logps = torch.where(mine, live.detach(), logps)
        with torch.no_grad():
            loss = self._weighted_loss(logps, ref_logps, inputs, counts)
            if total_auxiliary is not None:
                loss = loss + self._auxiliary_loss(total_auxiliary, inputs, counts)
            self._record(logps, ref_logps, total_auxiliary, inputs)
        return loss.detach()

    def _in_step(self, chunks: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
        """The chunks, which count 1, and the last one again, which counts 0, as often as another process has more.

        Sharded models gather their weights in each forward, which all processes must come to.
        """
        waiting = 0
        if self.args.completions_per_forward and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            waiting = max(gather_object([len(chunks)])) - len(chunks)
        return [(chunk, 1.0) for chunk in chunks] + [(chunks[-1], 0.0)] * waiting

    # Faults: what stops a run, and how it goes on

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As transformers', exactly as if the run had not stopped; `True` takes the last checkpoint that is whole.

        Raises:
            UserError: no whole checkpoint, one that can't be loaded, or options, model or data that are not its own.
            SystemExit: with code 75, after SIGTERM and a checkpoint at the end of the step.
        """
        checkpoint = self._resume.find(resume_from_checkpoint)
        with self._resume.watching_sigterm(), read_errors_told(checkpoint, self.args.output_dir):
            return super().train(checkpoint, *args, **kwargs)

    def _init_training_state(self, max_steps, steps_an_epoch, num_train_epochs, checkpoint, trial):
        done, steps = super()._init_training_state(max_steps, steps_an_epoch, num_train_epochs, checkpoint, trial)
        return (self._resume.epochs_done(max_steps, num_train_epochs, done) if checkpoint else done), steps

    def _get_grad_norm(self, model, grad_norm=None):
        """The one place between a step's gradients and its update: what isn't finite goes no further."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        skip, self._resume.stopping = self._guard.check(
            grad_norm, self.state.global_step + 1, self._resume.asked_to_stop
        )
        if not skip:
            return grad_norm
        model.zero_grad()  # without gradients no optimizer moves anything
        self._guard.restore_loss(self._tr_loss)
        self._globalstep_last_logged += 1
        self._resume.steps_without_loss += 1
        return 0.0

    def _save_checkpoint(self, model, trial):
        with self._resume.saving(Path(self._get_output_dir(trial))):
            super()._save_checkpoint(model, trial)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        if skip_scheduler and self.state.global_step:  # `eval_on_start` of a run that is resumed
            return {}
        try:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except EvaluationCut:
            self._resume.leave(owing_evaluation=True)

    # Evaluation and metrics

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if self.is_in_train and self._resume.agree_to_stop():
            raise EvaluationCut
        inputs = self._prepare_inputs(inputs)
        inputs["weights"] = self._row_weights(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        reload = (
            eval_dataset is not None
            and not isinstance(eval_dataset, str)
            and self.precompute_ref_logps
            and self.ref_model is None
            and not is_peft_model(self.model)
            and self.state.global_step > 0
        )
        if reload:
            self.ref_model = self._reloaded_reference()
        random = rng_state(self.accelerator.device)
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            if reload:
                self.ref_model = None
            restore_rng(random, self.accelerator.device)  # no evaluation changes the training after it

    def _reloaded_reference(self) -> nn.Module:
        """The reference from where the model came from, if those still are its weights from before training."""
        path = get_config_model_id(self.model.config)
        try:
            reference = create_model_from_path(path, dtype=self.model.dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            reason = f"it could not be loaded again from {path!r} ({type(error).__name__})"
        else:
            if reference_hash(reference) == self._reference_hash:
                add_token_logps(reference)
                if self.data_collator.layout == "prefix_shared":
                    layout.share_prefixes(reference)
                return self.accelerator.prepare_model(reference, evaluation_mode=True)
            reason = f"the weights in {path!r} are not those that it had before training"
        raise UserError(
            "`evaluate()` on a new data set needs the reference model, which `precompute_ref_log_probs` did not keep: "
            f"{reason}. Give the data set as `eval_dataset` at construction, or give `ref_model`."
        )

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        self._sums["eval"].clear()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._sums["eval"].gather()
        if means:
            loss = sum(
                w * means.pop(f"loss/{name}") for name, w in zip(self.loss_types, self.loss_weights, strict=True)
            )
            loss += self.router_aux_loss_coef * means.get("aux_loss", 0.0)
            output.metrics[f"{metric_key_prefix}_loss"] = loss
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    @torch.no_grad()
    def _record(self, logps, ref_logps, auxiliary, inputs: dict[str, Any]) -> None:
        """Add these prompts to the means that are logged."""
        logps, ref_logps = logps.detach(), ref_logps.detach()
        mode = "train" if self.model.training else "eval"
        weights = inputs.get("weights", torch.ones(len(logps), device=logps.device))
        if mode == "train":
            finite = (logps.isfinite() & ref_logps.isfinite()).all(1)
            self._guard.add_rows(inputs.get("row_numbers"), finite)
            logps, ref_logps = (values.where(finite.unsqueeze(1), 0.0) for values in (logps, ref_logps))
            weights = weights * finite
        about = (logps, ref_logps, inputs["rewards"], inputs["valid"], self.args.alpha, self.beta)
        rows = row_metrics(*about) | (calibration(*about) if mode == "eval" else {})
        rows = {name: (values, weights * own) for name, (values, own) in rows.items()}
        if mode == "eval":  # in training the loss is logged by transformers
            for name, _, values, own in self._objective.terms(logps, ref_logps, inputs):
                rows[f"loss/{name}"] = (values, own)
        if auxiliary is not None:
            rows["aux_loss"] = (auxiliary.detach().reshape(1), weights.sum().reshape(1))
        self._sums[mode].add(rows)
        if mode == "train":
            self._tokens_here += inputs["num_tokens"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:  # transformers' own line, which every process comes to
            means = self._sums["train"].gather() | {"num_tokens": sum(gather_object([self._tokens_here]))}
            self._metrics["train"].update({name: [value] for name, value in means.items()})
            self._guard.watch(means.get("logratios/best"), self.state.global_step)
        if "train_loss" in logs:  # of the whole run, also where it was resumed
            steps = self.state.global_step - self._resume.steps_without_loss
            logs["train_loss"] = self._total_loss_scalar / max(steps, 1)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 6 * inputs["num_tokens"] * self.model.num_parameters(exclude_embeddings=True)
