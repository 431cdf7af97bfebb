"""What NCATrainer is given: refused where it can't be used, and completed, before any model is loaded."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any
from unittest.mock import patch

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel
from trl.trainer import dpo_trainer

from ..batching.collator import RewardCollator
from ..config import NCAConfig, changed_options
from ..data import DataOptions, to_reward_dataset
from ..device import fsdp_version
from ..errors import UnsupportedError, UserError, UserTypeError, first_few, nearest, notify
from ..losses import LABELS
from ..own_losses import OwnLoss
from ..unread import Rule, refuse_pieces, refuse_shared_batches, sentence, unread
from .best_metric import check_best_metric
from .run_identity import loss_sources

_OF_THE_COLLATOR = (
    Rule("layout tokens_per_forward pad_to_multiple_of pad_token", lambda o: False, "`data_collator` left out"),
)
# Fields of `accelerator_config`: what they must be, and why
OF_ACCELERATE = (
    ("split_batches", False, "a batch of prompt trees can't be cut by rows"),
    ("dispatch_batches", False, "a batch of prompt trees can't be cut by rows"),
    ("even_batches", True, "a process with fewer batches would keep the others waiting, and rows repeated count as 0"),
    ("use_seedable_sampler", True, "a run that was stopped would go on with other rows"),
)
# Rows of a stream that are read for an adapter's invocation
_STREAM_ROWS = 64
_TOKENS = {"prompt_ids", "completion_ids", "rewards"}
# Columns that a batch is made of, beside the row's length and those of several rewards
_SIGNATURE = (*sorted(_TOKENS), "completion_mask", "ref_logps", "row_number")


def check_arguments(
    args: NCAConfig, data_collator: object, compute_metrics: Callable | None, train_dataset: object
) -> None:
    """Refuse what `DPOTrainer` takes and `NCATrainer` does not, and say what is to be known of a loss of one's own.

    Raises:
        UserError: of the class that says which.
    """
    if data_collator is not None and not isinstance(data_collator, RewardCollator):
        raise UserTypeError(
            f"`data_collator` is a {type(data_collator).__name__}, but NCATrainer needs a RewardCollator, which lays "
            "out K completions a prompt. Leave it out."
        )
    if data_collator is not None:
        refuse_pieces(args, data_collator.tokens_per_forward)
        if notice := sentence(unread(args, changed_options(args), _OF_THE_COLLATOR)):
            notify(notice)
    if fsdp_version(args) == 1:
        raise UnsupportedError(
            "the launch says FSDP 1, whose models aren't saved and checked here. Set `fsdp_version: 2` in accelerate's "
            "file (`configs/accelerate/fsdp2.yaml` is one), or `version: 2` in `fsdp_config`."
        )
    if compute_metrics is not None:
        raise UnsupportedError(
            "`compute_metrics` can't be used with NCATrainer, which builds no logits. Its metrics over completions are "
            "logged in any case, and a callback's `on_evaluate` receives them."
        )
    if args.n_gpu > 1:  # else transformers would copy the model to each of them, by `nn.DataParallel`
        args._n_gpu = 1
        notify(
            "This process sees several GPUs, but trains on one (a model given by its name is spread over all, a part "
            "after the other); `accelerate launch --config_file configs/accelerate/multi_gpu.yaml` trains on each."
        )
    if train_dataset is None:
        raise UserError("`train_dataset` is None, but NCATrainer needs one, even if it only evaluates.")
    if isinstance(train_dataset, Mapping):
        splits = ", ".join(f"`{split}`" for split in train_dataset)
        raise UserTypeError(
            f"`train_dataset` is a {type(train_dataset).__name__} with the splits {splits}, but must be one of them: "
            f"`train_dataset=dataset[{next(iter(train_dataset), 'train')!r}]`, and a held-out one as `eval_dataset`."
        )
    for name, source in loss_sources(args.loss_type).items():
        if source is None:
            notify(
                f"`loss_type` {name.removeprefix('loss_type.')} is not found by its name: it trains, but its "
                "checkpoints can't be resumed. Define it by `def` at the top of a module to go on from them."
            )
    for loss in args.loss_type:
        if isinstance(loss, OwnLoss) and loss.breaks_ties:
            notify(
                f"`loss_type` {loss} gives another loss when completions with equal rewards change places: where "
                "rewards tie, the order in the data counts."
            )


def adapter_on_head() -> AbstractContextManager[Any]:
    """Around the constructor of TRL, which refuses an adapter on the LM head: its own losses would lack it.

    No argument of TRL's turns that check off, and it looks for this class there alone.
    """
    return patch.object(dpo_trainer, "BaseTunerLayer", ())


def check_model(model: PreTrainedModel, max_length: int | None, parallelism: Any, dataset: Any) -> None:
    """Refuse a model that would not be trained, and say where rows may be longer than what it was made for.

    Args:
        model: the policy.
        max_length: tokens of a row.
        parallelism: accelerate's `ParallelismConfig`, by `parallelism_config`, the launcher or a model in parts.
        dataset: the tokenised rows of the training.

    Raises:
        UserError: none of its parameters has a gradient, a row would train none, or processes would share rows.
    """
    refuse_shared_batches(parallelism)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "`model` has no parameter that is trained. Load an adapter with `is_trainable=True`, or give a "
            "`peft_config`."
        )
    for config in getattr(model, "peft_config", {}).values():
        tokens = getattr(config, "alora_invocation_tokens", None)
        row = None if tokens is None else _row_without(tokens, dataset)
        if row is not None:
            raise UserError(
                f"`alora_invocation_tokens` is {tokens}, but the prompt of row {row} of `train_dataset` does not have "
                "these tokens. They switch aLoRA on, so the row would train nothing. Give the tokens that end each "
                "prompt, such as those of the assistant's turn in the chat template."
            )
    text = model.config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}  # scaled ones, and ALiBi, go further than what this says
    if getattr(text, "alibi", False) or rope.get("rope_type", "default") != "default":
        return
    if isinstance(positions, int) and max_length is not None and max_length > positions:
        notify(
            f"`max_length` is {max_length}, but the model has {positions} positions (`max_position_embeddings`): it "
            f"fails or guesses beyond them. `max_length: {positions}` cuts completions there."
        )


def _row_without(tokens: list[int], dataset: Any) -> int | None:
    """The number of the first row whose prompt lacks `tokens`, of a stream's first rows; None where each has them."""
    wanted, n = list(tokens), len(tokens)
    rows = islice(dataset, _STREAM_ROWS) if isinstance(dataset, IterableDataset) else dataset
    for i, row in enumerate(rows):
        prompt = row["prompt_ids"]
        if not n or all(prompt[at : at + n] != wanted for at, token in enumerate(prompt) if token == wanted[0]):
            return i
    return None


def is_prepared(row: Mapping[str, Any], args: NCAConfig) -> bool:
    """Whether `tokenize_dataset` made `row`: checked, cut and counted. A row of the user's with ids is none of it."""
    return row.keys() >= {*_TOKENS, "row_number", args.length_column_name}


def reward_rows(dataset: Any, name: str, args: NCAConfig) -> Any:
    """`dataset`, or a dict of them, as rows `prompt, completions, rewards`; None and tokenised rows as they are."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        return {key: reward_rows(own, key, args) for key, own in dataset.items()}
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise UserTypeError(
            f"`{name}` data is a {type(dataset).__name__}, but must be a Dataset or an IterableDataset."
        )
    first: dict[str, Any] = next(iter(dataset), {})
    if is_prepared(first, args):
        return dataset  # the collator looks at its rewards
    if images := {"image", "images"} & set(first):
        raise UnsupportedError(
            f"`{name}` data has a column `{images.pop()}`, but NCATrainer trains on text alone; use TRL's "
            "DPOTrainer for images."
        )
    # chosen and rejected handed to the trainer are rewards 1 and 0, also beside score columns
    options = DataOptions(
        preference="hard", validation_fraction=0.0, on_invalid=args.on_invalid,  # type: ignore[arg-type]
    ).for_losses(args.loss_type)  # fmt: skip
    return to_reward_dataset(dataset, options, name=name)


def _tell_equal_labels(dataset: Dataset) -> None:
    """Say so where all labels to train on are 0, or all 1."""
    batches = dataset.select_columns("rewards").with_format("arrow").iter(10_000)
    ends = [pc.min_max(pc.list_flatten(batch["rewards"])).as_py() for batch in batches]
    least, most = min(own["min"] for own in ends), max(own["max"] for own in ends)
    if least == most and least in (0, 1):
        notify(
            f"`train`: every label is {least:g}, so every completion counts as {'right' if least else 'wrong'}, and "
            "nothing tells right from wrong. Check how the rewards were made."
        )


def with_best_metric(trainer: Any, metrics: dict[str, float]) -> dict[str, float]:
    """The `metrics` of an evaluation within a run, by which transformers then chooses the best model.

    Raises:
        UserError: `metric_for_best_model` isn't among them; before the first step nothing is chosen yet.
    """
    name = trainer.args.metric_for_best_model
    if name is not None and trainer.state.global_step and f"eval_{name.removeprefix('eval_')}" not in metrics:
        found = [own.removeprefix("eval_") for own in metrics]
        raise UserError(
            f"`metric_for_best_model` is {name}, which this evaluation doesn't give{nearest(name, found)}; use one of "
            f"{first_few(found, 12)}"
        )
    return metrics


def batch_columns(args: NCAConfig, *datasets: Any) -> list[str]:
    """The columns of tokenised data sets, or dicts of them, that a batch is made of."""
    several = [own for dataset in datasets for own in (dataset.values() if isinstance(dataset, dict) else [dataset])]
    names = {name for dataset in several for name in getattr(dataset, "column_names", None) or ()}
    return [*_SIGNATURE, args.length_column_name, *sorted(name for name in names if name.startswith("score_"))]


def prepare_datasets(args: NCAConfig, model: Any, train_dataset: Any, eval_dataset: Any) -> tuple[Any, Any]:
    """The data sets as reward rows, and in `args` what they, the model and the batches' shape decide.

    This is before the model is loaded, so that an invalid row costs no waiting.
    """
    train_dataset, eval_dataset = (
        reward_rows(own, name, args) for own, name in ((train_dataset, "train"), (eval_dataset, "eval"))
    )
    check_best_metric(args, eval_dataset)
    if isinstance(train_dataset, Dataset) and not LABELS.isdisjoint(args.loss_type):
        _tell_equal_labels(train_dataset)
    if isinstance(model, str):  # weights out of a pickle could run any code
        args.model_init_kwargs = {"use_safetensors": True} | dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    for name, needed, why in OF_ACCELERATE:
        if getattr(args.accelerator_config, name) not in (needed, None):
            raise UnsupportedError(
                f"`accelerator_config.{name}` is {str(not needed).lower()}, but {why}; leave it out."
            )
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and isinstance(train_dataset, Dataset) and len(train_dataset) < batch:
        raise UserError(
            f"`dataloader_drop_last` is true, but `train_dataset` has {len(train_dataset)} rows, fewer than one batch "
            f"of {batch}, so no step would be taken. Leave it out, or lower `per_device_train_batch_size`."
        )
    evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    streamed = any(isinstance(dataset, IterableDataset) for dataset in (train_dataset, *evaluated))
    if args.precompute_ref_log_probs and streamed:
        args.precompute_ref_log_probs = False
        notify(
            "`precompute_ref_log_probs` is true, but a data set is a stream, whose rows aren't known beforehand: the "
            "reference is computed live at each step."
        )
    return train_dataset, eval_dataset
