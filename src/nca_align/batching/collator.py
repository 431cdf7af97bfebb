"""K completions per prompt → the tensors of one batch, in one of two layouts and under one contract.

A batch holds

    rewards                  (B, K) float32, each less its prompt's best, so that a common offset takes no digits
    given_rewards            (B, K) the data's own
    valid                    (B, K) bool, False where a prompt has fewer completions
    lengths                  (B, K) completion tokens that the model wrote
    ref_logps                (B, K) where the rows carry them
    objectives               by name, (B, K) with NaN for a gap, where some row has columns `score_NAME`
    num_tokens               tokens that the model reads, without padding
    row_numbers              where the rows have them
    chunks                   one forward each: one for all completions, or as many as `tokens_per_forward` asks for

A chunk holds

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
completions and the earlier turns of multi-turn trees. Under `tokens_per_forward` the row is cut into pieces, a chunk
each, of which later ones read the keys and values of earlier ones: see `batching.pieces`.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..reward_tensors import below_best, check_rows
from .pieces import LEAST_TOKENS, cut
from .prefix_tree import PrefixTree
from .recurrent import MIN_TOKENS
from .segments import Segments
from .token_ids import check_ids
from .tokenized_rows import masks_of, objective_values

Batch = dict[str, Any]
Chunk = dict[str, Any]
# Completion index, prompt ids, completion ids, and 1 for each of the latter that has a term
Conversation = tuple[int, list[int], list[int], list[int]]


@dataclass
class RewardCollator:
    """Collates tokenised rows (`prompt_ids`, `completion_ids`, `rewards`) into a batch.

    A row may have `completion_mask`, K lists with 1 for each token that the model wrote; None or no column means all.
    It may have `ref_logps`, K numbers.

    Args:
        pad_token_id: id that fills the padded layout; never seen by attention, never scored, so eos will do.
        layout: "padded", "prefix_shared", or "auto", until `training.layout` chooses: padded.
        tokens_per_forward: most tokens in a chunk, a padded conversation at least; None for all of the batch's in one.
        pad_to_multiple_of: rounds the padded layout's T up.
        vocabulary: rows of the model's embeddings, beyond which no token may be; None asks for no check.
        labels: whether rewards must be labels, from 0 to 1.
        min_completions: fewest completions of a row.
        recurrent: whether the model has layers with a state, whose packed rows are one conversation's.

    Example:
        >>> row = {"prompt_ids": [5, 6], "completion_ids": [[7], [8, 9]], "rewards": [1.0, 0.0]}
        >>> RewardCollator(pad_token_id=0)([row])["rewards"].shape
        torch.Size([1, 2])
    """

    pad_token_id: int
    layout: str = "padded"
    tokens_per_forward: int | None = None
    pad_to_multiple_of: int | None = None
    vocabulary: int | None = None
    labels: bool = False
    min_completions: int = 2
    recurrent: bool = False

    def __post_init__(self):
        if self.tokens_per_forward is not None and self.tokens_per_forward < LEAST_TOKENS:
            raise UserError(f"`tokens_per_forward` is {self.tokens_per_forward}, but must be at least {LEAST_TOKENS}.")

    @property
    def in_pieces(self) -> bool:
        """Whether a batch may be several chunks."""
        return self.tokens_per_forward is not None or (self.recurrent and self.layout == "prefix_shared")

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
        batch["num_tokens"] = sum(int((chunk["token_counts"] > 0).sum()) for chunk in chunks)
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
            (b * columns + k, row["prompt_ids"], completion, mask)
            for b, row in enumerate(rows)
            for k, (completion, mask) in enumerate(zip(row["completion_ids"], masks_of(row, b), strict=True))
        ]
        if self.layout == "prefix_shared":
            return pack(conversations, self.tokens_per_forward, self.recurrent)
        return [self._pad(chunk) for chunk in split_by_length(conversations, self.tokens_per_forward)]

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


def pack(
    conversations: Sequence[Conversation], tokens_per_forward: int | None = None, recurrent: bool = False
) -> list[Chunk]:
    """The pieces of the conversations' tree, each a packed row; for recurrent layers rows of one past."""
    tree = PrefixTree.of(
        [prompt + completion for _, prompt, completion, _ in conversations], least=MIN_TOKENS if recurrent else 1
    )
    positions = [route[len(prompt) - 1 :] for route, (_, prompt, *_) in zip(tree.routes, conversations, strict=True)]
    terms = _terms(conversations, positions)
    input_ids, depths, counts = map(torch.tensor, (tree.input_ids, tree.depths, tree.counts))
    chunks = []
    for piece in cut(tree, tokens_per_forward, recurrent):
        grid = torch.tensor(piece.grid)
        filled = grid.flatten() >= 0
        places = torch.full((len(tree.input_ids),), -1)
        places[grid.flatten()[filled]] = torch.arange(grid.numel())[filled]
        own = places[terms["token_index"]]
        chunks.append({
            "input_ids": input_ids[grid.clamp_min(0)],
            "position_ids": depths[grid.clamp_min(0)],
            "token_counts": counts[grid.clamp_min(0)] * (grid >= 0),
            # transformers takes a 4-D mask as it stands, so none of the row's length squared is built
            "attention_mask": torch.ones(1, 1, 1, 1),
            "segments": piece.segments(tree),
            **{name: values[own >= 0] for name, values in terms.items()},
            "token_index": own[own >= 0],
        })  # fmt: skip
    return chunks


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


def idle_chunk(like: Chunk) -> Chunk:
    """A chunk of one token and no term, for a process that others wait for; in the layout of `like`."""
    names = ("input_ids", "token_counts", "position_ids", "token_index", "target_ids", "completion_index")
    chunk = {name: like[name][:1, :1] if like[name].dim() == 2 else like[name][:0] for name in names if name in like}
    chunk["token_counts"] = torch.zeros_like(chunk["token_counts"])
    if "segments" in like:
        return chunk | {"attention_mask": like["attention_mask"], "segments": Segments(((0, 1),), (((0, 1),),))}
    return chunk | {"attention_mask": torch.ones_like(chunk["input_ids"])}


def split_by_length(conversations: Sequence[Conversation], tokens: int | None) -> list[list[Conversation]]:
    """Chunks of conversations of like length, of at most `tokens` once padded, or of one alone; the largest first.

    If memory runs out, then at once, and what the largest took is room for the others.
    """

    def length(conversation: Conversation) -> int:
        return len(conversation[1]) + len(conversation[2]) - 1

    if tokens is None:
        return [list(conversations)]
    chunks: list[list[Conversation]] = []
    for conversation in sorted(conversations, key=length, reverse=True):
        if not chunks or (len(chunks[-1]) + 1) * length(chunks[-1][0]) > tokens:
            chunks.append([])
        chunks[-1].append(conversation)
    return sorted(chunks, key=lambda chunk: len(chunk) * length(chunk[0]), reverse=True)


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
