"""How an epoch's prompts are dealt to steps, where transformers and accelerate repeat some to even out the last one."""

from typing import Any

import torch
from accelerate.data_loader import SkipBatchSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler


def repeated_rows(sampler: BatchRebalanceSampler) -> set[int]:
    """The rows by which `batch_rebalance` fills an epoch's last step, where its prompts are fewer than its groups."""
    missing = sampler.dp_size * sampler.grad_accum - sampler.remainder
    if not sampler.has_tail or missing <= 0:
        return set()
    generator = torch.Generator().manual_seed(sampler.seed + sampler.epoch)
    order = torch.randperm(len(sampler.lengths), generator=generator).tolist()  # as the sampler draws it
    return {*order[:missing]} - {*order[-sampler.remainder :]}


def prepare_to_skip(batch_sampler: Any, rebalancer: Any) -> None:
    """Let accelerate's loader tell a `BatchRebalanceSampler` its epoch, when it skips to the middle of one.

    It does so along fixed paths of attributes, which on several processes end one level above: a second epoch that is
    resumed would have the first one's order.
    """
    if batch_sampler is not rebalancer:
        batch_sampler.sampler = rebalancer


def last_batch(loader: Any, drop_last: bool) -> tuple[int, int]:
    """(rows of the last global batch that are no repeats, or 0 where all of it are rows; rows of a global batch)."""
    sampler = loader.batch_sampler
    if not isinstance(sampler, SkipBatchSampler):
        return max(0, loader.remainder), loader.total_batch_size
    shard = sampler.batch_sampler  # the rest of a resumed epoch: accelerate knows neither there
    total = shard.batch_size * getattr(shard, "num_processes", 1)
    return 0 if drop_last else loader.total_dataset_length % total, total
