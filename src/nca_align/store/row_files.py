"""Files of rows, JSONL or Parquet: written whole, and joined."""

import json
import os
from collections.abc import Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features

from ..errors import UserError
from .files import replacing, write_json
from .provenance import KEY, sidecar


def refuse_no_json(features: Features) -> None:
    """Refuse columns that a JSONL file can't hold.

    Raises:
        UserError: a column of binary values, decimals or durations.
    """
    for column in features.arrow_schema:
        _refuse_no_json(column.name, column.type)


def _refuse_no_json(name: str, kind: pa.DataType) -> None:
    if pa.types.is_nested(kind):
        for i in range(kind.num_fields):
            _refuse_no_json(name, kind.field(i).type)
        return
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_decimal,
             pa.types.is_duration)  # fmt: skip
    if any(test(kind) for test in tests):
        raise UserError(
            f"column `{name}` is of type {kind}, which JSON doesn't have; make `output` end in .parquet, or leave it "
            "out"
        )


_iso = methodcaller("isoformat")  # of dates and times, the only values left here that are no JSON


def write_rows(path: Path, rows: list[dict], features: Features) -> None:
    """`rows` in the place of `path` at once, or not at all; a process that outlived its launch may write the same."""
    with replacing(path, "wb", temporary=path.with_name(f".{path.name}.{os.getpid()}")) as file:
        if path.suffix == ".jsonl":
            file.writelines(f"{json.dumps(row, ensure_ascii=False, default=_iso)}\n".encode() for row in rows)
        else:
            columns = {name: [row[name] for row in rows] for name in features}
            pq.write_table(Dataset.from_dict(columns, features=features).data.table.combine_chunks(), file)


def read_rows(path: Path) -> list[Any]:
    """The rows of a JSONL file. A line ends at a line feed; Python's `splitlines` ends one at nine characters more."""
    with open(path, "rb") as file:
        return [json.loads(line) for line in file]


def join_files(path: Path, shards: Sequence[Path], features: Features, steps: list[dict]) -> None:
    """All shards in one file, with the steps that made it: inside where it is Parquet, and beside it otherwise."""
    if path.suffix == ".jsonl":
        write_json(sidecar(path), steps)
        with replacing(path, "wb") as file:
            for shard in shards:
                file.write(shard.read_bytes())
        return
    schema = features.arrow_schema
    schema = schema.with_metadata({**(schema.metadata or {}), KEY: json.dumps(steps).encode()})
    with replacing(path, "wb") as file, pq.ParquetWriter(file, schema) as writer:
        for shard in shards:
            table = pq.read_table(shard).replace_schema_metadata(schema.metadata)
            # Parquet has no whole seconds: what was put in as such comes back in milliseconds
            writer.write_table(table if table.schema.equals(schema) else table.cast(schema))
