"""What NCATrainer checks and prepares before and around the construction of TRL's trainer."""

import copy
import logging
from typing import Any

from accelerate import PartialState
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel

from ..config import NCAConfig
from ..data import DataOptions, to_reward_dataset
from ..errors import UnsupportedError, UserError, UserTypeError

logger = logging.getLogger("nca_align")

# chosen and rejected handed to the trainer are rewards 1 and 0, also beside score columns
_HANDED_OVER = DataOptions(preference="hard", validation_fraction=0.0)


def say(message: str) -> None:
    """One line for the user, once whatever the number of processes; logging shows warnings without being set up."""
    if PartialState().is_main_process:
        logger.warning(message)


def keep_nf4_differentiable(model: nn.Module) -> None:
    """Stop bitsandbytes (0.50) from repacking NF4 weights for inference at the first evaluation on a CPU.

    The repacked layers have no backward: what is trained afterwards gets no gradient through them, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (no attribute of modules in general)


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
        say(
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


def base_model(model) -> PreTrainedModel:
    """The language model under an adapter, or `model` itself."""
    return model.get_base_model() if is_peft_model(model) else model


def refuse_virtual_tokens(model: Any) -> None:
    """Refuse to draw from an adapter that puts virtual tokens in front: the answers would be no samples of it.

    What `generate` draws with PEFT 0.21 and transformers 5.24 is from another distribution than a forward's, which is
    what training and scoring see; measured on prompt and prefix tuning, from the first or second token on.

    Raises:
        UserError: `model` has such an adapter.
    """
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            raise UserError(
                f"the adapter is of the kind {config.peft_type.value}, with which `generate` draws from "
                "another distribution than was trained; use LoRA, or another kind that changes weights"
            )
