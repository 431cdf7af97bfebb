"""Tables as Arrow, polars, pandas, DuckDB and Spark write them: every type, and the folders of a table in parts.

`make long` has the tools themselves write them, where they are installed: `FRAMES_PYTHON` names a Python that has them.
"""

import decimal
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from datasets import Features, Json, List, Value

import frames
from nca_align.data import load_reward_dataset
from nca_align.data.column_guesses import guess_columns
from nca_align.data.files import kind_of
from nca_align.data.prompts import load_completions, load_prompts
from nca_align.data.sample import read_sample
from nca_align.data.tables import plain_type
from nca_align.errors import UserError

pytestmark = pytest.mark.usefixtures("own_datasets_cache")
N = 3
PROMPTS = [f"p{i}" for i in range(N)]
COMPLETIONS = [[f"a{i}", f"b{i}"] for i in range(N)]
REWARDS = [[1.0, 0.5]] * N
ROWS = [{"prompt": PROMPTS[i], "completions": COMPLETIONS[i], "rewards": REWARDS[i]} for i in range(N)]
CHATS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completions": [[{"role": "assistant", "content": text}] for text in row["completions"]],
        "rewards": row["rewards"],
    }
    for row in ROWS
]
MESSAGE = pa.struct({"role": pa.string(), "content": pa.string()})
NUMBERS = {
    "decimal128": pa.decimal128(10, 2), "decimal256": pa.decimal256(50, 2), "decimal64": pa.decimal64(10, 2),
    "float16": pa.float16(), "float32": pa.float32(), "text": pa.string(),
}  # fmt: skip


def texts(string=pa.string, listed=pa.list_) -> pa.Table:
    types = string(), listed(string()), listed(pa.float64())
    columns = [pa.array(values, kind) for values, kind in zip((PROMPTS, COMPLETIONS, REWARDS), types, strict=True)]
    return pa.table(columns, ["prompt", "completions", "rewards"])


def chats(message, listed=pa.list_, read=dict) -> pa.Table:
    prompts = [[read(turn) for turn in row["prompt"]] for row in CHATS]
    completions = [[[read(turn) for turn in answer] for answer in row["completions"]] for row in CHATS]
    return pa.table({
        "prompt": pa.array(prompts, listed(message)), "completions": pa.array(completions, listed(listed(message))),
        "rewards": pa.array(REWARDS),
    })  # fmt: skip


def rewards(values, kind=None) -> pa.Table:
    return texts().set_column(2, "rewards", pa.array(values, kind))


def number(name: str) -> pa.Table:
    cast = {"text": str, **dict.fromkeys(("decimal128", "decimal256", "decimal64"), decimal.Decimal)}.get(name, float)
    return rewards([[cast(f"{value:.2f}") for value in row] for row in REWARDS], pa.list_(NUMBERS[name]))


TABLES = {
    "plain": (texts(), ROWS),
    "large": (texts(pa.large_string, pa.large_list), ROWS),
    "views": (texts(pa.string_view, pa.list_view), ROWS),
    "large views": (texts(pa.large_string, pa.large_list_view), ROWS),
    "fixed sizes": (texts(listed=lambda kind: pa.list_(kind, 2)), ROWS),
    "dictionaries": (
        texts().set_column(0, "prompt", pa.array(PROMPTS).dictionary_encode()).set_column(
            1, "completions", pa.array(COMPLETIONS, pa.list_(pa.dictionary(pa.int32(), pa.string())))
        ),
        ROWS,
    ),
    "views in a dictionary": (
        texts().set_column(
            0, "prompt", pa.DictionaryArray.from_arrays(pa.array(range(N)), pa.array(PROMPTS, pa.string_view()))
        ),
        ROWS,
    ),
    "messages": (chats(MESSAGE), CHATS),
    "messages in large lists": (chats(MESSAGE, pa.large_list), CHATS),
    "messages in views": (chats(MESSAGE, pa.list_view), CHATS),
    "messages as maps": (chats(pa.map_(pa.string(), pa.string()), read=lambda turn: list(turn.items())), CHATS),
    **{name: (number(name), ROWS) for name in NUMBERS},
}  # fmt: skip


def write(table: pa.Table, path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, path)
    else:
        new = pa.ipc.new_stream if path.stem.endswith("stream") else pa.ipc.new_file
        with new(path, table.schema) as writer:
            writer.write_table(table)
    return str(path)


def read(path, streaming=False) -> list[dict]:
    return list(load_reward_dataset(str(path), split="train", validation_fraction=0, streaming=streaming))


class TestTypes:
    @pytest.mark.parametrize("name", [
        "rows.parquet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rows.feather", "stream.arrow")),
        "rows.arrow",
    ])  # fmt: skip
    @pytest.mark.parametrize("types", TABLES)
    def test_every_type_in_every_file(self, types, name, tmp_path):
        table, rows = TABLES[types]
        try:
            path = write(table, tmp_path / name)
        except (pa.ArrowNotImplementedError, TypeError):  # what this kind of file can't hold, nobody has
            assert (types, name) in {("views in a dictionary", "rows.parquet")}
            return
        assert read(path) == read(path, streaming=True) == rows

    @pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
    def test_columns_beside_keep_their_values(self, name, tmp_path):
        beside = {
            "map": (pa.array([[("a", 1)], [("b", 2), ("c", 3)], None], pa.map_(pa.string(), pa.int64())),
                    [{"a": 1}, {"b": 2, "c": 3}, None]),
            "numbered": (pa.array([[(1, [("x", 2)])], [], None], pa.map_(pa.int32(), pa.map_(pa.string(), pa.int8()))),
                         [{"1": {"x": 2}}, {}, None]),
            "struct": (pa.array([{"a": [("k", 1)], "b": None}, {"a": None, "b": "x"}, None],
                                pa.struct({"a": pa.map_(pa.string(), pa.int8()), "b": pa.string_view()})),
                       [{"a": {"k": 1}, "b": None}, {"a": None, "b": "x"}, None]),
            "uuid": (pa.array([b"0123456789abcdef"] * N, pa.uuid()), [b"0123456789abcdef"] * N),
            "price": (pa.array([decimal.Decimal("1.10")] * N), [decimal.Decimal("1.10")] * N),
            "nothing": (pa.nulls(N), [None] * N),
            "nested": (pa.array([[None, ["x", None]], None, []], pa.list_view(pa.list_(pa.string()))),
                       [[None, ["x", None]], None, []]),
        }  # fmt: skip
        table = texts()
        for column, (values, _) in beside.items():
            table = table.append_column(column, values)
        path = write(table, tmp_path / name)
        for streaming in (False, True):
            rows = read(path, streaming)
            for column, (_, expected) in beside.items():
                found = [row[column] for row in rows]
                if column == "struct":  # a stream's null object has null fields
                    found[2] = found[2] if found[2] and any(found[2].values()) else None
                assert found == expected, column

    def test_what_datasets_wrote_keeps_its_types(self, tmp_path):
        kind = pa.schema({"a": pa.list_(pa.json_()), "b": pa.large_string(), "c": pa.int8()})
        features = Features.from_arrow_schema(kind)
        assert {name: plain_type(kind.field(name).type) for name in kind.names} == features
        assert plain_type(pa.map_(pa.string(), pa.int8())) == Json()
        assert plain_type(pa.list_view(pa.dictionary(pa.int8(), pa.string_view()))) == List(Value("string"))

    @pytest.mark.slow
    def test_a_long_file_is_read_in_order(self, tmp_path):
        many = pa.concat_tables([texts()] * 1000).append_column("i", pa.array(range(3 * 1000))).combine_chunks()
        for name in ("rows.arrow", "stream.arrow"):
            path = write(many, tmp_path / name)
            for streaming in (False, True):
                assert [row["i"] for row in read(path, streaming)] == list(range(3000))

    def test_kinds_by_content(self, tmp_path):
        for name, kind in (
            ("a.parquet", "parquet"),
            ("a.arrow", "arrow"),
            ("stream.arrow", "arrow"),
            ("a.feather", "arrow"),
        ):
            write(texts(), tmp_path / name).encode()
            (tmp_path / "rows").write_bytes((tmp_path / name).read_bytes())
            assert kind_of(str(tmp_path / "rows")) == kind
            assert read(tmp_path / "rows") == ROWS

    @pytest.mark.parametrize("name", ["rows.parquet", "rows.arrow"])
    def test_one_that_is_cut(self, name, tmp_path):
        path = tmp_path / name
        write(texts(), path)
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(UserError, match=rf"{name}', which can't be read as {path.suffix[1:]}: "):
            read(path)

    def test_sampling_and_scoring_read_them(self, tmp_path):
        path = write(texts(pa.string_view, pa.list_view), tmp_path / "rows.arrow")
        assert load_prompts(path, None, "train")["prompt"][:] == PROMPTS
        assert load_completions(path, None, "train")["completions"][:] == COMPLETIONS
        guess = guess_columns(
            [{"question": "x", "answers": ["a", "b"], "marks": [decimal.Decimal(1), decimal.Decimal(2)]}]
        )
        assert guess.flags == "prompt=question completions=answers rewards=marks"


NULLS = {
    "a completion": ({"completions": [["a", None]]}, r"`completions\[1\]` is null, an empty completion"),
    "all completions": ({"completions": [None]}, r"`completions` is null; it must be a list"),
    "a reward": ({"rewards": [[1.0, None]]}, r"`rewards\[1\]` is null, a missing score"),
    "all rewards": ({"rewards": [None]}, r"`rewards` is null; it must be a list"),
    "the prompt": ({"prompt": [None]}, r"`prompt` is null; it must be text or a list of messages"),
    "a message": ({"prompt": [[None]]}, r"`prompt\[0\]` is null; it must be a message"),
    "a content": ({"prompt": [[{"role": "user", "content": None}]]}, r"`prompt\[0\].content` is null; it must be text"),
    "a role": ({"prompt": [[{"role": None, "content": "x"}]]}, r"`prompt\[0\]` is .*; it must be a message"),
}


@pytest.mark.parametrize("what", NULLS)
def test_nested_nulls_are_named_or_dropped(what, tmp_path):
    change, said = NULLS[what]
    chat = "prompt" in change and change["prompt"] != [None]
    rows = CHATS if chat else ROWS
    table = {name: change.get(name, [rows[0][name]]) + [row[name] for row in rows[1:]] for name in rows[0]}
    path = write(pa.table(table), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=f"row 0: {said}"):
        read(path)
    kept = load_reward_dataset(path, split="train", validation_fraction=0, on_invalid="drop")
    assert kept.to_list() == rows[1:]


class TestFolders:
    """`part-*.parquet` beside `_SUCCESS`; folders `column=value`, as Spark, DuckDB, polars and pandas make them."""

    def test_columns_in_the_names_of_folders(self, tmp_path):
        root = tmp_path / "rewards=9"  # above what is named, a name says nothing of the data
        for i, name in enumerate(("source=web", "source=a%20book", "source=__HIVE_DEFAULT_PARTITION__")):
            write(texts().slice(i, 1), root / "data" / name / f"part-{i:05d}-c000.snappy.parquet")
            (root / "data" / name / f".part-{i:05d}-c000.snappy.parquet.crc").write_bytes(b"crc")
        (root / "data" / "_SUCCESS").touch()
        expected = [row | {"source": source} for row, source in zip(ROWS, ("web", "a book", None), strict=True)]
        for path in (root / "data", root / "data" / "*" / "*.parquet"):
            for streaming in (False, True):
                assert sorted(read(path, streaming), key=lambda row: row["prompt"]) == expected
        (one,) = (root / "data" / "source=web").glob("*.parquet")
        assert read(one) == read(one.parent) == ROWS[:1]

    def test_parts_of_other_types_are_put_together(self, tmp_path):
        """Where a part has only nulls, or whole numbers, in a column; or lacks it."""
        first = texts().append_column("note", pa.nulls(N)).append_column("n", pa.array([1] * N))
        first = first.append_column("tags", pa.array([["a"]] * N)).append_column("own", pa.array([{"b": 1}] * N))
        write(first, tmp_path / "d" / "0.parquet")
        write(texts().append_column("note", pa.array(["x"] * N)).append_column("n", pa.array([0.5] * N)),
              tmp_path / "d" / "1.parquet")  # fmt: skip
        write(texts(), tmp_path / "d" / "2.parquet")
        for streaming in (False, True):
            rows = read(tmp_path / "d", streaming)
            assert [row["note"] for row in rows] == [None] * N + ["x"] * N + [None] * N
            assert [row["n"] for row in rows] == [1.0] * N + [0.5] * N + [None] * N
            assert [row["tags"] for row in rows] == [["a"]] * N + [None] * 2 * N
            assert [row["own"] for row in rows[: N + 1]] == [{"b": 1}] * N + [None]

    def test_parts_that_are_no_one_table(self, tmp_path):
        write(texts(), tmp_path / "d" / "0.parquet")
        write(chats(MESSAGE), tmp_path / "d" / "1.parquet")
        with pytest.raises(UserError, match=r"can't be read as parquet: .*prompt"):
            read(tmp_path / "d")

    def test_lines_lose_the_names_of_folders_and_say_so(self, tmp_path, caplog):
        for i, name in enumerate(("source=web", "source=book")):
            path = tmp_path / "d" / name / f"part-{i:05d}.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(ROWS[i]) + "\n")
        (tmp_path / "d" / "_SUCCESS").touch()
        for streaming in (False, True):
            assert sorted(read(tmp_path / "d", streaming), key=lambda row: row["prompt"]) == ROWS[:2]
        assert caplog.text.count("the names of its folders hold the columns source, which are read") == 1


class TestJson:
    @pytest.mark.parametrize("kind", ["jsonl", "json"])
    def test_texts_like_times_are_texts(self, kind, tmp_path):
        rows = [
            {"prompt": f"2026-01-0{i}T00:00:00Z", "completions": ["2026-01-31", "2025-02-01 00:00:00"],
             "rewards": [1, 0], "day": "2026-01-31"} for i in range(1, 4)
        ]  # fmt: skip
        late = [*rows, {"prompt": "When?", "completions": ["2026-01-31", "never"], "rewards": [1, 0.5], "day": None}]
        for name, own in (("a", rows), ("b", late)):
            path = tmp_path / f"{name}.{kind}"
            path.write_text(json.dumps(own) if kind == "json" else "".join(json.dumps(row) + "\n" for row in own))
            for streaming in (False, True):
                assert read(path, streaming) == own

    def test_columns_of_several_types_are_counted_too(self, tmp_path):
        """A dry run reads the first lines of a stream, which has no types."""
        beside = [{"note": 1, "big": 1 << 70}, {"note": {"a": ["x"]}, "big": 1}, {"note": "x", "big": 0}]
        rows = [row | own for row, own in zip(ROWS, beside, strict=True)]
        rows[1] = rows[1] | {"rewards": ["1.0", "0.5"]}
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sample = read_sample(str(tmp_path / "rows.jsonl"), "train", 2)
        assert (sample.read, sample.rows) == (2, 3)
        assert [{name: row[name] for name in ROWS[0]} for row in sample.dataset] == ROWS[:2]

    def test_columns_called_columns_and_data_are_no_table(self, tmp_path):
        row = ROWS[0] | {"columns": ["a"], "data": [["1"]]}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        assert read(tmp_path / "rows.jsonl") == [row]

    @pytest.mark.parametrize("table", [
        {"prompt": {"0": "p", "1": "q"}, "completions": {"0": ["a", "b"], "1": ["c", "d"]}},
        {"columns": ["prompt", "completions"], "index": [0], "data": [["p", ["a", "b"]]]},
    ], ids=["columns", "split"])  # fmt: skip
    def test_tables_by_their_columns(self, table, tmp_path):
        (tmp_path / "rows.json").write_text(json.dumps(table))
        with pytest.raises(UserError, match=r"holds a table by its columns, as pandas' `to_json` writes it\. Write"):
            read(tmp_path / "rows.json")


def test_pandas_puts_its_index_in_a_csv(tmp_path):
    lines = [f'{i},p{i},"[""a{i}"", ""b{i}""]","[1.0, 0.5]"\n' for i in range(N)]
    (tmp_path / "rows.csv").write_text(",prompt,completions,rewards\n" + "".join(lines))
    for streaming in (False, True):
        assert read(tmp_path / "rows.csv", streaming) == [{"Unnamed: 0": str(i)} | row for i, row in enumerate(ROWS)]


@pytest.mark.long
@pytest.mark.parametrize("tool", ["polars", "pandas", "duckdb", "spark"])
def test_files_of_the_tools_themselves(tool, tmp_path):
    python = os.environ.get("FRAMES_PYTHON", sys.executable)
    module = {"spark": "pyspark"}.get(tool, tool)
    if subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode:
        pytest.skip(f"{module} is not installed for {python}; `FRAMES_PYTHON` names a Python that has it")
    subprocess.run([python, frames.__file__, tool, str(tmp_path / "files")], check=True)
    files = sorted((tmp_path / "files").glob("*/*"))
    assert len(files) > 20
    for path in files:
        rows = frames.ROWS if path.parent.name == "texts" else frames.CHATS
        for streaming in (False, True):
            found = sorted(read(path, streaming), key=lambda row: str(row["prompt"]))
            assert [{name: row[name] for name in rows[0]} for row in found] == rows, path
