"""Options that can't do what they are for: here at all, or in a run because of another option; and what is said."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from accelerate.utils import get_int_from_env
from transformers.utils import is_liger_kernel_available

from .errors import UnsupportedError, UserError
from .losses import READS_ALPHA, reads_alpha

# Options of TRL and transformers that can't do here what they do there: field → values that ask for nothing, and why
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "f_divergence_type": (
        ("reverse_kl",),
        "no loss here reads it: InfoNCA and NCA come from the reverse KL alone",
    ),
    "f_alpha_divergence_coef": ((0.5,), "no loss here reads it: it belongs to `f_divergence_type`"),
    "ld_alpha": ((None,), "no loss here reads it: completions count as wholes, not by the length that two share"),
    "label_smoothing": ((0,), "no loss here reads it: targets are softened by `alpha`"),
    "label_smoothing_factor": ((0,), "no loss here reads it: targets are softened by `alpha`"),
    "use_weighting": ((False,), "no loss here reads it: WPO weights pairs, and rewards weigh completions here"),
    "discopop_tau": ((0.05,), "no loss here reads it: it belongs to TRL's `discopop` loss"),
    "truncation_mode": (
        ("keep_start",),
        "a prompt's end and a completion's beginning are always kept; see `max_prompt_length`",
    ),
    "neftune_noise_alpha": (
        (None,),
        "its noise is in the policy alone, so that a log-ratio would measure the noise beside the training",
    ),
    "bf16_full_eval": ((False,), "it casts the policy and not its reference, so that log-ratios would measure that"),
    "fp16_full_eval": ((False,), "it casts the policy and not its reference, so that log-ratios would measure that"),
    "average_tokens_across_devices": ((True,), "a loss is the mean over the prompts of all processes in any case"),
    "include_num_input_tokens_seen": (("no", False), "`num_tokens` in each log line counts them in any case"),
    "enable_jit_checkpoint": ((False,), "NCATrainer saves on SIGTERM by itself, after whole steps"),
}

# What launchers tell a process its number by
_LOCAL_RANK = ["LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"]


class Rule(NamedTuple):
    """When some options are read.

    Args:
        names: the options, with blanks between.
        read: whether a run reads them, of all its options.
        needs: what would have them read, in words.
    """

    names: str
    read: Callable[[Any], bool]
    needs: str


def _reads_alpha(options: Any) -> bool:
    return any(map(reads_alpha, options.loss_type))


def _reads_adam(options: Any, *others: str) -> bool:
    """By the names that transformers' optimizers have (5.24); of GaLore's and Grok's it hands these options to none."""
    name = _optimizer(options)
    return any(kind in name for kind in ("adamw", "radam", "ademamix", *others)) and not name.startswith(
        ("galore", "grok")
    )


def _optimizer(options: Any) -> str:
    return str(getattr(options.optim, "value", options.optim))


NO = ("none", "false", "no", "")  # of `resume_from_checkpoint`, in lower case: they ask for nothing
# of a new adapter: option → attribute of its PEFT configuration
LORA = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "lora_task_type": "task_type",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
OF_HELD_OUT = ("do_eval", "show_answers", "dataset_test_split", "per_device_eval_batch_size")
_EVALUATION = "`eval_strategy` steps or epoch"
# Of NCAConfig, as far as it decides alone: a script may evaluate, save or push to the Hub by itself
CONFIG_RULES = (
    Rule("alpha", _reads_alpha, f"`loss_type` {', '.join(sorted(READS_ALPHA))}, or a function that reads it"),
    Rule("beta", lambda o: o.loss_type != ["sft"], "another `loss_type` than sft alone"),
    Rule("adam_beta1 adam_beta2", lambda o: _reads_adam(o, "lion"), "an `optim` of the Adam or Lion family"),
    Rule("adam_epsilon", _reads_adam, "an `optim` of the Adam family"),
    Rule(
        "optim_target_modules",
        lambda o: _optimizer(o).startswith(("galore", "apollo")),
        "an `optim` of the GaLore or APOLLO family",
    ),
    Rule("num_train_epochs", lambda o: o.max_steps < 1, "`max_steps` left out"),
    Rule("warmup_steps warmup_ratio", lambda o: o.lr_scheduler_type != "constant", "another `lr_scheduler_type`"),
    Rule(
        "ref_model_mixup_alpha ref_model_sync_steps", lambda o: o.sync_ref_model, "`sync_ref_model: true`"
    ),
    Rule("gradient_checkpointing_kwargs", lambda o: o.gradient_checkpointing, "`gradient_checkpointing: true`"),
    Rule("precompute_ref_batch_size", lambda o: o.precompute_ref_log_probs, "`precompute_ref_log_probs: true`"),
    Rule("liger_kernel_config", lambda o: o.use_liger_kernel, "`use_liger_kernel: true`"),
    Rule("padding_free", lambda o: False, "TRL's collator; here `layout: prefix_shared` is the layout without padding"),
    Rule(
        "logging_steps",
        lambda o: o.logging_strategy == "steps" or o.eval_strategy == "steps",
        "`logging_strategy: steps`",
    ),
    Rule("logging_first_step", lambda o: o.logging_strategy != "no", "`logging_strategy` steps or epoch"),
    Rule("ddp_timeout", lambda o: not o.use_cpu, "an accelerator: transformers hands it on there alone"),
    Rule("local_rank", lambda o: False, "transformers 4; today the launcher's environment tells it"),
    Rule("eval_steps", lambda o: o.eval_strategy == "steps", "`eval_strategy: steps`"),
    Rule("eval_delay", lambda o: o.eval_strategy in ("steps", "epoch"), _EVALUATION),
    Rule("save_steps", lambda o: o.save_strategy == "steps", "`save_strategy: steps`"),
    Rule(
        "prediction_loss_only eval_accumulation_steps eval_do_concat_batches eval_use_gather_object "
        "include_for_metrics batch_eval_metrics do_predict label_names",
        lambda o: False,
        "predictions, which NCATrainer doesn't keep",
    ),
)  # fmt: skip
# Of `nca-align train` beside these
TRAIN_RULES = (
    Rule("save_total_limit save_only_model", lambda o: o.save_strategy != "no", "`save_strategy` steps or epoch"),
    Rule("metric_for_best_model greater_is_better", lambda o: o.evaluates, _EVALUATION),
    Rule(" ".join(LORA), lambda o: o.use_peft, "`use_peft: true`"),
    Rule(
        "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage",
        lambda o: o.load_in_4bit,
        "`load_in_4bit: true`",
    ),
    Rule(" ".join(OF_HELD_OUT), lambda o: o.evaluates, _EVALUATION),
    Rule("answer_tokens", lambda o: o.show_answers, "`show_answers`"),
    Rule("eval_completions eval_new_tokens eval_prompts", lambda o: o.eval_scorer, "`eval_scorer`"),
    Rule(
        "hub_model_id hub_strategy hub_always_push hub_revision",
        lambda o: o.push_to_hub,
        "`push_to_hub: true`",
    ),
    Rule("hub_private_repo", lambda o: o.push_to_hub or "trackio" in o.report_to, "`push_to_hub: true`"),
    Rule("resume_changed", lambda o: str(o.resume_from_checkpoint).lower() not in NO, "`resume_from_checkpoint`"),
    Rule("run_name", lambda o: o.report_to, "`report_to`"),
    Rule(
        "project trackio_space_id trackio_bucket_id trackio_static_space_id",
        lambda o: "trackio" in o.report_to,
        "`report_to: trackio`",
    ),
    Rule("device_memory launch devices", lambda o: o.dry_run, "`dry_run: true`"),
    Rule("ignore_bias_buffers do_train", lambda o: False, "TRL's own script"),
)  # fmt: skip


def refuse_unsupported_options(options: Any) -> None:
    """Raise where an option asks for what can't be done here.

    Args:
        options: an `NCAConfig`, before transformers has read it.

    Raises:
        UserError: it names the first of them.
    """
    for name, (nothing, why) in UNSUPPORTED.items():
        if getattr(options, name, nothing[0]) not in nothing:
            raise UserError(f"`{name}` is {getattr(options, name)!r}, but {why}. Leave it out.")
    refuse_shared_batches(options.parallelism_config)
    if options.sync_ref_model and options.precompute_ref_log_probs:
        raise UserError(
            "`sync_ref_model` is True, but `precompute_ref_log_probs` computes the reference once, before it moves. "
            "Leave one of them out."
        )
    if options.ddp_backend is not None and get_int_from_env(_LOCAL_RANK, -1) == -1:
        raise UserError(
            f"`ddp_backend` is {options.ddp_backend!r}, but no launcher started this process, and one process has no "
            "backend. Leave it out."
        )
    refuse_pieces(options, options.tokens_per_forward)
    optim = _optimizer(options)
    if "lomo" in optim or optim.endswith("_layerwise"):
        raise UserError(
            f"`optim` is {optim}, which moves the weights within each backward. A step's gradients can't be summed up "
            "or checked before that. Use another."
        )
    if options.use_liger_kernel and not is_liger_kernel_available():
        raise UserError(
            "`use_liger_kernel` is True, but liger-kernel is not installed. Leave it out, or `pip install "
            "liger-kernel`."
        )


def refuse_pieces(options: Any, tokens_per_forward: int | None) -> None:
    """Raise where an option can't go with several forwards and backwards a step.

    Args:
        options: an `NCAConfig`.
        tokens_per_forward: its own, or that of a collator that was given.

    Raises:
        UserError: it names the option.
    """
    if options.ddp_static_graph and (options.gradient_accumulation_steps > 1 or tokens_per_forward):
        raise UserError(
            "`ddp_static_graph` is True, but PyTorch fails there with several backwards a step, as with "
            "`gradient_accumulation_steps` above 1 and `tokens_per_forward`. Leave it out."
        )
    if options.torch_compile and tokens_per_forward:
        raise UserError(
            "`torch_compile` is True, but `tokens_per_forward` cuts a batch into pieces of many lengths, each of which "
            "would be compiled anew. Leave one of them out."
        )


def refuse_shared_batches(parallelism: Any) -> None:
    """Raise where several processes would share a batch.

    Args:
        parallelism: accelerate's `ParallelismConfig`, by `parallelism_config`, the launcher or a model in parts; None.

    Raises:
        UnsupportedError: by the way in which they would.
    """
    for kind in ("tp", "cp", "sp"):
        if parallelism is not None and getattr(parallelism, f"{kind}_size") > 1:
            raise UnsupportedError(
                f"`parallelism_config` has `{kind}_size` {getattr(parallelism, f'{kind}_size')}, but processes can't "
                "share a batch of prompt trees here. Use data parallelism, FSDP or DeepSpeed."
            )


def unread(options: Any, given: Iterable[str], rules: Sequence[Rule]) -> dict[str, str]:
    """The options of `given` that this run doesn't read → what they need; None asks for nothing.

    Args:
        options: all options of the run, as attributes, and `evaluates` for `TRAIN_RULES`.
        given: names of those that the user gave.
        rules: `CONFIG_RULES`, `TRAIN_RULES`.
    """
    given = set(given)
    found: dict[str, str] = {}
    for rule in rules:
        asked = [name for name in rule.names.split() if name in given and getattr(options, name) is not None]
        if asked and not rule.read(options):
            found |= dict.fromkeys(asked, rule.needs)
    return found


def sentence(found: dict[str, str]) -> str | None:
    """One line that names what `unread` found; None where it found nothing."""
    if not found:
        return None
    needs = [
        f"{', '.join(f'`{name}`' for name in found if found[name] == need)} (needs {need})"
        for need in dict.fromkeys(found.values())
    ]
    return f"Without effect in this run: {'; '.join(needs)}."
