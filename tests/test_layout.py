"""The check of the packed row against padded finds what it is there for, and what can't be packed is told why."""

import math

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from conftest import build_model
from nca_align.batching import attention
from nca_align.batching.attention import share_prefixes
from nca_align.batching.collator import RewardCollator
from nca_align.models.logprobs import add_token_logps, forward_chunk, sum_by_completion
from nca_align.training import layout

VOCABULARY = 384
COLLATOR = RewardCollator(pad_token_id=0)
CPU = torch.device("cpu")


def rows() -> list[dict]:
    generator = torch.Generator().manual_seed(0)

    def text(n: int) -> list[int]:
        return torch.randint(4, VOCABULARY, (n,), generator=generator).tolist()

    return [
        {"prompt_ids": text(30), "completion_ids": [text(9), text(14), text(5)], "rewards": [0.0, 1.0, 2.0]},
        {"prompt_ids": text(20), "completion_ids": [text(3), text(11)], "rewards": [0.0, 1.0]},
    ]


def compute_with(model):
    """As the trainer computes them."""

    def compute(chunk, batch):
        token_logps = forward_chunk(model, chunk).token_logps
        return sum_by_completion(token_logps, chunk["completion_index"], batch["rewards"].shape), None

    return compute


def compared(model, policy=None, gradients: bool = True, collator: RewardCollator = COLLATOR) -> tuple[float, float]:
    policy = policy or model
    return layout.compare(rows(), collator, compute_with(policy), policy, CPU, gradients)


def prepared(model):
    add_token_logps(model)
    share_prefixes(model)
    return model


def agrees(difference: tuple[float, float], dtype: torch.dtype = torch.float32) -> bool:
    return layout.judge([difference], "no", dtype)[0]


# Comparing


def test_layouts_that_agree(model):
    logps, grads = compared(prepared(model))
    assert 0 < logps < 1e-5
    assert 0 < grads < 1e-4
    assert agrees((logps, grads))
    assert all(p.grad is None for p in model.parameters())  # nothing is left for the first step


def test_without_gradients(model):
    prepared(model)
    logps, grads = compared(model, gradients=False)
    assert 0 < logps < 1e-5
    assert grads == 0
    enabled = []
    compute = compute_with(model)
    layout.compare(
        rows(), COLLATOR, lambda *args: enabled.append(torch.is_grad_enabled()) or compute(*args), model, CPU, False
    )
    assert enabled == [False, False]  # nor are the activations kept that they would take


def test_chunks_and_the_layout_in_use_do_not_matter(model):
    prepared(model)
    expected = compared(model)
    for collator in (RewardCollator(0, "prefix_shared"), RewardCollator(0, "padded", completions_per_forward=1)):
        assert compared(model, collator=collator) == expected


def test_only_trainable_parameters_are_differentiated(model):
    prepared(model)
    policy = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    logps, grads = compared(model, policy)
    assert 0 < grads < 1e-4
    assert agrees((logps, grads))


def test_a_model_that_ignores_segments_is_found(model, monkeypatch):
    prepared(model)
    causal = torch.nn.functional.scaled_dot_product_attention

    def one_causal_row(query, key, value, segments, scaling=None, **kwargs):
        return causal(query, key, value, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(attention, "attend_segments", one_causal_row)
    difference = compared(model)
    assert difference[0] > 1e-2
    assert difference[1] > 1e-2
    assert not agrees(difference)
    assert not agrees(difference, torch.bfloat16)


def test_a_family_that_drops_the_segments_on_the_way_is_found():
    """Nemotron's layers hand no keyword on to their attention."""
    torch.manual_seed(0)
    config = transformers.NemotronConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    assert not agrees(compared(prepared(transformers.NemotronForCausalLM(config).eval())))


def test_convolutions_show_in_the_gradients(monkeypatch):
    """LFM2 mixes neighbours of the row outside attention: forced through, its gradients tell most."""
    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], initializer_range=0.1, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.Lfm2ForCausalLM(config).eval()
    assert attention.prefix_sharing_obstacle(model) is not None
    monkeypatch.setattr(attention, "prefix_sharing_obstacle", lambda model: None)
    logps, grads = compared(prepared(model))
    assert grads > 0.05
    assert grads > 20 * logps
    assert not agrees((logps, grads))


def test_a_gradient_that_only_the_packed_row_has_is_a_difference():
    weight = torch.nn.Parameter(torch.ones(()))

    def compute(chunk, batch):
        packed = "segments" in chunk
        return -torch.ones_like(batch["rewards"]) + (weight - 1 if packed else 0.0 * weight), None

    policy = torch.nn.Module()
    policy.weight = weight
    assert layout.compare(rows(), COLLATOR, compute, policy, CPU, True) == (0.0, pytest.approx(6.0))  # the weights' sum


def test_nan_is_a_difference(model):
    prepared(model)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    difference = compared(model)
    assert math.isnan(difference[0])
    assert not agrees(difference)


# Judging


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_allowed_to_round_more(precision, dtype):
    logps, grads = (1e-4, 1e-3) if precision == "no" and dtype == torch.float32 else (2e-2, 1e-1)

    def judged(*difference: float) -> bool:
        return layout.judge([difference], precision, dtype)[0]

    assert judged(0.99 * logps, 0.99 * grads)
    assert not judged(1.01 * logps, 0.0)
    assert not judged(0.0, 1.01 * grads)


def test_a_quantised_model_computes_in_a_dtype_of_its_own():
    assert layout.judge([(1e-2, 1e-2)], "no", torch.float32, torch.bfloat16)[0]
    assert not layout.judge([(1e-2, 1e-2)], "no", torch.float32, None)[0]


@pytest.mark.parametrize(
    ("backend", "rounded"),
    [(torch.backends, "tf32"), (torch.backends.cuda.matmul, "tf32"), (torch.backends.mkldnn.matmul, "bf16")],
)
def test_products_of_float32_may_be_rounded_by_a_setting(backend, rounded):
    before = backend.fp32_precision
    assert not layout.judge([(1e-2, 1e-2)], "no", torch.float32)[0]
    backend.fp32_precision = rounded  # `tf32` of TrainingArguments is the first
    try:
        assert layout.judge([(1e-2, 1e-2)], "no", torch.float32)[0]
    finally:
        backend.fp32_precision = before


@pytest.mark.parametrize("wrong", [(1.0, 0.0), (0.0, 1.0), (math.nan, 0.0), (0.0, math.nan), (math.inf, 0.0)])
@pytest.mark.parametrize("process", [0, 1, 2])
def test_one_process_that_disagrees_decides_for_all(process, wrong):
    differences = [(1e-6, 1e-5)] * 3
    agrees, figures = layout.judge(differences, "no", torch.float32)
    assert agrees
    assert figures == "log-probabilities within 1.0e-06, gradients within 1.0e-05, relative"
    differences[process] = wrong
    agrees, figures = layout.judge(differences, "bf16", torch.float32)
    assert not agrees
    assert f"{max(wrong, key=lambda x: x != 0):.1e}" in figures


# Sample rows and obstacles


@pytest.mark.parametrize("number", [1, 2, 5])
def test_sample_rows_are_the_first_two_and_small(number):
    long = [
        {
            "prompt_ids": list(range(100)),
            "completion_ids": [[k] * 100 for k in range(5)],
            "rewards": [0.0, 1.0, 2.0, 3.0, 4.0],
            "ref_logps": [-1.0] * 5,
        }
    ] * number
    sample = layout.sample_rows(iter(long))
    assert len(sample) == min(number, 2)
    for row in sample:
        assert row == {
            "prompt_ids": list(range(36, 100)),  # its end, where the completions go on
            "completion_ids": [[k] * 48 for k in range(3)],
            "rewards": [0.0, 1.0, 2.0],
        }
    small = rows()
    assert layout.sample_rows(small) == small


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


def test_policy_and_reference_must_both_do(tokenizer):
    good = build_model(tokenizer)
    config = transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
    bad = transformers.BloomForCausalLM(config)
    reason = "BloomForCausalLM does not route its attention through transformers' AttentionInterface"
    assert layout.obstacle([good, bad], None) == reason
    assert layout.obstacle([bad, good], None) == reason
    assert layout.obstacle([good, good], None) is None
