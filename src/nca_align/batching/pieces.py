"""A tree of conversations, cut into pieces of a bounded number of tokens, one forward each.

A piece starts where its *past* ends: the tokens between the root and the piece, whose keys and values an earlier
piece left. It is one of two things: whole subtrees that all have this past, or a part of one node. Parts of nodes
that something follows are *read*: their keys and values are kept until what follows has been run.

Recurrent layers know a row by its order alone, and one that is read hands on a state. Their pieces are whole leaves of
one past, a row each, padded on the right; or a part of one node.

`schedule` orders the forwards and backwards of the pieces so that only the keys, values and states of one path, from
the root to the piece that is run, are kept at a time.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .prefix_tree import PrefixTree, Stretch
from .recurrent import MIN_TOKENS
from .segments import Segments

LEAST_TOKENS = 2 * MIN_TOKENS  # that a piece may be bounded to


class Part(NamedTuple):
    """Tokens `start` to `end` of the tree, which belong to one node of it."""

    node: int
    start: int
    end: int

    @property
    def tokens(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Piece:
    """Parts of a tree that one forward runs, in the tree's order.

    Args:
        parts: whole nodes, or a part of one.
        past: tokens between the root and the piece.
        read: whether later pieces read what it leaves.
        rows: whether each part is a row; else all are one row.
    """

    parts: tuple[Part, ...]
    past: int = 0
    read: bool = False
    rows: bool = False

    @property
    def grid(self) -> list[list[int]]:
        """(R, T) places in the tree, -1 for padding."""
        if not self.rows:
            return [[place for part in self.parts for place in range(part.start, part.end)]]
        length = self._row_length
        return [[*range(part.start, part.end), *[-1] * (length - part.tokens)] for part in self.parts]

    @property
    def _row_length(self) -> int:
        return max(MIN_TOKENS if self.past else 1, *(part.tokens for part in self.parts))

    def segments(self, tree: PrefixTree) -> Segments:
        """Who sees whom, with the tokens of the past counted first."""
        queries: list[Stretch] = []
        paths: list[tuple[Stretch, ...]] = []
        of_node: dict[int | None, tuple[Stretch, ...]] = {}
        start, past = 0, ((0, self.past),) if self.past else ()
        for part in self.parts:
            end = start + (self._row_length if self.rows else part.tokens)
            queries.append((start, end))
            above = past if self.rows else of_node.get(tree.parents[part.node], past)
            own = (self.past + start, self.past + end)
            joined = above and above[-1][1] == own[0]
            paths.append((*above[:-1], (above[-1][0], own[1])) if joined else (*above, own))
            of_node[part.node] = paths[-1]
            start = end
        return Segments(tuple(queries), tuple(paths), self.past, self.read)


def cut(tree: PrefixTree, limit: int | None, rows: bool = False) -> list[Piece]:
    """The pieces of a tree, each after those that it reads; without `rows`, one where all is within `limit` tokens.

    Args:
        limit: most tokens of a piece, padding included; None for no bound.
        rows: whether the pieces are for recurrent layers.
    """
    if not rows and (limit is None or len(tree.input_ids) <= limit):
        return [Piece(tuple(Part(node, *stretch) for node, stretch in enumerate(tree.nodes)))]
    children = tree.children()
    ends = [0] * len(tree.nodes)  # of each node, the last node of its subtree
    for node in reversed(range(len(tree.nodes))):
        ends[node] = ends[children[node][-1]] if node in children else node

    def subtree(node: int) -> tuple[Part, ...]:
        return tuple(Part(own, *tree.nodes[own]) for own in range(node, ends[node] + 1))

    def place(siblings: Sequence[int], past: int) -> Iterator[Piece]:
        sizes = {node: tree.nodes[ends[node]][1] - tree.nodes[node][0] for node in siblings}
        whole = {
            node: size for node, size in sizes.items()
            if (limit is None or size <= limit) and not (rows and node in children)
        }  # fmt: skip
        for group in _fit(whole, limit, rows):
            yield Piece(tuple(part for node in sorted(group) for part in subtree(node)), past, rows=rows)
        for node in (node for node in siblings if node not in whole):
            start, end = tree.nodes[node]
            followed = node in children
            for first, last in _parts(start, end, limit or end - start, followed):
                yield Piece((Part(node, first, last),), past + first - start, followed or last < end, rows)
            if followed:
                yield from place(children[node], past + end - start)

    return list(place(children[None], 0))


def _fit(sizes: dict[int, int], limit: int | None, padded: bool) -> list[list[int]]:
    """Groups of at most `limit` together: the largest first, each into the first group with room for it."""
    groups: list[list[int]] = []
    taken: list[int] = []
    for node in sorted(sizes, key=lambda node: -sizes[node]):

        def with_it(i: int, node: int = node) -> int:
            return (len(groups[i]) + 1) * sizes[groups[i][0]] if padded else taken[i] + sizes[node]

        home = next((i for i in range(len(groups)) if limit is None or with_it(i) <= limit), None)
        if home is None:
            groups.append([node])
            taken.append(sizes[node])
        else:
            taken[home] = with_it(home)
            groups[home].append(node)
    return groups


def _parts(start: int, end: int, limit: int, followed: bool) -> Iterator[Stretch]:
    """A node in parts within `limit`: near equal where all are read, else the last, which is run once, the largest."""
    count = -(-(end - start) // limit)
    if followed:
        bounds = [start + (end - start) * i // count for i in range(count + 1)]
    else:
        bounds = [start, *range(end - (count - 1) * limit, end + 1, limit)]
        if count > 1 and bounds[1] - start < MIN_TOKENS:  # a state can't be handed on from fewer
            bounds[1] = start + MIN_TOKENS
    yield from itertools.pairwise(bounds)


class Operation(NamedTuple):
    """One forward of a chunk.

    Args:
        chunk: its number.
        trains: whether a backward follows; else the forward is without gradients.
    """

    chunk: int
    trains: bool


def schedule(segments: Sequence[Segments | None], scores_all: bool, trains: bool = True) -> list[Operation]:
    """The forwards of a batch's chunks, in order.

    What is read is run without gradients before what reads it, and trained after all of that.

    Args:
        segments: of each chunk its `Segments`, or None where it stands alone.
        scores_all: whether all chunks are run without gradients before the first is trained.
        trains: whether any is trained.
    """
    operations: list[Operation] = []
    held: list[int] = []  # chunks whose keys and values are in place, root first
    waiting: list[int] = []  # chunks that are read, root first, to be trained after what reads them
    if scores_all:
        for chunk, own in enumerate(segments):
            _drop_beyond(held, segments, own)
            operations.append(Operation(chunk, False))
            if _is_read(own):
                held.append(chunk)
    for chunk, own in enumerate(segments if trains else ()):
        operations += [Operation(done, True) for done in _drop_beyond(waiting, segments, own)]
        if not _is_read(own):
            _drop_beyond(held, segments, own)
            operations.append(Operation(chunk, True))
            continue
        if chunk not in held:
            _drop_beyond(held, segments, own)
            operations.append(Operation(chunk, False))
            held.append(chunk)
        waiting.append(chunk)
    return operations + [Operation(done, True) for done in reversed(waiting)]


def _drop_beyond(chunks: list[int], segments: Sequence[Any], own: Segments | None) -> list[int]:
    """Take from `chunks` those that stand beyond the past of the one with segments `own`, the deepest first."""
    dropped = []
    while chunks and segments[chunks[-1]].end > (0 if own is None else own.past):
        dropped.append(chunks.pop())
    return dropped


def _is_read(segments: Segments | None) -> bool:
    return segments is not None and segments.read
