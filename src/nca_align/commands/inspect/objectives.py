"""Several rewards of a data set: how each goes with the others, with their sum and with length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from datasets import Dataset

from ...batching.tokenized_rows import objective_values
from ...data.several_rewards import column_of
from .reward_stats import within_correlation


@dataclass(frozen=True)
class Objective:
    """One of several rewards; correlations are within prompts, None where one side is constant.

    Args:
        name: as `reward_weights` has it.
        weight: None where it has none, or the weights are a list.
        share: of the variance within prompts of Σ weight · value; the shares of all add up to 1.
        mean: over completions.
        missing: completions without it.
        with_reward, with_length: correlations with the reward that is trained on, and with length.
        with_others: with each objective, in their order; with itself 1.
    """

    name: str
    weight: float | None
    share: float | None
    mean: float
    missing: int
    with_reward: float | None
    with_length: float | None
    with_others: list[float | None]


def read_objectives(dataset: Dataset) -> dict[str, np.ndarray]:
    """The columns `score_NAME` of converted rows by name, (ΣK,) each, NaN for a gap."""
    columns = [column for column in dataset.column_names if column.startswith("score_")]
    values = objective_values(dataset.select_columns([*columns, "rewards"])) if columns else {}
    return {column: np.array([value for row in own for value in row], dtype=float) for column, own in values.items()}


def compare_objectives(
    columns: Mapping[str, np.ndarray],
    weights: Mapping[str, float] | Sequence[float],
    rewards: np.ndarray,
    lengths: np.ndarray,
    counts: np.ndarray,
) -> list[Objective]:
    """Each of several rewards beside the others; none where there is one alone.

    Args:
        columns: `read_objectives`.
        weights: `reward_weights` by name, or in the order of the columns.
        rewards, lengths: (ΣK,).
        counts: (B,) K of each prompt.
    """
    if len(columns) < 2:
        return []
    if not isinstance(weights, Mapping):
        ordered = [column.removeprefix("score_") for column in columns]
        weights = dict(zip(ordered, weights, strict=True)) if len(weights) == len(ordered) else {}
    names = {
        column: next((own for own in weights if column_of(own) == column), column.removeprefix("score_"))
        for column in columns
    }
    shares = _shares([(columns[column], weights[name]) for column, name in names.items() if name in weights], counts)
    weighed = dict(zip([name for name in names.values() if name in weights], shares, strict=True))

    def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
        return _within(x, y, counts)

    return [
        Objective(
            name, weights.get(name), weighed.get(name), float(np.nanmean(values)), int(np.isnan(values).sum()),
            correlation(values, rewards), correlation(values, lengths),
            [correlation(values, other) for other in columns.values()],
        )
        for (column, name), values in zip(names.items(), columns.values(), strict=True)
    ]  # fmt: skip


def _within(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> float | None:
    """`within_correlation` over the completions that have both."""
    there = np.isfinite(x) & np.isfinite(y)
    left = np.add.reduceat(there.astype(int), np.cumsum(counts) - counts)
    return within_correlation(x[there], y[there], left[left > 0]) if there.any() else None


def _shares(weighed: Sequence[tuple[np.ndarray, float]], counts: np.ndarray) -> list[float | None]:
    """Of each term in the variance within prompts of their sum, over prompts that have all of them."""
    if not weighed:
        return []
    terms = np.array([weight * values for values, weight in weighed])
    row = np.repeat(np.arange(len(counts)), counts)
    centred = terms - np.array([np.bincount(row, own) / counts for own in terms])[:, row]
    centred = centred[:, np.isfinite(centred).all(0)]  # a prompt with a gap is NaN throughout
    total = centred.sum(0)
    variance = float(total @ total)
    return [float(own @ total) / variance if variance else None for own in centred]
