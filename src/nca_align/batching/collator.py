"""K completions per prompt → the tensors of one batch, in one of two layouts and under one contract.

A batch holds `rewards` (B, K) float32, each less its prompt's best, which float64 subtracts: an offset of all of them
takes no digits. `given_rewards` are those of the data, `valid` (B, K) bool (ragged K: False where a prompt has fewer
completions), `lengths` (B, K) completion tokens that the model wrote, `ref_logps` (B, K) where the rows carry them,
`objectives` by name, (B, K) with NaN for a gap, where some row has columns `score_NAME`, `num_tokens` that the model
reads, padding left out, `row_numbers` where the rows have them, and `chunks`: one forward each, all completions in one
of them unless `completions_per_forward` asks for fewer. A chunk holds

    input_ids                (rows, T)
    attention_mask           (rows, T), or a (1, 1, 1, 1) placeholder beside `segments`
    position_ids, segments   of a packed row only: (1, T) depths in the tree, and who sees whom
    token_counts             (rows, T) in how many conversations each token stands, 0 for padding
    token_index, target_ids, completion_index  (M,)

and its M *terms* say which prediction counts for what: the one made at flat position `token_index[m]` (over rows · T),
of token `target_ids[m]`, belongs to completion `completion_index[m]` (b·K + k). Positions may repeat, and a token
without a term is context: prompts are, and what a `completion_mask` has 0 for, such as a tool's result. What the
trainer does with a batch is the same whatever the layout.

**padded**: a row a completion, its prompt repeated. **prefix_shared**: the whole chunk is one row without padding: its
conversations form a tree in which every token that several share, up to where they part, stands once. A prompt's last
token opens each branch, so that a position has one next token; the same rule shares the common beginnings of
completions and the earlier turns of multi-turn trees.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reward_tensors import below_best, check_rows
from .attention import Segments
from .token_ids import check_ids
from .tokenized_rows import masks_of, objective_values

Batch = dict[str, Any]
Chunk = dict[str, Any]
# Completion index, prompt ids, completion ids, and 1 for each of the latter that has a term
Conversation = tuple[int, list[int], list[int], list[int]]
# A fork costs a segment, one more attention call and copy of its path: it isn't worth it where it saves fewer tokens.
MIN_SHARED_TOKENS = 16


@dataclass
class RewardCollator:
    """Collates tokenised rows (`prompt_ids`, `completion_ids`, `rewards`) into a batch.

    A row may have `completion_mask`, K lists with 1 for each token that the model wrote; None or no column means all.
    It may have `ref_logps`, K numbers.

    Args:
        pad_token_id: id that fills the padded layout; never seen by attention, never scored, so eos will do.
        layout: "padded", "prefix_shared", or "auto", until `training.layout` chooses: padded.
        completions_per_forward: most completions in a chunk; None for all of the batch's in one.
        pad_to_multiple_of: rounds the padded layout's T up.
        vocabulary: rows of the model's embeddings, beyond which no token may be; None asks for no check.
        labels: whether rewards must be labels, from 0 to 1.
        min_completions: fewest completions of a row.
    """

    pad_token_id: int
    layout: str = "padded"
    completions_per_forward: int | None = None
    pad_to_multiple_of: int | None = None
    vocabulary: int | None = None
    labels: bool = False
    min_completions: int = 2

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Batch:
        """The batch of `rows`; here on the CPU its rewards are checked, so that no loss on a GPU has to look.

        Raises:
            ValueError: a row has too few completions, a reward that isn't finite or no label, or a mask that is none.
        """
        given = padded([row["rewards"] for row in rows])
        valid = padded([[True] * len(row["completion_ids"]) for row in rows], torch.bool)
        numbers = [row.get("row_number", i) for i, row in enumerate(rows)]
        check_rows(given.float(), valid, labels=self.labels, least=self.min_completions, numbers=numbers)
        batch: Batch = {
            "rewards": below_best(given, valid).float(),
            "given_rewards": given.float(),
            "valid": valid,
            "chunks": (chunks := self.chunks(rows)),
        }
        terms = torch.cat([chunk["completion_index"] for chunk in chunks])
        batch["lengths"] = terms.bincount(minlength=valid.numel()).view(valid.shape)
        if all("row_number" in row for row in rows):
            batch["row_numbers"] = [row["row_number"] for row in rows]  # a list stays where it is
        if objectives := objective_tensors(rows):
            batch["objectives"] = objectives
        if all(row.get("ref_logps") is not None for row in rows):
            batch["ref_logps"] = padded([row["ref_logps"] for row in rows], torch.float32)
        batch["num_tokens"] = sum(
            chunk["input_ids"].numel() if "segments" in chunk else int(chunk["attention_mask"].sum())
            for chunk in chunks
        )
        return batch

    def chunks(self, rows: Sequence[dict[str, Any]]) -> list[Chunk]:
        """The chunks alone, for `rows` without rewards.

        Raises:
            ValueError: a token is beyond the `vocabulary`.
        """
        if self.vocabulary is not None:
            check_ids(rows, self.vocabulary)
        columns = max(len(row["completion_ids"]) for row in rows)
        conversations = [
            (b, b * columns + k, row["prompt_ids"], completion, mask)
            for b, row in enumerate(rows)
            for k, (completion, mask) in enumerate(zip(row["completion_ids"], masks_of(row, b), strict=True))
        ]
        pack = pack_tree if self.layout == "prefix_shared" else self._pad
        return [
            pack([conversation[1:] for conversation in chunk])
            for chunk in split_by_length(conversations, self.completions_per_forward)
        ]

    def _pad(self, conversations: Sequence[Conversation]) -> Chunk:
        # A conversation's last token predicts nothing, so it is a target only
        rows = [(prompt + completion)[:-1] for _, prompt, completion, _ in conversations]
        length = max(map(len, rows))
        if self.pad_to_multiple_of:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        positions = [
            range(i * length + len(prompt) - 1, i * length + len(prompt) - 1 + len(completion))
            for i, (_, prompt, completion, _) in enumerate(conversations)
        ]
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return {
            "input_ids": torch.tensor([row + [self.pad_token_id] * (length - len(row)) for row in rows]),
            "attention_mask": mask,
            "token_counts": mask,
            **_terms(conversations, positions),
        }


def pack_tree(conversations: Sequence[Conversation]) -> Chunk:
    """Lay conversations out as one packed row, in depth-first order.

    Two conversations share a position where they agree on its token *and* on the next one, so they part one token
    before their difference and each position has a single target. A position is keyed by that pair; the last token of
    a conversation is a target only.
    """
    keys = []
    for _, prompt, completion, _ in conversations:
        ids = prompt + completion
        keys.append([token << 32 | following for token, following in itertools.pairwise(ids)])
    input_ids: list[int] = []
    position_ids: list[int] = []
    token_counts: list[int] = []
    queries: list[tuple[int, int]] = []
    paths: list[tuple[tuple[int, int], ...]] = []
    routes: list[list[int]] = [[] for _ in keys]  # conversation → row position of each of its tokens

    def grow(members: list[int], depth: int, path: tuple[tuple[int, int], ...]) -> None:
        end = depth + _shared_length([keys[i] for i in members], depth)
        start = len(input_ids)
        input_ids.extend(key >> 32 for key in keys[members[0]][depth:end])
        position_ids.extend(range(depth, end))
        token_counts.extend([len(members)] * (end - depth))
        stretch = (start, len(input_ids))
        queries.append(stretch)
        path = (*path[:-1], (path[-1][0], stretch[1])) if path and path[-1][1] == start else (*path, stretch)
        paths.append(path)
        for i in members:
            routes[i].extend(range(*stretch))
        fork([i for i in members if len(keys[i]) > end], end, path)

    def fork(members: list[int], depth: int, path: tuple[tuple[int, int], ...]) -> None:
        for branch in _branches(keys, members, depth):
            grow(branch, depth, path)

    fork(list(range(len(keys))), 0, ())
    positions = [route[len(prompt) - 1 :] for route, (_, prompt, *_) in zip(routes, conversations, strict=True)]
    return {
        "input_ids": torch.tensor([input_ids]),
        "position_ids": torch.tensor([position_ids]),
        "token_counts": torch.tensor([token_counts]),
        # transformers takes a 4-D mask as it stands, so none of the row's length squared is built
        "attention_mask": torch.ones(1, 1, 1, 1),
        "segments": Segments(tuple(queries), tuple(paths)),
        **_terms(conversations, positions),
    }


def _terms(conversations: Sequence[Conversation], positions: Iterable[Iterable[int]]) -> Chunk:
    """A chunk's terms, from the positions at which each conversation's completion is predicted."""
    parts = [
        (itertools.compress(own, mask), itertools.compress(completion, mask), itertools.repeat(index, sum(mask)))
        for own, (index, _, completion, mask) in zip(positions, conversations, strict=True)
    ]
    names = ("token_index", "target_ids", "completion_index")
    return {
        name: torch.tensor(list(itertools.chain.from_iterable(values)), dtype=torch.long)
        for name, values in zip(names, zip(*parts, strict=True), strict=True)
    }


def _branches(keys: list[list[int]], members: list[int], depth: int) -> list[list[int]]:
    """Those of `members` that share a segment from `depth` on: all that agree there, if it saves enough tokens."""
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
    branches = [branch for group in groups.values() for branch in _branches(keys, group, depth)]
    return [members] if shared * (len(branches) - 1) >= MIN_SHARED_TOKENS else branches


def _shared_length(keys: list[list[int]], depth: int) -> int:
    """How many positions from `depth` on all of these share: as many as the smallest and the largest do."""
    tails = [key[depth:] for key in keys]
    smallest, largest = min(tails), max(tails)
    return next((n for n, (a, b) in enumerate(zip(smallest, largest, strict=False)) if a != b), len(smallest))


def split_by_length(conversations: list[Any], size: int | None) -> list[list[Any]]:
    """Split `(b, index, prompt ids, completion ids, …)` into as few chunks as `size` allows, near equal in tokens.

    A prompt costs its tokens once a chunk, so its completions go into one, the emptiest with room for them all, or
    where none has into as few as hold them, the longest first, each into the one with the fewest tokens. The largest
    chunk comes first: if memory runs out, then at once, and what it took is room for the others.
    """
    if size is None or len(conversations) <= size:
        return [conversations]
    groups: dict[int, list[Any]] = {}
    for conversation in sorted(conversations, key=lambda c: -len(c[3])):
        groups.setdefault(conversation[0], []).append(conversation)
    chunks: list[list[Any]] = [[] for _ in range(-(-len(conversations) // size))]
    loads = [0] * len(chunks)
    for group in sorted(groups.values(), key=lambda g: -len(g[0][2]) - sum(len(c[3]) for c in g)):
        room = [size - len(chunk) for chunk in chunks]
        ranking = sorted(range(len(chunks)), key=lambda j: (-min(room[j], len(group)), loads[j]))
        homes: list[int] = []
        while sum(room[j] for j in homes) < len(group):
            homes.append(ranking[len(homes)])
        for j in homes:
            loads[j] += len(group[0][2])
        for conversation in group:
            j = min((j for j in homes if len(chunks[j]) < size), key=loads.__getitem__)
            loads[j] += len(conversation[3])
            chunks[j].append(conversation)
    return [chunks[j] for j in sorted(range(len(chunks)), key=lambda j: -loads[j])]


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """The places of `lengths` in batches of `size`, the shortest first, so that a batch's are alike."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


def objective_tensors(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The several rewards of rows by name, in the order of the names: (B, K) float32, NaN for a gap; {} without any."""
    return {
        column.removeprefix("score_"): padded(values).float()
        for column, values in sorted(objective_values(rows).items())
    }


def padded(rows: Sequence[Sequence[float]], dtype: torch.dtype = torch.float64) -> Tensor:
    """(B, K) of ragged lists, zeros (False) where a row has fewer."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=dtype) for row in rows], batch_first=True)
