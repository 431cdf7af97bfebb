"""The exact gradients of a batch with the activations of one of its chunks at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ..batching.collator import Batch, Chunk
from ..errors import UnsupportedError
from ..models.passes import passes
from ..models.routing import load_balancing_loss

# (B, K) log-probabilities of a chunk's completions, zeros for all others, and the use of its experts, if any
Forward = Callable[[Chunk], tuple[Tensor, Tensor | None]]


def empty_cache(every: int | None, step: int) -> None:
    """As transformers' `training_step` does after each micro-batch of every so many steps."""
    if every is not None and step % every == 0 and torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def logps_by_chunk(batch: Batch, forward: Forward, in_step: bool) -> tuple[Tensor, Tensor | None]:
    """What `backward_by_chunk` returns, without a backward.

    Args:
        batch, forward, in_step: see there. Gradients may be on where the batch is one chunk.

    Raises:
        NotImplementedError: gradients are on, and of several chunks some need those that others leave.
    """
    if torch.is_grad_enabled() and any(getattr(chunk.get("segments"), "read", False) for chunk in batch["chunks"]):
        raise UnsupportedError(
            "`compute_loss` was called with gradients on a batch in pieces (`tokens_per_forward`). Only "
            "`training_step` computes those gradients: call that, or leave `tokens_per_forward` out."
        )
    logps, use = torch.zeros_like(batch["rewards"]), None
    for one in passes(batch["chunks"], scores_all=True, trains=False, in_step=in_step):
        own, own_use = forward(one.chunk)
        logps, use = logps + own, sum_of(use, own_use)
    return logps, None if use is None else load_balancing_loss(use)


def backward_by_chunk(
    batch: Batch,
    forward: Forward,
    loss: Callable[[Tensor, Tensor | None], Tensor],
    separable: bool,
    accelerator: Accelerator,
    model: nn.Module,
    in_step: bool,
) -> tuple[Tensor, Tensor | None]:
    """Leave d loss / d logp_i · d logp_i on the parameters, chunk by chunk.

    A separable loss (NCA) has d loss / d logp_i from logp_i alone. The others first take all K without a gradient. So
    does a load-balancing loss, which needs the whole batch's use of the experts.

    Args:
        batch: see `batching.collator`.
        forward: a pass of the model over one chunk.
        loss: of the batch's (B, K) log-probabilities and its load-balancing loss.
        separable: see `Objective.separable`.
        accelerator, model: the trainer's; the model as accelerate wrapped it.
        in_step: see `models.passes`.

    Returns:
        What `loss` takes, of the whole batch, without gradients.
    """
    chunks = batch["chunks"]
    logps, use = torch.zeros(batch["rewards"].shape, device=accelerator.device), None
    for one in passes(chunks, scores_all=not separable and len(chunks) > 1, trains=True, in_step=in_step):
        with torch.set_grad_enabled(one.trains), _gradient_sync(accelerator, model, last=one.last):
            own, own_use = forward(one.chunk)
            if one.first:
                logps, use = logps + own.detach(), sum_of(use, None if own_use is None else own_use.detach())
            if one.trains:
                live = use if use is None or own_use is None else use + (own_use - own_use.detach())
                aux_loss = None if live is None else load_balancing_loss(live)
                _backward(accelerator, one.root(loss(logps + (own - own.detach()), aux_loss)))
    return logps, None if use is None else load_balancing_loss(use)


def sum_of(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """`total` and `part`; None where neither is there."""
    return part if total is None else total if part is None else total + part


def _backward(accelerator: Accelerator, loss: Tensor) -> None:
    """A backward of a loss that is scaled for gradient accumulation already."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))


@contextmanager
def _gradient_sync(accelerator: Accelerator, model: nn.Module, last: bool) -> Iterator[None]:
    """Around the forward and backward of a chunk: only the last one's gradients are synchronised.

    The forward belongs inside: DDP sends its buffers round in each that is to be synchronised, and processes may have
    unequal numbers of chunks. A piece without a term reaches every parameter too, as DDP needs. DeepSpeed's backward
    steps the engine where gradients are synchronised. FSDP has equal numbers, and `sync_each_batch` reduces after each,
    so that no card holds whole gradients.
    """
    before, kind = accelerator.sync_gradients, accelerator.distributed_type
    each = kind == DistributedType.FSDP and accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    accelerator.sync_gradients = before and last
    try:
        with nullcontext() if last or each or kind == DistributedType.DEEPSPEED else accelerator.no_sync(model):
            yield
    finally:
        accelerator.sync_gradients = before
