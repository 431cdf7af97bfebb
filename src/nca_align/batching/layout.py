"""Whether a packed row can be used."""

from torch import nn
from transformers import PreTrainedModel

from .attention import prefix_sharing_obstacle, share_prefixes

__all__ = ["obstacle", "share_prefixes"]


def obstacle(models: list[PreTrainedModel], policy: nn.Module, pad_to_multiple_of: int | None) -> str | None:
    """Why a packed row can't be used, in words that end a sentence; None where it can."""
    for config in getattr(policy, "peft_config", {}).values():
        if config.is_prompt_learning:
            return f"{config.peft_type.value} puts virtual tokens in front of a row"
    if pad_to_multiple_of:
        return f"`pad_to_multiple_of` {pad_to_multiple_of} asks for padding"
    return next(filter(None, map(prefix_sharing_obstacle, models)), None)
