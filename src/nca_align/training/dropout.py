"""Dropout that TRL's `disable_dropout` leaves on: it sets modules of dropout to 0, and attention has none of those."""

from torch import nn


def disable_functional_dropout(model: nn.Module) -> None:
    """Set the probabilities of dropout to 0 that the modules of `model` keep as numbers (`attention_dropout` …)."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float) and value > 0:
                setattr(module, name, 0.0)
