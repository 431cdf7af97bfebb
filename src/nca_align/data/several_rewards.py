"""Several rewards a completion: read by name, combined into one, and scaled as TRL's GRPO does.

    rewards_k = Σ_j w_j r_jk   over the objectives j of `reward_weights`

The scaled rewards of a prompt are (r − mean) / (spread + 1e-4), and 0 where the spread is 0. The spread is a sample's
standard deviation: over the prompt's completions, or over all completions of the training split.

Source: `trl/trainer/grpo_trainer.py`, `scale_rewards` and `multi_objective_aggregation`; GDPO, arXiv 2601.05242.
"""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from ..errors import UserError, nearest
from .columns import code_revision, read_cell
from .options import DataOptions
from .validation import MISSING, Row, RowError, is_absent, is_truth, optional_score, read_list, read_number

_EPSILON = 1e-4  # GRPO's
Given = Mapping[str, tuple[str, Any]]  # an objective → the field it stands in, and its value there


def column_of(name: str) -> str:
    """The column of rows that holds an objective, as `nca-align score` names it: K numbers or nulls a row."""
    return name if name.startswith("score_") else f"score_{name}"


def settle_weights(
    options: DataOptions, fmt: str, names: Sequence[str], known: Iterable[str], data: str
) -> DataOptions:
    """`options` with `reward_weights` by name, from a mapping or a list in the order of `names`.

    Args:
        options: as they were given.
        fmt: the format's name.
        names: the objectives that the data has, in its order.
        known: all names that a weight may have.
        data: the split's name.

    Raises:
        UserError: the data doesn't have several, a weight is for no objective, or a list has another length.
    """
    weights, known = options.reward_weights, sorted(known)
    if weights is None:
        return options
    if not known:
        raise UserError(
            f"`reward_weights` is {json.dumps(weights)}, but `{data}` ({fmt}) doesn't have several rewards a "
            "completion; leave it out"
        )
    if isinstance(weights, dict):
        for name in weights:
            if name not in known:
                raise UserError(
                    f"`reward_weights` holds `{name}`, which `{data}` ({fmt}) doesn't have{nearest(name, known)}; "
                    f"it has {', '.join(known)}"
                )
        return options
    if len(weights) != len(names):
        raise UserError(
            f"`reward_weights` has {len(weights)} values, but `{data}` ({fmt}) has {len(names)} objectives "
            f"({', '.join(names)}); give one each, or weights by name"
        )
    return replace(options, reward_weights=dict(zip(names, map(float, weights), strict=True)))


def completion_values(given: Given, options: DataOptions) -> dict[str, float | None]:
    """A completion's value for each objective.

    Raises:
        RowError: it has none of them, or lacks one where `on_missing` is `raise`; a value is no finite number.
    """
    values = {name: optional_score(value, field) for name, (field, value) in given.items()}
    for name, (field, value) in given.items():
        if values[name] is not None:
            continue
        said = "null" if value is None else repr(value)
        if all(other is None for other in values.values()):
            raise RowError(field, MISSING, f"is {said}, a missing score; every completion needs a number")
        if options.on_missing == "raise":
            raise RowError(
                field,
                MISSING,
                f"is {said}, a missing score; every completion needs a number, or `on_missing: leave_out` leaves "
                f"`{name}` out of such a row",
            )
    return values


def combine(row: Row, values: Sequence[Mapping[str, float | None]], options: DataOptions) -> Row:
    """`row` with its rewards, the objectives beside them, and in `gaps` each objective that is left out of it.

    Args:
        row: of the K completions.
        values: K of `completion_values`.
        options: with `reward_weights` by name.

    Raises:
        RowError: no objective is left.
    """
    terms: list[list[float]] = []
    for name, weight in options.weights.items():
        found = [own[name] for own in values]
        row.extra[column_of(name)] = found
        whole = [value for value in found if value is not None]
        if len(whole) < len(found):
            row.gaps.append(name)
            continue
        if options.multi_objective_aggregation == "normalize_then_sum":
            whole = scaled(whole)
        terms.append([weight * value for value in whole])
    if values and not terms:
        raise RowError(
            "rewards",
            MISSING,
            "lacks a value of every objective of `reward_weights`; at least one objective must be whole",
        )
    row.rewards = [math.fsum(own) for own in zip(*terms, strict=True)]
    return row


def scaled(rewards: Sequence[float], spread: float | None = None) -> list[float]:
    """A prompt's rewards less their mean, over their own spread or a given one; 0 where they are all equal."""
    if not rewards or min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = statistics.fmean(rewards)
    spread = statistics.stdev(rewards) if spread is None else spread
    return [(reward - mean) / (spread + _EPSILON) for reward in rewards]


def of_split(options: DataOptions) -> bool:
    """Whether rewards are scaled by the spread over the split, which all of its rows must be known for."""
    return options.scale_rewards == "batch" or options.multi_objective_aggregation == "normalize_then_sum"


def scale_over_split(dataset: Any, options: DataOptions, num_proc: int | None = None, by: Dataset | None = None) -> Any:
    """Converted rows, with rewards scaled where `of_split` says so, by the spread over all completions.

    Args:
        dataset: converted, not yet scaled.
        options: as for its conversion.
        num_proc: processes to scale with.
        by: the converted rows whose spread is taken, those of the training split; None for these rows.
    """
    if not of_split(options):
        return dataset
    rewards: list[np.ndarray] = [
        batch["rewards"].combine_chunks().flatten().to_numpy()
        for batch in (dataset if by is None else by).select_columns("rewards").with_format("arrow").iter(10_000)
    ]
    found = np.concatenate(rewards)
    spread = float(found.std(ddof=1)) if len(found) > 1 else 0.0
    return dataset.map(
        _scale_batch,
        batched=True,
        input_columns="rewards",
        features=dataset.features,
        fn_kwargs={"spread": spread, "revision": code_revision()},
        num_proc=num_proc,
        desc="Scaling rewards",
    )


def _scale_batch(rewards: list[list[float]], spread: float, revision: str) -> dict[str, list]:
    return {"rewards": [scaled(own, spread) for own in rewards]}


# Rows `prompt, completions, rewards`, or with columns of numbers in the place of `rewards` or beside it


def objectives_of_rows(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names of several rewards in rows with `completions`, in the data's order.

    Those within `rewards`; or else of the columns `score_NAME` of K numbers; or else of all columns of K numbers.
    """
    within: dict[str, None] = {}
    columns: dict[str, None] = {}
    for row in rows:
        rewards = read_cell(row.get("rewards"))
        if isinstance(rewards, dict):
            within |= dict.fromkeys(rewards)
        elif isinstance(rewards, list):
            within |= dict.fromkeys(name for own in rewards if isinstance(own, dict) for name in own)
        columns |= dict.fromkeys(
            name for name, value in row.items() if name not in ("prompt", "completions", "rewards") and _numbers(value)
        )
    scores = [name.removeprefix("score_") for name in columns if name.startswith("score_")]
    return list(within) or scores or list(columns)


def names_of_rows(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """All names that `score` or a weight may have in rows with `completions`."""
    columns = {
        name for row in rows for name, value in row.items() if name not in ("prompt", "completions") and _numbers(value)
    }
    return {*objectives_of_rows(rows), *(columns if columns != {"rewards"} else ())}


def given_values(row: Mapping[str, Any], names: Iterable[str], completions: int) -> Sequence[Given]:
    """What a row with `completions` has for each of them, by objective.

    Raises:
        RowError: an objective has another number of values.
    """
    found: list[dict[str, tuple[str, Any]]] = [{} for _ in range(completions)]
    rewards = read_cell(row.get("rewards"))
    one_each = isinstance(rewards, list)
    parts = [own for own in (rewards if one_each else [rewards]) if isinstance(own, dict)]
    for name in names:
        column = next((own for own in (name, column_of(name)) if own in row), None)
        if parts and (column is None or any(name in own for own in parts)):
            field = "rewards" if one_each else f"rewards.{name}"
            value = rewards if one_each else rewards.get(name)
        else:
            field = column or column_of(name)
            value = row.get(field)
        values = read_list(value, field) if value is not None else [None] * completions
        shown = field + "[{k}]"
        if field == "rewards" and parts:
            shown += f".{name}"
            values = [own.get(name) if isinstance(own, dict) else own for own in values]
        if len(values) != completions:
            raise RowError(
                field,
                "unequal lengths",
                f"has {len(values)} values for {completions} completions; give one each",
            )
        for k, value in enumerate(values):
            found[k][name] = (shown.format(k=k), value)
    return found


def one_reward(given: Any) -> list:
    """`rewards` as a list, one a completion.

    Raises:
        RowError: they are no list, or several a completion.
    """
    rewards = read_cell(given)
    names = next(
        (list(own) for own in (rewards if isinstance(rewards, list) else [rewards]) if isinstance(own, dict)), None
    )
    if names is not None:
        raise RowError(
            "rewards",
            "several rewards",
            f"holds {', '.join(names)}; say what each weighs by `reward_weights`, or take one by `score`",
        )
    return read_list(given, "rewards")


def _numbers(value: Any) -> bool:
    """Whether it is a list of numbers, or of some with gaps."""
    value = read_cell(value)
    if not isinstance(value, list):
        return False
    there = [item for item in value if not is_absent("", item)[1]]
    return bool(there) and all(map(is_number, there))


def is_number(value: Any) -> bool:
    """Whether it reads as a finite number; truth values don't."""
    with suppress(RowError):
        return not is_truth(value) and read_number(value, "") is not None
    return False
