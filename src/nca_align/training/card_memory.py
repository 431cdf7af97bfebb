"""What a card holds of a model whatever the batch: weights, gradients, the optimizer's state, by what shares them.

Bytes in each case. What DeepSpeed and bitsandbytes take is by their own defaults (DeepSpeed 0.19, bitsandbytes 0.50).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..batching.attention import is_peft_model
from ..models.memory import checkpointed_layers
from ..models.policy import base_model
from .launch import Launch

# bitsandbytes: NF4 keeps an fp32 scale for 64 weights; nested ones are 8 bits, with an fp32 one for 256 of them
_BLOCK, _NESTED = 64, 256
# its 8-bit optimizers: an fp32 scale for 256 weights and each state, and small tensors in 32 bits
_STATE_BLOCK, _LEAST = 256, 4096
# Names of transformers' optimizers → states of a weight, where Adam's two aren't it
_STATES = (("ademamix", 3), ("grokadamw", 3), ("adam", 2), ("lion", 1), ("rmsprop", 1), ("adagrad", 1),
           ("schedule_free_radam", 2), ("schedule_free_sgd", 1), ("sgd", 0))  # fmt: skip
_OF_BITSANDBYTES = ("bnb", "paged", "8bit", "32bit", "ademamix")
# DeepSpeed's defaults, in weights: what is reduced at a time, and what ZeRO-3 keeps gathered
_BUCKET, _LIVE = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Quantisation:
    """How `load_in_4bit` and `load_in_8bit` hold a linear layer.

    Args:
        bits: 4 or 8.
        nested: whether the scales are quantised as well (`use_bnb_nested_quant`).
    """

    bits: int
    nested: bool = False

    def bytes_of(self, shape: torch.Size) -> float:
        """Of a weight with its scales."""
        if self.bits == 8:
            return shape.numel() + 4 * shape[0]
        scales = shape.numel() / _BLOCK
        return shape.numel() / 2 + (scales * (1 + 4 / _NESTED) if self.nested else 4 * scales)


@dataclass(frozen=True)
class Training:
    """What decides beside the model and the launch.

    Args:
        optim: transformers' name of the optimizer.
        mixed: whether a lower precision is computed in (`bf16`, `fp16`).
        quantisation: of the frozen linear layers, if any.
        whole_gradients: whether under FSDP gradients stay whole until the last of several backwards.
        live_reference: whether a second model is kept.
    """

    optim: str
    mixed: bool
    quantisation: Quantisation | None = None
    whole_gradients: bool = False
    live_reference: bool = False


def quantised_weights(model: Any) -> set[int]:
    """The ids of the weights that bitsandbytes quantises: of linear layers, but for the head, tied and last ones.

    All experts of a layer in one tensor, as transformers 5 holds them, are no linear layer.
    """
    base = base_model(model)
    head = base.get_output_embeddings()
    tied = {*base.all_tied_weights_keys, *base.all_tied_weights_keys.values()}
    names = [name for name, _ in base.named_parameters()]
    kept = {id(weight) for name, weight in base.named_parameters(remove_duplicate=False) if name in {*tied, names[-1]}}
    linear = [
        module.weight
        for module in base.modules()
        if module is not head and (type(module) is nn.Linear or type(module).__name__ == "Conv1D")
    ]
    return {id(weight) for weight in linear if id(weight) not in kept and not weight.requires_grad}


def held(model: nn.Module, launch: Launch, training: Training) -> dict[str, float]:
    """What a card holds between two steps, by part.

    Args:
        model: with its adapter, if any, in the precision that it is loaded in; see `models.memory`.
        launch: how many processes share what.
        training: the rest.
    """
    parts: dict[str, float] = dict.fromkeys(
        ("weights", "adapter", "gradients", "optimizer", "reference", "gathered layers", "buckets"), 0.0
    )
    quantised = quantised_weights(model) if training.quantisation else set()
    zero, fsdp = launch.sharding.startswith("ZeRO"), launch.sharding.startswith("FSDP")
    cards = launch.processes
    over_weights = cards if launch.shards_weights else 1
    over_gradients = cards if fsdp or launch.sharding in ("ZeRO-2", "ZeRO-3") else 1
    over_optimizer = cards if launch.sharding else 1
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained_part = "adapter" if is_peft_model(model) else "weights"
    on_card = 0.0 if launch.offloads_weights else 1.0
    for weight in model.parameters():
        count, size = weight.numel(), weight.element_size()
        if id(weight) in quantised and training.quantisation:
            parts["weights"] += training.quantisation.bytes_of(weight.shape)  # FSDP leaves them whole
            continue
        if zero and training.mixed:
            size = 2  # DeepSpeed's engine converts the model, and its optimizer keeps fp32 weights
        elif fsdp and training.mixed and weight.requires_grad:
            size = 4  # accelerate's `fsdp2_prepare_model`
        part = trained_part if weight.requires_grad else "weights"
        parts[part] += on_card * count * size / over_weights
        if not weight.requires_grad:
            continue
        parts["gradients"] += on_card * count * size / over_gradients
        if training.whole_gradients and fsdp:
            parts["gradients"] += count * (2 if training.mixed else size)
        if launch.sharding == "" and cards > 1:
            parts["buckets"] += count * size  # DDP's
        master = 4 if zero and training.mixed else 0
        state = master + optimizer_bytes(training.optim, weight.shape, master or size, id(weight) in embeddings) / count
        parts["optimizer"] += 0.0 if launch.offloads_optimizer else count * state / over_optimizer
        if training.live_reference:
            parts["reference"] += count * (2 if zero and training.mixed else weight.element_size()) / over_weights
    if launch.shards_weights:
        parts["gathered layers"] = _gathered(model, quantised, training.mixed, fsdp)
    if zero:
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        parts["buckets"] = 2 * min(trained, _BUCKET) * (2 if training.mixed else 4)
    return parts


def of_bitsandbytes(optim: str) -> bool:
    """Whether transformers' optimizer of this name is bitsandbytes'."""
    return not optim.startswith("adamw_torch_") and any(name in optim for name in _OF_BITSANDBYTES)


def optimizer_bytes(optim: str, shape: torch.Size, size: int, is_embedding: bool = False) -> float:
    """Of the optimizer's state for a weight; of those that project gradients (GaLore, APOLLO) at most this.

    Args:
        optim: transformers' name.
        shape: of the weight.
        size: bytes of an element of it.
        is_embedding: which transformers keeps in 32 bits under bitsandbytes' 8-bit optimizers.
    """
    count = shape.numel()
    if "adafactor" in optim:  # one value a row and a column, in fp32
        return 4 * (count // shape[-1] + count // shape[-2] if len(shape) > 1 else count)
    states = next((number for name, number in _STATES if name in optim), 2)
    if optim.startswith("adamw_torch_") and optim.endswith("bit"):  # torchao's
        return states * count * (1 if "8bit" in optim else 0.5)
    if not of_bitsandbytes(optim):
        return states * count * size
    if "8bit" not in optim or count < _LEAST or is_embedding:
        return states * 4 * count
    return states * (count + 4 * -(-count // _STATE_BLOCK))


def _gathered(model: nn.Module, quantised: set[int], mixed: bool, fsdp: bool) -> float:
    """Weights that are whole for a while: a layer with the next one and its gradients, the embeddings and the head."""

    def whole(modules: Iterator[nn.Module] | list[nn.Module], trained: bool = False) -> int:
        weights = {id(weight): weight for module in modules for weight in module.parameters()}
        return sum(
            weight.numel() * (2 if mixed else weight.element_size())
            for key, weight in weights.items()
            if key not in quantised and (weight.requires_grad or not trained)
        )

    layers = checkpointed_layers(base_model(model)) or [model]
    largest = max(layers, key=lambda layer: whole([layer]))
    ends = [end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]  # type: ignore[operator]
    if not fsdp:  # ZeRO-3 keeps layers until so many weights are there
        everything = whole([model])
        return min(everything, max(2 * whole([largest]), _LIVE * (2 if mixed else 4))) + whole([largest], trained=True)
    return 2 * whole([largest]) + whole([largest], trained=True) + whole(ends)
