"""Rewards of steps out of those of tokens: where steps begin, answers by vote, and the first step that is wrong."""

import re
from bisect import bisect_right
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import exp
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidRowError
from .intervals import Interval, mean_and_interval
from .ranking import percentiles, resampled_means

_TAG = re.compile(r"</?[^\W\d][\w:|-]*>")


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; "" where a later one completes its character."""
    texts: list[str] = []
    start = done = 0  # what is read again before each token, since the first token of a text may lose its space

    def decode(end: int) -> str:
        return tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)

    for end in range(1, len(ids) + 1):
        text = decode(end)
        if text.endswith("�") and end < len(ids) and end - done < 4:  # no character has more bytes
            texts.append("")
            continue
        texts.append(text[len(decode(done)) :])
        start, done = done, end
    return texts


def marked_starts(text: str, marker: str) -> list[int]:
    """The characters at which steps begin that end in `marker`, "\\n" for lines.

    A step is never blank. Nor is it a tag alone, such as templates put around a thought or a call. An opening tag
    begins the step after it, and a closing one ends the step before.
    """
    starts, opened = [], None
    ends = [match.end() for match in re.finditer(re.escape(marker), text)]
    for begin, end in pairwise([0, *ends, len(text)]):
        words = text[begin:end].replace(marker, " " * len(marker))
        if not words.strip():
            continue
        place = begin + len(words) - len(words.lstrip())
        if not _TAG.sub("", words).strip():
            closes = _TAG.findall(words)[-1].startswith("</")
            opened = None if closes else place if opened is None else opened
            continue
        starts.append(place if opened is None else opened)
        opened = None
    return starts or [0]


def marked_starts_of_turns(turns: Iterable[str], marker: str) -> list[int]:
    """`marked_starts` of the texts of turns, one after another: each that isn't blank begins a step."""
    starts, place = [], 0
    for text in turns:
        if text.strip():
            starts += [place, *(place + start for start in marked_starts(text, marker)[1:])]
        place += len(text)
    return starts or [0]


def given_starts(text: str, steps: Sequence[str], field: str) -> list[int]:
    """The characters at which the texts of `steps` begin in a completion, in their order.

    Raises:
        InvalidRowError: a step is blank, or isn't found behind those before it.
    """
    starts, end = [], 0
    for j, step in enumerate(steps):
        wanted = step.strip() if isinstance(step, str) else ""
        start = text.find(wanted, end) if wanted else -1
        if start < 0:
            raise InvalidRowError(
                f"`{field}[{j}]` is {step!r}, which does not stand in the completion after the step before it. Write "
                "it as it is there. Where the completion is cut, raise `max_length`"
            )
        starts.append(start)
        end = start + len(wanted)
    if not starts:
        raise InvalidRowError(f"`{field}` is empty; a completion has at least one step")
    return starts


def steps_of_tokens(texts: Sequence[str], starts: Sequence[int]) -> list[int]:
    """The step of each token, from 0: that in which its first visible character stands.

    White space and special tokens, whose text is "" here, belong to the step before them.

    Args:
        texts: T, what each token adds.
        starts: the character at which each step begins.
    """
    steps: list[int] = []
    places = accumulate(map(len, texts), initial=0)
    for text, place in zip(texts, places, strict=False):
        if visible := text.strip():
            steps.append(max(0, bisect_right(starts, place + text.index(visible)) - 1))
        else:
            steps.append(steps[-1] if steps else 0)
    return steps


def step_rewards(token_rewards: Tensor, steps: Sequence[int], count: int) -> Tensor:
    """(count,) float64 sums of the rewards of each step's tokens, whose sum is the completion's reward.

    A step that begins within the last step's token has none of its own, and 0.
    """
    sums = torch.zeros(count, dtype=torch.float64)
    return sums.index_add(0, torch.tensor(steps, dtype=torch.long), token_rewards.double())


# Answers


def best_of_k(scores: Sequence[float], rewards: Sequence[float]) -> float:
    """Reward of the completion with the highest score, of ties their mean."""
    return fmean(reward for score, reward in zip(scores, rewards, strict=True) if score == max(scores))


def vote(answers: Sequence[Hashable | None], weights: Sequence[float], rewards: Sequence[float]) -> float:
    """Reward of the answer with the most weight, of ties their mean; the mean over the completions that give it.

    A completion without an answer, None, stands for itself alone.

    Args:
        answers, weights, rewards: of the K completions; weights of 1 are a majority.
    """
    voters: dict[Hashable, list[int]] = {}
    for k, answer in enumerate(answers):
        voters.setdefault((k,) if answer is None else ("", answer), []).append(k)
    sums = [sum(weights[k] for k in own) for own in voters.values()]
    means = [fmean(rewards[k] for k in own) for own in voters.values()]
    return best_of_k(sums, means)


def choose_answers(
    whole: Sequence[Sequence[float]],
    least: Sequence[Sequence[float]] | None,
    answers: Sequence[Sequence[Hashable]] | None,
    rewards: Sequence[Sequence[float]],
) -> dict[str, Interval]:
    """Mean reward of the answer that each way chooses, with 95 % t-intervals over prompts.

    `best of K` is the completion with the highest score, the sum of its steps or the least of them; a vote weighs each
    completion by σ of that score, and `majority` alike.

    Args:
        whole, least: B lists of K scores.
        answers: B lists of K, or None for no votes.
        rewards: B lists of K.
    """
    scores = {"sum of steps": whole} | ({} if least is None else {"least step": least})
    chosen = {"at random": [fmean(own) for own in rewards]}
    for name, values in scores.items():
        chosen[f"best of K, {name}"] = [best_of_k(*pair) for pair in zip(values, rewards, strict=True)]
    if answers is not None:
        weights = {"majority": [[1.0] * len(own) for own in rewards]}
        weights |= {
            f"vote by {name}": [[_sigmoid(x) for x in own] for own in values] for name, values in scores.items()
        }
        for name, own in weights.items():
            chosen[name] = [vote(*row) for row in zip(answers, own, rewards, strict=True)]
    chosen["the best"] = [max(own) for own in rewards]
    return {name: mean_and_interval(values) for name, values in chosen.items()}


def _sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x)) if x > -700 else 0.0


# The first wrong step


def first_below(rewards: Sequence[float], threshold: float) -> int:
    """The first step whose reward is below the threshold, from 0; −1 where none is."""
    return next((j for j, reward in enumerate(rewards) if reward < threshold), -1)


@dataclass(frozen=True)
class FirstErrors:
    """How well the first wrong steps are found.

    Args:
        wrong, right: share of the wrong solutions whose first wrong step is found, and of the right ones in which none
            is. NaN where there are none.
        f1: their harmonic mean.
        counts: of wrong and of right solutions.
    """

    wrong: Interval
    right: Interval
    f1: Interval
    counts: tuple[int, int]


def f1_of_first_errors(rewards: Collection[Sequence[float]], labels: Sequence[int], threshold: float) -> FirstErrors:
    """ProcessBench's F1, with bootstrap intervals over solutions.

        F1 = 2 a b / (a + b),    a, b: accuracies of `first_below` on wrong and on right solutions

    Args:
        rewards: N solutions' step rewards.
        labels: the first wrong step of each, from 0; −1 for none.
        threshold: τ.

    Source: arXiv 2412.06559 (ProcessBench).
    """
    hits = torch.tensor([first_below(own, threshold) == label for own, label in zip(rewards, labels, strict=True)])
    wrong = torch.tensor(labels) >= 0
    columns = torch.stack([hits & wrong, wrong, hits & ~wrong, ~wrong], 1).double()
    means = resampled_means(columns)
    a, b = means[:, 0] / means[:, 1], means[:, 2] / means[:, 3]
    n = len(labels)
    return FirstErrors(
        percentiles(a, n), percentiles(b, n), percentiles(_harmonic(a, b), n), (int(wrong.sum()), int((~wrong).sum()))
    )


def _harmonic(a: Tensor, b: Tensor) -> Tensor:
    """The harmonic mean of two shares, 0 where both are, NaN where one is."""
    return torch.where(a + b == 0, 0.0, 2 * a * b / (a + b))


def best_threshold(rewards: Collection[Sequence[float]], labels: Sequence[int]) -> float:
    """The τ with the highest F1 on these solutions: the middle of the widest stretch of τ that has it.

    A solution is judged right for τ in one interval (low, high]: high is the least reward before its first wrong step
    (of all where none is wrong), low that step's own. F1 changes at the ends of these intervals alone.

    Args:
        rewards, labels: as of `f1_of_first_errors`, with wrong and right solutions among them.
    """
    lows, highs, wrong = [], [], []
    for own, label in zip(rewards, labels, strict=True):
        lows.append(own[label] if label >= 0 else -torch.inf)
        highs.append(min(own[:label] if label >= 0 else own, default=torch.inf))
        wrong.append(label >= 0)
    low, high, of = torch.tensor(lows).double(), torch.tensor(highs).double(), torch.tensor(wrong)
    ends = torch.cat([low, high])
    ends = ends[ends.isfinite()].unique()
    places = torch.cat([ends[:1] - 1, (ends[:-1] + ends[1:]) / 2, ends[-1:] + 1])  # one in each stretch
    widths = torch.cat([torch.zeros(1), ends[1:] - ends[:-1], torch.zeros(1)])
    accuracies = []
    for side in (of, ~of):
        own_low, own_high = low[side], high[side]
        right = own_low < own_high  # else no τ finds it
        begun = torch.searchsorted(own_low[right].sort()[0], places)
        ended = torch.searchsorted(own_high[right].sort()[0], places)
        accuracies.append((begun - ended) / side.sum())
    a, b = accuracies
    f1 = _harmonic(a, b)
    best = f1 == f1.max()
    return float(places[int(widths.where(best, -1.0).argmax())])
