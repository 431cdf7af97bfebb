"""What one batch's completions add to the loss, and what they count in its mean."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..losses import SEPARABLE, reward_loss


@dataclass(frozen=True)
class Objective:
    """One or several losses of K completions a prompt, with weights.

    Args:
        loss_types: names in `losses.LOSSES`, or "sft": the best completion's negative log-likelihood, the mean over the
            tokens of all best completions, as TRL's.
        weights: one for each.
        alpha, beta, negative_weight: see `losses.reward_loss`.
    """

    loss_types: list[str]
    weights: list[float]
    alpha: float
    beta: float
    negative_weight: float = 1.0

    @property
    def separable(self) -> bool:
        """Whether a completion's gradient needs its own log-probability alone."""
        return {*self.loss_types} <= {*SEPARABLE, "sft"}

    def terms(self, logps: torch.Tensor, ref_logps: torch.Tensor, batch: dict[str, Any]) -> Iterator[tuple]:
        """For each loss: its name, weight, values (B,), and what each value counts in its mean (B,)."""
        row_weights = batch.get("weights", torch.ones(len(logps), device=logps.device))
        for name, weight in zip(self.loss_types, self.weights, strict=True):
            if name == "sft":
                best = best_column(batch)
                tokens = batch["lengths"].gather(1, best)[:, 0]
                yield name, weight, -logps.gather(1, best)[:, 0] / tokens, row_weights * tokens
            else:
                values = reward_loss(
                    logps, ref_logps, batch["rewards"], self.alpha, self.beta, name, batch["valid"],
                    negative_weight=self.negative_weight if name == "nca" else 1.0, check=False,
                )  # fmt: skip
                yield name, weight, values, row_weights

    def share(
        self, logps: torch.Tensor, ref_logps: torch.Tensor, batch: dict[str, Any], counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """This batch's share in the mean loss over a window of batches, whose shares add up to it.

        Args:
            logps, ref_logps: (B, K), nats.
            batch: with `rewards`, `valid`, `lengths` (B, K), and `weights` (B,) where prompts are repeated.
            counts: the window's sum of `count_prompts`; None for the mean over this batch alone.
        """
        loss = logps.new_zeros(())
        for name, weight, values, row_weights in self.terms(logps, ref_logps, batch):
            total = row_weights.sum() if counts is None else counts[int(name == "sft")].to(values.dtype)
            loss = loss + weight * (values * row_weights).sum() / total.clamp_min(1e-9)
        return loss


def count_prompts(batch: dict[str, Any]) -> torch.Tensor:
    """(2,) float64: the batch's prompts, and the tokens of their best completions, repeated prompts left out."""
    tokens = batch["lengths"].gather(1, best_column(batch))[:, 0]
    return torch.stack([batch["weights"].double().sum(), (batch["weights"].double() * tokens).sum()])


def best_column(batch: dict[str, Any]) -> torch.Tensor:
    """(B, 1) column of each prompt's highest reward, the first of a tie."""
    return batch["rewards"].masked_fill(~batch["valid"], -torch.inf).argmax(1, keepdim=True)
