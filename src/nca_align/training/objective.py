"""What one batch's completions add to the loss, and what they count in its mean."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batching.collator import Batch
from ..losses import LABELS, is_separable, reward_loss
from ..options import require_positive
from ..own_losses import OwnLoss


@dataclass(frozen=True)
class Objective:
    """One or several losses of K completions a prompt, with weights, and a mixture of experts' load-balancing loss.

    Args:
        loss_types: names in `losses.LOSSES`, losses of one's own, or "sft": the best completion's negative
            log-likelihood, one mean over the tokens of all best completions of a step. TRL averages over each
            micro-batch, then over accumulation and processes. With labels, a best completion counts only if its label
            is above 1/2.
        weights: one for each.
        alpha, beta, negative_weight: see `losses.reward_loss`.
        completion_mean: whether "outcome" counts each completion once, not each prompt.
        router_weight: of the load-balancing loss.
        processes: over which gradients are averaged, each of which holds its share of the sum.
    """

    loss_types: list[str]
    weights: list[float]
    alpha: float | None
    beta: float
    negative_weight: float = 1.0
    router_weight: float = 0.0
    processes: int = 1
    completion_mean: bool = False

    def __post_init__(self):
        require_positive(self, "alpha", "beta")  # `trainer.beta` may be set at any time

    @property
    def separable(self) -> bool:
        """Whether a completion's gradient needs its own forward alone."""
        return not self.router_weight and all(name == "sft" or is_separable(name) for name in self.loss_types)

    @property
    def labels(self) -> bool:
        """Whether a loss reads rewards as labels."""
        return not LABELS.isdisjoint(self.loss_types)

    def unit(self, name: str) -> int:
        """Which of `count_prompts` a loss is averaged over."""
        return 1 if name == "sft" else 2 if name in LABELS and self.completion_mean else 0

    def terms(self, logps: Tensor, ref_logps: Tensor, batch: Batch) -> Iterator[tuple]:
        """For each loss: its name, weight, values (B,), and what each value counts in its mean (B,)."""
        row_weights = batch.get("weights", torch.ones(len(logps), device=logps.device))
        for name, weight in zip(self.loss_types, self.weights, strict=True):
            if name == "sft":
                tokens = batch["lengths"].gather(1, best := best_column(batch))[:, 0]
                yield name, weight, -logps.gather(1, best)[:, 0] / tokens, row_weights * self._sft_tokens(batch)
            else:
                as_given = isinstance(name, OwnLoss) or name in LABELS  # the others read differences
                rewards = batch["given_rewards" if as_given else "rewards"]
                values = reward_loss(
                    logps, ref_logps, rewards, self.alpha, self.beta, name, batch["valid"],
                    negative_weight=self.negative_weight if name == "nca" else 1.0, check=False,
                )  # fmt: skip
                completions = batch["valid"].sum(1) if self.unit(name) == 2 else 1
                yield name, weight, values, row_weights * completions

    def _sft_tokens(self, batch: Batch) -> Tensor:
        """(B,) tokens of each prompt's best completion; 0 where its label doesn't say that it is likelier right."""
        best = best_column(batch)
        tokens = batch["lengths"].gather(1, best)[:, 0]
        return tokens * (batch["given_rewards"].gather(1, best)[:, 0] > 0.5) if self.labels else tokens

    def count_prompts(self, batch: Batch) -> Tensor:
        """(3,) float64: the batch's prompts, the tokens that "sft" reads, and the completions, none repeated."""
        weights = batch["weights"].double()
        units = (torch.ones_like(weights), self._sft_tokens(batch), batch["valid"].sum(1))
        return torch.stack([(weights * own).sum() for own in units])

    def loss_share(
        self, logps: Tensor, aux_loss: Tensor | None, ref_logps: Tensor, batch: Batch, counts: Tensor | None = None
    ) -> Tensor:
        """This batch's share in the mean loss over a window; it is averaged over processes, and added up over batches.

        Args:
            logps: (B, K), nats.
            aux_loss: load-balancing loss of this batch.
            ref_logps: (B, K), nats.
            batch: with `rewards`, `valid`, `lengths` (B, K), and `weights` (B,) where prompts are repeated.
            counts: the window's sum of `count_prompts`; None for the mean over this batch alone.
        """
        loss = logps.new_zeros(())
        for name, weight, values, row_weights in self.terms(logps, ref_logps, batch):
            total = row_weights.sum() if counts is None else counts[self.unit(name)].to(values.dtype)
            loss = loss + weight * (values * row_weights).sum() / total.clamp_min(1e-9)
        if aux_loss is not None:
            part = 1.0 if counts is None else batch["weights"].sum() / counts[0].to(aux_loss.dtype)
            loss = loss + self.router_weight * part * aux_loss.to(loss.device)
        return loss if counts is None else loss * self.processes

    def mean(self, means: dict[str, float]) -> float:
        """The loss over an evaluation, from the means of its terms, which are taken out of `means`."""
        losses = [means.pop(f"loss/{name}", 0.0) for name in self.loss_types]  # none of sft where no label is above 1/2
        loss = sum(weight * own for weight, own in zip(self.weights, losses, strict=True))
        return loss + self.router_weight * means.get("aux_loss", 0.0)


def best_column(batch: Batch) -> Tensor:
    """(B, 1) column of each prompt's highest reward, the first of a tie."""
    return batch["rewards"].masked_fill(~batch["valid"], -torch.inf).argmax(1, keepdim=True)
