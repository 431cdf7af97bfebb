"""Data sets by path: files, folders, the Hub, and what can't be read."""

import csv
import json
import logging
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, List, Value

from conftest import SOURCES, pair_rows, reward_rows, scored_rows
from nca_align.data import DataOptions, load_reward_dataset, read_reward_dataset
from nca_align.data.json_types import with_fractions
from nca_align.errors import InvalidRowError

GOOD = {"prompt": "q", "completions": ["a", "b"], "rewards": [1.0, 0.0]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def whole(path, **options):
    return load_reward_dataset(str(path), split="train", validation_fraction=0, **options)


def test_jsonl_json_parquet_and_saved_folders_give_the_same_rows(tmp_path):
    rows = [row | {"rewards": [round(x, 3) for x in row["rewards"]]} for row in reward_rows(6, [2, 3])]
    dataset = Dataset.from_list(rows)
    write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    DatasetDict(train=dataset).save_to_disk(tmp_path / "saved-dict")
    for name in ("rows.jsonl", "rows.json", "rows.parquet", "saved", "saved-dict"):
        assert whole(tmp_path / name).to_list() == rows
        stream = whole(tmp_path / name, streaming=True)
        assert isinstance(stream, IterableDataset)
        assert list(stream) == rows


def test_shards_by_pattern_and_folders(tmp_path):
    rows = reward_rows(6)
    (tmp_path / "shards").mkdir()
    for i in range(3):
        Dataset.from_list(rows[2 * i : 2 * i + 2]).to_parquet(tmp_path / "shards" / f"part-{i}.parquet")
    assert whole(tmp_path / "shards" / "part-*.parquet").to_list() == rows
    (tmp_path / "shards" / ".vscode").mkdir()
    write(tmp_path / "shards" / ".vscode" / "settings.json", rows[:1])  # hidden: no data
    assert whole(tmp_path / "shards").to_list() == rows
    assert list(whole(tmp_path / "shards" / "part-*.parquet", streaming=True)) == rows
    (tmp_path / "named").mkdir()
    write(tmp_path / "named" / "train.jsonl", rows[:4])
    write(tmp_path / "named" / "test.jsonl", rows[4:])
    splits = load_reward_dataset(str(tmp_path / "named"))
    assert {name: split.to_list() for name, split in splits.items()} == {"train": rows[:4], "test": rows[4:]}


def test_several_jsonl_files_are_streamed_one_after_another(tmp_path):
    rows = reward_rows(5)
    write(tmp_path / "a.jsonl", rows[:1])
    (tmp_path / "b.jsonl").write_text("7\n" + "".join(json.dumps(row) + "\n" for row in rows[1:]))
    stream = whole(tmp_path / "*.jsonl", streaming=True, on_invalid="drop")
    assert list(stream) == rows
    assert stream.num_shards == 2  # so that workers share them out
    with pytest.raises(ValueError, match=r"row 0 of .*b.jsonl is a JSON int"):
        list(whole(tmp_path / "*.jsonl", streaming=True))


def test_csv_cells_that_hold_lists_are_lists_and_answers_stay_text(tmp_path):
    rows = [
        {"prompt": "N/A", "completions": ["12", "null"], "rewards": [1.5, 2.0]},
        {"prompt": "[x]", "completions": ['say "hi",\nor', "é"], "rewards": [0.0, -1.0]},
    ]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(GOOD)
        writer.writerows([row["prompt"], json.dumps(row["completions"]), json.dumps(row["rewards"])] for row in rows)
    assert whole(path).to_list() == rows
    path.write_text('prompt,completion,score\np,12,3\np,N/A,"4.5"\n')
    assert whole(path).to_list() == [
        {"prompt": "p", "completions": ["12", "N/A"], "rewards": [3.0, 4.5], "score": ["3", "4.5"]}
    ]
    path.write_text('prompt,completion,score\np,12,3\np,x,""\n')
    with pytest.raises(ValueError, match=r"`train`, row 1: `score` is '', a missing score"):
        whole(path)
    path.write_text("prompt,completions,rewards\np,[1,2\n")
    with pytest.raises(ValueError, match=r"`train`, row 0: `rewards` is '2' \(str\); it must be a list"):
        whole(path)
    path.write_text("a,b\n1,2,3\n")
    with pytest.raises(ValueError, match=r"as csv: row 0 has 3 cells for 2 columns. Give each column a name"):
        whole(path)
    path.write_text("a,b\n1,2\n1,2,3\n")
    with pytest.raises(
        ValueError, match=r"rows.csv', which can't be read as csv: .*Expected 2 fields in line 3, saw 3$"
    ):
        whole(path)


def test_whole_numbers_that_turn_to_fractions_far_into_a_file(tmp_path):
    row = GOOD | {"prompt": "q" * 11_000_000, "rewards": [1, 2]}
    path = write(tmp_path / "rows.jsonl", [row, GOOD | {"rewards": [0.5, 2]}])
    assert whole(path)["rewards"][:] == [[1.0, 2.0], [0.5, 2.0]]


def test_token_ids_are_no_fractions():
    """Wherever others become some: raw UltraFeedback's `completions` hold numbers, and rows of ids hold them alone."""
    ids, whole, fraction = List(List(Value("int64"))), Value("int64"), Value("float64")
    given = {"completion_ids": ids, "completion_mask": ids, "completions": ids, "rewards": List(whole)}
    assert with_fractions(Features(given)) == Features(given | {"rewards": List(fraction)})
    raw = Features({"completions": List({"overall_score": whole})})
    assert with_fractions(raw) == Features({"completions": List({"overall_score": fraction})})


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("field", ["rewards", "call", "tools"])
def test_numbers_of_calls_and_tools_stay_as_written_beside_fractions(field, late, tmp_path):
    """A template writes 1 and 1.0 differently; a fraction in one row must not change another, near or far."""

    def row(number: float, prompt: str) -> dict:
        a, least, first = (number if name == field else 1 for name in ("call", "tools", "rewards"))
        turn = {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": a, "of": [2, {"b": 3}]}}}
        ]}  # fmt: skip
        tool = {
            "type": "function",
            "function": {"name": "add", "parameters": {"properties": {"a": {"minimum": least}}}},
        }
        ask = [{"role": "user", "content": prompt}]
        return {"prompt": ask, "completions": [[turn], [turn]], "rewards": [first, 0], "tools": [tool]}

    rows = [row(1, "q" * 11_000_000 if late else "q"), row(0.5, "q")]
    read = whole(write(tmp_path / "rows.jsonl", rows))
    assert read["rewards"][:] == [[1.0, 0.0], [0.5 if field == "rewards" else 1.0, 0.0]]
    for name in ("completions", "tools"):
        assert list(map(json.dumps, read[name])) == [json.dumps(own[name]) for own in rows]


@pytest.mark.parametrize("lists", [False, True])
def test_gaps_among_whole_numbers_before_fractions(lists, tmp_path):
    """Which Arrow's reader of JSON miscounts."""
    given = [[None, 2], [1.5, 2], [3, None]]
    rows = [GOOD | {"rewards": {"a": [1, 0], "b": own}} for own in given]
    path = tmp_path / ("rows.json" if lists else "rows.jsonl")
    path.write_text(json.dumps(rows) if lists else "\n".join(map(json.dumps, rows)))
    read = whole(path, reward_weights={"a": 1, "b": 2}, on_missing="leave_out")
    assert read["score_b"][:] == given
    assert read["rewards"][:] == [[1.0, 0.0], [4.0, 4.0], [1.0, 0.0]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b'{"prompt": "q", "completions": ["a"',
            r"row 2 of .*rows.jsonl is not readable JSON \(Expecting ',' .* character",
        ),
        (b"7", r"row 2 of .*rows.jsonl is a JSON int; every line must be an object"),
        (
            b'{"prompt": "\xff"}',
            r"row 2 of .*rows.jsonl is not UTF-8 text \(byte 0xff at offset 12\). Save it as UTF-8 .*, or drop",
        ),
    ],
)
def test_an_unreadable_line_is_named_or_dropped_and_counted(tmp_path, caplog, line, message):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\n".join([good, good, line, good]))
    with pytest.raises(ValueError, match=message):
        whole(path)
    with pytest.raises(ValueError, match=message):
        list(whole(path, streaming=True))
    with caplog.at_level(logging.WARNING, "nca_align"):
        data = read_reward_dataset(str(path), on_invalid="drop")
        assert data.dataset["train"].to_list() == [GOOD] * 3
        assert data.reports["train"].dropped == {"unreadable line": 1}
        assert (data.reports["train"].rows, data.reports["train"].kept) == (4, 3)
        assert list(whole(path, streaming=True, on_invalid="drop")) == [GOOD] * 3
    assert caplog.records[0].getMessage() == f"left out 1 unreadable lines of {path}"
    assert caplog.records[-1].getMessage().startswith("left out: row 2 of ")


def test_unreadable_files_are_one_sentence(tmp_path):
    cases = {
        "a.jsonl": ("", r"a.jsonl', which is empty; it must have at least one row"),
        "b.json": ("[]", r"b.json', which is empty"),
        "c.json": (json.dumps([GOOD])[:-3], r"c.json is not readable JSON \(.*\); mend the file"),
        "d.json": (f"[{json.dumps(GOOD)}, 3]", r"row 1 of .*d.json is a JSON int; every row must be an object"),
        "e.parquet": ("no parquet", r"e.parquet', which can't be read as parquet: "),
        "f.csv": ("", r"f.csv', which is empty"),
        "g.txt": ("x", r"g.txt', which holds .txt; it must be files of one kind, of .json, .jsonl"),
        "h.csv": ("prompt,completions,rewards\n", r"h.csv', which is empty"),
    }
    for name, (text, message) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            whole(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
    with pytest.raises(
        ValueError, match=r"which holds .*.csv, .json, .jsonl, .parquet.*; it must be files of one kind"
    ):
        whole(tmp_path / "*")
    with pytest.raises(ValueError, match="is not readable JSON"):
        whole(tmp_path / "c.json", on_invalid="drop")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"which holds none of these; it must be files of one kind"):
        whole(tmp_path / "empty")


def test_a_path_that_is_not_there_and_a_hub_id_that_can_not_be_had():
    for path in ("./rows.parquet", "rows.jsonl", "/no/where", "part-*.csv"):
        with pytest.raises(FileNotFoundError, match=r"`dataset_name` is '.*', and there is no such file"):
            load_reward_dataset(path)
    with pytest.raises(ConnectionError) as caught:
        load_reward_dataset("nvidia/HelpSteer2")
    assert str(caught.value).startswith(
        "`dataset_name` is 'nvidia/HelpSteer2', which is not a file here and can't be loaded"
    )
    assert str(caught.value).endswith("`dataset_name` also takes a local path.")


def test_hub_data_sets_are_read_by_name_and_configuration(monkeypatch):
    rows = Dataset.from_list([GOOD])
    splits = dict.fromkeys(("train_prefs", "train_sft", "test_prefs", "test_gen"), rows)
    calls = []

    def load_dataset(path, name, streaming):
        calls.append((path, name, streaming))
        if name == "wrong":
            raise ValueError("BuilderConfig 'wrong' not found.\nAvailable: ['default']")
        return DatasetDict(splits)

    monkeypatch.setattr("nca_align.data.source.load_dataset", load_dataset)
    assert list(load_reward_dataset("who/what", name="default")) == ["train_prefs", "test_prefs"]
    assert load_reward_dataset("who/what", split="train").to_list() == [GOOD]  # its only training split of preferences
    assert load_reward_dataset("who/what", split="test_gen").to_list() == [GOOD]  # by its own name
    assert calls[0] == ("who/what", "default", False)
    with pytest.raises(
        ValueError, match=r"`dataset_name` 'who/what' can't be read: BuilderConfig 'wrong' not found. Av"
    ):
        load_reward_dataset("who/what", name="wrong")


def test_a_refused_row_of_a_split_is_named_by_its_row_of_the_data(tmp_path):
    rows = reward_rows(40)
    data = read_reward_dataset(write(tmp_path / "rows.jsonl", rows), validation_fraction=0.3)
    for split, name in (("train", "train"), ("validation", "eval")):
        for i, prompt in enumerate(data.dataset[split]["prompt"]):
            with pytest.raises(InvalidRowError) as told, data.naming_source_rows():
                raise InvalidRowError(f"Row {i}: no", place=(name, i))
            number = int(re.fullmatch(rf"Row {i}: no \(row (\d+) of the data before.*", str(told.value))[1])
            assert rows[number]["prompt"] == prompt
    whole = read_reward_dataset(write(tmp_path / "rows.jsonl", rows), validation_fraction=0)
    with pytest.raises(InvalidRowError, match=r"^Row 3: no$"), whole.naming_source_rows():
        raise InvalidRowError("Row 3: no", place=("train", 3))


def test_the_validation_split_is_cut_once_and_its_rows_are_told(tmp_path):
    rows = reward_rows(40)
    path = write(tmp_path / "rows.jsonl", rows)
    data = read_reward_dataset(path, validation_fraction=0.1, validation_seed=3)
    assert data.dataset["validation"].to_list() == [rows[i] for i in data.validation_indices]
    assert len(data.validation_indices) == 4
    assert len(data.dataset["train"]) == 36
    again = read_reward_dataset(path, options=DataOptions(validation_fraction=0.1, validation_seed=3))
    assert again.validation_indices == data.validation_indices
    for split in ("train", "validation", "test"):  # the same rows where one split is asked for
        part = load_reward_dataset(path, split=split, validation_fraction=0.1, validation_seed=3)
        assert part.to_list() == data.dataset["train" if split == "train" else "validation"].to_list()
    assert list(load_reward_dataset(path, validation_fraction=0)) == ["train"]
    assert list(load_reward_dataset(path, streaming=True)) == ["train"]
    with pytest.raises(ValueError, match=r"the split `dev2` is not in the data set, which has train, validation; name"):
        load_reward_dataset(path, split="dev2")
    with pytest.raises(ValueError, match=r"the split `test` is not in the data set, which has train; name one"):
        load_reward_dataset(path, split="test", validation_fraction=0)


def test_data_with_a_split_of_its_own_is_not_cut(tmp_path):
    rows = Dataset.from_list(reward_rows(40))
    DatasetDict(train=rows, other=rows).save_to_disk(tmp_path / "saved")
    data = read_reward_dataset(str(tmp_path / "saved"))
    assert {name: len(split) for name, split in data.dataset.items()} == {"train": 40, "other": 40}
    assert data.validation_indices is None
    few = read_reward_dataset(write(tmp_path / "few.jsonl", reward_rows(19)))
    assert (list(few.dataset), few.validation_indices) == (["train"], None)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("rows_of", "k"), [(scored_rows, 4), (pair_rows, 2)])
def test_files_in_ultrafeedbacks_layouts_load_without_options(rows_of, k, source, tmp_path):
    rows = rows_of(source)
    n = len(rows)
    data = load_reward_dataset(write(tmp_path / "rows.jsonl", rows))
    assert list(data) == ["train", "validation"]
    assert (len(data["train"]), len(data["validation"])) == (n - n // 20, n // 20)
    assert {len(rewards) for split in data.values() for rewards in split["rewards"]} == {k}


def test_a_cached_conversion_still_reports_what_it_left_out(tmp_path):
    rows = reward_rows(5)
    rows[1]["rewards"][0] = float("nan")
    path = write(tmp_path / "rows.jsonl", rows)
    first, second = (read_reward_dataset(path, on_invalid="drop").reports["train"] for _ in range(2))
    assert first == second
    assert first.dropped == {"reward not finite": 1}
    with pytest.raises(ValueError, match="row 1"):
        read_reward_dataset(path)


def test_processes_share_the_work(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(10)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert whole(path, num_proc=2).to_list() == whole(path).to_list()


def test_options_are_flags_beside_trl_s_and_refuse_unknown_values():
    from trl import DPOConfig, ModelConfig, ScriptArguments

    from nca_align.options import parse

    argv = "--score mean_aspects --on_invalid drop --exclude_sources a b --validation_fraction 0.1"
    argv += " --dataset_name x --bf16 false"
    _, options, _, _ = parse([ScriptArguments, DataOptions, DPOConfig, ModelConfig], argv.split(), "train")
    assert options == DataOptions(
        "mean_aspects", on_invalid="drop", exclude_sources=["a", "b"], validation_fraction=0.1
    )
    assert all(field.metadata["help"] for field in fields(DataOptions))
    for name, value in {"preference": "soft", "on_invalid": "skip", "score_bug": "keep"}.items():
        with pytest.raises(ValueError, match=rf"`{name}` is '{value}'; it must be one of "):
            DataOptions(**{name: value})
    with pytest.raises(ValueError, match=r"`exclude_sources` is 'a'; it must be a list of names"):
        DataOptions(exclude_sources="a")
    with pytest.raises(ValueError, match=r"`validation_fraction` is 1; it must be at least 0 and less than 1"):
        DataOptions(validation_fraction=1)


def test_no_test_reads_what_another_run_left(datasets_cache, tmp_path_factory, tmp_path):
    """Neither here nor in a process that a test starts."""
    import datasets

    name = "import datasets; print(datasets.config.HF_DATASETS_CACHE)"
    started = subprocess.run([sys.executable, "-c", name], capture_output=True, text=True, check=True)
    assert Path(started.stdout.strip()) == Path(datasets.config.HF_DATASETS_CACHE) == datasets_cache
    assert datasets_cache.is_relative_to(tmp_path_factory.getbasetemp())
    before = set(datasets_cache.glob("json/*"))
    whole(write(tmp_path / "rows.jsonl", reward_rows(3)))
    assert len(set(datasets_cache.glob("json/*")) - before) == 1
