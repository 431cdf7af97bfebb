"""Recurrent states between the pieces of a tree give what each conversation gives alone, gradients included.

Alone means the model's own forward without a cache. In pieces means a prompt in two of them, then its completions as
one padded batch; attention layers keep their keys and values here as transformers' cache does, without a copy a row.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from model_sweep import classes
from nca_align.batching.recurrent import (
    MIN_TOKENS,
    RecurrentCache,
    States,
    add_gradients,
    cache_argument,
    cached_checkpointing,
    inject_gradients,
    recurrent_obstacle,
)
from nca_align.errors import PackingError
from tiny_models import UNBUILT, build, tiny_config

FAST = ["GraniteMoeHybridForCausalLM", "Lfm2ForCausalLM", "NemotronHForCausalLM", "Qwen3_5ForCausalLM"]
SLOW = [
    "BailingHybridForCausalLM", "BambaForCausalLM", "FalconH1ForCausalLM", "Inkling2ForCausalLM",
    "Inkling2ForConditionalGeneration", "Inkling2LoopForCausalLM", "Inkling2LoopForConditionalGeneration",
    "InklingForCausalLM",
    "KimiLinearForCausalLM", "LaraMiniForCausalLM", "Lfm2MoeForCausalLM", "Lfm2VlForConditionalGeneration",
    "Lfm3ForCausalLM", "Lfm3VlForConditionalGeneration", "Mamba2ForCausalLM", "MiniCPMOcrForConditionalGeneration",
    "MiniCPMV4_6ForConditionalGeneration", "MiniCPMV4_7ForConditionalGeneration",
    "Nemotron3_5TranscribeForConditionalGeneration", "NemotronH_Omni_Reasoning_V3", "OlmoHybridForCausalLM",
    "Qwen3NextForCausalLM", "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration", "Zamba2ForCausalLM", "ZayaForCausalLM",
]  # fmt: skip
FAMILIES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
MAMBA_1 = ["FalconMambaForCausalLM", "JambaForCausalLM", "MambaForCausalLM", "ZambaForCausalLM"]
# Why their state can't be cut
REFUSED = {
    **dict.fromkeys(MAMBA_1, "Mamba 1"),
    "DeepseekV4ForCausalLM": "DeepseekV4",
    "Glm5NextForConditionalGeneration": "DynamicIndexedLayer",
    "MiniMaxForCausalLM": "cache of its own",
    "Qwen4ExpForCausalLM": "DynamicIndexedLayer",
    "Qwen4ExpForConditionalGeneration": "DynamicIndexedLayer",
    "RecurrentGemmaForCausalLM": "in its layers",
    "RwkvForCausalLM": "cache of its own",
    "xLSTMForCausalLM": "cache of its own",
}
BOUND = 1e-5  # in float32
# Completions of one token among others, which are padded to two; and all of one token
RAGGED, SINGLE = (9, 1, 16, 3), (1, 1)


class WithKeys(RecurrentCache):
    """Beside the recurrent states, keys and values of the attention layers, at the places (layer, "keys", 0) …"""

    def __init__(self, config, past: States | None = None, rows: int = 1):
        past = past or {}
        super().__init__(config, {p: x for p, x in past.items() if p[1] not in ("keys", "values")}, rows)
        self.rows, self.new = rows, {}
        self.old = {p: x.detach().requires_grad_() for p, x in past.items() if p[1] in ("keys", "values")}
        self.length = next((x.shape[2] for x in self.old.values()), 0)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        found = []
        for kind, own in (("keys", key_states), ("values", value_states)):
            old = self.old.get((layer_idx, kind, 0))
            whole = own if old is None else torch.cat([old.expand(self.rows, *old.shape[1:]), own], 2)
            self.new.setdefault((layer_idx, kind, 0), whole)
            found.append(whole)
        return tuple(found)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def states(self, row: int = 0) -> States:
        return super().states(row) | {place: whole[row : row + 1] for place, whole in self.new.items()}

    def gradients(self) -> States:
        return super().gradients() | {p: x.grad for p, x in self.old.items() if x.grad is not None}


@dataclass
class Found:
    logps: Tensor  # (K,) nats
    gradients: dict[str, Tensor]


def text(n: int, seed: int) -> list[int]:
    return torch.randint(5, 380, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def example(lengths: tuple[int, ...]) -> tuple[list[int], list[list[int]], Tensor]:
    """A prompt, its K completions and the weight of each one's log-probability in the loss."""
    weights = torch.linspace(-1.2, 0.7, len(lengths))
    return text(23, 0), [text(n, 1 + i) for i, n in enumerate(lengths)], weights


def taken(model) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def logps_of(logits: Tensor, completion: list[int]) -> Tensor:
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()


def alone(model, prompt: list[int], completions: list[list[int]], weights: Tensor) -> Found:
    logps = []
    for completion in completions:
        ids = torch.tensor([prompt + completion[:-1]])
        logps.append(logps_of(model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :], completion))
    (torch.stack(logps) * weights).sum().backward()
    return Found(torch.stack(logps).detach(), taken(model))


def run(model, rows: list[list[int]], past: States | None, start: int, with_checkpoints: bool = True):
    """Logits (R, T, V) of one piece, whose rows are padded on the right, and its cache."""
    length = max(MIN_TOKENS if past else 1, *map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    positions = torch.arange(start, start + length).expand(len(rows), -1)
    cache = WithKeys(model.config, past, len(rows))
    with cached_checkpointing(model) if with_checkpoints else nullcontext():
        given = {cache_argument(model): cache, "use_cache": False}
        return model(input_ids=ids, position_ids=positions, **given).logits, cache


def in_pieces(model, prompt: list[int], completions: list[list[int]], weights: Tensor, cut: int = 2) -> Found:
    """The prompt without its last token in two pieces, the first one shorter than a convolution; then all rows."""
    whole = prompt[:-1]
    parts = [(whole[:cut], 0), (whole[cut:], cut)]
    nodes: list[States | None] = [None]
    with torch.no_grad():
        for tokens, start in parts:
            nodes.append(run(model, [tokens], nodes[-1], start)[1].kept())
    rows = [[prompt[-1], *completion[:-1]] for completion in completions]
    logits, cache = run(model, rows, nodes[2], len(whole))
    logps = torch.stack([logps_of(logits[i, : len(ids)], ids) for i, ids in enumerate(completions)])
    (logps * weights).sum().backward()
    for (tokens, start), past in zip(reversed(parts), reversed(nodes[:2]), strict=True):
        left: States = {}
        add_gradients(left, cache.gradients())
        logits, cache = run(model, [tokens], past, start)
        inject_gradients(0 * logits.sum(), cache.states(), left).backward()
    return Found(logps.detach(), taken(model))


def assert_close(found: Found, expected: Found, bound: float = BOUND) -> None:
    assert float((found.logps - expected.logps).norm() / expected.logps.norm()) < bound
    whole = math.sqrt(sum(float(g.double().square().sum()) for g in expected.gradients.values()))
    zero = torch.zeros(())
    names = found.gradients.keys() | expected.gradients.keys()
    off = {n: float((found.gradients.get(n, zero) - expected.gradients.get(n, zero)).norm()) / whole for n in names}
    assert max(off.values()) < bound, max(off, key=off.__getitem__)


def model_of(name: str, **own):
    """A tiny model in training mode, where layers are checkpointed, without dropout."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    model = build(name, **own).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def in_float64(monkeypatch):
    """Models that are built compute in float64 throughout: their layers' casts to float32, by any name, go there."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(previous)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_give_each_conversation_alone(name, in_float64):
    model = model_of(name).double()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"  # grouped products have no float64
    assert recurrent_obstacle(model) is None
    cases = [example(lengths) for lengths in (RAGGED, SINGLE)]
    expected = [alone(model, *case) for case in cases]
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        for case, own in zip(cases, expected, strict=True):
            assert own.logps.dtype == torch.float64
            assert_close(in_pieces(model, *case), own, 1e-11)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_a_cache_that_is_taken_from_checkpointed_layers_shows():
    """As transformers does, with a warning alone; the first piece's numbers don't show it."""
    model = model_of("Qwen3_5ForCausalLM")
    model.gradient_checkpointing_enable()
    cache = run(model, [text(5, 0)], None, 0, with_checkpoints=False)[1]
    with pytest.raises(PackingError, match="don't pass on the states"):
        cache.states()
    assert run(model, [text(5, 0)], None, 0)[1].states()
    assert not any("_can_checkpoint_with_cache" in vars(module) for module in model.modules())  # left as it was


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_reentrant_checkpoints_are_refused():
    model = model_of("Lfm2ForCausalLM")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert "use_reentrant" in recurrent_obstacle(model)
    with pytest.raises(PackingError, match="use_reentrant"):
        run(model, [text(5, 0)], None, 0)


def test_a_piece_leaves_the_state_that_it_starts_from():
    """Also without gradients, where a state may be written in place; rows are as one alone."""
    model = model_of("GraniteMoeHybridForCausalLM")
    with torch.no_grad():
        past = run(model, [text(9, 0)], None, 0)[1].kept()
        before = {place: state.clone() for place, state in past.items()}
        several = run(model, [text(n, n) for n in (6, 2, 1)], past, 9)[0]
        for row, n in zip(several, (6, 2, 1), strict=True):
            torch.testing.assert_close(row[:n], run(model, [text(n, n)], past, 9)[0][0, :n])
    assert {kind for _, kind, _ in past} == {"conv", "recurrent", "keys", "values"}
    assert all(torch.equal(past[place], before[place]) for place in before)


def test_a_step_of_generation_is_no_piece():
    """One token writes in place what it starts from, without a word to the cache."""
    model = model_of("BambaForCausalLM")
    with torch.no_grad():
        past = run(model, [text(9, 0)], None, 0)[1].kept()
        cache = WithKeys(model.config, past)
        model(input_ids=torch.tensor([[5]]), **{cache_argument(model): cache})
    with pytest.raises(PackingError, match="don't pass on the states"):
        cache.states()


def test_frozen_layers_leave_no_gradients():
    """LoRA on the last layers alone: the states of those before them have no graph, and nothing goes into them."""
    model = model_of("Qwen3_5ForCausalLM")
    for name, p in model.named_parameters():
        p.requires_grad_("layers.1." in name)
    case = example(RAGGED)
    assert_close(in_pieces(model, *case), alone(model, *case))


def test_injected_gradients_are_scaled_once():
    """A tree of two pieces under a loss scale: what one backward through both gives, times the scale."""
    x, scale = torch.tensor([0.3, -0.8], dtype=torch.float64, requires_grad=True), 1024.0
    (x.square().sum() + x.square().sin().sum()).backward()
    expected, x.grad = x.grad, None
    leaf = x.square().detach().requires_grad_()
    (scale * leaf.sin().sum()).backward()
    state = x.square()
    place = (0, "recurrent", 0)
    loss = inject_gradients(state.sum(), {place: state}, {place: leaf.grad})
    assert torch.equal(loss, state.sum())
    (scale * loss).backward()
    torch.testing.assert_close(x.grad, scale * expected)


def test_gradients_of_half_precision_add_up_in_float32():
    place = (0, "recurrent", 0)
    total: States = {}
    for _ in range(512):
        add_gradients(total, {place: torch.ones(1, dtype=torch.bfloat16)})
    assert total[place].item() == 512.0  # bfloat16 stops at 256


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "JambaForCausalLM" else pytest.mark.slow) for n in REFUSED]
)
def test_a_state_that_cannot_be_cut_is_refused_by_name(name):
    """The numbers are wrong, or there are none: an exception that a version of transformers lifts shows here."""
    model = model_of(name)
    obstacle = recurrent_obstacle(model)
    assert name in obstacle
    assert REFUSED[name] in obstacle
    case = example(RAGGED)
    expected = alone(model, *case)
    with pytest.raises((AssertionError, AttributeError, PackingError, TypeError)):
        assert_close(in_pieces(model, *case), expected)


@pytest.mark.slow
def test_every_class_with_states_is_known():
    """Of transformers: what keeps more than keys and values is proved exact above, or is refused."""
    found = set()
    for name in classes().keys() - UNBUILT.keys():
        model_class = getattr(transformers, name)
        layers = DynamicCache(config=tiny_config(model_class.config_class)).layers
        if model_class._is_stateful or any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers):
            found.add(name)
    assert found == {*FAST, *SLOW, *REFUSED}
