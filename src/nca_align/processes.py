"""The processes of one launch by torchrun or `accelerate launch`, where a command deals its work out to all of them."""

import functools
import gc
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from .errors import UserError

T = TypeVar("T")
# A machine is gone that answers none of 8 probes: seconds to the first, seconds between, how many
_PROBES = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 8} if sys.platform == "linux" else {}


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
        except RuntimeError:
            self._end()
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
            self._end()

    def _end(self) -> NoReturn:
        """Another process has gone, and has said why if it could."""
        print(f"rank {self.index} ends: another process of this launch has gone", file=sys.stderr, flush=True)
        sys.exit(1)


ALONE = Processes()


def launched() -> int:
    """How many processes the launch has; it joins none."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def leave_launch() -> None:
    """Wait for the other processes and end the connections to them: for the end of a command.

    A connection has threads, and they live as long as an object that knows it. A thread that outlives the interpreter
    can abort the process, and the launcher then calls the whole launch failed.
    """
    distributed = sys.modules.get("torch.distributed")
    if launched() == 1 or distributed is None:
        return
    if distributed.is_initialized():
        Processes.of_launch().wait()  # gloo hangs where one leaves first
        distributed.destroy_process_group()
    _group.cache_clear()
    gc.collect()  # a trainer and its model know each other


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
            f"process {place + 1} of this machine needs {each} cards of its own, but of {visible or 'none'} too few "
            "are left. Start fewer processes, or lower `tensor_parallel_size` in `engine_args`."
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # else they wait for the launcher's store for ever


@functools.cache
def _group() -> Any:
    """A group over gloo, in which a process waits for the slowest, however long that takes; it joins the launch."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())
    group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=365))
    _probe_machines()
    return group


def _probe_machines() -> None:
    """Let Linux ask whether the machines that this process is connected to are still there, and end what is not.

    gloo doesn't, and one that lost its power closes nothing. A process that is busy needs no answer: its machine gives
    it.
    """
    if sys.platform != "linux":
        return
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            peer = socket.socket(fileno=number)
        except OSError:  # no socket
            continue
        try:
            if peer.family in (socket.AF_INET, socket.AF_INET6) and peer.type == socket.SOCK_STREAM:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in _PROBES.items():
                    peer.setsockopt(socket.IPPROTO_TCP, option, value)
        finally:
            peer.detach()
