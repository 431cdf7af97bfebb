"""The states of recurrent layers between the pieces of a tree of conversations, as values that gradients flow through.

transformers' own cache writes its states in place, and is of one batch. `RecurrentCache` only reads the states that
a piece starts from, expanded to its rows, and hands out those that it ends with:

    with cached_checkpointing(model):  # does nothing without gradient checkpointing
        cache = RecurrentCache(model.config, past, rows)  # `past` is None at the start of a conversation
        model(input_ids=…, position_ids=…, use_cache=False, **{cache_argument(model): cache})
    loss = inject_gradients(loss, cache.states(), left_there)  # where later pieces started from them
    loss.backward()
    add_gradients(left_at_past, cache.gradients())

A piece that starts from a state has rows of `MIN_TOKENS` at least: layers take one token for a step of generation.
Rows may be padded on the right, where nobody reads the state that they end with.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GradientCheckpointingLayer, PreTrainedConfig

from ..errors import PackingError

# (layer, "conv" or "recurrent", which of the layer's) → (1, ...), where layers may have several of each
Place = tuple[int, str, int]
States = dict[Place, Tensor]

MIN_TOKENS = 2  # of a row that starts from a state
# Model types whose state can't be passed from piece to piece, although they have the layers of a known cache
_SCAN_FROM_ZERO = "its Mamba 1 layers scan more than one token from an empty state only"
_OWN_CACHE = "it keeps its states in a cache of its own"
_UNCUT = {
    "falcon_mamba": _SCAN_FROM_ZERO,
    "jamba": _SCAN_FROM_ZERO,
    "mamba": _SCAN_FROM_ZERO,
    "minimax": _OWN_CACHE,
    "recurrent_gemma": "it keeps its states in its layers",
    "rwkv": _OWN_CACHE,
    "xlstm": _OWN_CACHE,
    "zamba": _SCAN_FROM_ZERO,
}
# What transformers keeps for a layer, by its class → whether that includes recurrent states; others are an obstacle
_KINDS = {
    "DynamicLayer": False,
    "DynamicSlidingWindowLayer": False,
    "DummyLayer": False,
    "LinearAttentionLayer": True,
    "LinearAttentionAndFullAttentionLayer": True,
    "LinearAttentionAndSlidingWindowAttentionLayer": True,
}
_NO_MIXING = ("mlp", "moe")
REENTRANT = "`gradient_checkpointing_kwargs: {use_reentrant: true}` keeps no graph of recurrent states"


def recurrent_layers(config: PreTrainedConfig) -> set[int]:
    """Which layers of a model of this config have states beside keys and values, which a `RecurrentCache` carries.

    Raises:
        NotImplementedError: a layer has states of an unknown kind.
    """
    own = [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    if unknown := sorted(set(own) - _KINDS.keys()):
        raise PackingError(f"the state of {', '.join(unknown)} can't be passed from piece to piece")
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or [None] * len(own)
    # transformers before 5.24 counts layers that mix no tokens as recurrent ones
    return {i for i, (name, kind) in enumerate(zip(own, kinds, strict=True)) if _KINDS[name] and kind not in _NO_MIXING}


class RecurrentCache(Cache):
    """What a model's forward takes as its cache: recurrent layers start from `past`, attention layers keep nothing.

    Args:
        config: of the model.
        past: states of one row, which the piece starts from; None for the start of a conversation.
        rows: R, of the piece.
    """

    def __init__(self, config: PreTrainedConfig, past: States | None = None, rows: int = 1):
        super().__init__(layers=[])
        self._layers = recurrent_layers(config)
        self._starts = {
            place: state.detach().requires_grad_(torch.is_grad_enabled()) for place, state in (past or {}).items()
        }
        self._expanded = {place: state.expand(rows, *state.shape[1:]) for place, state in self._starts.items()}
        self._ends: States = {}

    def states(self, row: int = 0) -> States:
        """What one row ended with, with the graph; to be called after the forward.

        A row that is padded ended with nothing that could be read.

        Raises:
            NotImplementedError: a layer did not get this cache, or did not hand its state on.
        """
        self._check_handed_on()
        return {place: state[row : row + 1] for place, state in self._ends.items()}

    def kept(self, row: int = 0) -> States:
        """The same as values of their own, which keep nothing of the forward alive."""
        return {place: state.detach().clone() for place, state in self.states(row).items()}

    def gradients(self) -> States:
        """Gradients at `past` after the backward, summed over the rows; none of a state that had none.

        Raises:
            NotImplementedError: as `states`.
        """
        self._check_handed_on()
        return {place: state.grad for place, state in self._starts.items() if state.grad is not None}

    def _check_handed_on(self) -> None:
        if not (self._ends.keys() >= self._starts.keys() and {layer for layer, *_ in self._ends} >= self._layers):
            raise PackingError("the model's layers don't pass on the states of their recurrent parts")

    def _end(self, place: Place, state: Tensor) -> None:
        # A checkpointed layer runs again in the backward: the graph that gradients go into is that of its first run
        self._ends.setdefault(place, state)

    # What layers call

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The last inputs (R, channels, kernel size) of a convolution in the past."""
        return self._expanded.get((layer_idx, "conv", state_idx))

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs
    ) -> Tensor:
        """The inputs (R, channels, T) of a convolution behind those of the past; the last ones are the new state."""
        past = self.get_conv_state(layer_idx, state_idx)
        if past is None:
            size = conv_kernel_size or conv_states.shape[-1]
            whole = F.pad(conv_states, (max(0, size - conv_states.shape[-1]), 0))
        else:
            size = past.shape[-1]
            whole = torch.cat([past, conv_states], -1)
        self._end((layer_idx, "conv", state_idx), whole[..., -size:])
        return whole

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The state (R, ...) of the past."""
        return self._expanded.get((layer_idx, "recurrent", state_idx))

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs) -> Tensor:
        """Take the new state (R, ...)."""
        self._end((layer_idx, "recurrent", state_idx), recurrent_states)
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Whether the piece starts from a state."""
        return bool(self._expanded)

    def is_recording_past(self, layer_idx: int) -> bool:
        """True: by it layers leave out the step of generation that writes a convolution's state in place."""
        return True

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Keys and values as they come: attention layers find those of the past elsewhere."""
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0: no keys are kept."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys of a mask, and where they begin."""
        return query_length, 0


class _Injected(torch.autograd.Function):
    """A loss, unchanged, whose backward also starts from given gradients at other tensors."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = [gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, tensors, strict=True)]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, *ctx.gradients


def inject_gradients(loss: Tensor, states: States, gradients: States) -> Tensor:
    """`loss`, whose backward also adds `gradients` at `states`: one backward, which a `GradScaler` scales once.

    Args:
        loss: scalar of a piece.
        states: what it ended with, `RecurrentCache.states`.
        gradients: what later pieces left there, scaled as their losses were. Those of states without a graph count
            for nothing.
    """
    places = [place for place in gradients if states[place].requires_grad]
    if not places:
        return loss
    return _Injected.apply(loss, [gradients[place] for place in places], *(states[place] for place in places))


def add_gradients(total: States, more: States) -> None:
    """Add `more` to `total` in place, in float32 at least."""
    for place, gradient in more.items():
        before = total.get(place)
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        total[place] = wide if before is None else before + wide


def cache_argument(model: nn.Module) -> str | None:
    """The name by which the forward of `model` takes a cache, which differs between versions of transformers."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in taken), None)


@contextmanager
def cached_checkpointing(model: nn.Module) -> Iterator[None]:
    """Within it, checkpointed layers of `model` get the cache of a forward, which has to be a `RecurrentCache`.

    transformers takes it from them, since its own cache would be written a second time in the backward.

    Raises:
        NotImplementedError: the checkpointing is reentrant.
    """
    if reason := _reentrant(model):
        raise PackingError(reason)
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    layers = [layer for layer in layers if not layer._can_checkpoint_with_cache]
    for layer in layers:
        layer._can_checkpoint_with_cache = True
    try:
        yield
    finally:
        for layer in layers:
            del layer._can_checkpoint_with_cache  # of the object: its class has it as it was


def recurrent_obstacle(model: Any) -> str | None:
    """Why the state of `model` can't be passed from piece to piece, in words that end a sentence; None where it can.

    Args:
        model: without its adapters.
    """
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if reason := _UNCUT.get(config.model_type):
        return f"{name} can't start from the state of an earlier piece, because {reason}"
    try:
        recurrent = recurrent_layers(config)
    except PackingError as error:
        return f"{name} has layers of another kind: {error.obstacle}"
    if model._is_stateful and not recurrent:
        return f"{name} keeps its states in a cache of its own"
    if cache_argument(model) is None:
        return f"the forward of {name} takes no cache"
    return _reentrant(model)


def _reentrant(model: nn.Module) -> str | None:
    # The first run of a reentrant checkpoint builds no graph, so that no gradient could go into the state it ends with
    for layer in model.modules():
        run = getattr(layer, "_gradient_checkpointing_func", None)
        if getattr(layer, "gradient_checkpointing", False) and getattr(run, "keywords", {}).get("use_reentrant"):
            return REENTRANT
    return None
