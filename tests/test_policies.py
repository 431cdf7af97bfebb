"""A policy outside training is the one that was trained, in every mode; what names a model that can't be had."""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import build_model, record_nf4
from nca_align.commands.evaluate import reward_and_kl
from nca_align.commands.evaluate.implicit import ImplicitOptions, token_logratios
from nca_align.commands.evaluate.judges import JudgeOptions, judge
from nca_align.commands.export.command import ExportOptions, export
from nca_align.commands.sample.command import sample
from nca_align.commands.sample.options import SampleOptions
from nca_align.errors import UserError
from nca_align.models import loading as models_loading
from nca_align.models.loading import ModelSource
from nca_align.models.policy import adapter_merged

PREFIX = "base_model.model.model.layers.0.self_attn"


def save_adapter(base: str, folder: Path) -> str:
    """An adapter that changes what the base says, with the tokenizer beside it, as a run's folder has it."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


def sample_options(folder: Path, model: str, **overrides) -> SampleOptions:
    (folder / "prompts.txt").write_text("Hi\n")
    return SampleOptions(
        dataset_name=str(folder / "prompts.txt"), output=str(folder / "samples.jsonl"), model_name_or_path=model,
        num_completions=1, max_new_tokens=2, **overrides,
    )  # fmt: skip


@pytest.mark.parametrize("quantised", [True, False])
def test_a_qlora_run_is_one_model_in_every_mode(quantised, model_dir, tmp_path, monkeypatch):
    """Its base is in 4 bits by the run's record, also as the reference and where it is sampled."""
    run = save_adapter(model_dir, tmp_path / "run")
    if quantised:
        record_nf4(Path(run))
    found: list[bool] = []
    add_adapter = models_loading.add_adapter

    def spy(base, folder):
        found.append(any(type(parameter).__name__ == "Params4bit" for parameter in base.parameters()))
        return add_adapter(base, folder)

    monkeypatch.setattr(models_loading, "add_adapter", spy)
    ModelSource.of(run).load_policy("auto")  # of `--lm_eval`
    # of `--scorer`, and without a mode
    rows = Dataset.from_list([{"prompt": "Hi", "completions": ["the dog", "a fox"], "rewards": [0.0, 1.0]}])
    reward_and_kl.evaluate_samples(rows, run, run, reward_and_kl.EvaluateOptions(["x"], ["x"], "x"))
    implicit = ImplicitOptions(dataset_name="x", model_name_or_path="x")
    token_logratios(run, run, [{"prompt_ids": [5, 6], "completion_ids": [[7, 8]]}], implicit)
    sample(sample_options(tmp_path, run))
    (tmp_path / "questions.jsonl").write_text('{"instruction": "Hi"}\n')
    judge(JudgeOptions(
        judge="alpaca_eval", dataset_name=str(tmp_path / "questions.jsonl"), output=str(tmp_path / "answers.json"),
        model_name_or_path=model_dir, adapter=run, max_new_tokens=2,
    ))  # fmt: skip
    assert found == [quantised] * 6


class TestMerged:
    def policy(self, tokenizer, dtype=torch.float32, **more):
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **more)
        return get_peft_model(build_model(tokenizer).to(dtype), lora).eval()

    @torch.no_grad()
    @pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"use_rslora": True}])
    def test_the_adapter_stands_in_the_weights_and_they_are_put_back_bit_for_bit(self, more, tokenizer):
        policy = self.policy(tokenizer, **more)
        ids = torch.arange(40)[None]
        before, logits = {k: v.clone() for k, v in policy.state_dict().items()}, policy(ids).logits
        layer = policy.get_base_model().model.layers[0].self_attn.q_proj
        with adapter_merged(policy):
            assert layer.merged  # it is on
            assert not torch.equal(layer.base_layer.weight, before[f"{PREFIX}.q_proj.base_layer.weight"])
            torch.testing.assert_close(policy(ids).logits, logits, rtol=1e-4, atol=1e-5)
        assert not layer.merged
        assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
        assert torch.equal(policy(ids).logits, logits)

    def test_they_are_put_back_after_an_error_too(self, tokenizer):
        policy = self.policy(tokenizer)
        before = {k: v.clone() for k, v in policy.state_dict().items()}
        with pytest.raises(KeyError), adapter_merged(policy):
            raise KeyError
        assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())

    def test_where_it_would_round_the_adapter_away_nothing_changes(self, tokenizer):
        half, whole = self.policy(tokenizer, torch.bfloat16), self.policy(tokenizer)
        layers = [own.get_base_model().model.layers[0].self_attn.q_proj for own in (half, whole)]
        with adapter_merged(half):
            assert not layers[0].merged
        with torch.autocast("cpu", torch.bfloat16), adapter_merged(whole):
            assert not layers[1].merged
        with whole.disable_adapter(), adapter_merged(whole):
            assert not layers[1].merged
        with adapter_merged(build_model(tokenizer)):  # no adapter
            pass


class TestWhatNamesTheModel:
    """Each sentence names the option, or the file, that the name came from."""

    @pytest.fixture
    def lost(self, model_dir, tmp_path) -> str:
        """An adapter whose base has a relative path, as seen from another folder."""
        folder = save_adapter(model_dir, tmp_path / "run")
        about = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
        about["base_model_name_or_path"] = "chat"
        (tmp_path / "run" / "adapter_config.json").write_text(json.dumps(about))
        return folder

    @pytest.mark.parametrize("about", ["no JSON", '{"peft_type": "NOPE"}', "[]"])
    def test_an_adapters_config_that_can_not_be_read(self, about, tmp_path):
        (tmp_path / "adapter_config.json").write_text(about)
        with pytest.raises(UserError, match=r"adapter_config.json can't be read as an adapter's \("):
            ModelSource.of(str(tmp_path))

    def test_an_adapters_base(self, lost, tmp_path):
        message = f"`base_model_name_or_path of {lost}/adapter_config.json` chat could not be loaded"
        with pytest.raises(UserError, match=re.escape(message)):
            ModelSource.of(lost).load_policy("auto")
        for own_tokenizer in (True, False):
            with pytest.raises(UserError, match=re.escape(message)):
                sample(sample_options(tmp_path, lost))
            (tmp_path / "run" / "tokenizer_config.json").unlink(missing_ok=True)
            assert own_tokenizer or not models_loading.has_tokenizer(lost)
        with pytest.raises(UserError, match=re.escape(message)):
            ModelSource.of(lost).load_tokenizer()

    def test_the_base_of_an_export(self, lost, tmp_path):
        message = f"`base, by default base_model_name_or_path of {lost}/adapter_config.json` chat could not be loaded"
        with pytest.raises(UserError, match=re.escape(message)):
            export(ExportOptions(lost, str(tmp_path / "out")))
        with pytest.raises(UserError, match=r"^`base` nowhere could not be loaded"):
            export(ExportOptions(lost, str(tmp_path / "out"), base="nowhere"))
        assert not (tmp_path / "out").exists()

    def test_the_reference(self, model_dir, tmp_path):
        rows = Dataset.from_list([{"prompt": "Hi", "completions": ["the dog", "a fox"], "rewards": [0.0, 1.0]}])
        with pytest.raises(UserError, match=r"^`reference` nowhere could not be loaded"):
            reward_and_kl.evaluate_samples(rows, model_dir, "nowhere", reward_and_kl.EvaluateOptions(["x"], ["x"], "x"))
        implicit = ImplicitOptions(dataset_name="x", model_name_or_path="x")
        rows = [{"prompt_ids": [5, 6], "completion_ids": [[7, 8]]}]
        with pytest.raises(UserError, match=r"^`reference` nowhere could not be loaded"):
            token_logratios(model_dir, "nowhere", rows, implicit)
