"""Curves and intervals: exact where they are measured, between that a line in √KL, and Student's t against scipy."""

import math
import random
import statistics

import pytest
from scipy import stats

from nca_align.evaluation.comparison_rows import COMPARED, final_values, over_steps, runs_of, setting_name, setting_of
from nca_align.evaluation.frontier import Curve, curves_of, reward_at_kl
from nca_align.evaluation.intervals import UNKNOWN, Estimate, Interval, mean_and_interval, t_quantile


def rising(seed: int, n: int = 6) -> Curve:
    """A run whose KL and reward only rise."""
    draw = random.Random(seed)
    kl = reward = 0.0
    points = [(0, 0.0, 0.386)]
    for i in range(1, n):
        kl, reward = kl + draw.random() + 0.01, reward + draw.random()
        points.append((10 * i, kl, 0.386 + reward))
    return Curve(str(seed), tuple(points))


@pytest.mark.parametrize("seed", range(5))
def test_interpolation_is_exact_at_evaluations_and_monotone_between(seed):
    curve = rising(seed)
    assert [reward_at_kl(curve, kl) for _, kl, _ in curve.points] == [reward for _, _, reward in curve.points]
    grid = [curve.points[-1][1] * (i / 200) for i in range(201)]
    values = [reward_at_kl(curve, kl) for kl in grid]
    assert values == sorted(values)
    for (_, a, low), (_, b, high) in zip(curve.points, curve.points[1:], strict=False):
        assert reward_at_kl(curve, (a**0.5 + b**0.5) ** 2 / 4) == pytest.approx((low + high) / 2)


def tilted(t: float) -> tuple[float, float]:
    """KL and reward of π ∝ exp(t · r) over three answers: of all policies with this KL the one with most reward."""
    rewards, reference = (0.0, 0.6, 1.0), (0.5, 0.3, 0.2)
    weights = [p * math.exp(t * r) for p, r in zip(reference, rewards, strict=True)]
    policy = [w / sum(weights) for w in weights]
    kl = sum(p * math.log(p / q) for p, q in zip(policy, reference, strict=True))
    return kl, sum(p * r for p, r in zip(policy, rewards, strict=True))


@pytest.mark.parametrize("kl", [0.05, 0.1, 0.2, 0.4])
def test_a_fast_and_a_slow_run_along_one_frontier_have_the_same_reward_at_equal_kl(kl):
    """A straight line in the KL itself puts the fast one, with its first evaluation far out, up to 0.1 lower."""
    slow, fast = (
        Curve("", tuple((i, *tilted(speed * i)) for i in (0, 1, 2, 4))) for speed in (0.6, 2.4)
    )  # a quarter, a half and the end of each
    exact = next(reward for own, reward in (tilted(t / 1000) for t in range(9600)) if own >= kl)
    assert reward_at_kl(slow, kl) == pytest.approx(exact, abs=0.01)
    assert reward_at_kl(fast, kl) == pytest.approx(exact, abs=0.02)


def test_an_estimate_below_zero_counts_as_zero():
    assert reward_at_kl(Curve("", ((0, 0.0, 0.0), (1, -0.01, 0.2), (2, 4.0, 1.2))), 1.0) == pytest.approx(0.7)


def test_nothing_is_said_beyond_where_a_run_came():
    curve = rising(0)
    assert reward_at_kl(curve, curve.points[-1][1] * (1 + 1e-9)) is None
    assert reward_at_kl(Curve("", ((5, 1.0, 0.5), (10, 2.0, 0.6))), 0.5) is None  # before its first evaluation
    assert reward_at_kl(Curve("", ()), 0.5) is None


def test_a_run_that_comes_back_counts_where_it_first_came():
    curve = Curve("", ((0, 0.0, 0.0), (1, 2.0, 1.0), (2, 1.0, 5.0), (3, 3.0, 9.0)))
    assert reward_at_kl(curve, 0.5) == pytest.approx(0.5)
    assert reward_at_kl(curve, 1.125) == pytest.approx(0.75)
    assert reward_at_kl(curve, 2.25) == pytest.approx(5 + 0.5 / (3**0.5 - 1) * 4)


def rows(values):
    """Rows as a CSV gives them: (β, seed, split, step, KL, reward)."""
    names = ("beta", "seed", "split", "step", "kl", "reward")
    return [{"method": "nca", **dict(zip(names, map(str, row), strict=True))} for row in values]


def test_curves_are_grouped_by_settings_and_ordered_by_step():
    table = rows(
        [("0.1", 1, "test", 20, 2, 0.6), ("0.10", 1, "test", 0, 0, 0.4), ("0.1", 2, "test", 0, 0, 0.4),
         ("0.3", 1, "test", 0, 0, 0.4), ("0.1", 1, "validation", 0, 0, 9), ("0.1", 1, "test", 30, "nan", 1)]
    )  # fmt: skip
    table.append(table[0] | {"step": "40", "reward": ""})
    found = curves_of(table)
    assert [*found] == [(("method", "nca"), ("beta", "0.1")), (("method", "nca"), ("beta", "0.3"))]
    first, second = found[setting_of(table[0])]
    assert (first.seed, first.points) == ("1", ((0, 0.0, 0.4), (20, 2.0, 0.6)))
    assert second.seed == "2"
    assert curves_of(table, "validation")[setting_of(table[0])][0].points == ((0, 0.0, 9.0),)


def test_settings_are_alike_in_memory_and_from_a_file():
    cell = {"method": "nca", "strategy": "rewards", "alpha": 0.3, "beta": 0.1, "learning_rate": 2e-4}
    file = {name: str(value) for name, value in cell.items()} | {"beta": "0.10", "num_completions": ""}
    assert setting_of(cell | {"num_completions": None, "seed": 1}) == setting_of(file | {"seed": "1"})
    assert setting_name(cell | {"num_completions": 4}) == "nca rewards α 0.3 β 0.1 lr 0.0002 K 4"
    assert setting_name(file, COMPARED) == "nca rewards"


def test_means_over_steps_are_of_the_steps_that_all_seeds_have():
    table = rows([(1, s, "test", step, 0, s + step) for s, step in ((1, 0), (2, 0), (1, 5), (2, 5), (1, 9))])
    (a, first), (b, second) = over_steps(runs_of(table)[setting_of(table[0])], "reward")
    assert (a, first.mean, first.n) == (0, 1.5, 2)
    assert (b, second.mean, second.n) == (5, 6.5, 2)
    assert over_steps(runs_of(table)[setting_of(table[0])], "accuracy") == []


def test_the_end_is_each_runs_last_step_and_of_all_seeds_or_none():
    table = rows([(1, s, "test", step, 0, r) for s, step, r in ((1, 5, 1), (2, 5, 2), (1, 9, 3), (2, 9, 5))])
    assert final_values(runs_of(table)[setting_of(table[0])], "reward") == {"1": (9, 3), "2": (9, 5)}
    table[-1]["reward"] = "nan"  # it diverged: step 5 is not its end
    assert final_values(runs_of(table)[setting_of(table[0])], "reward") == {}
    assert final_values(runs_of(table)[setting_of(table[0])], "accuracy") == {}
    assert final_values(runs_of(table, "validation").get(setting_of(table[0]), {}), "reward") == {}


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
def test_the_t_quantile_is_scipy_s(level):
    for degrees in [*range(1, 40), 100, 999]:
        assert t_quantile(level, degrees) == pytest.approx(stats.t.ppf((1 + level) / 2, degrees), rel=1e-9)


def test_the_t_quantile_is_the_table_s():
    assert [round(t_quantile(0.95, n), 3) for n in (1, 2, 4, 9, 30)] == [12.706, 4.303, 2.776, 2.262, 2.042]


def test_the_interval_is_scipy_s():
    values = [0.70, 0.72, 0.65, 0.71]
    low, high = stats.t.interval(0.95, 3, statistics.fmean(values), stats.sem(values))
    assert mean_and_interval(values) == pytest.approx((statistics.fmean(values), low, high, 4))


def test_the_interval_covers_the_mean_as_often_as_it_says():
    draw = random.Random(0)
    covered = 0
    for _ in range(2000):
        _, low, high, _ = mean_and_interval([draw.gauss(1, 2) for _ in range(3)])
        covered += low <= 1 <= high
    assert abs(covered / 2000 - 0.95) < 0.015


def test_one_value_says_nothing_of_the_spread():
    assert mean_and_interval([0.7]) == (0.7, -math.inf, math.inf, 1)


def test_a_mean_is_written_with_its_interval():
    assert Interval(0.70521, 0.66, 0.75042, 3).text() == "0.705 ± 0.045"
    assert Interval(0.0057, -0.0554, 0.0668, 3).text() == "0.0057 ± 0.0611"
    assert mean_and_interval([0.7]).text() == "0.700"
    assert Interval(12.3, 11.0, 13.6, 3).text("+.2f") == "+12.30 ± 1.30"
    assert Estimate(0.1, 0.07).text("+.2f") == "+0.10 ± 0.07"
    assert UNKNOWN._replace(mean=0.5).text(".0%") == "50%"
