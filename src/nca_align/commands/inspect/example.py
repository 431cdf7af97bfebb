"""One row of a data set as training sees it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ...batching.tokenization import tokenize_rows
from ...errors import UserError
from ...losses import targets
from .options import InspectOptions


@dataclass(frozen=True)
class Example:
    """One row as training sees it.

    Args:
        row: its number.
        prompt, completions: the text in pieces, one a token, or one a message without a tokenizer.
        rewards, targets: one a completion.
        remarks: what was cut.
    """

    row: int
    prompt: list[str]
    completions: list[list[str]]
    rewards: list[float]
    targets: list[float]
    remarks: list[str]

    def ranked(self, alpha: float) -> Iterator[tuple[str, list[str], float]]:
        """What is said of each completion, its pieces and its target, from the best."""
        for k in np.argsort(-np.array(self.rewards), kind="stable").tolist():
            title = f"completion {k}: reward {self.rewards[k]:g}, target {self.targets[k]:.3f} at α = {alpha:g}"
            yield title, self.completions[k], self.targets[k]


def show_row(dataset: Dataset, index: int, options: InspectOptions, tokenizer=None) -> Example:
    """Row `index` with its chat template applied, cut as training cuts it, and its target weights at `options.alpha`.

    Raises:
        UserError: there is no such row.
    """
    if not 0 <= index < len(dataset):
        raise UserError(f"`example` is {index}; it must be a row from 0 to {len(dataset) - 1}")
    row = dataset[index]
    weights = targets(torch.tensor([row["rewards"]], dtype=torch.float64), options.alpha)[0].tolist()
    if tokenizer is None:
        return Example(
            index, _turns(row["prompt"]), [_turns(c) for c in row["completions"]], row["rewards"], weights, []
        )
    limits: dict[str, Any] = {"max_prompt_length": options.max_prompt_length, "max_length": options.max_length}
    ids = tokenize_rows({key: [value] for key, value in row.items()}, [index], tokenizer, **limits, length_column="n")
    remarks = []
    if ids["prompt_cut"][0]:
        remarks.append(f"cut to its last {options.max_prompt_length} tokens: the prompt")
    if cut := ids["completions_cut"][0]:
        remarks.append(f"cut at {options.max_length} tokens: {cut} of {len(row['completions'])} completions")
    completions = [token_texts(tokenizer, completion) for completion in ids["completion_ids"][0]]
    return Example(index, token_texts(tokenizer, ids["prompt_ids"][0]), completions, row["rewards"], weights, remarks)


def _turns(text: str | list[dict[str, Any]]) -> list[str]:
    if isinstance(text, str):
        return [text]
    return [f"{message['role']}: {message['content'] or ''}\n" for message in text]


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """The text of each token; those that make up one character between them are one piece."""
    pieces, waiting = [], []
    for token in ids:
        waiting.append(token)
        text = tokenizer.decode(waiting, clean_up_tokenization_spaces=False)
        if not text.endswith("�") or len(waiting) == 4:  # no character has more bytes
            pieces.append(text)
            waiting = []
    return pieces + ([tokenizer.decode(waiting)] if waiting else [])
