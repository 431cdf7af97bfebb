"""What a forward keeps for its backward, counted on the model's own code over tensors that hold no data.

The model is built on the device meta, within a second whatever its size. What runs of it has PyTorch's fake tensors:
they have a shape, a type and a device, and take no memory. So the layers say themselves what they keep. Those that are
alike run once and count as often as they are there.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..batching.kept_path import KeptPath
from .logprobs import forward_chunk, logits_budget, rows_at_once
from .policy import base_model

GIB = 1 << 30
# of what a layer keeps: its gradients on top, while it is computed again
_RECOMPUTED = 1.5


@dataclass(frozen=True)
class Kept:
    """Bytes that one forward keeps for its backward.

    Args:
        inputs: of all checkpointed layers, what they begin with.
        layers: of all of them, all that their graph holds, with `inputs` and copies of weights.
        largest: of the layer that keeps most.
        outside: of what comes before and after the layers, without the logits.
        copies: of trained weights in the precision that is computed in, which the forward holds to its end.
        head: the logits of the labelled positions and their gradient.
        keys: the keys and values of the longest path of the pieces, and the gradients of those that pieces read.
    """

    inputs: int = 0
    layers: int = 0
    largest: int = 0
    outside: int = 0
    copies: int = 0
    head: int = 0
    keys: int = 0

    def peak(self, checkpointing: bool) -> tuple[float, int]:
        """The most that a forward and backward hold at a time: without the head, and what the head adds to it.

        Args:
            checkpointing: whether each layer keeps its input alone, and is computed again in the backward.
        """
        if not checkpointing:
            return self.layers + self.outside + self.keys, self.head
        beside = self.inputs + self.outside + self.keys
        again = max(self.copies, _RECOMPUTED * self.largest)
        return beside + again, max(0, int(self.copies + self.head - again))


def checkpointed_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that gradient checkpointing, and FSDP's wrapping, take one at a time."""
    return [
        module for module in model.modules()
        if any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)
    ]  # fmt: skip


def head_bytes(positions: int, vocabulary: int, budget: int) -> int:
    """Bytes of the logits in fp32 and of their gradient, by the tiles of `logprobs.head_logps`."""
    return 8 * vocabulary * rows_at_once(positions, vocabulary, budget)


def count_kept(
    model: nn.Module,
    chunk: dict[str, Any],
    autocast: torch.dtype | None = None,
    device: str = "cuda",
    keys: KeptPath | None = None,
) -> Kept:
    """What a forward over `chunk` keeps.

    Args:
        model: built on the device meta, after `add_token_logps`, in the mode of training.
        chunk: of `RewardCollator`.
        autocast: the precision of mixed precision; None for that of the weights.
        device: by which the budget of the logits is taken.
        keys: room for what the batch's pieces leave for each other; None where none reads another.
    """
    base = base_model(model)
    firsts = _first_of_each_kind(checkpointed_layers(base))
    _on_a_device(model, {id(layer) for layer, first in firsts.items() if layer is not first})
    record = _Record(model)
    with record.attributing(base, firsts) as times, _without_data():
        inputs = {
            name: _without_data().from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in chunk.items()
        }
        record.leave_out(value for value in inputs.values() if isinstance(value, Tensor))
        if keys is not None:
            inputs["segments"] = replace(chunk["segments"], kept=keys)
        mixed = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
        if "segments" in chunk:  # whose masks all layers share
            with torch.no_grad(), record, mixed:
                forward_chunk(model, inputs)
            record.parts.clear()
            record.place = "outside"
            record.leave_out([] if keys is None else keys.places.values())
        with saved_tensors_hooks(record.keep, lambda tensor: tensor), record, mixed:
            forward_chunk(model, inputs)
    own = {key: part for key, part in record.parts.items() if key in times}
    of_layer = {part: layer for layer in times for part in layer.modules()}
    outside, head = record.parts.get("outside", _Part()), record.parts.get("head", _Part())
    return Kept(
        inputs=sum(times[key] * part.input for key, part in own.items()),
        layers=sum(times[key] * part.kept for key, part in own.items()),
        largest=max((part.kept for part in own.values()), default=0),
        outside=outside.kept + head.copies,
        copies=sum(times[key] * part.trained_copies for key, part in own.items())
        + outside.trained_copies + head.trained_copies,
        head=head_bytes(len(chunk["target_ids"]), base.config.get_text_config().vocab_size, logits_budget(device)),
        keys=0 if keys is None else sum(
            times[of_layer[module]] * keys.bytes(place) for (module, _), place in keys.places.items()
        ),
    )  # fmt: skip


@cache
def _without_data() -> FakeTensorMode:
    """Within it, tensors are as those on a device, and take no memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def _on_a_device(model: nn.Module, left_out: set[int]) -> None:
    """Make weights and buffers on the device meta as those on one that computes, but for these modules."""
    new: dict[int, Tensor] = {}
    skipped = {id(part) for module in model.modules() if id(module) in left_out for part in module.modules()}
    with _without_data():
        for module in (module for module in model.modules() if id(module) not in skipped):
            holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in holders:
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_meta:
                        new.setdefault(id(tensor), _like(tensor))
                        tensors[name] = new[id(tensor)]


def _like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="cpu")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


@dataclass
class _Part:
    input: int = 0
    kept: int = 0
    copies: int = 0
    trained_copies: int = 0


@dataclass
class _Record(TorchDispatchMode):
    """Who keeps how much: a layer, `outside` or `head`."""

    model: nn.Module
    parts: dict[Any, _Part] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.place: Any = "outside"
        self._weights = {_storage(weight): weight.requires_grad for weight in self.model.parameters()}
        self._known = {*self._weights}
        self._copies: set[int] = set()
        self._made: set[int] = set()
        self._own: set[int] = set()  # of these since the layer began, with its input
        self.leave_out(self.model.buffers())
        self._alive: list[Tensor] = []  # a storage that is freed would lend its number to another

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # without data PyTorch (2.13) takes this type alone, and real tensors of any
            short = tree_map_only(Tensor, lambda part: part.bfloat16() if part.is_floating_point() else part, args)
            result = func(*short, **(kwargs or {})).to(args[0].dtype)
        else:
            result = func(*args, **(kwargs or {}))
        made = [part for part in tree_leaves(result) if isinstance(part, Tensor)]
        self._alive += made
        new = {*map(_storage, made)} - self._made  # a view is of a storage that was there
        self._made |= new
        self._own |= new
        if func is torch.ops.aten._to_copy.default and (weight := _storage(args[0])) in self._weights:
            self._copies.add(_storage(result))
            self._alive.append(result)
            if self._weights[weight]:
                self._part.trained_copies += result.untyped_storage().nbytes()
        return result

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """Count none of these, as none of the weights and buffers."""
        self._known.update(map(_storage, tensors))

    def keep(self, tensor: Tensor) -> Tensor:
        """Count what autograd keeps, each storage once."""
        storage = _storage(tensor)
        if storage not in self._known:
            self._known.add(storage)
            self._alive.append(tensor)
            size = tensor.untyped_storage().nbytes()
            # what a layer keeps and neither made nor began with is shared by all, such as rotations and masks
            part = self._part if storage in self._own else self.parts.setdefault("outside", _Part())
            part.kept += size
            part.copies += size if storage in self._copies else 0
        return tensor

    @property
    def _part(self) -> _Part:
        return self.parts.setdefault(self.place, _Part())

    @contextmanager
    def attributing(self, base: Any, firsts: dict[nn.Module, nn.Module]) -> Iterator[dict[nn.Module, int]]:
        """Within it the first layer of each kind runs alone; gives how many there are of each."""
        handles: list[Any] = []
        outputs: dict[nn.Module, bool] = {}  # whether it returns a tuple
        for layer, first in firsts.items():
            if layer is not first:
                layer.forward = partial(_pass_on, outputs, first)
                continue
            handles.append(layer.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(layer.register_forward_hook(partial(self._leave, outputs)))
        head = base.get_output_embeddings()
        if head is not None:
            handles.append(head.register_forward_pre_hook(self._enter_head))
        try:
            yield Counter(firsts.values())
        finally:
            for handle in handles:
                handle.remove()
            for layer in (layer for layer, first in firsts.items() if layer is not first):
                del layer.forward

    def _enter(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.place = layer
        self._own = {_storage(hidden)}
        self._part.input = hidden.untyped_storage().nbytes()

    def _enter_head(self, *_: Any) -> None:
        self.place, self._own = "head", set()

    def _leave(self, outputs: dict[nn.Module, bool], layer: nn.Module, args: tuple, output: Any) -> None:
        outputs[layer] = isinstance(output, tuple)
        self.place = "outside"


def _first_of_each_kind(layers: list[nn.Module]) -> dict[nn.Module, nn.Module]:
    """Each layer → the first one that keeps the same."""
    firsts: dict[Any, nn.Module] = {}
    return {layer: firsts.setdefault(_kind(layer), layer) for layer in layers}


def _pass_on(outputs: dict[nn.Module, bool], first: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    return (hidden_states,) if outputs[first] else hidden_states


def _kind(layer: Any) -> tuple:
    """Equal for layers that keep the same; Gemma's later layers read keys and values that some earlier ones store."""
    weights = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    told = ("sliding_window", "is_kv_shared_layer", "store_full_length_kv")
    attention = getattr(layer, "self_attn", None)
    return type(layer), weights, *(getattr(attention, name, None) for name in told)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
