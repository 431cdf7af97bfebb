"""What a model needs whose weights FSDP splits: to be split a layer at a time, and them in one piece again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from trl.models import prepare_deepspeed
from trl.trainer import dpo_trainer

from ..models.policy import base_model


@contextmanager
def references_by_layer(trainer: Any) -> Iterator[None]:
    """Around TRL's constructor, whose reference under FSDP is whole on each card, at the start and in each forward.

    Here it is split as the policy is. To precompute from, TRL loads it beside the policy: the policy itself, which
    isn't trained yet, stands for it.
    """
    load = dpo_trainer.create_model_from_path

    def create(path: str, **options: Any) -> Any:
        policy = getattr(trainer, "model", None)  # there is none when it is what is loaded
        return policy if policy is not None and trainer.args.precompute_ref_log_probs else load(path, **options)

    def prepare(model: Any, accelerator: Accelerator) -> nn.Module:
        trainer._set_up()  # before the weights are split, which hides them from a hash
        return split(model, accelerator)

    with patch.multiple(dpo_trainer, create_model_from_path=create, prepare_fsdp=prepare):
        yield


def split(model: Any, accelerator: Accelerator) -> nn.Module:
    """A model under FSDP2, placed and split by its layers before training would do that; where it is, as it is."""
    model = fsdp2_prepare_model(accelerator, model)
    model.eval()
    return model


def placed_reference(model: Any, accelerator: Accelerator) -> nn.Module:
    """A reference that was loaded, where its forwards are and as they need it under any launch."""
    if accelerator.state.deepspeed_plugin is not None:
        return prepare_deepspeed(model, accelerator)
    return split(model, accelerator) if accelerator.is_fsdp2 else accelerator.prepare_model(model, evaluation_mode=True)


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
