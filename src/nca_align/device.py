"""Where a training computes, and in which precision, as far as its options don't say."""

import os
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available, is_torch_xla_available

from .errors import UserError


def choose_device(args: Any) -> str | None:
    """Settle `use_cpu` and `bf16` where they are None; what was given stays, or is refused.

    Args:
        args: the fields of an `NCAConfig`, before transformers has read them.

    Returns:
        A sentence on what was chosen against DPOConfig's defaults, an accelerator and bfloat16; None without any.

    Raises:
        UserError: an accelerator or a precision was asked for that this machine doesn't have.
    """
    accelerated, given = has_accelerator(), args.use_cpu
    if given is False and not accelerated:
        raise UserError(
            "`use_cpu` is False, but PyTorch finds no accelerator on this machine. Leave it out to train on the CPU."
        )
    args.use_cpu = not accelerated or launched_on_cpu() if given is None else given
    on_cpu = args.use_cpu and given is None and not launched_on_cpu()
    if args.bf16 and on_cpu and not computes_bfloat16(on_cpu=True):
        raise UserError(
            "`bf16` is True, but PyTorch finds no accelerator on this machine, and its CPU doesn't compute in "
            "bfloat16. Leave it out, or add `use_cpu: true` to have the CPU emulate it."
        )
    if args.fp16 and args.use_cpu:
        raise UserError(
            "`fp16` is True, but a CPU doesn't train in float16. Leave it out, or choose `bf16: true` with `use_cpu: "
            "true`."
        )
    if args.tf32 and not is_torch_tf32_available():
        raise UserError("`tf32` is True, but this machine has no GPU that computes in TF32; leave it out.")
    checkpointing: Any = args.gradient_checkpointing_kwargs or getattr(args, "activation_checkpointing_kwargs", None)
    for name, asked in (
        ("activation_offloading", args.activation_offloading),
        ("gradient_checkpointing_kwargs", isinstance(checkpointing, dict) and checkpointing.get("offload")),
    ):
        if args.use_cpu and asked:
            raise UserError(f"`{name}` asks to keep activations on the CPU, but training is on the CPU. Leave it out.")
    chosen = args.bf16 is None and not args.fp16
    if chosen:  # never on a CPU by itself: it learns less there in as many steps (docs/guide/memory.md)
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
        args.bf16 = launched or (not args.use_cpu and computes_bfloat16(on_cpu=False))
    precision = "in bfloat16 mixed precision (`bf16: true`)" if args.bf16 else "without mixed precision (`bf16: false`)"
    if given is None and args.use_cpu:
        return f"This machine has no accelerator that PyTorch finds: training is on the CPU, {precision}."
    if chosen and args.use_cpu:
        return f"Training is on the CPU, {precision}."
    if chosen and not args.bf16:
        return f"This accelerator doesn't compute in bfloat16: training is {precision}."
    return None


def has_accelerator() -> bool:
    """Whether PyTorch finds a device that is faster than the CPU: a GPU, Apple's, a TPU …"""
    return torch.accelerator.is_available() or is_torch_xla_available()


def computes_bfloat16(on_cpu: bool) -> bool:
    """Whether the CPU, or else the accelerator, is faster in bfloat16 mixed precision than in float32."""
    if on_cpu:
        flags = torch.cpu.get_capabilities()
        return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))  # others convert to float32 and back
    if torch.cuda.is_available():  # older cards emulate it, which is slower
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_torch_bf16_gpu_available() or is_torch_xla_available()


def launched_sharded(args: Any) -> bool:
    """Whether FSDP or DeepSpeed is to train, by the launcher or by the options; known before a model is loaded."""
    launched = any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))
    return launched or bool(args.fsdp) or args.deepspeed is not None


def fsdp_version(args: Any) -> int | None:
    """1 or 2, by the options or the launcher, whose default is 1; None without FSDP."""
    if args.fsdp:
        return int(args.fsdp_plugin_args["fsdp_version"])
    return int(os.environ.get("FSDP_VERSION", "1")) if parse_flag_from_env("ACCELERATE_USE_FSDP") else None


def launched_on_cpu() -> bool:
    """Whether `accelerate launch --cpu` started this process."""
    return bool(parse_flag_from_env("ACCELERATE_USE_CPU"))
