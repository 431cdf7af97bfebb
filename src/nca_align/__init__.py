"""nca-align: align language models on K rewarded completions per prompt with InfoNCA and NCA.

Names are imported on first use, so that `import nca_align` costs nothing beside `import trl`.
"""

import logging
import warnings
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# bitsandbytes' notice of a kernel that a CPU does without would be the first line of every run
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "kernels-community" not in str(record.msg))
# PEFT asks transformers by a name that it has renamed
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

if TYPE_CHECKING:
    from .batching.collator import RewardCollator
    from .commands.report.command import write_report
    from .config import NCAConfig
    from .data import load_reward_dataset
    from .data.strategies import to_preference_pairs, to_unpaired
    from .evaluation.callbacks import GenerationCallback, RankingCallback
    from .evaluation.evaluator import GenerationEvaluator
    from .evaluation.frontier import curves_of, reward_at_kl
    from .evaluation.intervals import mean_and_interval
    from .evaluation.ladder import compare_at_kl, ladders_of
    from .losses import LOSSES, infonca_loss, nca_loss, outcome_loss, reward_loss
    from .reward_tensors import targets
    from .trainer import NCATrainer

_HOME = {
    "GenerationCallback": "evaluation.callbacks",
    "GenerationEvaluator": "evaluation.evaluator",
    "LOSSES": "losses",
    "NCAConfig": "config",
    "NCATrainer": "trainer",
    "RankingCallback": "evaluation.callbacks",
    "RewardCollator": "batching.collator",
    "compare_at_kl": "evaluation.ladder",
    "curves_of": "evaluation.frontier",
    "infonca_loss": "losses",
    "ladders_of": "evaluation.ladder",
    "load_reward_dataset": "data",
    "mean_and_interval": "evaluation.intervals",
    "nca_loss": "losses",
    "outcome_loss": "losses",
    "reward_at_kl": "evaluation.frontier",
    "reward_loss": "losses",
    "targets": "reward_tensors",
    "to_preference_pairs": "data.strategies",
    "to_unpaired": "data.strategies",
    "write_report": "commands.report.command",
}
__all__ = [
    "LOSSES", "GenerationCallback", "GenerationEvaluator", "NCAConfig", "NCATrainer", "RankingCallback",
    "RewardCollator", "compare_at_kl", "curves_of", "infonca_loss", "ladders_of", "load_reward_dataset",
    "mean_and_interval", "nca_loss", "outcome_loss", "reward_at_kl", "reward_loss", "targets", "to_preference_pairs",
    "to_unpaired", "write_report",
]  # fmt: skip


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'nca_align' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
