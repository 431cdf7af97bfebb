"""What losses and metrics compute of (B, K) rewards and log-probabilities, and the refusal of rows they can't take."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import LABEL_FIX, UserError, UserTypeError


def better_pairs(rewards: Tensor, mask: Tensor) -> Tensor:
    """(B, K, K) bool: at [b, i, j], completions i and j of prompt b are both there and i has the higher reward."""
    return (rewards.unsqueeze(2) > rewards.unsqueeze(1)) & mask.unsqueeze(2) & mask.unsqueeze(1)


def logratios(pi_logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    """(B, K) log π_θ − log π_ref in nats, subtracted in float32 at least; 0 where masked, whatever stands there."""
    dtype = torch.promote_types(torch.promote_types(pi_logps.dtype, ref_logps.dtype), torch.float32)
    return torch.where(mask, pi_logps.to(dtype) - ref_logps.to(dtype), 0)


def check_rows(
    rewards: Tensor,
    mask: Tensor | None = None,
    alpha: float | None = 1.0,
    beta: float = 1.0,
    labels: bool = False,
    least: int = 2,
    numbers: Sequence[int] | None = None,
    **logps: Tensor,
) -> None:
    """Refuse rows that `reward_loss` can't take, with what it lists under Raises.

    With `labels` the rewards must lie in [0, 1], and nothing reads α. `least` completions must be in each row.
    `numbers` (B,) are what errors call the rows; None: their places.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not (labels and name == "alpha") and not (value is not None and 0 < value < math.inf):
            raise UserError(f"`{name}` is {value}; it must be a finite number above 0: the paper's is 0.01.")
    if rewards.ndim != 2:
        raise UserError(f"`rewards` has shape {tuple(rewards.shape)}; it must be (B, K): add the missing axis.")
    mask = everywhere(rewards, mask)
    for name, tensor in {**logps, "mask": mask}.items():
        if name != "mask" and not tensor.is_floating_point():
            raise UserTypeError(f"`{name}` is {tensor.dtype}; it must be floating: pass log-probabilities in nats.")
        if tensor.shape != rewards.shape:
            raise UserError(
                f"`{name}` has shape {tuple(tensor.shape)} and `rewards` {tuple(rewards.shape)}; both must be (B, K), "
                "one number a completion. Sum log-probabilities over tokens and pad alike."
            )
    if mask.dtype != torch.bool:
        raise UserTypeError(f"`mask` is {mask.dtype}; it must be bool, True where a completion is: use `mask.bool()`.")
    few, broken = mask.sum(1) < least, (mask & ~rewards.isfinite()).any(1)  # (B,)
    if labels:
        broken = broken | (mask & ~((rewards >= 0) & (rewards <= 1))).any(1)
    if (few | broken).any():  # one synchronisation on CUDA
        row = int((few | broken).int().argmax())
        valid = rewards[row][mask[row]].tolist()
        number = row if numbers is None else numbers[row]
        if few[row]:
            more = "" if least < 2 else " to compare"
            raise UserError(
                f"`rewards` of row {number} has {len(valid)} valid completion(s); it must have at least {least}{more}: "
                "leave the row out."
            )
        if labels:
            k = int((mask[row] & ~((rewards[row] >= 0) & (rewards[row] <= 1))).int().argmax())
            raise UserError(
                f"`rewards[{k}]` of row {number} is {rewards[row, k]:g}; `loss_type` outcome needs labels from 0 "
                f"(wrong) to 1 (right): {LABEL_FIX}."
            )
        raise UserError(f"`rewards` of row {number} is {valid}; each must be finite: drop or repair it.")


def everywhere(rewards: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask


def targets(rewards: Tensor, alpha: float, mask: Tensor | None = None) -> Tensor:
    """The distribution over one prompt's completions that InfoNCA and NCA aim at.

        w = softmax(rewards / α) over the valid completions; adding a constant to a row's rewards changes nothing

    Args:
        rewards: (B, K), data set scores in any unit, finite where valid.
        alpha: temperature in the unit of `rewards`, above 0; towards 0 only the best (and its ties) keep weight.
        mask: (B, K) bool, True where a completion is there; at least two a row. None: everywhere.

    Returns:
        (B, K), rows sum to 1, 0 where masked; uniform for equal rewards. float32, or float64 where `rewards` is.

    Raises:
        ValueError: `alpha` not above 0, fewer than two completions in a row, NaN or infinite `rewards`, unequal shapes.
        TypeError: `mask` is not bool.

    Source: arXiv 2402.05369, and the authors' code, which divides by α as well.

    Example:
        >>> targets(torch.tensor([[2.0, 1.0]]), alpha=1.0)
        tensor([[0.7311, 0.2689]])
    """
    check_rows(rewards, mask, alpha)
    return target_distribution(rewards, alpha, everywhere(rewards, mask))


def target_distribution(rewards: Tensor, alpha: float, mask: Tensor) -> Tensor:
    """`targets` without its look at the rows."""
    return (below_best(rewards, mask) / alpha).masked_fill(~mask, -math.inf).softmax(1)


def below_best(rewards: Tensor, mask: Tensor) -> Tensor:
    """(B, K) rewards minus the row's highest, 0 where masked, so that dividing by a small α loses no digits."""
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).masked_fill(~mask, -math.inf)
    return (rewards - rewards.amax(1, keepdim=True)).masked_fill(~mask, 0)


def mean_logistic(implicit_rewards: Tensor, pairs: Tensor) -> Tensor:
    """Mean of −logσ(r_i − r_j) over the pairs (i, j) of each row, 0 for a row without one."""
    gaps = implicit_rewards.unsqueeze(2) - implicit_rewards.unsqueeze(1)  # (B, K, K)
    return torch.where(pairs, -F.logsigmoid(gaps), 0).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)


def loss_inputs(
    pi_logps: Tensor, ref_logps: Tensor, rewards: Tensor, alpha: float, beta: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Implicit rewards (B, K), 0 where masked; targets (B, K) in the same dtype; the mask (B, K)."""
    mask = everywhere(rewards, mask)
    implicit_rewards = beta * logratios(pi_logps, ref_logps, mask)
    return implicit_rewards, target_distribution(rewards, alpha, mask).to(implicit_rewards.dtype), mask
