"""Parquet and Arrow files as other tools write them: a few rows at a time, in the types that `datasets` has."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Json, List, load_dataset_builder
from datasets.builder import Key
from datasets.fingerprint import Hasher
from datasets.packaged_modules.arrow.arrow import Arrow
from datasets.packaged_modules.parquet.parquet import Parquet

from .columns import code_revision

_ROWS = 1000  # that are read at a time
_FILE_END = b"ARROW1"


def plain_type(kind: pa.DataType) -> Any:
    """The type of `datasets` that holds the values of an Arrow type: views, runs and dictionaries are only encodings.

    A map, which DuckDB and Spark have, is an object whose keys differ from row to row: JSON.
    """
    if pa.types.is_map(kind):
        return Json()
    if pa.types.is_struct(kind):
        return {kind.field(i).name: plain_type(kind.field(i).type) for i in range(kind.num_fields)}
    if pa.types.is_fixed_size_list(kind):
        return List(plain_type(kind.value_type), length=kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        return List(plain_type(kind.value_type))
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType) and not isinstance(kind, pa.JsonType):
        return plain_type(kind.storage_type)
    stored = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}.get(kind, kind)
    if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
        stored = pa.decimal128(kind.precision, kind.scale)
    return Features.from_arrow_schema(pa.schema({"": stored}))[""]


def _is_cast(kind: pa.DataType) -> bool:
    """Whether Arrow casts such a column itself: it makes invalid lists of views (26.0), and no JSON of maps."""
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    own = (pa.types.is_map, pa.types.is_list_view, pa.types.is_large_list_view)
    return not any(test(kind) for test in own) and all(map(_is_cast, inner))


def _plain(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """A column in the plain type `kind`."""
    if isinstance(column.type, pa.BaseExtensionType) and not isinstance(column.type, pa.JsonType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    if column.type == kind:
        return column
    if _is_cast(column.type):
        with suppress(pa.ArrowNotImplementedError):  # of some encodings within others
            return column.cast(kind)
    features = Features.from_arrow_schema(pa.schema({"": kind}))
    values = column.to_pylist(maps_as_pydicts="lossy")  # as DuckDB and Spark have it, the last of two equal keys counts
    return Dataset.from_dict({"": values}, features=features).data.table.column(0)


def folder_columns(file: str, root: Path) -> dict[str, str | None]:
    """The columns that the folders of a file below `root` name, as Spark, DuckDB, polars and pandas part a table.

    `root/source=web/part-0.parquet` has "web" in the column `source`.
    """
    folder = Path(os.path.abspath(file)).parent
    parts = folder.relative_to(root).parts if folder.is_relative_to(root) else ()
    pairs = [part.split("=", 1) for part in parts if "=" in part.strip("=")]
    found = {unquote(name): unquote(value) for name, value in pairs}
    return {name: None if value == "__HIVE_DEFAULT_PARTITION__" else value for name, value in found.items()}


class _AsWritten:
    """A builder of `datasets` that reads tables in plain types, with the columns that folders below `root` name."""

    root: Path

    def _split_generators(self: Any, dl_manager: Any) -> Any:
        files = [file for own in self.config.data_files.values() for file in own]
        schemas = [self._schema(file) for file in files]
        schema = pa.unify_schemas(schemas, promote_options="permissive") if len(schemas) > 1 else schemas[0]
        features = Features.from_arrow_schema(schema)  # with what `datasets` left in a file that it wrote
        named = {name: plain_type(pa.string()) for file in files for name in folder_columns(file, self.root)}
        self.info.features = Features({**named, **features})
        return super()._split_generators(dl_manager)  # type: ignore[misc]

    def _schema(self: Any, file: str) -> pa.Schema:
        """A file's schema in plain types."""
        schema = self._raw_schema(file)
        plain = Features({field.name: plain_type(field.type) for field in schema}).arrow_schema
        return plain.with_metadata(
            {key: text for key, text in (schema.metadata or {}).items() if key == b"huggingface"}
        )

    def _table(self: Any, batch: pa.RecordBatch, file: str) -> pa.Table:
        table, schema = pa.Table.from_batches([batch]), self.info.features.arrow_schema
        named, columns = folder_columns(file, self.root), []
        for field in schema:
            if field.name in table.column_names:
                column = table[field.name]
                plain = Features({"": plain_type(column.type)}).arrow_schema[0].type
                columns.append(_plain(column, plain))
            elif field.name in named:
                columns.append(pa.chunked_array([pa.array([named[field.name]] * len(table), pa.string())]))
            else:
                columns.append(pa.chunked_array([pa.nulls(len(table), field.type)]))
        return self._cast_table(pa.Table.from_arrays(columns, schema.names))


class ParquetTables(_AsWritten, Parquet):
    """`datasets`' reader of Parquet, but a few rows at a time.

    Its own reads ahead as far as a file goes, faster than rows are taken, whatever its options. Of ten times the rows
    (100 MB) it held 60 to 100 MB more, and this one 6 MB. `Dataset.from_generator` over a stream's rows is as small.
    But it takes 4.5 seconds for 100,000 rows, and this takes 0.3.
    """

    def _raw_schema(self, file: str) -> pa.Schema:
        return pq.read_schema(file)

    def _generate_tables(self, files: list[str], row_groups_list: list[list[int] | None]) -> Iterator[tuple]:
        for i, (file, groups) in enumerate(zip(files, row_groups_list, strict=True)):
            with pq.ParquetFile(file) as opened:
                for j, batch in enumerate(opened.iter_batches(_ROWS, row_groups=groups)):
                    yield Key(i, j), self._table(batch, file)


class ArrowTables(_AsWritten, Arrow):
    """`datasets`' reader of Arrow files and streams, which Feather files are, too; a few rows at a time."""

    def _raw_schema(self, file: str) -> pa.Schema:
        with pa.memory_map(file) as opened:
            return _reader(opened).schema

    def _generate_tables(self, files: list[str]) -> Iterator[tuple]:
        for i, file in enumerate(files):
            with pa.memory_map(file) as opened:
                for j, batch in enumerate(_slices(_reader(opened))):
                    batch.validate(full=True)
                    yield Key(i, j), self._table(batch, file)


def _reader(opened: pa.NativeFile) -> Any:
    is_file = opened.read(len(_FILE_END)) == _FILE_END
    opened.seek(0)
    return pa.ipc.open_file(opened) if is_file else pa.ipc.open_stream(opened)


def _slices(reader: Any) -> Iterator[pa.RecordBatch]:
    whole: Iterable[pa.RecordBatch] = reader
    if isinstance(reader, pa.RecordBatchFileReader):
        whole = map(reader.get_batch, range(reader.num_record_batches))
    for batch in whole:
        for start in range(0, max(1, batch.num_rows), _ROWS):
            yield batch.slice(start, _ROWS)


BUILDERS: dict[str, Any] = {"parquet": ParquetTables, "arrow": ArrowTables}


def load_tables(kind: str, what: tuple, arguments: dict, streaming: bool, root: Path) -> dict[str, Any]:
    """The splits of what `load_dataset(*what, **arguments)` would find, files of this kind.

    Args:
        root: the folder below which names of folders hold columns; see `folder_columns`.
    """
    found = load_dataset_builder(*what, **arguments)  # which files are which split
    root = Path(os.path.abspath(root))
    key = Hasher.hash((found.hash, code_revision(), str(root)))
    builder: Any = BUILDERS[kind](data_files=found.config.data_files, hash=key)
    builder.root = root
    if streaming:
        splits = builder.as_streaming_dataset()
        return {name: split.reshard() if kind == "parquet" else split for name, split in splits.items()}
    builder.download_and_prepare()
    return dict(builder.as_dataset())
