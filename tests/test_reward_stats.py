"""The figures of `nca-align inspect`, against plain loops over prompts."""

import itertools
import math

import numpy as np
import pytest
import torch

from nca_align.commands.inspect.reward_stats import (
    alpha_grid,
    alpha_table,
    binned,
    compare_pairs,
    effective_completions,
    effective_range,
    find_duplicates,
    lengths_by_rank,
    repeated,
    spreads,
    suggest_alpha,
    tied_for_best,
    within_correlation,
)
from nca_align.reward_tensors import targets

COUNTS = np.array([4, 2, 3, 6, 2, 3])


def ragged(seed: int, grades: int | None = 5) -> tuple[np.ndarray, np.ndarray]:
    """Rewards (with many ties where there are few grades) and lengths of the prompts of COUNTS."""
    rng = np.random.default_rng(seed)
    n = COUNTS.sum()
    return (rng.integers(0, grades, n).astype(float) if grades else rng.normal(size=n)), rng.integers(1, 8, n)


def rows(*flat: np.ndarray):
    """Prompt by prompt."""
    ends = np.cumsum(COUNTS)
    return zip(*(np.split(values, ends[:-1]) for values in flat), strict=True)


class TestAlpha:
    @pytest.mark.parametrize("alpha", [0.01, 0.3, 1.0, 30.0])
    def test_effective_number_is_exp_of_the_targets_entropy(self, alpha):
        rewards, _ = ragged(0)
        expected = []
        for (row,) in rows(rewards):
            w = targets(torch.tensor(row)[None], alpha)[0].tolist()
            expected.append(math.exp(-sum(p * math.log(p) for p in w if p > 0)))
        np.testing.assert_allclose(effective_completions(rewards, COUNTS, alpha), expected, rtol=1e-12)

    def test_limits_are_the_tied_best_and_k(self):
        rewards, _ = ragged(1)
        np.testing.assert_allclose(effective_completions(rewards, COUNTS, 1e-6), tied_for_best(rewards, COUNTS))
        np.testing.assert_allclose(effective_completions(rewards, COUNTS, 1e6), COUNTS)
        low, high = effective_range(rewards, COUNTS)
        assert low == tied_for_best(rewards, COUNTS).mean()
        assert high == COUNTS.mean()

    def test_it_never_falls_as_alpha_grows(self):
        rewards, _ = ragged(2, None)
        values = np.stack([effective_completions(rewards, COUNTS, a) for a in np.geomspace(1e-3, 1e3, 50)])
        assert (np.diff(values, axis=0) >= -1e-12).all()

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
    def test_suggestion_has_the_wanted_number_and_scales_with_the_rewards(self, scale):
        rewards, _ = ragged(3, None)
        low, high = effective_range(rewards, COUNTS)
        for part in (0.1, 0.5, 0.9):
            target = low + part * (high - low)
            alpha = suggest_alpha(scale * rewards, COUNTS, target)
            assert effective_completions(scale * rewards, COUNTS, alpha).mean() == pytest.approx(target, rel=0.02)

    @pytest.mark.parametrize("target", [1.0, 4.0, -1.0, math.nan])
    def test_out_of_reach(self, target):
        rewards = np.array([1.0, 1.0, 0.0, 2.0, 1.0, 0.0])
        with pytest.raises(ValueError, match=r"a number above 1.5 \(the completions that tie .* below 3 \(all"):
            suggest_alpha(rewards, np.array([3, 3]), target)

    def test_hard_means_that_the_grades_below_the_best_do_not_count(self):
        rewards = np.array([9.0, 1.0, 5.0, 5.0, 7.0, 7.0, 1.0])  # plain, all equal, a tied best
        counts = np.array([2, 2, 3])
        hard, middle, soft = alpha_table(rewards, counts, [0.1, 3.0, 1000.0])
        assert hard.hard == pytest.approx(2 / 3)
        assert hard.effective == pytest.approx((1 + 2 + 2) / 3)
        assert hard.best == pytest.approx((1 + 0.5 + 0.5) / 3)
        assert hard.hard > middle.hard >= soft.hard == 0

    def test_grid_covers_from_hard_to_uniform_at_any_scale(self):
        rewards, _ = ragged(4, None)
        for scale in (1e-4, 1.0, 1e4):
            first, *_, last = alpha_table(scale * rewards, COUNTS, alpha_grid(scale * rewards, COUNTS))
            low, high = effective_range(rewards, COUNTS)
            assert first.effective < low + 0.1 * (high - low)
            assert last.effective > high - 0.1 * (high - low)
            assert 5 <= len(alpha_grid(scale * rewards, COUNTS)) <= 9

    def test_equal_rewards_everywhere(self):
        rewards, counts = np.ones(4), np.array([2, 2])
        assert spreads(rewards, counts).tolist() == [0, 0]
        assert {row.hard for row in alpha_table(rewards, counts, alpha_grid(rewards, counts))} == {0}


class TestPairs:
    @pytest.mark.parametrize("seed", range(3))
    def test_equals_a_loop(self, seed):
        rewards, lengths = ragged(seed)
        pairs = ties = unequal = right = 0
        longest, chance = [], []
        for r, n in rows(rewards, lengths):
            for i, j in itertools.combinations(range(len(r)), 2):
                pairs += 1
                ties += r[i] == r[j]
                unequal += r[i] != r[j]
                right += 0.5 * (n[i] == n[j] and r[i] != r[j]) + ((r[i] - r[j]) * (n[i] - n[j]) > 0)
            if len(set(r)) > 1:
                top = [i for i in range(len(r)) if n[i] == max(n)]
                longest.append(np.mean([r[i] == max(r) for i in top]))
                chance.append(np.mean(r == max(r)))
        found = compare_pairs(rewards, lengths, COUNTS)
        assert (found.pairs, found.ties) == (pairs, ties)
        assert found.longer_is_better == pytest.approx(right / unequal)
        assert found.longest_is_best == pytest.approx(np.mean(longest))
        assert found.chance == pytest.approx(np.mean(chance))

    def test_a_loop_in_pieces_changes_nothing(self, monkeypatch):
        rewards, lengths = ragged(5)
        whole = compare_pairs(rewards, lengths, COUNTS)
        monkeypatch.setattr("nca_align.commands.inspect.reward_stats._PAIRS_AT_A_TIME", 1)
        assert compare_pairs(rewards, lengths, COUNTS) == whole

    def test_the_longer_always_wins(self):
        rewards, counts = np.array([1.0, 2.0, 3.0, 0.0, 5.0]), np.array([3, 2])
        found = compare_pairs(rewards, rewards, counts)
        assert (found.longer_is_better, found.error, found.longest_is_best) == (1, 0, 1)
        assert compare_pairs(rewards, -rewards, counts).longer_is_better == 0
        assert compare_pairs(rewards, np.ones(5), counts).longer_is_better == 0.5

    def test_error_is_that_of_independent_prompts(self):
        rng = np.random.default_rng(0)
        counts = np.full(400, 4)
        found = [compare_pairs(rng.normal(size=1600), rng.normal(size=1600), counts) for _ in range(60)]
        spread = np.std([f.longer_is_better for f in found])
        assert np.mean([f.error for f in found]) == pytest.approx(spread, rel=0.25)

    def test_no_unequal_pair(self):
        found = compare_pairs(np.ones(4), np.arange(4), np.array([2, 2]))
        assert (found.pairs, found.ties, found.longer_is_better, found.longest_is_best) == (2, 2, None, None)


class TestLengths:
    def test_correlation_is_pearsons_of_what_is_left_within_prompts(self):
        rewards, lengths = ragged(6)
        x = np.concatenate([r - r.mean() for (r,) in rows(rewards)])
        y = np.concatenate([n - n.mean() for (n,) in rows(lengths)])
        assert within_correlation(rewards, lengths, COUNTS) == pytest.approx(np.corrcoef(x, y)[0, 1])

    def test_what_differs_between_prompts_alone_does_not_correlate(self):
        counts = np.array([2, 2, 2])
        rewards, lengths = np.array([1, 2, 11, 12, 21, 22.0]), np.array([2, 1, 102, 101, 202, 201])
        assert np.corrcoef(rewards, lengths)[0, 1] > 0.99
        assert within_correlation(rewards, lengths, counts) == pytest.approx(-1)

    def test_constant_within_prompts_has_none(self):
        counts = np.array([3, 3])
        assert within_correlation(np.array([0.1] * 3 + [0.7] * 3), np.arange(6), counts) is None

    def test_by_rank_is_that_of_the_k_that_most_completions_have(self):
        rewards, counts = np.array([1, 2, 3, 4.0, 0, 0, 9]), np.array([2, 2, 3])
        lengths = np.array([10, 20, 30, 60, 5, 7, 9])
        assert lengths_by_rank(rewards, lengths, counts) == [40, 20]

    def test_equal_rewards_share_their_ranks(self):
        rewards, lengths = np.array([3, 5, 3, 1.0]), np.array([10, 1, 20, 7])
        assert lengths_by_rank(rewards, lengths, np.array([4])) == [1, 15, 15, 7]


class TestDuplicates:
    def test_within_prompts_only(self):
        texts = ["a", "a", "b", "a", "c", "c", "c"]
        found = find_duplicates(texts, np.array([1.0, 2, 3, 1, 5, 5, 5]), np.array([3, 1, 3]))
        assert found == (1 + 2, 2, 1)

    def test_repeated_prompts(self):
        assert repeated(["a", "b", "a", "a", "b", "c"]) == 3


class TestHistogram:
    def test_grades_have_a_bin_each(self):
        edges, counts = binned(np.array([1.0, 1.5, 1.5, 3.0]))
        assert edges.tolist() == [0.75, 1.25, 1.75, 2.25, 2.75, 3.25]
        assert counts.tolist() == [1, 2, 0, 0, 1]

    @pytest.mark.parametrize("values", [[2.0], [2.0, 2.0], [0.1, 0.37, 5.0], list(range(100)), [0.0, 1e-12, 1.0]])
    def test_every_value_is_counted(self, values):
        edges, counts = binned(np.array(values, dtype=float))
        assert counts.sum() == len(values)
        assert len(edges) == len(counts) + 1 <= 25
