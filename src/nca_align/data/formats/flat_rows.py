"""The data format of flat rows, one scored completion each (HelpSteer2 and the like), put together by prompt."""

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from ...errors import UserError
from ..options import DEFAULT_SCORE, DataOptions
from ..schema import PROMPT_COLUMNS, REWARD_COLUMNS, data_format
from ..several_rewards import combine, completion_values, is_number
from ..validation import Row, RowError, assistant_message, read_conversation, required_number, user_message

logger = logging.getLogger("nca_align")

_SCORE_COLUMNS = ("reward", "score", DEFAULT_SCORE, "helpfulness", "label")
_ANSWER_COLUMNS = ("response", "completion")
_OF_LOG = {"step", "prompt", "completion", "advantage"}  # beside a column for each reward: TRL's `log_completions`
_NUMBERS = (int, float, type(None))
_TURN = re.compile(r"\n?<extra_id_1>(Assistant|User)\n")


def score_column(columns: Iterable[str], options: DataOptions) -> str | None:
    """The column that holds the reward, or None."""
    names = _SCORE_COLUMNS if options.score == DEFAULT_SCORE else (options.score,)
    return next((name for name in names if name in columns), None)


def logged_rewards(columns: Iterable[str]) -> list[str]:
    """The columns of TRL's log of completions that may be rewards, named as their functions; [] of other data."""
    own = {name for name in columns if not name.startswith("_")}
    return sorted(own - _OF_LOG - {*PROMPT_COLUMNS, "image", "images"}) if own >= _OF_LOG else []


def answer_column(columns: Iterable[str]) -> str | None:
    """The column that holds the completion, or None."""
    return next((name for name in _ANSWER_COLUMNS if name in columns), None)


def matches(rows: list[dict[str, Any]], options: DataOptions) -> bool:
    columns = set(rows[0])
    default = score_column(columns, DataOptions())  # so that a misspelt `score` is reported as such
    scored = default is not None or score_column(columns, options) is not None or bool(options.reward_weights)
    scored = scored or bool(logged_rewards(columns))
    return "prompt" in columns and answer_column(columns) is not None and scored


def settle_score(rows: list[dict[str, Any]], options: DataOptions) -> DataOptions:
    """`options` with the reward of TRL's log as its `score`: the only column that isn't text, which is the user's own.

    Raises:
        UserError: there are several, and nothing says which is meant.
    """
    if not logged_rewards(rows[0]) or options.reward_weights or score_column(rows[0], options):
        return options
    logged = _without_text(rows)
    if len(logged) != 1:
        columns = ", ".join(logged or logged_rewards(rows[0]))
        raise UserError(
            f"the data is TRL's log of completions with the columns {columns}. Name the one that is the reward by "
            "`score`, or weigh several by `reward_weights`."
        )
    return replace(options, score=logged[0])


def _without_text(rows: list[dict[str, Any]]) -> list[str]:
    """The columns of TRL's log that may be rewards, without those that `log_extra` wrote text into, such as "42"."""
    return [name for name in logged_rewards(rows[0]) if all(isinstance(row.get(name), _NUMBERS) for row in rows)]


def score_names(rows: list[dict[str, Any]]) -> set[str]:
    return set().union(*rows) - {"prompt", *_ANSWER_COLUMNS, *PROMPT_COLUMNS}


def objective_names(rows: list[dict[str, Any]]) -> list[str]:
    """The columns of numbers, in the data's order."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if is_number(value))
    known = _without_text(rows) or score_names(rows)
    return [name for name in names if name in known]


def read_groups(dataset: Dataset, order: np.ndarray, starts: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each prompt's first row number, and its rows as one: a list in every column that isn't the prompt's own."""
    for lo in range(0, len(starts) - 1, 256):
        ends = starts[lo : lo + 257]
        indices = order[ends[0] : ends[-1]]
        batch = dataset[indices]
        for a, b in itertools.pairwise(ends - ends[0]):
            shared = ("prompt", *PROMPT_COLUMNS)
            row = {key: values[a] if key in shared else values[a:b] for key, values in batch.items()}
            yield int(indices[a]), row | {"_index": indices[a:b].tolist()}


def alone(i: int, row: dict[str, Any]) -> dict[str, Any]:
    """Row `i` as `read_groups` gives the rows of a prompt that has no other."""
    return {key: value if key in ("prompt", *PROMPT_COLUMNS) else [value] for key, value in row.items()} | {
        "_index": [i]
    }


def group_rows(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """The rows of each prompt, wherever they lie, prompts in the order of their first row.

    Returns:
        `order`, all row numbers with those of a prompt together, and `starts`, where in it each prompt begins, with
        the end as a last entry. Memory is that of one digest a prompt; of a row in TRL's log, of which rows that an
        earlier step logged as well are left out.
    """
    keys = ["prompt", *(name for name in PROMPT_COLUMNS if name in dataset.column_names)]
    numbers: dict[bytes, int] = {}
    groups = np.empty(len(dataset), np.int64)
    i = 0
    for batch in dataset.select_columns(keys).iter(1000):
        for values in zip(*(batch[key] for key in keys), strict=True):
            groups[i] = numbers.setdefault(_digest(values), len(numbers))
            i += 1
    order = np.argsort(groups, kind="stable")
    if _OF_LOG.issubset(dataset.column_names):
        order = order[_logged_first(dataset)[order]]
    return order, np.searchsorted(groups[order], np.arange(len(numbers) + 1))


def _digest(values: Any) -> bytes:
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _logged_first(dataset: Dataset) -> np.ndarray:
    """(rows,) bool, False for a row of TRL's log that the step before it logged as well.

    The log is a queue of the last generations, and each step writes all of it: a step begins with the rows that ended
    the one before, as many as are still in the queue.
    """
    names = [name for name in dataset.column_names if name not in ("step", "image", "images")]
    rows = [
        _digest(values)
        for batch in dataset.select_columns(names).iter(1000)
        for values in zip(*batch.values(), strict=True)
    ]
    fresh = np.ones(len(rows), bool)
    before: list[bytes] = []
    start = 0
    for _, stretch in itertools.groupby(dataset["step"]):
        own = rows[start : start + sum(1 for _ in stretch)]
        longest = min(len(before), len(own))
        again = next((n for n in range(longest, 0, -1) if before[-n:] == own[:n]), 0)
        fresh[start : start + again] = False
        before, start = own, start + len(own)
    if not fresh.all():
        logger.warning("TRL's log: %d of %d rows are left out, which a step logged again.", (~fresh).sum(), len(rows))
    return fresh


@data_format(
    "flat scored rows",
    "prompt, response or completion, a score column",
    answers="response|completion",
    conversations="prompt|response|completion",
    scores=score_names,
    objectives=objective_names,
    settle=settle_score,
    grouped=True,
    matches=matches,
)
def flat_rows(row: dict[str, Any], options: DataOptions) -> Row:
    """From one prompt with a list in every other column, to a row.

    A `response` is a turn of a chat, a `completion` beside a prompt of text continues that text, as in TRL.
    """
    answers = str(answer_column(row))  # `matches` found it
    names = list(options.weights) or [str(score_column(row, options))]
    prompt = read_conversation(row["prompt"], "prompt")
    if isinstance(prompt, str) and answers == "response":
        prompt = _turns(prompt)
    chat = isinstance(prompt, list)
    result = Row(prompt, [], [])
    found: list[dict[str, float | None]] = []
    left = []
    for k, (i, text, *scores) in enumerate(zip(row["_index"], row[answers], *(row[n] for n in names), strict=True)):
        given = {name: (name, value) for name, value in zip(names, scores, strict=True)}
        try:
            if not options.weights:
                required_number(scores[0], names[0])  # NaN is no gap here
            values = completion_values(given, options)
            completion = assistant_message(text, answers) if chat and not isinstance(text, list) else text
        except RowError as error:
            error.row = i
            if options.on_invalid == "raise":
                raise
            result.notes.append(error.cause)  # the rows of the prompt that are sound stay
            continue
        result.completions.append(completion)
        found.append(values)
        left.append(k)
    if result.notes:  # what stands beside the completions that are left
        own = ("prompt", "_index", *_ANSWER_COLUMNS, *PROMPT_COLUMNS, *REWARD_COLUMNS)
        result.extra = {name: [values[k] for k in left] for name, values in row.items() if name not in own}
    if options.weights:
        return combine(result, found, options)
    result.rewards = [score for own in found for score in own.values() if score is not None]
    return result


def _turns(text: str) -> list[dict[str, str]]:
    """HelpSteer2 writes `<extra_id_1>Assistant` or `<extra_id_1>User` on a line before each turn but the first."""
    first, *rest = _TURN.split(text)
    roles = (role.lower() for role in rest[::2])
    turns = ({"role": role, "content": turn} for role, turn in zip(roles, rest[1::2], strict=True))
    return [user_message(first, "prompt"), *turns]
