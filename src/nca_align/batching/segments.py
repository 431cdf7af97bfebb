"""Where the segments of one packed row stand, and who of them sees whom."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .kept_path import KeptPath
from .prefix_tree import Stretch


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the segments of one packed row stand, and which stretches of keys each of them sees.

    Args:
        queries: `(start, end)` of each of the S segments, in the row's order, which they fill without a gap.
        paths: for each segment, the `(start, end)` stretches from its root to its own end, in order of depth; the last
            one ends where the segment does. Keys are counted from the first token of the past.
        past: tokens on the path to the row that stand in no segment of it; their keys are `kept`.
        read: whether the row's own keys are to be kept.
        kept: where keys are kept.
    """

    queries: tuple[Stretch, ...]
    paths: tuple[tuple[Stretch, ...], ...]
    past: int = 0
    read: bool = False
    kept: KeptPath | None = None
    _cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def end(self) -> int:
        """Keys that there are, those of the past included."""
        return self.past + self.queries[-1][1]

    def calls(self) -> Iterator[tuple[Stretch, tuple[Stretch, ...]]]:
        """The attention calls: of which queries, over which stretches of keys.

        Several segments are one call over all keys where the past is the larger part, of which each would need a copy.
        """
        if len(self.queries) > 1 and self.past >= self.queries[-1][1]:
            yield (0, self.queries[-1][1]), ((0, self.end),)
        else:
            yield from zip(self.queries, self.paths, strict=True)

    def mask(
        self, queries: Stretch, path: tuple[Stretch, ...], window: int | None, like: Tensor, last_first: bool = False
    ) -> Tensor | None:
        """Additive mask (q, k) of one of the `calls`, kept for all layers; None where `is_causal` says it.

        `last_first` of one segment's: see `causal_mask`.
        """
        start, end = queries
        if queries in self.queries:
            return self.causal_mask(end - start, sum(b - a for a, b in path), window, like, last_first)
        key = ("all", window, like.dtype, like.device)
        if key not in self._cache:
            mask = torch.full((end, self.end), -torch.inf, dtype=like.dtype, device=like.device)
            for (a, b), own in zip(self.queries, self.paths, strict=True):
                length = sum(last - first for first, last in own)
                seen, place = self._causal(b - a, length, window, like), 0
                for first, last in own:
                    mask[a:b, first:last] = seen[:, place : place + last - first]
                    place += last - first
            self._cache[key] = mask
        return self._cache[key]

    @staticmethod
    def _causal(q: int, k: int, window: int | None, like: Tensor) -> Tensor:
        seen = torch.ones(q, k, dtype=torch.bool, device=like.device).tril(k - q)
        if window is not None:
            seen = seen.triu(k - q - window + 1)
        return torch.zeros(q, k, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)

    def causal_mask(self, q: int, k: int, window: int | None, like: Tensor, last_first: bool = False) -> Tensor | None:
        """Additive lower-right causal mask (q, k) of one segment, kept for all layers; None where `is_causal` says it.

        `window` counts the query itself, as transformers' `sliding_window` does. With `last_first` the rows are of the
        segment's queries from the last to the first. Each row is then the one before it, moved by a place: the mask is
        a view of q + k numbers, however long the keys are.
        """
        if window is not None and window >= k:
            window = None
        if q == k and window is None:
            return None
        key = (q, k, window, like.dtype, like.device, last_first)
        if key not in self._cache:
            if last_first:
                line = torch.zeros(q + k - 1, dtype=like.dtype, device=like.device)
                line[k:] = -torch.inf
                line[: max(0, k - (window or k))] = -torch.inf
                self._cache[key] = line.as_strided((q, k), (1, 1))
            else:
                self._cache[key] = self._causal(q, k, window, like)
        return self._cache[key]

    def forget(self) -> None:
        """Free the masks."""
        self._cache.clear()

    def varlen(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """What variable-length kernels take: `kv_index`, `cu_seqlens_q`, `cu_seqlens_k` (int32), and both maxima."""
        key = ("varlen", device)
        if key not in self._cache:
            kv = [torch.arange(start, end) for path in self.paths for start, end in path]
            q_lengths = [end - start for start, end in self.queries]
            k_lengths = [sum(end - start for start, end in path) for path in self.paths]
            cumulative = [torch.tensor([0, *lengths]).cumsum(0).int().to(device) for lengths in (q_lengths, k_lengths)]
            self._cache[key] = (torch.cat(kv).to(device), *cumulative, max(q_lengths), max(k_lengths))
        return self._cache[key]
