"""What a policy's scored answers show, in figures: means and their errors over prompts, wins, diversity."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .intervals import UNKNOWN, Estimate, mean_over_prompts


@dataclass(frozen=True)
class GenerationFigures:
    """What a policy's answers show; means with their standard errors over prompts.

    Args:
        prompts, completions: how many.
        reward: mean reward.
        kl: KL(policy ‖ reference), nats a completion, without bias.
        win_rate: how often an answer's reward is above one of the reference's to the same prompt; a tie is half a win.
            NaN where the reference's answers aren't known.
        tokens: mean length, the end included.
        distinct_1, distinct_2: share of different words and pairs of words among all: low where answers repeat.
        cut: share of answers that `max_new_tokens` cut.
    """

    prompts: int
    completions: int
    reward: Estimate
    kl: Estimate
    win_rate: Estimate
    tokens: Estimate
    distinct_1: float
    distinct_2: float
    cut: float

    def log(self, prefix: str = "") -> dict[str, float]:
        """Flat, as a trainer logs it: `generation/reward`, `generation/reward_error` …"""
        values: dict[str, float] = {}
        for name in ESTIMATES:
            mean, error = getattr(self, name)
            values |= {name: mean, f"{name}_error": error}
        values |= {name: getattr(self, name) for name in ("distinct_1", "distinct_2", "cut")}
        return {f"{prefix}generation/{name}": value for name, value in values.items()}


ESTIMATES = tuple(field.name for field in fields(GenerationFigures) if field.type is Estimate)


def win_rate(own: Sequence[float], reference: Sequence[float]) -> float:
    """How often a reward of `own` is above one of `reference`, over all pairs; a tie is half a win."""
    wins = sum((a > b) + 0.5 * (a == b) for a in own for b in reference)
    return wins / (len(own) * len(reference))


def distinct(texts: Iterable[str], n: int) -> float:
    """distinct-n: different runs of n words among all such runs of the texts; 0 where there is none.

    Source: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", 2016.
    """
    runs = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


def figures_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of `GenerationFigures`, less `win_rate`.

    Args:
        rows: B prompts with lists of K under `rewards`, `kl` (log π − log π_ref), `tokens`, `texts`, `cut`.
    """
    texts = [text for row in rows for text in row["texts"]]
    return {
        "prompts": len(rows), "completions": len(texts),
        **{name: mean_over_prompts(row[key] for row in rows)
           for name, key in (("reward", "rewards"), ("kl", "kl"), ("tokens", "tokens"))},
        "distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2),
        "cut": sum(sum(row["cut"]) for row in rows) / len(texts),
    }  # fmt: skip


def rewards_by_prompt(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Rewards of all answers to each different prompt."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(json.dumps(row["prompt"]), []).extend(row["rewards"])
    return found


def wins_over(own: Mapping[str, list[float]], reference: Mapping[str, list[float]]) -> Estimate:
    """Mean over the prompts that both answered of `win_rate`; NaN where there is none."""
    both = [prompt for prompt in own if prompt in reference]
    return mean_over_prompts([win_rate(own[p], reference[p])] for p in both) if both else UNKNOWN
