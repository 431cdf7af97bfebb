"""One cell of a comparison, resumable at each evaluation: `python -m nca_align.commands.compare.cell FOLDER`."""

import json
import logging
import os
import shutil
import stat
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from transformers import Trainer, TrainerCallback

from ...batching.tokenization import rows_that_fit
from ...data.strategies import select_completions
from ...errors import UserError, as_user_error, cli_main
from ...evaluation.callbacks import GenerationCallback, RankingCallback, log_within_step
from ...evaluation.comparison_folder import CONFIG, DONE, SETTINGS
from ...evaluation.evaluator import GenerationEvaluator
from ...rewards.scorers import open_scorers
from ...store.checkpoints import whole_checkpoints
from ...store.files import read_json, write_json
from ...store.ownership import own_folder
from ...store.provenance import LIBRARIES, commit, versions
from ..train.command import set_threads
from ..train.policy import model_source, open_policy
from .grid import EvaluationSettings, cell_options
from .methods import build_trainer
from .splits import read_splits

logger = logging.getLogger("nca_align")

# What a checkpoint holds for going on, and a finished cell's model doesn't need
_STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")


@cli_main("cell")
def main(argv: list[str] | None = None) -> None:
    """Run the cell whose folder is the argument, from its last checkpoint if it has one."""
    (name,) = sys.argv[1:] if argv is None else argv
    folder = Path(name)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("nca_align").setLevel(logging.INFO)
    disable_progress_bars()
    with own_folder(folder):
        run_cell(folder)


def run_cell(folder: Path) -> None:
    """Train and evaluate what `settings.json` and `config.yaml` in `folder` say, and leave `done.json` there."""
    began, code = time.monotonic(), commit()
    about = read_json(folder / SETTINGS)
    settings, evaluation = about["settings"], EvaluationSettings(**about["evaluation"])
    script, data_options, run, args, model_args = cell_options(folder / CONFIG)
    set_threads(run)
    keep_checkpoints = args.save_total_limit is not None
    args.save_total_limit = args.save_total_limit or 1
    source = model_source(model_args, args)
    tokenizer = source.load_tokenizer()
    train, held_out = read_splits(script, data_options, args, evaluation)
    train = rows_that_fit(train, tokenizer, args)
    if (count := settings["num_completions"]) is not None:
        before, train = len(train), select_completions(train, f"first_{count}")
        if len(train) < before:
            logger.warning(
                "%d of %d training prompts have fewer than %d completions and are left out of this cell: its epoch is "
                "shorter than that of a cell with fewer completions", before - len(train), before, count,
            )  # fmt: skip
    scorers = open_scorers(  # before the model, which takes longer
        evaluation.scorer, evaluation.scorer_weights or None, trust_remote_code=args.trust_remote_code
    )
    with as_user_error("setting up the training"):
        trainer = build_trainer(
            settings["method"], strategy=settings["strategy"], args=args, train_dataset=train, tokenizer=tokenizer,
            **open_policy(source, model_args, args),
        )  # fmt: skip
    last_step = trainer.args.max_steps
    # reward bends with the KL, most at a run's beginning: halves of halves, so that the curve is known there too
    steps = [0, *sorted({max(1, round(last_step / 2**i)) for i in range(evaluation.steps)})]
    # and the losses' own training prompts, as many as validation's: what becomes of the completions that they see
    seen = train.select(range(min(len(train), len(held_out["validation"]))))
    reference_key = json.dumps(about["identity"]["model"]), repr(model_args), f"bf16 {args.bf16}, fp16 {args.fp16}"
    for split, rows in {"train": seen, **held_out}.items():
        when = steps
        if split == "validation" and evaluation.validation_steps is not None:
            when = steps[max(0, len(steps) - evaluation.validation_steps) :]
        if not when:
            continue
        ranked = rows_that_fit(rows, tokenizer, args, split)
        if evaluation.ranked != "rewards":
            ranked = select_completions(ranked, evaluation.ranked)
        ranking = RankingCallback(
            trainer, {split: ranked}, tokenizer, alpha=args.alpha, beta=args.beta,
            steps=when, max_length=args.max_length, batch_size=evaluation.batch_size, starts_as_reference=True,
            reference_key=reference_key,
        )  # fmt: skip
        trainer.add_callback(ranking)
        if split in held_out:
            evaluator = GenerationEvaluator(
                rows, tokenizer, scorers, num_completions=evaluation.num_completions,
                reference_completions=evaluation.reference_completions,
                max_new_tokens=evaluation.max_new_tokens, seed=evaluation.seed + settings["seed"],
                batch_size=evaluation.batch_size,
            )  # fmt: skip
            trainer.add_callback(GenerationCallback(trainer, {split: evaluator}, when, starts_as_reference=True))
    trainer.add_callback(_Keep(trainer, steps, began))
    saved = whole_checkpoints(folder)
    if last_step not in saved:  # else it was stopped after its last step: transformers would add one
        trainer.train(resume_from_checkpoint=str(saved[max(saved)]) if saved else None)
        saved = whole_checkpoints(folder)
    if last_step not in saved:
        raise UserError(f"training ended before its last step, {last_step}; see the log above for the reason")
    _finish(folder, saved[last_step], about | {"commit": code}, keep_checkpoints)


class _Keep(TrainerCallback):
    """After the evaluations of a step: logs the cell's minutes until then, over all its starts, and saves."""

    def __init__(self, trainer: Trainer, steps: Sequence[int], began: float):
        self._trainer, self._steps, self._began = trainer, steps, began
        self._earlier = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._earlier = max((line["minutes"] for line in state.log_history if "minutes" in line), default=0.0)
        if state.global_step == 0:
            self._log()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self._steps:
            self._log()
            control.should_save = True

    def _log(self) -> None:
        minutes = self._earlier + (time.monotonic() - self._began) / 60
        log_within_step(self._trainer, {"minutes": round(minutes, 3)})


def _finish(folder: Path, checkpoint: Path, about: dict[str, Any], keep_checkpoints: bool) -> None:
    """The log, `cell.json`, `done.json`; then the last checkpoint becomes `model`, less what only training needs."""
    shutil.copyfile(checkpoint / "trainer_state.json", folder / "trainer_state.json")
    state = read_json(folder / "trainer_state.json")
    minutes = max(line["minutes"] for line in state["log_history"] if "minutes" in line)
    made = {"minutes": minutes, "versions": versions(*LIBRARIES)}
    write_json(folder / "cell.json", {name: about[name] for name in ("settings", "commit")} | made)
    write_json(folder / DONE, {"steps": state["global_step"], "minutes": minutes})
    if not keep_checkpoints:
        for name in _STATE:
            (checkpoint / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "model", ignore_errors=True)
        checkpoint.rename(folder / "model")
        for other in folder.glob("checkpoint-*"):
            shutil.rmtree(other, ignore_errors=True)


def end_with_parent() -> None:
    """End this process at once when the one that started it ends, whichever way: its end of our input closes then."""

    def wait() -> None:
        os.read(0, 1)
        os._exit(1)

    if stat.S_ISFIFO(os.fstat(0).st_mode):  # started by `nca-align compare`, and not by hand
        threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main())
