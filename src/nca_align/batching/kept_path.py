"""What the pieces of one path of a tree leave for those behind them, and the gradients that come back.

Keys and values stand by depth: those of the token at depth d of the path that is run are at place d. So a piece finds
its past in front of its own, and reads both without a copy. Recurrent layers have a state at the end of each piece.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .recurrent import (
    RecurrentCache,
    States,
    add_gradients,
    cache_argument,
    cached_checkpointing,
    inject_gradients,
    recurrent_layers,
)

Name = tuple[nn.Module, int]  # a layer, and 0 for its keys or 1 for its values


class KeptPath:
    """Keys, values and states of one path of a tree, layer by layer, while its pieces are run one at a time.

    Args:
        size: tokens of the longest path to the end of a piece.
        past: tokens of the longest path that a piece reads.
    """

    def __init__(self, size: int, past: int):
        self.size, self.past = size, past
        self.places: dict[Name, Tensor] = {}
        self._gradients: dict[Name, Tensor] = {}
        self._cache: RecurrentCache | None = None
        self._states: dict[int, States] = {}  # by the depth at which a piece ends
        self._state_gradients: dict[int, States] = {}

    # Keys and values

    def extend(self, module: nn.Module, key: Tensor, value: Tensor, past: int, read: bool) -> tuple[Tensor, Tensor]:
        """The keys and values of a piece's past and its own, (1, heads, past + T, D) each.

        In the backward, the gradients of the past are added to what is kept. Those of a piece that is read take what
        later pieces have added for it.

        Args:
            module: the layer.
            key, value: (1, heads, T, D), the piece's own.
            past: tokens before it.
            read: whether later pieces read them.
        """
        return tuple(_Extend.apply(own, self, (module, i), past, read) for i, own in enumerate((key, value)))  # type: ignore[return-value]

    def bytes(self, place: Tensor) -> int:
        """What one of `places` takes, with the gradients of its past."""
        return place.nbytes + place.nbytes // self.size * self.past

    def place(self, name: Name, own: Tensor, past: int) -> Tensor:
        """Put a piece's own behind its past, and give both."""
        if name not in self.places:
            self.places[name] = own.new_empty((*own.shape[:2], self.size, own.shape[3]))
        end = past + own.shape[2]
        self.places[name][:, :, past:end] = own
        return self.places[name][:, :, :end]

    def settle(self, name: Name, gradient: Tensor, past: int, read: bool) -> Tensor:
        """Keep the gradient of a piece's past, and give the piece's own, that of its readers included."""
        own = gradient[:, :, past:]
        if name not in self._gradients:
            self._gradients[name] = torch.zeros_like(self.places[name][:, :, : self.past])
        kept = self._gradients[name]
        if past:
            kept[:, :, :past] += gradient[:, :, :past]
        if read:
            readers = kept[:, :, past : gradient.shape[2]]
            own = own + readers
            readers.zero_()
        return own

    # Recurrent states

    @contextmanager
    def states(self, model: Any, past: int, rows: int) -> Iterator[dict[str, Any]]:
        """Arguments of the forward of `model`, which is to run within, over rows that start at depth `past`."""
        self._cache = None
        if not recurrent_layers(model.config):
            yield {}
            return
        self._states = {depth: own for depth, own in self._states.items() if depth <= past}
        self._cache = RecurrentCache(model.config, self._states.get(past), rows)
        with cached_checkpointing(model):
            yield {cache_argument(model): self._cache}  # type: ignore[dict-item]

    def with_readers(self, loss: Tensor, end: int) -> Tensor:
        """The loss of a piece that is read, whose backward starts from the gradients at its last states as well."""
        if self._cache is None:
            return loss
        return inject_gradients(loss, self._cache.states(), self._state_gradients.pop(end, {}))

    def keep_states(self, end: int) -> None:
        """Keep the last states of a piece that is read, after its forward."""
        if self._cache is not None:
            self._states[end] = self._cache.kept()

    def keep_state_gradients(self, past: int) -> None:
        """Add the gradients at the states that a piece started from, after its backward."""
        if self._cache is not None and past:
            add_gradients(self._state_gradients.setdefault(past, {}), self._cache.gradients())


class _Extend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, kept: KeptPath, name: Name, past: int, read: bool) -> Tensor:
        ctx.settle = kept, name, past, read
        return kept.place(name, own, past)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        kept, name, past, read = ctx.settle
        return kept.settle(name, gradient, past, read), None, None, None, None
