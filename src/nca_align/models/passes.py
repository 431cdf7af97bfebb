"""The forwards of a batch's chunks in their order, with what pieces of one tree hand on to each other."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..batching.collator import Chunk, idle_chunk
from ..batching.kept_path import KeptPath
from ..batching.pieces import Operation, schedule
from ..batching.segments import Segments


class Pass(NamedTuple):
    """One forward, and the backward behind it.

    Args:
        number: of the chunk in its batch; None for one that only keeps sharded processes in step.
        chunk: what the model is given.
        trains: whether a backward follows; else the forward is to be without gradients.
        first: whether it is the first forward of this chunk.
        last: whether no other forward follows.
    """

    number: int | None
    chunk: Chunk
    trains: bool
    first: bool
    last: bool

    @property
    def _segments(self) -> Any:
        return self.chunk.get("segments")

    def root(self, loss: Tensor) -> Tensor:
        """What the backward is to start from: the chunk's loss, and what its readers left for it."""
        own = self._segments
        return own.kept.with_readers(loss, own.end) if own is not None and own.kept and own.read else loss

    def finish(self) -> None:
        """Keep what other chunks need of it."""
        own = self._segments
        if own is None:
            return
        if own.kept and self.trains:
            own.kept.keep_state_gradients(own.past)
        elif own.kept and own.read:
            own.kept.keep_states(own.end)
        own.forget()


def passes(chunks: Sequence[Chunk], scores_all: bool, trains: bool, in_step: bool = False) -> Iterator[Pass]:
    """The forwards of a batch, one at a time: what comes of one must be done before the next is asked for.

    Two forwards of one chunk draw the same random numbers, so that they have the same dropout.

    Args:
        chunks: on the model's device.
        scores_all, trains: see `batching.pieces.schedule`.
        in_step: whether all processes come to each forward together, since each gathers sharded weights.
    """
    segments: list[Segments | None] = [chunk.get("segments") for chunk in chunks]
    operations: list[Operation | bool] = [*schedule(segments, scores_all, trains)]
    if in_step:
        operations = _in_step(operations)
    device = chunks[0]["input_ids"].device
    kept = kept_path(chunks)
    times = Counter(operation.chunk for operation in operations if not isinstance(operation, bool))
    states: dict[int, list[Tensor]] = {}
    for i, operation in enumerate(operations):
        last = i == len(operations) - 1
        if isinstance(operation, bool):
            yield Pass(None, idle_chunk(chunks[0]), operation, False, last)
            continue
        number, own_trains = operation
        chunk = chunks[number]
        own = segments[number]
        if kept is not None and own is not None:
            chunk = chunk | {"segments": replace(own, kept=kept)}
        again = number in states
        ahead = _random_states(device) if times[number] > 1 else []
        if again:
            _set_random_states(states[number], device)
        elif ahead:
            states[number] = ahead
        one = Pass(number, chunk, own_trains, not again, last)
        yield one
        one.finish()
        if again:
            _set_random_states(ahead, device)


def kept_path(chunks: Sequence[Chunk]) -> KeptPath | None:
    """Room for what the pieces of a batch leave for each other; None where none reads another."""
    pieces = [chunk["segments"] for chunk in chunks if "segments" in chunk]
    past = max((own.past for own in pieces), default=0)
    return KeptPath(max(own.end for own in pieces), past) if past else None


def _in_step(operations: list[Operation | bool]) -> list[Operation | bool]:
    """This process's operations, and a bool, whether it trains, for each that others have at a time when it has none.

    Forwards with a backward and those without gather weights otherwise: at any time all processes do the same.
    """
    kinds = gather_object([[operation.trains for operation in operations]])  # type: ignore[union-attr]
    done, own, aligned = [0] * len(kinds), iter(operations), []
    mine = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    while any(place < len(kind) for place, kind in zip(done, kinds, strict=True)):
        waiting = [kind[place] if place < len(kind) else None for place, kind in zip(done, kinds, strict=True)]
        now = False not in waiting
        aligned.append(next(own) if waiting[mine] is now else now)
        done = [place + (kind is now) for place, kind in zip(done, waiting, strict=True)]
    return aligned


def _random_states(device: torch.device) -> list[Tensor]:
    """Of the CPU and, since a model may lie on several, of all accelerators of this kind."""
    kind = torch.get_device_module(device)
    if hasattr(kind, "get_rng_state_all"):
        return [torch.get_rng_state(), *kind.get_rng_state_all()]
    return [torch.get_rng_state()] + (
        [kind.get_rng_state()] if hasattr(kind, "get_rng_state") else []
    )  # Apple's has one


def _set_random_states(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    kind = torch.get_device_module(device)
    if hasattr(kind, "set_rng_state_all"):
        kind.set_rng_state_all(states[1:])
    elif len(states) > 1:
        kind.set_rng_state(states[1])
