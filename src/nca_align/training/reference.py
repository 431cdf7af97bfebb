"""The reference model: which part of a policy it is, its hash, and how it is loaded again where it was not kept."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..batching.attention import share_prefixes
from ..config import NCAConfig
from ..errors import UserError
from ..models.loading import ModelSource
from ..models.logprobs import add_token_logps
from ..models.policy import as_reference, base_model, eval_mode
from ..store.fingerprints import tensors_fingerprint

# What a model's config says beside what its forward computes
_NOT_COMPUTED = (  # saving writes some of these, and each training sets the ids
    "_name_or_path", "transformers_version", "use_cache", "architectures", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip


def model_hash(model: nn.Module) -> str:
    """Hash of the reference: all of `model`'s weights but the trained adapter's, and what computes on them.

    A PEFT model's reference is its base, or the adapter "ref" where training goes on from an existing one, so runs that
    differ in a fresh adapter alone share their cache. Of sharded weights this process's share counts.
    """
    policy = [f".{name}." for name in getattr(model, "peft_config", {}) if name != "ref"]
    return tensors_fingerprint(
        model, lambda name: not any(part in f"{name}." for part in policy), about=_computation(model)
    )


def adapter_hash(model: nn.Module, adapter: str) -> str:
    """Hash of the weights of one of a PEFT model's adapters; of sharded weights this process's share counts."""
    return tensors_fingerprint(model, lambda name: f".{adapter}." in f"{name}.")


def computed_config(model: Any) -> dict[str, Any]:
    """What a language model's config says about what its forward computes."""
    return {name: value for name, value in model.config.to_dict().items() if name not in _NOT_COMPUTED}


def _computation(model: nn.Module) -> list[Any]:
    """What decides a forward beside the weights: the architecture, and the scale of the adapter "ref"."""
    adapters = getattr(model, "peft_config", {})
    base: Any = base_model(model)
    reference = adapters["ref"].to_dict() if "ref" in adapters else {}
    scale = {name: value for name, value in reference.items() if name in ("peft_type", "r", "lora_alpha", "use_rslora")}
    return [type(base).__name__, computed_config(base), scale]


def frozen_copy(model: Any, peft_config: Any, args: NCAConfig) -> PreTrainedModel | None:
    """The reference of a model that was passed as an instance, where one is kept in memory beside it; else None.

    TRL would load the reference from the id in the model's config, which may not be what was passed.
    """
    sharded = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3  # holds empty parameters
    if isinstance(model, str) or peft_config or is_peft_model(model) or args.precompute_ref_log_probs or sharded:
        return None
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    for patched in ("forward", "_has_token_logps"):  # of an earlier trainer, bound to the model itself
        reference.__dict__.pop(patched, None)
    return reference


@contextmanager
def reference_mode(policy: nn.Module, reference: nn.Module | None, accelerator: Accelerator) -> Iterator[None]:
    """Around forwards of the reference: without dropout, and of a policy with an adapter as what it started from.

    Args:
        policy: the trained model.
        reference: a model of its own, if there is one.
    """
    adapter: Any = nullcontext()
    if reference is None and is_peft_model(policy):
        adapter = as_reference(accelerator.unwrap_model(policy))
    with eval_mode(policy), adapter, accelerator.autocast():
        yield


def reload_reference(model: Any, expected: str, shares_prefixes: bool, accelerator: Accelerator) -> nn.Module:
    """The reference from where `model` came from, if those still are its weights from before training.

    Args:
        model: the trained model, without an adapter.
        expected: `model_hash` from before training.
        shares_prefixes: whether its batches are packed rows.

    Raises:
        UserError: it can't be loaded, or its weights are others.
    """
    path = model.config.name_or_path
    try:
        reference = ModelSource(path).load(AutoModelForCausalLM, dtype=model.dtype)
    except UserError as error:
        reason = f"it could not be loaded again from {path!r} ({type(error.__cause__ or error).__name__})"
    else:
        if model_hash(reference) == expected:
            add_token_logps(reference)
            if shares_prefixes:
                share_prefixes(reference)
            return accelerator.prepare_model(reference, evaluation_mode=True)
        reason = f"the weights in {path!r} are not those that it had before training"
    raise UserError(
        "`evaluate()` on a new data set needs the reference model, which `precompute_ref_log_probs` did not keep: "
        f"{reason}. Give the data set as `eval_dataset` at construction, or give `ref_model`."
    )
