"""InfoNCA, NCA and the listwise losses beside them, as pure functions from (B, K) tensors to one loss a prompt.

Every loss is written in the implicit rewards `r = β · (pi_logps − ref_logps)` of one prompt's K completions. They are
computed in float32, or in float64 where `pi_logps` or `ref_logps` is float64, and so is the loss that comes back. What
stands at a masked position is never used: it may be NaN, and its gradient is exactly 0. Arguments, shapes and errors
are the same for all of them and stand under `reward_loss`; each adds its formula and what it does with equal rewards.

A new loss is a function here under `@_checked`, and an entry in `LOSSES` by a name in lower case. Where it reads α,
`READS_ALPHA` names it too. `SEPARABLE` names it only where a completion's gradient needs no other's log-probability.
`LABELS` names it where rewards are labels.
The configuration, `--help` and `nca-align compare` follow these tables. "sft" stands in `training.objective`, since its
mean is over tokens. A user's own loss, `module:function`, stands in `own_losses`.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UnsupportedError, UserError, UserTypeError
from .own_losses import OwnLoss
from .reward_tensors import below_best, better_pairs, check_rows, everywhere, logratios, loss_inputs, mean_logistic
from .user_functions import names_a_function

P = ParamSpec("P")


def _checked(loss: Callable[P, Tensor], labels: bool = False) -> Callable[P, Tensor]:
    """`loss`, which first looks at what it is given. `reward_loss` calls what this wraps."""

    @functools.wraps(loss)
    def checked(pi_logps, ref_logps, rewards, alpha, beta, mask=None, *args, **kwargs) -> Tensor:
        check_rows(rewards, mask, alpha, beta, labels, 2 - labels, pi_logps=pi_logps, ref_logps=ref_logps)
        return loss(pi_logps, ref_logps, rewards, alpha, beta, mask, *args, **kwargs)  # type: ignore[arg-type]

    return checked  # type: ignore[return-value]


@_checked
def nca_loss(
    pi_logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    alpha: float,
    beta: float,
    mask: Tensor | None = None,
    negative_weight: float = 1.0,
) -> Tensor:
    """NCA: each completion on its own against the reference, so that likelihoods count and not their differences alone.

        L = −Σ_i w_i · logσ(r_i) − λ/K · Σ_i logσ(−r_i),    w = softmax(rewards / α), λ = `negative_weight`
        ∂L/∂r_i = −w_i (1 − σ(r_i)) + λ σ(r_i) / K,    least at r_i = log(K w_i / λ)

    A row whose rewards are all equal has the uniform target: its implicit rewards are drawn to −log λ, 0 by default.
    K counts the row's valid completions.

    Args:
        negative_weight: λ, 0 or more, on the second term alone; 1 is the paper's.

    Source: arXiv 2402.05369; λ is free in Condition Contrastive Alignment (arXiv 2410.09347).

    Example:
        >>> logps = torch.tensor([[-2.0, -3.0]])  # (B, K): one prompt with two completions
        >>> nca_loss(logps, logps, torch.tensor([[1.0, 0.0]]), alpha=0.3, beta=0.1)  # 2 log 2: nothing is learnt yet
        tensor([1.3863])
    """
    if not 0 <= negative_weight < math.inf:
        raise UserError(
            f"`negative_weight` is {negative_weight}; it must be a finite number of 0 or more: 1 is the paper's NCA."
        )
    r, w, mask = loss_inputs(pi_logps, ref_logps, rewards, alpha, beta, mask)
    negative = torch.where(mask, F.logsigmoid(-r), 0).sum(1) / mask.sum(1)
    return -(w * F.logsigmoid(r)).sum(1) - negative_weight * negative


@_checked
def infonca_loss(
    pi_logps: Tensor, ref_logps: Tensor, rewards: Tensor, alpha: float, beta: float, mask: Tensor | None = None
) -> Tensor:
    """InfoNCA: classify which completion is the rewarded one; DPO where K = 2 and the target is hard.

        L = −Σ_i w_i · log softmax(r)_i,    w = softmax(rewards / α)
        ∂L/∂r_i = softmax(r)_i − w_i,    least at r = rewards / α + any constant

    A row whose rewards are all equal has the uniform target: its implicit rewards are drawn together.

    Source: arXiv 2402.05369.

    Example:
        >>> logps = torch.tensor([[-2.0, -3.0]])  # (B, K): one prompt with two completions
        >>> infonca_loss(logps, logps, torch.tensor([[1.0, 0.0]]), alpha=0.3, beta=0.1)  # log 2: nothing is learnt yet
        tensor([0.6931])
    """
    r, w, mask = loss_inputs(pi_logps, ref_logps, rewards, alpha, beta, mask)
    return -(w * torch.where(mask, r.masked_fill(~mask, -math.inf).log_softmax(1), 0)).sum(1)


@_checked
def all_pairs_loss(
    pi_logps: Tensor, ref_logps: Tensor, rewards: Tensor, alpha: float, beta: float, mask: Tensor | None = None
) -> Tensor:
    """DPO's logistic loss over every pair of unequal rewards, the paper's way to give DPO more than two completions.

        L = mean over {(i, j): rewards_i > rewards_j} of −logσ(r_i − r_j)

    Only the order of the rewards counts, α does not. No finite optimum: the gaps keep growing. A row whose rewards are
    all equal has no pair: its loss is 0 and its gradient 0.

    Source: arXiv 2402.05369 (its DPO baseline at K = 4); DPO, arXiv 2305.18290.
    """
    r, _, mask = loss_inputs(pi_logps, ref_logps, rewards, alpha, beta, mask)
    return mean_logistic(r, better_pairs(rewards, mask))


@_checked
def best_vs_rest_loss(
    pi_logps: Tensor, ref_logps: Tensor, rewards: Tensor, alpha: float, beta: float, mask: Tensor | None = None
) -> Tensor:
    """DPO's logistic loss of the best completion against each worse one; the order among the rest is left alone.

        L = mean over {(i, j): rewards_i = max > rewards_j} of −logσ(r_i − r_j)

    Completions that tie for the best are each set against every worse one. Only the order of the rewards counts, α does
    not. No finite optimum. A row whose rewards are all equal has no pair: its loss is 0 and its gradient 0.

    Source: the pairs (best, other) of a ranking in DPO's loss, arXiv 2305.18290.
    """
    r, _, mask = loss_inputs(pi_logps, ref_logps, rewards, alpha, beta, mask)
    pairs = better_pairs(rewards, mask)
    best = ~pairs.any(1)  # (B, K), nobody is better than i
    return mean_logistic(r, pairs & best.unsqueeze(2))


@_checked
def plackett_luce_loss(
    pi_logps: Tensor, ref_logps: Tensor, rewards: Tensor, alpha: float, beta: float, mask: Tensor | None = None
) -> Tensor:
    """Plackett–Luce: the negative log-likelihood of drawing the completions in the order of their rewards.

        L = Σ_i [ log(e^{r_i} + Σ_{j: rewards_j < rewards_i} e^{r_j}) − r_i ]

    Completions with equal rewards share a rank: each is drawn against itself and all that is strictly worse, never
    against the other. Only the order counts, α does not. A sum over ranks (log K! at r = 0), DPO at K = 2. No finite
    optimum. A row whose rewards are all equal has one rank: its loss is 0 and its gradient 0.

    Source: DPO under the Plackett–Luce model, arXiv 2305.18290, appendix A.3; sharing a rank is ours.
    """
    r, _, mask = loss_inputs(pi_logps, ref_logps, rewards, alpha, beta, mask)
    rivals = better_pairs(rewards, mask) | torch.eye(r.shape[1], dtype=torch.bool, device=r.device)
    # A masked completion is its own only rival: logsumexp(r_i) − r_i is 0, in value and in gradient.
    return (r.unsqueeze(1).masked_fill(~rivals, -math.inf).logsumexp(2) - r).sum(1)


@_checked
def gvpo_loss(
    pi_logps: Tensor, ref_logps: Tensor, rewards: Tensor, alpha: float, beta: float, mask: Tensor | None = None
) -> Tensor:
    """GVPO: regress the centred implicit rewards on the centred rewards over α; InfoNCA's optimum by least squares.

        L = 1 / (2 (K − 1)) · Σ_i ( (rewards_i − mean rewards) / α − (r_i − mean r) )²,    least at r = rewards / α + C

    A row whose rewards are all equal draws its implicit rewards together, as InfoNCA's does. Grows with the square of
    the rewards' spread over α: choose α so that this is a few nats.

    Source: arXiv 2504.19599, and the authors' code (github.com/jszkc/GVPO), with R/β there written rewards/α here.
    """
    r, _, mask = loss_inputs(pi_logps, ref_logps, rewards, alpha, beta, mask)
    gaps = (below_best(rewards, mask) / alpha).to(r.dtype) - r
    count = mask.sum(1, keepdim=True)
    residuals = torch.where(mask, gaps - torch.where(mask, gaps, 0).sum(1, keepdim=True) / count, 0)
    return residuals.square().sum(1) / (2 * (count.squeeze(1) - 1))


@functools.partial(_checked, labels=True)
def outcome_loss(
    pi_logps: Tensor, ref_logps: Tensor, rewards: Tensor, alpha: float | None, beta: float, mask: Tensor | None = None
) -> Tensor:
    """Cross-entropy of σ(r) against each completion's label y, its reward from 0 (wrong) to 1 (right); any K ≥ 1.

        L = −1/K · Σ_i [ y_i logσ(r_i) + (1 − y_i) logσ(−r_i) ]
        ∂L/∂r_i = (σ(r_i) − y_i) / K,    least at σ(r_i) = y_i

    α isn't read, and may be None. A hard label has no finite optimum: r keeps growing. K counts the valid completions.

    Source: the CE variant of implicit process rewards, arXiv 2412.01981, whose code takes the mean over responses.

    Example:
        >>> logps = torch.tensor([[-2.0, -3.0]])
        >>> outcome_loss(logps, logps, torch.tensor([[1.0, 0.0]]), alpha=None, beta=0.1)  # log 2: nothing is learnt yet
        tensor([0.6931])
    """
    mask = everywhere(rewards, mask)
    r = beta * logratios(pi_logps, ref_logps, mask)
    y = torch.where(mask, rewards, 0).to(r.dtype)
    return -torch.where(mask, y * F.logsigmoid(r) + (1 - y) * F.logsigmoid(-r), 0).sum(1) / mask.sum(1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "nca": nca_loss,
    "infonca": infonca_loss,
    "all_pairs": all_pairs_loss,
    "best_vs_rest": best_vs_rest_loss,
    "plackett_luce": plackett_luce_loss,
    "gvpo": gvpo_loss,
    "outcome": outcome_loss,
}
# A completion's gradient needs its own log-ratio only; every other loss needs the row's K log-probabilities first.
SEPARABLE = frozenset({"nca", "outcome"})
# Losses in which α counts: of the others only the order of the rewards does, and `compare` makes no cells of α.
READS_ALPHA = frozenset({"nca", "infonca", "gvpo"})
# Losses that read the rewards themselves, as labels in [0, 1]: one completion a prompt is enough for them.
LABELS = frozenset({"outcome"})


def reward_loss(
    pi_logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    alpha: float | None,
    beta: float,
    loss_type: str | Callable[..., Tensor] = "nca",
    mask: Tensor | None = None,
    negative_weight: float = 1.0,
    check: bool = True,
) -> Tensor:
    """The alignment loss of each prompt from its K completions' log-probabilities and rewards.

        r_i = β · (pi_logps_i − ref_logps_i),    L = LOSSES[loss_type](r, rewards, α)

    Args:
        pi_logps: (B, K) floating, log π_θ(y|x) in nats, summed over the completion's tokens (EOS included).
        ref_logps: (B, K) floating, the same under the reference model.
        rewards: (B, K), data set scores in any unit, finite where valid; higher is better.
        alpha: temperature of the target in the unit of `rewards`, above 0; None for a loss of labels alone.
        beta: scale of the implicit reward, above 0.
        loss_type: a key of `LOSSES`, in any case ("NCA" and "InfoNCA" as the paper writes them). Or your own loss, as
            a function or `module:function`. It is tried on random tensors at each call that checks.
        mask: (B, K) bool, True where a completion is there (ragged K), at least two a row, or one of a loss of labels.
            None: everywhere.
        negative_weight: weight on NCA's second term, 0 or more; 1 is the paper's.
        check: False for tensors that `RewardCollator` has checked on the CPU: looking at values waits for a GPU.

    Returns:
        (B,), one loss a prompt, not averaged. float32, or float64 where `pi_logps` or `ref_logps` is.

    Raises:
        ValueError: unknown `loss_type`, `alpha` or `beta` not above 0, unequal shapes or not (B, K), a row of fewer
            than two completions, NaN or infinite `rewards`, a label outside [0, 1], a negative `negative_weight`.
        TypeError: log-probabilities that are not floating, a `mask` that is not bool, a `loss_type` that is neither a
            string nor a function.
        NotImplementedError: a `negative_weight` other than 1 with a loss other than NCA.

    Source: arXiv 2402.05369, the PyTorch listing of `reward_loss`.

    Example:
        >>> logps = torch.tensor([[-2.0, -3.0, 0.0]])
        >>> there = torch.tensor([[True, True, False]])  # the prompt has two completions
        >>> rewards = torch.tensor([[1.0, 0.0, 0.0]])
        >>> reward_loss(logps, logps, rewards, alpha=0.3, beta=0.1, loss_type="infonca", mask=there)  # log 2
        tensor([0.6931])
    """
    name = loss_name(loss_type, check=check)
    options = {"negative_weight": negative_weight} if name == "nca" else {}
    if negative_weight != 1 and not options:
        raise UnsupportedError(
            f"`negative_weight` is {negative_weight} with `loss_type` {name!r}. It weighs the second term of 'nca', "
            "which no other loss has: leave it at 1."
        )
    if check:
        labels = name in LABELS
        check_rows(rewards, mask, alpha, beta, labels, 2 - labels, pi_logps=pi_logps, ref_logps=ref_logps)
    loss: Callable[..., Tensor] = name if isinstance(name, OwnLoss) else inspect.unwrap(LOSSES[name])
    return loss(pi_logps, ref_logps, rewards, alpha, beta, mask, **options)


def loss_name(loss_type: str | Callable[..., Tensor], names: Iterable[str] = LOSSES, check: bool = True) -> str:
    """The name among `names` that `loss_type` means, in any case, or an `OwnLoss`, tried by `check`; else an error."""
    if isinstance(loss_type, OwnLoss):
        return loss_type
    if callable(loss_type) or (isinstance(loss_type, str) and names_a_function(loss_type)):
        return OwnLoss(loss_type).check() if check else OwnLoss(loss_type)
    names = list(names)
    if not isinstance(loss_type, str):
        raise UserTypeError(f"`loss_type` is {loss_type!r}; it must be a function or one of {', '.join(names)}.")
    name = loss_type.lower()
    if name not in names:
        begun = [known for known in names if name.startswith(known)]  # TRL's nca_pair is nearest to nca
        nearest = begun or get_close_matches(name, names, n=1)
        guess = f": did you mean {nearest[0]!r}?" if nearest else ""
        must = f"one of {', '.join(names)} (any case), or `module:function`{guess}"
        raise UserError(f"`loss_type` is {loss_type!r}; it must be {must}")
    return name


def labels_alone(names: Iterable[str]) -> bool:
    """Whether rewards are nothing but labels to these losses: none of them has targets or an order."""
    return not LABELS.isdisjoint(names := {*names}) and names <= {*LABELS, "sft"}


def is_separable(name: str) -> bool:
    """Whether a completion's gradient needs its own log-ratio only; a loss of one's own says so itself."""
    return name.separable if isinstance(name, OwnLoss) else name in SEPARABLE


def reads_alpha(name: str) -> bool:
    """Whether α counts in the loss; of one's own it is tried."""
    return name.reads_alpha if isinstance(name, OwnLoss) else name in READS_ALPHA
