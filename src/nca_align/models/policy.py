"""A loaded policy: its base model, and what it is made into for a while (its reference, merged, in eval mode)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..batching.attention import is_peft_model
from ..errors import UserError


def base_model(model) -> PreTrainedModel:
    """The language model under an adapter, or `model` itself."""
    return model.get_base_model() if is_peft_model(model) else model


def backbone(model: PreTrainedModel) -> nn.Module:
    """What gives the hidden states that the LM head of `model` maps to logits.

    `base_model` goes by a name, which Llama 4's and Mllama's language models have from the composite they are part of.
    """
    return getattr(model, "model", model) if model.base_model is model else model.base_model


@contextmanager
def as_reference(model: Any, untrained: bool = False) -> Iterator[None]:
    """Within it, a policy with an adapter is what it was trained from: the bare base, or the adapter "ref" on it.

    Args:
        model: the policy.
        untrained: whether no weight has moved, so that biases that it trains are those of the base.

    Raises:
        UserError: it has no adapter, or one that changes the base for good.
    """
    if not hasattr(model, "peft_config"):
        raise UserError(
            "`reference` is missing, and the model has no adapter to switch off. Give the model that the KL and the "
            "wins are measured against."
        )
    if not untrained:
        refuse_trained_biases(model)
    if "ref" in model.peft_config:
        active = model.active_adapter
        model.set_adapter("ref")
        try:
            yield
        finally:
            model.set_adapter(active)
    else:
        with model.disable_adapter():
            yield


def refuse_trained_biases(model: Any) -> None:
    """Refuse a policy whose adapter trains biases of the base itself: without it the base is another than before.

    Raises:
        UserError: it has such an adapter, and the base has biases.
    """
    for config in model.peft_config.values():
        trained = getattr(config, "bias", "none")
        if trained == "none":
            continue
        ending = ".bias" if trained == "all" else ".base_layer.bias"
        found = [name for name, _ in model.named_parameters() if name.endswith(ending)]
        if any(not set(name.split(".")) & model.peft_config.keys() for name in found):
            raise UserError(
                f"the adapter has `bias` {trained!r}, which trains biases of the base, and switching the adapter off "
                'does not undo that. Use `bias="none"`, give the reference as a model of its own, or compute it before '
                "training (`precompute_ref_log_probs: true`)."
            )


@contextmanager
def adapter_merged(model: Any) -> Iterator[None]:
    """Within it a LoRA of a float32 model on the CPU stands in its weights, which are put back bit for bit.

    Its own small products cost a fifth of a forward there. On a GPU the copy of the weights would cost memory, and in
    half precision merging would round the adapter away: of other models nothing changes.
    """
    from peft import PeftType
    from peft.tuners.tuners_utils import BaseTunerLayer

    kinds = {config.peft_type for config in getattr(model, "peft_config", {}).values()}
    layers = [own for own in model.modules() if isinstance(own, BaseTunerLayer)] if kinds == {PeftType.LORA} else []
    weights = [own for layer in layers for own in layer.get_base_layer().parameters(recurse=False)]
    if torch.is_autocast_enabled("cpu") or any(own.dtype != torch.float32 or own.is_cuda for own in weights):
        weights = []
    if not weights or any(layer.merged or layer.disable_adapters for layer in layers):
        yield
        return
    before = [own.data.clone() for own in weights]
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()
        for own, data in zip(weights, before, strict=True):
            own.data.copy_(data)


def refuse_virtual_tokens(model: Any) -> None:
    """Refuse to draw from an adapter that puts virtual tokens in front: the answers would be no samples of it.

    With PEFT 0.21 and transformers 5.24, `generate` draws from another distribution than a forward's. Training and
    scoring see the forward's. This was measured on prompt and prefix tuning, from the first or second token on.

    Raises:
        UserError: `model` has such an adapter.
    """
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            raise UserError(
                f"the adapter is of the kind {config.peft_type.value}, with which `generate` draws from another "
                "distribution than was trained. Use LoRA, or another kind that changes weights."
            )


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Within it, `model` is in eval mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
