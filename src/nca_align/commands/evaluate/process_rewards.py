"""`nca-align evaluate --implicit --steps …`: rewards of steps, answers chosen by them, and ProcessBench's F1."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from math import nan
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from ...batching.tokenized_rows import masks_of
from ...data.cleaning import text_of
from ...data.messages import CONTEXT, content_kind
from ...errors import InvalidRowError, UserError
from ...evaluation.intervals import Interval
from ...evaluation.process_rewards import (
    FirstErrors,
    best_threshold,
    choose_answers,
    f1_of_first_errors,
    given_starts,
    marked_starts_of_turns,
    step_rewards,
    steps_of_tokens,
    token_texts,
)
from ...options import option
from ...user_functions import cause, find_function, names_a_function

NEWLINE, COLUMN = "newline", "column:"


@dataclass(kw_only=True)
class ProcessOptions:
    """Options of process rewards."""

    steps: str | None = option(
        "what ends a step: `newline`, a text such as `ки`, or `column:NAME`, which holds each completion's steps", None
    )
    answers: str | None = option(
        "the answers to vote on: a column of one a completion, or `module:function` of what the model wrote", None
    )
    first_error: str | None = option(
        "a column with each completion's first wrong step, from 0, or -1 for none; for ProcessBench's F1", None
    )
    threshold: float | None = option("τ, below which a step is wrong; by default chosen on `threshold_dataset`", None)
    threshold_dataset: str | None = option("other data, with the same columns, on which τ is chosen", None)
    threshold_split: str | None = option("split of `threshold_dataset`, or of the same data set without it", None)

    def check(self) -> None:
        """Refuse options of which one needs another.

        Raises:
            UserError: it says which.
        """
        if self.steps is not None and not self.steps.removeprefix(COLUMN).strip():
            raise UserError(f"`steps` is {self.steps!r}; it must be newline, a text, or column:NAME")
        chosen = self.threshold_dataset is not None or self.threshold_split is not None
        if self.first_error is not None:
            if self.steps is None:
                raise UserError("`first_error` needs `steps`, the steps that its numbers count")
            if chosen == (self.threshold is not None):
                raise UserError(
                    "`first_error` needs one of `threshold` and `threshold_dataset` (or `threshold_split`). Choose τ "
                    "on other data than it is used on."
                )
        elif chosen or self.threshold is not None:
            raise UserError("`threshold`, `threshold_dataset` and `threshold_split` need `first_error`")


@dataclass(frozen=True)
class ProcessEvaluation:
    """What the steps' rewards give.

    Args:
        steps: mean number a completion; NaN without `steps`.
        chosen: mean reward of what each way chooses, by its name.
        threshold: τ, or None.
        first_errors: ProcessBench's figures, or None.
    """

    steps: float
    chosen: dict[str, Interval]
    threshold: float | None = None
    first_errors: FirstErrors | None = None


@dataclass(frozen=True)
class Solutions:
    """Completions with what is known of their steps, before any model is read.

    Args:
        rows: tokenised, `prompt_ids`, `completion_ids`, `rewards`, `row_number`.
        steps: of each row's completions the step of each token that the model wrote, and how many there are; or None.
        answers: of each row's completions; or None.
        first_errors: of each completion, row after row, the number of its first wrong step; or None.
    """

    rows: list[dict[str, Any]]
    steps: list[list[tuple[list[int], int]]] | None = None
    answers: list[list[Hashable]] | None = None
    first_errors: list[int] | None = None

    def step_rewards(self, logratios: Sequence[Sequence[Tensor]], beta: float) -> list[list[Tensor]] | None:
        """Of each row's completions the rewards of their steps, from the log-ratios of tokens, nats."""
        if self.steps is None:
            return None
        return [
            [step_rewards(beta * tokens.double(), *own) for own, tokens in zip(steps, ratios, strict=True)]
            for steps, ratios in zip(self.steps, logratios, strict=True)
        ]


def read_solutions(
    options: ProcessOptions, tokenizer: Any, rows: list[dict[str, Any]], texts: Sequence[dict[str, Any]]
) -> Solutions:
    """What `options` say of these rows.

    Args:
        options: for `steps`, `answers`, `first_error`.
        tokenizer: the model's.
        rows: tokenised.
        texts: the same rows before that, with their columns.

    Raises:
        UserError: the row, and what is wrong with it.
    """
    steps = None if options.steps is None else _steps(options.steps, tokenizer, rows, texts)
    answers = None if options.answers is None else _answers(options.answers, tokenizer, rows, texts)
    errors = None
    if options.first_error is not None and steps is not None:
        errors = _first_errors(options.first_error, rows, texts, steps)
    return Solutions(rows, steps, answers, errors)


def _steps(how: str, tokenizer: Any, rows: list, texts: Sequence[dict[str, Any]]) -> list[list[tuple[list[int], int]]]:
    special, found = {*tokenizer.all_special_ids}, []
    column = how.removeprefix(COLUMN) if how.startswith(COLUMN) else None
    for row, text in zip(rows, texts, strict=True):
        given = None if column is None else _of_completions(text, column, "steps", row, lists=True)
        own = []
        for k, (whole_ids, mask) in enumerate(zip(row["completion_ids"], masks_of(row), strict=True)):
            turns = [
                [
                    "" if token in special else piece
                    for token, piece in zip(ids, token_texts(tokenizer, ids), strict=True)
                ]
                for ids in _turns(whole_ids, mask)
            ]
            try:
                if given is None:
                    starts = marked_starts_of_turns(map("".join, turns), "\n" if how == NEWLINE else how)
                else:
                    starts = given_starts("".join(chain(*turns)), given[k], f"{column}[{k}]")
            except InvalidRowError as error:
                raise UserError(f"row {row['row_number']}: its steps can't be found: {error}") from error
            own.append((steps_of_tokens([*chain(*turns)], starts), len(starts)))
        found.append(own)
    return found


def _turns(ids: Sequence[int], mask: Sequence[int]) -> list[list[int]]:
    """The stretches of a completion's tokens that the model wrote."""
    stretches = groupby(zip(mask, ids, strict=True), key=itemgetter(0))
    return [[token for _, token in own] for written, own in stretches if written]


def _written_text(tokenizer: Any, completion: Any, ids: Sequence[int], mask: Sequence[int]) -> str:
    """What the model wrote of a completion, as text: of token ids those that were kept."""
    kind = content_kind(completion)
    if kind == "token ids":
        return "\n".join(tokenizer.decode(own, skip_special_tokens=True) for own in _turns(ids, mask))
    return text_of(completion if kind == "text" else [own for own in completion if own.get("role") not in CONTEXT])


def _of_completions(
    text: dict[str, Any], column: str, name: str, row: dict[str, Any], lists: bool = False
) -> list[Any]:
    """The values of a column for the K completions of a row, of one completion also the value itself."""
    if column not in text:
        raise UserError(
            f"`{name}` names the column {column!r}, which doesn't exist; there are {', '.join(sorted(text))}"
        )
    value, count = text[column], len(row["completion_ids"])
    alone = not isinstance(value, list) or (lists and not any(isinstance(own, list) for own in value))
    values = [value] if alone else value
    if len(values) != count:
        raise UserError(
            f"row {row['row_number']}: `{column}` has {len(values)} values for {count} completions; give one each"
        )
    return values


def _answers(
    how: str, tokenizer: Any, rows: Sequence[dict[str, Any]], texts: Sequence[dict[str, Any]]
) -> list[list[Hashable]]:
    """Each completion's answer, None where it has none."""
    if not names_a_function(how):
        found = [_of_completions(text, how, "answers", row) for row, text in zip(rows, texts, strict=True)]
    else:
        function, found = find_function(how, "answers"), []
        for row, text in zip(rows, texts, strict=True):
            completions = zip(text["completions"], row["completion_ids"], masks_of(row), strict=True)
            written = [_written_text(tokenizer, *completion) for completion in completions]
            try:
                found.append(list(map(function, written)))
            except Exception as error:  # the user's code runs here, which may raise anything
                raise UserError(f"`answers` {how} fails in row {row['row_number']}: {cause(error)}") from error
    for row, own in zip(rows, found, strict=True):
        for answer in own:
            if not isinstance(answer, Hashable):
                raise UserError(
                    f"row {row['row_number']}: an answer is {answer!r}; it must be a text, a number, or null for none"
                )
    return found


def _first_errors(
    column: str,
    rows: Sequence[dict[str, Any]],
    texts: Sequence[dict[str, Any]],
    steps: Sequence[Sequence[tuple[list[int], int]]],
) -> list[int]:
    labels = []
    for row, text, own in zip(rows, texts, steps, strict=True):
        numbers = _of_completions(text, column, "first_error", row)
        for number, (_, count) in zip(numbers, own, strict=True):
            if not isinstance(number, int) or isinstance(number, bool) or not -1 <= number < count:
                raise UserError(
                    f"row {row['row_number']}: `{column}` is {number!r}; it must be a step from 0 to {count - 1}, or "
                    "-1 for none"
                )
            labels.append(number)
    return labels


def evaluate_process(
    solutions: Solutions,
    logratios: Sequence[Sequence[Tensor]],
    beta: float,
    threshold: float | None = None,
    others: Solutions | None = None,
    other_logratios: Sequence[Sequence[Tensor]] = (),
) -> ProcessEvaluation:
    """Answers chosen by the rewards of steps and of wholes, and ProcessBench's F1 where first errors are known.

    Args:
        solutions: the data.
        logratios: of each row K tensors (T,), nats.
        beta: implicit reward per nat.
        threshold: τ; None to choose it on `others`.
        others, other_logratios: other data, for τ alone.
    """
    steps = solutions.step_rewards(logratios, beta)
    whole = [[float(beta * tokens.double().sum()) for tokens in row] for row in logratios]
    least = None if steps is None else [[float(own.min()) for own in row] for row in steps]
    chosen = choose_answers(whole, least, solutions.answers, [row["rewards"] for row in solutions.rows])
    count = nan if steps is None else fmean(len(own) for row in steps for own in row)
    if solutions.first_errors is None or steps is None:
        return ProcessEvaluation(count, chosen)
    if threshold is None and others is not None and others.first_errors is not None:
        threshold = best_threshold(_flat(others.step_rewards(other_logratios, beta)), others.first_errors)
    assert threshold is not None  # the options have seen to it
    return ProcessEvaluation(
        count, chosen, threshold, f1_of_first_errors(_flat(steps), solutions.first_errors, threshold)
    )


def _flat(steps: list[list[Tensor]] | None) -> list[list[float]]:
    return [own.tolist() for row in steps or () for own in row]


def check_others(solutions: Solutions, others: Solutions, source: str) -> None:
    """Refuse data on which τ can't be chosen: its kind of solutions is missing, or is what τ is used on.

    Args:
        solutions: what is evaluated on.
        others: what τ is chosen on.
        source: its name.

    Raises:
        UserError: why.
    """
    labels = others.first_errors or []
    for kind, there in (("wrong", any(n >= 0 for n in labels)), ("right", any(n < 0 for n in labels))):
        if not there:
            raise UserError(f"{source} has no {kind} solution, so τ can't be chosen on it; give other data")
    seen = {(*row["prompt_ids"], -1, *ids) for row in solutions.rows for ids in row["completion_ids"]}
    for row in others.rows:
        if any((*row["prompt_ids"], -1, *ids) in seen for ids in row["completion_ids"]):
            raise UserError(
                f"row {row['row_number']} of {source}, on which τ is chosen, is also evaluated on; give other data"
            )


def threshold_source(options: Any) -> str:
    """The data that τ is chosen on, in words."""
    name = options.threshold_dataset or options.dataset_name
    return f"{Path(str(name)).name if Path(str(name)).exists() else name}" + (
        f", split {options.threshold_split}" if options.threshold_split else ""
    )
