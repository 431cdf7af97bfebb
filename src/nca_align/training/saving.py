"""What stands in a folder after the trainer has saved a model there: all of it, readable, an adapter for its base."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ..models.plain_lora import is_subtracted, make_plain
from ..models.policy import base_model
from ..store.checkpoints import is_whole
from ..store.weights import read_back
from . import sharded


@contextmanager
def saving_model(trainer: Any, output_dir: str | None, internal: bool) -> Iterator[None]:
    """Around transformers' `save_model`, which writes nothing where FSDP saves a shard a process.

    There the model is gathered and written whole; a checkpoint gets its adapter alone, or what its shards are of.
    Outside checkpoints the weights are read back, and an adapter becomes one for the base as it is: a checkpoint keeps
    it as it is trained, for the run to go on from.

    Args:
        trainer: an NCATrainer.
        output_dir, internal: what `save_model` is called with.

    Raises:
        UserError: see `read_back`.
    """
    folder = output_dir or trainer.args.output_dir
    within_checkpoint = internal and output_dir is not None  # a push saves anew, in the run's folder
    model = trainer.accelerator.unwrap_model(trainer.model)
    finish = trainer.args.should_save and not within_checkpoint
    with read_back(folder) if finish else nullcontext():
        if sharded.saves_shards(trainer.accelerator):  # before `save_model`, which may push the folder
            if hasattr(model, "peft_config") or not within_checkpoint:
                trainer._save(folder, state_dict=sharded.whole_weights(trainer.model))
            elif trainer.args.should_save:
                sharded.describe(model, trainer.processing_class, folder)
        yield
    if finish and not getattr(base_model(model), "is_quantized", False):
        make_plain(folder)


def may_be_pushed(checkpoint: Path) -> bool:
    """Whether a checkpoint may go to the Hub: it is whole, and its adapter isn't one for another base than its own.

    transformers would send it before its manifest is written.
    """
    return is_whole(checkpoint) and not is_subtracted(checkpoint)
