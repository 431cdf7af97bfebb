"""The packed row gives what padded gives and each conversation gives alone: log-probabilities and gradients.

Alone means the model's own forward with its own attention, logits and log-softmax, before anything is patched.
"""

import copy
import functools
import inspect
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import build_model
from nca_align.batching import attention
from nca_align.batching.attention import Segments, attend_segments, prefix_sharing_obstacle, share_prefixes
from nca_align.batching.collator import RewardCollator
from nca_align.models.logprobs import add_token_logps

WINDOW = 7
VOCABULARY = 64
TINY = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 16}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": WINDOW},
    "Mixtral": {"num_experts_per_tok": 2, "num_local_experts": 4, "sliding_window": WINDOW},
    "Qwen2": {"use_sliding_window": True, **MIXED},
    "Qwen3": {"head_dim": 8},
    "Qwen3Moe": {"head_dim": 8, **EXPERTS},
    "Gemma2": {
        "head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 8.0,
        **MIXED,
    },
    "Gemma3Text": {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 8.0, **MIXED},
    "Phi3": {"sliding_window": WINDOW, "resid_pdrop": 0.0},
    "GPT2": {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "GptOss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **MIXED},
    "Olmo2": {},
    "Cohere2": {"logit_scale": 0.5, "head_dim": 8, **MIXED},
    "Granite": {"logits_scaling": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 3.0},
    "SmolLM3": {"no_rope_layers": [1, 0], "use_sliding_window": True, **MIXED},
    "GPTNeoX": {"rotary_pct": 0.5, "hidden_dropout": 0.0},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "Glm4": {"head_dim": 8},
    "DeepseekV3": {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 12, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    },
}  # fmt: skip
MODEL_NAMES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM", "Llama4Text": "Llama4ForCausalLM"}


def build(family: str, attn_implementation: str | None = None, device: str = "cpu", **overrides):
    """A random model whose every parameter matters: none of its vectors is all zeros or ones."""
    config_class = getattr(transformers, f"{family}Config")
    known = set(inspect.signature(config_class).parameters)
    config = config_class(**{k: v for k, v in TINY.items() if k in known} | FAMILIES.get(family, {}) | overrides)
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(transformers, MODEL_NAMES.get(family, f"{family}ForCausalLM"))._from_config(
            config, attn_implementation=attn_implementation
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def token_rows() -> list[dict]:
    """Two prompts and a longer conversation: ragged, with shared beginnings, equals, and one-token completions."""
    generator = torch.Generator().manual_seed(0)

    def text(n: int) -> list[int]:
        return torch.randint(5, VOCABULARY, (n,), generator=generator).tolist()

    prompt, turn, other, answer = text(20), text(18), text(19), text(12)
    rows = [
        (prompt, [turn + text(9), turn + text(15), answer, answer, turn, answer[:1], other + text(8), other + text(5)]),
        (text(9), [text(14), text(1)]),
        (prompt + turn + text(4), [text(6), text(11), text(3)]),
    ]
    return [{"prompt_ids": p, "completion_ids": c, "rewards": [0.0] * len(c)} for p, c in rows]


ROWS = token_rows()
CONVERSATIONS = [(r["prompt_ids"], c) for r in ROWS for c in r["completion_ids"]]
WEIGHTS = torch.linspace(0.5, 1.5, len(CONVERSATIONS))


def batch_of(layout: str, **options) -> dict:
    return RewardCollator(0, layout, **options)(ROWS)


def forward(model, chunk: dict, **kwargs):
    names = ("input_ids", "attention_mask", "position_ids", "segments", "token_index", "target_ids")
    inputs = {name: chunk[name] for name in names if name in chunk}
    return model(**inputs, row_length=chunk["input_ids"].shape[1], **kwargs)


def together(model, layout: str, **options) -> torch.Tensor:
    """(conversations,) log-probabilities from a batch."""
    batch = batch_of(layout, **options)
    logps = torch.zeros(batch["valid"].numel(), dtype=torch.float64)
    for chunk in batch["chunks"]:
        logps = logps.index_add(0, chunk["completion_index"], forward(model, chunk).token_logps.double())
    return logps.view(batch["valid"].shape)[batch["valid"]]


def alone(model) -> torch.Tensor:
    """(conversations,) log-probabilities from the model's own forward, one conversation at a time."""
    logps = []
    for prompt, completion in CONVERSATIONS:
        ids = torch.tensor([prompt + completion])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
        logps.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(logps)


def with_gradients(model, logps: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    (WEIGHTS * logps).sum().backward()
    grads = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters() if p.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return logps.detach(), grads


def assert_same(found, expected, logps_tolerance: float = 1e-5, grads_tolerance: float = 1e-4) -> None:
    """Each log-probability, and each parameter's gradient by its norm.

    Some gradients are zero but for rounding (a key's bias shifts all scores alike), so that a parameter's norm counts
    as at least a thousandth of the norm of all.
    """
    torch.testing.assert_close(found[0], expected[0], rtol=logps_tolerance, atol=0)
    assert found[1].keys() == expected[1].keys()
    whole = math.sqrt(sum(float(g.double().square().sum()) for g in expected[1].values()))
    assert whole > 0
    for name, grad in expected[1].items():
        difference = float((found[1][name].double() - grad.double()).norm())
        allowed = grads_tolerance * max(float(grad.double().norm()), 1e-3 * whole)
        assert difference <= allowed, f"{name}: {difference:.1e} apart, {allowed:.1e} allowed"


@dataclass
class Case:
    """A model as it is for good after `share_prefixes`, and what it gave before."""

    model: torch.nn.Module
    alone: tuple[torch.Tensor, dict[str, torch.Tensor]]
    generated: torch.Tensor
    logits: list[torch.Tensor]


LEFT_PADDED = {
    "input_ids": torch.tensor([[0] * 9 + list(range(10, 21)), list(range(30, 50))]),
    "attention_mask": torch.tensor([[0] * 9 + [1] * 11, [1] * 20]),
}
RIGHT_PADDED = {name: x.flip(1) for name, x in LEFT_PADDED.items()}


def generate(model) -> torch.Tensor:
    return model.generate(**LEFT_PADDED, max_new_tokens=8, min_new_tokens=8, do_sample=False)


@torch.no_grad()
def plain_logits(model) -> list[torch.Tensor]:
    """Without the padding's own rows, which some implementations leave undefined."""
    return [model(**inputs).logits[inputs["attention_mask"].bool()] for inputs in (LEFT_PADDED, RIGHT_PADDED)]


@functools.cache
def case(family: str, attn_implementation: str | None = None) -> Case:
    model = build(family, attn_implementation)
    before = (with_gradients(model, alone(model)), generate(model), plain_logits(model))
    add_token_logps(model)
    share_prefixes(model)
    return Case(model, *before)


def test_the_rows_are_a_tree_worth_testing():
    (chunk,) = batch_of("prefix_shared")["chunks"]
    paths = chunk["segments"].paths
    assert max(map(len, paths)) >= 3
    assert sum(len(path) > 1 for path in paths) >= 5
    assert chunk["input_ids"].numel() < 0.5 * batch_of("padded")["num_tokens"]
    assert min(len(prompt) + len(completion) for prompt, completion in CONVERSATIONS) > WINDOW
    assert len(ROWS[1]["prompt_ids"]) > WINDOW


@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_equal_each_conversation_alone(family):
    c = case(family)
    for layout in ("padded", "prefix_shared"):
        assert_same(with_gradients(c.model, together(c.model, layout)), c.alone)


@pytest.mark.parametrize(
    ("family", "own"), [("Llama", "eager"), ("Mistral", "eager"), ("GPT2", "eager"), ("Qwen2", "eager")]
)
def test_over_either_implementation_of_the_models_own(family, own):
    c = case(family, own)
    assert c.model.config._attn_implementation == f"prefix_shared_over_{own}"
    assert case(family).model.config._attn_implementation == "prefix_shared_over_sdpa"
    for layout in ("padded", "prefix_shared"):
        assert_same(with_gradients(c.model, together(c.model, layout)), c.alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_and_plain_forwards_stay_as_they_were(family):
    c = case(family)
    assert generate(c.model).tolist() == c.generated.tolist()
    for found, expected in zip(plain_logits(c.model), c.logits, strict=True):
        assert torch.equal(found, expected)
    c.model.train()  # and behind a packed step
    with_gradients(c.model, together(c.model, "prefix_shared"))
    c.model.eval()
    assert generate(c.model).tolist() == c.generated.tolist()
    for found, expected in zip(plain_logits(c.model), c.logits, strict=True):
        assert torch.equal(found, expected)


def test_generation_after_training_is_that_of_an_unpatched_model_with_the_same_weights():
    model = build("Mistral")
    untrained = generate(model)
    add_token_logps(model)
    share_prefixes(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model.train()
    (-together(model, "prefix_shared").sum()).backward()
    optimizer.step()
    plain = build("Mistral")
    plain.load_state_dict(model.state_dict())
    assert generate(model.eval()).tolist() == generate(plain).tolist() != untrained.tolist()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if isinstance(output, torch.Tensor):
                self.size = max(self.size, output.numel())
        return outputs


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Gemma2"])
def test_nothing_of_the_rows_length_squared_is_built(family):
    generator = torch.Generator().manual_seed(0)
    prompt, *completions = torch.randint(5, VOCABULARY, (17, 32), generator=generator).tolist()
    rows = [{"prompt_ids": prompt, "completion_ids": completions, "rewards": [0.0] * 16}]
    (chunk,) = RewardCollator(0, "prefix_shared")(rows)["chunks"]
    total = chunk["input_ids"].numel()
    with LargestTensor() as largest:
        forward(case(family).model, chunk).token_logps.sum().backward()
    case(family).model.zero_grad()
    assert total * VOCABULARY <= largest.size + VOCABULARY * 32  # the logits
    assert largest.size < total**2 / 4


# Checkpointing, adapters, quantisation, precision


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "GPT2", "GptOss"])
def test_gradient_checkpointing(family, use_reentrant, monkeypatch):
    c = case(family)
    calls = []
    attend = attention.attend_segments
    monkeypatch.setattr(attention, "attend_segments", lambda *a, **k: calls.append(1) or attend(*a, **k))
    c.model.train()
    c.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    try:
        for layout in ("padded", "prefix_shared"):
            assert_same(with_gradients(c.model, together(c.model, layout)), c.alone)
    finally:
        c.model.gradient_checkpointing_disable()
        c.model.eval()
    assert len(calls) == 2 * c.model.config.num_hidden_layers  # each layer again in the backward


def with_lora(model, **options):
    """An adapter that is not the zero that it starts as."""
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **options))


@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "down_proj"], ["k_proj", "lm_head"]])
def test_lora(targets, use_reentrant):
    model = build("Mistral")
    plain = with_lora(copy.deepcopy(model), target_modules=targets)
    expected = with_gradients(plain, alone(plain))
    add_token_logps(model)
    share_prefixes(model)
    policy = with_lora(model, target_modules=targets)
    if use_reentrant is not None:
        policy.train()
        policy.enable_input_require_grads()
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for layout in ("padded", "prefix_shared"):
        assert_same(with_gradients(policy, together(policy, layout)), expected)
    with policy.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(together(policy, "prefix_shared"), case("Mistral").alone[0], rtol=1e-5, atol=0)


def test_nf4_with_lora(tmp_path):
    build("Llama", hidden_size=128, intermediate_size=128).save_pretrained(tmp_path)  # whole blocks of bitsandbytes

    def load():
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)

    plain = with_lora(load(), target_modules="all-linear")
    assert type(plain.get_base_model().model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"
    expected = with_gradients(plain, alone(plain))
    model = load()
    add_token_logps(model)
    share_prefixes(model)
    policy = with_lora(model, target_modules="all-linear")
    for layout in ("padded", "prefix_shared"):
        assert_same(with_gradients(policy, together(policy, layout)), expected)


def test_bf16():
    model = build("Llama").bfloat16()
    expected = with_gradients(model, alone(model))
    add_token_logps(model)
    share_prefixes(model)
    for layout in ("padded", "prefix_shared"):
        assert_same(with_gradients(model, together(model, layout)), expected, 2e-2, 1e-1)


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2"])
def test_bf16_autocast(family):
    """Qwen3's normed queries and keys come in fp32 beside values in bf16."""
    c = case(family)
    model = c.model
    with torch.autocast("cpu", torch.bfloat16):
        padded = with_gradients(model, together(model, "padded"))
        packed = with_gradients(model, together(model, "prefix_shared"))
    assert_same(packed, padded, 2e-2, 1e-1)
    assert_same(packed, c.alone, 5e-2, 2e-1)


# Attention of a segment against a plain loop


def tree_of(seed: int) -> Segments:
    (chunk,) = RewardCollator(0, "prefix_shared")(
        ROWS if seed == 0 else [{"prompt_ids": [1, 2], "completion_ids": [[3], [4]], "rewards": [0.0, 1.0]}]
    )["chunks"]
    return chunk["segments"]


def looped(query, key, value, segments, scaling, window, softcap, sinks) -> torch.Tensor:
    """Softmax over what each position sees, one position and head at a time, in float64."""
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    outputs = torch.zeros(1, query.shape[2], heads, value.shape[3], dtype=torch.float64)
    for (start, end), path in zip(segments.queries, segments.paths, strict=True):
        row = [i for a, b in path for i in range(a, b)]
        for position in range(start, end):
            seen = row[: row.index(position) + 1][-(window or len(row)) :]
            for h in range(heads):
                scores = key[0, h // group, seen].double() @ query[0, h, position].double() * scaling
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1].double()])
                weights = scores.softmax(0)[: len(seen)]
                outputs[0, position, h] = weights @ value[0, h // group, seen].double()
    return outputs


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 5, 1000])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_segment_attends_to_its_own_path(kv_heads, window, softcap, sinks):
    segments = tree_of(0)
    total = segments.queries[-1][1]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, total, 8, generator=generator)
    key = torch.randn(1, kv_heads, total, 8, generator=generator)
    value = torch.randn(1, kv_heads, total, 6, generator=generator)
    s_aux = torch.randn(4, generator=generator) if sinks else None
    found = attend_segments(
        query,
        key,
        value,
        segments,
        scaling=0.7,
        sliding_window=window,
        softcap=softcap,
        s_aux=s_aux,
        output_attentions=False,
    )
    expected = looped(query, key, value, segments, 0.7, window, softcap, s_aux)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 1e9])
def test_the_scale_is_that_of_the_head_size_where_none_is_given(softcap):
    segments = tree_of(0)
    query = torch.randn(1, 4, segments.queries[-1][1], 8, generator=torch.Generator().manual_seed(0))
    found = attend_segments(query, query, query, segments, softcap=softcap)
    torch.testing.assert_close(
        found.double(), looped(query, query, query, segments, 8**-0.5, None, None, None), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dropout_reaches_the_weights(softcap):
    segments = tree_of(0)
    query = torch.randn(1, 4, segments.queries[-1][1], 8)
    kept = attend_segments(query, query, query, segments, softcap=softcap)
    assert attend_segments(query, query, query, segments, softcap=softcap, dropout=1.0).abs().max() == 0
    torch.manual_seed(0)
    dropped = [attend_segments(query, query, query, segments, softcap=softcap, dropout=0.5) for _ in range(150)]
    error = (torch.stack(dropped).mean(0) - kept).abs().mean()
    assert error < 0.1 < (dropped[0] - kept).abs().mean()


def test_masks_are_made_once_a_shape_and_never_for_a_segment_without_a_prefix():
    segments = tree_of(0)
    like = torch.zeros(1)
    assert segments.causal_mask(5, 5, None, like) is None
    assert segments.causal_mask(5, 5, 5, like) is None
    assert segments.causal_mask(2, 5, 9, like) is segments.causal_mask(2, 5, None, like)
    assert segments.causal_mask(2, 5, None, like).tolist() == [[0, 0, 0, 0, -math.inf], [0] * 5]
    assert segments.causal_mask(2, 5, 2, like).isinf().tolist() == [
        [True, True, False, False, True],
        [True] * 3 + [False] * 2,
    ]
    assert segments.causal_mask(2, 5, None, like.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("window", [None, 1, 2, 4, 9])
@pytest.mark.parametrize(("q", "k"), [(1, 5), (2, 5), (5, 5), (4, 9)])
def test_a_mask_of_the_last_query_first_is_the_mask_and_takes_no_room(q, k, window):
    like = torch.zeros(1)
    mask, turned = (tree_of(0).causal_mask(q, k, window, like, last_first) for last_first in (False, True))
    if mask is None:
        assert turned is None
    else:
        assert torch.equal(turned.flip(0), mask)
        assert turned.untyped_storage().nbytes() == 4 * (q + k - 1)


def test_a_position_bias_is_refused():
    segments = tree_of(1)
    query = torch.zeros(1, 4, segments.queries[-1][1], 8)
    with pytest.raises(NotImplementedError, match="the model adds a position bias to its attention's scores"):
        attend_segments(query, query, query, segments, position_bias=torch.zeros(1))


# The CUDA call, against a stand-in


class VarlenStandIn:
    """Computes what `varlen_attn` is documented to, from the same arguments, and notes them."""

    def __init__(self):
        self.calls = []

    def __call__(self, *args, **kwargs):
        # what torch's own function would say to these arguments
        bound = inspect.signature(varlen_attn).bind(*args, **kwargs)
        bound.apply_defaults()
        self.calls.append(SimpleNamespace(**bound.arguments))
        return self.compute(self.calls[-1])

    @staticmethod
    def compute(c: SimpleNamespace) -> torch.Tensor:
        heads, size = c.query.shape[1:]
        group = heads // c.key.shape[1]
        left, right = c.window_size
        outputs = []
        bounds = zip(
            c.cu_seq_q.tolist(), c.cu_seq_q.tolist()[1:], c.cu_seq_k.tolist(), c.cu_seq_k.tolist()[1:], strict=False
        )
        for q0, q1, k0, k1 in bounds:
            for i in range(q0, q1):
                diagonal = (i - q0) + (k1 - k0) - (q1 - q0)  # lower right: the last query stands at the last key
                first = 0 if left < 0 else max(0, diagonal - left)
                last = k1 - k0 if right < 0 else min(k1 - k0, diagonal + right + 1)
                k, v = (x[k0 + first : k0 + last].repeat_interleave(group, 1) for x in (c.key, c.value))
                scores = torch.einsum("hd,khd->hk", c.query[i], k) * (c.scale or size**-0.5)
                outputs.append(torch.einsum("hk,khd->hd", scores.softmax(1), v))
        return torch.stack(outputs)


@pytest.fixture
def stand_in(monkeypatch) -> VarlenStandIn:
    stand_in = VarlenStandIn()
    monkeypatch.setattr(attention, "_varlen_takes", lambda *tensors: True)
    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    return stand_in


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_keys_repeated_beside_a_mask_give_what_grouped_heads_give(family, monkeypatch):
    """On a GPU a mask beside `enable_gqa` takes PyTorch's slowest kernel."""
    grouped = []
    attend = F.scaled_dot_product_attention

    def recorded(q, k, v, mask=None, *args, **kwargs):
        grouped.append((mask is not None, kwargs["enable_gqa"]))
        return attend(q, k, v, mask, *args, **kwargs)

    monkeypatch.setattr(attention, "_on_gpu", lambda query: True)
    c = case(family)
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", recorded)
    assert_same(with_gradients(c.model, together(c.model, "prefix_shared")), c.alone)
    assert (True, False) in grouped
    assert (True, True) not in grouped


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Mistral", "Qwen2", "Granite"])
def test_the_varlen_call_gives_what_the_segments_give(family, stand_in):
    c = case(family)
    assert_same(with_gradients(c.model, together(c.model, "prefix_shared")), c.alone)
    windows = {"Mistral": [(WINDOW - 1, 0)] * 2, "Qwen2": [(WINDOW - 1, 0), (-1, 0)]}
    assert [call.window_size for call in stand_in.calls] == windows.get(family, [(-1, 0)] * 2)


def test_the_varlen_call_gets_what_the_kernel_takes(stand_in):
    model = case("Mistral").model
    (chunk,) = batch_of("prefix_shared")["chunks"]
    forward(model, chunk)
    segments, total = chunk["segments"], chunk["input_ids"].numel()
    q_lengths = [end - start for start, end in segments.queries]
    k_lengths = [sum(end - start for start, end in path) for path in segments.paths]
    for call in stand_in.calls:
        assert call.query.shape == (total, 4, 8)
        assert call.key.shape == call.value.shape == (sum(k_lengths), 2, 8)
        assert all(x.is_contiguous() for x in (call.query, call.key, call.value))
        for cumulative, lengths in ((call.cu_seq_q, q_lengths), (call.cu_seq_k, k_lengths)):
            assert cumulative.dtype == torch.int32
            assert cumulative[0] == 0
            assert cumulative.diff().tolist() == lengths
        assert (call.max_q, call.max_k) == (max(q_lengths), max(k_lengths))
        assert type(call.max_q) is type(call.max_k) is int
        assert call.scale == pytest.approx(8**-0.5)
        assert call.enable_gqa
    # computed once for all layers
    assert stand_in.calls[0].cu_seq_k is stand_in.calls[1].cu_seq_k


def test_the_varlen_call_is_left_out_where_it_can_not_do_what_is_asked(stand_in):
    segments = tree_of(0)
    query = torch.randn(1, 4, segments.queries[-1][1], 8)
    for options in ({"softcap": 5.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.1}):
        attend_segments(query, query, query, segments, **options)
    assert stand_in.calls == []
    attend_segments(query, query, query, segments)
    assert not stand_in.calls[0].enable_gqa


def test_normed_queries_reach_the_varlen_call_in_the_precision_of_autocast(stand_in):
    model = case("Qwen3").model
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        together(model, "prefix_shared")
    assert {x.dtype for call in stand_in.calls for x in (call.query, call.key, call.value)} == {torch.bfloat16}


def test_the_varlen_call_takes_half_precision_on_a_card_that_has_its_kernels(monkeypatch):
    def takes(dtype=torch.bfloat16, sizes=(128, 128), cuda=True, capability=(8, 0), value_dtype=None) -> bool:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        tensor = functools.partial(SimpleNamespace, is_cuda=cuda, device=torch.device("cuda"))
        q, k = (tensor(dtype=dtype, shape=(1, 4, 9, sizes[0])) for _ in "qk")
        return attention._varlen_takes(q, k, tensor(dtype=value_dtype or dtype, shape=(1, 4, 9, sizes[1])))

    assert takes()
    assert takes(torch.float16, (64, 64), capability=(9, 0))
    assert not takes(torch.float32)
    assert not takes(value_dtype=torch.float32)
    assert not takes(cuda=False)
    assert not takes(sizes=(192, 128))  # multi-head latent attention
    assert not takes(sizes=(512, 512))
    assert not takes(sizes=(20, 20))
    assert not takes(capability=(7, 5))


# Which models


NO_INTERFACE = "does not declare that its attention goes through transformers' AttentionInterface"
OWN_MASK = "does not pass its `sliding_window` to its attention"
MAMBA_1 = "can't start from the state of an earlier piece, because its Mamba 1 layers scan"
HYBRIDS = {
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4},
    "Qwen3Next": {"layer_types": ["linear_attention", "full_attention"], **EXPERTS},
}
REFUSED = {
    "Llama4Text": (
        "has chunked-attention layers, which a packed row does not go through",
        {
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": WINDOW,
            "num_local_experts": 2,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
        },
    ),
    "Falcon": (NO_INTERFACE, {"num_kv_heads": 2}),
    "Bloom": (NO_INTERFACE, {"n_layer": 2, "n_head": 4}),
    "Jamba": (MAMBA_1, {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}),
    "Mamba": (MAMBA_1, {"num_hidden_layers": 2}),
    "Qwen2Moe": (OWN_MASK, {"use_sliding_window": True, **EXPERTS, **MIXED}),
    "Phimoe": (OWN_MASK, {"sliding_window": WINDOW, "num_local_experts": 4}),
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family):
    reason, overrides = REFUSED[family]
    model = build(family, device="meta", **overrides)
    name = type(model).__name__
    obstacle = prefix_sharing_obstacle(model)
    assert obstacle.startswith(name)
    assert reason in obstacle
    with pytest.raises(NotImplementedError) as error:
        share_prefixes(model)
    assert str(error.value) == f"`layout: prefix_shared` can't be used here: {obstacle}. Use `layout: padded`."


@pytest.mark.parametrize("family", [*REFUSED, *HYBRIDS])
def test_what_is_refused_or_a_hybrid_can_be_padded(family):
    model = build(family, **(HYBRIDS[family] if family in HYBRIDS else REFUSED[family][1]))
    expected = with_gradients(model, alone(model))
    add_token_logps(model)
    assert_same(with_gradients(model, together(model, "padded")), expected)


@pytest.mark.parametrize("family", [*FAMILIES, *HYBRIDS, "Qwen2Moe", "Phimoe"])
def test_not_refused(family):
    own = HYBRIDS | {"Qwen2Moe": EXPERTS, "Phimoe": {"num_local_experts": 4}}
    assert prefix_sharing_obstacle(build(family, device="meta", **own.get(family, {}))) is None


def test_every_model_that_has_its_window_in_the_mask_alone_is_listed():
    """Found in the text of each of transformers' models, of those whose attention can be replaced at all."""
    found = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        text = path.read_text()
        masks = "create_sliding_window_causal_mask" in text and "sliding_window=" not in text
        if masks and "_supports_attention_backend = True" in text:
            found.add(path.stem.removeprefix("modeling_"))
    assert found == attention._WINDOW_IN_MASK


def test_sharing_twice_is_sharing_once():
    model = build("Llama")
    share_prefixes(model)
    share_prefixes(model)
    assert model.config._attn_implementation == "prefix_shared_over_sdpa"


@pytest.mark.parametrize(("family", "own"), [("Llama", "sdpa"), ("Gemma2", "eager")])
def test_over_flash_attention_other_forwards_take_an_equal_implementation(family, own):
    """Its functions read their name from the config, which is now another."""
    model = build(family)
    model.config._attn_implementation = "flash_attention_2"
    share_prefixes(model)
    assert model.config._attn_implementation == f"prefix_shared_over_{own}"
    assert generate(model).tolist() == case(family).generated.tolist()


def test_a_saved_model_loads_without_this_package(tmp_path):
    model = build("Llama")
    share_prefixes(model)
    model.save_pretrained(tmp_path)
    assert "prefix_shared" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_the_tests_own_tiny_model(tokenizer):
    """The one of conftest.py, on which the other tests train."""
    model = build_model(tokenizer)
    expected = with_gradients(model, alone(model))
    add_token_logps(model)
    share_prefixes(model)
    assert_same(with_gradients(model, together(model, "prefix_shared")), expected)
