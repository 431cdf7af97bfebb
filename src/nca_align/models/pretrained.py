"""Models and adapters as their folders or the Hub have them."""

from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError, one_line
from .smollm2 import resolve_model


def hide_loading() -> None:
    """No bar and no table of weights by transformers: they would write over the run's own bar and error."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def from_pretrained(cls, name: str | None, revision: str | None = None, key: str = "model_name_or_path", **kwargs):
    """`cls.from_pretrained(name)`, weights as safetensors only, and one sentence where it can't be had."""
    name = str(name)  # each command refuses to go without
    if name.startswith(("/", "./", "../", "~")) and not Path(name).exists():
        raise UserError(f"`{key}` is {name!r}, and there is no such folder; give the path of one that holds a model")
    if "dtype" in kwargs:  # a model, no tokenizer
        kwargs["use_safetensors"] = True
    try:
        return cls.from_pretrained(resolve_model(name), revision=revision or "main", **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"`{key}` {name} could not be loaded ({one_line(error)[:300]}); without a network give the path of a local "
            "folder"
        ) from error


def load_adapter(model, adapter: str, **kwargs):
    """`model` with the adapter of a folder or Hub id on it.

    Raises:
        UserError: the folder has its weights as a pickle alone, which can hold any code.
    """
    from peft import PeftModel

    if (Path(adapter) / "adapter_model.bin").exists() and not (Path(adapter) / "adapter_model.safetensors").exists():
        raise UserError(
            f"the adapter in {adapter} has its weights as a pickle (adapter_model.bin), which can hold any code; "
            "convert it to adapter_model.safetensors where you trust it"
        )
    return PeftModel.from_pretrained(model, adapter, **kwargs)


def keep_nf4_differentiable(model: nn.Module) -> None:
    """Stop bitsandbytes (0.50) from repacking NF4 weights for inference at the first evaluation on a CPU.

    The repacked layers have no backward: what is trained afterwards gets no gradient through them, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (no attribute of modules in general)


def base_model(model) -> PreTrainedModel:
    """The language model under an adapter, or `model` itself."""
    return model.get_base_model() if is_peft_model(model) else model


def refuse_virtual_tokens(model: Any) -> None:
    """Refuse to draw from an adapter that puts virtual tokens in front: the answers would be no samples of it.

    What `generate` draws with PEFT 0.21 and transformers 5.24 is from another distribution than a forward's, which is
    what training and scoring see; measured on prompt and prefix tuning, from the first or second token on.

    Raises:
        UserError: `model` has such an adapter.
    """
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            raise UserError(
                f"the adapter is of the kind {config.peft_type.value}, with which `generate` draws from "
                "another distribution than was trained; use LoRA, or another kind that changes weights"
            )
