"""The aligned model as a reward model: against the trainer's own numbers, adapters, whole models, real data."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import SOURCES, build_model, pair_rows, reward_rows, scored_rows
from nca_align import NCAConfig, NCATrainer
from nca_align.batching.tokenization import tokenize_rows
from nca_align.commands.evaluate.command import main
from nca_align.commands.evaluate.implicit import (
    ImplicitOptions,
    evaluate_implicit,
    implicit,
    load_rows,
    print_ranking,
    token_logratios,
    write_token_scores,
)
from nca_align.errors import UserError
from nca_align.models.loading import ModelSource, run_record
from nca_align.models.logprobs import completion_logps, token_logps
from nca_align.models.policy import as_reference


def save_adapter(model, folder: Path, seed: int, modules=("q_proj",), **config) -> str:
    """A LoRA adapter that changes what the model says, saved by PEFT."""
    torch.manual_seed(seed)
    policy = get_peft_model(model, LoraConfig(r=4, target_modules=list(modules), **config))
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    policy.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapter_dir(model_dir, tmp_path_factory) -> str:
    """An adapter without a tokenizer beside it."""
    return save_adapter(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path_factory.mktemp("adapter"), 1)


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in reward_rows(6, [3, 2, 4])))
    return str(path)


def options(data_file, model, **overrides) -> ImplicitOptions:
    return ImplicitOptions(dataset_name=data_file, model_name_or_path=model, **overrides)


def tokenised(tokenizer, rows) -> list[dict]:
    batch = {name: [row[name] for row in rows] for name in rows[0]}
    table = tokenize_rows(batch, list(range(len(rows))), tokenizer, 512, 1024, "length")
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def plain_token_logps(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model.double()(torch.tensor([prompt + completion])).logits[0, :-1].log_softmax(-1)
    return logits.gather(1, torch.tensor(prompt + completion)[1:, None])[len(prompt) - 1 :, 0]


def test_token_logps_equal_plain_forwards_whatever_the_batch(tokenizer, model_dir, adapter_dir):
    rows = tokenised(tokenizer, reward_rows(5, [3, 2]))
    policy = ModelSource.of(adapter_dir).load_policy("auto")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), adapter_dir).eval()
    for size in (1, 3, 100):
        found = token_logps(policy, rows, size)
        for row, many in zip(rows, found, strict=True):
            for ids, logps in zip(row["completion_ids"], many, strict=True):
                assert logps.tolist() == pytest.approx(
                    plain_token_logps(plain, row["prompt_ids"], ids).tolist(), abs=2e-4
                )


def test_what_has_no_packed_row_is_padded(tokenizer, model_dir, tmp_path):
    """Prompt tuning puts virtual tokens in front of a row."""
    from peft import PromptTuningConfig

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config)
    torch.nn.init.normal_(policy.prompt_encoder["default"].embedding.weight, std=0.5)
    policy.save_pretrained(tmp_path)
    rows = tokenised(tokenizer, reward_rows(2, 2))
    found = completion_logps(ModelSource.of(str(tmp_path)).load_policy("auto"), rows, 3)
    for row, values in zip(rows, found, strict=True):
        for ids, value in zip(row["completion_ids"], values, strict=True):
            with torch.no_grad():
                whole = torch.tensor([row["prompt_ids"] + ids])
                logits = policy.eval()(whole).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
            assert value == pytest.approx(float(logits.gather(1, torch.tensor(ids)[:, None]).sum()), abs=1e-3)


def test_implicit_rewards_are_those_of_the_trainers_log(model_dir, adapter_dir, tokenizer, tmp_path, capsys):
    """`rewards/accuracies`, the mean implicit reward and each of several rewards, as NCATrainer evaluates the same
    adapter on the same rows."""
    rows = reward_rows(6, [3, 2, 4])
    for i, row in enumerate(rows):  # a gap, and a row without one of the rewards
        own = [None, *row["rewards"][1:]] if i == 2 else None if i == 0 else [-r for r in row["rewards"]]
        row |= {"score_help": row["rewards"], "score_short": own}
    data_file = str(tmp_path / "rows.jsonl")
    Path(data_file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = NCAConfig(str(tmp_path), beta=0.2, alpha=0.5, report_to="none", use_cpu=True, bf16=False)
    dataset = Dataset.from_list(rows)
    trainer = NCATrainer(
        model=model_dir, args=args, train_dataset=dataset, eval_dataset=dataset, processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
    )  # fmt: skip
    set_peft_model_state_dict(trainer.model, load_file(Path(adapter_dir) / "adapter_model.safetensors"))
    log = trainer.evaluate()
    found = implicit(options(data_file, adapter_dir, beta=0.2))
    logged = {name.removeprefix("eval_"): value for name, value in log.items() if "objectives/" in name}
    figures = "help/accuracies", "help/corr_length", "help/corr_short", "short/accuracies", "short/corr_length"
    assert [*found.objectives] == [*logged] == [f"objectives/{name}" for name in figures]
    assert {name: interval.mean for name, interval in found.objectives.items()} == pytest.approx(logged, abs=1e-5)
    assert [interval.n for name, interval in found.objectives.items() if "accuracies" in name] == [6, 5]
    shown = f"{100 * logged['objectives/short/accuracies']:.1f}"
    assert re.search(rf"pairs right, % .*\nhelp .*\nshort +{shown} \[\d+, \d+\] ", capsys.readouterr().out)
    assert found.figures["implicit"]["pairs"].mean == pytest.approx(log["eval_rewards/accuracies"], abs=1e-6)
    logratios = token_logratios(adapter_dir, None, tokenised(tokenizer, rows), options(data_file, adapter_dir))
    best = [
        0.2 * float(m[max(range(len(m)), key=r["rewards"].__getitem__)].sum())
        for m, r in zip(logratios, rows, strict=True)
    ]
    assert sum(best) / len(best) == pytest.approx(log["eval_rewards/best"], abs=1e-4)


def test_the_reference_is_the_base_with_the_adapter_off_or_the_one_named(
    model_dir, adapter_dir, tokenizer, tmp_path, data_file
):
    rows = tokenised(tokenizer, reward_rows(3, 3))
    own = token_logratios(adapter_dir, None, rows, options(data_file, adapter_dir))
    named = token_logratios(adapter_dir, model_dir, rows, options(data_file, adapter_dir))
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), adapter_dir).merge_and_unload()
    merged.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    whole = token_logratios(str(tmp_path), model_dir, rows, options(data_file, str(tmp_path)))
    for a, b, c in zip(own, named, whole, strict=True):
        for x, y, z in zip(a, b, c, strict=True):
            assert float(x.abs().max()) > 0.01  # the adapter does something
            assert torch.allclose(x, y, atol=2e-4)
            assert torch.allclose(x, z, atol=2e-4)
    same = token_logratios(model_dir, model_dir, rows, options(data_file, model_dir))
    assert all(float(x.abs().max()) == 0 for row in same for x in row)


def test_an_adapter_that_went_on_from_another_has_that_one_for_reference(model_dir, adapter_dir, tokenizer, tmp_path):
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), adapter_dir)
    policy.load_adapter(adapter_dir, adapter_name="ref")  # as TRL keeps it
    for name, parameter in policy.named_parameters():
        if "lora_B.default" in name:
            parameter.data *= 2
    policy.save_pretrained(tmp_path)
    assert (tmp_path / "ref" / "adapter_config.json").exists()
    rows = tokenised(tokenizer, reward_rows(2, 2))
    loaded = ModelSource.of(str(tmp_path)).load_policy("auto")
    before = completion_logps(loaded, rows, 4)
    with as_reference(loaded):
        found = completion_logps(loaded, rows, 4)
    assert found[0] == pytest.approx(
        completion_logps(ModelSource.of(adapter_dir).load_policy("auto"), rows, 4)[0], abs=1e-4
    )
    assert found[0] != pytest.approx(before[0], abs=1e-2)
    assert completion_logps(loaded, rows, 4) == before  # and the policy again afterwards


def test_modules_to_save_are_off_in_the_reference(model_dir, tokenizer, tmp_path):
    policy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_dir),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    policy.base_model.model.lm_head.modules_to_save["default"].weight.data += 0.3
    policy.save_pretrained(tmp_path)
    rows = tokenised(tokenizer, reward_rows(2, 2))
    loaded = ModelSource.of(str(tmp_path)).load_policy("auto")
    with as_reference(loaded):
        reference = completion_logps(loaded, rows, 4)
    assert reference[0] == pytest.approx(
        completion_logps(ModelSource.of(model_dir).load_policy("auto"), rows, 4)[0], abs=1e-4
    )


def test_scores_whole_per_token_and_less_length():
    logratios = [[torch.tensor([0.1, 0.2]), torch.tensor([0.2])], [torch.tensor([-0.3]), torch.tensor([0.1, -0.5])]]
    found = evaluate_implicit(logratios, [[1.0, 0.0], [1.0, 0.0]], beta=0.5)
    assert found.figures["implicit"]["pairs"].mean == 1  # 0.3 > 0.2 and −0.3 > −0.4
    assert found.figures["per token"]["pairs"].mean == 0  # 0.15 < 0.2 and −0.3 < −0.2
    assert found.figures["length"]["pairs"].mean == 0.5
    assert found.figures["implicit"]["gain"].mean == 1
    assert (found.prompts, found.completions, found.pairs, found.like_length) == (2, 4, 2, 0)
    assert (found.random, found.best) == (0.5, 1)
    assert found.less_length["implicit"]["pairs"].mean == 0.5


def test_beta_changes_no_order(adapter_dir, data_file):
    small, large = (implicit(options(data_file, adapter_dir, beta=beta)) for beta in (1e-3, 10.0))
    for name, interval in small.figures["implicit"].items():
        assert interval == pytest.approx(large.figures["implicit"][name], nan_ok=True), name


def test_every_token_in_a_file(adapter_dir, data_file, tokenizer, tmp_path):
    file, output = tmp_path / "sub" / "tokens.jsonl", tmp_path / "figures.json"
    flags = ["--implicit", "--dataset_name", data_file, "--model_name_or_path", adapter_dir, "--beta", "0.5"]
    assert main([*flags, "--token_scores", str(file), "--output", str(output)]) == 0
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [json.loads(line) for line in Path(data_file).read_text().splitlines()]
    assert len(lines) == sum(len(row["rewards"]) for row in rows)
    ratios = token_logratios(adapter_dir, None, tokenised(tokenizer, rows), options(data_file, adapter_dir))
    for line in lines:
        row, k = rows[line["row"]], line["completion"]
        assert line["reward"] == row["rewards"][k]
        text = row["completions"][k][0]["content"]
        assert "".join(line["tokens"]).startswith(text)
        assert line["token_rewards"] == pytest.approx((0.5 * ratios[line["row"]][k]).tolist(), abs=1e-4)
        assert line["implicit_reward"] == pytest.approx(sum(line["token_rewards"]))
    found = json.loads(output.read_text())
    assert found["figures"]["length"]["partial"]["value"] is None  # NaN is no JSON
    assert 0 <= found["figures"]["implicit"]["pairs"]["low"] <= found["figures"]["implicit"]["pairs"]["value"] <= 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["figures.json", "sub", "tokens.jsonl"]


def test_a_file_that_is_half_written_replaces_nothing(tokenizer, tmp_path):
    file = tmp_path / "tokens.jsonl"
    file.write_text("before")
    with pytest.raises(KeyError):
        write_token_scores(str(file), tokenizer, [{"completion_ids": [[5]]}], [[torch.zeros(1)]], 1.0)
    assert file.read_text() == "before"


def test_the_table_fits_a_terminal(adapter_dir, data_file, capsys):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(100, 900, (300, 4), generator=generator).tolist()
    logratios = [[torch.randn(n, generator=generator) for n in row] for row in sizes]
    print_ranking(evaluate_implicit(logratios, torch.randn(300, 4, generator=generator).tolist(), 0.1))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"pairs right, % +\d+\.\d \[\d+, \d+\]", text)
    assert "300 prompts, 1200 completions, 1800 pairs" in text
    assert re.search(r"implicit less length: pairs right [+-]\d+\.\d \[-?\d+, -?\d+\], best-of-K gain ", text)
    print_ranking(implicit(options(data_file, adapter_dir)))
    text = capsys.readouterr().out
    assert "nan" not in text
    assert "…" not in text


def test_the_runs_own_beta_and_quantisation_are_taken(adapter_dir, data_file, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint-4").mkdir(parents=True)
    for file in Path(adapter_dir).iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    (run / "checkpoint-4" / "trainer_state.json").write_text("{}")
    identity = {"beta": 0.25, "alpha": 0.3}
    (run / "checkpoint-4" / "nca_align.json").write_text(json.dumps({"complete": True, "identity": identity}))
    assert run_record(run) == run_record(run / "checkpoint-4") == identity
    assert implicit(options(data_file, str(run))).beta == 0.25
    assert implicit(options(data_file, str(run), beta=0.5)).beta == 0.5
    assert implicit(options(data_file, adapter_dir)).beta == 0.01


def test_rows_are_the_held_out_split_or_all_of_one(data_file, adapter_dir, tmp_path):
    assert len(load_rows(options(data_file, adapter_dir))) == 6
    for name, count in (("train", 4), ("test", 2)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reward_rows(count, 2)))
    assert len(load_rows(options(str(tmp_path), adapter_dir))) == 2
    assert len(load_rows(options(str(tmp_path), adapter_dir, split="train"))) == 4
    held_out = options(data_file, adapter_dir, split="validation", validation_fraction=0.34)
    assert len(load_rows(held_out)) == 2
    (tmp_path / "test.jsonl").rename(tmp_path / "dev.jsonl")
    assert len(load_rows(options(str(tmp_path), adapter_dir, split="dev"))) == 2


def test_another_model_or_beta_reads_the_same_converted_rows(adapter_dir, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    first = load_rows(options(str(pairs), adapter_dir))
    again = load_rows(options(str(pairs), "another", beta=0.5, output=str(tmp_path / "table.json")))
    assert first.cache_files == again.cache_files != []


MISTAKES = {
    "batch": ({"batch_size": 0}, "`batch_size` is 0; it must be at least 1"),
    "beta": ({"beta": 0.0}, "`beta` is 0.0; it must be a finite number above 0"),
    "room": ({"max_length": 8, "max_prompt_length": 8}, "`max_prompt_length` is 8, which leaves no room"),
    "data": ({"preference": "soft"}, "`preference` is 'soft'; it must be one of scores, hard"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_options(name):
    overrides, message = MISTAKES[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        options("x", "m", **overrides)


def test_no_limit_of_length():
    unlimited = options("x", "m", max_length=None)
    assert unlimited.max_prompt_length is None
    assert replace(unlimited, max_length=100).max_prompt_length == 50


def test_a_whole_model_needs_a_reference_of_its_vocabulary(model_dir, data_file, tokenizer, tmp_path, capsys):
    flags = ["--implicit", "--dataset_name", data_file, "--model_name_or_path", model_dir]
    assert main(flags) == 2
    assert f"`reference` is missing. `model_name_or_path` {model_dir} is a whole model" in capsys.readouterr().err
    build_model(tokenizer, vocab_size=500).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert main([*flags, "--reference", str(tmp_path)]) == 2
    assert "has a vocabulary of 500 tokens, but `model_name_or_path`" in capsys.readouterr().err


def test_an_adapter_on_another_model(tokenizer, tmp_path, adapter_dir):
    other = tmp_path / "other"
    build_model(tokenizer, hidden_size=16, intermediate_size=32).save_pretrained(other)
    config = json.loads((Path(adapter_dir) / "adapter_config.json").read_text())
    for name, base, message in (
        ("wrong", str(other), "could not be put on .*other.*Was it trained on that model"),
        ("none", None, "names no `base_model_name_or_path`; write the base model there"),
        ("gone", "/nowhere", "there is no such folder"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(
            (Path(adapter_dir) / "adapter_model.safetensors").read_bytes()
        )
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(UserError, match=message):
            ModelSource.of(str(folder)).load_policy("auto")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("rows_of", [scored_rows, pair_rows])
def test_rows_in_ultrafeedbacks_layouts(rows_of, source, adapter_dir, tmp_path):
    short = tmp_path / "rows.jsonl"
    short.write_text("".join(json.dumps(row) + "\n" for row in rows_of(source)[:12]))
    found = implicit(options(str(short), adapter_dir, max_length=128))
    assert found.prompts == 12
    assert 0 <= found.figures["implicit"]["pairs"].mean <= 1


@pytest.mark.parametrize("source", SOURCES)
def test_length_of_pairs_is_what_a_loop_says(source):
    """The length baseline on UltraFeedback, in characters by hand and by the same figures."""
    rows = [row for row in pair_rows(source) if row["score_chosen"] != row["score_rejected"]]
    lengths = [[len(row["chosen"][-1]["content"]), len(row["rejected"][-1]["content"])] for row in rows]
    logratios = [[torch.zeros(n) for n in pair] for pair in lengths]
    rewards = [[row["score_chosen"], row["score_rejected"]] for row in rows]
    found = evaluate_implicit(logratios, rewards, 1.0)
    right = [(a > b) + 0.5 * (a == b) if x > y else (a < b) + 0.5 * (a == b)
             for (a, b), (x, y) in zip(lengths, rewards, strict=True)]  # fmt: skip
    assert found.figures["length"]["pairs"].mean == pytest.approx(sum(right) / len(right))
    assert found.figures["implicit"]["pairs"].mean == 0.5


def test_the_tokenizer_comes_from_the_base_where_the_adapter_has_none(adapter_dir, tokenizer, tmp_path):
    assert ModelSource.of(adapter_dir).load_tokenizer().get_vocab() == tokenizer.get_vocab()
    for file in Path(adapter_dir).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = AutoTokenizer.from_pretrained(ModelSource.of(adapter_dir).load_tokenizer().name_or_path)
    own.chat_template = "own"
    own.save_pretrained(tmp_path)
    assert ModelSource.of(str(tmp_path)).load_tokenizer().chat_template == "own"
