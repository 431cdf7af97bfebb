"""The processes of one launch by torchrun or `accelerate launch`, where a command deals its work out to all of them."""

import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from .errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Those that share one work.

    Args:
        index: this one's, from 0; the first speaks, and writes what is there once.
        count: of all.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def of_launch(cls) -> "Processes":
        """As the launcher says. Each takes a card: `LOCAL_RANK`, counted anew where there are fewer."""
        if launched() == 1:
            return cls()
        _group()
        return cls(int(os.environ["RANK"]), launched())

    @property
    def first(self) -> bool:
        """Whether this is the first one."""
        return self.index == 0

    def once(self, work: Callable[[], T]) -> T:
        """What `work` gives the first one, which alone calls it; all come here together, and wait for it."""
        if self.count == 1:
            return work()
        from torch.distributed import broadcast_object_list

        said = [work() if self.first else None]
        try:
            broadcast_object_list(said, src=0, group=_group())
        except RuntimeError:  # another process has gone, and has said why
            sys.exit(1)
        return said[0]  # type: ignore[return-value]

    def in_turn(self, work: Callable[[], T]) -> T:
        """`work` of each process, of the first one before all others: they find the caches that it fills."""
        own = work() if self.first else None
        self.once(lambda: None)
        return own if self.first else work()  # type: ignore[return-value]

    def wait(self) -> None:
        """Until all have come here."""
        if self.count == 1:
            return
        from torch.distributed import barrier

        try:
            barrier(_group())
        except RuntimeError:
            sys.exit(1)


ALONE = Processes()


def launched() -> int:
    """How many processes the launch has; it joins none."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def show_own_cards(each: int) -> None:
    """For an engine that starts processes of its own: of a launch they see `each` cards of this one's alone.

    Raises:
        UserError: this machine has too few.
    """
    if Processes.of_launch().count == 1:
        return
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    place = int(os.environ.get("LOCAL_RANK", 0))
    own = visible.split(",")[place * each : (place + 1) * each]
    if len(own) < each:
        raise UserError(
            f"process {place + 1} of this machine needs {each} cards of its own, and of {visible or 'none'} none is "
            "left; start fewer processes, or lower `tensor_parallel_size` in `engine_args`"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # else they wait for the launcher's store for ever


@functools.cache
def _group() -> Any:
    """A group over gloo, in which a process waits for the slowest, however long that takes; it joins the launch."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=365))
