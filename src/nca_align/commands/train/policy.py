"""What the options of a run say of its model: where it is, and which adapter it gets."""

from typing import Any

from transformers import AutoModelForCausalLM
from trl import ModelConfig, get_peft_config, get_quantization_config

from ...config import NCAConfig
from ...models.loading import ModelSource, load_adapter


def model_source(model_args: ModelConfig, args: NCAConfig) -> ModelSource:
    """What `model_name_or_path` names."""
    return ModelSource.of(
        str(model_args.model_name_or_path), revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
    )


def open_policy(source: ModelSource, model_args: ModelConfig, args: NCAConfig) -> dict[str, Any]:
    """`model`, `peft_config` and `quantization_config` of a trainer; an adapter is trained on from where it is."""
    options: dict[str, Any] = {
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),  # type: ignore[dict-item]
    }
    quantization_config = get_quantization_config(model_args)
    if source.adapter is None:
        args.model_init_kwargs = {"revision": source.revision, **options}
        peft_config = new_adapter(model_args)
        return {"model": source.path, "peft_config": peft_config, "quantization_config": quantization_config}
    args.model_init_kwargs = None  # the trainer is given an instance
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    return {"model": load_adapter(source.load(AutoModelForCausalLM, **options), source.adapter, is_trainable=True)}


def new_adapter(model_args: ModelConfig) -> Any:
    """The PeftConfig of a new adapter; None without `use_peft`."""
    config: Any = get_peft_config(model_args)
    modules = getattr(config, "target_modules", None)
    if isinstance(modules, str) and modules.isidentifier():  # TRL makes a list of one a pattern for whole names
        config.target_modules = {modules}
    return config
