"""Ladders: values between ends of runs, and methods compared at equal KL; Student's t and Holm against references."""

import math
import random
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from nca_align.evaluation.intervals import detectable_difference, paired_p
from nca_align.evaluation.ladder import (
    Rung,
    common_kls,
    compare_at_kl,
    doubled_back,
    holm,
    ladder_value,
    ladders_of,
    out_of_order,
    paired_differences,
)


def ladder(slope: float, kls=(0.5, 2.0, 4.5), offset: float = 0.25) -> list[Rung]:
    """Rungs whose reward is straight in √KL."""
    return [Rung(kl, {"reward": offset + slope * math.sqrt(kl)}, beta=1 / kl) for kl in kls]


def rows(reward, methods=("nca", "infonca"), seeds=range(4), betas=(0.1, 0.3, 1.0), reach=1.0) -> list[dict]:
    return [
        {"method": m, "seed": s, "beta": b, "kl": reach / b, "reward": reward(m, s, reach / b)}
        for m in methods for s in seeds for b in betas
    ]  # fmt: skip


@pytest.mark.parametrize("kl", [0.5, 0.6, 1.0, 2.0, 3.7, 4.5])
def test_a_value_is_exact_on_what_is_straight_in_the_root_of_kl(kl):
    rungs = ladder(0.7)
    random.Random(0).shuffle(rungs)
    assert ladder_value(rungs, "reward", kl) == pytest.approx(0.25 + 0.7 * math.sqrt(kl), abs=1e-15)


def test_a_value_is_near_that_of_the_best_policies_of_each_kl():
    """π ∝ π_ref · exp(t·r) over three answers: reward and log-ratio between rungs, against the policy with that KL."""
    r, reference = np.array([0.0, 0.6, 1.0]), np.array([0.5, 0.3, 0.2])

    def rung(t: float) -> Rung:
        policy = reference * np.exp(t * r)
        ratio = np.log(policy / policy.sum() / reference)
        policy /= policy.sum()
        return Rung(float(policy @ ratio), {"reward": float(policy @ r), "best": float(ratio[2])})

    rungs = [rung(t) for t in (0.5, 1.0, 2.0)]
    for exact in map(rung, (0.6, 0.8, 1.4)):
        for column in ("reward", "best"):
            assert ladder_value(rungs, column, exact.kl) == pytest.approx(exact.values[column], abs=0.012)


def test_nothing_is_said_where_a_ladder_does_not_span():
    rungs = ladder(0.7)
    assert ladder_value(rungs, "reward", 0.49) is None
    assert ladder_value(rungs, "reward", 4.51) is None
    assert ladder_value(rungs, "best", 1.0) is None  # no such figure
    assert ladder_value([], "reward", 1.0) is None
    rungs[1] = Rung(2.0, {"reward": math.nan})
    assert ladder_value(rungs, "reward", 1.0) is None
    assert ladder_value(rungs, "reward", 4.5) is not None


def test_rungs_with_one_kl_count_as_their_mean_and_an_estimate_below_zero_as_zero():
    rungs = [Rung(-0.01, {"reward": 0.0}), Rung(4.0, {"reward": 1.0}), Rung(4.0, {"reward": 3.0})]
    assert ladder_value(rungs, "reward", 4.0) == 2.0
    assert ladder_value(rungs, "reward", 1.0) == 1.0


def test_a_ladder_whose_kls_are_not_in_the_order_of_beta_says_so():
    assert not out_of_order(ladder(1.0))
    assert not out_of_order([Rung(0.0, {}, is_start=True), *ladder(1.0)])
    assert out_of_order([Rung(1.0, {}, 0.1), Rung(2.0, {}, 0.3), Rung(0.5, {}, 1.0)])
    rungs = [Rung(1.0, {"reward": 1.0}, 0.1), Rung(4.0, {"reward": 4.0}, 0.3), Rung(0.25, {"reward": 0.25}, 1.0)]
    assert ladder_value(rungs, "reward", 2.25) == pytest.approx(2.5)  # between 1 and 4, whatever their β


def test_rows_become_ladders_by_method_and_key():
    table = rows(lambda m, s, kl: s + kl)
    table.append({"method": "nca", "seed": 0, "beta": 3.0, "kl": "nan", "reward": 9})  # diverged: on no rung
    table.append({"method": "nca", "seed": 1, "beta": "", "kl": "0.5", "reward": ""})  # as a CSV gives them
    found = ladders_of(table, ["reward"], start={"reward": -1.0})
    assert [*found] == ["nca", "infonca"]
    first = found["nca"][0]
    assert first[0] == Rung(0.0, {"reward": -1.0}, is_start=True)
    assert [rung.kl for rung in first] == [0.0, 1.0, pytest.approx(1 / 0.3), 10.0]
    assert [rung.beta for rung in first[1:]] == [1.0, 0.3, 0.1]
    assert math.isnan(found["nca"][1][1].values["reward"])
    worlds = [{"world": i, "loss": "a", "share": x, "nats": x} for i in (1, 2) for x in (0.5, 2.0)]
    assert [*ladders_of(worlds, [], method=lambda row: row["loss"], key="world", beta="share", kl="nats")["a"]] == [
        1,
        2,
    ]


def test_differences_are_exact_and_paired():
    """Seeds far apart, one method always 0.1·√KL ahead: each difference is that, without spread."""
    table = rows(lambda m, s, kl: 10 * s + (0.6 if m == "nca" else 0.5) * math.sqrt(kl))
    found = compare_at_kl(ladders_of(table, ["reward"]), "infonca", ["reward"], [2.0, 8.0])
    assert [(one.method, one.reference, one.kl, one.n, one.missing) for one in found] == [
        ("nca", "infonca", kl, 4, 0) for kl in (2.0, 8.0)
    ]
    for one in found:
        assert one.difference == pytest.approx(0.1 * math.sqrt(one.kl), abs=1e-12)
        assert one.p < 1e-12
        assert one.low == pytest.approx(one.high)
    assert paired_differences({1: 3.0, 2: 5.0, 3: 0.0}, {2: 1.0, 1: 1.0}) == [2.0, 4.0]


def test_a_mean_is_of_all_pairs_or_is_not_given():
    table = [row for row in rows(lambda m, s, kl: s + kl) if not (row["seed"] == 3 and row["beta"] == 0.1)]
    table += rows(lambda m, s, kl: s + 2 * kl, methods=["dpo"], seeds=range(5))
    ladders = ladders_of(table, ["reward"])
    near, far = compare_at_kl(ladders, "nca", ["reward"], [2.0, 9.0])[::2]
    assert (near.n, near.missing, far.n, far.missing) == (4, 0, 3, 1)
    assert near.difference == pytest.approx(0.0)
    assert all(map(math.isnan, (far.difference, far.low, far.p, far.p_holm)))
    (_, near, _, far) = compare_at_kl(ladders, "nca", ["reward"], [2.0, 9.0], partial=True)
    assert (near.n, near.missing, far.n, far.missing) == (4, 1, 3, 2)
    assert far.difference > 0


def test_pairs_that_use_the_start_are_counted():
    table = rows(lambda m, s, kl: kl, seeds=(0, 1)) + rows(lambda m, s, kl: kl, seeds=(2,), reach=4.0)
    ladders = ladders_of(table, ["reward"], start={"reward": 0.0})
    assert [one.from_start for one in compare_at_kl(ladders, "nca", ["reward"], [0.5, 2.0, 5.0])] == [3, 1, 0]
    without = compare_at_kl(ladders_of(table, ["reward"]), "nca", ["reward"], [0.5, 2.0])
    assert [(one.n, one.from_start) for one in without] == [(0, 0), (2, 0)]


def test_one_pair_has_a_difference_and_no_interval():
    (one,) = compare_at_kl(ladders_of(rows(lambda m, s, kl: kl, seeds=[1]), ["reward"]), "nca", ["reward"], [2.0])
    assert (one.difference, one.n, one.low, one.high) == (0.0, 1, -math.inf, math.inf)
    assert math.isnan(one.p)
    assert math.isnan(one.p_holm)


def test_holm_is_worked_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.04, math.nan, 0.01]) == pytest.approx([0.04, math.nan, 0.02], nan_ok=True)
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("n", [2, 3, 5, 40, 1000])
def test_the_p_value_is_scipy_s(n):
    draw = random.Random(n)
    for mean in (0.0, 0.1, 1.0, 5.0):
        values = [draw.gauss(mean, 1) for _ in range(n)]
        assert paired_p(values) == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-6, abs=1e-15)
    assert paired_p([1.0, 1.0]) == 0.0
    assert paired_p([0.0, 0.0]) == 1.0
    assert math.isnan(paired_p([1.0]))


def test_intervals_hold_together_and_holm_rejects_wrongly_as_rarely_as_they_say():
    """Five methods alike at two KLs, three seeds, rewards of one seed alike: one family of eight."""
    draw = random.Random(0)
    held = wrong = 0
    for _ in range(400):
        seeds = [draw.gauss(0, 3) for _ in range(3)]
        table = rows(lambda m, s, kl, own=seeds: own[s] + draw.gauss(0, 1), "abcde", range(3))
        found = compare_at_kl(ladders_of(table, ["reward"]), "a", ["reward"], [2.0, 8.0])
        held += all(one.low <= 0 <= one.high for one in found)
        wrong += any(one.p_holm < 0.05 for one in found)
        assert all(one.p_holm < 0.05 for one in found if one.low > 0 or one.high < 0)
    assert held / 400 >= 0.95 - 0.02
    assert 0.005 < wrong / 400 <= 0.05 + 0.02  # no test that never rejects


def test_an_interval_of_a_family_of_one_is_the_plain_one():
    draw = random.Random(1)
    table = rows(lambda m, s, kl: draw.random())
    ladders = ladders_of(table, ["reward"])
    (one,) = compare_at_kl(ladders, "nca", ["reward"], [1.0])
    gaps = [ladders["infonca"][s][0].values["reward"] - ladders["nca"][s][0].values["reward"] for s in range(4)]
    assert (one.low, one.high) == pytest.approx(stats.t.interval(0.95, 3, statistics.fmean(gaps), stats.sem(gaps)))
    assert one.error == pytest.approx(stats.sem(gaps))
    assert one.p_holm == one.p


@pytest.mark.parametrize(("n", "comparisons"), [(2, 1), (3, 1), (3, 4), (10, 4), (200, 1)])
def test_the_detectable_difference_is_found_as_often_as_it_says(n, comparisons):
    difference = detectable_difference(2.0, n, comparisons)
    draw = np.random.default_rng(n).normal(difference, 2.0, (20_000, n))
    t = draw.mean(1) / draw.std(1, ddof=1) * math.sqrt(n)
    assert np.mean(np.abs(t) > stats.t.isf(0.025 / comparisons, n - 1)) == pytest.approx(0.8, abs=0.01)
    exact = stats.nct.sf(stats.t.isf(0.025 / comparisons, n - 1), n - 1, difference / 2 * math.sqrt(n))
    assert exact == pytest.approx(0.8, abs=1e-4)


def test_one_pair_detects_nothing():
    assert detectable_difference(1.0, 1) == math.inf


def test_the_kls_lie_in_the_span_that_most_ladders_share():
    spans = {"nca": (1.0, 16.0), "a": (0.25, 9.0), "b": (1.0, 16.0), "far": (20.0, 30.0), "near": (0.1, 1.2)}
    ladders = {name: {1: [Rung(kl, {}) for kl in own], 2: [Rung(kl, {}) for kl in own]} for name, own in spans.items()}
    wide = {name: ladders[name] for name in ("nca", "a", "b")}
    assert common_kls(wide, "nca") == [2.2, 6.2]  # 1.5² and 2.5², between 1 and 9
    assert common_kls({name: wide[name] for name in ("nca", "a", "b")} | {"far": ladders["far"]}, "nca") == [2.2, 6.2]
    (low, high) = common_kls(ladders, "nca")  # four of five span 1 to 1.2
    assert 1.0 <= low < high <= 1.2
    assert common_kls({"nca": ladders["nca"], "far": ladders["far"]}, "nca") == []
    assert common_kls({"nca": ladders["nca"]}, "nca") == []
    short = {name: {1: [Rung(kl, {}) for kl in (1.0, 1.01)]} for name in "ab"}
    assert common_kls(short, "a") == [1.0]
    unround = {name: {1: [Rung(kl, {}) for kl in (1.011, 1.012)]} for name in "ab"}
    assert common_kls(unround, "a") == [pytest.approx(1.0115, abs=1e-4)]
    assert common_kls({"a": {1: []}, "b": short["b"]}, "b") == []


def test_the_example_of_the_docs(capsys):
    page = (Path(__file__).resolve().parents[1] / "docs" / "guide" / "comparing.md").read_text()
    exec(re.search(r"^```python\n(.+?)^```", page, re.M | re.S)[1], {})
    assert capsys.readouterr().out == "dpo -0.2 3\n"


def test_a_run_that_came_back_in_kl_says_from_where():
    assert doubled_back([0.0, 1.0, 3.0, 2.0], [0.0, 0.1, 0.3, 0.3]) == 2
    assert doubled_back([0.0, 1.0, 3.0, 2.0], [0.0, 0.1, 0.4, 0.4]) is None  # by 2 · 0.57 at least
    assert doubled_back([0.0, 1.0, 3.0, 2.0], [math.nan] * 4) == 2
    assert doubled_back([0.0, 1.0, 2.0], [0.0] * 3) is None
    assert doubled_back([0.0, 2.0, math.nan, 1.0], [0.0] * 4) == 1
    assert doubled_back([], []) is None
