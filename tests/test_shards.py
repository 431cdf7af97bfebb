"""Work in shards: interrupted anywhere and started again, the same bytes, no row lost or doubled."""

import json
import os
import shutil
import threading
from datetime import date, datetime, time
from decimal import Decimal

import pytest
from datasets import Dataset, Features, List, Value

from nca_align.errors import UserError
from nca_align.store import shards
from nca_align.store.fingerprints import data_fingerprint, weights_fingerprint
from nca_align.store.provenance import read_provenance
from nca_align.store.shards import Shard, run_sharded

FEATURES = Features({"prompt": Value("string"), "values": List(Value("int64"))})
STEP = {"command": "sample", "config": {"temperature": 1.0, "stop": ["x"]}, "about": {"model": "m"}}
DATASET = Dataset.from_dict({"prompt": [f"é {i}" for i in range(10)]})


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def run(output, failing=(), step=STEP, started=None, **kwargs):
    def start():
        if started is not None:
            started.append(True)
        return work

    def work(shard, first_row, rows, advance):
        result = Shard([], failed={i: "broken" for i in range(first_row, first_row + len(rows)) if i in failing})
        for i, row in enumerate(rows, first_row):
            if i not in failing:
                result.rows.append({"prompt": row["prompt"], "values": [] if i == 4 else [i, shard]})
                result.counts["values"] += 1
        advance(len(rows))
        return result

    return run_sharded(str(output), DATASET, FEATURES, start, step, shard_size=3, **kwargs)


def read(path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return Dataset.from_parquet(str(path), keep_in_memory=True).to_list()


@pytest.fixture(params=["out.parquet", "out.jsonl"])
def output(request, tmp_path):
    return tmp_path / request.param


def test_rows_counts_and_provenance(output):
    counts = run(output, history=[{"command": "before"}])
    assert counts == {"failed": 0, "rows": 10, "values": 10}
    assert [row["prompt"] for row in read(output)] == DATASET["prompt"][:]
    assert [row["values"] for row in read(output)] == [[] if i == 4 else [i, i // 3] for i in range(10)]
    assert read_provenance(output) == [{"command": "before"}, {**STEP, "counts": counts}]
    assert not output.with_name(output.name + ".parts").exists()


def test_a_kill_at_every_rename_changes_nothing(output, tmp_path, monkeypatch):
    whole = tmp_path / f"whole{output.suffix}"
    run(whole)
    replace = os.replace
    for kill_at in range(100):
        for after in (False, True):  # the kill comes just before the rename, or just after it
            left = [kill_at]

            def killing(source, target, left=left, after=after):
                left[0] -= 1
                if left[0] < 0 and not after:
                    raise Killed
                replace(source, target)
                if left[0] < 0:
                    raise Killed

            monkeypatch.setattr(os, "replace", killing)
            try:
                run(output)
                finished = True
            except Killed:
                finished = False
            monkeypatch.setattr(os, "replace", replace)
            run(output)
            assert output.read_bytes() == whole.read_bytes()
            assert sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(".parts")) == []
            for path in tmp_path.glob("out.*"):
                path.unlink()
        if finished:
            break
    assert kill_at >= 10  # a configuration, four shards with their counts, and the joined file


def test_a_kill_before_the_folder_goes(output, monkeypatch):
    def killing(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killing)
        with pytest.raises(Killed):
            run(output)
    content, started = output.read_bytes(), []
    run(output, started=started)
    assert output.read_bytes() == content
    assert not started
    assert not output.with_name(output.name + ".parts").exists()


def test_finished_work_loads_nothing(output):
    first = run(output)
    started = []
    assert run(output, started=started) == first
    assert not started


def test_failed_rows_stop_the_run_once_the_others_are_kept(output, tmp_path):
    with pytest.raises(UserError, match=r"row 1 \(and 1 more: 7\): broken\. The other 8 rows are done and kept in "):
        run(output, failing=(1, 7))
    assert not output.exists()
    run(output)  # mended
    run(tmp_path / f"whole{output.suffix}")
    assert output.read_bytes() == (tmp_path / f"whole{output.suffix}").read_bytes()


def test_failed_rows_can_be_dropped(output):
    with pytest.raises(UserError, match=r"row 1: broken\. The other 9 rows"):
        run(output, failing=(1,))
    started = []
    assert run(output, failing=(1,), started=started, drop_failed=True)["failed"] == 1
    assert not started
    assert [row["prompt"] for row in read(output)] == [f"é {i}" for i in range(10) if i != 1]


OTHER = {**STEP, "config": {"temperature": 0.5, "stop": ["x"]}}


def test_another_configuration_is_refused_with_the_difference(output):
    run(output)
    content = output.read_bytes()
    message = "is there already, of another configuration: `temperature` 1.0 there and 0.5 here; choose another"
    with pytest.raises(UserError, match=message):
        run(output, step=OTHER)
    with pytest.raises(UserError, match="made by `sample` and not `score`"):
        run(output, step={**STEP, "command": "score"})
    assert output.read_bytes() == content


def test_an_unfinished_run_of_another_configuration_is_refused(output):
    with pytest.raises(UserError):
        run(output, failing=(1,))
    with pytest.raises(UserError, match=r"parts, an unfinished run, is there already, .*`temperature` 1.0 there"):
        run(output, step=OTHER)


def test_a_run_that_kept_nothing_may_be_corrected(output):
    def start():
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        run_sharded(str(output), DATASET, FEATURES, start, STEP, 64)
    assert run(output, step=OTHER)["rows"] == 10


def test_what_came_before_the_first_shard_is_kept_for_the_same_work_alone(output, monkeypatch):
    """Of several at once others may be done; where the first shard refuses the work, other options may follow."""

    pause = threading.Event()

    def start(refuses):
        def work(shard, first_row, rows, advance):
            advance(0)
            made.append(shard)
            if shard == 0 and refuses:
                parts = output.with_name(output.name + ".parts")
                while len(list(parts.glob(f"0*{output.suffix}"))) < 3:
                    pause.wait(0.01)
                raise UserError("of no use")
            return Shard([{"prompt": row["prompt"], "values": [shard]} for row in rows])

        return work

    for step, expected in ((STEP, [0]), (OTHER, [0, 1, 2, 3])):
        made: list[int] = []
        with pytest.raises(UserError, match="of no use"):
            run_sharded(str(output), DATASET, FEATURES, lambda: start(True), STEP, 3, at_once=4)
        made.clear()
        run_sharded(str(output), DATASET, FEATURES, lambda: start(False), step, 3)
        assert made == expected
        output.unlink()


def test_a_file_of_unknown_origin_is_refused(tmp_path):
    (tmp_path / "out.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="doesn't say what made it"):
        run(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "{}\n"


def test_an_unknown_ending_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"`output` is '.*out.csv'; it must end in .parquet or .jsonl"):
        run(tmp_path / "out.csv")


def test_a_file_without_rows_is_refused(output):
    with pytest.raises(UserError, match=r"none of the 10 rows is left for .*'failed': 10"):
        run(output, failing=range(10), drop_failed=True)
    assert not output.exists()


def with_sources(code: str) -> dict:
    return {**STEP, "sources": {"my_rewards:length": code}}


class TestEditedCode:
    def kill(self, output, monkeypatch, after=3, **kwargs):
        """A run that is killed once it has renamed `after` files: the configuration, then two a shard."""
        replace, left = os.replace, [after]

        def killing(source, target):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killing)
            with pytest.raises(Killed):
                run(output, **kwargs)

    def test_half_of_a_run_is_not_gone_on_with(self, output, monkeypatch):
        self.kill(output, monkeypatch, step=with_sources("old"))
        message = r"the code of `my_rewards:length` changed since .*out\S+.parts was begun, and 1 of "
        with pytest.raises(
            UserError, match=message + r"its shards are done. To go on, delete .*parts to make all rows anew"
        ):
            run(output, step=with_sources("new"))
        assert run(output, step=with_sources("old"))["rows"] == 10  # the change undone

    def test_what_kept_no_shard_is_begun_anew(self, output, monkeypatch):
        self.kill(output, monkeypatch, after=2, step=with_sources("old"))
        assert output.with_name(output.name + ".parts").exists()
        run(output, step=with_sources("new"))
        assert read_provenance(output)[-1]["sources"] == {"my_rewards:length": "new"}

    def test_failed_rows_may_be_mended_and_it_is_said_what_stays(self, output, capsys):
        with pytest.raises(UserError, match="Mend it and run the same command again"):
            run(output, failing=(1,), step=with_sources("old"))
        assert run(output, step=with_sources("new"))["rows"] == 10
        said = capsys.readouterr().err
        assert "the code of `my_rewards:length` changed; 3 shards without failed rows stay as they are: delete " in said

    def test_failed_rows_that_are_dropped_are_no_reason_to_go_on(self, output):
        with pytest.raises(UserError):
            run(output, failing=(1,), step=with_sources("old"))
        with pytest.raises(UserError, match="4 of its shards are done"):
            run(output, step=with_sources("new"), drop_failed=True)

    def test_a_finished_output_is_not_taken_for_the_new_codes(self, output):
        counts = run(output, step=with_sources("old"))
        content = output.read_bytes()
        message = (
            "is complete, but the code of `my_rewards:length` changed since it was made. Delete it to make it anew"
        )
        with pytest.raises(UserError, match=message):
            run(output, step=with_sources("new"))
        assert output.read_bytes() == content
        assert run(output, step=with_sources("old")) == counts

    def test_an_output_that_does_not_say_by_which_code_is_left_alone(self, output):
        counts = run(output)
        assert run(output, step=with_sources("new")) == counts


class TestOneAtATime:
    def test_the_second_within_the_work_of_the_first(self, output):
        def start():
            with pytest.raises(UserError, match=f"`output` {output} belongs to another job"):
                run(output)
            raise UserError("seen")

        with pytest.raises(UserError, match="seen"):
            run_sharded(str(output), DATASET, FEATURES, start, STEP, 64)

    def test_a_finished_output_where_nothing_can_be_written(self, output, monkeypatch):
        counts = run(output)
        monkeypatch.setattr(shards, "own_file", lambda *args: pytest.fail("wrote an owner's file"))
        assert run(output) == counts

    def test_a_place_where_nothing_can_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        for place in (tmp_path / "file" / "out.jsonl", "/proc/nope/out.jsonl"):
            with pytest.raises(UserError, match=r"`output` .*out.jsonl can't be written: .+; choose a place"):
                run(place)


MOMENTS = {
    "at": datetime(2024, 1, 2, 3, 4, 5), "on": date(2024, 1, 2), "hour": time(3, 4, 5),
    "many": [datetime(2024, 1, 2), None], "in": {"at": datetime(2024, 1, 2, 3)},
}  # fmt: skip


def copied(output, rows, features):
    """A run that writes `rows` as they are."""
    data = Dataset.from_list(rows, features=features)

    def start():
        return lambda shard, first_row, rows, advance: Shard(rows)

    run_sharded(str(output), data, features, start, STEP, 64)


def test_dates_and_times_come_back(output):
    """Text in ISO 8601 in JSONL, which reading takes for a moment as it takes any such text."""
    features = Features({
        "at": Value("timestamp[s]"), "on": Value("date32"), "hour": Value("time32[s]"),
        "many": List(Value("timestamp[us]")), "in": {"at": Value("timestamp[ms]")},
    })  # fmt: skip
    copied(output, [MOMENTS, MOMENTS], features)
    if output.suffix == ".parquet":
        assert read(output) == [MOMENTS, MOMENTS]
        return
    assert read(output)[0] == {
        "at": "2024-01-02T03:04:05", "on": "2024-01-02", "hour": "03:04:05", "many": ["2024-01-02T00:00:00", None],
        "in": {"at": "2024-01-02T03:00:00"},
    }  # fmt: skip
    (row, _) = Dataset.from_json(str(output), keep_in_memory=True).to_list()
    assert row == MOMENTS | {"on": datetime(2024, 1, 2), "hour": "03:04:05"}
    again = output.with_name("again.jsonl")
    copied(again, [row], Dataset.from_list([row]).features)
    assert read(again)[0] == read(output)[0] | {"on": "2024-01-02T00:00:00"}


@pytest.mark.parametrize(
    ("kind", "value"),
    [(Value("binary"), b"x"), (List(Value("binary")), [b"x"]), ({"in": Value("large_binary")}, {"in": b"x"}),
     (Value("decimal128(5, 2)"), Decimal("1.25"))],
)  # fmt: skip
def test_what_json_does_not_have_is_refused_before_the_work(tmp_path, kind, value):
    features = Features({"prompt": Value("string"), "odd": kind})
    with pytest.raises(
        UserError, match=r"column `odd` is of type .*, which JSON doesn't have; make `output` end in .parquet"
    ):
        copied(tmp_path / "out.jsonl", [{"prompt": "a", "odd": value}], features)
    copied(tmp_path / "out.parquet", [{"prompt": "a", "odd": value}], features)
    assert read(tmp_path / "out.parquet") == [{"prompt": "a", "odd": value}]


def test_weights_fingerprint_is_of_the_content(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(3_000_000))
        (folder / "config.json").write_text("{}")
    os.utime(second / "config.json", (1, 1))
    (second / "README.md").write_text("a card")
    assert weights_fingerprint(str(first)) == weights_fingerprint(str(second))
    (second / "model.safetensors").write_bytes(bytes(2_999_999) + b"x")
    assert weights_fingerprint(str(first)) != weights_fingerprint(str(second))
    assert weights_fingerprint("org/model", "v1") == "org/model@v1"
    assert weights_fingerprint("org/model") == "org/model"
    assert weights_fingerprint(None) is None


def test_data_fingerprint_is_of_the_content():
    rows = DATASET.to_list()
    assert data_fingerprint(DATASET) == data_fingerprint(rows)
    assert data_fingerprint(rows) != data_fingerprint(rows[::-1])
