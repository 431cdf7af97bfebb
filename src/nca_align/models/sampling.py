"""Answers sampled from a policy's own distribution.

`sample_with_cache` reads each prompt once and drops answers that have ended. `generate` of transformers reads a prompt
once for each of its answers, and goes on with ended ones. It spends a fifth of a small model's step on random numbers.
It samples the models that `sample_with_cache` doesn't cover.
"""

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..batching.attention import prefix_sharing_obstacle
from ..batching.token_ids import check_token
from ..errors import InvalidRowError, UserError
from .policy import base_model, refuse_virtual_tokens
from .vocabulary import token_rows


@torch.no_grad()
def sample_answers(
    model: nn.Module,
    prompts: Sequence[list[int]],
    count: int,
    max_new_tokens: int,
    ends: list[int],
    seed: int,
    **settings: Any,
) -> list[list[list[int]]]:
    """Sample at temperature 1 and top-p 1, or as `settings` say, whatever the model's generation config says.

    Args:
        model: a causal language model in eval mode, with an adapter or without.
        prompts: token ids of B prompts, as they stand.
        count: answers K a prompt.
        max_new_tokens: tokens T at which an answer is cut.
        ends: tokens of which the first that is drawn ends an answer.
        seed: of all answers; for the same model and prompts it gives the same ones.
        settings: arguments of `generate`, which samples where there are any.

    Returns:
        For each prompt K answers, the token that ended one included.

    Raises:
        UserError: the probabilities aren't finite, or a prompt has a token that the model has no row of embeddings for;
            and see `refuse_virtual_tokens`.
    """
    return sample_with_logps(model, prompts, count, max_new_tokens, ends, seed, **settings)[0]


@torch.no_grad()
def sample_with_logps(
    model: nn.Module,
    prompts: Sequence[list[int]],
    count: int,
    max_new_tokens: int,
    ends: list[int],
    seed: int,
    **settings: Any,
) -> tuple[list[list[list[int]]], list[list[float]] | None]:
    """`sample_answers`, and of each answer log π in nats; None where `generate` samples, which doesn't tell them."""
    refuse_virtual_tokens(model)
    check_token(max(map(max, prompts)), token_rows(model))
    device = next(model.parameters()).device
    rows = [torch.tensor(prompt, device=device) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=ends[0], padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
    # attention in every layer, and nothing in front
    if not settings and prefix_sharing_obstacle(model) is None:
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(max_new_tokens, len(prompts) * count, generator=generator, dtype=torch.float64)
        drawn, token_logps = sample_with_cache(model, ids, mask, ends, uniform.to(device))
    else:
        torch.manual_seed(seed)
        with neutral_generation(model, ends):
            drawn = model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, num_return_sequences=count,
                use_cache=True, logits_processor=LogitsProcessorList([FiniteLogits()]), **settings,
            )[:, ids.shape[1] :]  # fmt: skip
        token_logps = None
    answers = [_until_end(row, ends) for row in drawn.tolist()]
    places = [slice(b * count, (b + 1) * count) for b in range(len(prompts))]
    logps = None if token_logps is None else token_logps.double().sum(1).tolist()
    return [answers[own] for own in places], None if logps is None else [logps[own] for own in places]


def sample_with_cache(
    model: nn.Module, ids: Tensor, mask: Tensor, ends: list[int], uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """(B·K, T) tokens by inverse transform of `uniform` (T, B·K) in [0, 1), and their float32 log-probabilities, nats.

    After an end, tokens mean nothing and log-probabilities are 0.
    """
    count = uniform.shape[1] // len(ids)
    base = base_model(model)
    cache = DynamicCache(config=base.config)
    takes = inspect.signature(type(base).forward).parameters
    caching = {"cache" if "cache" in takes else "past_key_values": cache}  # transformers 5.24 has renamed it
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def logits(ids: Tensor, positions: Tensor) -> Tensor:
        return model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1, **caching
        ).logits[:, -1]

    following = logits(ids, positions).repeat_interleave(count, 0)
    cache.batch_repeat_interleave(count)
    mask, position = (values.repeat_interleave(count, 0) for values in (mask, positions[:, -1:]))
    drawn = torch.full((uniform.shape[1], len(uniform)), ends[0], device=ids.device)
    logps = torch.zeros(drawn.shape, device=ids.device)
    live = torch.arange(len(drawn), device=ids.device)  # the rows that are still gone on with
    ended = torch.zeros_like(live, dtype=torch.bool)
    for t in range(len(uniform)):
        following = following.float()
        token = _inverse_transform(following, uniform[t, live])
        drawn[live, t] = token
        own = following.gather(1, token[:, None])[:, 0] - following.logsumexp(1)
        logps[live, t] = own.masked_fill(ended, 0.0)
        ended |= torch.isin(token, torch.tensor(ends, device=ids.device))
        left = int((~ended).sum())
        if left == 0 or t + 1 == len(uniform):
            break
        if left < 0.9 * len(live):  # copying the cache costs about a tenth of a step
            keep = (~ended).nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            live, token, mask, position, ended = (values[keep] for values in (live, token, mask, position, ended))
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        position = position + 1
        following = logits(token[:, None], position)
    return drawn, logps


def _inverse_transform(logits: Tensor, uniform: Tensor) -> Tensor:
    """(N,) the first token of each row up to which the probabilities' sum is more than its share `uniform` of all."""
    cumulative = logits.float().softmax(-1).cumsum(-1)
    whole = cumulative[:, -1]
    _refuse_not_finite(whole)
    share = torch.minimum((uniform * whole).float(), whole.nextafter(torch.zeros_like(whole)))  # not rounded up to it
    return torch.searchsorted(cumulative, share[:, None], right=True).squeeze(1)


def decoding_precision(accelerator: Any) -> AbstractContextManager[None]:
    """The context to draw answers in during a training: its mixed precision, but on a CPU the weights' own.

    There autocast casts all weights again for each token, which costs more than bfloat16 saves.
    """
    return nullcontext() if accelerator.device.type == "cpu" else accelerator.autocast()


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: those of the model's generation config, else the tokenizer's EOS."""
    own = base_model(model).generation_config.eos_token_id
    ends = own if isinstance(own, list) else [tokenizer.eos_token_id if own is None else own]
    rows = token_rows(model)
    check_token(min(ends), rows, tokenizer, "the end of an answer")
    return [token for token in ends if token < rows]  # the others are never drawn


def check_room(config: Any, length: int, max_new_tokens: int) -> None:
    """Refuse a prompt that leaves no room for an answer.

    Args:
        config: of the model.
        length: of the prompt, in tokens.

    Raises:
        InvalidRowError: the model takes fewer tokens than prompt and answer have.
    """
    room = getattr(config.get_text_config(), "max_position_embeddings", None)
    if room is not None and length + max_new_tokens > room:
        raise InvalidRowError(
            f"`prompt` has {length} tokens, which with `max_new_tokens` {max_new_tokens} is more than the model's "
            f"{room}. Leave the row out, or lower `max_new_tokens`"
        )


class FiniteLogits(LogitsProcessor):
    """Stops `generate` where it would draw from what is no distribution, or take the largest of NaN."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` (N, V) as they are.

        Raises:
            UserError: a row of them has a NaN or +inf, or -inf alone.
        """
        _refuse_not_finite(scores.amax(-1))
        return scores


def _refuse_not_finite(rows: Tensor) -> None:
    """Raise where one of `rows` (N,), whose largest logits or sums of probabilities they are, isn't finite."""
    if not rows.isfinite().all():
        raise UserError(
            "the model's probabilities aren't finite numbers, so no answer can be drawn. Its training diverged, or its "
            "weights are damaged. Train it with a lower `learning_rate`, or try an earlier checkpoint."
        )


@contextmanager
def neutral_generation(model: Any, ends: list[int]) -> Iterator[None]:
    """Within it `generate` samples from the model's own distribution, whatever its generation config says."""
    plain = GenerationConfig(
        eos_token_id=ends, pad_token_id=ends[0], do_sample=True, temperature=1.0, top_p=1.0, top_k=0
    )
    holders: list[Any] = list({id(own): own for own in (model, base_model(model))}.values())
    before = [own.generation_config for own in holders]
    for own in holders:
        own.generation_config = plain
    try:
        yield
    finally:
        for own, config in zip(holders, before, strict=True):
            own.generation_config = config


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    length = next((t for t, token in enumerate(ids) if token in ends), len(ids))
    return ids[: length + 1]


def seed_for(*place: int) -> int:
    """A seed of 31 bits (what every engine and server takes) for a place in a run: its own seed, a shard, a row …"""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:4]) >> 1
