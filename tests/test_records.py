"""Keys of caches, records and identities: each of their fields, changed alone, makes new work or a refusal.

Tables name each option that there is. One that is in no table fails, so that a new option is put in one.
"""

import copy
import json
import re
from dataclasses import fields

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from conftest import build_model, build_tokenizer, reward_rows
from nca_align import NCATrainer
from nca_align.batching.tokenization import tokenize_dataset
from nca_align.commands.evaluate import reward_and_kl
from nca_align.commands.evaluate.reward_and_kl import EvaluateOptions, PolicyMetrics, evaluate
from nca_align.commands.sample import command as sample_command
from nca_align.commands.sample.command import sample
from nca_align.commands.sample.options import Sample, SampleOptions
from nca_align.commands.score import ScoreOptions, score
from nca_align.errors import UserError
from nca_align.evaluation.intervals import UNKNOWN
from nca_align.training.run_identity import FREE, at_start, refuse_another_run, run_identity
from test_trainer import config, trainer

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def model(**config) -> LlamaForCausalLM:
    return build_model(build_tokenizer(), **config)


def write_rows(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class TestTokens:
    """`tokenize_dataset` keeps its rows in the cache of `datasets`."""

    CHANGES = {  # noqa: RUF012
        "max_prompt_length": {"max_prompt_length": 6},
        "max_length": {"max_length": 30},
        "length_column": {"length_column": "other"},
        "chat_template": lambda t: setattr(t, "chat_template", t.chat_template.replace("<|im_end|>", ".<|im_end|>")),
        "bos_token": lambda t: setattr(t, "bos_token", "<|im_start|>"),
        "eos_token": lambda t: setattr(t, "eos_token", "<s>"),
        "cls_token": lambda t: setattr(t, "cls_token", "<s>"),
        "unk_token": lambda t: setattr(t, "unk_token", "<s>"),
        "a token": lambda t: t.add_tokens(["quick"]),
    }

    @pytest.fixture
    def dataset(self, tmp_path, datasets_cache):
        return Dataset.from_json(write_rows(tmp_path / "rows.jsonl", reward_rows(4)), cache_dir=str(tmp_path / "cache"))

    @pytest.mark.parametrize("name", [*CHANGES, "data"])
    def test_what_changes_them_makes_them_anew(self, name, dataset, tmp_path):
        def files(rows, tokenizer, **limits) -> list[str]:
            given = {"max_prompt_length": 12, "max_length": 60} | limits
            return [file["filename"] for file in tokenize_dataset(rows, tokenizer, **given)[0].cache_files]

        before, change, tokenizer = files(dataset, build_tokenizer()), self.CHANGES.get(name, {}), build_tokenizer()
        assert before == files(dataset, build_tokenizer()) != []
        if callable(change):
            change(tokenizer)
        if name == "data":
            rows = reward_rows(4)
            rows[2]["completions"][1][0]["content"] += "!"
            dataset = Dataset.from_json(write_rows(tmp_path / "rows.jsonl", rows), cache_dir=str(tmp_path / "cache"))
        assert files(dataset, tokenizer, **({} if callable(change) else change)) != before


def scaled(factor: float = 1.001):
    def change(model):
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "o_proj" in name).mul_(factor)

    return change


class TestReference:
    """The cache of reference log-probabilities: a model, an adapter that training continues, or a given reference."""

    MODEL = {  # noqa: RUF012
        "a weight": scaled(),
        "dtype": lambda model: model.to(torch.float16),
        "config": lambda model: setattr(model.config, "rms_norm_eps", 1e-2),
        "class": lambda model: setattr(model, "__class__", type("Other", (LlamaForCausalLM,), {})),
    }
    OPTIONS = {  # noqa: RUF012
        "precision": {"bf16": True},
        "max_length": {"max_length": 24},
        "max_prompt_length": {"max_prompt_length": 6},
        "ref_model": {"ref_model": build_model(build_tokenizer(), seed=5)},
    }
    ADAPTER = {  # noqa: RUF012
        "its weights": lambda model: next(p for n, p in model.named_parameters() if "lora_B" in n).data.mul_(1.001),
        "its base": scaled(),
        "lora_alpha": {"lora_alpha": 16},
        "use_rslora": {"use_rslora": True},
    }

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    @pytest.fixture
    def count(self, tmp_path, monkeypatch):
        """How often the reference is computed by a trainer."""
        calls: list[int] = []
        own = NCATrainer.compute_ref_log_probs
        monkeypatch.setattr(
            NCATrainer, "compute_ref_log_probs", lambda self, model, batch: calls.append(1) or own(self, model, batch)
        )

        def counted(model, rows=None, **options) -> int:
            before = len(calls)
            trainer(tmp_path, model, rows or reward_rows(2), precompute_ref_log_probs=True, **options)
            return len(calls) - before

        return counted

    @pytest.mark.parametrize("name", [*MODEL, *OPTIONS, "template", "prompt", "completion"])
    def test_what_changes_a_models_makes_it_anew(self, name, count):
        model, rows, tokenizer = build_model(build_tokenizer()), reward_rows(2), build_tokenizer()
        assert (count(copy.deepcopy(model)), count(copy.deepcopy(model))) == (1, 0)
        self.MODEL.get(name, lambda model: None)(model)
        if name == "template":
            tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", ".<|im_end|>")
        elif name in ("prompt", "completion"):
            (rows[1]["prompt"] if name == "prompt" else rows[1]["completions"][1])[0]["content"] += "!"
        assert count(model, rows, tokenizer=tokenizer, **self.OPTIONS.get(name, {})) == 1

    @pytest.mark.parametrize("name", ADAPTER)
    def test_what_changes_an_adapters_makes_it_anew(self, name, count):
        def adapted(**own):
            return get_peft_model(model(), LoraConfig(**LORA | own))

        assert (count(adapted()), count(adapted())) == (1, 0)
        change = self.ADAPTER[name]
        policy = adapted(**({} if callable(change) else change))
        if callable(change):
            change(policy)
        assert count(policy) == 1

    def test_what_changes_nothing_in_it_does_not(self, count):
        model = build_model(build_tokenizer())
        own = {"alpha": 3.0, "beta": 0.7, "loss_type": "infonca", "seed": 11, "layout": "padded"}
        rows = reward_rows(2)
        assert count(copy.deepcopy(model)) == 1
        for row in rows:
            row["rewards"] = row["rewards"][::-1]
        assert count(copy.deepcopy(model), rows, **own) == 0


class TestRun:
    """The identity of a run, by which a checkpoint is its own or another's."""

    @pytest.fixture(scope="class")
    @classmethod
    def known(cls, tmp_path_factory):
        """The parts of an identity, and it."""
        parts = cls.parts(tmp_path_factory.mktemp("run"))
        return parts, run_identity(**parts)

    @staticmethod
    def parts(folder, **own):
        rows, _ = tokenize_dataset(
            Dataset.from_list(own.pop("rows", None) or reward_rows(3)), build_tokenizer(), 20, 60
        )
        model = own.pop("model", None) or build_model(build_tokenizer())
        args = config(folder)
        for name, value in own.items():
            setattr(args, name, value)
        return {"args": args, "model": model, "dataset": rows, "processes": 1, "start": at_start(model)}

    @staticmethod
    def refusal(old: dict, new: dict) -> str:
        with pytest.raises(UserError, match=r"belongs to (another run|a run with other options): ") as error:
            refuse_another_run(old, new, [], "checkpoint-1")
        assert not [name for name in old if old[name] != new.get(name) and f"`{name}`" not in str(error.value)]
        return str(error.value)

    # the first has a test below; transformers writes a pad token as a secret, and what is padded counts nowhere
    @pytest.mark.parametrize("name", sorted(set(config("x").to_dict()) - FREE - {"model_init_kwargs", "pad_token"}))
    def test_every_option_that_is_not_free_belongs_to_it(self, name, known, monkeypatch):
        parts, old = known
        monkeypatch.setattr(parts["args"], name, ["other"] if name == "loss_type" else "other")
        said = self.refusal(old, run_identity(**parts))
        assert re.search(rf": `{name}` .* → .*other", said)

    # of a batch and its accumulation the product counts; a parallelism is no text
    NOT_HERE = {"per_device_train_batch_size", "gradient_accumulation_steps", "parallelism_config"}  # noqa: RUF012

    @pytest.mark.parametrize("name", sorted(FREE & set(config("x").to_dict()) - NOT_HERE))
    def test_every_free_one_does_not(self, name, known, monkeypatch):
        parts, old = known
        monkeypatch.setattr(parts["args"], name, "other")
        assert run_identity(**parts) == old

    def rows(change):
        rows = reward_rows(3)
        change(rows)
        return rows

    PARTS = {  # noqa: RUF012
        "a prompt": ("data", {"rows": rows(lambda rows: rows[1]["prompt"][0].update(content="Why?"))}),
        "a completion": ("data", {"rows": rows(lambda rows: rows[1]["completions"][0][0].update(content="So."))}),
        "a reward": ("data", {"rows": rows(lambda rows: rows[1]["rewards"].reverse())}),
        "the rows' order": ("data", {"rows": rows(lambda rows: rows.reverse())}),
        "a row more": ("data", {"rows": reward_rows(4)}),
        "the model's shape": ("model.intermediate_size", {"model": model(intermediate_size=48)}),
        "its config": ("model.rms_norm_eps", {"model": model(rms_norm_eps=1e-2)}),
        "its dtype": ("model.dtype", {"model": model().to(torch.bfloat16)}),
        "the batch": ("global_batch_size", {"per_device_train_batch_size": 4}),
        "the accumulation": ("global_batch_size", {"gradient_accumulation_steps": 4}),
        "what a model is made with": ("model_init_kwargs", {"model_init_kwargs": {"attn_implementation": "eager"}}),
    }  # fmt: skip

    @pytest.mark.parametrize("name", PARTS)
    def test_model_data_and_batch_belong_to_it(self, name, known, tmp_path):
        _, old = known
        field, change = self.PARTS[name]
        new = self.parts(tmp_path, **copy.deepcopy(change))
        assert re.search(rf"`{field}` .* → ", self.refusal(old, run_identity(**new)))

    def test_so_do_processes_and_a_given_reference_and_secrets_do_not(self, known):
        parts, old = known
        assert "`global_batch_size` 2 → 4" in self.refusal(old, run_identity(**parts | {"processes": 2}))
        first, second = (run_identity(**parts, reference=own) for own in ("a" * 64, "b" * 64))
        assert "`ref_model` null → " in self.refusal(old, first)
        assert "`ref_model` aaaaaaaaaaaaaaaa → bbbbbbbbbbbbbbbb" in self.refusal(first, second)

    def test_a_steps_prompts_of_a_process_do_where_lengths_group_them(self, tmp_path):
        parts = self.parts(tmp_path, train_sampling_strategy="group_by_length")
        old = run_identity(**parts)
        parts["args"].per_device_train_batch_size = 1
        said = self.refusal(old, run_identity(**parts | {"processes": 2}))
        assert "`prompts_a_process` 2 → 1" in said
        assert "global_batch_size" not in said

    def test_weights_in_a_folder_do(self, tokenizer, tmp_path):
        found = []
        for seed in (0, 1):
            build_model(tokenizer, seed=seed).save_pretrained(tmp_path / "model")
            model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
            found.append(run_identity(**self.parts(tmp_path, model=model)))
        assert re.search(r": `model` [0-9a-f]{16} → [0-9a-f]{16};", self.refusal(*found))

    @pytest.mark.parametrize(
        "change",
        [{"lora_alpha": 16}, {"r": 2}, {"lora_dropout": 0.5}, {"rank_pattern": {"q_proj": 2}}, {"use_rslora": True},
         {"alpha_pattern": {"q_proj": 2}}, {"target_modules": ["q_proj"]}, {"modules_to_save": ["lm_head"]}],
    )  # fmt: skip
    def test_what_an_adapter_is_does(self, change, tmp_path):
        old, new = (
            run_identity(
                **self.parts(tmp_path, model=get_peft_model(build_model(build_tokenizer()), LoraConfig(**own)))
            )
            for own in (LORA, LORA | change)
        )
        assert f"`adapter.default.{next(iter(change))}` " in self.refusal(old, new)

    def test_the_weights_of_the_adapter_that_training_went_on_from_do(self, model_dir, tmp_path):
        """The base's folder does not hold them: their hash is all that tells another reference."""

        def identity(seed: int) -> dict:
            base = LlamaForCausalLM.from_pretrained(model_dir)
            torch.manual_seed(seed)  # of the adapter alone
            policy = get_peft_model(base, LoraConfig(**LORA))
            return trainer(tmp_path, policy, reward_rows(2))._resume.run_identity()

        first = identity(1)
        refuse_another_run(first, identity(1), [], "checkpoint-1")
        said = self.refusal(first, identity(2))
        assert re.search(r"belongs to another run: `adapter\.ref` [0-9a-f]{16} → [0-9a-f]{16};", said)


class TestSamples:
    """What `nca-align sample` records of its output."""

    # option → another value, and the name that the refusal tells
    CHANGES = {  # noqa: RUF012
        "dataset_name": ("other.jsonl", "data"),
        "split": ("test", "data"),
        "columns": ("prompt=other", "data"),
        "as_chat": (True, "data"),
        "model_name_or_path": ("OTHER MODEL", "model"),
        "adapter": ("ADAPTER", "adapter"),
        "dtype": ("bfloat16", "dtype"),
        "engine": ("vllm", "engine"),
        "base_url": ("http://127.0.0.1:9", "base_url"),
        "num_completions": (2, "num_completions"),
        "temperature": (0.5, "temperature"),
        "top_p": (0.9, "top_p"),
        "max_new_tokens": (7, "max_new_tokens"),
        "stop": (["x"], "stop"),
        "duplicates": ("remove", "duplicates"),
        "seed": (7, "seed"),
        "batch_size": (3, "batch_size"),
        "shard_size": (2, "shard_size"),
    }
    # of a server alone
    OF_A_SERVER = {"extra_body": ('{"min_p": 0.1}', "extra_body"), "model_name_or_path": ("other", "model")}  # noqa: RUF012
    # They change no sample; a revision and a configuration are of the Hub's names, which stand in others' place
    FREE = {"output", "on_error", "concurrency", "retries", "timeout", "trust_remote_code", "engine_args"}  # noqa: RUF012
    OF_THE_HUB = {"model_revision", "dataset_config"}  # noqa: RUF012

    @pytest.fixture
    def made(self, tmp_path, model_dir, model, tokenizer, monkeypatch):
        """A finished output, the options that made it, and what may be changed to a folder that is here."""
        rows = [{"prompt": f"Question {i}?", "other": f"Another {i}?"} for i in range(4)]
        (tmp_path / "data").mkdir()
        write_rows(tmp_path / "data" / "train.jsonl", rows)
        write_rows(tmp_path / "data" / "test.jsonl", rows[::-1])
        write_rows(tmp_path / "other.jsonl", rows[:3])
        build_model(tokenizer, seed=1).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        get_peft_model(model, LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")

        def engine(*given):
            def complete(options, shard, rows, progress):
                texts = [f"{k}" for k in range(options.num_completions)]
                return {number: [Sample(f"{number} {text}", False) for text in texts] for number in rows}

            return complete

        for name in ("transformers_engine", "vllm_engine", "server_engine"):
            monkeypatch.setattr(sample_command, name, engine)
        monkeypatch.setattr(sample_command, "check_prompts", lambda *given: None)
        options = {
            "dataset_name": str(tmp_path / "data"), "output": str(tmp_path / "out.jsonl"), "split": "train",
            "model_name_or_path": model_dir, "num_completions": 3, "max_new_tokens": 6, "shard_size": 3,
        }  # fmt: skip
        here = {
            "OTHER MODEL": tmp_path / "model",
            "ADAPTER": tmp_path / "adapter",
            "other.jsonl": tmp_path / "other.jsonl",
        }
        return options, lambda value: str(here[value]) if value in list(here) else value

    @pytest.mark.parametrize("name", CHANGES)
    def test_what_changes_them_is_refused_by_name(self, name, made):
        options, here = made
        sample(SampleOptions(**options))
        assert sample(SampleOptions(**options))["rows"] == 4
        value, told = self.CHANGES[name]
        value = [value] if name == "columns" else here(value)
        with pytest.raises(UserError, match=rf"of another configuration: .*`{told}` .* there and .* here"):
            sample(SampleOptions(**options | {name: value}))

    @pytest.mark.parametrize("name", OF_A_SERVER)
    def test_so_is_what_a_server_is_told(self, name, made):
        options = made[0] | {"base_url": "http://127.0.0.1:9", "model_name_or_path": "a"}
        sample(SampleOptions(**options))
        value, told = self.OF_A_SERVER[name]
        with pytest.raises(UserError, match=rf"of another configuration: `{told}` .* there and .* here"):
            sample(SampleOptions(**options | {name: value}))

    def test_every_option_is_in_a_table(self):
        assert {own.name for own in fields(SampleOptions)} == {
            *self.CHANGES, *self.OF_A_SERVER, *self.FREE, *self.OF_THE_HUB
        }  # fmt: skip


class TestScores:
    """What `nca-align score` records of its output."""

    CHANGES = {  # noqa: RUF012
        "dataset_name": ("other.jsonl", "data"),
        "split": ("test", "data"),
        "columns": (["completions=others"], "data"),
        "scorer": (["nca_align.scorers:vader", "nca_align.scorers:within_words"], "scorers"),
        "scorer_weights": ([2.0], "weights"),
        "tokenizer": ("MODEL", "tokenizer"),
        "dtype": ("bfloat16", "dtype"),
        "shard_size": (2, "shard_size"),
    }
    FREE = {"output", "on_error", "batch_size", "trust_remote_code"}  # noqa: RUF012
    OF_THE_HUB = {"dataset_config"}  # noqa: RUF012

    @pytest.mark.parametrize("name", CHANGES)
    def test_what_changes_them_is_refused_by_name(self, name, tmp_path, model_dir):
        rows = [row | {"others": row["completions"][::-1]} for row in reward_rows(4)]
        (tmp_path / "data").mkdir()
        write_rows(tmp_path / "data" / "train.jsonl", rows)
        write_rows(tmp_path / "data" / "test.jsonl", rows[::-1])
        write_rows(tmp_path / "other.jsonl", rows[:3])
        options = {
            "dataset_name": str(tmp_path / "data"), "output": str(tmp_path / "out.jsonl"),
            "scorer": ["nca_align.scorers:vader"], "shard_size": 3,
        }  # fmt: skip
        score(ScoreOptions(**options))
        assert score(ScoreOptions(**options | {"scorer_weights": [1.0]}))["rows"] == 4  # the default, written out
        value, told = self.CHANGES[name]
        if isinstance(value, str):
            value = {"other.jsonl": str(tmp_path / "other.jsonl"), "MODEL": model_dir}.get(value, value)
        with pytest.raises(UserError, match=rf"of another configuration: .*`{told}` .* there and .* here"):
            score(ScoreOptions(**options | {name: value}))

    def test_every_option_is_in_a_table(self):
        assert {own.name for own in fields(ScoreOptions)} == {*self.CHANGES, *self.FREE, *self.OF_THE_HUB}


class TestPolicies:
    """What `nca-align evaluate` keeps in its `output`: a line for the samples, the policy, the reference, the dtype."""

    @pytest.mark.parametrize("name", ["samples", "policy", "reference", "dtype", "nothing"])
    def test_what_changes_a_line_makes_it_anew(self, name, tmp_path, tokenizer, monkeypatch):
        calls = []

        def computed(dataset, policy, *rest) -> PolicyMetrics:
            calls.append(policy)
            kinds = {own.name: UNKNOWN for own in fields(PolicyMetrics)}
            return PolicyMetrics(**kinds | {"policy": "p", "prompts": 1, "completions": 1, "distinct_2": 0.0})

        monkeypatch.setattr(reward_and_kl, "evaluate_samples", computed)
        for folder in ("policy", "reference"):
            build_model(tokenizer).save_pretrained(tmp_path / folder)
        rows = reward_rows(3)
        given = [str(tmp_path / own) for own in ("rows.jsonl", "policy", "reference")]
        output = str(tmp_path / "table.json")

        def line(dtype="float32"):
            before = len(calls)
            write_rows(tmp_path / "rows.jsonl", rows)
            evaluate(EvaluateOptions([given[0]], [given[1]], given[2], output=output, dtype=dtype))
            return len(calls) - before

        assert (line(), line()) == (1, 0)
        if name == "samples":
            rows[1]["completions"][0][0]["content"] += "!"
        elif name in ("policy", "reference"):
            build_model(tokenizer, seed=1).save_pretrained(tmp_path / name)
        assert line("bfloat16" if name == "dtype" else "float32") == (name != "nothing")
