"""What ends a line is the format's rule: text that holds Python's other line ends comes back from every file whole."""

import csv
import json
import re
from pathlib import Path

import pytest
from datasets import Features, List, Value, disable_progress_bars, enable_progress_bars
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nca_align
from nca_align.commands.evaluate import judges
from nca_align.commands.evaluate.judge_formats import JUDGES
from nca_align.commands.evaluate.judges import JudgeOptions, judge
from nca_align.commands.sample.options import Sample
from nca_align.data import load_reward_dataset
from nca_align.data.files import kind_of
from nca_align.data.prompts import load_raw
from nca_align.evaluation.comparison_folder import failure
from nca_align.store.files import read_csv, read_json, write_csv, write_json
from nca_align.store.row_files import read_rows, write_rows

ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # of `str.splitlines`
TEXT = st.lists(st.sampled_from([*ENDS, "\r\n", "a", "é", '"', ",", "\\", "#", " "]), max_size=6).map("".join)
ROW = st.builds(lambda prompt, *completions: {"prompt": prompt, "completions": [*completions]}, TEXT, TEXT, TEXT)
ROWS = st.lists(ROW, min_size=1, max_size=3)
FEATURES = Features({"prompt": Value("string"), "completions": List(Value("string"))})
checked = settings(max_examples=25, deadline=None, derandomize=True, database=None,
                   suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip


@pytest.fixture(autouse=True)
def no_bars():
    disable_progress_bars()
    yield
    enable_progress_bars()


def test_these_are_the_ends_that_python_knows():
    assert all(len(f"a{end}b".splitlines()) == 2 for end in ENDS)
    assert sum(len(f"a{chr(i)}b".splitlines()) == 2 for i in range(0x11000)) == len(ENDS)


class TestOwnFiles:
    @checked
    @given(rows=ROWS)
    def test_rows(self, rows, tmp_path):
        write_rows(tmp_path / "rows.jsonl", rows, FEATURES)
        assert read_rows(tmp_path / "rows.jsonl") == rows
        windows = (tmp_path / "rows.jsonl").read_bytes().replace(b"\n", b"\r\n")
        (tmp_path / "windows.jsonl").write_bytes(windows)
        assert read_rows(tmp_path / "windows.jsonl") == rows

    @checked
    @given(rows=ROWS)
    def test_tables_and_values(self, rows, tmp_path):
        table = [{"a": row["prompt"], 'b"': row["completions"][0], "c": row["completions"][1]} for row in rows]
        write_csv(tmp_path / "t.csv", table)
        assert read_csv(tmp_path / "t.csv") == table
        for escaped in (True, False):
            write_json(tmp_path / "v.json", table, ensure_ascii=escaped)
            assert read_json(tmp_path / "v.json") == table

    @pytest.mark.parametrize("end", sorted(set(ENDS) - {"\n", "\r"}))
    def test_the_reason_of_a_failed_cell_is_its_last_line(self, end, tmp_path):
        (tmp_path / "error.txt").write_bytes(f"Traceback\nthe reason{end}goes on\n".encode())
        assert failure(tmp_path) == f"the reason{end}goes on"


class TestData:
    @pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
    def test_rows(self, kind, tmp_path):
        """All in one file: reading one takes its time."""
        rows = [
            {"prompt": f"p{end}q", "completions": [f"a{end}", f"{end}b{end}{end}c"], "rewards": [1.0, 0.5]}
            for end in (*ENDS, "\r\n")
        ]
        path = tmp_path / f"rows.{kind}"
        if kind == "jsonl":
            path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        elif kind == "json":
            path.write_bytes(json.dumps(rows, ensure_ascii=False).encode())
        elif kind == "csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                texts = [
                    {name: text if name == "prompt" else json.dumps(text) for name, text in row.items()} for row in rows
                ]
                writer.writerows(texts)
        else:
            write_rows(path, rows, Features({**FEATURES, "rewards": List(Value("float64"))}))
        for streaming in (False, True):
            assert (
                list(load_reward_dataset(str(path), split="train", validation_fraction=0, streaming=streaming)) == rows
            )

    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_prompts_of_a_text_file(self, end, tmp_path):
        prompts = [f"a{other}b" for other in ENDS if other not in "\n\r"]
        (tmp_path / "prompts.txt").write_bytes(end.join([*prompts, "", "last"]).encode())
        assert load_raw(str(tmp_path / "prompts.txt"))["prompt"][:] == [*prompts, "last"]

    @pytest.mark.parametrize("end", sorted(set(ENDS) - {"\n", "\r"}))
    def test_the_first_line_says_what_a_file_is(self, end, tmp_path):
        (tmp_path / "rows").write_bytes(f"a{end},b\n1,2\n".encode())
        assert kind_of(str(tmp_path / "rows")) == "csv"
        (tmp_path / "rows").write_bytes(f"a{end}b\n1,2\n".encode())
        assert kind_of(str(tmp_path / "rows")) is None


@pytest.mark.parametrize("whose", JUDGES)
def test_answers_as_the_judges_read_them(whose, tmp_path, monkeypatch, model_dir):
    """AlpacaEval loads one array, FastChat and Arena-Hard iterate over the file's lines."""
    answer = f"x{'y'.join(ENDS)}z"
    rows = {
        "alpaca_eval": {"instruction": answer}, "arena_hard": {"uid": "u", "prompt": answer},
        "mt_bench": {"question_id": 1, "category": "math", "turns": [answer, answer]},
    }  # fmt: skip
    (tmp_path / "questions.jsonl").write_bytes(json.dumps(rows[whose], ensure_ascii=False).encode() + b"\n")
    asked = []

    def engine(sampling, shard, prompts, progress):
        asked.extend(prompt["prompt"][-1]["content"] for prompt in prompts.values())
        return {number: [Sample(answer, False)] for number in prompts}

    monkeypatch.setattr(judges, "open_engine", lambda *_: engine)
    path = tmp_path / f"answers{JUDGES[whose].suffix}"
    judge(JudgeOptions(judge=whose, output=str(path), dataset_name=str(tmp_path / "questions.jsonl"),
                       model_name_or_path=model_dir))  # fmt: skip
    with path.open(encoding="utf-8") as file:
        found = json.load(file) if whose == "alpaca_eval" else [json.loads(line) for line in file]
    said = json.dumps(found, ensure_ascii=False)
    assert said.count(json.dumps(answer, ensure_ascii=False)) == 2  # a question and its answer, or two answers
    assert set(asked) == {answer}


def test_no_file_is_read_by_pythons_rule():
    """`splitlines` ends lines where no format does."""
    folder = Path(nca_align.__file__).parent
    used = [path for path in folder.rglob("*.py") if re.search(r"\bsplitlines\(", path.read_text(encoding="utf-8"))]
    assert used == []
