"""How well a score orders completions by their rewards: pairs and best-of-K, with length controlled, with intervals.

Every figure is a function of means over prompts of a few numbers per prompt, so that a bootstrap over prompts
resamples those rows and nothing is computed anew.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batching.collator import padded
from ..reward_tensors import better_pairs
from .intervals import Interval

LENGTH_MATCH = 1.1  # completions are of like length where the longer one has at most this many times the other's tokens


@dataclass(frozen=True)
class Completions:
    """What is scored, as padded (B, K) tensors.

    Args:
        rewards: the data's, float64.
        lengths: tokens.
        valid: False where a prompt has fewer completions.
    """

    rewards: Tensor
    lengths: Tensor
    valid: Tensor

    @property
    def mean_rewards(self) -> Tensor:
        """(B,) of a completion chosen at random."""
        return torch.where(self.valid, self.rewards, 0).sum(1) / self.valid.sum(1)

    @property
    def best_rewards(self) -> Tensor:
        """(B,) of the best completion."""
        return self.rewards.masked_fill(~self.valid, -torch.inf).amax(1)

    @classmethod
    def of(cls, rewards: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]) -> "Completions":
        """From B lists of K."""
        return cls(padded(rewards), padded(lengths), padded([[True] * len(row) for row in rewards], torch.bool))


def pair_kinds(data: Completions) -> dict[str, Tensor]:
    """(B, K, K) bool by kind of pair: at [b, i, j] i has the higher reward, and their lengths are as the name says.

    `pairs` are all with unequal rewards, `like_length` those within `LENGTH_MATCH`, `better_longer` and
    `better_shorter` those whose better completion has more tokens, or fewer.
    """
    pairs = better_pairs(data.rewards, data.valid)
    i, j = data.lengths.unsqueeze(2), data.lengths.unsqueeze(1)
    like = torch.maximum(i, j) <= LENGTH_MATCH * torch.minimum(i, j)
    return {
        "pairs": pairs,
        "like_length": pairs & like,
        "better_longer": pairs & (i > j),
        "better_shorter": pairs & (i < j),
    }


def length_residual(scores: Tensor, data: Completions) -> Tensor:
    """Scores less what length explains of them: s − b·T, with b the slope of s on T within prompts, least squares.

        b = Σ (s − s̄_b)(T − T̄_b) / Σ (T − T̄_b)²,   s̄_b and T̄_b the means of a prompt's completions

    Args:
        scores: (B, K).

    Returns:
        (B, K), of the same order within a prompt as the residuals; `scores` where all of a prompt's lengths are equal.
    """
    s, t = _centred(scores, data.valid), _centred(data.lengths, data.valid)
    spread = float((t * t).sum())
    return scores - (float((s * t).sum()) / spread if spread else 0.0) * data.lengths


def _centred(values: Tensor, valid: Tensor) -> Tensor:
    mean = torch.where(valid, values, 0).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
    return torch.where(valid, values - mean, 0)


def _share_right(scores: Tensor, pairs: Tensor) -> Tensor:
    """(B, 2): the share of a prompt's pairs that the score orders as the rewards do, equal scores half; and 1 or 0."""
    difference = scores.unsqueeze(2) - scores.unsqueeze(1)
    right = ((difference > 0).double() + 0.5 * (difference == 0).double()) * pairs
    count = pairs.sum((1, 2))
    return torch.stack([right.sum((1, 2)) / count.clamp(min=1), (count > 0).double()], 1)


def _moments(scores: Tensor, data: Completions) -> Tensor:
    """(B, 6): sums of products of a prompt's centred scores, rewards and lengths, by which a correlation is made."""
    x, y, z = (_centred(values, data.valid) for values in (scores, data.rewards, data.lengths))
    return torch.stack([(a * b).sum(1) for a, b in ((x, x), (y, y), (z, z), (x, y), (x, z), (y, z))], 1)


def _chosen(scores: Tensor, data: Completions) -> tuple[Tensor, Tensor]:
    """(B,) reward and length of the completion with the highest score, of ties their mean."""
    top = data.valid & (scores == scores.masked_fill(~data.valid, -torch.inf).amax(1, keepdim=True))
    rewards, lengths = ((values * top).sum(1) / top.sum(1) for values in (data.rewards, data.lengths))
    return rewards, lengths


def _ratio(means: Tensor) -> Tensor:
    return means[..., 0] / means[..., 1]


def _balanced(means: Tensor) -> Tensor:
    return (_ratio(means[..., :2]) + _ratio(means[..., 2:])) / 2


def _partial(means: Tensor) -> Tensor:
    xx, yy, zz, xy, xz, yz = means.unbind(-1)
    no_length = zz <= 0  # nothing to control for
    explained = torch.where(no_length, 0.0, xz * yz / zz)
    left = [a - torch.where(no_length, 0.0, b * b / zz) for a, b in ((xx, xz), (yy, yz))]
    scale = torch.where((left[0] > 1e-12 * xx) & (left[1] > 1e-12 * yy), left[0] * left[1], torch.nan)
    return (xy - explained) / scale.sqrt()


def ranking_metrics(scores: Tensor, data: Completions) -> dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """The figures of one score, each as numbers per prompt (B, m) and the function of their means that it is.

    - `pairs`, `like_length`, `better_longer`, `better_shorter`: mean over prompts of the share of its pairs of that
      kind (`pair_kinds`) that are ordered right; a prompt without one is left out, an equal score is half right.
    - `balanced`: the mean of `better_longer` and `better_shorter`; what only knows the length has 1/2.
    - `partial`: correlation of score and reward within prompts with length held fixed, −1 to 1:
      (ρ_sr − ρ_sT ρ_rT) / √((1 − ρ_sT²)(1 − ρ_rT²)), from centred values; NaN where length explains one of them whole.
    - `gain`: of what the best completion of each prompt has above the prompt's mean reward, the share that the
      completion with the highest score has: 0 is a choice at random, 1 always the best.
    - `reward`, `tokens`: mean reward and length of the completion with the highest score.

    Args:
        scores: (B, K).
    """
    kinds = pair_kinds(data)
    shares = {name: _share_right(scores, kind) for name, kind in kinds.items()}
    reward, tokens = _chosen(scores, data)
    mean, best = data.mean_rewards, data.best_rewards
    ones = torch.ones_like(mean)
    return {
        **{name: (share, _ratio) for name, share in shares.items()},
        "balanced": (torch.cat([shares["better_longer"], shares["better_shorter"]], 1), _balanced),
        "partial": (_moments(scores, data), _partial),
        "gain": (torch.stack([reward - mean, best - mean], 1), _ratio),
        "reward": (torch.stack([reward, ones], 1), _ratio),
        "tokens": (torch.stack([tokens, ones], 1), _ratio),
    }


def compare_scores(
    scores: Mapping[str, Tensor], data: Completions, baseline: str, resamples: int = 2000, seed: int = 0
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[str, Interval]]]:
    """`ranking_metrics` of several scores with 95 % intervals, and how far each is from a baseline.

    The interval is the 2.5th to 97.5th percentile over resamples of the prompts with replacement, the same ones for
    all scores, so that a difference has an interval of its own. What `length_residual` fitted is not fitted again.

    Args:
        scores: name to (B, K).
        baseline: one of the names.
        resamples: how many.
        seed: of their random numbers.

    Returns:
        By name and figure the values, and those of each name other than the baseline less the baseline's.
    """
    by_score = {name: ranking_metrics(values, data) for name, values in scores.items()}
    columns = torch.cat([numbers for found in by_score.values() for numbers, _ in found.values()], 1)
    prompts = len(columns)
    table, start = resampled_means(columns, resamples, seed), 0
    values: dict[str, dict[str, Tensor]] = {name: {} for name in by_score}
    for name, found in by_score.items():
        for figure, (numbers, function) in found.items():
            values[name][figure] = function(table[:, start : start + numbers.shape[1]])
            start += numbers.shape[1]
    return (
        {name: {figure: percentiles(v, prompts) for figure, v in found.items()} for name, found in values.items()},
        {
            name: {figure: percentiles(v - values[baseline][figure], prompts) for figure, v in found.items()}
            for name, found in values.items()
            if name != baseline
        },
    )


def ratio_intervals(numbers: Mapping[str, Tensor], resamples: int = 2000, seed: int = 0) -> dict[str, Interval]:
    """Σ a / Σ b over prompts of each (B, 2) of `numbers`, with the interval of `compare_scores`."""
    if not numbers:
        return {}
    counts = [int((own[:, 1] > 0).sum()) for own in numbers.values()]
    table = resampled_means(torch.cat([own.double() for own in numbers.values()], 1), resamples, seed)
    return {name: percentiles(_ratio(table[:, 2 * i : 2 * i + 2]), counts[i]) for i, name in enumerate(numbers)}


def resampled_means(columns: Tensor, resamples: int = 2000, seed: int = 0) -> Tensor:
    """(1 + resamples, m) means of `columns` (B, m): of the data themselves first, then of resamples of the prompts."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(columns)
    drawn = (columns[torch.randint(rows, (rows,), generator=generator)].mean(0) for _ in range(resamples))
    return torch.stack([columns.mean(0), *drawn])


def percentiles(values: Tensor, prompts: int) -> Interval:
    """The first of `values`, and the 2.5th to 97.5th percentile of the others, the resamples'."""
    low, high = torch.nanquantile(values[1:], torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return Interval(float(values[0]), low, high, prompts)
