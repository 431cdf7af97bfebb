"""What losses and metrics compute of (B, K) rewards and log-probabilities, and the refusal of rows they can't take."""

import math

import torch
from torch import Tensor

from .errors import UserError, UserTypeError


def better_pairs(rewards: Tensor, mask: Tensor) -> Tensor:
    """(B, K, K) bool: at [b, i, j], completions i and j of prompt b are both there and i has the higher reward."""
    return (rewards.unsqueeze(2) > rewards.unsqueeze(1)) & mask.unsqueeze(2) & mask.unsqueeze(1)


def logratios(pi_logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
    """(B, K) log π_θ − log π_ref in nats, subtracted in float32 at least; 0 where masked, whatever stands there."""
    dtype = torch.promote_types(torch.promote_types(pi_logps.dtype, ref_logps.dtype), torch.float32)
    return torch.where(mask, pi_logps.to(dtype) - ref_logps.to(dtype), 0)


def check_rows(
    rewards: Tensor, mask: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0, **logps: Tensor
) -> None:
    """Refuse rows that `reward_loss` can't take, with what it lists under Raises."""
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0 < value < math.inf:
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
                "one number a completion: sum log-probabilities over tokens and pad alike."
            )
    if mask.dtype != torch.bool:
        raise UserTypeError(f"`mask` is {mask.dtype}; it must be bool, True where a completion is: use `mask.bool()`.")
    few, broken = mask.sum(1) < 2, (mask & ~rewards.isfinite()).any(1)  # (B,)
    if (few | broken).any():  # one synchronisation on CUDA
        row = int((few | broken).int().argmax())
        valid = rewards[row][mask[row]].tolist()
        if few[row]:
            raise UserError(
                f"`rewards` of row {row} has {len(valid)} valid completion(s); it must have at least 2 to compare: "
                "leave the row out."
            )
        raise UserError(f"`rewards` of row {row} is {valid}; each must be finite: drop or repair it.")


def everywhere(rewards: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask


def target_distribution(rewards: Tensor, alpha: float, mask: Tensor) -> Tensor:
    """`targets` without its look at the rows."""
    return (below_best(rewards, mask) / alpha).masked_fill(~mask, -math.inf).softmax(1)


def below_best(rewards: Tensor, mask: Tensor) -> Tensor:
    """(B, K) rewards minus the row's highest, 0 where masked, so that dividing by a small α loses no digits."""
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).masked_fill(~mask, -math.inf)
    return (rewards - rewards.amax(1, keepdim=True)).masked_fill(~mask, 0)
