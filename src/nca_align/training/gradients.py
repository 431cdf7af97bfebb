"""The exact gradients of a batch with the activations of one of its chunks at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn

from ..batching.collator import Batch, Chunk
from ..models.routing import load_balancing_loss

# (B, K) log-probabilities of a chunk's completions, zeros for all others, and the use of its experts, if any
Forward = Callable[[Chunk], tuple[Tensor, Tensor | None]]


def empty_cache(every: int | None, step: int) -> None:
    """As transformers' `training_step` does after each micro-batch of every so many steps."""
    if every is not None and step % every == 0 and torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def backward_by_chunk(
    batch: Batch,
    chunks: list[tuple[Chunk, float]],
    forward: Forward,
    loss: Callable[[Tensor, Tensor | None], Tensor],
    separable: bool,
    accelerator: Accelerator,
    model: nn.Module,
) -> tuple[Tensor, Tensor | None]:
    """Leave d loss / d logp_i · d logp_i on the parameters, chunk by chunk.

    A separable loss (NCA) has d loss / d logp_i from logp_i alone. The others first take all K without a gradient. So
    does a load-balancing loss, which needs the whole batch's use of the experts.

    Args:
        batch: see `batching.collator`.
        chunks: see `pad_chunks_across_processes`.
        forward: a pass of the model over one chunk.
        loss: of the batch's (B, K) log-probabilities and its load-balancing loss.
        separable: see `Objective.separable`.
        accelerator, model: the trainer's; the model as accelerate wrapped it.

    Returns:
        What `loss` takes, of the whole batch, without gradients.
    """
    shape, device, own = batch["rewards"].shape, accelerator.device, len(batch["chunks"])
    logps, use = torch.zeros(shape, device=device), None
    states: list[tuple | None] = [None] * len(chunks)
    if not separable:
        with torch.no_grad():
            for i, (chunk, factor) in enumerate(chunks):
                states[i] = _random_state(device)
                own_logps, own_use = forward(chunk)
                logps += factor * own_logps
                use = sum_of(use, own_use, factor)
    aux_loss = None if use is None else load_balancing_loss(use)
    for chunk, factor in chunks[own:]:
        with _gradient_sync(accelerator, model, last=False):
            _backward(accelerator, factor * forward(chunk)[0].sum())
    for i, (chunk, _) in enumerate(chunks[:own]):
        mine = torch.zeros(shape.numel(), dtype=torch.bool, device=device)
        mine = mine.index_fill(0, chunk["completion_index"], True).view(shape)
        with _gradient_sync(accelerator, model, last=i == own - 1):
            _restore(states[i], device)  # both passes over a chunk have the same dropout
            live, own_use = forward(chunk)
            live_aux_loss = aux_loss
            if use is not None and own_use is not None:
                live_aux_loss = load_balancing_loss(use + own_use - own_use.detach())
            _backward(accelerator, loss(torch.where(mine, live, logps), live_aux_loss))
        logps = torch.where(mine, live.detach(), logps)
    return logps, aux_loss


def sum_of(total: Tensor | None, part: Tensor | None, factor: float) -> Tensor | None:
    """`total` and `factor` times `part`; None where neither is there."""
    if part is None:
        return total
    return factor * part if total is None else total + factor * part


def pad_chunks_across_processes(chunks: list[Chunk], sharded: bool) -> list[tuple[Chunk, float]]:
    """The chunks, which count 1, and the last one again, which counts 0, as often as another process has more.

    Args:
        sharded: whether each forward gathers weights, which all processes must come to.
    """
    waiting = max(gather_object([len(chunks)])) - len(chunks) if sharded else 0
    return [(chunk, 1.0) for chunk in chunks] + [(chunks[-1], 0.0)] * waiting


def _backward(accelerator: Accelerator, loss: Tensor) -> None:
    """A backward of a loss that is scaled for gradient accumulation already."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))


@contextmanager
def _gradient_sync(accelerator: Accelerator, model: nn.Module, last: bool) -> Iterator[None]:
    """Around the forward and backward of a chunk: only the last one's gradients are synchronised.

    The forward belongs inside: DDP sends its buffers round in each that is to be synchronised, and processes may have
    unequal numbers of chunks. DeepSpeed's backward steps the engine where gradients are synchronised. FSDP has equal
    numbers, and `sync_each_batch` reduces after each, so that no card holds whole gradients.
    """
    before, kind = accelerator.sync_gradients, accelerator.distributed_type
    each = kind == DistributedType.FSDP and accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
    accelerator.sync_gradients = before and last
    try:
        with nullcontext() if last or each or kind == DistributedType.DEEPSPEED else accelerator.no_sync(model):
            yield
    finally:
        accelerator.sync_gradients = before


def _random_state(device: torch.device) -> tuple:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _restore(state: tuple | None, device: torch.device) -> None:
    if state is not None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
