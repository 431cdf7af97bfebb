"""The metrics against a loop over completions in plain Python, TRL's formulas at K = 2, and exact means."""

import math
from fractions import Fraction

import pytest
import torch

from nca_align.losses import infonca_loss
from nca_align.reward_tensors import targets
from nca_align.training.metrics import PromptMeans, calibration, row_metrics

ALPHA, BETA = 0.5, 0.1


def draw(b=8, k=5, seed=0, dtype=torch.float64, ragged=True, ties=True):
    """Rows with tied rewards and tied implicit rewards (log-ratios are whole nats), 2 to k completions each."""
    generator = torch.Generator().manual_seed(seed)
    ref_logps = torch.randint(-90, -30, (b, k), generator=generator).double()
    spread = 3 if ties else 10**6
    pi_logps = ref_logps + torch.randint(-spread, spread, (b, k), generator=generator) * (3 / spread)
    rewards = torch.randint(0, 4 if ties else 10**6, (b, k), generator=generator).double() / 2
    mask = torch.ones(b, k, dtype=torch.bool)
    if ragged:
        mask = torch.rand(b, k, generator=generator) < 0.6
        mask[:, :2] = True
        mask = mask.gather(1, torch.rand(b, k, generator=generator).argsort(1))
    return pi_logps.to(dtype), ref_logps.to(dtype), rewards.to(dtype), mask


def everywhere(rewards):
    return torch.ones_like(rewards, dtype=torch.bool)


def mean(values):
    return sum(values) / len(values)


def loop_metrics(logps, ref_logps, rewards, alpha, beta):
    """One prompt as lists of floats; a metric that the row has no part in is absent."""
    k = len(rewards)
    ratios = [p - q for p, q in zip(logps, ref_logps, strict=True)]
    r = [beta * x for x in ratios]
    best = [i for i in range(k) if rewards[i] == max(rewards)]
    worst = [i for i in range(k) if rewards[i] == min(rewards)]
    rest = [i for i in range(k) if i not in best]
    exponentials = [math.exp((x - max(rewards)) / alpha) for x in rewards]
    w = [x / sum(exponentials) for x in exponentials]
    model = [math.exp(x) / sum(map(math.exp, r)) for x in r]
    entropy = -sum(x * math.log(x) for x in w if x > 0)
    metrics = {
        "rewards/best": mean([r[i] for i in best]),
        "rewards/worst": mean([r[i] for i in worst]),
        "logps/best": mean([logps[i] for i in best]),
        "logratios/best": mean([ratios[i] for i in best]),
        "logratios/worst": mean([ratios[i] for i in worst]),
        "target/entropy": entropy,
        "target/effective_completions": math.exp(entropy),
        "kl/target_model": sum(x * math.log(x / y) for x, y in zip(w, model, strict=True) if x > 0),
    }
    descending = sorted(rewards, reverse=True)
    for rank, reward in enumerate(descending, start=1):
        group = [i for i in range(k) if rewards[i] == reward]
        metrics[f"rewards/rank_{rank}"] = mean([r[i] for i in group])
        metrics[f"logratios/rank_{rank}"] = mean([ratios[i] for i in group])
    if rest:
        metrics["rewards/margins"] = mean([r[i] for i in best]) - mean([r[i] for i in rest])
        pairs = [(i, j) for i in range(k) for j in range(k) if rewards[i] > rewards[j]]
        metrics["rewards/accuracies"] = mean([float(r[i] > r[j]) for i, j in pairs])
        top = [i for i in range(k) if r[i] == max(r)]
        metrics["rewards/top1"] = mean([float(i in best) for i in top])
        if len(set(r)) > 1:
            signs = [((rewards[i] > rewards[j]) - (rewards[i] < rewards[j]), (r[i] > r[j]) - (r[i] < r[j]))
                     for i in range(k) for j in range(i)]  # fmt: skip
            untied = sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs)
            metrics["rewards/kendall_tau"] = sum(a * b for a, b in signs) / math.sqrt(untied)
    if k == 2:
        chosen, rejected = (0, 1) if rewards[0] >= rewards[1] else (1, 0)
        metrics |= {"rewards/chosen": r[chosen], "rewards/rejected": r[rejected]}
        metrics |= {"logps/chosen": logps[chosen], "logps/rejected": logps[rejected]}
    return metrics


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("k", [2, 3, 6])
@pytest.mark.parametrize("ties", [True, False])
def test_equals_a_loop_over_completions(k, ties, dtype, tolerance):
    for seed in range(5):
        logps, ref_logps, rewards, mask = draw(k=k, seed=seed, dtype=dtype, ties=ties)
        metrics = row_metrics(logps, ref_logps, rewards, mask, ALPHA, BETA)
        for b, valid in enumerate(mask):
            row = [x[b][valid].tolist() for x in (logps, ref_logps, rewards)]
            expected = loop_metrics(*row, ALPHA, BETA)
            assert {name for name, (_, weight) in metrics.items() if weight[b]} == set(expected)
            for name, value in expected.items():
                assert metrics[name][0][b].item() == pytest.approx(value, rel=tolerance, abs=tolerance), name


def test_names_of_the_design():
    metrics = row_metrics(*draw(k=3), ALPHA, BETA)
    assert set(metrics) == {
        "rewards/best", "rewards/worst", "rewards/rank_1", "rewards/rank_2", "rewards/rank_3", "rewards/margins",
        "rewards/accuracies", "rewards/kendall_tau", "rewards/top1", "rewards/chosen", "rewards/rejected",
        "logratios/rank_1", "logratios/rank_2", "logratios/rank_3", "logratios/best", "logratios/worst", "logps/best",
        "logps/chosen", "logps/rejected", "target/entropy", "target/effective_completions", "kl/target_model",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_have_trls_metrics(dtype):
    """`DPOTrainer._compute_loss` of TRL 1.16, at chosen 1 and rejected 0, equal implicit rewards among them."""
    logps, ref_logps, _, _ = draw(b=64, k=2, dtype=dtype)
    flip = torch.arange(64) % 3 == 0  # the chosen completion stands second
    rewards = torch.stack([~flip, flip], 1).to(dtype)
    metrics = row_metrics(logps, ref_logps, rewards, everywhere(rewards), ALPHA, BETA)
    chosen_logps, rejected_logps = (torch.where(flip, b, a).float() for a, b in (logps.T, logps.flip(1).T))
    chosen_ref, rejected_ref = (torch.where(flip, b, a).float() for a, b in (ref_logps.T, ref_logps.flip(1).T))
    chosen_rewards = BETA * (chosen_logps - chosen_ref)
    rejected_rewards = BETA * (rejected_logps - rejected_ref)
    expected = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }
    assert (chosen_rewards == rejected_rewards).any()
    for name, value in expected.items():
        assert metrics[name][0].tolist() == value.tolist(), name
        assert metrics[name][1].tolist() == [1.0] * 64, name


def test_trls_names_take_the_two_valid_completions_and_the_first_of_a_tie():
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]])
    rewards = torch.tensor([[9.0, 1.0, 2.0], [4.0, 9.0, 4.0], [3.0, 2.0, 1.0]])
    mask = torch.tensor([[False, True, True], [True, False, True], [True, True, True]])
    metrics = row_metrics(logps, torch.zeros_like(logps), rewards, mask, ALPHA, BETA)
    for name, values in (("logps/chosen", [-3.0, -1.0]), ("logps/rejected", [-2.0, -3.0])):
        assert metrics[name][0][:2].tolist() == values
        assert metrics[name][1].tolist() == [1.0, 1.0, 0.0]  # the third row has three completions


@pytest.mark.parametrize("ties", [True, False])
def test_permuting_the_completions_changes_no_metric(ties):
    for seed in range(20):
        inputs = draw(k=6, seed=seed, ties=ties)
        order = torch.rand(inputs[3].shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
        metrics = row_metrics(*inputs, ALPHA, BETA)
        moved = row_metrics(*(x.gather(1, order) for x in inputs), ALPHA, BETA)
        for name, (value, weight) in metrics.items():
            if ties and name.endswith(("/chosen", "/rejected")):  # TRL's names say who of a tie is chosen: the first
                continue
            torch.testing.assert_close(moved[name][0], value, msg=lambda text, name=name: f"{name}: {text}")
            assert moved[name][1].tolist() == weight.tolist(), name


def total(batches):
    """The trainer's arithmetic: Σ value · weight and Σ weight over micro-batches, in whatever pieces they come."""
    sums = {}
    for batch in batches:
        for name, (value, weight) in row_metrics(*batch, ALPHA, BETA).items():
            above, below = sums.get(name, (0.0, 0.0))
            sums[name] = (above + (value * weight).sum().item(), below + weight.sum().item())
    return {name: above / below for name, (above, below) in sums.items() if below}


def test_means_over_prompts_do_not_depend_on_the_batches():
    inputs = draw(b=24, k=6)
    whole = total([inputs])
    for sizes in ([1] * 24, [5, 7, 12], [23, 1]):
        batches = []
        for rows in zip(*(x.split(sizes) for x in inputs), strict=True):
            width = int(rows[3].sum(1).max())  # as a collator pads: to the widest row of the micro-batch
            front = (~rows[3]).int().argsort(dim=1, stable=True)[:, :width]
            batches.append([x.gather(1, front) for x in rows])
        pieces = total(batches)
        assert set(pieces) == set(whole)
        for name, value in whole.items():
            assert pieces[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name


def test_padding_may_hold_anything_and_no_value_is_nan():
    logps, ref_logps, rewards, mask = draw(b=16)
    rewards[0] = 3.0  # all equal
    logps[1] = ref_logps[1]  # nothing has moved
    expected = row_metrics(logps, ref_logps, rewards, mask, ALPHA, BETA)
    for garbage in (math.nan, math.inf, -math.inf, 1e30):
        filled = [torch.where(mask, x, garbage) for x in (logps, ref_logps, rewards)]
        for name, (value, weight) in row_metrics(*filled, mask, ALPHA, BETA).items():
            assert value.isfinite().all(), name
            assert value.tolist() == expected[name][0].tolist(), name
            assert weight.tolist() == expected[name][1].tolist(), name


def test_rows_that_cannot_be_ranked_have_no_weight_where_ranking_is_measured():
    logps = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [-5.0, -5.0, -5.0]])
    rewards = torch.tensor([[2.0, 2.0, 2.0], [1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    metrics = row_metrics(logps, torch.full_like(logps, -2.0), rewards, everywhere(rewards), ALPHA, BETA)
    for name in ("rewards/margins", "rewards/accuracies", "rewards/top1"):
        assert metrics[name][1].tolist() == [0.0, 1.0, 1.0]
    assert metrics["rewards/kendall_tau"][1].tolist() == [0.0, 1.0, 0.0]  # the last row's implicit rewards are equal
    for name in ("rewards/best", "rewards/worst", "rewards/rank_1", "rewards/rank_3", "target/entropy"):
        assert metrics[name][1].tolist() == [1.0, 1.0, 1.0]
    assert metrics["rewards/best"][0][0].item() == metrics["rewards/worst"][0][0].item() == 0  # r = β · (1, 0, −1)
    assert metrics["target/effective_completions"][0][0].item() == pytest.approx(3)
    # nothing has moved: accuracies strictly count 0, top1 is chance
    assert metrics["rewards/accuracies"][0][2].item() == 0
    assert metrics["rewards/top1"][0][2].item() == pytest.approx(1 / 3)


def test_kendall_by_hand():
    # rewards 1 2 2 3 against implicit 1 3 2 2: concordant 12 13 14, discordant 24, tied in the one 23, in the other 34
    rewards = torch.tensor([[1.0, 2.0, 2.0, 3.0]])
    logps = torch.tensor([[1.0, 3.0, 2.0, 2.0]])
    tau, weight = row_metrics(logps, torch.zeros(1, 4), rewards, everywhere(rewards), ALPHA, BETA)[
        "rewards/kendall_tau"
    ]
    assert (tau.item(), weight.item()) == (pytest.approx(float(Fraction(3 - 1, 5))), 1.0)
    for sign in (1, -1):
        tau, _ = row_metrics(sign * rewards, torch.zeros(1, 4), rewards, everywhere(rewards), ALPHA, BETA)[
            "rewards/kendall_tau"
        ]
        assert tau.item() == pytest.approx(sign)


def test_kl_is_zero_at_infoncas_optimum_and_infonca_less_its_entropy_elsewhere():
    logps, ref_logps, rewards, mask = draw()
    optimal = ref_logps + rewards / ALPHA / BETA - 7
    kl, _ = row_metrics(optimal, ref_logps, rewards, mask, ALPHA, BETA)["kl/target_model"]
    assert kl.abs().max() < 1e-12
    kl, _ = row_metrics(logps, ref_logps, rewards, mask, ALPHA, BETA)["kl/target_model"]
    w = targets(rewards, ALPHA, mask)
    loss = infonca_loss(logps, ref_logps, rewards, ALPHA, BETA, mask)
    torch.testing.assert_close(kl, loss + torch.xlogy(w, w).sum(1))
    assert (kl > 0).all()


def test_effective_completions_show_what_alpha_does():
    logps, rewards = torch.zeros(1, 4), torch.tensor([[8.0, 7.5, 6.0, 2.0]])  # UltraFeedback's scale
    numbers = [
        row_metrics(logps, logps, rewards, everywhere(rewards), alpha, BETA)["target/effective_completions"][0].item()
        for alpha in (0.01, 0.3, 1.0, 100.0)
    ]
    assert numbers == sorted(numbers)
    assert numbers[0] == pytest.approx(1)
    assert numbers[-1] == pytest.approx(4, abs=0.01)


def test_extremes_are_finite():
    extreme = torch.tensor([[1e4, -1e4, 0.0, 1e4]])
    for alpha in (1e-4, 1.0):
        for name, (value, _) in row_metrics(extreme, -extreme, extreme, everywhere(extreme), alpha, 1.0).items():
            assert value.isfinite().all(), name


def test_is_detached():
    logps, ref_logps, rewards, mask = draw()
    for name, (value, weight) in row_metrics(logps.requires_grad_(), ref_logps, rewards, mask, ALPHA, BETA).items():
        assert not value.requires_grad, name
        assert value.shape == weight.shape == (8,), name


# Calibration


@pytest.mark.parametrize("seed", range(5))
def test_calibration_is_the_mean_over_completions_by_bins_of_the_target(seed):
    logps, ref_logps, rewards, mask = draw(b=20, seed=seed)
    found = calibration(logps, ref_logps, rewards, mask, ALPHA, BETA)
    bins = {i: ([], []) for i in range(5)}
    for p, q, row, m in zip(logps, ref_logps, rewards, mask, strict=True):
        w = [math.exp(x / ALPHA) for x in row[m].tolist()]
        r = [math.exp(BETA * x) for x in (p - q)[m].tolist()]
        for target, share in zip(w, r, strict=True):
            own = bins[min(4, int(target / sum(w) * 5))]
            own[0].append(target / sum(w))
            own[1].append(share / sum(r))
    for i, sides in bins.items():
        for name, values in zip(("target", "model"), sides, strict=True):
            value, weight = found[f"calibration/{name}_bin_{i + 1}"]
            assert weight.sum() == len(values)
            if values:
                assert (value * weight).sum() / weight.sum() == pytest.approx(mean(values), abs=1e-12)


def test_at_the_optimum_model_and_target_are_one_in_every_bin():
    _, ref_logps, rewards, mask = draw(b=20)
    constant = torch.linspace(-3, 3, 20).double().unsqueeze(1)  # InfoNCA's optimum leaves one free for each prompt
    logps = ref_logps + (rewards / ALPHA + constant) / BETA
    found = calibration(logps, ref_logps, rewards, mask, ALPHA, BETA)
    for i in range(1, 6):
        torch.testing.assert_close(found[f"calibration/model_bin_{i}"], found[f"calibration/target_bin_{i}"])


def test_errors_are_those_over_prompts_however_the_batches_are_cut():
    values = torch.randn(9, dtype=torch.float64)
    weights = torch.tensor([1.0, 1, 0, 1, 1, 0, 1, 1, 1])  # a row that a process repeats counts nowhere
    counted = values[weights > 0]
    for size in (9, 4, 1):
        means = PromptMeans(errors=("a",))
        for start in range(0, 9, size):
            part = slice(start, start + size)
            means.add({"a": (values[part], weights[part]), "b": (values[part], weights[part])})
        found = means.gather()
        assert found.keys() == {"a", "b", "a_error", "prompts"}
        assert found["prompts"] == len(counted)
        assert found["a_error"] == pytest.approx(float(counted.std() / len(counted) ** 0.5))
    means.add({"a": (values[:1], weights[:1])})
    assert means.gather().keys() == {"a", "prompts"}  # one prompt has no spread
