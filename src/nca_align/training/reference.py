"""The reference model: which part of a policy it is, its hash, and how it is loaded again where it was not kept."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..batching.attention import is_peft_model, share_prefixes
from ..config import NCAConfig
from ..errors import UnsupportedError, UserError
from ..models.loading import ModelSource
from ..models.logprobs import add_token_logps
from ..models.policy import as_reference, base_model, eval_mode
from ..store.fingerprints import tensors_fingerprint
from .sharded import placed_reference, reshard, split

# What a model's config says beside what its forward computes
_NOT_COMPUTED = (  # saving writes some of these, and each training sets the ids
    "_name_or_path", "transformers_version", "use_cache", "architectures", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip


# What an adapter's config says beside what its forward computes
_ABOUT_ADAPTER = ("base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version")


def model_hash(model: nn.Module, trained: bool) -> str:
    """Hash of a reference: its weights, and what computes on them. Of sharded weights this process's share counts.

    Args:
        model: the reference, or the policy that is its own.
        trained: whether it is the policy. Under an adapter its reference is then its base, or the adapter "ref" on it,
            and runs that differ in a fresh adapter alone share their cache.
    """
    adapters: dict[str, Any] = getattr(model, "peft_config", {})
    left_out = [f".{name}." for name in adapters if name != "ref"] if trained else []
    base: Any = base_model(model)
    read = {name: adapter_options(own) for name, own in adapters.items() if f".{name}." not in left_out}
    active = getattr(model, "active_adapters", None) if read and not trained else None
    about = [type(base).__name__, computed_config(base), read, active]
    return tensors_fingerprint(model, lambda name: not any(part in f"{name}." for part in left_out), about)


def adapter_options(config: Any) -> dict[str, Any]:
    """What an adapter's config says about what its forward computes, and how it started."""
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if name not in _ABOUT_ADAPTER
    }


def adapter_hash(model: nn.Module, adapter: str) -> str:
    """Hash of the weights of one of a PEFT model's adapters; of sharded weights this process's share counts."""
    return tensors_fingerprint(model, lambda name: f".{adapter}." in f"{name}.")


def computed_config(model: Any) -> dict[str, Any]:
    """What a language model's config says about what its forward computes."""
    return {name: value for name, value in model.config.to_dict().items() if name not in _NOT_COMPUTED}


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


def live_model(policy: nn.Module, reference: nn.Module | None) -> nn.Module:
    """The model whose forwards are the reference's: one of its own, or a policy with an adapter.

    Raises:
        UserError: there is none.
    """
    if reference is None and not is_peft_model(policy):
        raise UserError(
            "This data set has no cached reference log-probabilities, and `precompute_ref_log_probs` keeps no "
            "reference model in memory. Give `ref_model`, or set `precompute_ref_log_probs: false`."
        )
    return policy if reference is None else reference  # a compiled model has no truth value


@contextmanager
def reference_mode(
    policy: nn.Module, reference: nn.Module | None, accelerator: Accelerator, untrained: bool
) -> Iterator[None]:
    """Around forwards of the reference: without dropout, and of a policy with an adapter as what it started from.

    Args:
        policy: the trained model.
        reference: a model of its own, if there is one.
        untrained: whether no step was taken yet.
    """
    adapter: Any = nullcontext()
    if reference is None and is_peft_model(policy):
        adapter = as_reference(accelerator.unwrap_model(policy), untrained)
    with eval_mode(policy), adapter, accelerator.autocast():
        yield


@contextmanager
def around_evaluation(trainer: Any, dataset: Any) -> Iterator[None]:
    """Around an evaluation: it changes no training after it, and a new data set has the reference from before training.

    Args:
        trainer: an NCATrainer.
        dataset: what is evaluated; None or the name of a part for what the trainer has.

    Raises:
        UserError: as `reload_reference` does.
    """
    known = dataset is None or isinstance(dataset, str)
    kept = not trainer.precompute_ref_logps or trainer.ref_model is not None or is_peft_model(trainer.model)
    device, line_is_due = trainer.accelerator.device, trainer.control.should_log
    if trainer.is_deepspeed_enabled and trainer.deepspeed is None:
        raise UnsupportedError(
            "`evaluate` before `train` isn't possible under DeepSpeed, whose engine for it can't be trained. Evaluate "
            "after training, or under FSDP2 or DDP."
        )
    if trainer.accelerator.is_fsdp2 and not trainer.accelerator._models:  # before training, which accelerate refuses
        trainer.accelerator._models.append(split(trainer.model, trainer.accelerator))
    reloaded = not (known or kept) and trainer.state.global_step > 0
    if reloaded:
        packed = trainer.data_collator.layout == "prefix_shared"
        trainer.ref_model = reload_reference(trainer.model, trainer._reference_hash, packed, trainer.accelerator)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        reshard(trainer.model)
        trainer.control.should_log = line_is_due  # the evaluation's own line would stand for the step's
        if reloaded:
            trainer.ref_model = None


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
        same = [model_hash(reference, trained=True) == expected]
        broadcast_object_list(same, from_process=0)  # FSDP's first process alone may have read the weights
        if same[0]:
            add_token_logps(reference)
            if shares_prefixes:
                share_prefixes(reference)
            return placed_reference(reference, accelerator)
        reason = f"the weights in {path!r} are not those that it had before training"
    raise UserError(
        "`evaluate()` on a new data set needs the reference model, which `precompute_ref_log_probs` did not keep: "
        f"{reason}. Give the data set as `eval_dataset` at construction, or give `ref_model`."
    )
