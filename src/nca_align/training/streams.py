"""Batches of a stream, whose rows nobody can count beforehand: each row once, and as many batches on each process."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from ..batching.collator import Batch, RewardCollator


def stream_loader(
    stream: IterableDataset, collator: RewardCollator, batch_size: int, args: Any, accelerator: Accelerator
) -> Any:
    """A loader of this process's rows of a stream, of which none is repeated.

    accelerate's own deals shards that may hold unequal rows, or fills the last batch with the stream's first rows.

    Args:
        stream: of tokenised rows. Its shards are dealt whole where `deals_shards`; else each process reads all rows and
            takes its own, so that the rows of a step are those that one process takes.
        batch_size: rows of a batch on this process.
        args: with the options `dataloader_…`.
    """
    loader: Any = DataLoader(
        split_dataset_by_node(stream, accelerator.process_index, accelerator.num_processes),
        batch_size,
        collate_fn=collator,
        drop_last=args.dataloader_drop_last,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        in_order=args.dataloader_in_order,
    )
    return prepare_data_loader(
        loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )


def deals_shards(stream: IterableDataset, processes: int) -> bool:
    """Whether each process reads shards of its own (files, row groups of Parquet), as `datasets` decides."""
    return processes > 1 and stream.num_shards % processes == 0


def fill_window(batches: list[Batch], size: int, accelerator: Accelerator) -> list[Batch]:
    """`batches` and then as many of weight 0 as make `size`, where any process has one; all processes come here.

    Those of weight 0 change no loss, gradient or metric. They keep the processes in step where one has fewer rows, and
    close a step at the end of a pass, which transformers would leave open.

    Args:
        batches: at most `size`.
    """
    lengths = gather_object([len(batches)])
    if not any(lengths):
        return []
    spare: Any = batches[-1] if batches else None
    if not all(lengths):  # a process that has none takes another's
        lent = [send_to_device(spare, "cpu")]
        broadcast_object_list(lent, from_process=next(i for i, length in enumerate(lengths) if length))
        spare = spare or send_to_device(lent[0], accelerator.device)
    nothing = {name: value for name, value in spare.items() if name != "row_numbers"}
    nothing |= {"weights": spare["rewards"].new_zeros(len(spare["rewards"])), "num_tokens": 0}
    return batches + [nothing] * (size - len(batches))


def even_batches(batches: Iterable[Batch], accelerator: Accelerator) -> Iterator[Batch]:
    """`batches`, and then some of weight 0 as long as another process has any; all processes come here together."""
    rest = iter(batches)
    while window := fill_window(list(islice(rest, 1)), 1, accelerator):
        yield from window
