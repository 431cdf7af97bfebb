"""Policies outside training: a model or an adapter loaded as it was trained, and its log-probabilities."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import UserError, one_line
from ..store.checkpoints import read_manifest, whole_checkpoints
from .pretrained import from_pretrained, hide_loading, keep_nf4_differentiable, load_adapter
from .smollm2 import resolve_model


def is_adapter(name: str) -> bool:
    """Whether `name` is the folder of a PEFT adapter."""
    return (Path(name) / "adapter_config.json").exists()


def adapter_base(adapter: str) -> str:
    """The base model that an adapter's folder names.

    Raises:
        UserError: it names none.
    """
    from peft import PeftConfig

    name = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not name:
        raise UserError(f"{adapter}/adapter_config.json names no `base_model_name_or_path`; write the base model there")
    return resolve_model(name)


def base_key(adapter: str) -> str:
    """Where an adapter's folder names its base, for a sentence that says that the base can't be had."""
    return f"base_model_name_or_path of {Path(adapter) / 'adapter_config.json'}"


def run_record(folder: str | Path) -> dict[str, Any]:
    """Options and model of the run that `folder` is of, as its last checkpoint keeps them; empty where it has none."""
    folder = Path(folder)
    checkpoints = [folder, *reversed(whole_checkpoints(folder).values())]
    return next((found for path in checkpoints if (found := (read_manifest(path) or {}).get("identity"))), {})


def trained_quantization(folder: str | Path):
    """The quantisation of the base that `folder`'s adapter was trained on, by the run's record; None for none."""
    from transformers import BitsAndBytesConfig

    recorded = run_record(folder).get("model.quantization_config")
    if not recorded:
        return None
    known = {key: value for key, value in recorded.items() if not key.startswith("_") and key != "quant_method"}
    return BitsAndBytesConfig(**known)


def has_tokenizer(name: str) -> bool:
    """Whether the folder `name` holds a tokenizer."""
    return (Path(name) / "tokenizer_config.json").exists()


def load_tokenizer(
    name: str, trust_remote_code: bool = False, revision: str | None = None, key: str = "model_name_or_path"
):
    """A policy's tokenizer, of the option `key`; of an adapter that comes without one, its base model's."""
    from transformers import AutoTokenizer

    if is_adapter(name) and not has_tokenizer(name):
        name, key = adapter_base(name), base_key(name)
    return from_pretrained(AutoTokenizer, name, revision, key, trust_remote_code=trust_remote_code)


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of an option: auto is bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, name)


def load_model(
    name: str,
    dtype: torch.dtype | str,
    device: str = "cpu",
    trust_remote_code: bool = False,
    quantization=None,
    revision: str | None = None,
    key: str = "model_name_or_path",
) -> Any:
    """A whole model, of the option `key`, in eval mode; quantised by `quantization`, a BitsAndBytesConfig, if any.

    Raises:
        UserError: it can't be had, or its weights lack a part, as a reward model's lack the language model's head.
    """
    from transformers import AutoModelForCausalLM

    hide_loading()
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if quantization is not None:
        if isinstance(dtype, torch.dtype):
            quantization.bnb_4bit_compute_dtype = dtype
        options |= {"quantization_config": quantization, "device_map": {"": device}}
    model, report = from_pretrained(AutoModelForCausalLM, name, revision, key, output_loading_info=True, **options)
    if report["missing_keys"]:  # transformers would fill them with random numbers and go on
        raise UserError(
            f"{name} is no whole language model ({', '.join(sorted(report['missing_keys'])[:3])} missing in its "
            "weights); give a causal language model, not a reward model or a classifier"
        )
    model.eval()
    keep_nf4_differentiable(model)  # the repacked layers also compute in bfloat16
    return model if quantization is not None else model.to(device)


def add_adapter(model: Any, adapter: str) -> Any:
    """`model` with the adapter on it, and beside it as "ref" the adapter that its training went on from, if any.

    Raises:
        UserError: the adapter doesn't fit the model.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that transformers renames
            policy = load_adapter(model, adapter)
        if is_adapter(str(Path(adapter) / "ref")):
            policy.load_adapter(str(Path(adapter) / "ref"), adapter_name="ref")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the adapter in {adapter} could not be put on {model.config._name_or_path} ({one_line(error)[:300]}); "
            "is that the model that it was trained on?"
        ) from error
    return policy.eval()


def load_policy(
    name: str, dtype: str = "auto", trust_remote_code: bool = False, key: str = "model_name_or_path"
) -> Any:
    """A model, of the option `key`, in eval mode on the GPU, if any.

    Of an adapter's folder it is the adapter on its base, which is quantised as in the run that made it, by its record.

    Raises:
        UserError: it can't be had.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not is_adapter(name):
        return load_model(name, torch_dtype(dtype), device, trust_remote_code, key=key)
    base = load_model(
        adapter_base(name), torch_dtype(dtype), device, trust_remote_code, trained_quantization(name),
        key=base_key(name),
    )  # fmt: skip
    return add_adapter(base, name)


@contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """Within it, a policy with an adapter is what it was trained from: the bare base, or the adapter "ref" on it."""
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


@contextmanager
def merged(model: Any) -> Iterator[None]:
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
