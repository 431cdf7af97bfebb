"""Any data set as rows `prompt, completions, rewards`: formats, loading, validation, and the held-out split."""

from .conversion import DataReport, convert_dataset, to_reward_dataset
from .loading import RewardData, load_reward_dataset, read_reward_dataset
from .options import DataOptions
from .splits import held_out_split, select_split, split_validation
from .validation import RowError, check_row

__all__ = [
    "DataOptions",
    "DataReport",
    "RewardData",
    "RowError",
    "check_row",
    "convert_dataset",
    "held_out_split",
    "load_reward_dataset",
    "read_reward_dataset",
    "select_split",
    "split_validation",
    "to_reward_dataset",
]
