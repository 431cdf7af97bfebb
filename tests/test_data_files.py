"""Files as people have them: compressed, without an ending, and in other encodings than UTF-8."""

import bz2
import csv
import gzip
import io
import json
import subprocess

import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset

from nca_align.data import load_reward_dataset, read_reward_dataset
from nca_align.data.files import kind_of, open_plain, unpacked
from nca_align.data.prompts import load_raw
from nca_align.errors import UserError

ROWS = [{"prompt": f"é{i}", "completions": ["ä", "b"], "rewards": [1.0, 0.5 * i]} for i in range(5)]
PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}


def content(kind: str) -> bytes:
    """The rows as a file of this kind."""
    if kind == "json":
        return json.dumps(ROWS, ensure_ascii=False).encode()
    if kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(file := io.BytesIO())
        return file.getvalue()
    if kind == "csv":
        writer = csv.writer(file := io.StringIO())
        writer.writerow(ROWS[0])
        writer.writerows([row["prompt"], *map(json.dumps, (row["completions"], row["rewards"]))] for row in ROWS)
        return file.getvalue().encode()
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def whole(path, **options):
    return load_reward_dataset(str(path), split="train", validation_fraction=0, **options)


class TestCompressed:
    @pytest.mark.parametrize("ending", PACK)
    @pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
    def test_every_kind_with_and_without_its_ending(self, kind, ending, tmp_path):
        for name in (f"rows.{kind}{ending}", f"rows-{kind}"):  # the second says nothing of what it is
            (tmp_path / name).write_bytes(PACK[ending](content(kind)))
            assert whole(tmp_path / name).to_list() == ROWS
            stream = whole(tmp_path / name, streaming=True)
            assert isinstance(stream, IterableDataset)
            assert list(stream) == ROWS

    def test_lines_are_streamed_without_a_copy(self, tmp_path):
        (tmp_path / "rows.jsonl.zst").write_bytes(PACK[".zst"](content("jsonl")))
        stream = whole(tmp_path / "*.zst", streaming=True)
        assert list(stream) == ROWS
        assert not (tmp_path / "cache" / "nca-align-unpacked").exists()
        assert whole(tmp_path / "*.zst").to_list() == ROWS
        assert (tmp_path / "cache" / "nca-align-unpacked").exists()

    @pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2"])
    def test_joined_files_and_other_names(self, ending, tmp_path):
        """`cat a.gz b.gz` is a file of both; the first bytes count, and not the name."""
        data, pack = content("jsonl"), PACK[ending]
        (tmp_path / "rows.jsonl").write_bytes(pack(data[:40]) + pack(data[40:]))
        assert whole(tmp_path / "rows.jsonl").to_list() == ROWS
        (tmp_path / "rows.jsonl.gz").write_bytes(data)
        assert whole(tmp_path / "rows.jsonl.gz").to_list() == ROWS

    @pytest.mark.parametrize("ending", [".gz", ".zst"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_folders_keep_their_splits(self, ending, streaming, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / f"train.jsonl{ending}").write_bytes(PACK[ending](content("jsonl")))
        (tmp_path / "data" / "test.jsonl").write_bytes(content("jsonl")[: content("jsonl").index(b"\n")])
        splits = load_reward_dataset(str(tmp_path / "data"), streaming=streaming)
        assert {name: list(split) for name, split in splits.items()} == {"train": ROWS, "test": ROWS[:1]}

    def test_a_copy_is_made_once_and_anew_for_another_file(self, tmp_path):
        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(gzip.compress(content("jsonl")))
        (first,) = unpacked([str(path)], None)
        assert unpacked([str(path)], None) == [first]
        assert whole(path)._fingerprint == whole(path)._fingerprint
        path.write_bytes(gzip.compress(content("jsonl")[: content("jsonl").index(b"\n")]))
        assert unpacked([str(path)], None) != [first]
        assert whole(path).to_list() == ROWS[:1]

    def test_a_copy_that_has_no_place(self, tmp_path):
        (tmp_path / "cache").write_text("no folder")
        (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(content("jsonl")))
        with pytest.raises(UserError, match=r"can't be unpacked in \S+cache\S+: .*name another folder by `HF_DATASETS"):
            unpacked([str(tmp_path / "rows.jsonl.gz")], None)

    @pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2"])
    @pytest.mark.parametrize("kind", ["jsonl", "csv"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_one_that_is_cut(self, ending, kind, streaming, tmp_path):
        path = tmp_path / f"rows.{kind}{ending}"
        path.write_bytes(PACK[ending](content(kind) * 5)[:60])
        with pytest.raises(UserError, match=rf"rows.{kind}{ending} can't be unpacked as .*; mend the file"):
            list(whole(path, streaming=streaming))

    def test_unreadable_lines_are_named_by_the_file_itself_and_dropped(self, tmp_path):
        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(gzip.compress(content("jsonl") + b"{\n"))
        with pytest.raises(UserError, match=rf"row 5 of {path} is not readable JSON"):
            whole(path)
        data = read_reward_dataset(str(path), on_invalid="drop")
        assert data.reports["train"].dropped == {"unreadable line": 1}
        assert data.dataset["train"].to_list() == ROWS

    def test_prompts(self, tmp_path):
        (tmp_path / "prompts.txt.gz").write_bytes(gzip.compress("Why?\nHöw?\n".encode()))
        assert load_raw(str(tmp_path / "prompts.txt.gz"))["prompt"][:] == ["Why?", "Höw?"]


class TestWithoutAnEnding:
    def test_kinds(self, tmp_path):
        for kind, found in (("jsonl", "json"), ("json", "json"), ("csv", "csv"), ("parquet", "parquet")):
            (tmp_path / "rows").write_bytes(content(kind))
            assert kind_of(str(tmp_path / "rows")) == found
            (tmp_path / "rows.bak").write_bytes(content(kind))
            assert kind_of(str(tmp_path / "rows.bak")) == (None if kind == "csv" else found)
        for text in (b"", b"Hello, you\n"[:5], b"\x00\x01,\x02"):
            (tmp_path / "rows").write_bytes(text)
            assert kind_of(str(tmp_path / "rows")) is None
            said = "which holds rows; it must be files of one kind" if text else "which is empty; it must have"
            with pytest.raises(UserError, match=said):
                whole(tmp_path / "rows")

    def test_a_folder_of_parts(self, tmp_path):
        (tmp_path / "data").mkdir()
        lines = content("jsonl").splitlines(keepends=True)
        (tmp_path / "data" / "part-00000").write_bytes(b"".join(lines[:2]))
        (tmp_path / "data" / "part-00001").write_bytes(b"".join(lines[2:]))
        (tmp_path / "data" / "_SUCCESS").touch()
        assert whole(tmp_path / "data").to_list() == ROWS
        assert list(whole(tmp_path / "data", streaming=True)) == ROWS
        (tmp_path / "data" / "README").write_text("What this is, and why.")  # where files have endings, others are none
        (tmp_path / "data" / "rows.jsonl").write_bytes(lines[0])
        assert whole(tmp_path / "data").to_list() == ROWS[:1]


def follow(said: UserError, converted) -> None:
    """Run the command in an error's back-ticks, after which the rows are there."""
    subprocess.run(str(said).split("`")[1], shell=True, check=True)
    assert whole(converted).to_list() == ROWS


class TestEncodings:
    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    @pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows", "rows.jsonl.gz"])
    def test_utf_16(self, name, encoding, tmp_path):
        kind = name.split(".")[1] if "." in name else "jsonl"
        data = content(kind).decode().encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        for options in ({}, {"streaming": True}, {"on_invalid": "drop"}):
            with pytest.raises(
                UserError, match=rf"^{tmp_path / name} is UTF-(16|32) text; save it as UTF-8 by"
            ) as said:
                list(whole(tmp_path / name, **options))
        follow(said.value, tmp_path / f"utf8-{name.removesuffix('.gz')}")

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        ("name", "where"),
        [
            (
                "rows.jsonl",
                r"row 0 of .*rows.jsonl is not UTF-8 text \(byte 0xe9 at offset 12\). Save it as UTF-8",
            ),
            ("rows.json", r"rows.json is not UTF-8 text \(byte 0xe9 at offset 13\). Save it as UTF-8"),
            ("rows.csv", r"line 2 of .*rows.csv is not UTF-8 text \(byte 0xe9 at offset 0\). Save it as UTF-8"),
        ],
    )
    def test_latin_1(self, name, where, streaming, tmp_path):
        (tmp_path / name).write_bytes(content(name.split(".")[1]).decode().encode("latin-1"))
        with pytest.raises(UserError, match=where) as said:
            list(whole(tmp_path / name, streaming=streaming))
        follow(said.value, tmp_path / f"utf8-{name}")

    @pytest.mark.parametrize("streaming", [False, True])
    def test_one_byte_far_into_a_csv(self, streaming, tmp_path):
        rows = b"prompt,chosen,rejected\n" + b"q,a,b\n" * 20_000 + b"caf\xe9,a,b\n"
        (tmp_path / "rows.csv").write_bytes(rows)
        with pytest.raises(UserError, match=r"line 20002 of .*rows.csv is not UTF-8 text \(byte 0xe9 at offset 3\)"):
            whole(tmp_path / "rows.csv", streaming=streaming)

    @pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
    def test_a_mark_of_utf_8_is_no_text(self, kind, tmp_path):
        for name in (f"rows.{kind}", f"rows-{kind}"):
            (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content(kind))
            assert whole(tmp_path / name).to_list() == ROWS
            assert list(whole(tmp_path / name, streaming=True)) == ROWS

    def test_prompts(self, tmp_path):
        path = tmp_path / "prompts.txt"
        path.write_bytes("Why?\nHöw?\n".encode("utf-16"))
        with pytest.raises(UserError, match=r"prompts.txt is UTF-16 text; save it as UTF-8"):
            load_raw(str(path))
        path.write_bytes("Why?\nHöw?\n".encode("latin-1"))
        with pytest.raises(UserError, match=r"line 2 of .*prompts.txt is not UTF-8 text \(byte 0xf6 at offset 1\)"):
            load_raw(str(path))

    def test_plain_bytes(self, tmp_path):
        for ending, pack in PACK.items():
            (tmp_path / f"x{ending}").write_bytes(pack(b"a\nb\n"))
            with open_plain(tmp_path / f"x{ending}") as lines:
                assert list(lines) == [b"a\n", b"b\n"]


class TestTables:
    @pytest.mark.parametrize("separator", [";", "\t", ","])
    @pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
    def test_separators(self, separator, name, tmp_path):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.writer(file, delimiter=separator)
            writer.writerow(ROWS[0])
            writer.writerows([row["prompt"], *map(json.dumps, (row["completions"], row["rewards"]))] for row in ROWS)
        assert whole(tmp_path / name).to_list() == ROWS
        assert list(whole(tmp_path / name, streaming=True)) == ROWS

    def test_pythons_lists(self, tmp_path):
        (tmp_path / "rows.csv").write_text("""prompt,completions,rewards\nq,"['a', 'b']","[1, 2]"\n""")
        with pytest.raises(
            UserError, match=r"`completions` is not readable JSON list .*Parquet, or lists by `json.dumps`"
        ):
            whole(tmp_path / "rows.csv")


class TestEmpty:
    @pytest.mark.parametrize(
        "name", ["empty.jsonl.gz", "empty.csv.gz", "empty.jsonl", "empty", "empty.json.zst", "empty.csv"]
    )
    @pytest.mark.parametrize("text", [b"", b"\n"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_is_told_as_such(self, name, text, streaming, tmp_path):
        (tmp_path / name).write_bytes(PACK[name[name.rindex(".") :] if name[-3:] in (".gz", "zst") else ""](text))
        with pytest.raises(UserError, match=r"(which|`train`) is empty; it must have at least one row"):
            list(whole(tmp_path / name, streaming=streaming))
