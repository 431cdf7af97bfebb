"""Scorers that are Python functions, `package.module:function` with TRL's reward-function signature."""

import asyncio
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from ..data.cleaning import text_of
from ..errors import UserError
from ..models.loading import ModelSource
from .reward_models import Scorer

_OWN_ARGUMENTS = ("prompt", "completions", "completion_ids")  # of rows; a function is given its own


def function_scorer(function: Callable, spec: str, tokenizer_name: str | None) -> Scorer:
    """A function of TRL's reward-function signature, asynchronous or not.

    Args:
        function: what `functions.find_function` found.
        spec: its name, for errors.
        tokenizer_name: of the tokenizer that gives it `completion_ids`; None gives it none.

    Raises:
        UserError: when it is called, where it returns anything but one score for each completion.
    """
    tokenizer = ModelSource(tokenizer_name, "tokenizer").load_tokenizer() if tokenizer_name is not None else None

    def run(rows: Sequence[dict[str, Any]], completions: Sequence[Any]) -> list[float | None]:
        columns = {key: [row[key] for row in rows] for key in rows[0] if key not in _OWN_ARGUMENTS}
        # TRL hands these three to every function; here is no training that they could log to.
        extra: dict[str, Any] = {"trainer_state": None, "log_extra": lambda *_: None, "log_metric": lambda *_: None}
        if tokenizer is not None:
            texts = list(map(text_of, completions))
            extra["completion_ids"] = tokenizer(texts, add_special_tokens=False)["input_ids"]
        scores = function(prompts=[row["prompt"] for row in rows], completions=completions, **columns, **extra)
        if inspect.isawaitable(scores):
            scores = asyncio.run(_finish(scores))
        scores = _as_list(scores, spec, len(completions))
        if len(scores) != len(completions):
            raise UserError(
                f"`scorer` {spec} returned {len(scores)} scores for {len(completions)} completions; it must return one "
                "each (None to skip one)"
            )
        return [None if value is None else float(value) for value in scores]

    return run


def _as_list(scores: Any, spec: str, count: int) -> list:
    try:
        values = None if isinstance(scores, (str, bytes, dict)) else iter(scores)
    except TypeError:
        values = None
    if values is None:
        raise UserError(
            f"`scorer` {spec} returned {scores!r:.60}, not a list, for {count} completions; it must return one number "
            "each (None to skip one)"
        )
    return list(values)


async def _finish(awaitable):
    return await awaitable
