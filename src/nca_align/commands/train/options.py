"""The options of `nca-align train`."""

from dataclasses import dataclass

from trl import ModelConfig, ScriptArguments

from ...config import NCAConfig
from ...data import DataOptions
from ...options import option


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
REQUIRED = {
    "dataset_name": "a Hub id, a file or a folder with rewarded completions",
    "model_name_or_path": "a Hub id or a folder with a language model",
}
