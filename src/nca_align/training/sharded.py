"""What a model needs whose weights FSDP has split: them in one piece, and no layer left gathered."""

from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..models.policy import base_model


def saves_shards(accelerator: Accelerator) -> bool:
    """Whether transformers saves a shard a process, which nothing but such a launch reads."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type)


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights by name, on the main process's CPU, one gathered at a time; all processes call it.

    Of a model with adapters they are the adapters', which training holds still or not, and whatever else is trained.
    """
    adapters = getattr(model, "peft_config", {}).keys()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    whole: dict[str, torch.Tensor] = {}
    tied: dict[tuple, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if adapters and not (name in trained or adapters & {*name.split(".")}):
            continue
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        place = (own.data_ptr(), tensor.shape, name if own.numel() == 0 else None)
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # tied ones too: all take part
        if PartialState().is_main_process:
            whole[name] = tied.setdefault(place, gathered.detach().cpu())
    return whole


def describe(model: Any, tokenizer: Any, folder: str) -> None:
    """Write configuration and tokenizer beside a checkpoint's shards."""
    base = base_model(model)
    base.config.architectures = [own_class(base).__name__]
    for part in (base.config, base.generation_config, tokenizer):
        if part is not None:
            part.save_pretrained(folder)


def reshard(model: nn.Module) -> None:
    """Free what a forward without a backward left gathered: the root's weights, which an optimizer would not know."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own_class(module: nn.Module) -> type:
    """The class of `module` as its author wrote it: FSDP2 puts one of its own in front."""
    return next(found for found in type(module).__mro__ if not issubclass(found, FSDPModule))
