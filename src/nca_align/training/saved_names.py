"""Reading a checkpoint whose weights are saved under other names than they have in memory.

transformers saves a mixture's experts one by one, as their model was published, and has them in one tensor in memory.
`from_pretrained` maps the names back. Its trainer, where a run goes on or takes its best checkpoint, leaves out every
name that it doesn't know, and trains on with the weights that it has.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel

from ..batching.attention import is_peft_model


def mapped(method: Callable) -> Callable:
    """Decorates a method of the trainer that reads a whole model from a folder, by default from its best checkpoint."""

    @functools.wraps(method)
    def reads(trainer: Any, folder: str | None = None, *args, **kwargs):
        where, model = Path(folder or trainer.state.best_model_checkpoint), trainer.model
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # which save by the names in memory
        if sharded or is_peft_model(model) or not _has_other_names(model, where):
            return method(trainer, *(() if folder is None else (folder,)), *args, **kwargs)
        saved: PreTrainedModel = type(model).from_pretrained(where, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
        return None

    return reads


def _has_other_names(model: PreTrainedModel, folder: Path) -> bool:
    """Whether a file of weights has a name that `model` doesn't."""
    own = model.state_dict().keys()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            if not own >= set(file.keys()):
                return True
    return False
