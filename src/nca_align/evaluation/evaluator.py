"""A policy by what it answers: rewards, KL, wins, lengths and diversity of its own samples, also during training."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn

from ..batching.rendering import prompt_ids
from ..errors import InvalidRowError, UserError
from ..models.adapters import adapter_merged, as_reference, base_model
from ..models.logprobs import completion_logps
from ..models.sampling import check_room, end_tokens, sample_answers, seed_for
from ..rewards.scorers import Scorers, open_scorers
from ..training.chunked_step import restore_rng, rng_state
from .estimates import GenerationFigures, figures_of, mean_over_prompts, win_rate

Reference = nn.Module | Callable[[], AbstractContextManager]


class GenerationEvaluator:
    """Answers held-out prompts with a loaded model, and says what the answers show.

    The reference's answers are drawn and scored at the first call, and kept: one evaluator is for one reference.

    Args:
        dataset: rows of `prompt` (text or messages), and any columns that the scorers read.
        tokenizer: the model's.
        scorers: one or several, as `nca-align score --scorer` or as Python functions of TRL's reward-function
            signature; or what `scoring.open_scorers` made of them, for several evaluators.
        scorer_weights: one a scorer, 1 by default.
        num_completions: answers a prompt.
        max_new_tokens: tokens at which an answer is cut.
        seed: of the answers: the same at each call, so that what differs from step to step is the policy. Those of
            the reference have another, so that wins are over independent answers.
        batch_size: answers at a time.

    Raises:
        UserError: a scorer that can't be had, a prompt that can't be rendered.
        ValueError: a number below 1, no scorer, no prompt.
    """

    def __init__(
        self,
        dataset: Dataset | Iterable[dict[str, Any]],
        tokenizer: Any,
        scorers: Scorers | str | Callable | Sequence[str | Callable],
        *,
        scorer_weights: list[float] | None = None,
        num_completions: int = 4,
        max_new_tokens: int = 128,
        seed: int = 42,
        batch_size: int = 64,
    ):
        for name, value in (
            ("num_completions", num_completions), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size),
        ):  # fmt: skip
            if value < 1:
                raise UserError(f"`{name}` is {value}; it must be at least 1")
        if not scorers:
            raise UserError("`scorers` is empty; give what rewards the answers, as in `nca-align score`")
        self._rows = [dict(row) for row in dataset]
        if not self._rows:
            raise UserError("`dataset` is empty; give prompts that the model is to answer")
        try:
            self._prompts = [prompt_ids(tokenizer, row) for row in self._rows]
        except InvalidRowError as error:
            raise UserError(f"a prompt to be answered can't be rendered: {error}") from error
        self._tokenizer = tokenizer
        if isinstance(scorers, Scorers):
            if scorer_weights is not None:
                raise UserError("`scorer_weights` are given with `Scorers`, which have theirs; leave them out")
        else:
            if isinstance(scorers, str) or callable(scorers):
                scorers = [scorers]
            scorers = open_scorers(scorers, scorer_weights)
        self._score = scorers
        self._num_completions = num_completions
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._batch_size = batch_size
        self._reference_answers: dict[int, dict[str, Any]] | None = None

    def __call__(self, model: Any, reference: Reference | None = None) -> GenerationFigures:
        """Figures of `model` against `reference`: a model, or a context in which `model` is the reference.

        Without one an adapter is switched off; where it is `model` itself, they are of the reference's answers. Each
        process answers its share of the prompts, and all get the figures of the whole. The model's mode and the random
        state are as they were afterwards.

        Raises:
            ValueError: no `reference`, and no adapter to be switched off.
            UserError: a prompt that is too long for the model, an answer that the scorers can't score.
        """
        if reference is None:
            if not hasattr(model, "peft_config"):
                raise UserError(
                    "`reference` is missing, and the model has no adapter that could be switched off: give the model "
                    "that the KL and the wins are measured against"
                )
            reference = lambda: as_reference(model)  # noqa: E731
        other, switched = reference_model(reference, model)
        self.check_room(model)
        state = PartialState()
        mine = range(state.process_index, len(self._rows), state.num_processes)
        device = next(model.parameters()).device
        random, modes = rng_state(device), [(own, own.training) for own in {model, other}]
        try:
            for own, _ in modes:
                own.eval()
            if self._reference_answers is None:
                with switched():
                    self._reference_answers = self._answer(other, mine, 0)
            if reference is model:
                answers = self._reference_answers
                kl = [[0.0] * self._num_completions for _ in mine]
            else:
                with adapter_merged(model):
                    answers = self._answer(model, mine, 1)
                    rows = [{"prompt_ids": self._prompts[i], "completion_ids": answers[i]["ids"]} for i in mine]
                    logps = completion_logps(model, rows, self._batch_size)
                with switched():
                    reference_logps = completion_logps(other, rows, self._batch_size)
                pairs = zip(logps, reference_logps, strict=True)
                kl = [[p - q for p, q in zip(*pair, strict=True)] for pair in pairs]
        finally:
            for own, training in modes:
                own.train(training)
            restore_rng(random, device)
        found = [
            {
                **{name: answers[i][name] for name in ("rewards", "tokens", "texts", "cut")},
                "kl": own,
                "wins": win_rate(answers[i]["rewards"], self._reference_answers[i]["rewards"]),
            }
            for i, own in zip(mine, kl, strict=True)
        ]
        rows = gather_object(found)
        return GenerationFigures(**figures_of(rows), win_rate=mean_over_prompts([row["wins"]] for row in rows))

    def check_room(self, model: Any) -> None:
        """Raise a UserError where a prompt and its answer don't fit the positions of `model`."""
        check_room(base_model(model).config, max(map(len, self._prompts)), self._max_new_tokens)

    def _answer(self, model: Any, mine: range, which: int) -> dict[int, dict[str, Any]]:
        """Row → of its answers `ids`, the end included, `texts`, `tokens`, `rewards`, and `cut`, whether they were."""
        ends = end_tokens(model, self._tokenizer)
        places = sorted(mine, key=lambda i: len(self._prompts[i]))
        size = max(1, self._batch_size // self._num_completions)
        found: dict[int, dict[str, Any]] = {}
        for start in range(0, len(places), size):
            batch = places[start : start + size]
            prompts, seed = [self._prompts[i] for i in batch], seed_for(self._seed, which, batch[0])
            answers = sample_answers(model, prompts, self._num_completions, self._max_new_tokens, ends, seed)
            for i, own_answers in zip(batch, answers, strict=True):
                found[i] = {
                    "ids": own_answers,
                    "texts": [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in own_answers],
                    "tokens": [len(ids) for ids in own_answers],
                    "cut": [ids[-1] not in ends for ids in own_answers],
                }
        for i, rewards in self._reward({i: own["texts"] for i, own in found.items()}).items():
            found[i]["rewards"] = rewards
        return found

    def _reward(self, answers: dict[int, list[str]]) -> dict[int, list[float]]:
        if not answers:  # more processes than prompts
            return {}
        rows = []
        for i, own in answers.items():
            texts: list[Any] = own
            if not isinstance(self._rows[i]["prompt"], str):
                texts = [[{"role": "assistant", "content": text}] for text in own]
            kept = {k: v for k, v in self._rows[i].items() if k not in ("completions", "rewards", "truncated")}
            rows.append({**kept, "completions": texts})
        shard = self._score(0, 0, rows, lambda done: None)
        if shard.failed:
            raise UserError(f"an answer could not be scored: {next(iter(shard.failed.values()))}")
        return {i: row["rewards"] for i, row in zip(answers, shard.rows, strict=True)}


def reference_model(reference: Reference, model: nn.Module) -> tuple[nn.Module, Callable[[], AbstractContextManager]]:
    """The model to call for the reference, and the context to call it in."""
    return (reference, nullcontext) if isinstance(reference, nn.Module) else (model, reference)
