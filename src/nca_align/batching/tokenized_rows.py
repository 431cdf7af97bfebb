"""What a tokenised row has beside its ids: the masks of what the model wrote, and its several rewards."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import InvalidRowError


def masks_of(row: dict[str, Any], number: int = 0) -> list[list[int]]:
    """Of each completion of a tokenised row, 1 for each token that the model wrote and 0 for context.

    Raises:
        InvalidRowError: a mask isn't 0 or 1 for each token, or 1 for none; it names the row by its `row_number`, or by
            `number` where it has none.
    """
    completions, masks = row["completion_ids"], row.get("completion_mask")
    if masks is None:
        return [[1] * len(completion) for completion in completions]
    from ..data.token_ids import check_masks  # late: most rows have no mask, and the data layer's imports take long
    from ..data.validation import RowError

    where = f"row {row.get('row_number', number)}"
    try:
        check_masks(masks, row["prompt_ids"], completions)
    except RowError as error:
        raise InvalidRowError(f"{where}: {error}") from error
    return masks


def objective_columns(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row `prompt, completions, rewards` that hold an objective each."""
    return [
        column
        for column, values in row.items()
        if column.startswith("score_")
        and isinstance(values, list)
        and len(values) == len(row["rewards"])
        and all(value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)) for value in values)
    ]


def objective_values(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    """The columns of rows that hold an objective each: of each row K numbers, NaN where a completion has none."""
    rows = list(rows)
    own = [objective_columns(row) for row in rows]
    return {
        column: [
            [math.nan if value is None else value for value in row[column]]
            if column in columns
            else [math.nan] * len(row["rewards"])
            for row, columns in zip(rows, own, strict=True)
        ]
        for column in dict.fromkeys(column for columns in own for column in columns)
    }
