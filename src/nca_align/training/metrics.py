"""(B, K) log-probabilities and rewards to ranking, likelihood and target metrics, one value and one weight a prompt."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..batching.collator import Batch
from ..losses import reward_loss
from ..reward_tensors import better_pairs, logratios, target_distribution
from .objective import Objective
from .objective_metrics import objective_metrics
from .outcomes import Outcomes, label_metrics

_BINS = 5
# what an evaluation logs with its standard error over prompts, as `NAME_error`
WITH_ERRORS = ("logratios/best", "rewards/accuracies")
# a metric that each log of prompts has; others may follow `eval_` themselves, as `eval_aux_loss` does
_OF_PROMPTS = re.compile(r"(|eval_(?:.*_)?)(?:logratios/(?:best|right|wrong)|generation/reward)")


def prefixes(names: Iterable[str]) -> dict[str, str]:
    """Prefix of logged metrics → whose they are: "" training's, `eval_` held-out prompts', `eval_test_` the test's."""
    found = {match[1] for name in names if (match := _OF_PROMPTS.fullmatch(name))}
    return {prefix: {"": "training", "eval_": "held-out"}.get(prefix, prefix[5:-1]) for prefix in sorted(found)}


@torch.no_grad()
def row_metrics(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, mask: Tensor, alpha: float | None, beta: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Every metric of the training log as (value, weight), so that means over prompts stay exact however they are cut.

        mean over prompts = Σ value · weight / Σ weight, over rows, micro-batches and ranks alike; no weight: no metric

    Only the rewards and the mask decide what is best, never a position, and completions with equal rewards share their
    rank: `best`, `worst` and `rank_k` are the mean over the completions that tie for it. So the order in which the
    completions stand changes nothing. With r = β · (logps − ref_logps):

    - `rewards/rank_1` … `rank_K`, `logratios/rank_1` … `rank_K`: mean r, and mean log-ratio in nats, of the k-th best
      reward. Rows with fewer completions have no weight.
    - `rewards/best`, `logratios/best` and `logps/best`: those of the first rank. `rewards/worst` and `logratios/worst`
      are those of the row's last.
    - `rewards/margins`: r of the best minus the mean r of all that is worse.
    - `rewards/accuracies`: share of the pairs with unequal rewards in which the better one has the higher r; equal r is
      wrong, as in TRL, so that it is 0 where nothing has moved yet.
    - `rewards/kendall_tau`: τ-b between rewards and r, from −1 to 1; no weight where either has only ties.
    - `rewards/top1`: chance that the highest r belongs to a best completion; equal r share it.
    - `target/entropy` in nats and `target/effective_completions`, its exponential, of w = softmax(rewards / α).
    - `kl/target_model`: KL(w || softmax(r)) in nats, 0 at InfoNCA's optimum.
    - `rewards/chosen`, `rewards/rejected`, `logps/chosen`, `logps/rejected`: TRL's names, for rows of exactly two
      completions; chosen is the higher reward, the first one of a tie (the one place where the order counts).

    A row whose rewards are all equal has no weight in margins, accuracies, Kendall's τ and top1. A row of a single
    completion, which compares nothing, has no weight in any of them. What needs an α is absent without one.

    Args:
        logps, ref_logps, rewards, mask, alpha, beta: as `pi_logps`, `ref_logps` … of `losses.reward_loss`, which looked
            at them, or the collator did: nothing here reads a value, so nothing waits for a GPU.

    Returns:
        Metric name to (value, weight), both (B,), detached, in the dtype of the losses; weights are 0 or 1, and values
        finite also where the weight is 0. The names depend on K alone, the batch's width.

    Source: the curves by rank are those of arXiv 2402.05369; `rewards/accuracies` and `rewards/margins` of two unequal
    completions are TRL's (`trl/trainer/dpo_trainer.py`).
    """
    ratios = logratios(logps, ref_logps, mask)  # (B, K), 0 where masked
    implicit = beta * ratios
    logps = logps.to(ratios.dtype)
    better = better_pairs(rewards, mask)  # (B, K, K), [b, i, j]: i has the higher reward
    pairs = better.sum((1, 2))
    best, worst = mask & ~better.any(1), mask & ~better.any(2)  # (B, K)
    count = mask.sum(1)

    higher = better_pairs(implicit, mask)  # (B, K, K), the same for the implicit rewards
    right = better & higher
    top = mask & (implicit == implicit.masked_fill(~mask, -torch.inf).amax(1, keepdim=True))
    tau, tau_defined = _kendall_tau(better, higher)
    compared, unequal = count > 1, pairs > 0

    metrics = {
        "rewards/best": (_mean(implicit, best), compared),
        "rewards/worst": (_mean(implicit, worst), compared),
        "rewards/margins": (_mean(implicit, best) - _mean(implicit, mask & ~best), unequal),
        "rewards/accuracies": (right.sum((1, 2)) / pairs.clamp(min=1), unequal),
        "rewards/kendall_tau": (tau, tau_defined),
        "rewards/top1": (_mean(best.to(ratios.dtype), top), unequal),
        "logps/best": (_mean(logps, best), compared),
        "logratios/best": (_mean(ratios, best), compared),
        "logratios/worst": (_mean(ratios, worst), compared),
    }
    if alpha is not None:
        entropy = torch.special.entr(target_distribution(rewards, alpha, mask).to(ratios.dtype)).sum(1)
        infonca = reward_loss(logps, ref_logps, rewards, alpha, beta, "infonca", mask, check=False)
        metrics["target/entropy"] = entropy, compared
        metrics["target/effective_completions"] = entropy.exp(), compared
        metrics["kl/target_model"] = infonca - entropy, compared
    above = better.sum(1)  # (B, K), how many have a higher reward
    tied = (mask.unsqueeze(1) & mask.unsqueeze(2) & ~better & ~better.transpose(1, 2)).sum(1)
    for k in range(mask.shape[1]):
        rank = mask & (above <= k) & (k < above + tied)
        metrics[f"rewards/rank_{k + 1}"] = (_mean(implicit, rank), compared & (count > k))
        metrics[f"logratios/rank_{k + 1}"] = (_mean(ratios, rank), compared & (count > k))

    scores = rewards.to(torch.promote_types(rewards.dtype, torch.float32)).masked_fill(~mask, -torch.inf)
    first = scores.argmax(1, keepdim=True)  # of a tie
    chosen = torch.arange(mask.shape[1], device=mask.device) == first  # (B, K)
    for name, side in (("chosen", chosen), ("rejected", mask & ~chosen)):
        metrics[f"rewards/{name}"] = (_mean(implicit, side), count == 2)
        metrics[f"logps/{name}"] = (_mean(logps, side), count == 2)
    return {name: (value.to(ratios.dtype), weight.to(ratios.dtype)) for name, (value, weight) in metrics.items()}


@torch.no_grad()
def calibration(
    logps: Tensor, ref_logps: Tensor, rewards: Tensor, mask: Tensor, alpha: float, beta: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Target against model distribution over the completions, in five equal bins of the target, as `row_metrics` does.

        w = softmax(rewards / α), p = softmax(r) over a prompt's completions; `calibration/target_bin_i` is the mean w,
        `calibration/model_bin_i` the mean p of all completions with w in [(i − 1)/5, i/5), 1 belonging to the last

    Equal in every bin at the optimum of InfoNCA and of NCA, whose implicit rewards differ in a constant a prompt. The
    weights are counts of completions, so that the means are over completions, not prompts.

    Args:
        logps, ref_logps, rewards, mask, alpha, beta: as in `row_metrics`.

    Returns:
        Metric name to (value, weight), both (B,).
    """
    implicit = beta * logratios(logps, ref_logps, mask)
    model = implicit.masked_fill(~mask, -torch.inf).softmax(1)  # (B, K)
    w = target_distribution(rewards, alpha, mask).to(model.dtype)
    bins = (w * _BINS).long().clamp(max=_BINS - 1)
    metrics = {}
    for i in range(_BINS):
        here = mask & (bins == i)
        for name, values in (("target", w), ("model", model)):
            metrics[f"calibration/{name}_bin_{i + 1}"] = (_mean(values, here), here.sum(1).to(model.dtype))
    return metrics


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """(B,) mean of `values` (B, K) over the True of `where`, 0 for a row without any."""
    return torch.where(where, values, 0).sum(1) / where.sum(1).clamp(min=1)


def _kendall_tau(better: Tensor, higher: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) Kendall's τ-b between the orders of rewards and of implicit rewards, (B, K, K), and where it is defined."""
    pairs, implicit_pairs = better.sum((1, 2)), higher.sum((1, 2))  # without ties in the one, in the other
    concordant, discordant = (better & higher).sum((1, 2)), (better & higher.transpose(1, 2)).sum((1, 2))
    untied = pairs * implicit_pairs
    return (concordant - discordant) / untied.clamp(min=1).sqrt(), untied > 0


class PromptMeans:
    """Running sums of weighted metrics, and their exact means over the prompts of all processes.

    Args:
        errors: metrics of which `gather` gives the standard error over prompts too, as `NAME_error`, and `prompts`, the
            number of those that count in the first.
    """

    def __init__(self, errors: Sequence[str] = ()) -> None:
        self._sums: dict[str, list] = {}
        self._errors = errors

    def add(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add one batch's values and weights, both (B,) under each name; nothing is synchronised."""
        squares = {f"{name}_square": (rows[name][0].double().square(), rows[name][1]) for name in self._errors}
        for name, (values, weights) in {**rows, **squares}.items():
            sums = self._sums.setdefault(name, [0.0, 0.0])
            sums[0] += (values.double() * weights).sum()
            sums[1] += weights.double().sum()

    def clear(self) -> None:
        self._sums.clear()

    def state(self) -> dict[str, list[float]]:
        """This process's sums of values and of weights, exactly, for `add_state`."""
        return {name: [float(total), float(weight)] for name, (total, weight) in self._sums.items()}

    def add_state(self, state: Mapping[str, list[float]]) -> None:
        """Add the sums of an earlier process."""
        for name, own in state.items():
            self._sums[name] = [a + b for a, b in zip(self._sums.get(name, [0.0, 0.0]), own, strict=True)]

    def gather(self) -> dict[str, float]:
        """Means since the last call, of the names that have any weight; every process must call it."""
        parts = gather_object([self.state()])
        self.clear()
        whole = PromptMeans()
        for part in parts:
            whole.add_state(part)
        means = {name: total / weight for name, (total, weight) in whole._sums.items() if weight}
        for name in reversed(self._errors):
            if (square := means.pop(f"{name}_square", None)) is not None:
                means["prompts"] = prompts = whole._sums[name][1]
                if prompts > 1:
                    variance = max(square - means[name] ** 2, 0.0)
                    means[f"{name}_error"] = (variance / (prompts - 1)) ** 0.5
        return means


class EvaluationMeans(PromptMeans):
    """`PromptMeans`, and beside them the figures of `Outcomes`."""

    def __init__(self) -> None:
        super().__init__(WITH_ERRORS)
        self.outcomes = Outcomes()

    def clear(self) -> None:
        super().clear()
        self.outcomes.clear()

    def gather(self) -> dict[str, float]:
        outcomes = self.outcomes.gather()
        return super().gather() | outcomes


class MetricLog:
    """What is logged of the batches: of training since its last line, of evaluation since it began."""

    def __init__(self) -> None:
        self.training, self.evaluation = PromptMeans(), EvaluationMeans()
        self.tokens = 0  # read by the model in training, on this process

    @torch.no_grad()
    def add(
        self,
        training: bool,
        objective: Objective,
        logps: Tensor,
        aux_loss: Tensor | None,
        ref_logps: Tensor,
        batch: Batch,
    ) -> Tensor:
        """Add a batch's prompts, and in training only those whose log-probabilities are finite: (B,) bool.

        Args:
            training: else it is an evaluation's.
            objective: what is minimised.
            logps, aux_loss, ref_logps, batch: as `Objective.share` takes them.
        """
        logps, ref_logps = logps.detach(), ref_logps.detach()
        finite = (logps.isfinite() & ref_logps.isfinite()).all(1)
        weights = batch.get("weights", torch.ones(len(logps), device=logps.device))
        if training:
            logps, ref_logps = (values.where(finite.unsqueeze(1), 0.0) for values in (logps, ref_logps))
            weights = weights * finite
            self.tokens += batch["num_tokens"]
        about, alpha = (logps, ref_logps, batch["rewards"], batch["valid"]), objective.alpha
        rows = row_metrics(*about, alpha, objective.beta)
        if not training and alpha is not None:
            rows |= calibration(*about, alpha, objective.beta)
        rows |= objective_metrics(logps, ref_logps, batch, objective.beta, correlations=not training)
        if objective.labels:
            labelled = (logps, ref_logps, batch["given_rewards"], batch["valid"])
            rows |= label_metrics(*labelled, objective.beta)
            if not training:
                self.evaluation.outcomes.add(*labelled, objective.beta, weights > 0)
        rows = {name: (values, weights * own) for name, (values, own) in rows.items()}
        if not training:  # there transformers logs the loss
            for name, _, values, own in objective.terms(logps, ref_logps, batch):
                rows[f"loss/{name}"] = (values, own)
        if aux_loss is not None:
            rows["aux_loss"] = (aux_loss.detach().reshape(1), weights.sum().reshape(1))
        (self.training if training else self.evaluation).add(rows)
        return finite

    def state(self) -> dict[str, Any]:
        """What training has summed up on this process, for `restore`."""
        return {"means": self.training.state(), "num_tokens": self.tokens}

    def restore(self, states: list[dict[str, Any]]) -> None:
        """Go on from the sums of one or more earlier processes."""
        self.training.clear()
        for state in states:
            self.training.add_state(state["means"])
        self.tokens = sum(state["num_tokens"] for state in states)

    def gather(self) -> dict[str, float]:
        """The line of training: means since the last one, and all tokens; every process must call it."""
        return self.training.gather() | {"num_tokens": sum(gather_object([self.tokens]))}
