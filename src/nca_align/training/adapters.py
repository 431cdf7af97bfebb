"""The adapter of a policy: which kinds can be trained here, and the reference that each starts from."""

import copy
from functools import partial
from typing import Any

from transformers.integrations import is_deepspeed_zero3_enabled

from ..errors import UnsupportedError, UserError, notify
from ..models.plain_lora import edits_base
from ..models.policy import refuse_trained_biases

# Why a kind of adapter can't be trained here
_REFUSED = {
    "ADAPTION_PROMPT": "it keeps the forward that the model had before, which returns no log-probabilities of tokens",
    "LILY": "it mixes by a mean over all tokens of the batch, later ones and padding among them",
    "MULTITASK_PROMPT_TUNING": "each of its forwards needs `task_ids`, and rewarded completions have none",
    "POLY": "each of its forwards needs `task_ids`, and rewarded completions have none",
    "XLORA": "it mixes adapters into one that is not the base, and PEFT puts no copy of it beside it as the reference",
}
# Kinds that by their own method do not start as the model that they are put on
_STARTS_ELSEWHERE = ("C3A", "FOURIERFT", "UNILORA", "VBLORA")


def check_adapter(model: Any, peft_config: Any) -> None:
    """Refuse an adapter that can't be trained here.

    Args:
        model: as the trainer is given it.
        peft_config: of a new adapter, or None.

    Raises:
        UserError: its kind, its name or its start doesn't do, of the class that says which.
    """
    adapters: dict[str, Any] = getattr(model, "peft_config", {})
    if adapters and list(adapters) != ["default"]:
        raise UserError(
            f"`model` has the adapters {', '.join(adapters)}, but NCATrainer trains one, called default. It makes its "
            "own copy of it as the reference. Load it alone, by `PeftModel.from_pretrained(base, folder, "
            "is_trainable=True)`, and merge others into the base."
        )
    config = adapters.get("default", peft_config)
    kind = getattr(getattr(config, "peft_type", None), "value", None)
    if kind in _REFUSED:
        raise UnsupportedError(
            f"an adapter of the kind {kind} can't be trained here: {_REFUSED[kind]}; use LoRA, or another kind"
        )
    if str(getattr(config, "init_lora_weights", None)).lower() == "loftq":
        raise UnsupportedError(
            "`init_lora_weights` is 'loftq', which quantises the base's weights for good, so the adapter fits no base "
            "that can be loaded. Load the base with `load_in_4bit: true`, and start a plain LoRA on it by PEFT's "
            "`replace_lora_weights_loftq`."
        )
    if kind == "ADALORA":
        notify(
            "AdaLoRA keeps its ranks at `init_r` here: only a callback of your own calls `update_and_allocate`, and "
            "its penalty for orthogonality is not in the loss."
        )


def let_copy_start_plainly(model: Any) -> Any:
    """Change the config of an adapter that training goes on from, so that TRL's copy of it starts plainly.

    TRL adds that copy, "ref", by the adapter's own config. An initialisation that edits the base, such as PiSSA's,
    would edit it a second time, and so the policy.

    Returns:
        The config to put back; None where `model` has no adapter.
    """
    config = getattr(model, "peft_config", {}).get("default")
    if config is not None:
        model.peft_config["default"] = _plain(config)
    return config


def read_as_saved(model: Any) -> None:
    """Let an adapter be read from a checkpoint in the precision that it is trained in: PEFT would make it float32."""
    if hasattr(model, "peft_config"):
        model.load_adapter = partial(model.load_adapter, autocast_adapter_dtype=False)


def set_up_reference_adapter(model: Any, config: Any, reference_cached: bool) -> None:
    """Give a policy with an adapter the reference that it starts from, where that is not the bare base.

    There are three such cases. Training goes on from an adapter. The adapter's start is taken out of the base's
    weights, or its method doesn't start at the base. Virtual tokens stand in front of each row.

    Args:
        model: the policy.
        config: what `let_copy_start_plainly` returned, of an adapter that training goes on from: TRL's copy of it,
            "ref", has the weights of some modules alone, and all are copied here.
        reference_cached: whether the reference is computed before training alone.

    Raises:
        UserError: the adapter trains biases of the base, so that nothing is left as a live reference.
    """
    adapters: dict[str, Any] = getattr(model, "peft_config", {})
    if not adapters:
        return
    new = adapters["default"]
    if config is not None:
        adapters["default"] = config
    elif new.is_prompt_learning or edits_base(new) or new.peft_type.value in _STARTS_ELSEWHERE:
        model.add_adapter("ref", _plain(new))
    if not reference_cached:
        refuse_trained_biases(model)
    if "ref" not in adapters:
        return
    if is_deepspeed_zero3_enabled():  # of what it holds still, no process has the whole when it is saved
        raise UnsupportedError(
            "this adapter's reference is another adapter, which ZeRO-3 would not save. Use ZeRO-2 or FSDP2, or put a "
            "new adapter on the merged model."
        )
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors.items():
        copied = ".".join("ref" if part == "default" else part for part in name.split("."))
        if copied != name and copied in tensors:
            tensors[copied].data = tensor.data.clone()  # in its precision, which TRL changes under QLoRA
            tensors[copied].requires_grad_(False)


def _plain(config: Any) -> Any:
    """A config's copy for "ref": it leaves the base as it is and isn't trained (AdaLoRA trains one adapter alone)."""
    config = copy.copy(config)
    config.inference_mode = not config.is_prompt_learning  # which would leave out P-tuning's encoder
    if edits_base(config):
        config.init_lora_weights = True
    for name, nothing in (("bias", "none"), ("layer_replication", None)):  # both would change the base again
        if hasattr(config, name):
            setattr(config, name, nothing)
    return config


def why_not_resumed(model: Any) -> str | None:
    """Why a run with this adapter can't be resumed, where what is saved isn't what is trained."""
    for config in getattr(model, "peft_config", {}).values():
        kind = config.peft_type.value
        if kind in ("P_TUNING", "CPT") or getattr(config, "prefix_projection", False):
            return f"of this {kind} adapter PEFT saves what its encoder makes of its weights, and not the weights"
        if getattr(config, "monteclora_config", None) is not None:
            return f"this {kind} adapter draws from numbers that no checkpoint holds"
    return None
