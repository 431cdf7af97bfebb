"""How many tokens a model has rows for, and rows that a run added to its base, from the adapter's folder."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from safetensors import safe_open

from ..errors import UserError
from .policy import base_model


def token_rows(model: Any) -> int:
    """How many tokens a loaded model has: the rows of its input embeddings, or of its head where that has fewer."""
    base = base_model(model)
    rows = [own for layer in _layers(base) if (own := _rows(layer)) is not None]
    return min(rows, default=base.config.get_text_config().vocab_size)


def _layers(base: Any) -> list[Any]:
    """The input embeddings and the head, as far as the model's class says which they are."""
    with suppress(NotImplementedError):
        return [layer for layer in (base.get_input_embeddings(), base.get_output_embeddings()) if layer is not None]
    return []


def _rows(layer: Any) -> int | None:
    """The rows of an embedding or a head, also under an adapter; None where its weights are in another form."""
    while hasattr(layer, "get_base_layer") and (inner := layer.get_base_layer()) is not layer:
        layer = inner
    weight = getattr(layer, "weight", None)
    if weight is None or not weight.is_floating_point():
        return None
    shape = getattr(weight, "ds_shape", weight.shape)  # as DeepSpeed keeps it of what is on other cards
    return shape[0] if len(shape) == 2 else None


def embeddings(model: Any) -> dict[str, Any]:
    """A base's input embeddings and head by the last part of their names, such as `embed_tokens` and `lm_head`."""
    layers = _layers(model)
    found = [(name, own) for name, own in model.named_modules() if any(own is layer for layer in layers)]
    return {name.rpartition(".")[2]: own for name, own in found}


def resize_as_saved(model: Any, adapter: str | Path) -> None:
    """Give a base the tokens that an adapter's run had added to it: PEFT saves its embeddings in the adapter's folder.

    Args:
        model: the base, without the adapter.
        adapter: its folder.

    Raises:
        UserError: one of two embeddings that aren't tied is missing there, as where an adapter is on the other.
    """
    file, names = Path(adapter) / "adapter_model.safetensors", list(embeddings(model))
    if not file.exists():
        return
    with safe_open(file, "pt") as opened:
        keys = [key.split(".") for key in opened.keys()]  # noqa: SIM118 (no mapping)
        saved = {
            name: ".".join(key)
            for owner in (
                [],
                ["token_adapter", "base_layer"],
                ["base_layer"],
                ["original_module"],
            )  # the last one counts
            for name in names
            for key in keys
            if key[-len(owner) - 2 :] == [name, *owner, "weight"]
        }
        rows = max((opened.get_slice(key).get_shape()[0] for key in saved.values()), default=None)
        before = token_rows(model)
        if rows in (None, before):
            return
        lacking = [name for name in names if name not in saved]
        if lacking and not model.config.get_text_config().tie_word_embeddings:
            raise UserError(
                f"the adapter in {adapter} was trained on {rows} tokens, but the base has {before}, and the adapter's "
                f"folder holds no `{lacking[0]}` for the others. Give a base that has those tokens."
            )
        model.resize_token_embeddings(rows, mean_resizing=False)
        for name, layer in embeddings(model).items():
            if name in saved:
                layer.weight.data.copy_(opened.get_tensor(saved[name]))


def refuse_unsaved_rows(model: Any) -> None:
    """Refuse an adapter on a base with added tokens whose rows PEFT (0.21) would not save beside it.

    Args:
        model: the policy.

    Raises:
        UserError: an adapter is on one of two embeddings that aren't tied, so the other is left out. Or the base is a
            model of the Hub that can't be reached, so PEFT takes it for unchanged.
    """
    config = getattr(model, "peft_config", {}).get("default")
    name = getattr(config, "base_model_name_or_path", None)
    if not name:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    base = base_model(model)
    text = base.config.get_text_config()
    try:
        before = type(base.config).from_pretrained(name).get_text_config().vocab_size
    except (OSError, ValueError):  # a base that is nowhere but in memory
        return
    layers = embeddings(base)
    adapted = {own for own, layer in layers.items() if isinstance(layer, BaseTunerLayer)}
    unseen = constants.HF_HUB_OFFLINE and not Path(name).exists()
    lacking = [own for own in layers if own not in adapted and not isinstance(layers[own], AuxiliaryTrainingWrapper)]
    if text.vocab_size != before and lacking and (unseen or (adapted and not text.tie_word_embeddings)):
        raise UserError(
            f"`model` has {text.vocab_size} tokens, but {name} has {before}. With this adapter PEFT saves no "
            f"`{lacking[0]}` for the new ones. Save the model with them in a folder by `save_pretrained`, and train it "
            "from there."
        )
