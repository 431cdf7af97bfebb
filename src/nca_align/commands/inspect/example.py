"""One row of a split as training sees it."""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ...batching.tokenization import tokenize_rows
from ...batching.tokenized_rows import masks_of
from ...data.messages import content_kind
from ...errors import UserError
from ...evaluation.process_rewards import token_texts
from ...reward_tensors import everywhere, target_distribution
from .options import InspectOptions


@dataclass(frozen=True)
class Example:
    """One row as training sees it.

    Args:
        row: its number.
        prompt, completions: the text in pieces, one a token, or one a message without a tokenizer.
        context: of each piece of the completions, whether the model didn't write it.
        counts: of each completion its tokens and how many of them are context; none where they aren't known.
        rewards, targets: one a completion; no targets without an α.
        remarks: what was cut, what may not be meant, and what marks context.
    """

    row: int
    prompt: list[str]
    completions: list[list[str]]
    context: list[list[bool]]
    counts: list[tuple[int, int]]
    rewards: list[float]
    targets: list[float]
    remarks: list[str]

    def ranked(self, alpha: float | None) -> Iterator[tuple[str, list[tuple[str, bool]], float | None]]:
        """What is said of each completion, its pieces and whether each is context, and its target, from the best."""
        for k in np.argsort(-np.array(self.rewards), kind="stable").tolist():
            title = f"completion {k}: {'label' if alpha is None else 'reward'} {self.rewards[k]:g}"
            target = None if alpha is None else self.targets[k]
            title += "" if target is None else f", target {target:.3f} at α = {alpha:g}"
            if self.counts and self.counts[k][1]:
                title += f", context {self.counts[k][1]} of {self.counts[k][0]}"
            yield title, list(_bracketed(self.completions[k], self.context[k])), target


def _bracketed(pieces: Iterable[str], context: Iterable[bool]) -> Iterator[tuple[str, bool]]:
    """Pieces, with what is context between brackets, which colours can't tell to everybody."""
    for marked, run in itertools.groupby(zip(pieces, context, strict=True), key=lambda piece: piece[1]):
        texts = [text for text, _ in run]
        if marked:
            texts[0] = f"⟦{texts[0]}"
            end = texts[-1].rstrip("\n")
            texts[-1] = f"{end}⟧{texts[-1][len(end) :]}"
        yield from ((text, marked) for text in texts)


def show_row(dataset: Dataset, index: int, options: InspectOptions, tokenizer=None) -> Example:
    """Row `index` with its chat template applied, cut as training cuts it, and its target weights at `options.alpha`.

    Raises:
        UserError: there is no such row.
    """
    if not 0 <= index < len(dataset):
        raise UserError(f"`example` is {index}; it must be a row from 0 to {len(dataset) - 1}")
    row = dataset[index]
    rewards, weights = torch.tensor([row["rewards"]]).double(), []
    if options.alpha is not None:
        weights = target_distribution(rewards, options.alpha, everywhere(rewards, None))[0].tolist()
    remarks: list[str] = []
    counts: list[tuple[int, int]] = []
    if tokenizer is None:
        prompt = [text for text, _ in _turns(row["prompt"])]
        masks = row.get("completion_mask") or [None] * len(row["completions"])
        completions = [_turns(own, mask) for own, mask in zip(row["completions"], masks, strict=True)]
        if content_kind(row["prompt"]) == "token ids":
            counts = [(len(own), sum(marked for _, marked in own)) for own in completions]
    else:
        limits: dict[str, Any] = {"max_prompt_length": options.max_prompt_length, "max_length": options.max_length}
        found = tokenize_rows({key: [value] for key, value in row.items()}, [index], tokenizer, **limits)
        ids = {key: values[0] for key, values in found.items()}
        if ids["prompt_cut"]:
            remarks.append(f"cut to its last {options.max_prompt_length} tokens: the prompt")
        if cut := ids["completions_cut"]:
            remarks.append(f"cut at {options.max_length} tokens: {cut} of {len(row['completions'])} completions")
        if ids["typed_tokens"]:
            remarks.append("special tokens of the tokenizer as text within its messages")
        prompt = [text for text in token_texts(tokenizer, ids["prompt_ids"]) if text]
        written = masks_of(ids)
        counts = [(len(mask), mask.count(0)) for mask in written]
        completions = [
            _marked_texts(tokenizer, own, mask) for own, mask in zip(ids["completion_ids"], written, strict=True)
        ]
    if any(marked for own in completions for _, marked in own):
        legend = "⟦…⟧ is context: the model reads it but did not write it, and no token of it is trained on"
        tokens, context = (sum(own) for own in zip(*counts, strict=True)) if counts else (0, 0)
        remarks.append(legend + (f"; {context} of the completions' {tokens} tokens" if counts else ""))
    texts = [[text for text, _ in own] for own in completions]
    marks = [[marked for _, marked in own] for own in completions]
    return Example(index, prompt, texts, marks, counts, row["rewards"], weights, remarks)


def _turns(text: str | list[Any], mask: Sequence[int] | None = None) -> list[tuple[str, bool]]:
    """The messages, or token ids, of a prompt or a completion, and whether each is context in a completion."""
    if isinstance(text, str):
        return [(text, False)]
    if content_kind(text) == "token ids":
        return [(f"{token} ", not own) for token, own in zip(text, mask or [1] * len(text), strict=True)]
    return [(_message(own), own["role"] != "assistant") for own in text]


def _message(message: dict[str, Any]) -> str:
    calls = json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""
    return f"{message['role']}: {message.get('content') or ''}{calls}\n"


def _marked_texts(tokenizer, ids: list[int], mask: list[int]) -> list[tuple[str, bool]]:
    """The text of each token and whether it is context; of several that make up a character, that of the last."""
    texts = zip(token_texts(tokenizer, ids), mask, strict=True)
    return [(text, not written) for text, written in texts if text]
