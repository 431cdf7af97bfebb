"""docs/reference/models.md says what the trainer does: of every class under `make long`, here of one of each kind."""

import dataclasses

import pytest
import torch
import transformers

import model_sweep
from model_sweep import PAGE, Row, WrongNumber, classes, rows_of_page, sweep
from nca_align.batching import attention
from nca_align.training.startup_checks import StartupChecks
from tiny_models import build, tiny_config

SAID = rows_of_page()
VERSION = f"transformers {transformers.__version__} "
same_version = pytest.mark.skipif(VERSION not in PAGE.read_text(), reason="the page is of another transformers")
KINDS = {
    "window": "MistralForCausalLM",
    "window in the mask alone": "PhimoeForCausalLM",
    "sinks": "GptOssForCausalLM",
    "soft caps": "Gemma2ForCausalLM",
    "multi-query": "GPTBigCodeForCausalLM",
    "latent attention": "DeepseekV3ForCausalLM",
    "indexed attention": "DeepseekV32ForCausalLM",
    "chunked attention": "Llama4ForCausalLM",
    "mixture of experts": "Qwen3MoeForCausalLM",
    "gated delta rule and a mixture": "Qwen3_5MoeForCausalLM",
    "decays by channel": "KimiLinearForCausalLM",
    "lightning attention": "BailingHybridForCausalLM",
    "Mamba 2 beside attention": "GraniteMoeHybridForCausalLM",
    "Mamba 2 and attention in one layer": "FalconH1ForCausalLM",
    "Mamba 2 before shared attention": "Zamba2ForCausalLM",
    "Mamba 2, layers that mix no tokens": "NemotronHForCausalLM",
    "Mamba 2 alone": "Mamba2ForCausalLM",
    "convolutions in attention": "ZayaForCausalLM",
    "convolutions": "Lfm2ForCausalLM",
    "Mamba 1": "MambaForCausalLM",
    "states of its own": "MiniMaxForCausalLM",
    "indexed attention beside states": "Qwen4ExpForCausalLM",
    "convolutions and a position bias": "Inkling2ForCausalLM",
    "no kwargs to its attention": "NemotronForCausalLM",
    "no interface": "BloomForCausalLM",
    "scaled hidden states": "InklingForCausalLM",
    "a head of several layers": "BertLMHeadModel",
    "several heads": "MusicgenForCausalLM",
    "multimodal, states": "Qwen3_5ForConditionalGeneration",
    "multimodal": "Qwen3VLMoeForConditionalGeneration",
    "multimodal, scale left out": "AyaVisionForConditionalGeneration",
    "multimodal, kinds of tokens": "Molmo2ForConditionalGeneration",
    "multimodal, both directions": "PaliGemmaForConditionalGeneration",
    "multimodal, images asked for": "IdeficsForVisionText2Text",
}


@same_version
def test_the_page_has_a_row_for_each_class_of_transformers():
    assert SAID.keys() == classes().keys()
    assert PAGE.read_text() == model_sweep.page(SAID)


@same_version
def test_nine_in_ten_are_swept_and_the_others_say_why():
    left = [row for row in SAID.values() if row.layout == "not swept"]
    assert len(left) <= 0.1 * len(SAID)
    for row in SAID.values():
        assert row.layout in model_sweep.MEANING
        assert bool(row.reason) == (row.layout != "shared")


@pytest.mark.slow
@same_version
@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_right_about_one_of_each_kind(kind):
    assert sweep(KINDS[kind]) == SAID[KINDS[kind]]


@pytest.mark.long
@same_version
@pytest.mark.parametrize("name", classes())
def test_the_page_is_right(name):
    assert sweep(name) == SAID[name]


@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", "PhimoeForCausalLM", "Qwen2MoeForCausalLM"])
def test_a_window_that_is_off_by_default_is_kept_or_padded(name):
    row = sweep(name, window=True)
    in_mask = "does not pass its `sliding_window` to its attention"
    assert row == (Row(name, "shared") if name == "Qwen2ForCausalLM" else Row(name, "padded", in_mask))


@pytest.mark.long
@pytest.mark.parametrize("name", classes())
def test_with_a_window_the_numbers_are_the_models_own(name):
    assert sweep(name, window=True).layout in model_sweep.MEANING


# What a sweep would find


def test_wrong_packed_rows_are_found(monkeypatch):
    own = attention.attend_segments
    monkeypatch.setattr(StartupChecks, "check_model", lambda *args, **kwargs: None)
    assert sweep("MistralForCausalLM").layout == "shared"
    monkeypatch.setattr(attention, "attend_segments", lambda *a, **k: own(*a, **(k | {"sliding_window": None})))
    with pytest.raises(WrongNumber, match="prefix_shared: log-probabilities are"):
        sweep("MistralForCausalLM")


def test_wrong_gradients_are_found(monkeypatch):
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 0.5 * grad

    own = attention.attend_segments
    monkeypatch.setattr(StartupChecks, "check_model", lambda *args, **kwargs: None)
    monkeypatch.setattr(attention, "attend_segments", lambda *a, **k: Halved.apply(own(*a, **k)))
    with pytest.raises(WrongNumber, match=r"prefix_shared: the gradient of .* is .* off"):
        sweep("LlamaForCausalLM")


def test_a_wrong_load_balancing_loss_is_found(monkeypatch):
    monkeypatch.setattr(model_sweep, "load_balancing_loss", lambda use: torch.tensor(1.0))
    with pytest.raises(WrongNumber, match="the load-balancing loss is 1, its own 2"):
        sweep("Qwen3MoeForCausalLM")


def test_a_dense_model_of_a_family_of_mixtures_trains(tmp_path):
    """Granite 4.0 Micro: a coefficient of the load-balancing loss, and no experts."""
    dense = {"num_local_experts": 0, "layer_types": ["full_attention"] * 2}
    trainer = model_sweep.make_trainer(build("GraniteMoeHybridForCausalLM", **dense), str(tmp_path))
    assert trainer.aux_loss_enabled
    trainer.train()
    assert "aux_loss" not in trainer.state.log_history[0]


def test_a_tiny_config_has_each_kind_of_layer():
    config = tiny_config(transformers.Qwen3_5TextConfig)
    assert config.layer_types == ["linear_attention", "full_attention"]
    assert config.num_hidden_layers == 2
    assert config.vocab_size == 384
    assert dataclasses.is_dataclass(config)
