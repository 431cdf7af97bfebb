"""nca-align: align language models on K rewarded completions per prompt with InfoNCA and NCA.

Names are imported on first use, so that `import nca_align` costs nothing beside `import trl`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .config import NCAConfig
    from .data import load_reward_dataset
    from .data.strategies import to_preference_pairs, to_unpaired
    from .evaluation.callbacks import GenerationCallback, RankingCallback
    from .evaluation.evaluator import GenerationEvaluator
    from .losses import infonca_loss, nca_loss, reward_loss
    from .trainer import NCATrainer

_HOME = {
    "GenerationCallback": "evaluation.callbacks",
    "GenerationEvaluator": "evaluation.evaluator",
    "NCAConfig": "config",
    "NCATrainer": "trainer",
    "RankingCallback": "evaluation.callbacks",
    "infonca_loss": "losses",
    "load_reward_dataset": "data",
    "nca_loss": "losses",
    "reward_loss": "losses",
    "to_preference_pairs": "data.strategies",
    "to_unpaired": "data.strategies",
}
__all__ = [
    "GenerationCallback", "GenerationEvaluator", "NCAConfig", "NCATrainer", "RankingCallback", "infonca_loss",
    "load_reward_dataset", "nca_loss", "reward_loss", "to_preference_pairs", "to_unpaired",
]  # fmt: skip


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'nca_align' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
