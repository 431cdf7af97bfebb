"""Where a model with a classification head is loaded from: a folder or the Hub, whole or as an adapter on its base."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoModelForSequenceClassification

from ..errors import UserError, as_user_error
from ..models.loading import (
    ModelSource,
    adapter_config,
    add_adapter,
    default_device,
    has_tokenizer,
    silence_transformers,
    torch_dtype,
)
from ..store.hub import adapter_folder


def find_model(name: str, trust_remote_code: bool = False) -> tuple[ModelSource, dict[str, Any]]:
    """Where a scorer is to be loaded from, and what of its config an adapter decides.

    Args:
        name: a folder or a Hub id, of a whole model or an adapter.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: an adapter that can't be read, or of a model that gives one output a token.
    """
    folder = adapter_folder(name) or name
    source = ModelSource.of(folder, key="scorer", trust_remote_code=trust_remote_code)
    if source.adapter is None:
        return source, {}
    if str(adapter_config(folder).task_type) == "TOKEN_CLS":
        refuse_token_rewards(name)
    sizes = [
        shape[0] for key, shape in _saved(folder).items() if key.startswith(("score", "classif")) and len(shape) > 1
    ]
    return source, {"num_labels": sizes[-1]} if sizes else {}


def refuse_token_rewards(name: str) -> None:
    """Raise the UserError of a model that gives rewards per token or step."""
    raise UserError(
        f"`scorer` {name} gives a reward for each token or step (a process reward model, or a token classifier). A "
        "scorer gives one for a whole completion. Reduce its rewards in a Python function, and give module:function."
    )


def _saved(adapter: str) -> dict[str, list[int]]:
    """Name → shape of what an adapter's folder holds, as the base model calls it; nothing of a pickle."""
    file = Path(adapter) / "adapter_model.safetensors"
    if not file.exists():
        return {}
    with safe_open(file, "pt") as weights:
        return {
            key.removeprefix("base_model.model.").replace(".modules_to_save", ""): weights.get_slice(key).get_shape()
            for key in sorted(weights.keys())
        }


def load_classifier(name: str, dtype: str, trust_remote_code: bool) -> tuple[Any, Any, Mapping[str, inspect.Parameter]]:
    """Tokenizer and model, and what the forward of the model, or of an adapter's base, takes."""
    silence_transformers()
    source, own = find_model(name, trust_remote_code)
    tokenizer = source.load_tokenizer()
    with as_user_error(f"loading `scorer` {name}", also=(AssertionError, IndexError)):
        model, report = source.load(
            AutoModelForSequenceClassification, dtype=torch_dtype(dtype), output_loading_info=True,
            ignore_mismatched_sizes=True, **own,
        )  # fmt: skip
    forward = inspect.signature(model.forward).parameters
    missing, other = set(report["missing_keys"]), {key for key, *_ in report["mismatched_keys"]}
    if source.adapter is not None:
        missing, other = missing - _saved(source.adapter).keys(), other - _saved(source.adapter).keys()
        model = add_adapter(model, source.adapter)
        if has_tokenizer(source.adapter) and tokenizer.pad_token_id is not None:
            # An adapter is saved without its config, in which RewardTrainer put the pad token of this tokenizer.
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if missing or other:  # transformers has filled them with random numbers
        raise UserError(
            f"`scorer` {name} has no classification head{'' if missing else ' of the size that its config says'} "
            f"({', '.join(sorted(missing or other)[:3])} {'missing' if missing else 'has another'} in its weights). "
            "Give a reward model, a classifier or an adapter that was saved with its trained head."
        )
    return tokenizer, model.to(default_device()).eval(), forward


def embedding_rows(model: Any) -> int | None:
    """How many tokens a model knows, where it reads tokens by one table."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # as of CANINE, which reads characters
        return None
