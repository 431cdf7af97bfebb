"""Conversations as a tree in which every token that several share, up to where they part, stands once.

Two conversations share a position where they agree on its token *and* on the next one, so they part one token before
their difference and each position has a single target. A position is keyed by that pair. The last token of a
conversation is a target only, so the tree leaves it out.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

# A fork costs a segment, one more attention call and copy of its path: it isn't worth it where it saves fewer tokens.
MIN_SHARED_TOKENS = 16

Stretch = tuple[int, int]  # of positions, the end left out


@dataclass
class PrefixTree:
    """A row of tokens in depth-first order, and the S nodes that it consists of without a gap.

    Args:
        input_ids, depths, counts: of each token its id, its place in its conversations, and in how many it stands.
        nodes: `(start, end)` of each node in the row.
        parents: of each node the node that it follows; None for a root.
        routes: of each conversation, the row's positions of its tokens.
    """

    input_ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    nodes: list[Stretch] = field(default_factory=list)
    parents: list[int | None] = field(default_factory=list)
    routes: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, conversations: Sequence[list[int]], least: int = 1) -> "PrefixTree":
        """The tree of conversations, each the ids of all its tokens; those that share fewer than `least` share none."""
        tree = cls(routes=[[] for _ in conversations])
        keys = [[token << 32 | following for token, following in itertools.pairwise(ids)] for ids in conversations]

        def grow(members: list[int], depth: int, parent: int | None) -> None:
            end = depth + _shared_length([keys[i] for i in members], depth)
            start = len(tree.input_ids)
            tree.input_ids.extend(key >> 32 for key in keys[members[0]][depth:end])
            tree.depths.extend(range(depth, end))
            tree.counts.extend([len(members)] * (end - depth))
            node = len(tree.nodes)
            tree.nodes.append((start, len(tree.input_ids)))
            tree.parents.append(parent)
            for i in members:
                tree.routes[i].extend(range(*tree.nodes[node]))
            fork([i for i in members if len(keys[i]) > end], end, node)

        def fork(members: list[int], depth: int, parent: int | None) -> None:
            for branch in _branches(keys, members, depth, least):
                grow(branch, depth, parent)

        fork(list(range(len(keys))), 0, None)
        return tree

    def children(self) -> dict[int | None, list[int]]:
        """Of each node, and of None the roots: the nodes that follow it."""
        found: dict[int | None, list[int]] = {}
        for node, parent in enumerate(self.parents):
            found.setdefault(parent, []).append(node)
        return found


def _branches(keys: list[list[int]], members: list[int], depth: int, least: int) -> list[list[int]]:
    """Those of `members` that share a node from `depth` on: all that agree there, if it saves enough tokens."""
    if len(members) < 2:
        return [members] if members else []
    shared = _shared_length([keys[i] for i in members], depth)
    if shared >= MIN_SHARED_TOKENS:
        return [members]
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in members:  # by what follows; nothing does for those that end here
        groups.setdefault(tuple(keys[i][depth + shared : depth + shared + 1]), []).append(i)
    if len(groups) == 1:
        return [members]
    branches = [branch for group in groups.values() for branch in _branches(keys, group, depth, least)]
    pays = shared >= least and shared * (len(branches) - 1) >= MIN_SHARED_TOKENS
    return [members] if pays else branches


def _shared_length(keys: list[list[int]], depth: int) -> int:
    """How many positions from `depth` on all of these share: as many as the smallest and the largest do."""
    tails = [key[depth:] for key in keys]
    smallest, largest = min(tails), max(tails)
    return next((n for n, (a, b) in enumerate(zip(smallest, largest, strict=False)) if a != b), len(smallest))
