"""The rows of a comparison: those that its cells train on, those that choose, and those that are reported."""

import json
import logging
from typing import Any

from datasets import Dataset
from trl import ScriptArguments

from ...config import NCAConfig
from ...data import DataOptions, RewardData, read_reward_dataset
from ...data.splits import find_split, is_training, split_validation
from ...errors import UserError
from .grid import EvaluationSettings

logger = logging.getLogger("nca_align")


def read_splits(
    script: ScriptArguments, options: DataOptions, args: NCAConfig, evaluation: EvaluationSettings
) -> tuple[Dataset, dict[str, Dataset]]:
    """`three_splits` of the data that a cell's options name."""
    data = read_reward_dataset(
        str(script.dataset_name), name=script.dataset_config, num_proc=args.dataset_num_proc,
        train_split=script.dataset_train_split, options=options,
    )  # fmt: skip
    return three_splits(data, script.dataset_train_split, evaluation, options)


def three_splits(
    data: RewardData, train_name: str, evaluation: EvaluationSettings, options: Any
) -> tuple[Dataset, dict[str, Dataset]]:
    """The rows to train on, and those of `validation` and `test`.

    Where the data has one held-out split for both, it is the test's, and a share `validation_fraction` of the training
    prompts is held out for validation. A prompt of the test is left out of the others, and one of validation out of
    training, with a line in the log.

    Raises:
        UserError: a split that isn't there, or is also trained on; one of which nothing is left.
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
                f"{options.validation_fraction} holds out no prompt of {seen!r}. Make it larger, or name two splits."
            )
    taken: set[str] = set()
    rows["test"] = _without(rows["test"], taken, "test")
    rows["validation"] = _without(rows["validation"], taken, "validation")
    train = _without(train, taken, "training")
    if evaluation.prompts is not None:
        rows = {name: split.select(range(min(evaluation.prompts, len(split)))) for name, split in rows.items()}
    return train, rows


def _without(split: Dataset, seen: set[str], name: str) -> Dataset:
    """The rows whose prompt isn't in `seen`, to which their prompts are added."""
    prompts = [json.dumps(prompt) for prompt in split["prompt"]]
    kept = [i for i, prompt in enumerate(prompts) if prompt not in seen]
    if not kept:
        raise UserError(f"every prompt of the {name} split is also in a held-out split; give it prompts of its own")
    if len(kept) < len(split):
        count = len(split) - len(kept)
        logger.warning("%d of %d %s prompts are left out: a held-out split has them too.", count, len(split), name)
    seen.update(prompts)
    return split.select(kept)
