"""How much better a policy's answers are than its reference's, and whether length explains it."""

import math
from statistics import fmean, stdev

import numpy as np
import pytest

from nca_align.evaluation.gains import gain_at_same_length, gains
from nca_align.evaluation.intervals import mean_over_prompts


def drawn(n: int, gain: float, slope: float, longer: float, seed: int = 0, k: int = 4) -> list[dict]:
    """Rewards a_b + slope · tokens + noise, the policy's answers `longer` by so many tokens and better by `gain`."""
    random = np.random.default_rng(seed)

    def answers(base: float, better: float, more: float) -> dict:
        tokens = random.normal(40 + more, 8, k)
        return {
            "tokens": tokens.tolist(),
            "rewards": (base + better + slope * tokens + random.normal(0, 0.2, k)).tolist(),
        }

    bases = random.normal(0, 1, n)
    return [answers(base, gain, longer) | {"reference": answers(base, 0, 0)} for base in bases]


def test_the_gain_is_paired_over_prompts():
    rows = drawn(12, 0.3, 0.0, 0.0)
    found = gains(rows)
    differences = [fmean(row["rewards"]) - fmean(row["reference"]["rewards"]) for row in rows]
    assert found["gain"].mean == pytest.approx(fmean(differences))
    assert found["gain"].error == pytest.approx(stdev(differences) / math.sqrt(12))
    assert found["reference_reward"] == mean_over_prompts(row["reference"]["rewards"] for row in rows)
    assert found["reference_tokens"] == mean_over_prompts(row["reference"]["tokens"] for row in rows)


@pytest.mark.parametrize(("gain", "longer"), [(0.3, 15.0), (0.0, 15.0), (0.3, -15.0)])
def test_what_length_gives_is_taken_off(gain, longer):
    rows = drawn(400, gain, 0.02, longer)
    found = gains(rows)
    assert found["gain"].mean == pytest.approx(gain + 0.02 * longer, abs=0.05)
    same = found["gain_same_length"]
    assert abs(same.mean - gain) < 4 * same.error
    assert same.error < 0.02


def test_its_error_is_how_far_it_spreads_over_data_sets():
    many = [gain_at_same_length(drawn(30, 0.3, 0.02, 15.0, seed)) for seed in range(300)]
    assert fmean(one.error for one in many) == pytest.approx(stdev(one.mean for one in many), rel=0.15)


def test_it_is_the_regression_with_a_mean_for_each_model_and_prompt():
    rows = drawn(5, 0.3, 0.02, 15.0)
    answers = [own for row in rows for own in (row, row["reference"])]
    columns = [[float(i == j) for j in range(10)] + [t] for i, own in enumerate(answers) for t in own["tokens"]]
    rewards = [reward for own in answers for reward in own["rewards"]]
    means = np.linalg.lstsq(np.array(columns), np.array(rewards), rcond=None)[0][:10]  # less slope · tokens
    assert gain_at_same_length(rows).mean == pytest.approx(fmean(means[0::2]) - fmean(means[1::2]))


def test_what_the_answers_do_not_tell():
    alike = {"tokens": [5, 5], "rewards": [1.0, 0.0]}
    same = gain_at_same_length([{"tokens": [5, 5], "rewards": [2.0, 1.0], "reference": alike}] * 3)
    assert same == (1.0, 0.0)  # no length has changed
    longer = gain_at_same_length([{"tokens": [9, 9], "rewards": [2.0, 1.0], "reference": alike}] * 3)
    assert all(map(math.isnan, longer))  # it has, and no two answers show what that is worth
    one = gain_at_same_length(drawn(1, 0.3, 0.02, 15.0))
    assert math.isfinite(one.mean)
    assert math.isnan(one.error)
