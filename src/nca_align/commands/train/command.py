"""`nca-align train` and `scripts/train.py`: options → data → NCATrainer → a run folder, and in words what moved."""

import ctypes
import json
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import AutoModelForCausalLM
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from ...batching.rendering import prompt_ids
from ...config import NCAConfig, changed_options
from ...data import DataOptions, RewardData, read_reward_dataset, select_split
from ...data.splits import find_split
from ...errors import UserError, as_user_error, cli_main, notify, notify_once
from ...evaluation.training_log import last_evaluation
from ...models.loading import ModelSource, adapter_config, load_adapter
from ...models.policy import eval_mode
from ...models.sampling import decoding_precision
from ...options import given_options, option, parse
from ...store.checkpoints import explain_write_errors, last_common_checkpoint
from ...unread import CONFIG_RULES, TRAIN_RULES, evaluates, sentence, unread
from .after_run import after_run
from .curves import plot_curves, run_title
from .first_options import FIRST_OPTIONS
from .summary import summary

logger = logging.getLogger("nca_align")


@dataclass
class RunOptions:
    """What `train` does beside training."""

    show_answers: int = option(
        "Held-out prompts answered before and after training (greedily), and shown at the end.", 0
    )
    cpu_threads: int | None = option(
        "Threads of a run on the CPU, 0 for one a core; `accelerate launch` leaves it a single one.", None
    )
    answer_tokens: int = option("Most tokens of such an answer.", 64)
    eval_scorer: list[str] = option(
        "What rewards the model's own answers to the held-out prompts, at each evaluation: as in "
        "`nca-align score --scorer`; may repeat. Logs reward, KL, win rate, length and diversity.",
        [],
        action="extend",
    )
    eval_completions: int = option("Such answers a prompt, at temperature 1.", 4)
    eval_new_tokens: int = option("Tokens at which such an answer is cut.", 128)
    eval_prompts: int | None = option("Held-out prompts that are so answered, the first ones; all by default.", None)


# in this order, for a cell of `nca-align compare` too
TRAIN_OPTIONS = (ScriptArguments, DataOptions, RunOptions, NCAConfig, ModelConfig)
_REQUIRED = {
    "dataset_name": "a Hub id, a file or a folder with rewarded completions",
    "model_name_or_path": "a Hub id or a folder with a language model",
}


@cli_main("nca-align train", goes_on="with `resume_from_checkpoint: true` it goes on from the last checkpoint")
def main(argv: list[str] | None = None) -> int:
    """Train as the options say; 0, or 2 after a user's mistake, told in one sentence."""
    argv = sys.argv[1:] if argv is None else argv
    script, data_options, run, args, model_args = parse(
        TRAIN_OPTIONS,
        argv,
        "nca-align train",
        "Align a language model on K rewarded completions per prompt.",
        first=FIRST_OPTIONS,
        required=_REQUIRED,
    )
    given = given_options(argv, false=True)
    _follow_launcher()
    if args.process_index == 0:
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
        logger.setLevel(logging.INFO)
    else:
        disable_progress_bars()
    set_threads(run)
    name_unread(given, script, data_options, run, args, model_args)
    _check(script, run, args, model_args)
    checkpoint = _checkpoint(args)
    source = model_source(model_args, args)
    source.load_config()  # shows, before anything is read, whether the model can be had
    tokenizer = source.load_tokenizer()
    with args.main_process_first(desc="reading the data"):
        data = read_reward_dataset(
            script.dataset_name,
            name=script.dataset_config,
            streaming=script.dataset_streaming,
            num_proc=args.dataset_num_proc,
            options=data_options,
        )
    if "validation_fraction" in given and data_options.validation_fraction and data.validation_indices is None:
        notify("`validation_fraction` has no effect on this data: it has a held-out split, or is a stream.")
    evaluated = _evaluates(args, data, script.dataset_test_split)
    if run.show_answers and not evaluated and args.eval_strategy is None:
        notify(f"`show_answers` is {run.show_answers}, but no rows are held out: no answers are shown.")
    if run.eval_scorer and not evaluated:
        raise UserError("`eval_scorer` is set, but nothing is evaluated: set `eval_strategy` to steps or epoch")
    train_dataset = select_split(data.dataset, script.dataset_train_split)
    eval_dataset = select_split(data.dataset, script.dataset_test_split) if evaluated else None

    from ...evaluation.callbacks import GenerationCallback
    from ...evaluation.evaluator import GenerationEvaluator
    from ...rewards.scorers import open_scorers
    from ...trainer import NCATrainer  # late: what can be wrong above is said before seconds of imports

    with as_user_error("setting up the training"):
        # a scorer that can't be had is told before the model is read
        scorers = open_scorers(run.eval_scorer, trust_remote_code=args.trust_remote_code) if run.eval_scorer else None
        policy = open_policy(source, model_args, args)
        trainer = NCATrainer(
            args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=tokenizer, **policy
        )
        if scorers is not None and eval_dataset is not None:
            answered = eval_dataset if run.eval_prompts is None else eval_dataset.take(run.eval_prompts)
            evaluator = GenerationEvaluator(
                answered, tokenizer, scorers, num_completions=run.eval_completions,
                max_new_tokens=run.eval_new_tokens, seed=args.seed,
            )  # fmt: skip
            trainer.add_callback(GenerationCallback(trainer, {"": evaluator}, starts_as_reference=True))
    shown = list(eval_dataset.take(run.show_answers)) if eval_dataset is not None else []
    before = _answers(trainer, tokenizer, shown, run.answer_tokens)
    with as_user_error("the first step", known=lambda: trainer.state.global_step == 0):
        result = trainer.train(resume_from_checkpoint=checkpoint)
    again = "make room, and run the same command with `resume_from_checkpoint: true`"
    with explain_write_errors("the trained model", Path(args.output_dir), lambda: again):
        _save(trainer, result.metrics, data)
    after = _answers(trainer, tokenizer, shown, run.answer_tokens)
    if trainer.is_world_process_zero():
        answers = list(zip([row["prompt"] for row in shown], before, after, strict=True))
        print(summary(trainer.state.log_history, answers, _kept_step(trainer)))
        where = [f"The {'adapter' if hasattr(trainer.model, 'peft_config') else 'model'} is in {args.output_dir}"]
        title = run_title(model_args.model_name_or_path, args, trainer.state.log_history)
        if (figure := plot_curves(trainer.state.log_history, Path(args.output_dir) / "curves.png", title)) is not None:
            where.append(f"the plot is {figure}")
        print(f"{', '.join(where)}.")
        print(after_run(str(args.output_dir), tokenizer.chat_template is not None, args.trust_remote_code))
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    trainer.accelerator.wait_for_everyone()  # a process that leaves first makes gloo hang in the other's clean-up
    trainer.end()
    return 0


def set_threads(run: RunOptions) -> None:
    """The threads of a run on the CPU, as its options say."""
    if run.cpu_threads is not None:
        torch.set_num_threads(run.cpu_threads or os.cpu_count() or 1)


def _follow_launcher() -> None:
    """Where `accelerate launch` started this process, its end is a SIGTERM here: it passes on none (accelerate 1.15).

    Not elsewhere: a run of `nohup` outlives its shell.
    """
    if sys.platform == "linux" and "ACCELERATE_DYNAMO_MODE" in os.environ:
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG


def name_unread(given: set[str], *options: Any) -> None:
    """A line on the given options that this run doesn't read; those that NCAConfig has named itself are left out."""
    values = SimpleNamespace(**{name: value for own in options for name, value in vars(own).items()})
    args = next(own for own in options if isinstance(own, NCAConfig))
    notice = sentence(unread(values, given - changed_options(args), CONFIG_RULES) | unread(values, given, TRAIN_RULES))
    if notice is not None:
        notify_once(notice)


def _check(script: ScriptArguments, run: RunOptions, args: NCAConfig, model_args: ModelConfig) -> None:
    """What can't work, known before anything is read."""
    if Path(str(args.output_dir)).is_file():
        raise UserError(f"`output_dir` {args.output_dir} is a file; give a folder")
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not model_args.use_peft:
        raise UserError("`load_in_4bit` and `load_in_8bit` leave no weight that can be trained; add `use_peft: true`")
    if run.eval_prompts is not None and run.eval_prompts < 1:
        raise UserError(f"`eval_prompts` is {run.eval_prompts}, but must be at least 1; leave it out for all")
    if model_args.use_peft and model_args.lora_r < 1:
        raise UserError(f"`lora_r` is {model_args.lora_r}, but must be at least 1")
    if script.dataset_streaming and args.max_steps < 1:
        raise UserError("`dataset_streaming` is true, and a stream has no known end; set `max_steps`")
    if args.load_best_model_at_end and not _metric_is_known(args.metric_for_best_model or "loss", run):
        raise UserError(
            f"`metric_for_best_model` is {args.metric_for_best_model}, which no evaluation gives; use loss, or a "
            "metric of the log such as rewards/accuracies"
        )


def _evaluates(args: NCAConfig, data: RewardData, split: str) -> bool:
    """Whether held-out prompts are evaluated: where nothing was said of it, if there are any."""
    if args.eval_strategy is not None or args.eval_on_start:
        return evaluates(args)
    try:
        find_split(data.dataset, split)
    except UserError:
        return False
    return True


def _metric_is_known(name: str, run: RunOptions) -> bool:
    known = {"rewards", "logratios", "logps", "target", "kl", "loss"} | ({"generation"} if run.eval_scorer else set())
    return name.removeprefix("eval_").split("/")[0] in known


def _checkpoint(args: NCAConfig) -> str | bool | None:
    """What to go on from, for `NCATrainer.train`; an error where the output folder holds another run's checkpoints."""
    wanted = str(args.resume_from_checkpoint).lower()
    last = last_common_checkpoint(str(args.output_dir))
    if wanted in ("none", "false", "no", ""):
        if last is not None:
            raise UserError(
                f"`output_dir` {args.output_dir} holds checkpoints of an earlier run ({last.name}); set "
                "`resume_from_checkpoint: true` to go on from it, or choose another folder"
            )
        return None
    if wanted in ("true", "yes"):
        if last is None and args.process_index == 0:
            logger.warning(
                "`resume_from_checkpoint` is true, but %s holds no checkpoint: starting anew.", args.output_dir
            )
        return last is not None
    if not Path(str(args.resume_from_checkpoint)).is_dir():
        raise UserError(
            f"`resume_from_checkpoint` is {args.resume_from_checkpoint}, which is no folder; give a checkpoint, or "
            "`true`"
        )
    return args.resume_from_checkpoint


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
        peft_config = _peft_config(model_args)
        return {"model": source.path, "peft_config": peft_config, "quantization_config": quantization_config}
    own = adapter_config(source.adapter)
    if model_args.use_peft and model_args.lora_r != getattr(own, "r", model_args.lora_r):
        raise UserError(
            f"`lora_r` is {model_args.lora_r}, but `model_name_or_path` {source.adapter} is an adapter already, of "
            f"rank {own.r}, and is trained on as it is; give its rank, or merge it into its base first (`nca-align "
            "export`)"
        )
    args.model_init_kwargs = None  # the trainer is given an instance
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    return {"model": load_adapter(source.load(AutoModelForCausalLM, **options), source.adapter, is_trainable=True)}


def _peft_config(model_args: ModelConfig):
    config: Any = get_peft_config(model_args)
    modules = getattr(config, "target_modules", None)
    if isinstance(modules, str) and modules.isidentifier():  # TRL makes a list of one a pattern for whole names
        config.target_modules = {modules}
    return config


def _answers(trainer, tokenizer, rows: list[dict[str, Any]], max_new_tokens: int) -> list[str]:
    """Greedy answers of the model as it stands."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return ["(not generated under a sharded launch)"] * len(rows)
    model = trainer.accelerator.unwrap_model(trainer.model)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "use_cache": True}
    answers = []
    with eval_mode(model), decoding_precision(trainer.accelerator):
        for row in rows:
            ids = torch.tensor([prompt_ids(tokenizer, row)], device=trainer.accelerator.device)
            answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
            answers.append(tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def _kept_step(trainer) -> int | None:
    return trainer.state.best_global_step if trainer.args.load_best_model_at_end else None


def _save(trainer, metrics: dict[str, float], data: RewardData) -> None:
    """Weights, model card, `trainer_state.json`, metrics as JSON, and which rows were held out."""
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", metrics)
    if trainer.eval_dataset is not None:
        last = last_evaluation(trainer.state.log_history, _kept_step(trainer))
        if last is not None:
            trainer.save_metrics("eval", last)
    if trainer.is_world_process_zero():
        trainer.create_model_card()
        if data.validation_indices is not None:
            path = Path(trainer.args.output_dir) / "validation_indices.json"
            path.write_text(json.dumps(data.validation_indices))
