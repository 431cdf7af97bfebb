"""The order of an epoch's prompts, and weight 0 for those that are repeated to fill its last step."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import SkipBatchSampler
from torch import Tensor
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from ..batching.collator import Batch


def begin_epoch(loader: Any, seed: int, epoch: int) -> None:
    """Let the order of a training loader's rows depend on the seed and the epoch alone, also in a resumed epoch.

    accelerate passes the epoch on along fixed paths of attributes, which on several processes end one level above a
    `BatchRebalanceSampler`.
    """
    batches = _batch_sampler(loader)
    rows = getattr(batches, "sampler", None)
    if isinstance(batches, BatchRebalanceSampler):
        batches.seed = seed
        batches.set_epoch(epoch)
    elif isinstance(rows, LengthGroupedSampler):
        rows.generator = torch.Generator().manual_seed(seed + epoch)


def weighted_batches(loader: Iterator[Batch], size: int, accelerator: Accelerator, drop_last: bool) -> list[Batch]:
    """The micro-batches of a step, `size` or what an epoch has left, each with the weights of its prompts.

    Args:
        loader: of the epoch.
        drop_last: whether it leaves out a last batch that isn't full.
    """
    batches: list[Batch] = []
    for batch in islice(loader, size):
        batch["weights"] = last_batch_weights(batch, accelerator, drop_last)
        batches.append(batch)
    _zero_repeated_rows(batches, accelerator)
    return batches


def last_batch_weights(batch: Batch, accelerator: Accelerator, drop_last: bool) -> Tensor:
    """(B,) 1 for each prompt, and 0 for those that accelerate repeats to even out an epoch's last batch.

    Args:
        batch: the loader's latest; weights that it has already are kept.
        drop_last: whether the loader leaves out a last batch that isn't full.
    """
    if "weights" in batch:
        return batch["weights"]
    weights = torch.ones(len(batch["rewards"]), device=batch["rewards"].device)
    state = accelerator.gradient_state
    if state.end_of_dataloader and not isinstance(_batch_sampler(state.active_dataloader), BatchRebalanceSampler):
        remainder, total = _remainder(state.active_dataloader, drop_last)
        if remainder:
            real = remainder - accelerator.process_index * (total // accelerator.num_processes)
            weights[max(0, real) :] = 0
    return weights


def _zero_repeated_rows(batches: list[Batch], accelerator: Accelerator) -> None:
    """Weight 0 for the rows by which `batch_rebalance` fills an epoch's last step, whose batches these are."""
    state = accelerator.gradient_state
    sampler = _batch_sampler(state.active_dataloader) if state.end_of_dataloader else None
    if not isinstance(sampler, BatchRebalanceSampler):
        return
    repeated = _repeated_rows(sampler)
    for batch in batches:
        for i, row in enumerate(batch.get("row_numbers", [])):
            if row in repeated:
                batch["weights"][i] = 0


def _batch_sampler(loader: Any) -> Any:
    """What draws the batches, under what accelerate puts around it."""
    sampler = loader.batch_sampler
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    return sampler


def _repeated_rows(sampler: BatchRebalanceSampler) -> set[int]:
    """The rows that fill an epoch's last step, where its prompts are fewer than its groups."""
    missing = sampler.dp_size * sampler.grad_accum - sampler.remainder
    if not sampler.has_tail or missing <= 0:
        return set()
    generator = torch.Generator().manual_seed(sampler.seed + sampler.epoch)
    order = torch.randperm(len(sampler.lengths), generator=generator).tolist()  # as the sampler draws it
    return {*order[:missing]} - {*order[-sampler.remainder :]}


def _remainder(loader: Any, drop_last: bool) -> tuple[int, int]:
    """(rows of the last global batch that are no repeats, or 0 where all of it are rows; rows of a global batch)."""
    sampler = loader.batch_sampler
    if not isinstance(sampler, SkipBatchSampler):
        return max(0, loader.remainder), loader.total_batch_size
    shard = sampler.batch_sampler  # the rest of a resumed epoch: accelerate knows neither there
    total = shard.batch_size * getattr(shard, "num_processes", 1)
    return 0 if drop_last else loader.total_dataset_length % total, total
