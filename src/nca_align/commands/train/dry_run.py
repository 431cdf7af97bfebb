"""`nca-align train --dry_run`: the plan of a run, from its config, the lengths of its first rows and no weights."""

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from trl import ModelConfig, ScriptArguments, get_peft_config

from ...batching.tokenization import rows_that_become_tokens, tokenize_dataset
from ...config import NCAConfig
from ...data import DataOptions
from ...data.sample import read_sample
from ...device import has_accelerator, launched_on_cpu
from ...errors import UserError, as_user_error
from ...models.loading import adapter_config, silence_transformers
from ...options import given_options, given_value, says_true
from ...progress import without_library_bars
from ...training.adapters import check_adapter
from ...training.arguments import check_arguments, check_model, prepare_datasets
from ...training.card_memory import Quantisation
from ...training.launch import Launch, alone, read_launch, syncs_each_batch
from ...training.memory_plan import Planner, Setup
from .checks import check_options, checkpoint_to_go_on_from, name_unread
from .options import FIRST_OPTIONS, REQUIRED, RunOptions, parse_train
from .plan_text import Lengths, plan_text
from .policy import model_source, new_adapter

ROWS = 1000  # of the data that are read
_UNITS = {"": 1e9, "g": 1e9, "gb": 1e9, "gib": 2.0**30, "m": 1e6, "mb": 1e6, "mib": 2.0**20}


@without_library_bars()
def dry_run(argv: list[str]) -> int:
    """Print the plan; 0, whether the run fits or not. Of several processes the first one does it."""
    environment = dict(os.environ)
    if int(environment.get("RANK", 0)):
        return 0
    with alone():
        options = parse_train(
            _as_on_a_card(argv), "nca-align train", first=FIRST_OPTIONS, required=REQUIRED,
            without=["ddp_backend"],  # a backend is of a launch's processes, and this one is alone
        )  # fmt: skip
        run: RunOptions = options[2]
        if run.launch:
            environment = read_launch(run.launch)
        if run.devices is not None:
            if run.devices < 1:
                raise UserError(f"`devices` is {run.devices}, but must be at least 1")
            environment["WORLD_SIZE"] = str(run.devices)
        with alone(environment):
            with as_user_error("setting up the training"):
                print(_plan(argv, environment, *options))
    return 0


def _as_on_a_card(argv: list[str]) -> list[str]:
    """`argv`, and what lets a machine without a card read the options of a run that has one."""
    if has_accelerator() or launched_on_cpu() or says_true(argv, "use_cpu"):
        return argv
    half = says_true(argv, "fp16") or "bf16" not in given_options(argv, false=True)
    own = [part for name in ("use_cpu", *(["bf16"] if half else [])) for part in (f"--{name}", "true")]
    off = [name for name in ("fp16", "tf32", "activation_offloading") if says_true(argv, name)]
    own += [part for name in off for part in (f"--{name}", "false")]
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        value = given_value(argv, name)
        with suppress(ValueError):  # which the parser tells
            value = json.loads(value) if isinstance(value, str) else value
        if isinstance(value, dict) and value.get("offload"):
            own += [f"--{name}", json.dumps(value | {"offload": False})]
    return [*argv, *own]


def _plan(
    argv: list[str],
    environment: Mapping[str, str],
    script: ScriptArguments,
    data_options: DataOptions,
    run: RunOptions,
    args: NCAConfig,
    model_args: ModelConfig,
) -> str:
    logging.getLogger("nca_align").setLevel(logging.WARNING)
    silence_transformers()
    name_unread(given_options(argv, false=True), script, data_options, run, args, model_args)
    size = None if run.device_memory is None else _bytes(run.device_memory)
    check_options(script, run, args, model_args)
    checkpoint_to_go_on_from(args)
    source = model_source(model_args, args)
    config, tokenizer = source.load_config(), source.load_tokenizer()
    sample = read_sample(
        str(script.dataset_name), script.dataset_train_split, ROWS, name=script.dataset_config,
        streaming=script.dataset_streaming, options=data_options,
    )  # fmt: skip
    check_arguments(args, None, None, sample.dataset)
    prepare_datasets(args, None, sample.dataset, None)
    limits = args.max_prompt_length, args.max_length
    rows = sample.dataset
    if args.on_invalid == "drop":
        rows = rows_that_become_tokens(rows, tokenizer, *limits, on_invalid=args.on_invalid)
    tokenised: Any = tokenize_dataset(rows, tokenizer, None, None, args.length_column_name)[0]
    on_cpu = bool(args.use_cpu) and argv == _as_on_a_card(argv)
    launch = Launch.of(environment, args)
    adapter = adapter_config(source.adapter) if source.adapter else new_adapter(model_args)
    check_adapter(None, adapter)
    planner = Planner(
        config,
        list(tokenised),
        _dtype(model_args, args, config),
        adapter or get_peft_config(ModelConfig(use_peft=True, lora_target_modules=["all-linear"], lora_dropout=0.0)),
        args.layout,
        pad_to_multiple_of=args.pad_to_multiple_of,  # type: ignore[arg-type]
        mixed=torch.bfloat16 if args.bf16 or args.fp16 else None,
        device="cpu" if on_cpu else "cuda",
        attention=model_args.attn_implementation,
        goes_on=source.adapter is not None,
        disable_dropout=args.disable_dropout,
        trust_remote_code=args.trust_remote_code,
        offloads_activations=says_true(argv, "activation_offloading"),
        args=args,
    )
    bits = 4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else 0
    setup = Setup(
        launch,
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        tokens_per_forward=args.tokens_per_forward,
        max_length=args.max_length,
        checkpointing=args.gradient_checkpointing,
        optim=str(getattr(args.optim, "value", args.optim)),
        use_peft=adapter is not None,
        quantisation=Quantisation(bits, bits == 4 and model_args.use_bnb_nested_quant) if bits else None,
        precomputes=args.precompute_ref_log_probs and not script.dataset_streaming,
        syncs_each_batch=syncs_each_batch(args),
        max_prompt_length=args.max_prompt_length,
    )
    if size is None:
        size = _memory_here(on_cpu, launch)
    check_model(planner.model(setup, planner.dtype), args.max_length, None, tokenised)  # type: ignore[arg-type]
    lengths = Lengths.count(planner.rows, args.max_prompt_length, args.max_length)
    return plan_text(planner, setup, sample, lengths, args, str(model_args.model_name_or_path), size)


def _dtype(model_args: ModelConfig, args: NCAConfig, config: Any) -> torch.dtype:
    """Of the loaded weights."""
    own: Any = args.model_init_kwargs or {}
    name = own.get("dtype", model_args.dtype)
    if name == "auto":
        name = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return name if isinstance(name, torch.dtype) else getattr(torch, name or "float32")


def _bytes(text: Any) -> float:
    """Of a card: 10⁹ for GB, since cards that are named so have less than 2³⁰ for each, and 2³⁰ for GiB."""
    found = re.fullmatch(r"([\d.]+)\s*([a-z]*)", str(text).strip().lower())
    size = 0.0
    if found:
        with suppress(ValueError, KeyError):
            size = float(found[1]) * _UNITS[found[2]]
    if not 0 < size < math.inf:
        raise UserError(
            f"`device_memory` is {text!r}, but must be a finite number above 0 of GB or GiB, such as 24GB or 22.5GiB"
        )
    return size


def _memory_here(on_cpu: bool, launch: Launch) -> float | None:
    """Bytes for one process: of the smallest card that PyTorch finds, or on a CPU its share; None without any."""
    if not on_cpu:
        cards = range(torch.cuda.device_count())
        return min((float(torch.cuda.get_device_properties(card).total_memory) for card in cards), default=None)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / launch.processes
    except (ValueError, OSError, AttributeError):
        return None
