"""`nca-align evaluate --judge`: the answers, turn after turn, in the judges' own formats.

`make check-judges` has the real AlpacaEval and FastChat read and judge such files.
"""

import json
import re
import sys
import threading
import types
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from conftest import build_model, build_tokenizer
from nca_align.commands.evaluate import judge_formats, judges
from nca_align.commands.evaluate.judge_formats import JUDGES, MT_BENCH_TEMPERATURES, gpt4o_encoding, style
from nca_align.commands.evaluate.judges import JudgeOptions, judge
from nca_align.errors import UserError
from nca_align.store import hub
from nca_align.store.provenance import read_provenance
from stand_ins import http_server
from test_sampling import alone

QUESTIONS = {
    "alpaca_eval": [
        {"instruction": f"Tell me about {what}.", "output": "x", "generator": "y"} for what in ("dogs", "a fox", "rain")
    ],
    "mt_bench": [
        {"question_id": 7, "category": "writing", "turns": ["Write about rain.", "Make it shorter."]},
        {"question_id": 8, "category": "math", "turns": ["What is 2 + 2?", "And twice that?"], "reference": ["4", "8"]},
        {"question_id": 9, "category": "math", "turns": ["What is 3 + 4?", "And half of that?"]},
        {"question_id": 3, "category": "stem", "turns": ["Why is the sky blue?", "And at sunset?"]},
        {"question_id": 4, "category": "my own", "turns": ["Who are you?"]},
        {"question_id": 5, "category": "humanities", "turns": ["What is a fable?", "Name one.", "Why that one?"]},
    ],
    "arena_hard": [
        {"uid": f"u{i}", "category": "hard_prompt", "prompt": prompt} for i, prompt in enumerate(("Sort a list.", "Hi"))
    ],
}
SUFFIX = {"alpaca_eval": "model_outputs.json", "mt_bench": "tiny.jsonl", "arena_hard": "tiny.jsonl"}


def read(path) -> list[dict]:
    text = Path(path).read_text()
    return json.loads(text) if str(path).endswith(".json") else [json.loads(line) for line in text.splitlines()]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def options(tmp_path, model_dir):
    """Options for a judge and its questions; keywords override."""

    def make(whose: str, **overrides) -> JudgeOptions:
        rows = overrides.pop("rows", QUESTIONS[whose])
        settings = {
            "judge": whose, "dataset_name": write(tmp_path / f"{whose}.jsonl", rows),
            "output": str(tmp_path / whose / SUFFIX[whose]), "model_name_or_path": model_dir, "max_new_tokens": 8,
            "batch_size": 2, "shard_size": 4,
        }  # fmt: skip
        (tmp_path / whose).mkdir(exist_ok=True)
        return JudgeOptions(**(settings | overrides))

    return make


def untimed(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "tstamp"} for row in rows]


class TestFormats:
    def test_alpaca_eval(self, options, model, tokenizer):
        judge(options("alpaca_eval", temperature=0.0))
        rows = read(options("alpaca_eval").output)
        asked = [row["instruction"] for row in QUESTIONS["alpaca_eval"]]
        said = [alone(model, tokenizer, [{"role": "user", "content": text}], max_new_tokens=8) for text in asked]
        name = Path(options("alpaca_eval").model_name_or_path).name
        assert rows == [
            {"instruction": text, "output": answer.strip(), "generator": name}
            for text, answer in zip(asked, said, strict=True)
        ]

    def test_alpaca_eval_takes_an_array_and_a_name(self, options, tmp_path):
        (tmp_path / "questions.json").write_text(json.dumps(QUESTIONS["alpaca_eval"]))
        judge(options("alpaca_eval", dataset_name=str(tmp_path / "questions.json"), name="aligned"))
        assert [row["generator"] for row in read(options("alpaca_eval").output)] == ["aligned"] * 3

    def test_mt_bench_each_turn_after_the_models_own_answers(self, options, model, tokenizer):
        judge(options("mt_bench", temperature=0.0))
        rows = read(options("mt_bench").output)
        assert [row["question_id"] for row in rows] == [row["question_id"] for row in QUESTIONS["mt_bench"]]
        for question, row in zip(QUESTIONS["mt_bench"], rows, strict=True):
            said = []
            for turn in question["turns"]:
                said.append({"role": "user", "content": turn})
                answer = alone(model, tokenizer, said, max_new_tokens=8).strip()
                said.append({"role": "assistant", "content": answer})
            assert row["choices"] == [{"index": 0, "turns": [message["content"] for message in said[1::2]]}]
            assert row["model_id"] == "tiny"
            assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert len({row["answer_id"] for row in rows}) == len(rows)

    def test_arena_hard(self, options, model, tokenizer):
        judge(options("arena_hard"))
        for question, row in zip(QUESTIONS["arena_hard"], read(options("arena_hard").output), strict=True):
            asked = {"role": "user", "content": question["prompt"]}
            answer = alone(model, tokenizer, [asked], max_new_tokens=8).strip()  # greedy is its default
            assert row["messages"] == [asked, {"role": "assistant", "content": {"answer": answer}}]
            assert (row["uid"], row["model"]) == (question["uid"], "tiny")
            assert set(row) == {"uid", "ans_id", "model", "messages", "tstamp", "metadata"}
            assert row["metadata"] == style(answer)

    def test_an_adapter_answers_otherwise(self, options, model, tokenizer, tmp_path):
        judge(options("mt_bench", temperature=0.0))
        adapted = get_peft_model(
            build_model(tokenizer), LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"])
        )
        adapted.save_pretrained(tmp_path / "adapter")
        output = str(tmp_path / "adapted.jsonl")
        judge(options("mt_bench", temperature=0.0, adapter=str(tmp_path / "adapter"), output=output))
        assert read(output)[0]["choices"] != read(options("mt_bench").output)[0]["choices"]


class TestStyle:
    def test_counts_outside_code_blocks(self, monkeypatch):
        encoding = types.SimpleNamespace(encode=lambda text, disallowed_special: text.split())
        monkeypatch.setattr(judge_formats, "gpt4o_encoding", lambda: encoding)
        answer = (
            "# One\n## Two\n## Three\n#no header\n1. first\n 2. second\n- a\n* b\n+ c\n-no item\n"
            "**bold** and __bold too__ and **not\nbold**\n```\n# code\n- code\n**code**\n```\n"
        )
        assert style(answer) == {
            "token_len": len(answer.split()),
            "header_count": {"h1": 1, "h2": 2, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
            "list_count": {"ordered": 2, "unordered": 3}, "bold_count": {"**": 1, "__": 1},
        }  # fmt: skip
        assert next(iter(style(answer))) == "token_len"  # Arena-Hard goes by the place

    @pytest.mark.parametrize("error", [None, ConnectionError("no network")])
    def test_no_encoding_where_it_is_not_installed_or_not_downloaded(self, monkeypatch, error):
        def fail(name):
            raise error

        monkeypatch.setitem(sys.modules, "tiktoken", error and types.SimpleNamespace(encoding_for_model=fail))
        gpt4o_encoding.cache_clear()
        assert gpt4o_encoding() is None
        gpt4o_encoding.cache_clear()

    def test_no_length_by_another_tokenizer(self, options, monkeypatch, capsys):
        """Its style control compares lengths with those of other models' files, so a near count would be wrong."""
        for module in (judges, judge_formats):
            monkeypatch.setattr(module, "gpt4o_encoding", lambda: None)
        judge(options("arena_hard"))
        assert list(read(options("arena_hard").output)[0]["metadata"]) == ["header_count", "list_count", "bold_count"]
        assert "`token_len` is left out of `metadata`" in capsys.readouterr().err


def answered(asked: list[dict]):
    """A server that answers with the number of its call, and keeps what it was asked."""
    lock = threading.Lock()

    def answer(path, body):
        with lock:
            asked.append(body)
            text = f" answer {len(asked)} "
        return 200, {}, {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}

    return answer


class TestWhatTheModelIsAsked:
    def ask(self, options, name, **overrides) -> list[dict]:
        asked: list[dict] = []
        with http_server(answered(asked)) as url:
            judge(options(name, base_url=url, model_name_or_path="m", concurrency=1, **overrides))
        return asked

    def test_temperatures_are_fastchats(self, options):
        asked = self.ask(options, "mt_bench", max_new_tokens=None)
        by_question = {body["messages"][0]["content"]: body for body in asked}
        for question in QUESTIONS["mt_bench"]:
            expected = {"writing": 0.7, "math": 0.0, "stem": 0.1, "humanities": 0.1, "my own": 0.7}
            assert by_question[question["turns"][0]]["temperature"] == expected[question["category"]]
        assert {body["max_tokens"] for body in asked} == {1024}
        assert set(MT_BENCH_TEMPERATURES.values()) == {0.0, 0.1, 0.7}

    @pytest.mark.parametrize(("name", "degrees", "tokens"), [("alpaca_eval", 0.7, 2048), ("arena_hard", 0.0, 4096)])
    def test_the_others_defaults(self, options, name, degrees, tokens):
        asked = self.ask(options, name, max_new_tokens=None)
        assert {(body["temperature"], body["max_tokens"]) for body in asked} == {(degrees, tokens)}
        assert all("chat_template_kwargs" not in body for body in asked)  # strict servers refuse unknown keys

    def test_a_temperature_of_the_users_is_for_all(self, options):
        assert {body["temperature"] for body in self.ask(options, "mt_bench", temperature=0.3)} == {0.3}

    def test_a_later_turn_holds_the_earlier_ones_and_draws_anew(self, options):
        asked = self.ask(options, "mt_bench")
        rows = {row["question_id"]: row["choices"][0]["turns"] for row in read(options("mt_bench").output)}
        second = next(body for body in asked if body["messages"][-1]["content"] == "Make it shorter.")
        roles = [message["role"] for message in second["messages"]]
        assert roles == ["user", "assistant", "user"]
        assert second["messages"][0]["content"] == "Write about rain."
        assert second["messages"][1]["content"] == rows[7][0] == "answer 1"  # stripped, as FastChat does
        assert len(rows[5]) == 3
        assert len(rows[4]) == 1
        first = next(body for body in asked if body["messages"][-1]["content"] == "Write about rain.")
        assert first["seed"] != second["seed"]

    def test_template_arguments_reach_the_template(self, options):
        asked = self.ask(options, "mt_bench", chat_template_kwargs='{"enable_thinking": false}')
        assert all(body["chat_template_kwargs"] == {"enable_thinking": False} for body in asked)

    def test_answers_without_text_are_counted(self, options, capsys):
        """Those that ended by themselves, and say nothing."""
        reply = {"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}
        with http_server(lambda path, body: (200, {}, reply)) as url:
            judge(options("arena_hard", base_url=url, model_name_or_path="m"))
        assert "0 of 2 answers cut at 8 tokens, 2 without text; docs" in capsys.readouterr().err

    def test_the_only_model_of_a_server_gives_the_name(self, options):
        asked: list[dict] = []
        respond = answered(asked)

        def answer(path, body):
            return (200, {}, {"data": [{"id": "org/their-model"}]}) if path.endswith("/models") else respond(path, body)

        with http_server(answer) as url:
            judge(options("alpaca_eval", base_url=url, model_name_or_path=None))
        assert {row["generator"] for row in read(options("alpaca_eval").output)} == {"their-model"}


class TestFailures:
    @pytest.mark.parametrize(
        ("failure", "cause"),
        [
            ((400, {}, {"error": {"message": "no", "code": "content_filter"}}), "content filter"),
            ((413, {}, b""), "too long"),
            ((200, {}, {"choices": [{"message": {"content": "fi"}, "finish_reason": "content_filter"}]}),
             "content filter"),
            ((200, {}, {"choices": [{"message": {"reasoning": "Hm"}, "finish_reason": "length"}]}),
             "cut before any text"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("turn", [0, 1])
    def test_a_question_that_failed_has_no_answer_from_there_on_and_is_counted(
        self, options, capsys, failure, cause, turn
    ):
        asked: list[dict] = []
        respond = answered(asked)
        hard = QUESTIONS["mt_bench"][5]["turns"]

        def answer(path, body):
            replied = respond(path, body)
            return failure if body["messages"][-1]["content"] == hard[turn] else replied

        with http_server(answer) as url:
            judge(options("mt_bench", base_url=url, model_name_or_path="m"))
        rows = read(options("mt_bench").output)
        assert [[bool(answer) for answer in row["choices"][0]["turns"]] for row in rows] == [
            [True] * len(question["turns"]) for question in QUESTIONS["mt_bench"][:5]
        ] + [[True] * turn + [False] * (3 - turn)]
        assert [body["messages"][-1]["content"] for body in asked if body["messages"][0]["content"] == hard[0]] == hard[
            : turn + 1
        ]
        counts = read_provenance(options("mt_bench").output)[-1]["counts"]
        assert (counts["failed"], counts[f"failed: {cause}"], counts["answers"]) == (1, 1, 9 + turn)
        assert f"; questions that failed: 1 (1: {cause}), each with an empty answer" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("failure", "told"),
        [
            ((413, {}, b""), "row 0: the server at .* refused the request .HTTP 413"),
            ((200, {}, {"choices": [{"message": {"reasoning": "Hm"}, "finish_reason": "length"}]}),
             r"the first 3 questions have no answer \(3: cut before any text\); a model that reasons .*: raise it"),
            ((200, {}, {"choices": [{"message": {}, "finish_reason": "content_filter"}]}),
             r"the first 3 questions have no answer \(3: content filter\)$"),
        ],
    )  # fmt: skip
    def test_none_answered_is_told_and_not_written(self, options, failure, told):
        with http_server(lambda path, body: failure) as url, pytest.raises(UserError, match=told):
            judge(options("alpaca_eval", base_url=url, model_name_or_path="m"))
        assert not Path(options("alpaca_eval").output).exists()

    def test_reasoning_that_the_server_kept_apart_is_said(self, options, capsys):
        reply = {"choices": [{"message": {"content": "a", "reasoning": "Hm"}, "finish_reason": "stop"}]}
        with http_server(lambda path, body: (200, {}, reply)) as url:
            judge(options("alpaca_eval", base_url=url, model_name_or_path="m"))
        assert ", 3 without the reasoning that the server gave apart" in capsys.readouterr().err

    def test_a_question_too_long_for_the_model_here(self, options):
        rows = [*QUESTIONS["alpaca_eval"], {"instruction": "dogs " * 3000}]
        judge(options("alpaca_eval", rows=rows))
        assert [bool(row["output"]) for row in read(options("alpaca_eval").output)][3] is False
        counts = read_provenance(Path(options("alpaca_eval").output).with_suffix(".jsonl"))[-1]["counts"]
        assert (counts["rows"], counts["failed"], counts["failed: no completion"]) == (4, 1, 1)


class TestGoingOn:
    def test_after_a_stop_it_goes_on_and_the_answers_are_the_same(self, options, tmp_path, monkeypatch):
        whole = str(tmp_path / "whole" / "tiny.jsonl")
        judge(options("mt_bench", output=whole, shard_size=2))
        real, calls = judges.open_engine, []

        def stopping(*arguments):
            engine = real(*arguments)

            def complete(settings, shard, rows, advance):
                calls.append(shard)
                if shard == 1 and calls.count(1) == 2:  # in the second turn of the second shard
                    raise KeyboardInterrupt
                return engine(settings, shard, rows, advance)

            return complete

        monkeypatch.setattr(judges, "open_engine", stopping)
        with pytest.raises(KeyboardInterrupt):
            judge(options("mt_bench", shard_size=2))
        assert not Path(options("mt_bench").output).exists()
        judge(options("mt_bench", shard_size=2))
        assert untimed(read(options("mt_bench").output)) == untimed(read(whole))
        assert calls.count(0) == 4  # two turns at two temperatures, and not again

    def test_done_is_done(self, options, monkeypatch, capsys):
        judge(options("alpaca_eval"))
        before = Path(options("alpaca_eval").output).read_text()
        Path(options("alpaca_eval").output).unlink()  # a kill may have come before the array was written
        monkeypatch.setattr(judges, "open_engine", lambda *arguments: pytest.fail("the model is loaded again"))
        judge(options("alpaca_eval"))
        assert Path(options("alpaca_eval").output).read_text() == before
        assert "3 questions answered by" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"temperature": 0.2}, "`temperature` None there and 0.2 here"),
            ({"rows": QUESTIONS["mt_bench"][:5]}, "`data` "),
            ({"chat_template_kwargs": '{"a": 1}'}, "`chat_template_kwargs` "),
            ({"max_new_tokens": 9}, "`max_new_tokens` 8 there and 9 here"),
        ],
    )
    def test_answers_of_another_configuration_are_not_mixed_in(self, options, change, message):
        judge(options("mt_bench"))
        with pytest.raises(UserError, match=re.escape(message)):
            judge(options("mt_bench", **change))

    def test_the_record(self, options):
        judge(options("mt_bench"))
        (step,) = read_provenance(options("mt_bench").output)
        assert step["command"] == "evaluate --judge mt_bench"
        assert step["counts"] == {"answers": 12, "failed": 0, "rows": 6, "truncated": step["counts"]["truncated"]}


class TestRefused:
    @pytest.mark.parametrize(
        ("name", "settings", "message"),
        [
            ("alpaca_eval", {"output": "x.jsonl"}, "`output` is 'x.jsonl'; for alpaca_eval it must end in .json"),
            ("mt_bench", {"output": "x.json"}, "`output` is 'x.json'; for mt_bench it must end in .jsonl"),
            ("mt_bench", {"output": "a/x.jsonl", "name": "y"}, "`name` is 'y', but mt_bench takes a model's name from "
             "the file, which is x.jsonl. Make `output` end in y.jsonl"),
            ("arena_hard", {"temperature": -1.0}, "`temperature` is -1.0; it must be 0 (greedy) or more"),
            ("arena_hard", {"max_new_tokens": 0}, "`max_new_tokens` is 0; it must be at least 1"),
            ("mt_bench", {"chat_template_kwargs": "[1]"}, "`chat_template_kwargs` is '[1]'; it must be a JSON object"),
            ("mt_bench", {"model_name_or_path": None}, "`model_name_or_path` is missing"),
        ],
    )  # fmt: skip
    def test_options(self, options, name, settings, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            options(name, **settings)

    @pytest.mark.parametrize(
        ("name", "rows", "message"),
        [
            ("mt_bench", [{"question_id": 1, "turns": ["a"]}],
             "has no column `category`; mt_bench needs question_id, category, turns, as in "
             "data/mt_bench/question.jsonl of lmsys/mt-bench"),
            ("mt_bench", [{"question_id": 1, "category": "math", "turns": ["a", ""]}],
             "row 0: `turns` is ['a', '']; it must be a list of texts, one a turn, and not empty"),
            ("mt_bench", [{"question_id": 1, "category": "math", "turns": []}], "row 0: `turns` is []"),
            ("mt_bench", [QUESTIONS["mt_bench"][1], {"question_id": 8, "category": "math", "turns": ["b"]}],
             "row 1: `question_id` is 8, as in row 0. Every question needs its own"),
            ("arena_hard", [{"uid": "a", "prompt": " "}], "row 0: `prompt` is ' '; it must be text, and not empty"),
            ("alpaca_eval", [{"prompt": "a"}], "has no column `instruction`"),
        ],
    )  # fmt: skip
    def test_questions(self, options, name, rows, message):
        with pytest.raises(UserError, match=re.escape(message)):
            judge(options(name, rows=rows))

    @pytest.mark.parametrize("name", list(JUDGES))
    def test_the_judges_own_questions_without_a_network(self, options, name, monkeypatch):
        with pytest.raises(
            UserError, match=rf"`dataset_name` is not given, and {name}'s own questions, .* can't be loaded"
        ):
            judge(options(name, dataset_name=None))

    def test_the_judges_own_questions_come_from_the_hub(self, options, tmp_path, monkeypatch):
        asked = []

        def download(repo, file, repo_type):
            asked.append((repo, file, repo_type))
            return write(tmp_path / "question.jsonl", QUESTIONS["mt_bench"])

        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
        judge(options("mt_bench", dataset_name=None))
        assert asked == [("lmsys/mt-bench", "data/mt_bench/question.jsonl", "space")]
        assert len(read(options("mt_bench").output)) == 6


class TestWithoutNetwork:
    @pytest.fixture
    def online(self, monkeypatch):
        """As if nobody had said offline; both switches are put back."""
        import datasets
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        return lambda: (huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE)

    def test_an_unreachable_hub_is_offline(self, online, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        hub.go_offline_without_network()
        assert online() == (True, True)

    def test_a_reachable_one_is_not(self, online, monkeypatch):
        with http_server(lambda path, body: (200, {}, {})) as url:
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
            hub.go_offline_without_network()
        assert online() == (False, False)

    def test_a_proxy_is_left_to_the_clients(self, online, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
        hub.go_offline_without_network()
        assert online() == (False, False)


def test_a_data_set_that_was_saved_serves_as_questions(options, tmp_path):
    Dataset.from_list(QUESTIONS["alpaca_eval"]).save_to_disk(tmp_path / "saved")
    judge(options("alpaca_eval", dataset_name=str(tmp_path / "saved")))
    assert len(read(options("alpaca_eval").output)) == 3


def test_a_model_without_a_chat_template(options, tmp_path):
    tokenizer = build_tokenizer(chat_template=None)
    build_model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="has no chat template"):
        judge(options("mt_bench", model_name_or_path=str(tmp_path / "base")))
