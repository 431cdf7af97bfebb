"""A policy by what it answers: rewards, KL, wins, lengths and diversity of its own samples, also during training."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn

from ..batching.collator import batches_by_length
from ..batching.rendering import prompt_ids
from ..data.cleaning import completion_of
from ..data.messages import content_kind
from ..errors import InvalidRowError, UserError
from ..models.logprobs import completion_logps, differences
from ..models.policy import adapter_merged, as_reference, base_model, eval_mode
from ..models.sampling import check_room, end_tokens, sample_with_logps, seed_for
from ..options import require_at_least_1
from ..rewards.scorers import Scorers, open_scorers
from .gains import gains
from .intervals import UNKNOWN, Estimate, mean_over_prompts

Reference = nn.Module | Callable[[], AbstractContextManager]
Rewards = Mapping[str, Sequence[float]]  # of all answers to a prompt


@dataclass(frozen=True)
class GenerationMetrics:
    """What a policy's answers show; means with their standard errors over prompts.

    Args:
        prompts, completions: how many.
        reward: mean reward.
        kl: KL(policy ‖ reference), nats a completion, without bias.
        win_rate: how often an answer's reward is above one of the reference's to the same prompt; a tie is half a win.
            NaN where the reference's answers aren't known.
        tokens: mean length, the end included.
        distinct_1, distinct_2: share of different words and pairs of words among all: low where answers repeat.
        cut: share of answers that `max_new_tokens` cut.
    """

    prompts: int
    completions: int
    reward: Estimate
    kl: Estimate
    win_rate: Estimate
    tokens: Estimate
    distinct_1: float
    distinct_2: float
    cut: float

    def log(self, prefix: str = "") -> dict[str, float]:
        """Flat, as a trainer logs it: `generation/reward`, `generation/reward_error` …"""
        values: dict[str, float] = {}
        for name in estimates(type(self)):
            mean, error = getattr(self, name)
            values |= {name: mean, f"{name}_error": error}
        values |= {name: getattr(self, name) for name in ("prompts", "distinct_1", "distinct_2", "cut")}
        return {f"{prefix}generation/{name}": value for name, value in values.items()}


@dataclass(frozen=True)
class GainMetrics(GenerationMetrics):
    """`GenerationMetrics`, and how they differ from the reference's answers to the same prompts.

    Args:
        reference_reward, reference_tokens: `reward` and `tokens` of the reference's answers.
        gain: mean over prompts of the policy's mean reward less the reference's.
        gain_same_length: `gain` less what the change in length explains, see `gain_at_same_length`; NaN where the
            answers don't tell.
    """

    reference_reward: Estimate
    reference_tokens: Estimate
    gain: Estimate
    gain_same_length: Estimate


def estimates(metrics: type[GenerationMetrics]) -> tuple[str, ...]:
    """Names of the fields that are means with their errors."""
    return tuple(field.name for field in fields(metrics) if field.type is Estimate)


class GenerationEvaluator:
    """Answers held-out prompts with a loaded model, and says what the answers show.

    The reference's answers are sampled and scored at the first call, and kept: one evaluator is for one reference.

    Args:
        dataset: rows of `prompt`, and any columns that the scorers read. Token ids are text to these, as they decode.
        tokenizer: the model's.
        scorers: one or several, as `nca-align score --scorer` or as Python functions of TRL's reward-function
            signature; or what `rewards.scorers.open_scorers` made of them, for several evaluators.
        scorer_weights: one a scorer, 1 by default.
        num_completions: answers a prompt.
        reference_completions: answers of the reference a prompt; as many as the policy's by default. Wins and gains
            are less certain with fewer, and the KL is not touched.
        max_new_tokens: tokens at which an answer is cut.
        seed: of the answers: the same at each call, so that what differs from step to step is the policy. Those of
            the reference have another, so that wins are over independent answers.
        batch_size: answers at a time.

    Raises:
        UserError: a scorer that can't be had, a prompt that can't be rendered.
        ValueError: a number below 1, no scorer, no prompt.

    Example:
        >>> def length(completions, **columns):
        ...     return [float(len(completion)) for completion in completions]
        >>> evaluator = GenerationEvaluator(rows, tokenizer, length, num_completions=2, max_new_tokens=4)
        >>> "eval_generation/reward" in evaluator(model, reference).log("eval_")
        True
    """

    def __init__(
        self,
        dataset: Dataset | Iterable[dict[str, Any]],
        tokenizer: Any,
        scorers: Scorers | str | Callable | Sequence[str | Callable],
        *,
        scorer_weights: list[float] | None = None,
        num_completions: int = 4,
        reference_completions: int | None = None,
        max_new_tokens: int = 128,
        seed: int = 42,
        batch_size: int = 64,
    ):
        self.num_completions, self.max_new_tokens, self.batch_size = num_completions, max_new_tokens, batch_size
        self.reference_completions = num_completions if reference_completions is None else reference_completions
        require_at_least_1(self, "num_completions", "reference_completions", "max_new_tokens", "batch_size")
        if not scorers:
            raise UserError("`scorers` is empty; give what rewards the answers, as in `nca-align score`")
        answered = ("completions", "completion_mask", "rewards", "truncated")
        self._rows = [{name: value for name, value in row.items() if name not in answered} for row in dataset]
        if not self._rows:
            raise UserError("`dataset` is empty; give prompts for the model to answer")
        try:
            self._prompts = [prompt_ids(tokenizer, row) for row in self._rows]
        except InvalidRowError as error:
            raise UserError(f"a prompt to be answered can't be rendered: {error}") from error
        for row in self._rows:  # scorers read text
            if content_kind(row["prompt"]) == "token ids":
                row["prompt"] = tokenizer.decode(row["prompt"])
        if not isinstance(scorers, Scorers):
            scorers = [scorers] if isinstance(scorers, str) or callable(scorers) else scorers
            scorers = open_scorers(scorers, scorer_weights)
        elif scorer_weights is not None:
            raise UserError(
                "`scorer_weights` are given with `Scorers`, which have weights of their own; leave them out"
            )
        self._tokenizer, self._scorers, self._seed = tokenizer, scorers, seed
        self._reference_answers: list[dict[str, Any]] | None = None

    def __call__(self, model: Any, reference: Reference | None = None) -> GainMetrics:
        """Figures of `model` against `reference`: a model, or a context in which `model` is the reference.

        Without one an adapter is switched off; where it is `model` itself, they are of the reference's answers. Each
        process answers its share of the prompts, and all get the figures of the whole. The model's mode and the random
        state are as they were afterwards.

        Raises:
            ValueError: no `reference`, and no adapter to be switched off.
            UserError: a prompt that is too long for the model, an answer that the scorers can't score.
        """
        if reference is None:
            reference = partial(as_reference, model)
        self.check_room(model)
        state = PartialState()
        mine = range(state.process_index, len(self._rows), state.num_processes)
        device = next(model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []), eval_mode(model):
            if self._reference_answers is None:
                with reference_model(reference, model) as other:
                    self._reference_answers = self._answer(other, mine, 0)
            if reference is model:
                answers = self._reference_answers
                kl = [[0.0] * self.reference_completions for _ in mine]
            else:
                with adapter_merged(model):
                    answers = self._answer(model, mine, 1)
                    logps = [own["logps"] for own in answers]
                    if None in logps:
                        logps = completion_logps(model, answers, self.batch_size)
                with reference_model(reference, model) as other:
                    reference_logps = completion_logps(other, answers, self.batch_size)
                kl = differences(logps, reference_logps)
        rows = gather_object([
            {name: own[name] for name in ("rewards", "tokens", "texts", "cut")}
            | {"kl": nats, "wins": win_rate(own["rewards"], theirs["rewards"])}
            | {"reference": {name: theirs[name] for name in ("rewards", "tokens")}}
            for own, theirs, nats in zip(answers, self._reference_answers, kl, strict=True)
        ])  # fmt: skip
        wins = mean_over_prompts([row["wins"]] for row in rows)
        return GainMetrics(**generation_metrics(rows), win_rate=wins, **gains(rows))

    def check_room(self, model: Any) -> None:
        """Raise a UserError where a prompt and its answer don't fit the positions of `model`."""
        check_room(base_model(model).config, max(map(len, self._prompts)), self.max_new_tokens)

    def _answer(self, model: Any, mine: range, which: int) -> list[dict[str, Any]]:
        """The answers to each prompt of `mine`.

        Returns:
            Of each prompt `prompt_ids`, and of its answers `completion_ids`, the end included, `texts`, `tokens`, `cut`
            (whether they were), `rewards`, and `logps` (nats) or None, see `sample_with_logps`.
        """
        count = self.num_completions if which else self.reference_completions
        ends = end_tokens(model, self._tokenizer)
        lengths = [len(self._prompts[i]) for i in mine]
        found: dict[int, list[list[int]]] = {}
        logps: dict[int, list[float] | None] = {}
        for places in batches_by_length(lengths, max(1, self.batch_size // count)):
            batch = [mine[place] for place in places]
            prompts, seed = [self._prompts[i] for i in batch], seed_for(self._seed, which, batch[0])
            answers, own_logps = sample_with_logps(model, prompts, count, self.max_new_tokens, ends, seed)
            found.update(zip(batch, answers, strict=True))
            logps.update((i, own_logps[place] if own_logps else None) for place, i in enumerate(batch))
        if not found:  # more processes than prompts
            return []
        answered, rows = [], []
        for i in mine:
            texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in found[i]]
            answered.append({
                "prompt_ids": self._prompts[i], "completion_ids": found[i], "texts": texts,
                "tokens": [len(ids) for ids in found[i]], "cut": [ids[-1] not in ends for ids in found[i]],
                "logps": logps[i],
            })  # fmt: skip
            rows.append(self._rows[i] | {"completions": [completion_of(self._rows[i]["prompt"], t) for t in texts]})
        shard = self._scorers.score_rows(rows)
        if shard.failed:
            raise UserError(f"an answer could not be scored: {next(iter(shard.failed.values()))}")
        return [own | {"rewards": row["rewards"]} for own, row in zip(answered, shard.rows, strict=True)]


@contextmanager
def reference_model(reference: Reference, model: nn.Module) -> Iterator[nn.Module]:
    """The model to call for the reference, in eval mode as `model` is."""
    if isinstance(reference, nn.Module):
        with eval_mode(reference):
            yield reference
    else:
        with reference():
            yield model


def win_rate(own: Sequence[float], reference: Sequence[float]) -> float:
    """How often a reward of `own` is above one of `reference`, over all pairs; a tie is half a win."""
    wins = sum((a > b) + 0.5 * (a == b) for a in own for b in reference)
    return wins / (len(own) * len(reference))


def distinct(texts: Iterable[str], n: int) -> float:
    """distinct-n: different runs of n words among all such runs of the texts; 0 where there is none.

    Source: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", 2016.
    """
    runs = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(runs)) / len(runs) if runs else 0.0


def generation_metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of `GenerationMetrics`, less `win_rate`.

    Args:
        rows: B prompts with lists of K under `rewards`, `kl` (log π − log π_ref), `tokens`, `texts`, `cut`.
    """
    texts = [text for row in rows for text in row["texts"]]
    return {
        "prompts": len(rows), "completions": len(texts),
        **{name: mean_over_prompts(row[key] for row in rows)
           for name, key in (("reward", "rewards"), ("kl", "kl"), ("tokens", "tokens"))},
        "distinct_1": distinct(texts, 1), "distinct_2": distinct(texts, 2),
        "cut": sum(sum(row["cut"]) for row in rows) / len(texts),
    }  # fmt: skip


def rewards_by_prompt(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Rewards of all answers to each different prompt."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(json.dumps(row["prompt"]), []).extend(row["rewards"])
    return found


def over_common_prompts(compare: Callable[..., float], own: Rewards, reference: Rewards) -> tuple[Estimate, int]:
    """Mean of `compare` over the prompts that both answered, and how many they are; NaN where there is none.

    Args:
        compare: of the rewards of a prompt's answers, such as `win_rate`.
        own, reference: see `rewards_by_prompt`.
    """
    both = [prompt for prompt in own if prompt in reference]
    return mean_over_prompts([compare(own[p], reference[p])] for p in both) if both else UNKNOWN, len(both)
