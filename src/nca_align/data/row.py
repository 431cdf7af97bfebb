"""The result of every converter."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Row:
    """One prompt with its rewarded completions.

    Args:
        prompt: text or messages.
        completions: K completions of the same kind.
        rewards: K floats.
        notes: a few words for each completion that was left out or repaired.
        extra: values that replace kept columns of the same name.
    """

    prompt: str | list
    completions: list
    rewards: list[float]
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
