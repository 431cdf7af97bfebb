"""What rewarded completions look like before training: pure functions on flat arrays, K values a prompt in a row.

`counts` (B,) holds each prompt's K, which may differ; `rewards` and `lengths` (ΣK,) hold the completions' values, one
prompt after the other.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...reward_tensors import everywhere, target_distribution

# exp(H) up to which a target counts as hard, for each completion that ties for the best: the others share 1 % or so
HARD = 1.05
_PAIRS_AT_A_TIME = 1 << 23


def per_prompt(function: Callable[..., np.ndarray | Tensor], counts: np.ndarray, *flat: np.ndarray) -> np.ndarray:
    """(B,) what `function` makes of each prompt's values, which it gets as matrices (prompts, K) of one K.

    It gets so many prompts at a time as bound the memory.
    """
    output = np.empty(len(counts))
    for k in np.unique(counts):
        rows, there = np.flatnonzero(counts == k), np.repeat(counts == k, counts)
        matrices = [values[there].reshape(-1, k) for values in flat]
        step = max(1, _PAIRS_AT_A_TIME // k**2)
        for first in range(0, len(rows), step):
            some = slice(first, first + step)
            output[rows[some]] = function(*(values[some] for values in matrices))
    return output


def as_training_sees(rewards: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(ΣK,) float64 `rewards` that tie where training's do: it holds the differences to a prompt's best in float32."""
    best = np.repeat(np.maximum.reduceat(rewards, np.cumsum(counts) - counts), counts)
    return best + (rewards - best).astype(np.float32)


def spreads(rewards: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(B,) highest minus lowest reward of each prompt; 0 where all are equal."""
    return per_prompt(lambda r: np.ptp(r, axis=1), counts, rewards)


def tied_for_best(rewards: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(B,) how many completions have the highest reward; what `effective_completions` comes to as α goes to 0."""
    return per_prompt(lambda r: _highest(r).sum(1), counts, rewards)


def _highest(values: np.ndarray) -> np.ndarray:
    return values == values.max(1, keepdims=True)


def effective_completions(rewards: np.ndarray, counts: np.ndarray, alpha: float) -> np.ndarray:
    """How many completions the target of each prompt spreads over: 1 where one has all weight, K where all have alike.

        exp(H(w)),  w = softmax(rewards / α),  H(w) = −Σ_i w_i log w_i

    Args:
        rewards: (ΣK,), finite.
        counts: (B,), 1 or more each.
        alpha: above 0, in the unit of the rewards.

    Returns:
        (B,) float64, from the number that tie for the best (α → 0) to K (α → ∞), never falling as α grows.
    """
    return per_prompt(lambda r: torch.special.entr(_weights(r, alpha)).sum(1).exp(), counts, rewards)


def _weights(rewards: np.ndarray, alpha: float) -> Tensor:
    rows = torch.from_numpy(rewards)
    return target_distribution(rows, alpha, everywhere(rows, None))


class AlphaRow(NamedTuple):
    """One line of the α table.

    Args:
        alpha: α.
        effective: `effective_completions`, the mean over prompts.
        hard: share of the prompts whose target is hard: the worse completions have next to no weight, so that their
            grades don't count. Prompts whose rewards are all equal are none of them: they have no worse completion.
        best: weight of the best completion, the mean over prompts.
    """

    alpha: float
    effective: float
    hard: float
    best: float


def alpha_table(rewards: np.ndarray, counts: np.ndarray, alphas: Sequence[float]) -> list[AlphaRow]:
    """What each α makes of these rewards."""
    best_ties, spread = tied_for_best(rewards, counts), spreads(rewards, counts)
    table = []
    for alpha in alphas:
        effective = effective_completions(rewards, counts, alpha)
        weight = per_prompt(lambda r, alpha=alpha: _weights(r, alpha).amax(1), counts, rewards)
        hard = (effective < HARD * best_ties) & (spread > 0)
        table.append(AlphaRow(alpha, float(effective.mean()), float(hard.mean()), float(weight.mean())))
    return table


def alpha_grid(rewards: np.ndarray, counts: np.ndarray) -> list[float]:
    """1 and 3 of each decade in which α matters for these rewards: from hard targets to nearly uniform ones."""
    spread = spreads(rewards, counts)
    typical = float(spread[spread > 0].mean()) if spread.any() else 1.0
    first, last = math.floor(math.log10(typical / 30)), math.ceil(math.log10(typical * 3))
    return [float(f"{digit}e{decade}") for decade in range(first, last) for digit in (1, 3)] + [float(f"1e{last}")]


def effective_range(rewards: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """The mean effective number of completions as α goes to 0, and as it goes to infinity."""
    return float(tied_for_best(rewards, counts).mean()), float(counts.mean())


def suggest_alpha(rewards: np.ndarray, counts: np.ndarray, target: float) -> float:
    """The α at which the mean effective number of completions is `target`, rounded to two digits.

    Raises:
        ValueError: no α reaches `target`, which lies outside `effective_range`.
    """
    low, high = effective_range(rewards, counts)
    if not low < target < high:
        raise UserError(
            f"`target_effective` is {target:g}, which these rewards don't allow. Choose a number above {low:.3g} (the "
            f"completions that tie for the best) and below {high:.3g} (all of them)."
        )
    spread = spreads(rewards, counts)
    alphas = np.geomspace(spread[spread > 0].min() * 1e-3, spread.max() * 1e3, 100_000)
    place = bisect_left(  # the mean never falls as α grows
        alphas, target, hi=len(alphas) - 1, key=lambda alpha: effective_completions(rewards, counts, alpha).mean()
    )
    return float(f"{alphas[place]:.2g}")


@dataclass(frozen=True)
class Pairs:
    """Pairs of completions within prompts, and what a baseline that knows their lengths alone makes of them.

    Args:
        pairs, ties: all of them, and those with equal rewards.
        longer_is_better: share of the unequal pairs in which the longer completion has the higher reward (equal lengths
            count half); None where there is no unequal pair. 0.5 is no bias.
        error: its standard error, prompts being what is independent.
        longest_is_best: share of the prompts with unequal rewards whose longest completion is one of the best.
        chance: the same share for a completion drawn at random.
    """

    pairs: int
    ties: int
    longer_is_better: float | None
    error: float
    longest_is_best: float | None
    chance: float

    @property
    def biased(self) -> bool:
        """Whether length alone orders clearly more or fewer of the unequal pairs right than half."""
        return self.longer_is_better is not None and abs(self.longer_is_better - 0.5) > max(0.05, 2 * self.error)


def compare_pairs(rewards: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> Pairs:
    """All pairs of completions within prompts, by rewards and by lengths."""

    def above(values: np.ndarray) -> np.ndarray:
        return values[:, :, None] > values[:, None, :]  # (prompts, K, K)

    def right_by_length(r: np.ndarray, n: np.ndarray) -> np.ndarray:
        return (above(r) * (above(n) + 0.5 * (n[:, :, None] == n[:, None, :]))).sum((1, 2))

    unequal = per_prompt(lambda r: above(r).sum((1, 2)), counts, rewards)
    right = per_prompt(right_by_length, counts, rewards, lengths)
    longest = per_prompt(lambda r, n: (_highest(r) & _highest(n)).sum(1) / _highest(n).sum(1), counts, rewards, lengths)
    chance = tied_for_best(rewards, counts) / counts
    pairs, total, graded = int((counts * (counts - 1) // 2).sum()), unequal.sum(), unequal > 0
    if not total:
        return Pairs(pairs, pairs, None, 0.0, None, 0.0)
    share = right.sum() / total
    error = np.sqrt(np.square(right - share * unequal).sum()) / total
    return Pairs(
        pairs, pairs - int(total), float(share), float(error),
        float(longest[graded].mean()), float(chance[graded].mean()),
    )  # fmt: skip


def within_correlation(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> float | None:
    """Pearson correlation of `x` and `y` (ΣK,) within prompts: each less its prompt's mean. None where one is constant.

    The plain correlation would mix in that some prompts ask for long answers, about which the loss knows nothing.
    """
    row = np.repeat(np.arange(len(counts)), counts)

    def centred(values: np.ndarray) -> np.ndarray:
        left = values - (np.bincount(row, values) / counts)[row]
        return np.where(np.abs(left) > 1e-12 * np.abs(values).max(), left, 0)  # the means are rounded

    x, y = centred(x.astype(float)), centred(y.astype(float))
    scale = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale else None


def lengths_by_rank(rewards: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> list[float]:
    """Mean length of the best completion, the second, and so on; completions with equal rewards share their ranks.

    Over the prompts of one K, the one that most completions have.
    """
    common = (np.bincount(counts) * np.arange(counts.max() + 1)).argmax()
    there = np.repeat(counts == common, counts)
    r, n = rewards[there].reshape(-1, common), lengths[there].reshape(-1, common)
    alike = (r == of_rank[:, None] for of_rank in -np.sort(-r).T)
    return [float(((n * tied).sum(1) / tied.sum(1)).mean()) for tied in alike]


class Duplicates(NamedTuple):
    """Completions that another of the same prompt equals: `completions` beyond the first, in how many `prompts`, and
    of those prompts the ones where equal completions have unequal `rewards`."""

    completions: int
    prompts: int
    unequal_rewards: int


def find_duplicates(completions: Sequence[Hashable], rewards: np.ndarray, counts: np.ndarray) -> Duplicates:
    """Equal completions within prompts; `completions` (ΣK) are compared as they are."""
    extra = prompts = unequal = 0
    scored = zip(completions, rewards.tolist(), strict=True)
    for k in counts.tolist():
        row = list(islice(scored, k))
        different = len({completion for completion, _ in row})
        extra += k - different
        prompts += different < k
        unequal += len(set(row)) > different
    return Duplicates(extra, prompts, unequal)


def repeated(prompts: Sequence[Hashable]) -> int:
    """How many rows have a prompt that an earlier row has."""
    return len(prompts) - len(set(prompts))


def binned(values: np.ndarray, bins: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Edges (n + 1,) of bins and counts (n,) between them; a few evenly spaced values (grades) get one bin each."""
    unique = np.unique(values)
    if 1 < len(unique) <= bins:
        steps = np.diff(unique)
        units = (unique - unique[0]) / steps.min()
        if np.allclose(units, np.round(units), atol=0.05) and units[-1] < bins:
            edges = unique[0] + steps.min() * (np.arange(round(units[-1]) + 2) - 0.5)
            return edges, np.histogram(values, edges)[0]
    bins, low, high = min(bins, max(1, len(values))), float(values.min()), float(values.max())
    room = bins * np.spacing(max(abs(low), abs(high)))  # narrower ones have no edges between them
    if high - low < room:
        low, high = low - max(0.5, room), high + max(0.5, room)
    counts, edges = np.histogram(values, bins, (low, high))
    return edges, counts
