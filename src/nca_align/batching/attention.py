"""The attention function by which each segment of a packed row sees exactly its own conversation.

`share_prefixes(model)` registers it with transformers' `AttentionInterface`, over the implementation that the model
had, and sets it for good: checkpointed layers run again in the backward, and must find the same function there. A
forward that is given `segments` attends by them; any other (generation, plain evaluation) is handed over to
the model's own implementation, mask function included.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import PackingError
from .recurrent import recurrent_layers, recurrent_obstacle
from .segments import Segments, Stretch

_PREFIX = "prefix_shared_over_"
# Kinds of layers that a config names: those whose attention can be replaced, and those that mix no tokens at all
_SUPPORTED_LAYERS = {"full_attention", "sliding_attention", "attention", "moe", "mlp"}
# Model types whose window stands in the mask alone, which the attention of a packed row never sees
_WINDOW_IN_MASK = {"doge", "paligemma", "phimoe", "qwen2_moe"}
_HALF = (torch.float16, torch.bfloat16)


def is_peft_model(model: Any) -> bool:
    """Whether PEFT put an adapter on a model. accelerate's function of this name reads files at each call, 5 ms."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def prefix_sharing_obstacle(model: Any) -> str | None:
    """Why `model`, with its adapters, can't take a packed row, in words that end a sentence; None where it can."""
    for adapter in getattr(model, "peft_config", {}).values():
        if adapter.is_prompt_learning:
            return f"{adapter.peft_type.value} puts virtual tokens in front of a row"
    model = model.get_base_model() if is_peft_model(model) else model
    config = model.config.get_text_config()
    name = type(model).__name__
    if reason := recurrent_obstacle(model):
        return reason
    recurrent = recurrent_layers(model.config)
    layer_types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    kinds = {kind for i, kind in enumerate(layer_types) if i not in recurrent}
    if foreign := sorted(kind.replace("_", "-") for kind in kinds - _SUPPORTED_LAYERS):
        return f"{name} has {', '.join(foreign)} layers, which a packed row does not go through"
    # Hybrids' attention goes through it, though most of their classes don't say so; one that doesn't fails as it runs
    declared = model._supports_attention_backend or bool(recurrent)
    if not (declared and model._can_set_attn_implementation()):
        return f"{name} does not declare that its attention goes through transformers' AttentionInterface"
    if getattr(config, "sliding_window", None) and model.config.model_type in _WINDOW_IN_MASK:
        return f"{name} does not pass its `sliding_window` to its attention"
    return None


def share_prefixes(model: PreTrainedModel) -> None:
    """Make `model` attend by segments where a forward is given them. Idempotent.

    Raises:
        NotImplementedError: the model can't, with the reason.
    """
    if obstacle := prefix_sharing_obstacle(model):
        raise PackingError(obstacle)
    own = model.config.get_text_config()._attn_implementation
    if own.startswith(_PREFIX):
        return
    if "flash" in own:  # its function reads its own name from the config; generation gets an equal one
        own = "sdpa" if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is None else "eager"
    name = _PREFIX + own
    AttentionInterface.register(name, partial(segment_attention, own=own))
    AttentionMaskInterface.register(name, AttentionMaskInterface()[own])
    model.set_attn_implementation(name)


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it, `model` attends by the implementation that `share_prefixes` found; SDPA in place of a flash kernel."""
    shared = model.config.get_text_config()._attn_implementation or ""
    if not shared.startswith(_PREFIX):
        yield
        return
    model.set_attn_implementation(shared.removeprefix(_PREFIX))
    try:
        yield
    finally:
        model.set_attn_implementation(shared)


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    own: str,
    segments: Segments | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """What the model's layers call: by segments where the forward was given them, else the model's `own` attention.

    Raises:
        NotImplementedError: the mask is a packed row's placeholder, but its segments did not arrive.
    """
    if segments is not None:
        return attend_segments(query, key, value, segments, module=module, **kwargs), None
    if attention_mask is not None and attention_mask.numel() == 1 < key.shape[2]:
        raise PackingError(f"the model's layers don't pass the arguments of its forward on to {type(module).__name__}")
    if own == "eager":  # each modeling file has its own
        attend = sys.modules[type(module).__module__].eager_attention_forward
    else:
        attend = ALL_ATTENTION_FUNCTIONS[own]
    return attend(module, query, key, value, attention_mask, **kwargs)


def attend_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    module: nn.Module | None = None,
    **kwargs,
) -> Tensor:
    """Causal attention of packed rows of T tokens, each segment over its own path from the root.

    Args:
        query: (R, heads, T, D).
        key, value: (R, key-value heads, T, D).
        segments: those of the rows, counted one behind the other.
        scaling: factor of the scores; D ** -0.5 by default.
        sliding_window: tokens that a query sees, itself included, where the layer has a window.
        softcap: bound of the scores (Gemma 2).
        s_aux: (heads,) attention sinks (GPT-OSS).
        module: the layer, by which keys are kept.

    Returns:
        (R, T, heads, D).

    Raises:
        NotImplementedError: the layer adds a bias to its scores.
    """
    if position_bias is not None:
        raise PackingError("the model adds a position bias to its attention's scores")
    if torch.is_autocast_enabled(query.device.type):  # normed queries and keys (Qwen3) come in float32
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    rows = query.shape[0]
    if rows > 1:
        query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
    if segments.kept is not None and module is not None:
        key, value = segments.kept.extend(module, key, value, segments.past, segments.read)
    window = sliding_window or None
    explicit = softcap is not None or s_aux is not None
    if not explicit and dropout == 0.0 and _varlen_takes(query, key, value):
        return _varlen_attention(query, key, value, segments, scaling, window).unflatten(1, (rows, -1))[0]
    outputs = []
    for (start, end), path in segments.calls():
        q, k, v = query[:, :, start:end], _stretches(key, path), _stretches(value, path)
        turned = not (explicit or _on_gpu(q)) and (start, end) in segments.queries
        mask = segments.mask((start, end), path, window, q, last_first=turned)
        if explicit:
            output = _explicit_attention(q, k, v, mask, scaling, dropout, softcap, s_aux)
        else:
            turned = turned and mask is not None
            q = q.flip(2) if turned else q
            grouped = q.shape[1] != k.shape[1]
            if grouped and mask is not None and _on_gpu(q):
                k, v, grouped = *(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v)), False
            output = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
            output = output.flip(2) if turned else output
        outputs.append(output)
    return torch.cat(outputs, 2).transpose(1, 2).contiguous().unflatten(1, (rows, -1))[0]


def _stretches(x: Tensor, path: tuple[Stretch, ...]) -> Tensor:
    # Slices, not an index: gathering by a tensor made a step of K = 16 12 % slower on CPU, all of it in the backward
    slices = [x[:, :, start:end] for start, end in path]
    return slices[0] if len(slices) == 1 else torch.cat(slices, 2)


def _on_gpu(query: Tensor) -> bool:
    """On a CPU the fast kernel groups heads beside a mask, which it reads by its strides; on a GPU none does."""
    return query.is_cuda


def _varlen_takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return (
        query.is_cuda
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and query.dtype in _HALF
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1] <= 256
        and query.shape[-1] % 8 == 0
    )


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """One kernel call for the row: lower-right causal by segment, separate query and key lengths. (1, T, heads, D)."""
    kv_index, cu_seqlens_q, cu_seqlens_k, max_q, max_k = segments.varlen(query.device)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    output: Any = varlen_attn(  # a tuple only where `return_aux` asks for it
        q.contiguous(), k.index_select(0, kv_index), v.index_select(0, kv_index), cu_seqlens_q, cu_seqlens_k, max_q,
        max_k, scale=scaling, window_size=(window - 1 if window else -1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return output.unsqueeze(0)


def _explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The softmax written out, for soft-capped scores and attention sinks."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    else:
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)], 3)
    weights = scores.softmax(3, dtype=torch.float32).to(q.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout) @ v
