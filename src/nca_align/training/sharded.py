"""What a model whose weights FSDP has split needs: weights in one piece to save, and no layer left gathered."""

from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from ..models.policy import base_model
from ..store.weights import read_back


def saves_whole(save_model: Any) -> Any:
    """Decorates `save_model` of the trainer, which writes nothing where FSDP saves a shard a process.

    There the model is gathered and written whole. A checkpoint gets its adapter alone, or what its shards are of.
    Outside checkpoints what was written is read back.

    Raises:
        UserError: see `read_back`.
    """

    @wraps(save_model)
    def saved(trainer: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = output_dir or trainer.args.output_dir
        in_shards, adapter = _saves_shards(trainer.accelerator), hasattr(trainer.model, "peft_config")
        outside = not _internal_call
        with read_back(folder) if outside and trainer.args.should_save else nullcontext():
            if in_shards and (outside or adapter):  # before `save_model`, which may push the folder
                trainer._save(folder, state_dict=_whole_weights(trainer.model))
            elif in_shards and trainer.args.should_save:
                _describe(trainer.model, trainer.processing_class, folder)
            save_model(trainer, output_dir, _internal_call)

    return saved


def _saves_shards(accelerator: Accelerator) -> bool:
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type)


def _whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """On the main process's CPU; those that are trained, of an adapter. All processes call it."""
    frozen = hasattr(model, "peft_config")
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=frozen)
    return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]


def _describe(model: Any, tokenizer: Any, folder: str) -> None:
    """Configuration and tokenizer beside a checkpoint's shards."""
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
