"""The first rows of a data set, and how many it has, without reading it all or keeping anything on the disk."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, Json, load_dataset_builder

from .conversion import convert_dataset
from .files import kind_of, open_plain
from .loading import with_template_arguments
from .options import DataOptions
from .several_rewards import scale_over_split
from .source import open_dataset
from .splits import find_split, is_training


@dataclass(frozen=True)
class Sample:
    """Rows `prompt, completions, rewards` of a training split's beginning.

    Args:
        dataset: what is left of `read` rows.
        read: rows of the data that were read.
        rows: rows of the whole split; None where that isn't known.
        held_out: the share of prompts that a run holds out.
    """

    dataset: Dataset
    read: int
    rows: int | None
    held_out: float

    @property
    def is_whole(self) -> bool:
        return self.rows is not None and self.read >= self.rows

    @property
    def training_rows(self) -> int | None:
        """Rows of the training, as far as those that were read are like the others; None where it isn't known."""
        if self.rows is None:
            return None
        kept = len(self.dataset) * self.rows / self.read
        return max(1, round(kept) - int(self.held_out * round(kept)))


def read_sample(
    path: str, split: str, most: int, *, name: str | None = None, streaming: bool = False,
    options: DataOptions | None = None,
) -> Sample:  # fmt: skip
    """The rows that `read_reward_dataset` would make of the first `most` ones of `split`.

    Args:
        path, name, streaming, options: of `read_reward_dataset`.
        split: to train on.
        most: rows of the data.

    Raises:
        NotFoundError, HubError, UserError: as `read_reward_dataset` does, of these rows.
    """
    options = (options or DataOptions()).of_data()
    splits, _ = open_dataset(path, name, streaming=not _is_saved(path), drop=options.on_invalid == "drop")
    found = find_split(splits, split)
    source: Any = splits[found]
    rows = iter(source)
    first = list(islice(rows, most))
    features = source.features if isinstance(source, (Dataset, IterableDataset)) else None
    table = _table(first, features) if first else source
    dataset = scale_over_split(convert_dataset(table, options, name=found, source=path)[0], options)
    if isinstance(arguments := options.chat_template_kwargs, dict) and arguments:
        dataset = with_template_arguments(dataset, arguments)
    cut = len(splits) == 1 and is_training(found) and not streaming
    total = len(first) if len(first) < most else _count(path, name, found, source, first, rows)
    return Sample(dataset, len(first), total, options.validation_fraction if cut else 0.0)  # type: ignore[arg-type]


def _table(rows: list[dict[str, Any]], features: Features | None) -> Dataset:
    """Rows of a stream, whose types may not be known: a column that Arrow has no one type for is JSON."""
    if features is not None:
        return Dataset.from_list(rows, features=features)
    found = {}
    for column in dict.fromkeys(name for row in rows for name in row):
        try:
            own = Dataset.from_list([{column: row.get(column)} for row in rows], on_mixed_types="use_json")
            found[column] = own.features[column]
        except (pa.ArrowException, OverflowError):
            found[column] = Json()
    return Dataset.from_list([{column: row.get(column) for column in found} for row in rows], Features(found))


def _is_saved(path: str) -> bool:
    folder = Path(path).expanduser()
    return (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()


def _count(path: str, name: str | None, split: str, source: Any, first: list[Any], rest: Iterator[Any]) -> int | None:
    """Rows of a split: what the Hub says of it, by the files' own count, or by reading on; None where none tells."""
    if isinstance(source, Dataset):
        return len(source)
    local = Path(path).expanduser()
    if local.is_file():
        files = [str(local)]
    elif local.is_dir():
        found: Any = load_dataset_builder(str(local), name).config.data_files
        files = [str(file) for file in found[split]]
    elif path.count("/") <= 1 and not any(sign in path for sign in "*?["):
        info = load_dataset_builder(path, name).info.splits
        return info[split].num_examples if info and split in info else None
    else:
        return len(first) + sum(1 for _ in rest)
    if all(kind_of(file) == "parquet" for file in files):
        return sum(pq.ParquetFile(file).metadata.num_rows for file in files)
    if all(Path(file).suffix == ".jsonl" for file in files):
        return sum(map(_lines, files))
    return len(first) + sum(1 for _ in rest)


def _lines(file: str) -> int:
    with open_plain(file) as lines:
        return sum(1 for line in lines if line.strip())
