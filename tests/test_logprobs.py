"""Log-probabilities of the labelled tokens: their values, their gradients, and where the head is run."""

import copy
import inspect
from itertools import product

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import PromptTuningConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM

from conftest import build_model
from nca_align.batching.attention import share_prefixes
from nca_align.batching.collator import RewardCollator
from nca_align.models import logprobs
from nca_align.models.logprobs import (
    TokenLogps,
    add_token_logps,
    forward_chunk,
    head_logps,
    logit_transform,
    token_logps,
)
from tiny_models import build as build_tiny

M, HIDDEN, VOCABULARY = 23, 8, 50
TRANSFORMS = [(1.0, None), (0.25, None), (1.0, 2.0), (3.0, 2.0)]


class CountingHead(nn.Linear):
    """Notes how many rows each call is given."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        super().__init__(HIDDEN, VOCABULARY, dtype=dtype)
        self.rows: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rows.append(len(x))
        return super().forward(x)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = 2 * torch.randn(M, HIDDEN, generator=generator)
    return hidden.to(dtype).requires_grad_(), torch.randint(VOCABULARY, (M,), generator=generator)


WEIGHTS = torch.linspace(-1, 2, M)  # a gradient for each token, of either sign


def results(head, hidden, targets, scale, softcap, **kwargs) -> list[torch.Tensor]:
    """Log-probabilities, and the gradients of the hidden states and of the head."""
    logps = head_logps(head, hidden, targets, VOCABULARY, scale, softcap, **kwargs)
    return [logps.detach(), *torch.autograd.grad((WEIGHTS * logps).sum(), [hidden, head.weight, head.bias])]


def reference(head, hidden, targets, scale, softcap) -> list[torch.Tensor]:
    """The definition, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, head.weight, head.bias)]
    logits = (leaves[0] @ leaves[1].T + leaves[2]) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logps = logits.log_softmax(1)[range(M), targets]
    return [logps.detach(), *torch.autograd.grad((WEIGHTS.double() * logps).sum(), leaves)]


@pytest.mark.parametrize("rows", [1, 5, M - 1, M])
@pytest.mark.parametrize(("scale", "softcap"), TRANSFORMS)
def test_whole_or_in_tiles_it_is_the_log_softmax(scale, softcap, rows):
    head = CountingHead()
    hidden, targets = inputs()
    found = results(head, hidden, targets, scale, softcap, budget=8 * VOCABULARY * rows)
    for a, b in zip(found, reference(head, hidden, targets, scale, softcap), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    tiles = [rows] * (M // rows) + [M % rows] * (M % rows > 0)
    if rows == M:
        assert head.rows == [M]
    else:  # again in the backward, the last one first
        assert head.rows == tiles + tiles[::-1]


def test_without_gradients_tiles_are_run_once():
    head = CountingHead()
    hidden, targets = inputs()
    with torch.no_grad():
        whole = head_logps(head, hidden, targets, VOCABULARY)
        head.rows.clear()
        found = head_logps(head, hidden, targets, VOCABULARY, budget=8 * VOCABULARY * 7)
    torch.testing.assert_close(found, whole)
    assert head.rows == [7, 7, 7, 2]


def test_a_budget_below_one_row_is_one_row():
    head = CountingHead()
    with torch.no_grad():
        head_logps(head, *inputs(), VOCABULARY, budget=1)
    assert head.rows == [1] * M


def test_tiles_are_no_longer_than_a_few_thousand_rows():
    rows = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return hidden

    with torch.no_grad():
        head_logps(head, torch.zeros(10_000, 2), torch.zeros(10_000, dtype=torch.long), 2, budget=16 * 9_999)
    assert rows == [4096, 4096, 1808]


def test_the_budget_is_that_of_the_device(monkeypatch):
    head = CountingHead()
    with torch.no_grad():
        for budget, rows in (
            ({"cpu": 8 * VOCABULARY * 20, "cuda": 1}, [20, 3]),
            ({"cuda": 8 * VOCABULARY * 20}, [20, 3]),
        ):
            monkeypatch.setattr(logprobs, "LOGITS_BUDGET", budget)
            head.rows.clear()
            head_logps(head, *inputs(), VOCABULARY)
            assert head.rows == rows


def test_above_the_budget_no_logits_are_kept():
    def kept(**kwargs) -> int:
        """Elements of the largest tensor that the forward saves for its backward."""
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            head_logps(CountingHead(), *inputs(), VOCABULARY, 2.0, 5.0, **kwargs)
        return max(sizes, default=0)

    assert kept() == M * VOCABULARY
    assert kept(budget=8 * VOCABULARY * 5) <= HIDDEN * VOCABULARY < M * VOCABULARY


@pytest.mark.parametrize("rows", [5, M])
def test_half_precision_logits_are_normalised_in_float32(rows):
    head = CountingHead(torch.bfloat16)
    hidden, targets = inputs(torch.bfloat16)
    found = results(head, hidden, targets, 1.0, None, budget=8 * VOCABULARY * rows)
    assert [x.dtype for x in found] == [torch.float32] + [torch.bfloat16] * 3
    exact = head(hidden).detach().double().log_softmax(1)[range(M), targets]
    torch.testing.assert_close(found[0].double(), exact, rtol=1e-6, atol=1e-6)
    for a, b in zip(found[1:], reference(head, hidden, targets, 1.0, None)[1:], strict=True):
        assert (a.double() - b).norm() < 0.02 * b.norm()


def test_very_unlikely_tokens_have_finite_gradients():
    head = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1000.0], [0.0], [-1000.0]]))
    hidden = torch.ones(3, 1, requires_grad=True)
    logps = head_logps(head, hidden, torch.arange(3), 3)
    assert logps.tolist() == [0, -1000, -2000]
    logps.sum().backward()
    assert head.weight.grad.tolist() == [[1 - 3], [1], [1]]


# What the families do to their logits


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("Llama", {}, (1.0, None)),
        ("Gemma2", {"final_logit_softcapping": 30.0}, (1.0, 30.0)),
        ("Gemma3Text", {"final_logit_softcapping": None}, (1.0, None)),
        ("Cohere2", {"logit_scale": 0.25}, (0.25, None)),
        ("Granite", {"logits_scaling": 4.0}, (0.25, None)),
        ("GraniteMoe", {"logits_scaling": 4.0}, (0.25, None)),
        ("HyperCLOVAX", {"logits_scaling": 4.0}, (4.0, None)),
        ("FalconH1", {"lm_head_multiplier": 0.5}, (0.5, None)),
        ("RecurrentGemma", {"logits_soft_cap": 30.0}, (1.0, 30.0)),
        ("InklingText", {"logits_mup_width_multiplier": 4.0}, (0.25, None)),
        ("xLSTM", {"output_logit_soft_cap": 30.0}, (1.0, 30.0)),
    ],
)
def test_scale_and_softcap_by_family(family, options, expected):
    assert logit_transform(getattr(transformers, f"{family}Config")(**options)) == expected


def test_a_composite_may_leave_out_its_language_models_scale():
    config = transformers.AyaVisionConfig().get_text_config()
    assert logit_transform(config) != (1.0, None) == logit_transform(config, "aya_vision")


TINY = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SCALED = {
    "HyperCLOVAX": {"logits_scaling": 0.3},
    "MiniCPM3": {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "dim_model_base": 8,
    },
    "RecurrentGemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16, "logits_soft_cap": 2.0},
    "NanoChat": {"final_logit_softcapping": 2.0},
}  # fmt: skip


def ids_and_terms() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    return ids, torch.tensor([3, 4, 4, 9, 16]), torch.tensor([7, 8, 9, 10, 11])


@pytest.mark.parametrize("family", SCALED)
def test_log_probabilities_are_those_of_the_models_own_logits(family):
    """Families beside those of test_attention.py, which are compared through both layouts."""
    config_class = getattr(transformers, f"{family}Config")
    known = set(inspect.signature(config_class).parameters)
    torch.manual_seed(0)
    config = config_class(**{k: v for k, v in TINY.items() if k in known} | SCALED[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    ids, token_index, target_ids = ids_and_terms()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        add_token_logps(model)
        found = model(input_ids=ids, token_index=token_index, target_ids=target_ids).token_logps
    expected = logits.double().log_softmax(-1).flatten(0, 1)[token_index, target_ids]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert logit_transform(config) != (1.0, None)


# The model's forward


def test_only_labelled_positions_reach_the_head(model):
    ids, token_index, target_ids = ids_and_terms()
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(tuple(output.shape)))
    add_token_logps(model)
    outputs = model(input_ids=ids, token_index=token_index, target_ids=target_ids)
    assert isinstance(outputs, TokenLogps)
    assert outputs.token_logps.shape == (5,)
    assert outputs.token_logps.dtype == torch.float32
    assert outputs.expert_use is None
    assert rows == [(5, model.config.vocab_size)]


def test_the_budget_counts_the_models_vocabulary(model, monkeypatch):
    ids, token_index, target_ids = ids_and_terms()
    rows = []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    add_token_logps(model)
    whole = model(input_ids=ids, token_index=token_index, target_ids=target_ids).token_logps
    monkeypatch.setitem(logprobs.LOGITS_BUDGET, "cpu", 8 * model.config.vocab_size * 2)
    tiles = model(input_ids=ids, token_index=token_index, target_ids=target_ids).token_logps
    torch.testing.assert_close(tiles, whole)
    assert rows == [5, 2, 2, 1]


def test_other_forwards_stay_as_they_were(model):
    ids, *_ = ids_and_terms()
    before = [model(input_ids=ids), model(ids, labels=ids), model.generate(ids, max_new_tokens=4, do_sample=False)]
    signature = inspect.signature(model.forward)
    add_token_logps(model)
    patched = model.forward
    add_token_logps(model)
    assert model.forward is patched  # once is enough
    assert inspect.signature(model.forward) == signature
    assert torch.equal(model(input_ids=ids).logits, before[0].logits)
    assert torch.equal(model(ids, labels=ids).loss, before[1].loss)
    assert model(ids, use_cache=True).past_key_values is not None
    assert model.generate(ids, max_new_tokens=4, do_sample=False).tolist() == before[2].tolist()


def test_no_cache_is_filled_for_log_probabilities(model):
    ids, token_index, target_ids = ids_and_terms()
    given = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    add_token_logps(model)
    model(input_ids=ids, token_index=token_index, target_ids=target_ids, use_cache=True)
    assert given == [{"input_ids": ids, "use_cache": False}]


def test_positions_count_from_behind_virtual_tokens(model):
    """Prompt tuning puts its own tokens in front of each row."""
    ids, token_index, target_ids = ids_and_terms()
    policy = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        logits = policy(input_ids=ids, attention_mask=mask).logits[:, 4:]
        add_token_logps(model)
        found = policy(
            input_ids=ids, attention_mask=mask, token_index=token_index, target_ids=target_ids, row_length=ids.shape[1]
        ).token_logps
    expected = logits.log_softmax(-1).flatten(0, 1)[token_index, target_ids]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "part"),
    [("ModernBertDecoderForCausalLM", "lm_head"), ("BertLMHeadModel", "cls"), ("MusicgenForCausalLM", "lm_heads")],
)
def test_a_model_whose_logits_are_more_than_a_head_is_refused(family, part):
    model_class = getattr(transformers, family)
    config_class = transformers.MusicgenDecoderConfig if part == "lm_heads" else model_class.config_class
    config = config_class(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=4, vocab_size=VOCABULARY,
        pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = model_class(config)
    message = f"`model` is a {family}, which has `{part}` beside a backbone and an LM head"
    with pytest.raises(NotImplementedError, match=message):
        add_token_logps(model)
    assert "forward" not in vars(model)


def test_tied_weights_get_both_gradients(tokenizer):
    ids, token_index, target_ids = ids_and_terms()
    grads = []
    for patched, tied in product((False, True), (False, True)):
        model = build_model(tokenizer, tie_word_embeddings=tied)
        if patched:
            add_token_logps(model)
            logps = model(input_ids=ids, token_index=token_index, target_ids=target_ids).token_logps
        else:
            logps = model(input_ids=ids).logits.log_softmax(-1).flatten(0, 1)[token_index, target_ids]
        logps.sum().backward()
        grads.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(grads[2:], grads[:2], rtol=1e-4, atol=1e-5)
    assert (grads[1] - grads[0]).norm() > 0.1 * grads[0].norm()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "NemotronForCausalLM"])
def test_scores_are_the_models_own_also_where_its_layers_drop_a_packed_rows_segments(name):
    model = build_tiny(name)
    own = copy.deepcopy(model)
    row = {"prompt_ids": list(range(5, 30)), "completion_ids": [[40, 41, 42], [43, 44]]}
    (found,) = token_logps(model, [row], 4)
    assert model.config._attn_implementation.startswith("prefix_shared")
    for logps, completion in zip(found, row["completion_ids"], strict=True):
        with torch.no_grad():
            logits = own(input_ids=torch.tensor([row["prompt_ids"] + completion])).logits[0, -len(completion) - 1 : -1]
        expected = logits.log_softmax(-1)[range(len(completion)), completion]
        torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)


# One model over two devices, as `device_map: auto` splits it where one process sees several GPUs


class OnTwoDevices:
    """A tiny model whose second half and head are on another device; fake tensors see where two devices meet."""

    def __init__(self, model: LlamaForCausalLM):
        self.model = model
        places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
        places |= {"model.layers.1": 1, "model.norm": 1, "lm_head": 1}
        for name, index in places.items():
            part = model.get_submodule(name)
            for module in part.modules():
                for key, value in module._parameters.items():
                    module._parameters[key] = None if value is None else nn.Parameter(self.fake(value, index))
                for key, value in module._buffers.items():
                    module._buffers[key] = self.fake(value, index)
            add_hook_to_module(part, AlignDevicesHook(f"cpu:{index}"))  # what accelerate's `dispatch_model` puts there
        add_hook_to_module(model, AlignDevicesHook("cpu:0", io_same_device=True))

    @staticmethod
    def fake(value: torch.Tensor, index: int) -> torch.Tensor:
        return torch.empty(value.shape, dtype=value.dtype, device=f"cpu:{index}")


@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
def test_a_model_over_two_devices_has_its_log_probabilities(layout, model):
    add_token_logps(model)
    if layout == "prefix_shared":
        share_prefixes(model)
    row = {"prompt_ids": [3, 4, 5], "completion_ids": [[6, 7], [6, 8, 9]], "rewards": [1.0, 0.0]}
    (chunk,) = RewardCollator(0, layout)([row])["chunks"]
    with FakeTensorMode():
        with pytest.raises(RuntimeError, match="at least two devices"):
            torch.empty(2, device="cpu:0") + torch.empty(2, device="cpu:1")
        split = OnTwoDevices(model)
        chunk = {
            key: split.fake(value, 0) if isinstance(value, torch.Tensor) else value for key, value in chunk.items()
        }
        found = forward_chunk(split.model, chunk).token_logps
        found.sum().backward()
        assert found.shape == (5,)
        for name, index in (("model.embed_tokens", 0), ("lm_head", 1)):
            assert split.model.get_submodule(name).weight.grad.device == torch.device(f"cpu:{index}")
