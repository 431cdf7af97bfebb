"""`nca-align train` and `scripts/train.py`: options → data → NCATrainer → a run folder, and in words what moved."""

import json
import logging
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import ModelConfig, ScriptArguments

from ...batching.rendering import prompt_ids
from ...config import NCAConfig
from ...data import DataOptions, RewardData, read_reward_dataset, select_split
from ...data.messages import content_kind
from ...errors import UserError, as_user_error, cli_main, notify
from ...evaluation.training_log import last_evaluation
from ...models.policy import eval_mode
from ...models.sampling import decoding_precision
from ...options import given_options, says_true
from ...progress import LineHandler
from ...store.checkpoints import explain_write_errors
from ...store.ownership import own_folder
from ...training.stopping import StopSignals, follow_launcher, what_is_left
from .after_run import after_run
from .checks import (
    check_options,
    checkpoint_to_go_on_from,
    evaluates_held_out,
    how_to_evaluate,
    name_unevaluated,
    name_unread,
)
from .curves import plot_curves, run_title
from .dry_run import dry_run
from .options import FIRST_OPTIONS, REQUIRED, RunOptions, parse_train
from .policy import model_source, open_policy
from .summary import summary

logger = logging.getLogger("nca_align")


@cli_main("nca-align train", goes_on="nothing was begun")
def main(argv: list[str] | None = None) -> int:
    """Train as the options say; 0, or 2 after a user's mistake, told in one sentence."""
    argv = sys.argv[1:] if argv is None else argv
    what = "Align a language model on K rewarded completions per prompt."
    if says_true(argv, "dry_run"):
        return dry_run(argv)
    options = parse_train(argv, "nca-align train", what, first=FIRST_OPTIONS, required=REQUIRED)
    script, _, run, args, model_args = options
    if run.dry_run:  # a plan never trains, whatever the line above has read
        raise UserError(
            f"`dry_run` is {run.dry_run}, but no plan was begun. Nothing is trained: give `--dry_run` first."
        )
    began = time.time()
    follow_launcher()
    if args.process_index == 0:
        logging.basicConfig(handlers=[LineHandler()])
        logger.setLevel(logging.INFO)
    given = given_options(argv, false=True)
    try:
        set_threads(run)
        name_unread(given, *options)
        check_options(script, run, args, model_args)
        with own_folder(Path(str(args.output_dir))) if args.process_index == 0 else nullcontext():
            return _train(given, *options)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(what_is_left(args, began)) from interrupt


def _train(
    given: set[str],
    script: ScriptArguments,
    data_options: DataOptions,
    run: RunOptions,
    args: NCAConfig,
    model_args: ModelConfig,
) -> int:
    """One run, from its data to its summary; `given` are the options that the user gave."""
    checkpoint = checkpoint_to_go_on_from(args)
    source = model_source(model_args, args)
    source.load_config()  # shows, before anything is read, whether the model can be had
    tokenizer = source.load_tokenizer()
    with args.main_process_first(desc="reading the data"):
        data = read_reward_dataset(
            str(script.dataset_name),
            name=script.dataset_config,
            streaming=script.dataset_streaming,
            num_proc=args.dataset_num_proc,
            train_split=script.dataset_train_split,
            options=data_options,
        )
    if "validation_fraction" in given and data_options.validation_fraction and data.validation_indices is None:
        notify("`validation_fraction` has no effect on this data: it has a held-out split, or is a stream.")
    evaluated = evaluates_held_out(args, data, script.dataset_test_split)
    if not evaluated and args.is_unsaid("eval_strategy"):
        name_unevaluated(given, script, run, args)
    to_evaluate = how_to_evaluate(data, script.dataset_test_split)
    if run.eval_scorer and not evaluated:
        raise UserError(f"`eval_scorer` is set, but nothing is evaluated; it needs {to_evaluate}")
    train_dataset = select_split(data.dataset, script.dataset_train_split)
    eval_dataset = select_split(data.dataset, script.dataset_test_split) if evaluated else None

    from ...evaluation.callbacks import GenerationCallback
    from ...evaluation.evaluator import GenerationEvaluator
    from ...rewards.scorers import open_scorers
    from ...trainer import NCATrainer  # late: what can be wrong above is said before seconds of imports

    with as_user_error("setting up the training"), data.naming_source_rows():
        # a scorer that can't be had is told before the model is read
        scorers = open_scorers(run.eval_scorer, trust_remote_code=args.trust_remote_code) if run.eval_scorer else None
        policy = open_policy(source, model_args, args)
        trainer = NCATrainer(
            args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=tokenizer, **policy
        )
        trainer.reward_options = data_options.combination
        evaluated_rows: Any = trainer.eval_dataset
        if isinstance(eval_dataset, Dataset) and len(evaluated_rows) < len(eval_dataset):  # some are no tokens
            eval_dataset = eval_dataset.select(evaluated_rows["row_number"])
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
        trainer.saves_on_interrupt = True
        result = trainer.train(resume_from_checkpoint=checkpoint)
    interrupts, output_dir = StopSignals(), Path(str(args.output_dir))
    then = "the run stops once its model is saved; press it again to stop at once"
    again = "make room, and run the same command with `resume_from_checkpoint: true`"
    with (
        interrupts.noted(signal.SIGINT, then=then),
        explain_write_errors("the trained model", output_dir, lambda: again),
    ):
        _save(trainer, result.metrics, data)
    if interrupts.asked:
        raise KeyboardInterrupt
    after = _answers(trainer, tokenizer, shown, run.answer_tokens)
    if trainer.is_world_process_zero():
        log = trainer.state.log_history
        asked = [row["prompt"] for row in shown]
        asked = [tokenizer.decode(own) if content_kind(own) == "token ids" else own for own in asked]
        answers = list(zip(asked, before, after, strict=True))
        print(summary(log, answers, _kept_step(trainer), to_evaluate))
        where = [f"The {'adapter' if hasattr(trainer.model, 'peft_config') else 'model'} is in {args.output_dir}"]
        title = run_title(model_args.model_name_or_path, args, log)
        if (figure := plot_curves(log, output_dir / "curves.png", title)) is not None:
            where.append(f"the plot is {figure}")
        print(f"{', '.join(where)}.")
        print(after_run(str(output_dir), tokenizer.chat_template is not None, args.trust_remote_code))
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    return 0


def set_threads(run: RunOptions) -> None:
    """The threads of a run on the CPU, as its options say."""
    if run.cpu_threads is not None:
        torch.set_num_threads(run.cpu_threads or os.cpu_count() or 1)


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
