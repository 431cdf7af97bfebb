"""Which layout a run has, packed (`prefix_shared`) or padded.

What in a model is in the way of packing stands in `batching.attention.prefix_sharing_obstacle`. Whether the layout
gives the model's own log-probabilities is checked in `startup_checks`.
"""

from torch import nn

from ..batching.attention import prefix_sharing_obstacle, share_prefixes
from ..batching.collator import RewardCollator
from ..errors import PackingError
from ..models.policy import base_model


def obstacle(models: list[nn.Module], pad_to_multiple_of: int | None) -> str | None:
    """Why a packed row can't be used, in words that end a sentence; None where it can."""
    if pad_to_multiple_of:
        return f"`pad_to_multiple_of` {pad_to_multiple_of} asks for padding"
    return next(filter(None, map(prefix_sharing_obstacle, models)), None)


def choose_layout(collator: RewardCollator, models: list[nn.Module]) -> str:
    """Give the collator the layout that it asks for, or under "auto" the one that the models allow.

    Args:
        collator: with `layout` "auto", "prefix_shared" or "padded".
        models: those that read the batches, with their adapters; they are prepared for packed rows.

    Returns:
        Why it is this one, in words that follow its name.

    Raises:
        NotImplementedError: "prefix_shared", and something is in its way.
    """
    requested = collator.layout
    reason = None if requested == "padded" else obstacle(models, collator.pad_to_multiple_of)
    if reason and requested == "prefix_shared":
        raise PackingError(reason)
    if requested == "padded" or reason:
        collator.layout = "padded"
        return reason or "as asked for"
    for model in models:
        share_prefixes(base_model(model))
    collator.layout = "prefix_shared"
    return "each shared token once"
