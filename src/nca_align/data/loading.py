"""Data sets by name: the Hub, files, folders."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Json

from ..errors import InvalidRowError, UserError, notify_once
from .cleaning import without_nulls
from .conversion import convert_dataset
from .options import DataOptions
from .schema import DataReport
from .several_rewards import of_split, scale_over_split
from .source import open_dataset
from .splits import find_split, is_held_out, is_training, select_split, split_validation, training_split

logger = logging.getLogger("nca_align")

VALIDATION = "validation"


@dataclass(frozen=True)
class RewardData:
    """A data set that was read, with what is to be saved beside a run.

    Args:
        dataset: the splits, each with rows `prompt, completions, rewards` and kept columns.
        reports: by split, what was dropped and left out; empty for streams.
        validation_indices: the rows of the converted training split, from 0, that were held out as `validation`; None
            where the data has a held-out split of its own, or none was cut.
    """

    dataset: DatasetDict | IterableDatasetDict
    reports: dict[str, DataReport] = field(default_factory=dict)
    validation_indices: list[int] | None = None

    @contextmanager
    def naming_source_rows(self) -> Iterator[None]:
        """Around what refuses rows of the splits, as `train` and `eval`: their numbers before any were held out, too.

        Raises:
            InvalidRowError: what was raised, with that number.
        """
        try:
            yield
        except InvalidRowError as error:
            if error.place is None or self.validation_indices is None:
                raise
            split, row = error.place
            if split != "train":
                source = self.validation_indices[row]
            else:
                source = row
                for held_out in self.validation_indices:
                    source += held_out <= source
            text = f"{error} (row {source} of the data before rows were held out)"
            raise InvalidRowError(text, cause=error.cause, place=error.place) from error


def load_reward_dataset(
    path: str, *, split: str | None = None, **arguments: Any
) -> DatasetDict | IterableDatasetDict | Dataset | IterableDataset:
    """A data set in any known format, as validated rows `prompt, completions, rewards`.

    Where the data has a training split alone, `validation_fraction` of its prompts become a split `validation`;
    `read_reward_dataset` tells which, and what was dropped.

    Args:
        path, split, **arguments: of `read_reward_dataset`.

    Returns:
        A `DatasetDict` with the data's own names of splits, or the one of `split` (their iterable kinds when
        streaming).

    Raises:
        ValueError, OSError: as `read_reward_dataset` does.

    Example:
        >>> load_reward_dataset("rows.jsonl", split="train", validation_fraction=0).column_names
        ['prompt', 'completions', 'rewards']
    """
    read = read_reward_dataset(path, split=split, **arguments)
    if read.validation_indices is not None:  # a command tells it in its own words
        notify_once(
            f"`{path}` has a training split alone: {len(read.validation_indices)} of its rows are held out as "
            f"`{VALIDATION}`. `validation_fraction=0` keeps all for training."
        )
    return read.dataset if split is None else next(iter(read.dataset.values()))


def read_reward_dataset(
    path: str,
    *,
    split: str | None = None,
    name: str | None = None,
    streaming: bool = False,
    num_proc: int | None = None,
    train_split: str | None = None,
    options: DataOptions | None = None,
    **fields: Any,
) -> RewardData:
    """The data of `load_reward_dataset` with its reports and the held-out rows.

    Args:
        path: a Hub id, a JSON, JSONL, Parquet, Arrow or CSV file, a pattern for such files (`shards/part-*.parquet`), a
            folder of them, or a folder that `save_to_disk` wrote.
        split: the one split to read; None reads all. `train` also finds `train_prefs`, `test` or `validation` the
            data's only held-out split.
        name: the configuration of a Hub data set that has several.
        streaming: read lazily, for data that is larger than the disk; nothing is held out then.
        num_proc: processes to convert with.
        train_split: the split to train on, by whose spread `scale_rewards: batch` scales all splits; None takes `train`
            or `train_prefs`, or the only split.
        options: see `DataOptions`; a command's own fields beside them don't count.
        **fields: fields of `DataOptions`, which override `options`.

    Raises:
        FileNotFoundError: no such file.
        ConnectionError: a Hub data set that can't be had.
        ValueError: an unreadable file, an unknown format or split, an invalid row (named from 0, with its field), or
            scaling over a training split that nothing names.
        NotImplementedError: a stream of flat rows.
    """
    options = replace(options or DataOptions(), **fields).of_data()
    source, unreadable = open_dataset(str(path), name, streaming, options.on_invalid == "drop")
    wanted = _wanted(source)
    # Held out is a part of the training split where the data has no other split.
    cut = len(wanted) == 1 and is_training(wanted[0]) and not streaming and options.validation_fraction > 0
    if split is not None:
        split = find_split([*source, VALIDATION] if cut else source, split)
        if not cut or split not in (*wanted, VALIDATION):
            wanted, cut = [split], False

    splits: dict[str, Any] = {}
    reports, indices = {}, None
    # All splits are scaled by the training split's spread, so that α is in one unit; it is read for that.
    by = _scaling_split(path, _wanted(source), split, train_split) if of_split(options) and not streaming else None
    for split_name in dict.fromkeys([*wanted, *([by] if by else [])]):
        splits[split_name], report = convert_dataset(
            source[split_name], options, name=split_name, num_proc=num_proc, source=str(path)
        )
        if report is not None:
            reports[split_name] = report
            if unreadable:  # of files that are one split
                dropped = report.dropped | {"unreadable line": unreadable}
                reports[split_name] = replace(report, rows=report.rows + unreadable, dropped=dropped)
    training_rows = splits[by] if by else None
    for split_name in wanted:
        rows = scale_over_split(splits[split_name], options, num_proc, training_rows)
        if isinstance(arguments := options.chat_template_kwargs, dict) and arguments:
            rows = with_template_arguments(rows, arguments)
        splits[split_name] = rows
    splits, reports = ({name: own[name] for name in wanted if name in own} for own in (splits, reports))
    if cut:
        (training,) = wanted
        train, validation, held_out = split_validation(
            splits[training], options.validation_fraction, options.validation_seed
        )
        if validation is None:
            logger.info("`%s` has too few prompts to hold out %g of them", training, options.validation_fraction)
        else:
            splits, indices = {training: train, VALIDATION: validation}, held_out
            logger.info("held out %d of %d rows as `validation`", len(held_out), reports[training].kept)
    if split is not None:
        splits = {split: select_split(splits, split)}
    return RewardData((IterableDatasetDict if streaming else DatasetDict)(splits), reports, indices)


def _scaling_split(path: str, names: list[str], split: str | None, train_split: str | None) -> str:
    """The split whose spread scales rewards, with a notice where it may not be the one that is meant.

    Raises:
        UserError: it can't be known.
    """
    by = training_split(names, train_split)
    if by is None:
        raise UserError(
            f"`{path}` has the splits {', '.join(names)}, and none is called train. But `scale_rewards: batch` and "
            "`normalize_then_sum` scale by the spread of the split that is trained on. Name it by `train_split` (in "
            "commands, `dataset_train_split`). Where nothing is trained, leave scaling out."
        )
    if train_split is None and split not in (None, by, VALIDATION) and not is_held_out(str(split)):
        notify_once(
            f"`{split}` of `{path}` is scaled by the spread of `{by}`. Where `{split}` is trained on, give "
            f"`train_split='{split}'`."
        )
    return by


def with_template_arguments(dataset: Dataset | IterableDataset, arguments: dict[str, Any]) -> Any:
    """`dataset` with `arguments` in each row's `chat_template_kwargs`, of which what a row says itself comes first."""
    features = dataset.features and Features({**dataset.features, "chat_template_kwargs": Json()})
    function = partial(_fill_template_arguments, arguments=arguments)
    return dataset.map(function, batched=True, features=features)


def _fill_template_arguments(batch: dict[str, list], arguments: dict[str, Any]) -> dict[str, list]:
    own = batch.get("chat_template_kwargs") or [None] * len(batch["prompt"])
    return {"chat_template_kwargs": [arguments | without_nulls(row or {}) for row in own]}


def _wanted(source: dict[str, Any]) -> list[str]:
    """All splits but the `_sft` and `_gen` ones that zephyr's data sets have beside those of preferences."""
    preferences = any(name.endswith("_prefs") for name in source)
    return [name for name in source if not (preferences and name.endswith(("_sft", "_gen")))]
