"""Pairs, best-of-K and their length controls: identities, a plain loop as the reference, the bootstrap's coverage."""

import math

import pytest
import torch

from nca_align.evaluation.ranking import (
    Completions,
    compare_scores,
    length_residual,
    padded,
    pair_kinds,
    ranking_metrics,
)


def ragged(prompts: int = 40, seed: int = 0, levels: int = 4):
    """Rewards, lengths and scores of 2 to 5 completions a prompt, with ties in rewards."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, 6, (prompts,), generator=generator).tolist()
    rewards = [torch.randint(levels, (k,), generator=generator).double().tolist() for k in sizes]
    lengths = [torch.randint(1, 40, (k,), generator=generator).tolist() for k in sizes]
    scores = [torch.randn(k, generator=generator, dtype=torch.float64).tolist() for k in sizes]
    return rewards, lengths, scores


def values(scores, data: Completions) -> dict[str, float]:
    return {
        name: float(function(numbers.mean(0))) for name, (numbers, function) in ranking_metrics(scores, data).items()
    }


def correlation(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def by_loop(rewards, lengths, scores) -> dict[str, float]:
    """Every figure by its definition, one completion after the other."""
    shares = {"pairs": [], "like_length": [], "better_longer": [], "better_shorter": []}
    gains, room, picked, tokens = 0.0, 0.0, [], []
    centred = {"s": [], "r": [], "t": []}
    for r, t, s in zip(rewards, lengths, scores, strict=True):
        found = {name: [] for name in shares}
        for i in range(len(r)):
            for j in range(len(r)):
                if r[i] > r[j]:
                    right = 1.0 if s[i] > s[j] else 0.5 if s[i] == s[j] else 0.0
                    found["pairs"].append(right)
                    if max(t[i], t[j]) <= 1.1 * min(t[i], t[j]):
                        found["like_length"].append(right)
                    if t[i] != t[j]:
                        found["better_longer" if t[i] > t[j] else "better_shorter"].append(right)
        for name, right in found.items():
            if right:
                shares[name].append(sum(right) / len(right))
        top = [k for k in range(len(s)) if s[k] == max(s)]
        picked.append(sum(r[k] for k in top) / len(top))
        tokens.append(sum(t[k] for k in top) / len(top))
        gains += picked[-1] - sum(r) / len(r)
        room += max(r) - sum(r) / len(r)
        for name, row in (("s", s), ("r", r), ("t", t)):
            centred[name] += [value - sum(row) / len(row) for value in row]
    result = {name: sum(many) / len(many) for name, many in shares.items()}
    result["balanced"] = (result["better_longer"] + result["better_shorter"]) / 2
    sr, st, rt = (correlation(centred[a], centred[b]) for a, b in ("sr", "st", "rt"))
    result["partial"] = (sr - st * rt) / math.sqrt((1 - st**2) * (1 - rt**2))
    mean = lambda many: sum(many) / len(many)  # noqa: E731
    return result | {"gain": gains / room, "reward": mean(picked), "tokens": mean(tokens)}


def test_figures_equal_their_definitions():
    rewards, lengths, scores = ragged()
    scores[0] = [0.0] * len(scores[0])  # ties of the score as well
    assert values(padded(scores), Completions.of(rewards, lengths)) == pytest.approx(by_loop(rewards, lengths, scores))


def test_the_rewards_themselves_are_always_right():
    rewards, lengths, _ = ragged()
    found = values(padded(rewards), Completions.of(rewards, lengths))
    for name in ("pairs", "like_length", "better_longer", "better_shorter", "balanced", "partial", "gain"):
        assert found[name] == pytest.approx(1)
    against = values(-padded(rewards), Completions.of(rewards, lengths))
    assert against["pairs"] == 0
    assert against["partial"] == pytest.approx(-1)


def test_a_score_that_knows_nothing_is_at_chance():
    rewards, lengths, _ = ragged()
    data = Completions.of(rewards, lengths)
    found = values(torch.zeros_like(data.rewards), data)
    assert found["pairs"] == found["like_length"] == found["balanced"] == 0.5
    assert found["gain"] == pytest.approx(0)
    assert math.isnan(found["partial"])


def test_length_alone_is_nothing_once_length_is_controlled():
    """Rewards that follow length: the length is right nearly always, and at chance under every control."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(50, 400, (400, 4), generator=generator)
    rewards = lengths + 100 * torch.randn(400, 4, generator=generator)
    data = Completions.of(rewards.tolist(), lengths.tolist())
    length = values(data.lengths, data)
    assert length["pairs"] > 0.75
    assert length["gain"] > 0.5
    assert length["balanced"] == 0.5  # by its definition
    assert math.isnan(length["partial"])
    assert abs(length["like_length"] - 0.5) < 0.06
    noise = 50 * torch.randn(400, 4, generator=generator, dtype=torch.float64)
    follows = data.lengths + noise  # knows the length and nothing else
    assert values(follows, data)["pairs"] > 0.7
    assert abs(values(follows, data)["partial"]) < 0.06
    assert abs(values(length_residual(follows, data), data)["pairs"] - 0.5) < 0.05


def test_a_score_without_length_does_not_follow_length():
    rewards, lengths, scores = ragged()
    data = Completions.of(rewards, lengths)
    score = padded(scores) + 0.3 * data.lengths
    left = values(length_residual(score, data), Completions(data.lengths, data.rewards, data.valid))
    rank = length_residual(score, data)
    centred = [row[ok] - row[ok].mean() for row, ok in zip(rank, data.valid, strict=True)]
    lengths_centred = [row[ok] - row[ok].mean() for row, ok in zip(data.lengths, data.valid, strict=True)]
    assert float(torch.cat(centred) @ torch.cat(lengths_centred)) == pytest.approx(0, abs=1e-8)
    assert abs(left["pairs"] - 0.5) < 0.1
    same = Completions.of([[0.0, 1.0]], [[5, 5]])
    assert torch.equal(length_residual(padded([[1.0, 2.0]]), same), padded([[1.0, 2.0]]))


def test_lengths_that_are_all_alike_need_no_control():
    data = Completions.of([[0.0, 1.0, 2.0], [1.0, 0.0]], [[7, 7, 7], [7, 7]])
    score = padded([[0.1, 0.5, 0.2], [0.3, 0.1]])
    x, y = [-1 / 6, 7 / 30, -1 / 15, 0.1, -0.1], [-1, 0, 1, 0.5, -0.5]
    found = values(score, data)
    assert found["partial"] == pytest.approx(correlation(x, y))
    assert found["like_length"] == found["pairs"]
    assert math.isnan(found["balanced"])


def test_the_order_of_completions_changes_nothing():
    rewards, lengths, scores = ragged()
    turned = [[row[::-1] for row in rows] for rows in (rewards, lengths, scores)]
    a = values(padded(scores), Completions.of(rewards, lengths))
    b = values(padded(turned[2]), Completions.of(*turned[:2]))
    assert a == pytest.approx(b)


def test_kinds_of_pairs():
    kinds = pair_kinds(Completions.of([[3.0, 1.0, 1.0]], [[110, 100, 200]]))
    assert {name: int(kind.sum()) for name, kind in kinds.items()} == {
        "pairs": 2, "like_length": 1, "better_longer": 1, "better_shorter": 1,
    }  # fmt: skip


def test_intervals_have_the_width_of_the_standard_error():
    rewards, lengths, scores = ragged(200)
    data = Completions.of(rewards, lengths)
    found, _ = compare_scores({"s": padded(scores), "t": data.lengths}, data, "t")
    value, low, high, _ = found["s"]["reward"]
    picked = torch.tensor([r[max(range(len(s)), key=s.__getitem__)] for r, s in zip(rewards, scores, strict=True)])
    error = float(picked.std() / math.sqrt(200))
    assert value == pytest.approx(float(picked.mean()))
    assert (high - low) / (2 * 1.96) == pytest.approx(error, rel=0.1)
    assert low < value < high


def test_intervals_cover_the_truth_as_often_as_they_say():
    """A score that is right in 70 % of the pairs, 200 data sets of 60 prompts."""
    covered = 0
    for seed in range(200):
        right = (torch.rand(60, generator=torch.Generator().manual_seed(seed)) < 0.7).double()
        data = Completions.of([[1.0, 0.0]] * 60, [[1, 2]] * 60)
        score = torch.stack([right, 0.5 * torch.ones(60, dtype=torch.float64)], 1)
        found, _ = compare_scores({"s": score}, data, "s", resamples=200, seed=seed)
        covered += found["s"]["pairs"].low <= 0.7 <= found["s"]["pairs"].high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_difference_has_the_interval_of_the_same_resamples():
    rewards, lengths, scores = ragged()
    data = Completions.of(rewards, lengths)
    found, less = compare_scores({"a": padded(scores), "b": padded(scores) * 2, "c": data.lengths}, data, "b")
    assert set(less) == {"a", "c"}
    assert less["a"]["pairs"][:3] == (0, 0, 0)  # the same order on the same prompts
    assert less["c"]["pairs"].mean == pytest.approx(found["c"]["pairs"].mean - found["b"]["pairs"].mean)
    again, _ = compare_scores({"a": padded(scores), "b": padded(scores) * 2, "c": data.lengths}, data, "b")
    assert again["a"]["pairs"] == found["a"]["pairs"]
