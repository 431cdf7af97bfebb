"""NCATrainer: TRL's DPOTrainer on K rewarded completions per prompt. The only file that knows TRL's internals."""

import dataclasses
import textwrap
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model
from datasets import IterableDataset
from torch import nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel
from transformers.trainer_pt_utils import BatchRebalanceSampler
from trl import DPOConfig, DPOTrainer
from trl.models import prepare_deepspeed
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import create_model_from_path, get_config_model_id, global_then_local_main_first, use_adapter

from . import layout
from .chunks import backward, gradient_sync, rng_restored, rng_state
from .collator import RewardCollator
from .config import NCAConfig
from .logprobs import add_token_logps
from .metrics import PromptMeans, row_metrics
from .objective import Objective, count_prompts
from .preparation import base_model, keep_nf4_differentiable, own_reference, reward_rows, say, settle
from .reference import add_reference_logps, reference_hash
from .tokenization import tokenize_dataset

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
            say(changes)
        if data_collator is not None and not isinstance(data_collator, RewardCollator):
            raise TypeError(
                f"`data_collator` is a {type(data_collator).__name__}, but NCATrainer needs a RewardCollator, which "
                "lays out K completions a prompt; leave it out."
            )
        if compute_metrics is not None:
            raise NotImplementedError(
                "`compute_metrics` can't be used with NCATrainer, which builds no logits; its metrics over completions "
                "are logged in any case, and a callback's `on_evaluate` receives them."
            )
        if train_dataset is None:
            raise ValueError("`train_dataset` is None, but NCATrainer needs one, also to evaluate only.")
        # Before the model is loaded, so that an invalid row costs no waiting
        train_dataset = reward_rows(train_dataset, "train")
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: reward_rows(dataset, name) for name, dataset in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = reward_rows(eval_dataset, "eval")
        settle(args, [train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])])
        if ref_model is None:
            ref_model = own_reference(model, peft_config, args)
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
            say(notice)
        return dataset

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [
                "prompt_ids", "completion_ids", "rewards", "ref_logps", self.args.length_column_name,
            ]  # fmt: skip

    def _get_train_sampler(self, train_dataset=None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, BatchRebalanceSampler):  # else its epochs have an order of their own
            sampler.seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return sampler

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
        counts = sum(map(count_prompts, batches), torch.zeros(2, dtype=torch.float64, device=device))
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, "sum")
        return batches, counts

    def _row_weights(self, batch: dict[str, Any]) -> torch.Tensor:
        """(B,) 1 for each prompt, and 0 for those that accelerate repeats to even out an epoch's last batch."""
        size, device = len(batch["rewards"]), batch["rewards"].device
        weights = torch.ones(size, device=device)
        state = self.accelerator.gradient_state
        rebalanced = self.model.training and self.args.train_sampling_strategy == "batch_rebalance"
        if state.end_of_dataloader and state.remainder > 0 and not rebalanced:
            per_process = state.active_dataloader.total_batch_size // self.accelerator.num_processes
            real = state.remainder - self.accelerator.process_index * per_process
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
        for model in models:
            add_token_logps(model)
            keep_nf4_differentiable(model)
        if self.precompute_ref_logps:  # before any forward: bitsandbytes repacks its weights there on a CPU
            self._reference_hash = reference_hash(models[-1] if self.ref_model is not None else self.model)
        self._layout_to_verify = None
        if self._given_collator is None:
            self._choose_layout(models)

    def _choose_layout(self, models: list[PreTrainedModel]) -> None:
        requested = self.args.layout
        obstacle = None
        if requested != "padded":
            obstacle = layout.obstacle(models, self.model, self.args.pad_to_multiple_of)
            if obstacle and requested == "prefix_shared":
                raise NotImplementedError(
                    f"`layout: prefix_shared` can't be used here: {obstacle}. Use `layout: padded`."
                )
        if requested == "padded" or obstacle:
            say(f"Layout: padded, {obstacle or 'as asked for'}.")
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
        agrees, figures = layout.judge(gather_object([difference]), self.accelerator.mixed_precision, self.model.dtype)
        if agrees:
            say(f"Layout: prefix_shared, each shared token once; agrees with padded on the first rows: {figures}.")
        elif requested == "prefix_shared":
            raise NotImplementedError(
                f"`layout: prefix_shared` does not agree with padded on the first rows ({figures}): "
                f"{type(base_model(self.model)).__name__} mixes positions in a way that it can't follow. "
                "Use `layout: padded`."
            )
        else:
            self.data_collator.layout = "padded"
            say(f"Layout: padded, since prefix_shared does not agree with it on the first rows ({figures}).")

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
    def compute_ref_log_probs(self, model: nn.Module | None, inputs: dict[str, Any]) -> torch.Tensor:
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
                return sum(self._chunk_logps(model, chunk, shape, auxiliary=False)[0] for chunk in inputs["chunks"])
        finally:
            self.model.train(was_training)

    def _reference_logps(self, inputs: dict[str, Any]) -> torch.Tensor:
        if "ref_logps" in inputs:
            return inputs["ref_logps"]
        if self.ref_model is None and not is_peft_model(self.model):
            raise ValueError(
                "This data set has no cached reference log-probabilities, and `precompute_ref_log_probs` keeps no "
                "reference model in memory; give `ref_model`, or set `precompute_ref_log_probs: false`."
            )
        return self.compute_ref_log_probs(self.ref_model or self.model, inputs)

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        """`dataset` with a column `ref_logps`, cached or computed shard by shard; a stream keeps the live reference."""
        self._set_up_layout()
        if isinstance(dataset, IterableDataset) or "ref_logps" in dataset.column_names:
            return dataset
        model = self.ref_model or self.model
        if self.ref_model is None and self.is_deepspeed_enabled:
            if self._precompute_engine is None:
                self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)
            model = self._precompute_engine
        if self._layout_to_verify:
            self._verify_layout(model, gradients=False)
        per_forward = self.args.completions_per_forward
        return add_reference_logps(
            dataset,
            key=(self._reference_hash, str(self.accelerator.mixed_precision), str(self.model.dtype)),
            compute=lambda batch: self.compute_ref_log_probs(model, batch),
            # no activations are kept, so there is room for more at a time
            collator=dataclasses.replace(self.data_collator, completions_per_forward=per_forward and 4 * per_forward),
            batch_size=self.args.precompute_ref_batch_size or 4 * batch_size,
            accelerator=self.accelerator,
            name=name,
        )

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss over the window's prompts; the K log-probabilities are the outputs."""
        shape = inputs["rewards"].shape
        logps, auxiliary = 0.0, None
        for chunk in inputs["chunks"]:
            chunk_logps, chunk_auxiliary = self._chunk_logps(model, chunk, shape)
            logps = logps + chunk_logps
            if chunk_auxiliary is not None:
                share = len(chunk["completion_index"]) / sum(len(c["completion_index"]) for c in inputs["chunks"])
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
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):  # schedule-free optimizers
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        with self.maybe_activation_offload_context:
            return self._chunked_step(model, inputs, num_items_in_batch)

    def _chunked_step(self, model, inputs: dict[str, Any], counts: torch.Tensor | None) -> torch.Tensor:
        """Exact gradients with the activations of one chunk: d loss / d logp_i, times d logp_i, chunk by chunk.

        A separable loss (NCA) has d loss / d logp_i from logp_i alone. The others first take all K without a gradient.
        """
        chunks, shape = inputs["chunks"], inputs["rewards"].shape
        terms = sum(len(chunk["completion_index"]) for chunk in chunks)
        ref_logps = self._reference_logps(inputs)
        logps = torch.zeros(shape, device=self.accelerator.device)
        states: list = [None] * len(chunks)
        if not self._objective.separable:
            checkpointing = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
            with torch.no_grad(), checkpointing, self.compute_loss_context_manager():
                for i, chunk in enumerate(chunks):
                    states[i] = rng_state(self.accelerator.device)
                    logps += self._chunk_logps(model, chunk, shape, auxiliary=False)[0]
        total_auxiliary = None
        for _ in range(self._chunks_to_wait_for(len(chunks))):
            with gradient_sync(self.accelerator, model, last=False):
                backward(self.accelerator, 0.0 * self._chunk_logps(model, chunks[-1], shape)[0].sum())
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

    def _chunks_to_wait_for(self, own: int) -> int:
        """How many chunks more another process has: sharded models gather their weights in each, all in step."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return 0
        return max(gather_object([own])) - own

    # Evaluation and metrics

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
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
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            if reload:
                self.ref_model = None

    def _reloaded_reference(self) -> nn.Module:
        """The reference from where the model came from, if those still are its weights from before training."""
        path = get_config_model_id(self.model.config)
        try:
            reference = create_model_from_path(path, dtype=self.model.dtype)
        except (OSError, ValueError) as error:
            reason = f"it could not be loaded again from {path!r} ({type(error).__name__})"
        else:
            if reference_hash(reference) == self._reference_hash:
                add_token_logps(reference)
                if self.data_collator.layout == "prefix_shared":
                    layout.share_prefixes(reference)
                return self.accelerator.prepare_model(reference, evaluation_mode=True)
            reason = f"the weights in {path!r} are not those that it had before training"
        raise ValueError(
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
        rows = row_metrics(logps, ref_logps, inputs["rewards"], inputs["valid"], self.args.alpha, self.beta)
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
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 6 * inputs["num_tokens"] * self.model.num_parameters(exclude_embeddings=True)
