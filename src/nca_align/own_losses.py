"""Losses that users write: known by `module:function`, and tried on random tensors before anything is trained.

A loss of one's own is a function `(pi_logps, ref_logps, rewards, alpha, beta, mask)`, with the shapes and units of
`losses.reward_loss`. It returns (B,), one loss a prompt. What stands at a masked position is 0 when it is called.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import UserError
from .reward_tensors import everywhere
from .user_functions import cause, find_function, function_name, names_a_function

ARGUMENTS = ("pi_logps", "ref_logps", "rewards", "alpha", "beta", "mask")
_ALPHA, _BETA, _B, _K = 0.5, 0.1, 6, 5  # of what it is tried on: more prompts than completions, so that axes differ


class OwnLoss(str):
    """The name `module:function` of a user's loss, which holds the function too.

    It is plain text to JSON, logs, trackers and other processes. Unpickled, it finds the function by its name, when it
    is first called.

    Args:
        loss: `module:function`, of the current folder too; or the function itself.
    """

    def __new__(cls, loss: str | Callable[..., Tensor]) -> "OwnLoss":
        own = super().__new__(cls, loss if isinstance(loss, str) else function_name(loss))
        if not isinstance(loss, str):
            own.function = loss
        return own

    def __reduce__(self):
        return OwnLoss, (str(self),)

    def __deepcopy__(self, memo):
        return self

    @functools.cached_property
    def function(self) -> Callable[..., Tensor]:
        """The function itself.

        Raises:
            UserError: its name finds none.
        """
        return find_function(self, "loss_type")

    def __call__(
        self, pi_logps: Tensor, ref_logps: Tensor, rewards: Tensor, alpha: float, beta: float, mask: Tensor | None
    ) -> Tensor:
        """(B,), as `losses.reward_loss`; the function sees 0 at masked positions, and float32 at least."""
        mask = everywhere(rewards, mask)
        tensors = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (pi_logps, ref_logps))
        pi_logps, ref_logps, rewards = (torch.where(mask, tensor, 0) for tensor in (*tensors, rewards))
        losses = self.function(pi_logps, ref_logps, rewards, alpha, beta, mask)
        return losses + 0 * pi_logps.sum(1)  # a batch in which it takes no completion has a gradient as well, of 0

    @property
    def is_found_by_name(self) -> bool:
        """Whether the name finds this very function, which it doesn't of a lambda, a closure or a partial."""
        try:
            return names_a_function(self) and find_function(self, "loss_type") is self.function
        except UserError:
            return False

    @property
    def separable(self) -> bool:
        """Whether the function has the attribute `separable`: a completion's gradient needs no other's."""
        return bool(getattr(self.function, "separable", False))

    @functools.cached_property
    def reads_alpha(self) -> bool:
        """Whether another α makes another loss of random tensors."""
        rows = _draw()
        return any(not _alike(self._try(rows, alpha), self._try(rows)) for alpha in (_ALPHA / 2, _ALPHA * 2))

    @property
    def breaks_ties(self) -> bool:
        """Whether the order of completions with equal rewards counts."""
        rows = _draw(ties=True)
        tried = self._try(rows)
        return any(not _alike(self._try(rows.at(order)), tried.at(order)) for order in _orders())

    @torch.random.fork_rng(devices=[])  # trying it moves no random numbers
    def check(self) -> "OwnLoss":
        """Try it on random tensors, and return it.

        Raises:
            UserError: what is wrong with it, in one sentence.
        """
        try:
            inspect.signature(self.function).bind(*ARGUMENTS)
        except TypeError as error:
            raise UserError(
                f"`loss_type` {self} takes {inspect.signature(self.function)}; it must take the six arguments "
                f"({', '.join(ARGUMENTS)}), in this order"
            ) from error
        except ValueError:  # a built-in function has no signature
            pass
        rows = _draw()
        tried = self._try(rows)
        if not _alike(self._try(rows), tried):
            raise UserError(f"`loss_type` {self} gives two losses for the same tensors; it must draw no random numbers")
        for row in range(_B):
            if not _alike(self._try(rows.rows([row])), tried.rows([row])):
                raise UserError(
                    f"`loss_type` {self} gives a prompt another loss when other prompts are in the batch. A prompt's "
                    "loss must come from its own completions: take means and sums over axis 1 alone."
                )
        if not tried.gradient.any():
            raise UserError(
                f"`loss_type` {self} has no gradient in `pi_logps`; it must depend on them without `detach`, "
                "`no_grad` or `item`"
            )
        full = rows.mask.all(1).nonzero()[:, 0].tolist()
        for these in (full, [*range(_B)]):  # masked positions in front come last
            own, known = rows.rows(these), tried.rows(these)
            if any(not _alike(self._try(own.at(order)), known.at(order)) for order in _orders()):
                raise UserError(
                    f"`loss_type` {self} gives another loss or gradient when a prompt's completions change places. It "
                    "must go by their rewards, not by where they stand."
                )
        for row in range(_B):
            here = rows.mask[row].nonzero()[:, 0]
            if not _alike(self._try(rows.rows([row]).at(here)), tried.rows([row]).at(here)):
                raise UserError(
                    f"`loss_type` {self} gives a prompt another loss when masked positions are added. These must not "
                    "count: leave them out of sums, means and softmax by `mask`."
                )
        self._try(_draw(ties=True))
        if self.separable and not self._is_separable(rows, tried):
            raise UserError(
                f"`loss_type` {self} says that it is separable, but a completion's gradient changes with the "
                "log-probability of another. Leave the attribute `separable` out."
            )
        return self

    def _is_separable(self, rows: "_Rows", tried: "_Tried") -> bool:
        """Whether each completion's gradient stays where the policy's other log-probabilities are others."""
        others = _draw(seed=1).pi_logps
        for column in range(_K):
            kept = torch.arange(_K) == column
            moved = rows._replace(pi_logps=torch.where(rows.mask, torch.where(kept, rows.pi_logps, others), 0))
            if not _close(self._try(moved).gradient[:, column], tried.gradient[:, column]):
                return False
        return True

    def _try(self, rows: "_Rows", alpha: float = _ALPHA) -> "_Tried":
        """Its losses of these rows and their gradient, once they are seen to be sound.

        Raises:
            UserError: they aren't.
        """
        count, given = len(rows.rewards), _Rows(*(tensor.clone() for tensor in rows))
        shape = f"{count} × {rows.mask.shape[1]} (prompts × completions)"
        with torch.enable_grad():
            leaf = given.pi_logps.requires_grad_()
            given = given._replace(pi_logps=leaf * 1)  # no leaf in training either
            try:
                losses: Any = self.function(given.pi_logps, given.ref_logps, given.rewards, alpha, _BETA, given.mask)
                for name in rows._fields:
                    if not torch.equal(getattr(given, name), getattr(rows, name)):
                        raise UserError(
                            f"`loss_type` {self} changes its `{name}` in place. It must leave its arguments as they "
                            "are: write `x = x - y`, not `x -= y`."
                        )
                if not isinstance(losses, Tensor) or losses.shape != (count,) or not losses.is_floating_point():
                    what = type(losses).__name__
                    if isinstance(losses, Tensor):
                        what = f"{losses.dtype} tensor of shape {tuple(losses.shape)}"
                    raise UserError(
                        f"`loss_type` {self} returns a {what} for {shape}; it must return one loss a prompt, "
                        f"floating and of shape ({count},)"
                    )
                (gradient,) = torch.autograd.grad((losses + 0 * given.pi_logps.sum(1)).sum(), leaf)
            except UserError:
                raise
            except Exception as error:  # the user's code runs here, which may raise anything
                raise UserError(
                    f"`loss_type` {self} fails on random tensors of {shape}: {cause(error)}; it must take any "
                    "number of both"
                ) from error
        losses = losses.detach()
        self._require_finite("loss", losses.isfinite(), rows)
        self._require_finite("gradient", gradient.isfinite().all(1), rows)
        if gradient[~rows.mask].any():
            raise UserError(
                f"`loss_type` {self} has a gradient at masked positions, where no completion is; leave them out by "
                "`torch.where(mask, x, 0)`"
            )
        return _Tried(losses, gradient)

    def _require_finite(self, what: str, finite: Tensor, rows: "_Rows") -> None:
        if not finite.all():
            row = int(finite.int().argmin())
            rewards = [round(value, 2) for value in rows.rewards[row][rows.mask[row]].tolist()]
            raise UserError(
                f"`loss_type` {self} has a {what} that isn't finite for a prompt with the rewards {rewards} and "
                f"{int((~rows.mask[row]).sum())} masked positions. Divide by nothing that can be 0, as the spread of "
                "equal rewards is. Mask before a logarithm or quotient: `torch.where` after it hides no NaN from the "
                "gradient."
            )


class _Rows(NamedTuple):
    """What a loss is tried on, each (B, K)."""

    pi_logps: Tensor
    ref_logps: Tensor
    rewards: Tensor
    mask: Tensor

    def rows(self, these: list[int]) -> "_Rows":
        return _Rows(*(tensor[these] for tensor in self))

    def at(self, columns: Tensor) -> "_Rows":
        return _Rows(*(tensor[:, columns] for tensor in self))


class _Tried(NamedTuple):
    """What came of it: losses (B,) and their gradient (B, K) by `pi_logps`."""

    losses: Tensor
    gradient: Tensor

    def rows(self, these: list[int]) -> "_Tried":
        return _Tried(self.losses[these], self.gradient[these])

    def at(self, columns: Tensor) -> "_Tried":
        return _Tried(self.losses, self.gradient[:, columns])


def _draw(ties: bool = False, seed: int = 0) -> _Rows:
    """Rows of two to K completions with log-probabilities of the size that 50 tokens have, in training's float32.

    With `ties` some rewards are equal in each row, and all of them in the last one.
    """
    random = functools.partial(torch.randn, _B, _K, generator=torch.Generator().manual_seed(seed), device="cpu")
    ref_logps = -60 + 10 * random()
    pi_logps, rewards = ref_logps + 8 * random(), random()
    if ties:
        rewards = torch.tensor([2.0, 1.0, 2.0, 1.0, 0.0]).expand(_B, _K).clone()
        rewards[-1] = 1.0
    mask = torch.arange(_K) < torch.tensor([5, 2, 4, 3, 5, 4]).unsqueeze(1)
    pi_logps, ref_logps, rewards = (torch.where(mask, tensor, 0) for tensor in (pi_logps, ref_logps, rewards))
    return _Rows(pi_logps, ref_logps, rewards, mask)


def _orders() -> list[Tensor]:
    """Orders of the K columns."""
    return [torch.arange(_K).flip(0), torch.tensor([2, 0, 3, 1, 4])]


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether they differ by no more than float32's rounding, measured by the largest."""
    return bool((one - other).abs().max() <= 1e-4 * other.abs().max())


def _alike(one: _Tried, other: _Tried) -> bool:
    return _close(one.losses, other.losses) and _close(one.gradient, other.gradient)
