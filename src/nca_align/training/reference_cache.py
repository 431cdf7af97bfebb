"""Reference log-probabilities computed once and kept on the disk, in shards, so that a killed run goes on.

Their key is of all that changes them: `NCATrainer._precompute_ref_logps` gives the hash of the weights, the precision
and the dtype, and `add_reference_logps` adds that of the token ids. The folder is `nca_align_reference/KEY` in the
cache of `datasets`.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from datasets import Dataset
from torch import Tensor

from .. import progress
from ..batching.collator import Batch, RewardCollator, batches_by_length
from ..errors import notify
from ..store.checkpoints import explain_write_errors
from ..store.files import replacing
from ..store.fingerprints import columns_fingerprint, derived_fingerprint

ROWS_PER_SHARD = 512
# The ids of all rows, and so the template, the truncation and the completions behind them; and which the model wrote
TOKENS = ("prompt_ids", "completion_ids", "completion_mask")
# A half-written shard this old, in seconds, is a killed run's: writing one takes no time
_STALE = 3600


class ReferenceCache:
    """The reference log-probabilities of one data set under one reference, in shards of `ROWS_PER_SHARD` rows.

    Args:
        key: whatever changes them (weights, token ids, precision), joined into the folder's name.
        num_rows: rows of the data set.
    """

    def __init__(self, key: tuple[str, ...], num_rows: int):
        digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:32]
        self.folder = Path(datasets.config.HF_DATASETS_CACHE) / "nca_align_reference" / digest
        self.num_rows = num_rows

    def shards(self) -> Iterator[tuple[int, int, Path]]:
        """(first row, row after the last, file) of each shard."""
        for start in range(0, self.num_rows, ROWS_PER_SHARD):
            yield start, min(start + ROWS_PER_SHARD, self.num_rows), self.folder / f"{start:09d}.parquet"

    def missing(self) -> list[tuple[int, int, Path]]:
        """The shards that are still to be computed, with those that a crash of the machine left unreadable."""
        return [shard for shard in self.shards() if not _is_whole(*shard)]

    def write(self, file: Path, logps: list[list[float]]) -> None:
        """Write one shard so that a run killed meanwhile leaves no half of it, nor a machine that goes down.

        Raises:
            UserError: the disk is full, or the folder can't be written.
        """
        partial = file.with_suffix(f".{os.getpid()}.partial")  # another run may be writing the same shard
        advice = (
            "make room, or set HF_DATASETS_CACHE to another disk; the same command goes on from the rows done so far"
        )
        with explain_write_errors("the cache of reference log-probabilities", self.folder, lambda: advice):
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob("*.partial"):
                if left.stat().st_mtime < time.time() - _STALE:
                    left.unlink(missing_ok=True)
            with replacing(file, "wb", temporary=partial) as opened:
                pq.write_table(pa.table({"ref_logps": pa.array(logps, pa.list_(pa.float64()))}), opened)

    def read(self) -> list[list[float]]:
        """(rows) lists of K log-probabilities, nats."""
        return [row for *_, file in self.shards() for row in pq.read_table(file)["ref_logps"].to_pylist()]


def _is_whole(start: int, end: int, file: Path) -> bool:
    try:
        return pq.read_metadata(file).num_rows == end - start
    except FileNotFoundError:
        return False
    except (OSError, ValueError):  # Arrow's own errors are the latter
        notify(f"{file} can't be read: its rows' reference log-probabilities are computed anew.")
        return False


def add_reference_logps(
    dataset: Dataset,
    key: tuple[str, ...],
    compute: Callable[[Batch], Tensor],
    collator: RewardCollator,
    batch_size: int,
    accelerator: Accelerator,
    name: str,
) -> Dataset:
    """`dataset` with a column `ref_logps` (lists of K, nats), from the cache as far as it goes, else computed into it.

    Args:
        dataset: tokenised rows.
        key: what changes the log-probabilities beside the rows' tokens.
        compute: a batch to its (B, K) reference log-probabilities.
        collator: of training; since no activations are kept, four times as many tokens go into a forward.
        batch_size: prompts in a batch.
        name: of the data set, for the progress bar.
    """
    per_forward = collator.tokens_per_forward
    collator = replace(collator, tokens_per_forward=per_forward and 4 * per_forward)
    whole_key = [(*key, columns_fingerprint(dataset, TOKENS))]
    broadcast_object_list(whole_key, from_process=0)  # a sharded model hashes differently on each process
    cache = ReferenceCache(whole_key[0], len(dataset))
    missing = [cache.missing() if accelerator.is_main_process else []]
    broadcast_object_list(missing, from_process=0)
    if missing[0]:
        done = len(dataset) - sum(end - start for start, end, _ in missing[0])
        with progress.bar(
            len(dataset), "row", accelerator.is_main_process, initial=done, desc=f"Reference log-probabilities, {name}"
        ) as bar:
            for start, end, file in missing[0]:
                shard = dataset.select(range(start, end))
                logps = _shard_logps(shard, compute, collator, batch_size, accelerator, bar.update)
                if accelerator.is_main_process:
                    cache.write(file, logps)
    column = [cache.read() if accelerator.is_main_process else None]
    broadcast_object_list(column, from_process=0)
    fingerprint = derived_fingerprint("ref_logps", dataset, whole_key[0])
    return dataset.add_column("ref_logps", column[0], new_fingerprint=fingerprint)


def _shard_logps(
    shard: Dataset,
    compute: Callable[[Batch], Tensor],
    collator: RewardCollator,
    batch_size: int,
    accelerator: Accelerator,
    progress: Callable[[int], Any],
) -> list[list[float]]:
    """Batches of like length, dealt to the processes in step: sharded models gather their weights in each forward."""
    lengths = [sum(map(len, completions)) for completions in shard["completion_ids"]]
    batches = batches_by_length(lengths, batch_size)
    logps: dict[int, list[float]] = {}
    for first in range(0, len(batches), accelerator.num_processes):
        # a process without a batch of its own repeats the last one
        indices = batches[min(first + accelerator.process_index, len(batches) - 1)]
        rows = [shard[i] for i in indices]
        values = compute(send_to_device(collator(rows), accelerator.device)).double().cpu()
        for i, row, row_logps in zip(indices, rows, values, strict=True):
            logps[i] = row_logps[: len(row["rewards"])].tolist()
        progress(sum(map(len, batches[first : first + accelerator.num_processes])))
    for part in gather_object([logps]):
        logps |= part
    return [logps[i] for i in range(len(shard))]
