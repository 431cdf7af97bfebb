"""Columns by other names: mapped wherever data is read, guessed where nothing is said, and refused if wrong."""

import csv
import json
import shlex

import pytest
from datasets import Dataset, IterableDataset

from conftest import reward_rows
from nca_align.commands.compare.grid import expand
from nca_align.commands.compare.splits import read_splits
from nca_align.commands.evaluate.generate_and_score import GenerationOptions, evaluate_generations
from nca_align.commands.evaluate.implicit import ImplicitOptions, load_rows
from nca_align.commands.inspect.command import main as inspect
from nca_align.commands.sample.command import sample
from nca_align.commands.sample.options import SampleOptions
from nca_align.commands.score import ScoreOptions, score
from nca_align.commands.train.command import main as train
from nca_align.data import DataOptions, load_reward_dataset, to_reward_dataset
from nca_align.data.column_guesses import guess_columns
from nca_align.data.columns import _RANKED, _TARGETS, parse_columns
from nca_align.data.formats import FORMATS
from nca_align.data.prompts import load_completions, load_prompts
from nca_align.errors import UserError
from nca_align.options import parse
from nca_align.store.fingerprints import data_fingerprint
from nca_align.store.provenance import read_provenance
from test_data_formats import EXAMPLES
from test_sampling import read
from test_train import flags

ASKED = "Why is the sky blue, and not green?"
OWN = [{"prompt": f"{ASKED} {i}", "completions": ["Air.", "Magic!"], "rewards": [1.0, 0.5 * i]} for i in range(4)]
# How the same rows may stand, with what maps them
LAYOUTS = {
    "other names": (
        lambda row: {"question": row["prompt"], "answers": row["completions"], "scores": row["rewards"]},
        "prompt=question completions=answers rewards=scores",
    ),
    "more columns": (
        lambda row: {
            "id": "7", "user_query": row["prompt"], "models": ["m", "n"], "lengths": [4, 6],
            "modelResponses": row["completions"], "reward_model_scores": row["rewards"],
        },
        "prompt=user_query completions=modelResponses rewards=reward_model_scores",
    ),
    "list of objects": (
        lambda row: {
            "question": row["prompt"],
            "answers": [
                {"text": text, "score": reward, "model": "m"}
                for text, reward in zip(row["completions"], row["rewards"], strict=True)
            ],
        },
        "prompt=question completions=answers.text rewards=answers.score",
    ),
    "an object of lists": (
        lambda row: {"question": row["prompt"], "answers": {"text": row["completions"], "score": row["rewards"]}},
        "prompt=question completions=answers.text rewards=answers.score",
    ),
    "the target's name in the source": (
        lambda row: {
            "prompt": {"text": row["prompt"]},
            "completions": [
                {"text": text, "rating": reward}
                for text, reward in zip(row["completions"], row["rewards"], strict=True)
            ],
        },
        "prompt=prompt.text completions=completions.text rewards=completions.rating",
    ),
    "a column each": (
        lambda row: {
            "query": row["prompt"], "answer_a": row["completions"][0], "answer_b": row["completions"][1],
            "score_a": int(row["rewards"][0]), "score_b": row["rewards"][1],
        },
        "prompt=query completions=answer_a,answer_b rewards=score_a,score_b",
    ),
    "by places": (
        lambda row: {"input": [ASKED, row["prompt"]], "outputs": row["completions"], "grades": row["rewards"]},
        "prompt=input.1 completions=outputs rewards=grades",
    ),
    "a swap": (
        lambda row: {"prompt": row["completions"], "completions": row["prompt"], "rewards": row["rewards"]},
        "prompt=completions completions=prompt",
    ),
    "dots in a name": (
        lambda row: {"data.prompt": row["prompt"], "a,b": row["completions"], "r": row["rewards"]},
        "prompt=data.prompt completions=a,b rewards=r",
    ),
}  # fmt: skip
GUESSED = [name for name in LAYOUTS if name not in ("by places", "a swap", "dots in a name")]


def laid_out(name: str) -> tuple[list[dict], str]:
    make, pairs = LAYOUTS[name]
    return list(map(make, OWN)), pairs


def own(dataset) -> list[dict]:
    return [{name: row[name] for name in OWN[0]} for row in dataset]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class TestMapping:
    @pytest.mark.parametrize("name", LAYOUTS)
    def test_all_layouts_become_the_same_rows_in_files_and_streams(self, name, tmp_path):
        rows, pairs = laid_out(name)
        path = write(tmp_path / "rows.jsonl", rows)
        Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
        with (tmp_path / "rows.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow({key: v if isinstance(v, str) else json.dumps(v) for key, v in row.items()})
        for source in (path, tmp_path / "rows.parquet", tmp_path / "rows.csv"):
            for streaming in (False, True):
                data = load_reward_dataset(
                    str(source), split="train", validation_fraction=0, columns=pairs.split(), streaming=streaming
                )
                assert isinstance(data, IterableDataset) == streaming
                assert own(data) == OWN

    def test_what_is_not_mapped_stays(self):
        rows, pairs = laid_out("more columns")
        (row, *_) = to_reward_dataset(Dataset.from_list(rows), DataOptions(columns=pairs.split()))
        assert row == OWN[0] | {"id": "7", "models": ["m", "n"], "lengths": [4, 6]}
        rows, pairs = laid_out("list of objects")
        (row, *_) = to_reward_dataset(Dataset.from_list(rows), DataOptions(columns=pairs.split()))
        assert row["answers"] == rows[0]["answers"]  # a part was taken, and it may hold more
        assert "question" not in row

    def test_a_column_of_the_targets_name_gives_way(self):
        rows = [row | {"question": row["prompt"], "prompt": "another"} for row in OWN]
        assert to_reward_dataset(Dataset.from_list(rows), DataOptions(columns=["prompt=question"])).to_list() == OWN

    @pytest.mark.parametrize("name", EXAMPLES)
    def test_every_format_can_be_reached(self, name):
        """All its columns by other names, as far as a format reads them."""
        dataset = Dataset.from_list(EXAMPLES[name])
        expected = to_reward_dataset(dataset, DataOptions(min_completions=1)).to_list()
        known = [column for column in dataset.column_names if column in _TARGETS or _RANKED.fullmatch(column)]
        renamed = dataset.rename_columns({column: f"my {column}" for column in known})
        columns = {column: f"my {column}" for column in known}
        mapped = to_reward_dataset(renamed, DataOptions(columns=columns, min_completions=1))
        assert known
        assert mapped.to_list() == expected

    def test_every_column_that_tells_a_format_is_a_target(self):
        for fmt in FORMATS.values():
            for column in fmt.needs.removesuffix(", a score column").replace(" or ", ", ").split(", "):
                assert column in _TARGETS or _RANKED.fullmatch(column)

    def test_missing_parts_are_missing_values(self):
        rows = [
            {"prompt": "q", "answers": [{"text": "a", "score": 1.0}, {"text": "b"}]},
            {"prompt": "q", "answers": [{"text": "a", "score": 1.0}, {"text": "b", "score": 2.0}]},
        ]
        columns = ["completions=answers.text", "rewards=answers.score"]
        with pytest.raises(UserError, match=r"row 0: `rewards\[1\]` is null, a missing score"):
            to_reward_dataset(Dataset.from_list(rows), DataOptions(columns=columns))

    @pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_an_answer_that_is_missing_with_its_score_is_not_there(self, kind, streaming, tmp_path):
        rows = [
            {"q": ASKED, "a0": "a", "s0": 1.0, "a1": "b", "s1": 2.0, "a2": "c", "s2": 0.0},
            {"q": ASKED, "a0": "a", "s0": 1.0, "a1": None, "s1": None, "a2": "c", "s2": 0.0},
            {"q": ASKED, "a0": None, "s0": None, "a1": "b", "s1": 2.0, "a2": "c", "s2": 0.5},
        ]
        columns = ["prompt=q", "completions=a0,a1,a2", "rewards=s0,s1,s2"]
        taken = {"columns": columns, "streaming": streaming, "split": "train", "validation_fraction": 0}
        path, wanted = tmp_path / f"rows.{kind}", [["a", "b", "c"], ["a", "c"], ["b", "c"]]

        def written(rows) -> str:
            if kind == "jsonl":
                return write(path, rows)
            table = Dataset.from_list(rows)
            table.to_parquet(path) if kind == "parquet" else table.to_csv(path)
            return str(path)

        data = list(load_reward_dataset(written(rows), **taken))
        assert [row["completions"] for row in data] == wanted
        assert [row["rewards"] for row in data] == [[1.0, 2.0, 0.0], [1.0, 0.0], [2.0, 0.5]]
        # To be scored, answers alone may be missing
        answers = [{name: row[name] for name in ("q", "a0", "a1", "a2")} for row in rows]
        found = load_completions(written(answers), None, "train", columns[:2])
        assert found["completions"][:] == wanted
        # One without the other is told by both names, counted from the first column
        for name, said in (
            (
                "a2",
                r"row 2: `completions\[2\]` is .*, an empty .* must have content, as `rewards\[2\]` is '?0.5",
            ),
            ("s2", r"row 2: `rewards\[2\]` is .*, a missing score; every .*, and `completions\[2\]` is there"),
        ):
            with pytest.raises(UserError, match=said):
                list(load_reward_dataset(written([*rows[:2], rows[2] | {name: None}]), **taken))

    def test_in_processes(self, tmp_path):
        rows, pairs = laid_out("list of objects")
        path = write(tmp_path / "rows.jsonl", rows)
        data = load_reward_dataset(path, split="train", validation_fraction=0, columns=pairs.split(), num_proc=2)
        assert own(data) == OWN


class TestOption:
    def test_flags_yaml_and_python_say_the_same(self, tmp_path):
        wanted = ["prompt=question", "completions=answer_a,answer_b"]
        (tmp_path / "o.yaml").write_text("columns:\n  prompt: question\n  completions: [answer_a, answer_b]\n")
        (tmp_path / "l.yaml").write_text(f"columns: [{wanted[0]}, '{wanted[1]}']\n")
        for argv in (
            ["--columns", *wanted],
            ["--columns", wanted[0], "--columns", wanted[1]],
            ["--config", str(tmp_path / "o.yaml")],
            ["--config", str(tmp_path / "l.yaml")],
        ):
            (options,) = parse([DataOptions], argv, "train")
            assert options.columns == wanted
        (options,) = parse([DataOptions], ["--config", str(tmp_path / "o.yaml"), "--columns", "rewards=r"], "train")
        assert options.columns == ["rewards=r"]  # a flag overrides the file
        assert DataOptions(columns={"prompt": "question", "completions": ["answer_a", "answer_b"]}).columns == wanted
        assert DataOptions(columns="prompt=question").columns == wanted[:1]
        assert DataOptions(columns=None).columns == []

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["question"], r"`columns` is \['question'\]; it must name a column for each target, as in"),
            (["prompt="], r"`columns` is \['prompt='\]; it must name a column for each target"),
            ({"prompt": None}, r"it must name a column for each target"),
            (7, r"`columns` is 7; it must name"),
            (["promt=q"], r"`columns` fills `promt`, which no format reads \(did you mean `prompt`\?\); it must"),
            (["prompt=a", "prompt=b"], r"`columns` names `prompt` twice; it must name each column once"),
            (["chosen=a", "rejected=a"], r"`columns` names `a` twice"),
        ],
    )  # fmt: skip
    def test_mistakes(self, given, message):
        with pytest.raises(UserError, match=message) as caught:
            parse_columns(given)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        ("column", "message"),
        [
            ("rewards=score", r"`rewards` from `score`, which `train` doesn't have \(did you mean `scores`"),
            ("rewards=answers.grade", r"from `answers.grade`, which `train` doesn't have"),
            ("rewards=scores.0.x", r"from `scores.0.x`, which `train` doesn't have"),
            ("rewards=scores,more", r"`columns` takes `rewards` from `more`, which `train` doesn't have"),
        ],
    )  # fmt: skip
    def test_a_source_that_is_not_there(self, column, message, streaming, tmp_path):
        path = write(tmp_path / "rows.jsonl", laid_out("other names")[0])
        with pytest.raises(UserError, match=message) as caught:
            load_reward_dataset(path, columns=[column], streaming=streaming)
        assert str(caught.value).endswith("it has question, answers, scores")


class TestGuess:
    @pytest.mark.parametrize("name", GUESSED)
    def test_what_the_error_says_can_be_copied(self, name):
        rows, pairs = laid_out(name)
        with pytest.raises(UserError) as caught:
            to_reward_dataset(Dataset.from_list(rows))
        said = str(caught.value).partition("--columns ")[2].partition("`")[0]
        assert set(said.split()) == set(pairs.split())
        assert own(to_reward_dataset(Dataset.from_list(rows), DataOptions(columns=shlex.split(said)))) == OWN

    @pytest.mark.parametrize(
        ("row", "flags"),
        [
            ({"question": ASKED, "answer": "a", "rating": 3}, "prompt=question response=answer score=rating"),
            ({"query": ASKED, "preferred": "a", "dispreferred": "b"},
             "prompt=query chosen=preferred rejected=dispreferred"),
            ({"prompt": ASKED, "my answers": ["a"], "scores": [1]}, "'completions=my answers' rewards=scores"),
            ({"prompt": ASKED, "responses": ["a", "b"], "x": [1, 2], "y": [3]}, "completions=responses rewards=x"),
            ({"a": "b", "c": "d"}, ""),
            ({"text": "b"}, ""),
            ({"prompt": None, "answers": None}, ""),
            ({"question": ASKED, "answers": [], "scores": {}}, "prompt=question"),
        ],
    )  # fmt: skip
    def test_by_name_and_by_what_is_there(self, row, flags):
        assert guess_columns([row]).flags == flags

    def test_columns_of_a_csv_hold_text(self):
        row = {"question": "12", "answers": '["a", "b"]', "scores": "[1, 2]"}
        rows = [row | {"question": ASKED}, row | {"question": "Why?"}]
        assert guess_columns(rows).flags == "prompt=question completions=answers rewards=scores"
        assert guess_columns([{"question": ASKED, "answer": "no", "rating": "4.5"}]).flags.endswith("score=rating")

    @pytest.mark.parametrize("names", [("question", "answers"), ("prompt", "completions")])
    def test_completions_without_rewards_are_pointed_to_score(self, names, tmp_path):
        path = write(tmp_path / "my rows.jsonl", [dict(zip(names, (ASKED, ["a", "b"]), strict=True))])
        with pytest.raises(UserError, match=r"completions without rewards\. Reward them by") as caught:
            load_reward_dataset(path)
        assert "known are" not in str(caught.value)
        (command,) = (part for part in str(caught.value).split("`") if part.startswith("nca-align score"))
        (options,) = parse([ScoreOptions], shlex.split(command)[2:], "score")
        found = load_completions(options.dataset_name, None, "train", options.columns)
        assert found.to_list() == [{"prompt": ASKED, "completions": ["a", "b"]}]

    def test_prompts_alone_are_pointed_to_sample(self, tmp_path):
        path = write(tmp_path / "my rows.jsonl", [{"question": ASKED, "source": "me"}])
        with pytest.raises(UserError) as caught:
            load_reward_dataset(path)
        said = str(caught.value)
        assert said.startswith(
            "`train` has the columns question, source: prompts without completions. Draw some by `nca"
        )
        command = shlex.split(said.split("`")[3])
        assert command[:2] == ["nca-align", "sample"]
        (options,) = parse([SampleOptions], command[2:], "sample")
        assert load_prompts(options.dataset_name, None, "train", options.columns)["prompt"][:] == [ASKED]
        (tmp_path / "prompts.txt").write_text("Why?\n")
        with pytest.raises(
            UserError, match=r"holds .txt; .* draw completions by `nca-align sample --dataset_name .*txt"
        ):
            load_reward_dataset(str(tmp_path / "prompts.txt"))


class TestIdentity:
    def test_other_columns_are_other_data(self, tmp_path):
        rows = [row | {"helpful": row["rewards"], "honest": row["rewards"][::-1]} for row in OWN]
        for row in rows:
            del row["rewards"]
        path = write(tmp_path / "rows.jsonl", rows)

        def read(column):
            return load_reward_dataset(path, split="train", validation_fraction=0, columns={"rewards": column})

        helpful, honest = read("helpful"), read("honest")
        assert helpful["rewards"][:] == [row["helpful"] for row in rows]
        assert honest["rewards"][:] == [row["honest"] for row in rows]
        assert helpful._fingerprint != honest._fingerprint
        assert data_fingerprint(helpful) != data_fingerprint(honest)
        again = read("helpful")
        assert again._fingerprint == helpful._fingerprint  # from the cache
        nested = [{"prompt": row["prompt"], "completions": row["completions"], "all": row} for row in rows]
        path = write(tmp_path / "nested.jsonl", nested)
        assert read("all.helpful")["rewards"][:] == [row["helpful"] for row in rows]
        assert read("all.honest")["rewards"][:] == [row["honest"] for row in rows]

    def test_cells_of_a_comparison_differ_in_it(self):
        grid = {"method": ["nca"], "seed": [0]}
        base = {"model_name_or_path": "m", "dataset_name": "d", "max_steps": 1, "bf16": False, "use_cpu": True}
        (one,), (other,) = (expand(base | {"columns": {"rewards": name}}, grid, "c") for name in ("a", "b"))
        assert one.identity() != other.identity()

    def test_a_run_is_not_continued_with_other_columns(self, model_dir, tmp_path, capsys):
        rows = [
            {"question": row["prompt"], "answers": row["completions"], "a": row["rewards"], "b": row["rewards"][::-1]}
            for row in reward_rows(8)
        ]
        (tmp_path / "columns.yaml").write_text("columns: {prompt: question, completions: answers, rewards: a}\n")
        arguments = flags(
            model_name_or_path=model_dir, dataset_name=write(tmp_path / "rows.jsonl", rows),
            output_dir=tmp_path / "run", save_strategy="steps", save_steps=1, max_steps=1, validation_fraction=0,
        )  # fmt: skip
        config = ["--config", str(tmp_path / "columns.yaml")]
        assert train([*arguments, *config]) == 0
        again = [*arguments, "--resume_from_checkpoint", "true"]
        assert train([*again, "--columns", "prompt=question", "completions=answers", "rewards=b"]) == 2
        assert "belongs to another run: `data` " in capsys.readouterr().err
        assert train([*again, *config]) == 0


class TestCommands:
    def test_inspect(self, tmp_path, capsys):
        rows, pairs = laid_out("list of objects")
        path = write(tmp_path / "rows.jsonl", rows)
        assert inspect(["--dataset_name", path, "--columns", *pairs.split()]) == 0
        assert "completions                       8" in capsys.readouterr().out
        assert inspect(["--dataset_name", path]) == 2
        assert "--columns prompt=question completions=answers.text rewards=answers.score" in capsys.readouterr().err

    def test_evaluate_implicit_and_compare(self, tmp_path):
        rows, pairs = laid_out("other names")
        path = write(tmp_path / "rows.jsonl", rows)
        options = ImplicitOptions(dataset_name=path, model_name_or_path="m", columns=pairs.split())
        assert load_rows(options).to_list() == OWN
        from trl import ScriptArguments

        from nca_align import NCAConfig
        from nca_align.commands.compare.grid import EvaluationSettings

        args = NCAConfig(output_dir=str(tmp_path / "o"), bf16=False, use_cpu=True, report_to="none")
        train_rows, held_out = read_splits(
            ScriptArguments(dataset_name=path), DataOptions(columns=pairs.split(), validation_fraction=0.5), args,
            EvaluationSettings(scorer=["x"], test="validation"),
        )  # fmt: skip
        assert own([*train_rows, *held_out["validation"], *held_out["test"]])
        assert set(train_rows.column_names) == set(OWN[0])

    def test_score(self, tmp_path):
        rows, pairs = laid_out("other names")
        path, output = write(tmp_path / "rows.jsonl", rows), str(tmp_path / "out.jsonl")
        columns = pairs.split()[:2]
        score(ScoreOptions(path, output, ["nca_align.scorers:vader"], columns=columns))
        assert [row["completions"] for row in read(output)] == [row["completions"] for row in OWN]
        assert score(ScoreOptions(path, output, ["nca_align.scorers:vader"], columns=columns))["rows"] == 4
        with pytest.raises(UserError, match="of another configuration: `data`"):
            score(
                ScoreOptions(
                    path, output, ["nca_align.scorers:vader"], columns=["prompt=answers.0", "completions=answers"]
                )
            )

    def test_sample_and_evaluate_by_a_scorer(self, tmp_path, model_dir):
        path, output = write(tmp_path / "rows.jsonl", [{"meta": {"q": ASKED}}] * 2), str(tmp_path / "out.jsonl")
        settings = {"model_name_or_path": model_dir, "max_new_tokens": 3, "columns": {"prompt": "meta.q"}}
        sample(SampleOptions(dataset_name=path, output=output, num_completions=2, **settings))
        assert [row["prompt"] for row in read(output)] == [ASKED] * 2
        assert read_provenance(output)[-1]["config"]["data"]
        settings |= {"model_name_or_path": [model_dir], "reference": model_dir, "num_completions": 2}
        lines = evaluate_generations(
            GenerationOptions(
                scorer=["nca_align.scorers:vader"], dataset_name=path, output=str(tmp_path / "folder"), **settings
            )
        )
        assert [line.prompts for line in lines] == [2, 2]
