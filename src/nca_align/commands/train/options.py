"""The options of `nca-align train`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl import ModelConfig, ScriptArguments

from ...config import NCAConfig
from ...data import DataOptions
from ...options import option, parse


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
    dry_run: bool = option(
        "Print layout, steps and memory by part, whether it fits and what to change if not; load no weights.", False
    )
    device_memory: str | None = option("Of a card that `dry_run` plans for, as in 24GB; by default the one here.", None)
    launch: str | None = option("accelerate's file that `dry_run` plans for; by default this process's launch.", None)
    devices: int | None = option("Cards that `dry_run` plans for, one a process; by default the launch's.", None)


# in this order, for a cell of `nca-align compare` too
TRAIN_OPTIONS = (ScriptArguments, DataOptions, RunOptions, NCAConfig, ModelConfig)
REQUIRED = {
    "dataset_name": "a Hub id, a file or a folder with rewarded completions",
    "model_name_or_path": "a Hub id or a folder with a language model",
}
# What `nca-align train --help` lists (`--help all` has all): an option → its line; the default is added
FIRST_OPTIONS = {
    "model_name_or_path": "The model to align: a Hub id, or a folder with a model or an adapter. Needed.",
    "dataset_name": "Prompts with rewarded completions: a Hub id, a file or a folder. Needed.",
    "output_dir": "The run's folder: checkpoints, the model, its log.",
    "loss_type": "`nca`, `infonca`, or another loss on K completions; a list of them with `loss_weights`.",
    "alpha": "Temperature of the targets softmax(rewards / alpha), in units of the rewards.",
    "beta": "Implicit reward per nat of log(pi / pi_ref); small lets the model go further.",
    "learning_rate": "Peak learning rate.",
    "num_train_epochs": "Times that the data is gone through.",
    "max_steps": "Steps at which the run ends, whatever the epochs; -1 for no limit.",
    "per_device_train_batch_size": "Prompts a forward and a device, each with all of its completions.",
    "gradient_accumulation_steps": "Such forwards a step.",
    "max_length": "Tokens of prompt and completion; completions are cut there.",
    "use_peft": "Train a LoRA adapter instead of the whole model; `--help lora` lists its options.",
    "lora_r": "The adapter's rank.",
    "dtype": "Of the model's weights; mixed precision comes by itself where an accelerator computes in bfloat16.",
    "eval_strategy": "When held-out prompts are evaluated; by default at the end, where rows are held out.",
    "save_steps": "Steps from one checkpoint to the next.",
    "dry_run": "Print steps and memory by part, and whether it fits; no weights are loaded.",
    "resume_from_checkpoint": "`true` goes on from the last checkpoint in `output_dir`.",
    "seed": "Of the order of the data, dropout and new weights.",
}


def parse_train(argv: Sequence[str] | None, prog: str, description: str = "", **more: Any) -> tuple:
    """`options.parse` of `TRAIN_OPTIONS`, where rows are read as the loss takes them: see `DataOptions.for_losses`."""
    script, data, run, args, model = parse(TRAIN_OPTIONS, argv, prog, description, **more)
    return script, data.for_losses(args.loss_type), run, args, model
