"""Running a batch's chunks one after another: whose gradients are synchronised, and the same dropout in both passes."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn


def backward(accelerator: Accelerator, loss: torch.Tensor) -> None:
    """A backward of a loss that is scaled for gradient accumulation already."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    accelerator.backward(loss, **({"scale_wrt_gas": False} if deepspeed else {}))


@contextmanager
def gradient_sync(accelerator: Accelerator, model: nn.Module, last: bool) -> Iterator[None]:
    """Around the forward and backward of a chunk: only the last one's gradients are synchronised.

    The forward belongs inside: DDP sends its buffers round in each that is to be synchronised, and processes may have
    unequal numbers of chunks. DeepSpeed's backward steps the engine where gradients are synchronised.
    """
    state = accelerator.gradient_state
    before = state.sync_gradients
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    state._set_sync_gradients(before and last)
    try:
        with nullcontext() if last or deepspeed else accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(before)


def rng_state(device: torch.device) -> tuple:
    """The random state that `restore_rng` takes."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def restore_rng(state: tuple, device: torch.device) -> None:
    """Let the random numbers that followed `state` come again."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def rng_restored(state: tuple | None, device: torch.device) -> Iterator[None]:
    """The random numbers that followed `state`, so that both passes over a chunk have the same dropout."""
    if state is not None:
        restore_rng(state, device)
    yield
