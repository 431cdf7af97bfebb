"""`nca-align evaluate`: mean reward and KL of a policy's own samples, against plain forwards in float64."""

import json
import math
import re
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from conftest import build_model, build_tokenizer, reward_rows
from nca_align.commands.evaluate import generate_and_score, reward_and_kl
from nca_align.commands.evaluate.command import MODES, main
from nca_align.commands.evaluate.generate_and_score import GenerationOptions, difference_of_means, evaluate_generations
from nca_align.commands.evaluate.reward_and_kl import (
    EvaluateOptions,
    end_token,
    evaluate,
    evaluate_samples,
    load_samples,
    print_policies,
    sampled_ids,
)
from nca_align.commands.sample.command import sample
from nca_align.commands.sample.options import SampleOptions
from nca_align.commands.score import ScoreOptions, score
from nca_align.errors import UserError
from nca_align.evaluation.evaluator import distinct, over_common_prompts, rewards_by_prompt, win_rate
from nca_align.evaluation.intervals import UNKNOWN, mean_over_prompts
from nca_align.models.loading import ModelSource
from nca_align.models.logprobs import completion_logps
from test_scoring import rewards_model


@pytest.fixture(scope="module")
def adapter_dir(model_dir, tmp_path_factory) -> str:
    """An adapter that changes the tiny model, with the tokenizer beside it, as a run's folder has it."""
    from transformers import AutoTokenizer

    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), LoraConfig(r=4, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def samples(model_dir, adapter_dir, tmp_path_factory):
    """Scored samples of the adapter, and of the bare model."""
    folder = tmp_path_factory.mktemp("samples")
    (folder / "prompts.txt").write_text("Hi\nWhat is the best way?\nThe weather?\nWhy?\n")
    files = []
    for i, policy in enumerate((adapter_dir, model_dir)):
        file = str(folder / f"{i}.jsonl")
        sample(SampleOptions(
            dataset_name=str(folder / "prompts.txt"), output=file, model_name_or_path=policy, num_completions=3,
            max_new_tokens=6,
        ))  # fmt: skip
        score(ScoreOptions(file, file.replace(".jsonl", "-scored.jsonl"), ["nca_align.scorers:vader"]))
        files.append(file.replace(".jsonl", "-scored.jsonl"))
    return files


def options(samples, policies, reference, **overrides) -> EvaluateOptions:
    return EvaluateOptions(samples, policies, reference, **overrides)


def alone(model, prompt: list[int], completion: list[int]) -> float:
    """log π of one completion, by a plain forward in float64."""
    with torch.inference_mode():
        logits = model.double()(torch.tensor([prompt + completion])).logits[0, :-1].log_softmax(-1)
    targets = torch.tensor(prompt + completion)[1:]
    return float(logits.gather(1, targets[:, None])[len(prompt) - 1 :].sum())


def test_log_probabilities_equal_plain_forwards(model_dir, adapter_dir, tokenizer):
    rows = [sampled_ids(tokenizer, row, tokenizer.eos_token_id) for row in reward_rows(5, [3, 2])]
    for folder in (model_dir, adapter_dir):
        found = completion_logps(ModelSource.of(folder).load_policy("auto"), rows, batch_size=4)
        whole = completion_logps(ModelSource.of(folder).load_policy("auto"), rows, batch_size=100)
        plain = AutoModelForCausalLM.from_pretrained(folder)
        for row, logps, again in zip(rows, found, whole, strict=True):
            expected = [alone(plain, row["prompt_ids"], ids) for ids in row["completion_ids"]]
            assert logps == pytest.approx(expected, abs=1e-4)
            assert again == pytest.approx(expected, abs=1e-4)


def test_what_was_drawn_is_what_is_counted(tokenizer):
    row = {
        "prompt": [{"role": "user", "content": "Hi"}], "rewards": [0.0, 1.0], "truncated": [True, False],
        "completions": [[{"role": "assistant", "content": text}] for text in ("the dog", "the fox")],
    }  # fmt: skip
    end = tokenizer.eos_token_id
    ids = sampled_ids(tokenizer, row, end)
    assert tokenizer.decode(ids["prompt_ids"]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(c) for c in ids["completion_ids"]] == ["the dog", "the fox<|im_end|>"]
    del row["truncated"]
    assert sampled_ids(tokenizer, row, 7)["completion_ids"][0][-1] == 7
    empty = {"prompt": "Hi", "completions": ["", "b"], "rewards": [0.0, 1.0], "truncated": [True, True]}
    assert sampled_ids(tokenizer, empty, end)["completion_ids"][0] == [end]  # something must be scored


class TestEnd:
    """The token by which a completion ends is one of the generation config's, which need not be the tokenizer's EOS."""

    @pytest.fixture
    def tokens(self, tokenizer):
        return {name: tokenizer.convert_tokens_to_ids(name) for name in ("<pad>", "<s>", "<|im_end|>")}

    def test_of_one_it_is_that(self, model, tokenizer, tokens):
        assert end_token(model, tokenizer, chat=True) == tokenizer.eos_token_id
        model.generation_config.eos_token_id = tokens["<s>"]
        assert end_token(model, tokenizer, chat=True) == end_token(model, tokenizer, chat=False) == tokens["<s>"]
        model.generation_config.eos_token_id = None
        assert end_token(model, tokenizer, chat=True) == tokenizer.eos_token_id

    def test_of_several_a_chat_has_the_templates_and_text_the_tokenizers(self, model, tokens):
        """As Gemma has it: the tokenizer's EOS ends a text, and a turn ends by another token."""
        other = build_tokenizer()
        other.eos_token = "<s>"
        model.generation_config.eos_token_id = [tokens["<s>"], tokens["<|im_end|>"]]
        assert end_token(model, other, chat=True) == tokens["<|im_end|>"]
        assert end_token(model, other, chat=False) == tokens["<s>"]

    def test_of_several_without_a_better_reason_the_first(self, model, tokenizer, tokens):
        model.generation_config.eos_token_id = [tokens["<s>"], tokens["<pad>"]]
        assert end_token(model, tokenizer, chat=True) == end_token(model, tokenizer, chat=False) == tokens["<s>"]

    def test_it_is_what_sampling_stopped_at(self, tokenizer, tmp_path):
        """A policy that ends at once, by a token that is not its tokenizer's EOS."""
        policy = build_model(tokenizer)
        end = tokenizer.convert_tokens_to_ids("<s>")
        policy.generation_config.eos_token_id = [end]
        with torch.no_grad():
            policy.lm_head.weight[end] *= 3
        policy.save_pretrained(tmp_path / "policy")
        tokenizer.save_pretrained(tmp_path / "policy")
        (tmp_path / "prompts.txt").write_text("Hi\nWhy?\nThe weather?\nWhat?\n")
        name, output = str(tmp_path / "policy"), str(tmp_path / "out.jsonl")
        sample(SampleOptions(
            dataset_name=str(tmp_path / "prompts.txt"), output=output, model_name_or_path=name, num_completions=20,
            max_new_tokens=40,
        ))  # fmt: skip
        file = output.replace("out", "scored")
        score(ScoreOptions(output, file, ["nca_align.scorers:vader"]))
        rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
        assert not all(cut for row in rows for cut in row["truncated"])
        seen = []

        def noting(tokenizer, row, end):
            seen.append(end)
            return sampled_ids(tokenizer, row, end)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reward_and_kl, "sampled_ids", noting)
            evaluate(options([file], [name], name))
        assert set(seen) == {end}
        assert end != tokenizer.eos_token_id


def test_mean_over_prompts_and_its_error():
    values = [[1.0, 3.0], [5.0], [0.0, 0.0, 0.0]]
    mean, error = mean_over_prompts(values)
    assert mean == pytest.approx(7 / 3)
    variance = sum((m - 7 / 3) ** 2 for m in (2, 5, 0)) / 2
    assert error == pytest.approx(math.sqrt(variance / 3))
    assert math.isnan(mean_over_prompts([[1.0]]).error)


def test_a_model_is_no_nat_from_itself_and_an_adapter_its_log_ratio(samples, model_dir, adapter_dir, tokenizer):
    lines = evaluate(options(samples, [adapter_dir, model_dir], model_dir))
    assert lines[1].kl == (0, 0)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in (adapter_dir, model_dir))
    ratios, rewards = [], []
    for row in map(json.loads, Path(samples[0]).read_text().splitlines()):
        ids = sampled_ids(tokenizer, row, tokenizer.eos_token_id)
        pairs = [(ids["prompt_ids"], completion) for completion in ids["completion_ids"]]
        ratios.append([alone(policy, *pair) - alone(reference, *pair) for pair in pairs])
        rewards.append(row["rewards"])
    assert lines[0].kl == pytest.approx(mean_over_prompts(ratios), abs=1e-4)
    assert lines[0].reward == pytest.approx(mean_over_prompts(rewards))
    assert (lines[0].prompts, lines[0].completions) == (4, 12)


def test_wins_diversity_and_length_are_of_the_same_samples(samples, model_dir, adapter_dir, tokenizer):
    lines = evaluate(options(samples, [adapter_dir, model_dir], model_dir))
    own, reference = ([json.loads(line) for line in Path(file).read_text().splitlines()] for file in samples)
    wins, _ = over_common_prompts(win_rate, rewards_by_prompt(own), rewards_by_prompt(reference))
    assert lines[0].win_rate == wins
    assert lines[0].win_rate.mean == mean_over_prompts(
        [sum((a > b) + (a == b) / 2 for a in x["rewards"] for b in y["rewards"]) / 9]
        for x, y in zip(own, reference, strict=True)
    ).mean  # fmt: skip
    assert lines[1].win_rate == (0.5, 0)
    texts = [completion for row in own for completion in row["completions"]]
    texts = [text if isinstance(text, str) else text[0]["content"] for text in texts]
    assert (lines[0].distinct_1, lines[0].distinct_2) == (distinct(texts, 1), distinct(texts, 2))
    assert lines[0].cut == sum(cut for row in own for cut in row["truncated"]) / 12
    ids = [sampled_ids(tokenizer, row, tokenizer.eos_token_id)["completion_ids"] for row in own]
    assert lines[0].tokens == mean_over_prompts([len(one) for one in row] for row in ids)
    (alone,) = evaluate(options(samples[:1], [adapter_dir], model_dir))
    assert math.isnan(alone.win_rate.mean)  # the reference's samples aren't there


def test_the_estimate_is_the_kl_divergence(tokenizer):
    """One token drawn from π many times: the mean log-ratio is the sum over the vocabulary."""
    policy, reference = (build_model(tokenizer, seed) for seed in (0, 1))
    prompt = tokenizer("What is", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        p, q = (model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1) for model in (policy, reference))
    exact = float((p.exp() * (p - q)).sum())
    drawn = torch.multinomial(p.exp(), 4000, replacement=True, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"prompt_ids": prompt, "completion_ids": [[token] for token in drawn]}]
    a, b = (completion_logps(model, rows, 2000) for model in (policy, reference))
    mean, error = mean_over_prompts([[x - y] for x, y in zip(a[0], b[0], strict=True)])
    assert abs(mean - exact) < 4 * error < 0.5 * exact


def test_lines_that_are_there_are_not_computed_again(samples, model_dir, adapter_dir, tmp_path, monkeypatch):
    output = str(tmp_path / "table.json")
    first = evaluate(options(samples[:1], [adapter_dir], model_dir, output=output))

    def once(dataset, policy, *args):
        assert policy == model_dir
        return evaluate_samples(dataset, policy, *args)

    monkeypatch.setattr(reward_and_kl, "evaluate_samples", once)
    both = evaluate(options(samples, [adapter_dir, model_dir], model_dir, output=output))
    assert [replace(both[0], win_rate=UNKNOWN)] == first
    assert not math.isnan(both[0].win_rate.mean)  # the reference's samples are here now
    monkeypatch.setattr(reward_and_kl, "evaluate_samples", None)
    assert evaluate(options(samples, [adapter_dir, model_dir], model_dir, output=output)) == both
    assert evaluate(options(samples[:1] * 2, [adapter_dir] * 2, model_dir, output=output)) == first * 2
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


def test_the_table_fits_a_terminal(samples, model_dir, adapter_dir, capsys):
    flags = [part for i, policy in enumerate((adapter_dir, model_dir))
             for part in ("--dataset_name", samples[i], "--model_name_or_path", policy)]  # fmt: skip
    assert main([*flags, "--reference", model_dir]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"tiny-model\d+ +\d+ +-?\d\.\d{3} ± \d\.\d{3} +0\.00 ± 0\.00 +50 ± 0 +\d\.\d\d\n", text)
    assert text.endswith("\n12 answers to 4 prompts\n")


def test_the_table_says_what_differs_and_what_is_not_known(samples, model_dir, adapter_dir, tmp_path, capsys):
    (tmp_path / "two.jsonl").write_text("".join(Path(samples[0]).read_text().splitlines(keepends=True)[:2]))
    lines = evaluate(options([str(tmp_path / "two.jsonl"), samples[0]], [adapter_dir] * 2, model_dir))
    print_policies([replace(lines[0], policy="two"), replace(lines[1], policy="four")])
    text = capsys.readouterr().out
    assert re.search(r"^two .+ – +\d\.\d\d$", text, re.M)
    assert "two: 6 answers to 2 prompts\nfour: 12 answers to 4 prompts\n" in text


MISTAKES = {
    "policies": ({"model_name_or_path": []}, "`dataset_name` is given 1 times and `model_name_or_path` 0 times"),
    "nothing": ({"dataset_name": [], "model_name_or_path": []}, "`dataset_name` is missing; give a file of samples"),
    "batch": ({"batch_size": 0}, "`batch_size` is 0; it must be at least 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_options(name):
    overrides, message = MISTAKES[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        EvaluateOptions(**({"dataset_name": ["x"], "model_name_or_path": ["m"], "reference": "m"} | overrides))


def test_samples_of_another_model_are_refused(samples, model_dir):
    with pytest.raises(UserError, match=r"0-scored.jsonl was sampled from \S+adapter\S*, whose .*. Name the model"):
        load_samples(samples[0], model_dir)


def test_samples_at_another_temperature_are_refused(samples, model_dir, tmp_path):
    for name, value in (("temperature", 0.7), ("top_p", 0.9)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text(Path(samples[1]).read_text())
        made = json.loads(Path(samples[1] + ".meta.json").read_text())
        made[0]["config"][name] = value
        (tmp_path / f"{name}.jsonl.meta.json").write_text(json.dumps(made))
        with pytest.raises(UserError, match=rf"sampled at .*`{name}` {value}"):
            load_samples(str(file), model_dir)


@pytest.mark.parametrize(("flag", "value"), [("stop", ["e"]), ("duplicates", "remove")])
def test_samples_that_are_not_as_they_were_drawn_are_refused(flag, value, model_dir, tmp_path):
    (tmp_path / "prompts.txt").write_text("Hi\nWhy?\n")
    made, scored = str(tmp_path / "made.jsonl"), str(tmp_path / "scored.jsonl")
    sample(SampleOptions(
        dataset_name=str(tmp_path / "prompts.txt"), output=made, model_name_or_path=model_dir, num_completions=3,
        max_new_tokens=6, **{flag: value},
    ))  # fmt: skip
    score(ScoreOptions(made, scored, ["nca_align.scorers:vader"]))
    message = f"scored.jsonl was sampled with `{flag}` {value!r}. A policy's KL needs its samples as it drew them"
    with pytest.raises(UserError, match=re.escape(message)):
        load_samples(scored, model_dir)


OUTPUTS = {
    "no folder": ("nofolder/t.json", None, "whose folder does not exist; make it"),
    "a folder": (".", None, "which holds no table of `nca-align evaluate`"),
    "a list": ("t.json", "[1]", "which holds no table of `nca-align evaluate`; choose another file"),
    "broken": ("t.json", "{", "which holds no table"),
    "something else": ("t.json", '{"pairs": {"share": 1}}', "which holds no table"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_can_hold_no_table_is_refused_before_the_work(name, samples, model_dir, tmp_path, capsys):
    place, content, message = OUTPUTS[name]
    file = tmp_path / place
    if content is not None:
        file.write_text(content)
    flags = ["--dataset_name", samples[1], "--model_name_or_path", model_dir, "--reference", model_dir]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_and_kl, "evaluate_samples", lambda *args: pytest.fail("computed before it looked"))
        assert main([*flags, "--output", str(file)]) == 2
    assert message in capsys.readouterr().err
    if content is not None:
        assert file.read_text() == content


def test_samples_without_rewards_are_refused(tmp_path):
    Dataset.from_list([{"prompt": "a", "completions": ["b"]}]).to_json(str(tmp_path / "rows.jsonl"))
    with pytest.raises(UserError, match="has no column `rewards`; give what `nca-align score` wrote"):
        load_samples(str(tmp_path / "rows.jsonl"), "m")


def test_a_model_that_is_not_there(samples, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(Path(samples[0]).read_text())  # without its record
    flags = ["--dataset_name", str(file), "--model_name_or_path", "/nowhere", "--reference", "/nowhere"]
    assert main(flags) == 2
    assert "there is no such folder" in capsys.readouterr().err


def generation_options(folder, model_dir, adapter_dir, **overrides) -> GenerationOptions:
    (folder / "held_out.txt").write_text("Hi\nWhat is the best way?\nThe weather?\nWhy?\n")
    given = {
        "scorer": ["nca_align.scorers:vader"], "dataset_name": str(folder / "held_out.txt"), "reference": model_dir,
        "model_name_or_path": [adapter_dir], "output": str(folder / "out"), "num_completions": 3, "max_new_tokens": 6,
    }  # fmt: skip
    return GenerationOptions(**(given | overrides))


def test_base_and_aligned_answer_and_are_compared(model_dir, adapter_dir, tmp_path, capsys, monkeypatch):
    lines = evaluate_generations(generation_options(tmp_path, model_dir, adapter_dir))
    base, aligned = lines
    assert base.kl == (0, 0)
    assert aligned.kl.mean != 0
    assert base.win_rate == (0.5, 0)
    assert 0 <= aligned.win_rate.mean <= 1  # not NaN: the base's answers are here
    assert (base.prompts, base.completions, aligned.prompts) == (4, 12, 4)
    text = capsys.readouterr().out
    rewards = [
        [row["rewards"] for row in map(json.loads, (tmp_path / "out" / name).read_text().splitlines())]
        for name in (f"0-{Path(model_dir).name}.jsonl", f"1-{Path(adapter_dir).name}.jsonl")
    ]
    assert [line.reward.mean for line in lines] == pytest.approx([mean_over_prompts(rows).mean for rows in rewards])
    paired = [sum(b) / len(b) - sum(a) / len(a) for a, b in zip(*rewards, strict=True)]
    mean = sum(paired) / 4
    error = math.sqrt(sum((value - mean) ** 2 for value in paired) / 3 / 4)
    assert f"less {base.policy}: {mean:+.3f} ± {error:.3f}, on the same 4 prompts" in text
    monkeypatch.setattr(reward_and_kl, "evaluate_samples", None)  # the same command again computes nothing anew
    assert evaluate_generations(generation_options(tmp_path, model_dir, adapter_dir)) == lines


def test_of_several_splits_the_held_out_one_is_answered(model_dir, adapter_dir, tmp_path, capsys):
    splits = {"train": ["Hi", "Why?", "How?"], "test": ["When?", "Where?"]}
    data = DatasetDict({name: Dataset.from_dict({"prompt": prompts}) for name, prompts in splits.items()})
    data.save_to_disk(tmp_path / "data")
    options = {"dataset_name": str(tmp_path / "data"), "num_completions": 1}
    lines = evaluate_generations(generation_options(tmp_path, model_dir, adapter_dir, **options))
    assert [line.prompts for line in lines] == [2, 2]
    assert f"Prompts of {tmp_path / 'data'}, split test" in capsys.readouterr().err
    own = generation_options(tmp_path, model_dir, adapter_dir, **options, split="train", output=str(tmp_path / "own"))
    assert evaluate_generations(own)[0].prompts == 3


@pytest.mark.parametrize(
    ("scorers", "message"),
    [
        ({"scorer": ["a:b", "c:d"], "scorer_weights": [1.0]}, "has 1 values for 2 scorers"),
        ({"scorer": ["nca_align.scorers:nothing"]}, "nothing"),
        ({"scorer": ["pipeline:/no/classifier:GOOD"]}, "`scorer` is '/no/classifier', and there is no such folder"),
        ({"scorer": ["./no-reward-model"]}, "`scorer` is './no-reward-model', and there is no such folder"),
    ],
)
def test_scorers_are_looked_at_before_any_model_answers(
    scorers, message, model_dir, adapter_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(generate_and_score, "sample", lambda *_: pytest.fail("a model answered"))
    with pytest.raises((UserError, ValueError), match=message):
        evaluate_generations(generation_options(tmp_path, model_dir, adapter_dir, **scorers))


@pytest.mark.parametrize(("form", "message"), [("pipeline:{}:GOOD", "and not 'GOOD'"), ("{}", "has 3 outputs")])
def test_a_scorers_outputs_are_too(form, message, model_dir, adapter_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(generate_and_score, "sample", lambda *_: pytest.fail("a model answered"))
    name, _, _ = rewards_model(tmp_path, "classifier", num_labels=3)
    with pytest.raises(UserError, match=message):
        evaluate_generations(generation_options(tmp_path, model_dir, adapter_dir, scorer=[form.format(name)]))


def test_a_reference_of_another_vocabulary_is_refused(
    samples, model_dir, adapter_dir, tokenizer, tmp_path, monkeypatch
):
    build_model(tokenizer, vocab_size=500).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    message = "`reference` .*other has a vocabulary of 500 tokens, but `model_name_or_path`"
    with pytest.raises(UserError, match=message):
        evaluate(options(samples, [adapter_dir, model_dir], str(tmp_path / "other")))
    monkeypatch.setattr(generate_and_score, "sample", lambda _: pytest.fail("answered before it looked"))
    with pytest.raises(UserError, match=message):
        evaluate_generations(generation_options(tmp_path, str(tmp_path / "other"), adapter_dir))


def test_another_number_of_answers_in_the_same_folder_is_refused(model_dir, adapter_dir, tmp_path):
    evaluate_generations(generation_options(tmp_path, model_dir, adapter_dir))
    with pytest.raises(UserError, match="num_completions"):
        evaluate_generations(generation_options(tmp_path, model_dir, adapter_dir, num_completions=2))


def test_differences_are_over_the_prompts_that_both_answered():
    own, reference = {"a": [1.0, 2.0], "b": [4.0], "c": [9.0]}, {"a": [1.0], "b": [1.0]}
    difference, prompts = over_common_prompts(difference_of_means, own, reference)
    assert (difference.mean, prompts) == (1.75, 2)
    assert difference.error == pytest.approx(1.25)


class TestModes:
    def test_every_mode_has_its_options_and_its_function(self):
        for name, (module, options_name, function, _) in MODES.items():
            mode = import_module(f"nca_align.commands.evaluate.{module}")
            assert name in {field.name for field in fields(getattr(mode, options_name))}
            assert callable(getattr(mode, function))

    @pytest.mark.parametrize("name", MODES)
    def test_a_flag_or_the_file_chooses_one(self, name, tmp_path, capsys):
        (tmp_path / "o.yaml").write_text(f"{name}: x\nnowhere: 1")
        assert main(["--config", str(tmp_path / "o.yaml")]) == 2
        assert "unknown key `nowhere`" in capsys.readouterr().err
        with pytest.raises(SystemExit) as stop:
            main([f"--{name}", "--help"])
        assert stop.value.code == 0
        assert f"nca-align evaluate --{name}" in capsys.readouterr().out

    def test_two_at_once_are_refused(self, capsys):
        assert main(["--implicit", "--scorer", "x"]) == 2
        assert "`scorer` and `implicit` are two evaluations; give one of them at a time" in capsys.readouterr().err

    def test_help_lists_them(self, capsys):
        for flag in ("-h", "--help"):
            with pytest.raises(SystemExit):
                main([flag])
            text = capsys.readouterr().out
            assert all(f"--{name}" in text for name in MODES)
            assert "--reference" in text

    def test_a_mode_that_the_file_turns_off_is_not_chosen(self, tmp_path, capsys):
        (tmp_path / "o.yaml").write_text("implicit: false")
        assert main(["--config", str(tmp_path / "o.yaml")]) == 2
        assert "unknown key `implicit`" in capsys.readouterr().err  # of the plain table, which has no such option
