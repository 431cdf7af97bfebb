"""Log-probabilities of the labelled tokens alone: the LM head runs where a label is, and nowhere else."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..batching.attention import prefix_sharing_obstacle, share_prefixes
from ..batching.collator import RewardCollator, batches_by_length
from ..batching.recurrent import recurrent_layers
from ..batching.token_ids import check_ids
from ..errors import PackingError, UnsupportedError
from .passes import passes
from .policy import backbone, base_model
from .routing import expert_use
from .vocabulary import token_rows

# Bytes of logits and of their gradient that a forward may keep for its backward; above it the head runs in tiles that
# the backward computes again. Free at 7B (under 1 % of a step), dear on small models with a large vocabulary, whose
# logits fit anyway: 16k labelled tokens of a vocabulary of 150k are 9.8 GB in fp32.
LOGITS_BUDGET = {"cuda": 2 << 30, "cpu": 4 << 30}
_MOST_ROWS = 4096  # of such a tile


# Composite models whose forward leaves out the scale or cap that stands in their language model's config
_UNSCALED = {"aya_vision", "cohere2_vision", "gemma3", "granite_speech", "granite_speech_plus", "shieldgemma2"}

# Models that ask for each token's kind while they train: 0 is text
_TOKEN_KINDS = {"molmo2": "mm_token_type_ids"}


@dataclass
class TokenLogps(ModelOutput):
    """Output of a forward with `token_index`.

    Args:
        token_logps: (M,) float32, nats, of each labelled token.
        expert_use: (2, E) of a mixture of experts, where `token_counts` are given; see `routing.expert_use`.
    """

    token_logps: torch.Tensor | None = None
    expert_use: torch.Tensor | None = None


class _SelectedLogProbs(torch.autograd.Function):
    """`log_softmax(logits)[i, targets[i]]`, keeping one (M, V) tensor and never building a one-hot gradient."""

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logps = torch.log_softmax(logits, -1, dtype=torch.float32)
        ctx.save_for_backward(logps, targets)
        ctx.dtype = logits.dtype
        return logps.gather(1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        logps, targets = ctx.saved_tensors
        grad_logits = logps.exp().mul_(-grad[:, None])
        grad_logits.scatter_add_(1, targets[:, None], grad[:, None])
        return grad_logits.to(ctx.dtype), None


def logits_budget(device: str) -> int:
    """Bytes of `LOGITS_BUDGET` on a type of device; one that isn't listed has a GPU's."""
    return LOGITS_BUDGET.get(device, LOGITS_BUDGET["cuda"])


def rows_at_once(positions: int, vocab_size: int, budget: int) -> int:
    """How many of the labelled positions have their logits at a time: all, or a tile's."""
    rows = max(1, budget // (8 * vocab_size))  # logits and their gradient, 4 bytes each
    return positions if positions <= rows else min(rows, _MOST_ROWS)


def head_logps(
    head: nn.Module,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    vocab_size: int,
    scale: float = 1.0,
    softcap: float | None = None,
    budget: int | None = None,
) -> torch.Tensor:
    """Log-probability of each target under the LM head, whole within the memory budget, else in recomputed tiles.

    Args:
        head: maps (M, hidden size) to (M, V) logits.
        hidden: (M, hidden size) hidden states at the labelled positions.
        targets: (M,) token ids.
        vocab_size: V, by which the budget is counted.
        scale: factor of the logits (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`).
        softcap: bound of the scaled logits (Gemma's `final_logit_softcapping`).
        budget: bytes of fp32 logits that may be kept; by default `LOGITS_BUDGET` of the device.

    Returns:
        (M,) float32, nats.
    """

    def score(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        if scale != 1.0:
            logits = logits * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return _SelectedLogProbs.apply(logits, targets)

    if budget is None:
        budget = logits_budget(hidden.device.type)
    rows = rows_at_once(len(hidden), vocab_size, budget)
    if rows == len(hidden):
        return score(hidden, targets)
    tiles = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(score, *tile, use_reentrant=False) for tile in tiles])


def logit_transform(config: Any, model_type: str | None = None) -> tuple[float, float | None]:
    """(scale, softcap) that the model's own forward applies to its LM head's output, by the names the families use.

    Args:
        config: of the language model.
        model_type: of the whole model, where the language model is a part of it.
    """

    def first(*names: str) -> float | None:  # a number: MPT's `inv_sqrt_d_model` is not read by its forward
        found = (getattr(config, name, None) for name in names)
        return next((value for value in found if isinstance(value, (int, float))), None)

    if model_type in _UNSCALED:
        return 1.0, None
    scale = first("logit_scale", "output_multiplier", "lm_head_multiplier")
    divisor = first("logits_scaling", "logits_mup_width_multiplier")
    if scale is None and divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    softcap = first("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    return 1.0 if scale is None else scale, softcap


def add_token_logps(model: PreTrainedModel) -> None:
    """Let `model(..., token_index=…, target_ids=…)` return `TokenLogps`; any other forward stays as it was. Idempotent.

    The forward is the place, so that it runs through the DDP, FSDP and PEFT wrappers around the model. It takes
    `token_index` (M,), positions in the flattened (rows · T), `target_ids` (M,), and `row_length` T, by which the
    virtual tokens that some PEFT methods put in front are left out. With `token_counts` (rows, T), the router logits of
    a mixture of experts are read as well.

    Raises:
        NotImplementedError: the model has more than a backbone and an LM head, by which its logits may be others.
    """
    if getattr(model, "_has_token_logps", False):
        return
    head = model.get_output_embeddings()
    known = (backbone(model), None if isinstance(head, nn.ModuleList) else head)  # MusicGen has one for each codebook
    parts = [(name, child) for name, child in model.named_children() if any(True for _ in child.parameters())]
    if more := [name for name, child in parts if all(child is not part for part in known)]:
        raise UnsupportedError(
            f"`model` is a {type(model).__name__}, which has `{more[0]}` beside a backbone and an LM head (a linear "
            "map of its last hidden state). Its log-probabilities would be wrong; use another model."
        )
    setattr(model, "_has_token_logps", True)  # noqa: B010 (no attribute that its class declares)
    own_forward = model.forward
    config = model.config.get_text_config()
    scale, softcap = logit_transform(config, model.config.model_type)

    @functools.wraps(type(model).forward)  # `generate` validates its arguments against the signature
    def forward(self, *args, token_index=None, target_ids=None, row_length=None, token_counts=None, **kwargs):
        if token_index is None:
            return own_forward(*args, **kwargs)
        kwargs |= {"use_cache": False} | ({} if token_counts is None else {"output_router_logits": True})
        if self.config.model_type in _TOKEN_KINDS:
            kwargs[_TOKEN_KINDS[self.config.model_type]] = torch.zeros_like(kwargs["input_ids"])
        segments = kwargs.get("segments")
        if segments is None or segments.kept is None:
            outputs = backbone(self)(*args, **kwargs)
        else:
            with segments.kept.states(backbone(self), segments.past, len(kwargs["input_ids"])) as states:
                outputs = backbone(self)(*args, **kwargs, **states)
        hidden = outputs.last_hidden_state
        if row_length is not None:
            hidden = hidden[:, -row_length:]
        head = self.get_output_embeddings()
        device = next(head.parameters()).device  # another than the backbone's where `device_map` splits the model
        hidden = hidden.flatten(0, 1).index_select(0, token_index.to(hidden.device)).to(device)
        token_logps = head_logps(head, hidden, target_ids.to(device), config.vocab_size, scale, softcap)
        use = None
        if token_counts is not None and outputs.router_logits != ():  # as dense Granite 4.0 and Doge have them
            top_k = getattr(self, "num_experts_per_tok", None) or config.num_experts_per_tok
            use = expert_use(outputs.router_logits, top_k, token_counts)
            if self.training and token_logps.requires_grad and not use.requires_grad:
                raise UnsupportedError(
                    "`router_aux_loss_coef` is not 0, but the load-balancing loss has no gradient, as happens under "
                    "`gradient_checkpointing_kwargs: {use_reentrant: true}`; set `use_reentrant` to false."
                )
        return TokenLogps(token_logps=token_logps, expert_use=use)

    model.forward = MethodType(forward, model)


def forward_chunk(model: nn.Module, chunk: dict[str, Any], with_experts: bool = False) -> Any:
    """`TokenLogps` of one forward over a chunk of a collated batch, in the order of the chunk's terms.

    Args:
        model: whose base has been through `add_token_logps`, wrapped or not.
        chunk: see `batching.collator`; on the model's device.
        with_experts: also which experts the tokens go to.
    """
    left_out = {"completion_index"} | (set() if with_experts else {"token_counts"})
    inputs = {name: value for name, value in chunk.items() if name not in left_out}
    return model(**inputs, row_length=chunk["input_ids"].shape[1])


def sum_by_completion(token_logps: torch.Tensor, completion_index: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """(B, K) float32 log-probabilities, nats: the sum over each completion's tokens, 0 for those of other chunks.

    Args:
        token_logps: (M,) of a chunk's terms.
        completion_index: (M,) of the same chunk.
        shape: (B, K).
    """
    # in float64, since a float32 `index_add` on a CPU adds one by one: 1e-3 nats off after 300 tokens
    sums = torch.zeros(shape.numel(), dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, completion_index.to(sums.device), token_logps.double()).view(shape).float()


@torch.no_grad()
def token_logps(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    batch_size: int,
    progress: Callable[[int], object] = lambda rows: None,
) -> list[list[torch.Tensor]]:
    """log π of every token that the model wrote of every completion, by the collator and the head of training.

    Rows are packed where `prefix_sharing_obstacle` finds nothing in the way: the rule of `training.layout`, which also
    compares the two layouts.

    Args:
        model: a causal language model in eval mode, with an adapter or without.
        rows: `prompt_ids`, `completion_ids` (K lists), and `completion_mask` where there is one.
        batch_size: a forward has at most as many tokens as so many of the longest completions with their prompts.
        progress: called with the number of rows that are done.

    Returns:
        For each row K tensors (T,) float32, nats, on the CPU.

    Raises:
        InvalidRowError: a row has a token that the model has no row of embeddings for.
    """
    base = base_model(model)
    check_ids(rows, token_rows(model))
    add_token_logps(base)
    packed = prefix_sharing_obstacle(model) is None
    if packed:
        share_prefixes(base)
    recurrent = packed and bool(recurrent_layers(base.config))
    collator = RewardCollator(0, "prefix_shared" if packed else "padded", recurrent=recurrent)
    device = next(model.parameters()).device
    values: list[list[torch.Tensor]] = [[] for _ in rows]
    lengths = [len(row["prompt_ids"]) + max(map(len, row["completion_ids"])) for row in rows]
    most = max((len(row["completion_ids"]) for row in rows), default=1)
    for batch in batches_by_length(lengths, max(1, batch_size // most)):
        columns = max(len(rows[i]["completion_ids"]) for i in batch)
        collator.tokens_per_forward = batch_size * max(lengths[i] for i in batch)
        read = functools.partial(_by_completion, model, collator, [rows[i] for i in batch], device)
        try:
            found = read()
        except PackingError:  # which shows in the model's layers alone
            collator.layout = "padded"
            found = read()
        for b, i in enumerate(batch):
            values[i] = [found[b * columns + k] for k in range(len(rows[i]["completion_ids"]))]
        progress(len(batch))
    return values


def _by_completion(
    model: nn.Module, collator: RewardCollator, rows: Sequence[dict[str, Any]], device: torch.device
) -> dict[int, torch.Tensor]:
    """Of each completion, b · K + k, the log-probabilities of its tokens (T,) float32, nats, on the CPU."""
    chunks = send_to_device(collator.chunks(rows), device)
    parts = [forward_chunk(model, one.chunk).token_logps.float().cpu() for one in passes(chunks, True, trains=False)]
    return split_by_completion(torch.cat(parts), torch.cat([chunk["completion_index"] for chunk in chunks]).cpu())


def split_by_completion(token_logps: torch.Tensor, completion_index: torch.Tensor) -> dict[int, torch.Tensor]:
    """Of each completion, b · K + k, the log-probabilities of its tokens (T,), from those of terms in order (M,)."""
    return {place: token_logps[completion_index == place] for place in completion_index.unique().tolist()}


def completion_logps(model: nn.Module, rows: Sequence[dict[str, Any]], batch_size: int) -> list[list[float]]:
    """log π(completion | prompt) of every completion, nats, summed over its tokens: lists of K, see `token_logps`."""
    return [[float(logps.double().sum()) for logps in row] for row in token_logps(model, rows, batch_size)]


def differences(logps: Sequence[Sequence[Any]], ref_logps: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Log-ratios log π − log π_ref in nats of B lists of K: numbers, or tensors (T,) with one a token."""
    return [[p - q for p, q in zip(*row, strict=True)] for row in zip(logps, ref_logps, strict=True)]
