"""How a policy's answers differ from its reference's to the same prompts, and whether their length explains it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .intervals import UNKNOWN, Estimate, mean_over_prompts


def gains(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields that `GainMetrics` adds.

    Args:
        rows: of B prompts, with lists of K under `rewards` and `tokens`, and the reference's under `reference`.
    """
    reference = [row["reference"] for row in rows]
    return {
        "reference_reward": mean_over_prompts(answers["rewards"] for answers in reference),
        "reference_tokens": mean_over_prompts(answers["tokens"] for answers in reference),
        "gain": mean_over_prompts([_sums(row)[1]] for row in rows),
        "gain_same_length": gain_at_same_length(rows),
    }


def gain_at_same_length(rows: Sequence[Mapping[str, Any]]) -> Estimate:
    """The gain less what the change in length explains.

        mean_b Δreward_b − s · mean_b Δtokens_b,    s = Σ (tokens − mean)(reward − mean) / Σ (tokens − mean)²

    The sums are over the answers, less the mean of one model's answers to one prompt. So s is what a longer answer gets
    without any training.

    Args:
        rows: as of `gains`.

    Returns:
        The mean, and its standard error by the jackknife over prompts, which counts the error of s. NaN where the
        lengths have changed, but s isn't known: no model's answers to one prompt differ in length.

    Source: an analysis of covariance; Efron and Stein, "The Jackknife Estimate of Variance", 1981.
    """
    sums = np.array([_sums(row) for row in rows])
    if not sums[:, 0].any():  # no length has changed
        return mean_over_prompts(sums[:, 1:2].tolist())
    n, total = len(sums), sums.sum(0)
    if not total[3]:
        return UNKNOWN
    without = total - sums  # each prompt
    if n == 1 or not without[:, 3].all():
        return Estimate(float(_at_same_length(total, n)), math.nan)
    spread = _at_same_length(without.T, n - 1)
    error = math.sqrt((n - 1) * float(np.var(spread)))
    return Estimate(float(_at_same_length(total, n)), error)


def _at_same_length(sums: np.ndarray, n: int) -> np.ndarray:
    tokens, rewards, product, square = sums
    return (rewards - tokens * product / square) / n


def _sums(row: Mapping[str, Any]) -> tuple[float, ...]:
    """Δ mean tokens and Δ mean reward of a prompt; Σ (tokens − mean)(reward − mean) and Σ (tokens − mean)²."""
    own, other = (np.array([answers["tokens"], answers["rewards"]], float) for answers in (row, row["reference"]))
    tokens, rewards = np.hstack([answers - answers.mean(1, keepdims=True) for answers in (own, other)])
    return *(own.mean(1) - other.mean(1)).tolist(), float(tokens @ rewards), float(tokens @ tokens)
