"""What can't be packed is told why."""

import pytest
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

import tiny_models
from conftest import build_model
from nca_align import NCAConfig
from nca_align.training import layout


@pytest.mark.parametrize(
    ("config", "method"),
    [(PromptTuningConfig, "PROMPT_TUNING"), (PrefixTuningConfig, "PREFIX_TUNING")],
)
def test_virtual_tokens_are_an_obstacle(config, method, model):
    policy = get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert layout.obstacle([policy], None) == f"{method} puts virtual tokens in front of a row"


def test_an_adapter_is_none(model):
    policy = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert layout.obstacle([policy], None) is None


def test_padding_asked_for_is_an_obstacle(model):
    assert layout.obstacle([model], 64) == "`pad_to_multiple_of` 64 asks for padding"
    assert layout.obstacle([model], None) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("LlamaForCausalLM", None),
        ("Lfm2ForCausalLM", "`torch_compile` would compile the pieces of a model with recurrent layers anew"),
        ("DeepseekV32ForCausalLM", "the state of DynamicIndexedLayer can't be passed"),
    ],
)
def test_a_compiled_model_with_recurrent_layers_is_padded(name, reason, tmp_path):
    args = NCAConfig(str(tmp_path), use_cpu=True, bf16=False, torch_compile=True)
    found = layout.obstacle([tiny_models.build(name)], None, args)
    assert found is reason is None or reason in found


def test_policy_and_reference_must_both_do(tokenizer):
    good = build_model(tokenizer)
    config = transformers.BloomConfig(vocab_size=384, hidden_size=32, n_layer=1, n_head=4)
    bad = transformers.BloomForCausalLM(config)
    reason = "BloomForCausalLM does not declare that its attention goes through transformers' AttentionInterface"
    assert layout.obstacle([good, bad], None) == reason
    assert layout.obstacle([bad, good], None) == reason
    assert layout.obstacle([good, good], None) is None
