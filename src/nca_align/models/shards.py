"""Weights that FSDP saved a shard a process, read by one process."""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..errors import UserError, one_line

_FOLDER = "pytorch_model_fsdp_0"  # accelerate's name for a model's shards within a checkpoint


def holds_shards(folder: str | Path) -> bool:
    """Whether `folder` is a checkpoint with a model in shards, and in no other form."""
    return (Path(folder) / _FOLDER).is_dir() and not any(Path(folder).glob("*.safetensors"))


def model_from_shards(folder: str | Path, config: Any, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model of a checkpoint in shards.

    Args:
        folder: see `holds_shards`.
        config: of the model.
        dtype: of its weights; auto as they are stored.

    Raises:
        UserError: the shards are of another model than the configuration says.
    """
    stored = checkpoint.FileSystemReader(str(Path(folder) / _FOLDER))
    if dtype == "auto":
        tensors = stored.read_metadata().state_dict_metadata.values()
        dtype = next(found.properties.dtype for found in tensors if hasattr(found, "properties"))
    own = getattr(transformers, (config.architectures or [""])[0], None)  # a language model within another is its own
    model = AutoModelForCausalLM.from_config(config, dtype=dtype) if own is None else own(config).to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant here
        try:
            checkpoint.load({"model": model.state_dict()}, storage_reader=stored, no_dist=True)  # into the tensors
        except (RuntimeError, CheckpointException) as error:
            raise UserError(
                f"{folder} holds a model in shards, but not the {type(model).__name__} of its config.json "
                f"({one_line(error)[:200]}). Give the folder in which the run ended, which holds the model whole."
            ) from error
    return model
