"""Methods beside each other on the same reward data: NCATrainer's losses, and TRL's own trainers as baselines."""

import math
from dataclasses import fields
from typing import Any

from datasets import Dataset
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from ...config import NCAConfig
from ...data.cleaning import Prompt
from ...data.strategies import (
    PAIRS,
    check_strategy,
    refuse_masked,
    select_completions,
    to_preference_pairs,
    to_unpaired,
)
from ...errors import UserError
from ...losses import LABELS, LOSSES, labels_alone, loss_name
from ...trainer import NCATrainer
from ...training.log_schedule import logging_interval

# TRL's name of a DPOTrainer loss for each method that goes through it
_DPO_LOSSES = {
    "dpo": "sigmoid", "ipo": "ipo", "hinge": "hinge", "nca_pair": "nca_pair", "apo_zero": "apo_zero", "sft": "sft",
}  # fmt: skip
METHODS = (*LOSSES, *_DPO_LOSSES, "kto")


def check_method(method: str, strategy: str | None) -> tuple[str, str]:
    """The method's name, and its strategy: by default all completions, or best_worst where it takes pairs.

    Raises:
        ValueError: no such method, or a strategy that it can't train on.
    """
    name = loss_name(method, METHODS)
    if strategy is not None:
        check_strategy(strategy)
    if name in _DPO_LOSSES:
        strategy = strategy or "best_worst"
        if strategy not in PAIRS:
            raise UserError(
                f"`strategy` is {strategy!r} with `method` {name}, which trains on pairs; it must be one of "
                f"{', '.join(PAIRS)}"
            )
        if name == "sft" and strategy != "best_worst":
            raise UserError(
                f"`strategy` is {strategy!r} with `method` sft, which trains on the best completion: use best_worst"
            )
    elif name == "kto" and (strategy or "rewards") in PAIRS:
        raise UserError(f"`strategy` is {strategy!r} with `method` kto, which trains on no pairs; use rewards")
    return name, strategy or "rewards"


def build_trainer(
    method: str,
    model: Any,
    args: NCAConfig,
    train_dataset: Dataset,
    tokenizer: Any,
    *,
    strategy: str | None = None,
    **arguments: Any,
) -> Trainer:
    """A trainer of `method` on what `strategy` takes of the rewarded completions, its steps those of all other methods.

    Every method sees the same tokens of the same prompts in as many steps: where a strategy makes several rows of a
    prompt, a batch holds as many more. They are shuffled, so one step's prompts needn't be another method's. β,
    learning rate, LoRA and seeds are those of `args`; α counts where the loss has one.

    Args:
        method: one of `METHODS`, or a loss of one's own; `sft` trains on the best completion alone.
        model: id, folder or instance.
        args: of NCATrainer; TRL's trainers get the fields that they share.
        train_dataset: `prompt, completions, rewards`.
        tokenizer: the model's.
        strategy: see `data.strategies.choose`; by default `rewards`, or best_worst for DPOTrainer's losses.
        **arguments: `peft_config`, `quantization_config`, `callbacks`, as the trainers'.

    Raises:
        ValueError: see `check_method`; no row is left; TRL's trainers would see other tokens of a prompt.
    """
    name, strategy = check_method(method, strategy)
    if name in (*_DPO_LOSSES, "kto"):
        _require_whole_turns(train_dataset, name)
    trainer: Any  # its class, that of its arguments, and those of its own
    config: Any
    own: dict[str, Any]
    if name in _DPO_LOSSES:
        rows = to_preference_pairs(train_dataset, strategy, args.seed)
        trainer, config, own = DPOTrainer, DPOConfig, {"loss_type": [_DPO_LOSSES[name]], "loss_weights": None}
    elif name == "kto":
        # its KL term takes a fixed order of rows, so they are shuffled here, once
        rows = to_unpaired(select_completions(train_dataset, strategy, args.seed)).shuffle(seed=args.seed)
        trainer, config, own = KTOTrainer, KTOConfig, {"loss_type": "kto", "train_sampling_strategy": "sequential"}
    else:
        rows = select_completions(train_dataset, strategy, args.seed)
        trainer, config, own = NCATrainer, NCAConfig, {"loss_type": [name], "loss_weights": None}
        own["completion_mean"] = args.completion_mean and name in LABELS
        if labels_alone([name]):
            own["alpha"] = None
    steps = _same_steps(args, len(train_dataset), len(rows), whole=name == "kto")
    logs: dict[str, Any] = {}
    if args.is_unsaid("logging_steps"):  # NCATrainer chooses by itself
        logs = {"logging_steps": None if config is NCAConfig else logging_interval(steps["max_steps"])}
    own_args = _shared(config, args, **steps, **logs, **own)
    return trainer(model=model, args=own_args, train_dataset=rows, processing_class=tokenizer, **arguments)


def _require_whole_turns(dataset: Dataset, method: str) -> None:
    """Refuse rows of which TRL's trainers would train on other tokens than NCATrainer.

    They open another turn behind a prompt that ends in an assistant's, which NCATrainer continues.
    """
    refuse_masked(dataset)
    for i, prompt in enumerate(dataset["prompt"]):
        if Prompt(prompt, None, {}).continues:
            raise UserError(
                f"row {i}: `prompt` ends in an assistant's turn. TRL's `method` {method} doesn't continue it as "
                "NCATrainer does, so they would see other tokens. Leave such rows out, or compare NCATrainer's losses "
                "alone."
            )


def _same_steps(args: NCAConfig, prompts: int, rows: int, whole: bool) -> dict[str, Any]:
    """As many steps as there are of batches of prompts, in the place of epochs, and a batch's rows in proportion.

    More rows are accumulated, so that they need no more memory; `whole` leaves them one batch, over which KTO's
    estimate of the KL goes.
    """
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * math.ceil(prompts / batch))
    times, share = args.gradient_accumulation_steps, rows / prompts
    accumulated = times if whole else max(1, round(times * share))
    per_device = max(1, round(args.per_device_train_batch_size * times * share / accumulated))
    return {
        "max_steps": steps, "num_train_epochs": NCAConfig.num_train_epochs,
        "per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulated,
    }  # fmt: skip


def _shared(kind: type, args: NCAConfig, **changes: Any) -> Any:
    """A config of `kind` with the fields that it shares with `args`."""
    own = {field.name for field in fields(args)}
    values = {field.name: getattr(args, field.name) for field in fields(kind) if field.init and field.name in own}
    return kind(**{**values, **changes})
