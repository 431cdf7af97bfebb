"""What NCATrainer checks and prepares before and around the construction of TRL's trainer."""

import copy
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel

from ..config import NCAConfig
from ..data import DataOptions, to_reward_dataset
from ..errors import UnsupportedError, UserTypeError, notify

# chosen and rejected handed to the trainer are rewards 1 and 0, also beside score columns
_HANDED_OVER = DataOptions(preference="hard", validation_fraction=0.0)


def reward_rows(dataset, name: str):
    """`dataset` as rows `prompt, completions, rewards`; tokenised rows come back as they are."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise UserTypeError(
            f"`{name}` data is a {type(dataset).__name__}, but must be a Dataset or an IterableDataset."
        )
    first: dict[str, Any] = next(iter(dataset), {})
    if {"prompt_ids", "completion_ids", "rewards"} <= set(first):
        return dataset
    if images := {"image", "images"} & set(first):
        raise UnsupportedError(
            f"`{name}` data has a column `{images.pop()}`, but NCATrainer trains on text alone; use TRL's "
            "DPOTrainer for images."
        )
    return to_reward_dataset(dataset, _HANDED_OVER, name=name)


def settle(args: NCAConfig, model, datasets: list) -> None:
    """What the model, the data sets and the batches' shape decide about the arguments."""
    if isinstance(model, str):  # weights out of a pickle could run any code
        args.model_init_kwargs = {"use_safetensors": True} | dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    accelerator_config: Any = args.accelerator_config
    if accelerator_config.split_batches:
        raise UnsupportedError(
            "`accelerator_config.split_batches` is true, but a batch of prompt trees can't be cut by rows; leave it "
            "out, and divide `per_device_train_batch_size` by the number of processes."
        )
    if accelerator_config.dispatch_batches:
        raise UnsupportedError(
            "`accelerator_config.dispatch_batches` is true, but a batch of prompt trees can't be cut by rows; leave it "
            "out."
        )
    accelerator_config.dispatch_batches = False  # its default is true for streams
    if args.precompute_ref_log_probs and any(isinstance(dataset, IterableDataset) for dataset in datasets):
        args.precompute_ref_log_probs = False
        notify(
            "`precompute_ref_log_probs` is true, but a data set is a stream, whose rows aren't known beforehand: the "
            "reference is computed live at each step."
        )


def own_reference(model, peft_config, args: NCAConfig) -> PreTrainedModel | None:
    """A frozen copy of a model that was passed as an instance, where a reference is kept in memory beside it.

    TRL would load the reference from the id in the model's config, which may not be what was passed.
    """
    sharded = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3  # holds empty parameters
    if isinstance(model, str) or peft_config or is_peft_model(model) or args.precompute_ref_log_probs or sharded:
        return None
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    for patched in ("forward", "_has_token_logps"):  # of an earlier trainer, bound to the model itself
        reference.__dict__.pop(patched, None)
    return reference
