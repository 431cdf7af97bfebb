"""Tokens that a model has no row for: looking one up is an IndexError, and on a card a device assert."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

from ..errors import InvalidRowError

_FIRST_ROWS = 64  # of a stream
_COLUMNS = ["prompt_ids", "completion_ids"]


def check_token(
    token: int, rows: int, tokenizer: Any = None, where: str = "`prompt`", fix: str = "take the tokenizer and chat "
    "template that it was saved with, or add rows by `model.resize_token_embeddings(len(tokenizer))` and save it",
) -> None:  # fmt: skip
    """Refuse a token that a model with so many `rows` of embeddings does not have.

    Raises:
        InvalidRowError: it names the token, `where` it stands, and the `fix`.
    """
    if token >= rows:
        known = None if tokenizer is None else tokenizer.convert_ids_to_tokens(token)
        name = "" if known is None else f" {known!r}"
        raise InvalidRowError(
            f"{where} has the token{name} of id {token}, but the model has {rows} rows of embeddings, for ids up to "
            f"{rows - 1}; {fix}"
        )


def check_ids(rows: Iterable[dict[str, Any]], limit: int, tokenizer: Any = None, name: str | None = None) -> None:
    """Refuse tokenised rows with a token that a model with `limit` rows of embeddings does not have.

    Raises:
        InvalidRowError: it names the first such row, of the data set `name`.
    """
    for i, row in enumerate(rows):
        largest = max(max(ids, default=0) for ids in (row["prompt_ids"], *row["completion_ids"]))
        if largest >= limit:
            number = row.get("row_number", i)
            try:
                check_token(largest, limit, tokenizer, f"row {number}" if name is None else f"row {number} of `{name}`")
            except InvalidRowError as error:
                error.place = None if name is None else (name, number)
                raise


def check_padding(tokenizer: Any, rows: int) -> None:
    """Refuse a tokenizer that pads by a token that the model does not have.

    Raises:
        InvalidRowError: it names the token.
    """
    fix = (
        f"set the tokenizer's `pad_token` to one that it has, such as its EOS {tokenizer.eos_token!r}, or add rows by "
    )
    fix += "`model.resize_token_embeddings(len(tokenizer))` and save it"
    check_token(tokenizer.pad_token_id or 0, rows, tokenizer, "the tokenizer's `pad_token`", fix)


def check_dataset(dataset: Any, limit: int, tokenizer: Any, name: str) -> None:
    """`check_ids` of all that is tokenised, or of each of a dict; of a stream's first rows alone."""
    from datasets import Dataset, IterableDataset  # late: a batch and its check need neither

    if isinstance(dataset, dict):
        for key, own in dataset.items():
            check_dataset(own, limit, tokenizer, key)
    elif isinstance(dataset, IterableDataset):
        check_ids(islice(dataset, _FIRST_ROWS), limit, tokenizer, name)
    elif isinstance(dataset, Dataset):
        for batch in dataset.with_format("arrow").iter(10_000):
            if any(_largest(batch[column]) >= limit for column in _COLUMNS):
                check_ids(batch.to_pylist(), limit, tokenizer, name)


def _largest(ids: Any) -> int:
    import pyarrow.compute as pc

    while hasattr(ids.type, "value_type"):
        ids = pc.list_flatten(ids)
    return pc.max(ids).as_py() or 0
