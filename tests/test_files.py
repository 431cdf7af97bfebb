"""Files are whole or not there, and an output that can't be written is refused before the work that is for it."""

import re
from pathlib import Path

import pytest

from nca_align.commands.evaluate import generate_and_score, implicit, judges
from nca_align.commands.evaluate.command import main
from nca_align.errors import UserError
from nca_align.store.files import check_writable, new_folder, replacing


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _fail_in_the_middle(file, error) -> None:
    file.write("ne")
    raise error


class TestReplacing:
    def test_the_file_is_the_old_one_until_the_new_one_is_whole(self, tmp_path):
        path = tmp_path / "t.txt"
        path.write_text("old")
        with replacing(path) as file:
            file.write("new")
            file.flush()
            assert path.read_text() == "old"
        assert path.read_text() == "new"
        assert list(tmp_path.iterdir()) == [path]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_what_ends_half_way_leaves_nothing(self, error, tmp_path):
        path = tmp_path / "t.txt"
        path.write_text("old")
        with pytest.raises(error), replacing(path) as file:
            _fail_in_the_middle(file, error)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_nor_does_what_a_folder_is_in_the_place_of(self, tmp_path):
        (tmp_path / "t").mkdir()
        with pytest.raises(OSError), replacing(tmp_path / "t", "wb") as file:
            file.write(b"new")
        assert [path.name for path in tmp_path.iterdir()] == ["t"]


class TestNewFolder:
    def test_it_has_its_name_once_it_is_whole(self, tmp_path):
        path = tmp_path / "runs" / "model"
        with new_folder(path) as new:
            (new / "a").write_text("a")
            assert not path.exists()
        assert (path / "a").read_text() == "a"
        assert path.stat().st_mode & 0o777 == 0o755
        assert list(path.parent.iterdir()) == [path]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_what_ends_half_way_leaves_nothing(self, error, tmp_path):
        with pytest.raises(error), new_folder(tmp_path / "model") as new, open(new / "a", "w") as file:
            _fail_in_the_middle(file, error)
        assert list(tmp_path.iterdir()) == []

    def test_another_that_was_first_stays(self, tmp_path):
        first = tmp_path / "model" / "a"
        with pytest.raises(OSError), new_folder(first.parent):
            write(first, "first")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert first.read_text() == "first"


PLACES = {"a folder": ("folder", "Is a directory"), "below a file": ("file/x/t.json", "(File exists|Not a directory)")}


@pytest.fixture(params=PLACES)
def place(request, tmp_path) -> tuple[str, str]:
    """A path that can't be written, and what the system says of it."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    name, said = PLACES[request.param]
    return str(tmp_path / name), said


def test_what_can_not_be_written(place):
    path, said = place
    with pytest.raises(UserError, match=rf"^`figures` {re.escape(path)} can't be written: {said}; choose a place"):
        check_writable(Path(path), "figures")


def test_what_can_be_written_is_left_as_it_is(tmp_path):
    (tmp_path / "t.json").write_text("old")
    check_writable(tmp_path / "t.json")
    check_writable(tmp_path / "new" / "t.json")
    assert (tmp_path / "t.json").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "t.json"]
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("key", ["output", "token_scores"])
def test_implicit_looks_first(key, place, monkeypatch, capsys):
    monkeypatch.setattr(implicit, "load_rows", lambda options: pytest.fail("worked before it looked"))
    path, said = place
    assert main(["--implicit", "--dataset_name", "x", "--model_name_or_path", "m", f"--{key}", path]) == 2
    assert re.search(rf"error: `{key}` {re.escape(path)} can't be written: {said}; ", capsys.readouterr().err)


def test_scorer_looks_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate_and_score, "sample", lambda options: pytest.fail("worked before it looked"))
    (tmp_path / "one.jsonl").write_text("")
    flags = ["--scorer", "x", "--dataset_name", "x", "--model_name_or_path", "m", "--reference", "m"]
    for path in (tmp_path / "one.jsonl", tmp_path / "one.jsonl" / "below"):
        assert main([*flags, "--output", str(path)]) == 2
        said = rf"error: `output` {re.escape(str(path))} can't be written: (File exists|Not a directory); "
        assert re.search(said, capsys.readouterr().err)


def test_alpaca_evals_array_looks_first(model_dir, tmp_path, monkeypatch, capsys):
    """The answers go to a file of lines beside it, which could be written."""
    monkeypatch.setattr(judges, "run_sharded", lambda *args, **kw: pytest.fail("worked before it looked"))
    (tmp_path / "questions.jsonl").write_text('{"instruction": "Hi"}\n')
    (tmp_path / "answers.json").mkdir()
    flags = ["--judge", "alpaca_eval", "--dataset_name", str(tmp_path / "questions.jsonl")]
    assert main([*flags, "--model_name_or_path", model_dir, "--output", str(tmp_path / "answers.json")]) == 2
    assert f"`output` {tmp_path}/answers.json can't be written: Is a directory; " in capsys.readouterr().err
