"""Which layout a run has, packed (`prefix_shared`) or padded.

What in a model is in the way of packing stands in `batching.attention.prefix_sharing_obstacle`. Whether the layout
gives the model's own log-probabilities is checked in `startup_checks`.
"""

from typing import Any

from torch import nn

from ..batching.attention import prefix_sharing_obstacle, share_prefixes
from ..batching.collator import RewardCollator
from ..batching.recurrent import REENTRANT, recurrent_layers
from ..errors import PackingError
from ..models.policy import base_model


def obstacle(models: list[nn.Module], pad_to_multiple_of: int | None, args: Any = None) -> str | None:
    """Why a packed row can't be used, in words that end a sentence; None where it can.

    Args:
        models, args: as `choose_layout`'s.
        pad_to_multiple_of: the collator's.
    """
    if pad_to_multiple_of:
        return f"`pad_to_multiple_of` {pad_to_multiple_of} asks for padding"
    reason = next(filter(None, map(prefix_sharing_obstacle, models)), None)
    if reason or args is None or not any(recurrent_layers(base_model(model).config) for model in models):
        return reason
    if args.torch_compile:
        return "`torch_compile` would compile the pieces of a model with recurrent layers anew for each length"
    # by its new name in transformers 5.24, under which it is what counts
    checkpointing = getattr(args, "activation_checkpointing_kwargs", args.gradient_checkpointing_kwargs)
    if args.gradient_checkpointing and (checkpointing or {}).get("use_reentrant"):  # of models only as they train
        return REENTRANT
    return None


def choose_layout(collator: RewardCollator, models: list[nn.Module], args: Any = None) -> str:
    """Give the collator the layout that it asks for, or under "auto" the one that the models allow.

    Args:
        collator: with `layout` "auto", "prefix_shared" or "padded".
        models: those that read the batches, with their adapters; they are prepared for packed rows.
        args: the trainer's, which may be in the way; None for none.

    Returns:
        Why it is this one, in words that follow its name.

    Raises:
        NotImplementedError: "prefix_shared", and something is in its way.
    """
    requested = collator.layout
    reason = None if requested == "padded" else obstacle(models, collator.pad_to_multiple_of, args)
    if reason and requested == "prefix_shared":
        raise PackingError(reason)
    if requested == "padded" or reason:
        collator.layout = "padded"
        return reason or "as asked for"
    for model in models:
        share_prefixes(base_model(model))
    collator.layout = "prefix_shared"
    collator.recurrent = any(recurrent_layers(base_model(model).config) for model in models)
    return "each shared token once"
