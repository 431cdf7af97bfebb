"""The one place that loads models, adapters and tokenizers, by the names that options and adapters give.

PEFT is imported late: bitsandbytes comes with it, which takes half a second and logs a line of its own.
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging

from ..errors import UserError, one_line
from ..store.checkpoints import read_manifest, whole_checkpoints
from ..store.fingerprints import weights_fingerprint
from .plain_lora import as_plain
from .shards import holds_shards, model_from_shards
from .smollm2 import resolve_model
from .vocabulary import resize_as_saved


@dataclass(frozen=True)
class ModelSource:
    """A model as an option names it: what is loaded, and what errors call it.

    Args:
        name: a folder or an id of the Hub that holds a whole model, the base where there is an adapter.
        key: what gave `name`: an option, or an adapter's file.
        adapter: the folder of the adapter on it.
        revision: of an id of the Hub.
        trust_remote_code: run code that comes with the model.
    """

    name: str
    key: str = "model_name_or_path"
    adapter: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, name: str, **about: Any) -> "ModelSource":
        """`ModelSource(name, **about)`, where `name` may also be the folder of an adapter, which names its base.

        Raises:
            UserError: the adapter names none.
        """
        source = cls(name, **about)
        if source.adapter is not None or not is_adapter(name):
            return source
        base = adapter_config(name).base_model_name_or_path
        if not base:
            raise UserError(
                f"{name}/adapter_config.json names no `base_model_name_or_path`; write the base model there"
            )
        key = f"base_model_name_or_path of {Path(name) / 'adapter_config.json'}"
        return replace(source, name=base, key=key, adapter=name)

    @property
    def path(self) -> str:
        """`name` as `from_pretrained` takes it."""
        return resolve_model(self.name)

    def fingerprint(self) -> str | None:
        """`model_fingerprint` of the adapter with its base, or of the whole model."""
        return model_fingerprint(self.adapter or self.name, self.revision)

    def load(self, auto_class: Any, **kwargs: Any) -> Any:
        """`auto_class.from_pretrained` of `name`; weights as safetensors only, unless `kwargs` say otherwise.

        Raises:
            UserError: it can't be had.
        """
        if self.name.startswith(("/", "./", "../", "~")) and not Path(self.name).exists():
            raise UserError(
                f"`{self.key}` is {self.name!r}, and there is no such folder; give the path of one that holds a model"
            )
        options = {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}
        if auto_class not in (AutoConfig, AutoTokenizer):
            options["use_safetensors"] = True
        try:
            path = resolve_model(self.name, tokenizer_only=auto_class is AutoTokenizer)
            return auto_class.from_pretrained(path, **{**options, **kwargs})
        except (OSError, ValueError, SafetensorError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"`{self.key}` {self.name} could not be loaded ({one_line(error)[:300]}). `{self.key}` also takes a "
                "local path, and a local folder needs no network."
            ) from error

    def load_config(self) -> Any:
        """The whole model's configuration."""
        return self.load(AutoConfig)

    def load_tokenizer(self) -> Any:
        """The adapter's tokenizer where its folder has one, else the whole model's."""
        if self.adapter is not None and has_tokenizer(self.adapter):
            return replace(self, name=self.adapter, key="adapter", revision=None).load(AutoTokenizer)
        return self.load(AutoTokenizer)

    def load_base(self, dtype: torch.dtype | str, device: str = "cpu", quantization: Any = None) -> Any:
        """The whole model without its adapter, in eval mode.

        Args:
            dtype: of its weights; auto as they are stored.
            device: where it is put.
            quantization: a BitsAndBytesConfig to quantise it by.

        Raises:
            UserError: it can't be had, or its weights lack a part, as a reward model's lack the language model's head.
        """
        silence_transformers()
        if quantization is None and holds_shards(self.path):
            return model_from_shards(self.path, self.load_config(), dtype).eval().to(device)
        options: dict[str, Any] = {"dtype": dtype}
        if quantization is not None:
            if isinstance(dtype, torch.dtype):
                quantization.bnb_4bit_compute_dtype = dtype
            options |= {"quantization_config": quantization, "device_map": {"": device}}
        model, report = self.load(AutoModelForCausalLM, output_loading_info=True, **options)
        if report["missing_keys"]:  # transformers would fill them with random numbers and go on
            raise UserError(
                f"{self.name} is not a whole language model ({', '.join(sorted(report['missing_keys'])[:3])} missing "
                "in its weights). Give a causal language model, not a reward model or a classifier."
            )
        model.eval()
        disable_nf4_repacking(model)  # the repacked layers also compute in bfloat16
        return model if quantization is not None else model.to(device)

    def load_policy(self, dtype: str) -> Any:
        """The model as it was trained, in eval mode on the GPU, if any.

        An adapter's base is quantised as in the run that made the adapter, by its record.

        Raises:
            UserError: it can't be had.
        """
        quantization = None if self.adapter is None else trained_quantization(self.adapter)
        model = self.load_base(torch_dtype(dtype), default_device(), quantization)
        return model if self.adapter is None else add_adapter(model, self.adapter)


def adapter_config(folder: str) -> Any:
    """The PeftConfig of an adapter's folder.

    Raises:
        UserError: it can't be read, or is of a kind that PEFT doesn't know.
    """
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder}/adapter_config.json can't be read as an adapter's ({one_line(error)[:200]}); mend it, or give "
            "another folder"
        ) from error


def is_adapter(name: str | Path) -> bool:
    """Whether `name` is the folder of a PEFT adapter."""
    return (Path(name) / "adapter_config.json").exists()


def has_tokenizer(name: str) -> bool:
    """Whether the folder `name` holds a tokenizer."""
    return (Path(name) / "tokenizer_config.json").exists()


def model_fingerprint(name: str | None, revision: str | None = None) -> str | None:
    """`weights_fingerprint` of a model by the name that an option gives."""
    return weights_fingerprint(name and resolve_model(name), revision)


def run_record(folder: str | Path) -> dict[str, Any]:
    """Options and model of the run that `folder` is of, as its last checkpoint keeps them; empty where it has none."""
    folder = Path(folder)
    checkpoints = [folder, *reversed(whole_checkpoints(folder).values())]
    return next((found for path in checkpoints if (found := read_manifest(path).get("identity"))), {})


def trained_quantization(folder: str | Path) -> BitsAndBytesConfig | None:
    """The quantisation of the base that `folder`'s adapter was trained on, by the run's record; None for none."""
    recorded = run_record(folder).get("model.quantization_config")
    return BitsAndBytesConfig(**recorded) if recorded else None


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of an option: auto is bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() else torch.float32
    return getattr(torch, name)


def default_device() -> str:
    """The GPU, if there is one; of a launch, the one that this process has taken."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def silence_transformers() -> None:
    """No bar and no table of weights by transformers: they would write over the run's own bar and error."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_adapter(model: Any, adapter: str, **kwargs: Any) -> Any:
    """`model` with the adapter of a folder or Hub id on it.

    Beside it is as "ref" the adapter that its training went on from, if any; a new training makes its own. A base whose
    embeddings its run had resized is resized here: the adapter's folder holds them.

    Raises:
        UserError: the folder has its weights as a pickle alone, which can hold any code.
    """
    from peft import PeftModel

    if (Path(adapter) / "adapter_model.bin").exists() and not (Path(adapter) / "adapter_model.safetensors").exists():
        raise UserError(
            f"the adapter in {adapter} has its weights as a pickle (adapter_model.bin), which can hold any code. Where "
            "you trust it, convert it to adapter_model.safetensors."
        )
    with as_plain(adapter, getattr(model, "is_quantized", False)) as folder:
        resize_as_saved(model, folder)
        policy = PeftModel.from_pretrained(model, folder, **kwargs)
        if is_adapter(Path(folder) / "ref") and not kwargs.get("is_trainable"):
            policy.load_adapter(str(Path(folder) / "ref"), adapter_name="ref")
    return policy


def add_adapter(model: Any, adapter: str) -> Any:
    """`load_adapter` for use, in eval mode.

    Raises:
        UserError: the adapter doesn't fit the model.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT reads an attribute that transformers renames
            policy = load_adapter(model, adapter)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the adapter in {adapter} could not be put on {model.config.name_or_path} ({one_line(error)[:300]}). Was "
            "it trained on that model?"
        ) from error
    return policy.eval()


def disable_nf4_repacking(model: nn.Module) -> None:
    """Stop bitsandbytes (0.50) from repacking NF4 weights for inference at the first evaluation on a CPU.

    The repacked layers have no backward: what is trained afterwards gets no gradient through them, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (no attribute of modules in general)
