"""How far the trainer's token log-probabilities are from the model's own logits, each conversation run alone.

The model's own are `log_softmax` of what its class's forward returns for one conversation without padding, by the
attention that it came with: no code of this package, nor any of TRL's.
"""

import inspect
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..batching.attention import own_attention
from ..batching.collator import Batch, RewardCollator
from ..batching.pieces import LEAST_TOKENS
from ..errors import UnsupportedError, one_line
from ..models.logprobs import forward_chunk, split_by_completion
from ..models.passes import passes

Row = dict[str, Any]
Difference = tuple[float, float, float]  # see `compare`
Logps = dict[int, Tensor]  # by completion, b * K + k: (T,) nats
# What a config calls the tokens beyond which attention changes
_REACHES = ("sliding_window", "attention_chunk_size", "index_topk")
# Names of a forward's inputs that are no text
_BESIDE_TEXT = re.compile("pixel|image|video|audio|speech|feature|encoder")
# Rows of a stream that are read for their lengths
_STREAM_ROWS = 64
# A row beyond a window is at most this long: attention that writes its scores out takes the square of it
_LONGEST_ROW = 8192


def sample_rows(dataset: Any) -> list[Row]:
    """The first two rows, cut to a size that fits wherever the model does: logits and activations are kept whole."""
    return [
        {
            "prompt_ids": row["prompt_ids"][-64:],
            "completion_ids": [completion[:48] for completion in row["completion_ids"][:3]],
            "rewards": row["rewards"][:3],
        }
        for row in itertools.islice(dataset, 2)
    ]


def row_beyond_window(dataset: Any, config: Any) -> tuple[Row | None, str]:
    """A row longer than the model's window, where the data has such rows; or why there is none, for the log.

    It is as long as the longest of the data, twice the window at most: a few tokens beyond it would hardly change the
    attention's mean. Its tokens are drawn from the data's, since a text that repeats itself looks the same through a
    window of any size.

    Args:
        dataset: tokenised rows.
        config: of the language model.

    Returns:
        The row, or None; and what is to be said where the window is not covered.
    """
    found = [value for name in _REACHES if isinstance(value := getattr(config, name, None), int) and value > 0]
    reach, longest = max(found, default=0), _longest(dataset)
    if not reach or longest <= reach:
        return None, ""
    if reach >= _LONGEST_ROW:
        return None, f" Its window of {reach} tokens is not covered: rows longer than that would take too much."
    pool = torch.tensor(
        [token for row in itertools.islice(dataset, 8) for token in itertools.chain(*row["completion_ids"])]
    )
    drawn = pool[torch.randint(len(pool), (min(2 * reach, longest, _LONGEST_ROW),), generator=torch.Generator())]
    ids, short = drawn.tolist(), max(1, min(12, (longest - reach) // 2))
    prompt = ids[: len(ids) - 2 * short]
    # of two lengths: the shorter is padded in the padded layout
    return {"prompt_ids": prompt, "completion_ids": [ids[-2 * short :], ids[:short]], "rewards": [0.0, 1.0]}, ""


def _longest(dataset: Any) -> int:
    """Tokens of the longest conversation; of a stream, among its first rows."""
    if not isinstance(dataset, Dataset):
        rows: Iterable[Row] = itertools.islice(dataset, _STREAM_ROWS)
        return max(len(row["prompt_ids"]) + max(map(len, row["completion_ids"])) for row in rows)
    longest = 0
    for batch in dataset.with_format("arrow").select_columns(["prompt_ids", "completion_ids"]).iter(10_000):
        prompts = batch["prompt_ids"].combine_chunks().value_lengths().to_numpy()
        completions = batch["completion_ids"].combine_chunks()
        lengths = completions.flatten().value_lengths().to_numpy()
        longest_of_row, place = [], 0
        for number in completions.value_lengths().to_pylist():
            longest_of_row.append(lengths[place : place + number].max())
            place += number
        longest = max(longest, int((prompts + longest_of_row).max()))
    return longest


def compare(
    model: nn.Module,
    base: PreTrainedModel,
    batches: Sequence[Sequence[Row]],
    collator: RewardCollator,
    own: Sequence[tuple[Logps, Sequence[Tensor]]],
    device: torch.device,
    parameters: Sequence[nn.Parameter] = (),
) -> Difference:
    """How far the log-probabilities of `batches`, as `collator` lays them out, are from the model's own.

    Args:
        model: which runs, wrapped or not.
        base: the language model in it.
        batches: rows of each batch.
        own: `own_logps` of each.
        parameters: see `own_logps`.

    Returns:
        The worst token's difference, nats; the worst completion's, its sum divided by √tokens, since the rounding of n
        tokens grows as √n and a fault as n; that of the gradients, relative to their norm. 0 without `parameters`,
        infinity where tokens are missing, NaN where a value of one side alone is.
    """
    worst = torch.zeros(3, dtype=torch.float64)
    for rows, (expected, gradients) in zip(batches, own, strict=True):
        of_batch = parameters if gradients else ()
        batch = send_to_device(_in_several_pieces(collator, rows)(rows), device)
        found, found_gradients = _by_completion(model, batch, of_batch)
        if {i: len(logps) for i, logps in found.items()} != {i: len(logps) for i, logps in expected.items()}:
            return (float("inf"), float("inf"), 0.0)
        for i, logps in expected.items():
            difference = subtract(found[i], logps).cpu()
            here = torch.stack([difference.abs().max(), difference.sum().abs() / len(logps) ** 0.5, worst[2]])
            worst = torch.maximum(worst, here)  # which hands a NaN on
        pairs = list(zip(gradients, found_gradients, strict=True))
        if pairs:
            norm = sum(float(a.float().square().sum()) for a, _ in pairs)
            off = sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)
            if math.isfinite(norm):  # else the model's own are none, and `nonfinite` of the training says so
                worst[2] = (off / norm if norm else off) ** 0.5
    return tuple(worst.tolist())


def own_logps(
    model: nn.Module,
    base: PreTrainedModel,
    rows: Sequence[Row],
    device: torch.device,
    parameters: Sequence[nn.Parameter] = (),
) -> tuple[Logps, Sequence[Tensor]]:
    """Log-probabilities of each completion's tokens by the model's own logits, and the gradients that they have.

    Args:
        model: which runs, wrapped or not.
        base: the language model in it.
        parameters: those whose gradients are wanted, all of one sum of the log-probabilities with unequal weights:
            log-probabilities can agree to 1e-3 where a convolution's gradient is off by a quarter.

    Returns:
        By completion (T,) nats; the gradients in the order of `parameters`.

    Raises:
        NotImplementedError: the model does not run on text alone.
    """
    columns = max(len(row["completion_ids"]) for row in rows)
    logps = {}
    with unpatched(base), torch.set_grad_enabled(bool(parameters)):
        for b, row in enumerate(rows):
            for k, completion in enumerate(row["completion_ids"]):
                ids = torch.tensor([row["prompt_ids"] + completion], device=device)
                own = _last_predictions(model, base, ids, len(completion))
                targets = ids[0, -len(completion) :, None].to(own.device)
                logps[b * columns + k] = own.gather(1, targets)[:, 0].to(device)
        gradients = _gradients(logps, parameters)
    return {i: own.detach() for i, own in logps.items()}, gradients


def look_ahead(model: nn.Module, base: PreTrainedModel, row: Row, device: torch.device) -> float:
    """How far a last token changes the logits before it, nats: 0 within rounding for a causal language model.

    Args:
        model, base: see `own_logps`.
        row: whose longest completion is run.
    """
    completion = max(row["completion_ids"], key=len)
    ids = torch.tensor([row["prompt_ids"] + completion] * 2, device=device)
    # another token of the row, where it has one: not any, which could stand for an image
    ids[1, -1] = next(
        (i for i in ids[0] if i != ids[0, -1]), (ids[0, -1] + 1) % base.config.get_text_config().vocab_size
    )
    with unpatched(base), torch.no_grad():
        first, second = (_last_predictions(model, base, own[None], len(completion)) for own in ids)
    targets = ids[0, -len(completion) :, None].to(first.device)
    return float(subtract(first.gather(1, targets), second.gather(1, targets)).abs().max())


def _last_predictions(model: nn.Module, base: PreTrainedModel, ids: Tensor, length: int) -> Tensor:
    """(length, V) log-probabilities of the last `length` tokens' places in `ids` (1, T), nats."""
    # so that no logits of a long prompt are built
    few = "logits_to_keep" in inspect.signature(type(base).forward).parameters
    try:
        outputs = model(input_ids=ids, use_cache=False, **({"logits_to_keep": length + 1} if few else {}))
    except (AttributeError, TypeError, ValueError) as error:
        if _asks_for_more(type(base), str(error)):
            raise UnsupportedError(
                f"`model` is a {type(base).__name__}, which can't be run on text alone ({one_line(error)}); use "
                "another model."
            ) from error
        raise UnsupportedError(
            f"`model` is a {type(base).__name__}, whose own forward failed on a row of text with "
            f"{type(error).__name__} ({one_line(error)}). See that it runs by itself, or use another model."
        ) from error
    return outputs.logits[0, -length - 1 : -1].float().log_softmax(-1)


def _asks_for_more(model_class: type[PreTrainedModel], message: str) -> bool:
    """Whether an error of a forward is that an input beside text is missing: it names one, or is of the main one."""
    names = [name for name in inspect.signature(model_class.forward).parameters if _BESIDE_TEXT.search(name)]
    of_main = "NoneType" in message and model_class.main_input_name in names
    return of_main or any(name in message for name in names)


def subtract(logps: Tensor, expected: Tensor) -> Tensor:
    """The difference in float64, 0 where neither is finite: a model without values is no fault of the layout."""
    broken = ~(logps.isfinite() | expected.isfinite())
    return (logps.double() - expected.double()).masked_fill(broken, 0.0)


@contextmanager
def unpatched(base: PreTrainedModel) -> Iterator[None]:
    """Within it, `base` has its class's forward and its own attention, whatever the wrappers around it."""
    patched = base.__dict__.pop("forward", None)
    try:
        with own_attention(base):
            yield
    finally:
        if patched is not None:
            base.__dict__["forward"] = patched


def _in_several_pieces(collator: RewardCollator, rows: Sequence[Row]) -> RewardCollator:
    """`collator`, which cuts also these rows into pieces where it cuts any: prompts and completions."""
    if collator.tokens_per_forward is None:
        return collator
    third = max(len(row["prompt_ids"]) + len(ids) for row in rows for ids in row["completion_ids"]) // 3
    return replace(collator, tokens_per_forward=min(collator.tokens_per_forward, max(LEAST_TOKENS, third)))


def _by_completion(
    model: nn.Module, batch: Batch, parameters: Sequence[nn.Parameter]
) -> tuple[Logps, Sequence[Tensor]]:
    """As `own_logps`, by the trainer's forwards and backwards."""
    chunks = batch["chunks"]
    index = torch.cat([chunk["completion_index"] for chunk in chunks])
    weights = _weights(len(index), index.device)[index.argsort(stable=True).argsort()]
    shares = weights.split([len(chunk["completion_index"]) for chunk in chunks])
    logps: dict[int | None, Tensor] = {}
    with _gradients_set_aside(parameters):
        for one in passes(chunks, scores_all=not parameters, trains=bool(parameters)):
            with torch.set_grad_enabled(one.trains):
                own = forward_chunk(model, one.chunk).token_logps.to(index.device)
                logps[one.number] = own.detach()
                if one.trains and one.number is not None:
                    # a whole backward, which leaves gradients for other pieces as well
                    one.root((shares[one.number] * own).sum()).backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    found = split_by_completion(torch.cat([logps[number] for number in range(len(chunks))]), index)
    return dict(sorted(found.items())), gradients


@contextmanager
def _gradients_set_aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within it, `parameters` have no gradients but those that come of it; behind it, those that they had."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient


def _gradients(logps: Logps, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor]:
    if not parameters:
        return ()
    tokens = torch.cat(list(logps.values()))
    weighted = (_weights(len(tokens), tokens.device) * tokens).sum()
    return torch.autograd.grad(weighted, parameters, materialize_grads=True)


def _weights(tokens: int, device: torch.device) -> Tensor:
    return torch.linspace(0.5, 1.5, tokens, device=device)
