"""One cell of a comparison, a process of its own: `python -m nca_align.cell FOLDER`, resumable at each evaluation."""

import json
import logging
import os
import shutil
import stat
import sys
import threading
import time
from pathlib import Path
from typing import Any

from datasets import Dataset, disable_progress_bars
from transformers import Trainer, TrainerCallback

from .callbacks import GenerationCallback, RankingCallback, log_within_step
from .checkpoints import last_common_checkpoint, write_json
from .data import RewardData, read_reward_dataset
from .data.splits import find_split, is_training, split_validation
from .data.strategies import select_completions
from .errors import UserError, command, refused_by
from .generation import GenerationEvaluator
from .grid import Evaluation, cell_options
from .locking import alone_at
from .methods import build_trainer
from .provenance import versions
from .smollm2 import resolve_model
from .train import open_policy, open_tokenizer, set_threads

# What a checkpoint holds for going on, and a finished cell's model doesn't need
_STATE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")


@command("cell")
def main(argv: list[str] | None = None) -> None:
    """Run the cell whose folder is the argument, from its last checkpoint if it has one."""
    (name,) = sys.argv[1:] if argv is None else argv
    folder = Path(name)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("nca_align").setLevel(logging.INFO)
    disable_progress_bars()
    with alone_at(folder / "cell"):
        run_cell(folder)


def run_cell(folder: Path) -> None:
    """Train and evaluate what `settings.json` and `config.yaml` in `folder` say, and leave `done.json` there."""
    began = time.monotonic()
    about = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    settings, evaluation = about["settings"], Evaluation(**about["evaluation"])
    script, data_options, run, args, model_args = cell_options(folder / "config.yaml")
    set_threads(run)
    keep_checkpoints = args.save_total_limit is not None
    args.save_total_limit = args.save_total_limit or 1
    name = resolve_model(str(model_args.model_name_or_path))
    tokenizer = open_tokenizer(name, model_args.model_revision, args.trust_remote_code)
    data = read_reward_dataset(
        str(script.dataset_name), name=script.dataset_config, num_proc=args.dataset_num_proc, options=data_options
    )
    train, held_out = three_splits(data, script.dataset_train_split, evaluation, data_options)
    if settings["num_completions"] is not None:
        train = select_completions(train, f"first_{settings['num_completions']}")
    with refused_by("setting up the training"):
        model, peft_config, quantization_config = open_policy(name, model_args, args)
        trainer = build_trainer(
            settings["method"], model, args, train, tokenizer, strategy=settings["strategy"], peft_config=peft_config,
            quantization_config=quantization_config,
        )  # fmt: skip
    last_step = trainer.args.max_steps
    # reward bends with the KL, most at a run's beginning: halves of halves, so that the curve is known there too
    steps = {0, *(max(1, round(last_step / 2**i)) for i in range(evaluation.steps))}
    evaluators = {
        split: GenerationEvaluator(
            rows, tokenizer, evaluation.scorer, scorer_weights=evaluation.scorer_weights or None,
            num_completions=evaluation.num_completions, max_new_tokens=evaluation.max_new_tokens, seed=evaluation.seed,
            batch_size=evaluation.batch_size,
        )
        for split, rows in held_out.items()
    }  # fmt: skip
    ranking = RankingCallback(
        trainer, held_out, tokenizer, alpha=args.alpha, beta=args.beta, steps=steps, max_length=args.max_length,
        batch_size=evaluation.batch_size,
    )  # fmt: skip
    for callback in (ranking, GenerationCallback(trainer, evaluators, steps), _Keep(trainer, steps, began)):
        trainer.add_callback(callback)
    last = last_common_checkpoint(folder)
    if last is None or _step(last) < last_step:  # else it was stopped after its last step: transformers would add one
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        last = last_common_checkpoint(folder)
    if last is None or _step(last) != last_step:
        raise UserError(f"training ended before its last step, {last_step}; see the log above for what stopped it")
    _finish(folder, last, about, keep_checkpoints)


class _Keep(TrainerCallback):
    """After the evaluations of a step: logs the cell's minutes until then, over all its starts, and saves."""

    def __init__(self, trainer: Trainer, steps: set[int], began: float):
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


def three_splits(
    data: RewardData, train_name: str, evaluation: Evaluation, options: Any
) -> tuple[Dataset, dict[str, Dataset]]:
    """The rows to train on, and those of `validation` and `test`.

    Where the data has one held-out split for both, it is the test's, and a share `validation_fraction` of the training
    prompts is held out for validation.

    Raises:
        UserError: a split that isn't there, or is also trained on.
    """
    splits: Any = data.dataset
    names = {name: find_split(splits, getattr(evaluation, name)) for name in ("validation", "test")}
    seen = find_split(splits, train_name)
    train = splits[seen]
    rows = {name: splits[split] for name, split in names.items()}
    for name, split in names.items():
        if split == seen or is_training(split):
            raise UserError(f"`{name}` of `evaluation` is {split!r}, which is trained on; name a held-out split")
    if names["validation"] == names["test"]:
        train, rows["validation"], _ = split_validation(train, options.validation_fraction, options.validation_seed)
        if rows["validation"] is None:
            raise UserError(
                f"`validation` and `test` of `evaluation` are both {names['test']!r}, and `validation_fraction` "
                f"{options.validation_fraction} holds out no prompt of {seen!r}; make it larger, or name two splits"
            )
    if evaluation.prompts is not None:
        rows = {name: split.select(range(min(evaluation.prompts, len(split)))) for name, split in rows.items()}
    return train, rows


def _finish(folder: Path, checkpoint: Path, about: dict[str, Any], keep_checkpoints: bool) -> None:
    """The log, `cell.json`, `done.json`; then the last checkpoint becomes `model`, less what only training needs."""
    shutil.copyfile(checkpoint / "trainer_state.json", folder / "trainer_state.json")
    log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    minutes = max(line["minutes"] for line in log if "minutes" in line)
    found = versions("torch", "transformers", "trl", "peft", "datasets", "accelerate")
    write_json(folder / "cell.json", {"settings": about["settings"], "minutes": minutes, "versions": found})
    write_json(folder / "done.json", {"steps": _step(checkpoint), "minutes": minutes})
    if not keep_checkpoints:
        for name in _STATE:
            (checkpoint / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "model", ignore_errors=True)
        checkpoint.rename(folder / "model")
        for other in folder.glob("checkpoint-*"):
            shutil.rmtree(other, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


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
