"""The losses against the paper's identities, a float64 loop in plain Python, and what they must survive."""

import math
import re
from itertools import pairwise, permutations

import pytest
import torch
import torch.nn.functional as F

from nca_align.losses import LABELS, LOSSES, SEPARABLE, infonca_loss, loss_name, nca_loss, reward_loss
from nca_align.reward_tensors import targets

ALL = sorted(LOSSES)
COMPARING = [name for name in ALL if name not in LABELS]
RANKING = ["all_pairs", "best_vs_rest", "plackett_luce"]
ALPHA, BETA = 0.5, 0.1


def draw(b=6, k=5, seed=0, dtype=torch.float64, ragged=True):
    """Log-probabilities of the size that 50 tokens have, rewards in [0, 1] with ties, and a mask of 2 to k a row."""
    generator = torch.Generator().manual_seed(seed)
    ref_logps = -60 + 10 * torch.randn(b, k, generator=generator, dtype=torch.float64)
    pi_logps = ref_logps + 8 * torch.randn(b, k, generator=generator, dtype=torch.float64)
    rewards = torch.randint(0, 5, (b, k), generator=generator).double() / 4
    mask = torch.ones(b, k, dtype=torch.bool)
    if ragged:
        mask = torch.rand(b, k, generator=generator) < 0.6
        mask[:, :2] = True
        mask = mask.gather(1, torch.rand(b, k, generator=generator).argsort(1))
    return pi_logps.to(dtype), ref_logps.to(dtype), rewards.to(dtype), mask


def value_and_grad(name, pi_logps, ref_logps, rewards, alpha=ALPHA, beta=BETA, mask=None, **kwargs):
    pi_logps = pi_logps.detach().clone().requires_grad_()
    loss = reward_loss(pi_logps, ref_logps, rewards, alpha, beta, name, mask=mask, **kwargs)
    loss.sum().backward()
    return loss.detach(), pi_logps.grad


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def log_sum_exp(values):
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def loop_loss(name, pi_logps, ref_logps, rewards, alpha, beta):
    """One prompt, lists of floats, as the formulas are written on paper."""
    k = len(rewards)
    r = [beta * (p - q) for p, q in zip(pi_logps, ref_logps, strict=True)]
    w = [math.exp(x / alpha - log_sum_exp([y / alpha for y in rewards])) for x in rewards]
    if name == "nca":
        positive = -sum(wi * log_sigmoid(ri) for wi, ri in zip(w, r, strict=True))
        return positive - sum(log_sigmoid(-ri) for ri in r) / k
    if name == "infonca":
        return -sum(wi * (ri - log_sum_exp(r)) for wi, ri in zip(w, r, strict=True))
    if name == "outcome":
        parts = [y * log_sigmoid(ri) + (1 - y) * log_sigmoid(-ri) for y, ri in zip(rewards, r, strict=True)]
        return -sum(parts) / k
    if name == "gvpo":
        mean_reward, mean_r = sum(rewards) / k, sum(r) / k
        gaps = [(x - mean_reward) / alpha - (ri - mean_r) for x, ri in zip(rewards, r, strict=True)]
        return sum(g * g for g in gaps) / (2 * (k - 1))
    if name == "plackett_luce":
        rivals = [[r[j] for j in range(k) if j == i or rewards[j] < rewards[i]] for i in range(k)]
        return sum(log_sum_exp(rival) - ri for rival, ri in zip(rivals, r, strict=True))
    pairs = [(i, j) for i in range(k) for j in range(k) if rewards[i] > rewards[j]]
    if name == "best_vs_rest":
        pairs = [(i, j) for i, j in pairs if rewards[i] == max(rewards)]
    return -sum(log_sigmoid(r[i] - r[j]) for i, j in pairs) / len(pairs) if pairs else 0.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ALL)
def test_equals_the_formula_written_as_a_loop(name, seed):
    pi_logps, ref_logps, rewards, mask = draw(seed=seed)
    loss, grad = value_and_grad(name, pi_logps, ref_logps, rewards, mask=mask)
    for b in range(len(rewards)):
        rows = [x[b][mask[b]].tolist() for x in (pi_logps, ref_logps, rewards)]
        assert loss[b].item() == pytest.approx(loop_loss(name, *rows, ALPHA, BETA), rel=1e-12, abs=1e-12)
        for i, k in enumerate(mask[b].nonzero().flatten()):  # central differences of the loop
            steps = []
            for step in (1e-4, -1e-4):
                moved = list(rows[0])
                moved[i] += step
                steps.append(loop_loss(name, moved, *rows[1:], ALPHA, BETA))
            assert grad[b, k].item() == pytest.approx((steps[0] - steps[1]) / 2e-4, rel=1e-6, abs=1e-8)
    assert (grad[~mask] == 0).all()


def test_values_by_hand_at_four_completions():
    # r = (1, 0, −1, 2) from log-ratios in nats over β = 0.5; rewards 2, 1, 1, 0 at α = 1
    ref_logps = torch.tensor([[-10.0, -20.0, -30.0, -40.0]], dtype=torch.float64)
    pi_logps = ref_logps + torch.tensor([[2.0, 0.0, -2.0, 4.0]], dtype=torch.float64)
    rewards = torch.tensor([[2.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([[1.0, 0.0, 0.25, 0.0]], dtype=torch.float64)
    e = math.e
    z = e**2 + 2 * e + 1  # of the target
    w = [e**2 / z, e / z, e / z, 1 / z]
    partition = e + 1 + 1 / e + e**2  # of the model
    soft = {x: math.log1p(math.exp(x)) for x in (-3, -2, -1, 0, 1, 2, 3)}  # softplus(x) = −logσ(−x)
    expected = {
        "nca": w[0] * soft[-1] + w[1] * soft[0] + w[2] * soft[1] + w[3] * soft[-2]
        + (soft[1] + soft[0] + soft[-1] + soft[2]) / 4,
        "infonca": math.log(partition) - (w[0] * 1 + w[1] * 0 + w[2] * -1 + w[3] * 2),
        "all_pairs": (soft[-1] + soft[-2] + soft[1] + soft[2] + soft[3]) / 5,
        "best_vs_rest": (soft[-1] + soft[-2] + soft[1]) / 3,
        "plackett_luce": math.log(partition) - 1 + math.log(1 + e**2) + math.log(1 / e + e**2) + 1,
        "gvpo": ((1 - 0.5) ** 2 + (0 + 0.5) ** 2 + (0 + 1.5) ** 2 + (-1 - 1.5) ** 2) / 6,
        "outcome": (soft[-1] + soft[0] + 0.25 * soft[1] + 0.75 * soft[-1] + soft[2]) / 4,
    }  # fmt: skip
    assert sorted(expected) == ALL
    for name, value in expected.items():
        loss = reward_loss(pi_logps, ref_logps, labels if name in LABELS else rewards, 1.0, 0.5, name)
        assert loss.item() == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0)])
@pytest.mark.parametrize(("name", "trl"), [("nca", "nca_pair"), *((n, "sigmoid") for n in ["infonca", *RANKING])])
def test_a_hard_pair_is_trls_loss(name, trl, dtype, tolerance):
    """With K = 2, rewards 1 and 0, α = 0.01: the formulas of `DPOTrainer._compute_loss` in TRL 1.16."""
    pi_logps, ref_logps, _, _ = draw(b=64, k=2, dtype=dtype, ragged=False)
    rewards = torch.tensor([[1.0, 0.0]], dtype=dtype).expand(64, 2)
    loss, grad = value_and_grad(name, pi_logps, ref_logps, rewards, alpha=0.01)

    pi_logps = pi_logps.clone().requires_grad_()
    working = torch.promote_types(dtype, torch.float32)  # bf16 log-probabilities are subtracted in float32
    chosen_logratios, rejected_logratios = (pi_logps.to(working) - ref_logps.to(working)).unbind(1)
    if trl == "sigmoid":
        expected = -F.logsigmoid(BETA * (chosen_logratios - rejected_logratios))
    else:
        chosen_rewards, rejected_rewards = BETA * chosen_logratios, BETA * rejected_logratios
        expected = (
            -F.logsigmoid(chosen_rewards) - 0.5 * F.logsigmoid(-chosen_rewards) - 0.5 * F.logsigmoid(-rejected_rewards)
        )
    expected.sum().backward()
    assert loss.dtype == working
    assert grad.dtype == dtype
    tolerance = tolerance or 1e-6
    torch.testing.assert_close(loss, expected.detach(), rtol=tolerance, atol=tolerance)
    grad_tolerance = 2**-8 if dtype == torch.bfloat16 else tolerance  # one rounding to bf16 in either
    torch.testing.assert_close(grad, pi_logps.grad, rtol=grad_tolerance, atol=tolerance)


@pytest.mark.parametrize("k", [2, 3, 4, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_before_any_step(k, dtype):
    _, ref_logps, _, _ = draw(b=3, k=k, dtype=dtype, ragged=False)
    rewards = torch.arange(k, dtype=dtype).expand(3, k) / 8
    deviations = (torch.arange(k, dtype=torch.float64) - (k - 1) / 2) / 8 / ALPHA
    expected = {
        "nca": 2 * math.log(2),
        "infonca": math.log(k),
        "all_pairs": math.log(2),
        "best_vs_rest": math.log(2),
        "plackett_luce": math.log(math.factorial(k)),
        "gvpo": deviations.square().sum().item() / (2 * (k - 1)),
        "outcome": math.log(2),
    }
    assert sorted(expected) == ALL
    for name, value in expected.items():
        loss = reward_loss(ref_logps, ref_logps, rewards, ALPHA, BETA, name)
        assert loss.tolist() == pytest.approx([value] * 3, rel=1e-6), name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2**-8)])
def test_gradient_formulas(dtype, tolerance):
    pi_logps, ref_logps, rewards, mask = draw(dtype=dtype)
    r = BETA * (pi_logps.double() - ref_logps.double())
    w = targets(rewards.double(), ALPHA, mask)
    k = mask.sum(1, keepdim=True)
    nca = -w * (1 - r.sigmoid()) + r.sigmoid() / k * mask
    infonca = r.masked_fill(~mask, -math.inf).softmax(1) - w
    outcome = (r.sigmoid() - rewards.double()) / k * mask
    for name, expected in (("nca", nca), ("infonca", infonca), ("outcome", outcome)):
        _, grad = value_and_grad(name, pi_logps, ref_logps, rewards, mask=mask)
        torch.testing.assert_close(grad.double(), BETA * expected, rtol=tolerance, atol=1e-7)


def test_nca_lifts_a_completion_at_the_start_where_its_target_is_above_one_in_k():
    _, ref_logps, rewards, mask = draw(b=40)
    _, grad = value_and_grad("nca", ref_logps, ref_logps, rewards, mask=mask)
    w, k = targets(rewards, ALPHA, mask), mask.sum(1, keepdim=True)
    decided = mask & ((w - 1 / k).abs() > 1e-12)  # a row of equal rewards moves nothing
    assert ((grad < 0) == (w > 1 / k))[decided].all()


def test_nca_is_stationary_at_log_k_times_the_target():
    _, ref_logps, rewards, mask = draw()
    w, k = targets(rewards, ALPHA, mask), mask.sum(1, keepdim=True)
    r = torch.where(mask, (k * w).log(), 0)
    torch.testing.assert_close(  # the same point as the paper states it: rewards/α − log mean exp(rewards/α)
        r[mask],
        (rewards / ALPHA - (rewards / ALPHA).masked_fill(~mask, -math.inf).logsumexp(1, keepdim=True) + k.log())[mask],
    )
    _, grad = value_and_grad("nca", ref_logps + r / BETA, ref_logps, rewards, mask=mask)
    assert grad.abs().max() < 1e-15


@pytest.mark.parametrize(("k", "value"), [(2, 0.9548), (4, 0.6255)])
def test_nca_at_the_optimum_of_a_hard_target(k, value):
    rewards = torch.zeros(1, k, dtype=torch.float64)
    rewards[0, 0] = 1
    r = torch.full((1, k), -1e4, dtype=torch.float64)
    r[0, 0] = math.log(k)
    loss, grad = value_and_grad("nca", r, torch.zeros_like(r), rewards, alpha=0.01, beta=1.0)
    assert loss.item() == pytest.approx(value, abs=5e-5)
    assert loss.item() == pytest.approx(math.log((k + 1) / k) + math.log(k + 1) / k, rel=1e-12)
    assert grad.abs().max() < 1e-15


def test_infonca_is_stationary_and_gvpo_zero_at_rewards_over_alpha_plus_any_constant():
    _, ref_logps, rewards, mask = draw()
    constant = torch.arange(len(rewards), dtype=torch.float64).unsqueeze(1) - 3
    pi_logps = ref_logps + (rewards / ALPHA + constant) / BETA
    _, grad = value_and_grad("infonca", pi_logps, ref_logps, rewards, mask=mask)
    assert grad.abs().max() < 1e-14
    loss, grad = value_and_grad("gvpo", pi_logps, ref_logps, rewards, mask=mask)
    assert loss.max() < 1e-24
    assert grad.abs().max() < 1e-12


def test_plackett_luce_without_ties_is_a_distribution_over_orders():
    pi_logps, ref_logps, _, _ = draw(b=1, k=4, ragged=False)
    orders = torch.tensor(list(permutations(range(4))), dtype=torch.float64)  # (24, 4)
    losses = reward_loss(pi_logps.expand(24, 4), ref_logps.expand(24, 4), orders, ALPHA, BETA, "plackett_luce")
    assert (-losses).exp().sum().item() == pytest.approx(1, rel=1e-12)


def fit(name, rewards, alpha=ALPHA, **kwargs):
    """Implicit rewards at the optimum: a free log-ratio a completion, from the reference on."""
    logratios = torch.zeros_like(rewards, requires_grad=True)
    optimizer = torch.optim.LBFGS([logratios], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = reward_loss(logratios, torch.zeros_like(rewards), rewards, alpha, BETA, name, **kwargs).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return BETA * logratios.detach()


REWARDS = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.5, 0.1, 0.9, -1.0]], dtype=torch.float64)


def test_free_log_ratios_reach_ncas_optimum():
    optimum = REWARDS - REWARDS.exp().mean(1, keepdim=True).log()
    torch.testing.assert_close(fit("nca", REWARDS, alpha=1.0), optimum, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("weight", [0.25, 4.0])
def test_negative_weight_scales_the_second_term_and_moves_the_optimum_by_its_log(weight):
    pi_logps, ref_logps, rewards, mask = draw()
    plain, half = (nca_loss(pi_logps, ref_logps, rewards, ALPHA, BETA, mask, x) for x in (1.0, 0.0))
    w = targets(rewards, ALPHA, mask)
    first_term = -(w * F.logsigmoid(BETA * (pi_logps - ref_logps))).sum(1)
    torch.testing.assert_close(half, first_term)
    weighted = reward_loss(pi_logps, ref_logps, rewards, ALPHA, BETA, "nca", mask, weight)
    torch.testing.assert_close(weighted, first_term + weight * (plain - first_term))
    # ∂L/∂r = −w (1 − σ) + λ σ / K = 0 where e^r = K w / λ
    optimum = (4 * targets(REWARDS, 1.0) / weight).log()
    torch.testing.assert_close(fit("nca", REWARDS, alpha=1.0, negative_weight=weight), optimum, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("name", ["infonca", "gvpo"])
def test_free_log_ratios_reach_rewards_over_alpha_up_to_a_constant(name):
    r = fit(name, REWARDS, alpha=1.0)
    centred = REWARDS - REWARDS.mean(1, keepdim=True)
    torch.testing.assert_close(r - r.mean(1, keepdim=True), centred, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("name", RANKING)
def test_ranking_losses_order_the_completions_and_the_gap_keeps_growing(name):
    logratios = torch.zeros_like(REWARDS, requires_grad=True)
    optimizer = torch.optim.SGD([logratios], lr=5 / BETA**2)  # a step of 5 in implicit rewards
    best = torch.tensor([[True, False, False, False], [False, False, True, False]])
    gaps = []
    for step in range(1, 401):
        optimizer.zero_grad()
        reward_loss(logratios, torch.zeros_like(REWARDS), REWARDS, ALPHA, BETA, name).sum().backward()
        optimizer.step()
        if step in (50, 100, 200, 400):
            r = BETA * logratios.detach()
            gaps.append(r[best] - r.masked_fill(best, -math.inf).amax(1))
    for before, after in pairwise(gaps):
        assert (after > before + 0.1).all()
    better = REWARDS.unsqueeze(2) > REWARDS.unsqueeze(1)
    if name == "best_vs_rest":  # its rest has no order
        better &= best.unsqueeze(2)
    assert ((r.unsqueeze(2) - r.unsqueeze(1))[better] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_permuting_the_completions_changes_nothing(name, dtype):
    for seed in range(20):
        pi_logps, ref_logps, rewards, mask = draw(seed=seed, dtype=dtype)
        loss, grad = value_and_grad(name, pi_logps, ref_logps, rewards, mask=mask)
        order = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed)).argsort(1)
        moved = [x.gather(1, order) for x in (pi_logps, ref_logps, rewards, mask)]
        moved_loss, moved_grad = value_and_grad(name, *moved[:3], mask=moved[3])
        torch.testing.assert_close(moved_loss, loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moved_grad, grad.gather(1, order), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name", COMPARING)
@pytest.mark.parametrize("alpha", [0.01, 0.5])
def test_adding_a_constant_to_a_rows_rewards_changes_nothing(name, alpha):
    pi_logps, ref_logps, rewards, mask = draw(dtype=torch.float32)
    constants = torch.tensor([1e4, -1e4, 0.5, 1000, -3, 64.0]).unsqueeze(1)  # halves of ±1e4 are exact in float32
    loss, grad = value_and_grad(name, pi_logps, ref_logps, rewards, alpha=alpha, mask=mask)
    shifted_loss, shifted_grad = value_and_grad(name, pi_logps, ref_logps, rewards + constants, alpha=alpha, mask=mask)
    assert shifted_loss.tolist() == loss.tolist()
    assert shifted_grad.tolist() == grad.tolist()


@pytest.mark.parametrize("garbage", [0.0, math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", ALL)
def test_padding_changes_nothing_whatever_stands_there(name, garbage):
    pi_logps, ref_logps, rewards, mask = draw()
    filled = [torch.where(mask, x, garbage) for x in (pi_logps, ref_logps, rewards)]
    loss, grad = value_and_grad(name, *filled, mask=mask)
    assert (grad[~mask] == 0).all()
    for b, valid in enumerate(mask):
        row = [x[b : b + 1, valid] for x in (pi_logps, ref_logps, rewards)]
        alone, alone_grad = value_and_grad(name, *row)
        assert loss[b].item() == pytest.approx(alone.item(), rel=1e-12, abs=1e-14)
        torch.testing.assert_close(grad[b, valid], alone_grad[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("name", ALL)
def test_ten_thousand_either_way_stays_finite(name, alpha, dtype):
    extreme = torch.tensor([1e4, -1e4, 0.0, 1e4], dtype=dtype)
    pi_logps = torch.stack([extreme, -extreme, extreme * 0])
    for rewards in (extreme.expand(3, 4), -extreme.expand(3, 4), extreme.expand(3, 4) * 0):
        rewards = rewards.clamp(0, 1) if name in LABELS else rewards
        loss, grad = value_and_grad(name, pi_logps, torch.zeros_like(pi_logps), rewards, alpha=alpha, beta=1.0)
        assert loss.isfinite().all()
        if dtype == torch.float16 and name == "gvpo":  # its gradient, 1e8, is beyond float16's 65,504
            continue
        assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", COMPARING)
def test_a_row_of_equal_rewards_does_what_the_docstring_says(name, dtype):
    pi_logps, ref_logps, _, _ = draw(b=4, dtype=dtype, ragged=False)
    rewards = torch.full_like(pi_logps, 7.0)
    assert targets(rewards, ALPHA).tolist() == [[pytest.approx(0.2)] * 5] * 4
    loss, grad = value_and_grad(name, pi_logps, ref_logps, rewards)  # backward works: the graph is connected
    if name in RANKING:
        assert loss.tolist() == [0.0] * 4
        assert grad.tolist() == [[0.0] * 5] * 4
        return
    start, start_grad = value_and_grad(name, ref_logps, ref_logps, rewards)
    assert (start < loss).all()
    assert start_grad.abs().max() < 1e-8
    # NCA draws each one towards the reference, the others draw them together
    r = BETA * (pi_logps - ref_logps).double()
    pull = r if name == "nca" else r - r.mean(1, keepdim=True)
    assert ((grad.double() * pull).sum(1) > 0).all()


@pytest.mark.parametrize("name", ALL)
def test_only_separable_losses_have_a_diagonal_second_derivative(name):
    pi_logps, ref_logps, rewards, _ = draw(b=1, k=4, ragged=False)
    rewards = torch.tensor([[0.0, 0.3, 0.6, 0.9]], dtype=torch.float64)

    def total(x):
        return reward_loss(x, ref_logps, rewards, ALPHA, BETA, name).sum()

    hessian = torch.autograd.functional.hessian(total, pi_logps)[0, :, 0]
    off_diagonal = hessian - hessian.diagonal().diag()
    assert (off_diagonal.abs().max() == 0) == (name in SEPARABLE)


@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name):
    pi_logps, ref_logps, rewards, mask = draw(b=3, k=4)
    inputs = (pi_logps.requires_grad_(), ref_logps.requires_grad_())
    assert torch.autograd.gradcheck(lambda p, q: reward_loss(p, q, rewards, ALPHA, BETA, name, mask), inputs)
    assert torch.autograd.gradgradcheck(lambda p, q: reward_loss(p, q, rewards, ALPHA, BETA, name, mask), inputs)


@pytest.mark.parametrize("name", ALL)
def test_is_computed_in_float32_at_least(name):
    pi_logps, ref_logps, rewards, mask = draw(dtype=torch.bfloat16)
    loss, grad = value_and_grad(name, pi_logps, ref_logps, rewards, mask=mask)
    exact, exact_grad = value_and_grad(name, pi_logps.double(), ref_logps.double(), rewards.double(), mask=mask)
    assert (loss.dtype, grad.dtype, exact.dtype) == (torch.float32, torch.bfloat16, torch.float64)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=2**-8, atol=1e-7)
    assert reward_loss(pi_logps, ref_logps.double(), rewards, ALPHA, BETA, name, mask).dtype == torch.float64


def test_integer_rewards_are_rewards():
    pi_logps, ref_logps, _, _ = draw(ragged=False)
    rewards = torch.tensor([[5, 1, 3, 3, 2]]).expand(6, 5)
    for name in ALL:
        own = rewards % 2 if name in LABELS else rewards
        torch.testing.assert_close(
            reward_loss(pi_logps, ref_logps, own, ALPHA, BETA, name),
            reward_loss(pi_logps, ref_logps, own.double(), ALPHA, BETA, name),
        )


def test_targets_keep_ties_and_their_dtype():
    rewards = torch.tensor([[1.0, 1.0, 0.0, 9.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert targets(rewards, 0.01, mask).tolist() == [[0.5, 0.5, pytest.approx(0, abs=1e-40), 0.0]]
    assert targets(rewards, 1.0, mask)[0, 0] / targets(rewards, 1.0, mask)[0, 2] == pytest.approx(math.e)
    assert targets(rewards.bfloat16(), 1.0).dtype == torch.float32
    assert targets(rewards.double(), 1.0).dtype == torch.float64
    with pytest.raises(ValueError, match=r"`alpha` is 0; it must be a finite number above 0"):
        targets(rewards, 0)


def test_names_are_taken_as_the_paper_writes_them():
    pi_logps, ref_logps, rewards, mask = draw()
    for spelling, function in (("NCA", nca_loss), ("InfoNCA", infonca_loss), ("infonca", infonca_loss)):
        loss = reward_loss(pi_logps, ref_logps, rewards, ALPHA, BETA, spelling, mask)
        assert loss.tolist() == function(pi_logps, ref_logps, rewards, ALPHA, BETA, mask).tolist()
        assert loss.shape == (6,)
    assert loss_name("SFT", [*LOSSES, "sft"]) == "sft"


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("InfoNCE", "infonca"), ("all-pairs", "all_pairs"), ("nca_pair", "nca")]
)
def test_unknown_name(wrong, nearest):
    pi_logps, ref_logps, rewards, _ = draw()
    message = f"it must be one of {', '.join(LOSSES)} (any case), or `module:function`: did you mean '{nearest}'?"
    message = f"`loss_type` is '{wrong}'; {message}"
    with pytest.raises(ValueError, match=re.escape(message)):
        reward_loss(pi_logps, ref_logps, rewards, ALPHA, BETA, wrong)


def test_a_name_like_no_other_gets_no_guess():
    pi_logps, ref_logps, rewards, _ = draw()
    with pytest.raises(ValueError, match=r"`loss_type` is 'ipo'; .*`module:function`$"):
        reward_loss(pi_logps, ref_logps, rewards, ALPHA, BETA, "ipo")


ONES = torch.ones(2, 3)
VALID = torch.ones(2, 3, dtype=torch.bool)
HOLES = torch.tensor([[True, True, False], [False, True, False]])
BAD = {
    "alpha zero": ({"alpha": 0.0}, ValueError, "`alpha` is 0.0; it must be a finite number above 0"),
    "alpha nan": ({"alpha": math.nan}, ValueError, "`alpha` is nan; it must be a finite number above 0"),
    "beta negative": ({"beta": -0.1}, ValueError, "`beta` is -0.1; it must be a finite number above 0"),
    "beta infinite": ({"beta": math.inf}, ValueError, "`beta` is inf; it must be a finite number above 0"),
    "K = 1": (
        {"pi_logps": ONES[:, :1], "ref_logps": ONES[:, :1], "rewards": ONES[:, :1]},
        ValueError,
        "`rewards` of row 0 has 1 valid completion(s); it must have at least 2",
    ),
    "one valid": ({"mask": HOLES}, ValueError, "`rewards` of row 1 has 1 valid completion(s)"),
    "all masked": ({"mask": ~VALID}, ValueError, "`rewards` of row 0 has 0 valid completion(s)"),
    "nan reward": (
        {"rewards": torch.tensor([[1.0, 2, 3], [1, math.nan, 2]])},
        ValueError,
        "`rewards` of row 1 is [1.0, nan, 2.0]; each must be finite",
    ),
    "pi shape": ({"pi_logps": ONES[:, :2]}, ValueError, "`pi_logps` has shape (2, 2) and `rewards` (2, 3)"),
    "ref shape": ({"ref_logps": ONES[:1]}, ValueError, "`ref_logps` has shape (1, 3) and `rewards` (2, 3)"),
    "mask shape": ({"mask": VALID[:, :2]}, ValueError, "`mask` has shape (2, 2) and `rewards` (2, 3)"),
    "one row": (
        {"pi_logps": ONES[0], "ref_logps": ONES[0], "rewards": ONES[0]},
        ValueError,
        "`rewards` has shape (3,); it must be (B, K)",
    ),
    "pi integer": ({"pi_logps": ONES.long()}, TypeError, "`pi_logps` is torch.int64; it must be floating"),
    "ref integer": ({"ref_logps": ONES.long()}, TypeError, "`ref_logps` is torch.int64; it must be floating"),
    "mask integer": ({"mask": VALID.long()}, TypeError, "`mask` is torch.int64; it must be bool"),
}


OF_LABELS = {
    "label above": (
        {"rewards": torch.tensor([[1.0, 0, 1], [0, 1, 1.5]])},
        ValueError,
        "`rewards[2]` of row 1 is 1.5; `loss_type` outcome needs labels from 0 (wrong) to 1 (right)",
    ),
    "label below": ({"rewards": -ONES}, ValueError, "`rewards[0]` of row 0 is -1; `loss_type` outcome"),
    "nan label": ({"rewards": ONES * math.nan}, ValueError, "`rewards[0]` of row 0 is nan; `loss_type`"),
}
TAKEN = ("alpha zero", "alpha nan", "K = 1", "one valid", "nan reward")  # by a loss of labels, or told otherwise


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in COMPARING for case in BAD]
    + [(name, case) for name in LABELS for case in BAD | OF_LABELS if case not in TAKEN],
)
def test_bad_input_is_named(name, case):
    change, error, message = (BAD | OF_LABELS)[case]
    inputs = {"pi_logps": ONES, "ref_logps": ONES, "rewards": ONES, "alpha": ALPHA, "beta": BETA} | change
    with pytest.raises(error, match=re.escape(message)):
        LOSSES[name](**inputs)
    with pytest.raises(error, match=re.escape(message)):
        reward_loss(**inputs, loss_type=name)


def test_bad_options_are_named():
    inputs = (ONES, ONES, ONES, ALPHA, BETA)
    with pytest.raises(TypeError, match="`loss_type` is None; it must be a function or one of nca, infonca"):
        reward_loss(*inputs, loss_type=None)
    for weight in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"`negative_weight` is {weight}; it must be a finite number of 0 or more"):
            reward_loss(*inputs, negative_weight=weight)
    for name in set(LOSSES) - {"nca"}:
        with pytest.raises(NotImplementedError, match=f"`negative_weight` is 2.0 with `loss_type` '{name}'"):
            reward_loss(*inputs, loss_type=name, negative_weight=2.0)


@pytest.mark.parametrize("name", LABELS)
def test_a_loss_of_labels_takes_one_completion_booleans_and_no_alpha(name):
    pi_logps, ref_logps, labels, mask = draw()
    loss = reward_loss(pi_logps, ref_logps, labels, None, BETA, name, mask)
    parts = [
        reward_loss(*(x[mask].unsqueeze(1) for x in (pi_logps, ref_logps, labels)), alpha, BETA, name)
        for alpha in (None, 0.01, 7.0)
    ]
    assert parts[0].tolist() == parts[1].tolist() == parts[2].tolist()  # K = 1: its own completion alone
    rows = mask.nonzero()[:, 0]
    torch.testing.assert_close(torch.zeros(6).double().index_add(0, rows, parts[0]) / mask.sum(1), loss)
    right = labels > 0.5
    torch.testing.assert_close(
        reward_loss(pi_logps, ref_logps, right, None, BETA, name, mask),
        reward_loss(pi_logps, ref_logps, right.double(), None, BETA, name, mask),
    )
    r = (labels.clamp(0.1, 0.9)).logit() / BETA  # least where σ(r) is the label
    _, grad = value_and_grad(name, ref_logps + r, ref_logps, labels.clamp(0.1, 0.9), mask=mask)
    assert grad.abs().max() < 1e-15


def test_a_loss_that_compares_needs_an_alpha():
    with pytest.raises(ValueError, match="`alpha` is None; it must be a finite number above 0"):
        nca_loss(ONES, ONES, ONES, None, BETA)
