"""The two checks before the first step: without them each case here trains on wrong numbers, and says nothing."""

import copy
import math
from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset

from conftest import build_model, build_tokenizer, reward_rows
from nca_align import NCAConfig, NCATrainer
from nca_align.batching import attention
from nca_align.batching.attention import share_prefixes
from nca_align.batching.collator import RewardCollator, pack
from nca_align.batching.kept_path import KeptPath
from nca_align.errors import UnsupportedError, UserError
from nca_align.models.logprobs import TokenLogps, add_token_logps
from nca_align.training import adapters, own_logits, startup_checks
from nca_align.training.own_logits import compare, look_ahead, own_logps, row_beyond_window, sample_rows, unpatched
from nca_align.training.rounding import Rounding, rounding
from tiny_models import build as build_tiny

CPU = torch.device("cpu")
TINY = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "max_position_embeddings": 512,
}  # fmt: skip


def tiny(model_type: str, **own):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**TINY, **own})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def mpt(logit_scale: float):
    torch.manual_seed(0)
    config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=384, logit_scale=logit_scale)
    return transformers.MptForCausalLM(config).eval()


def that_raises(error: Exception):
    """A model whose forward fails without an image."""
    model = build_tiny("LlavaForConditionalGeneration")
    own = type(model).forward

    class GitLike(type(model)):
        def forward(self, input_ids=None, pixel_values=None, **kwargs):
            if pixel_values is None:
                raise error
            return own(self, input_ids, pixel_values, **kwargs)

    model.__class__ = GitLike
    return model


def trainer(tmp_path, model=None, rows=None, **own) -> NCATrainer:
    given = {n: own.pop(n) for n in ("ref_model", "peft_config", "data_collator") if n in own}
    args = NCAConfig(
        **{
            "output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "max_steps": 1, "report_to": "none",
            "disable_tqdm": True, "save_strategy": "no", "max_length": 128, "per_device_train_batch_size": 2,
            "logging_steps": 1, "gradient_checkpointing": False, "beta": 0.1, "alpha": 0.5,
        } | own
    )  # fmt: skip
    tokenizer = build_tokenizer()
    dataset = rows if isinstance(rows, IterableDataset) else Dataset.from_list(rows or reward_rows(4, [3, 2]))
    return NCATrainer(
        build_model(tokenizer) if model is None else model, args=args, train_dataset=dataset,
        processing_class=tokenizer, **given,
    )  # fmt: skip


def said(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "nca_align"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def tokens(n: int, seed: int = 0) -> list[int]:
    return torch.randint(4, 384, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def rows() -> list[dict]:
    first = [tokens(9, 1), tokens(14, 2), tokens(5, 3)]
    return [
        {"prompt_ids": tokens(30), "completion_ids": first, "rewards": [0.0, 1.0, 2.0]},
        {"prompt_ids": tokens(20, 4), "completion_ids": [tokens(3, 5), tokens(11, 6)], "rewards": [0.0, 1.0]},
    ]


def compared(model, collator, batch=None, gradients: bool = True, policy=None):
    """As the trainer does."""
    policy = policy or model
    batches, parameters = [batch or rows()], [p for p in policy.parameters() if p.requires_grad and gradients]
    own = [own_logps(policy, model, own_rows, CPU, parameters) for own_rows in batches]
    return compare(policy, model, batches, collator, own, CPU, parameters)


# What is compared


def test_the_models_own_log_probabilities_are_those_of_its_forward_alone(model):
    """In float64, by no code of the package."""
    add_token_logps(model)
    share_prefixes(model)
    model.double()
    found, _ = own_logps(model, model, rows(), CPU)
    assert sorted(found) == [0, 1, 2, 3, 4]  # b * K + k, of ragged K
    fresh = copy.deepcopy(model)
    fresh.set_attn_implementation("eager")
    with unpatched(fresh), torch.no_grad():
        for b, row in enumerate(rows()):
            for k, completion in enumerate(row["completion_ids"]):
                logits = fresh(input_ids=torch.tensor([row["prompt_ids"] + completion])).logits[0].log_softmax(-1)
                start = len(row["prompt_ids"]) - 1
                expected = [logits[start + t, token].item() for t, token in enumerate(completion)]
                assert found[3 * b + k].tolist() == pytest.approx(expected, abs=1e-5)


def test_within_unpatched_the_model_has_its_own_forward_and_attention(model):
    own = model.config._attn_implementation
    add_token_logps(model)
    share_prefixes(model)
    patched, name = model.forward, model.config._attn_implementation
    assert name != own
    with unpatched(model):
        assert model.forward.__func__ is type(model).forward
        assert model.config._attn_implementation == own
    assert model.forward == patched
    assert model.config._attn_implementation == name


@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
@pytest.mark.parametrize("per_forward", [None, 20])
def test_a_model_agrees_with_itself_in_log_probabilities_and_gradients(layout, per_forward, model):
    add_token_logps(model)
    share_prefixes(model)
    token, completion, gradient = compared(model, RewardCollator(0, layout, tokens_per_forward=per_forward))
    assert token < 1e-5
    assert completion < 1e-5
    assert 0 < gradient < 1e-4
    assert all(p.grad is None for p in model.parameters())  # nothing is left for the first step


@pytest.mark.parametrize("name", ["Lfm2ForCausalLM", "Qwen3_5ForCausalLM"])
def test_gradients_go_through_the_states_between_pieces(name, monkeypatch):
    """Without those that come back at a state, they would be others; what parameters had is left as it was."""
    model = build_tiny(name)
    add_token_logps(model)
    share_prefixes(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    collator = RewardCollator(0, "prefix_shared", recurrent=True)
    token, completion, gradient = compared(model, collator)
    assert max(token, completion) < 1e-4
    assert 0 < gradient < 1e-4
    assert all((parameter.grad == 7.0).all() for parameter in model.parameters())
    monkeypatch.setattr(KeptPath, "keep_state_gradients", lambda *args: None)
    assert compared(model, collator)[2] > 0.05


def test_only_trainable_parameters_are_differentiated(model):
    add_token_logps(model)
    share_prefixes(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    policy = peft.get_peft_model(model, config)
    found = compared(model, RewardCollator(0, "prefix_shared"), policy=policy)
    assert found[0] < 1e-5
    assert 0 < found[2] < 1e-4


def test_without_gradients_no_graph_is_kept(model, monkeypatch):
    add_token_logps(model)
    enabled, own = [], own_logits.forward_chunk
    monkeypatch.setattr(
        own_logits, "forward_chunk", lambda *args: enabled.append(torch.is_grad_enabled()) or own(*args)
    )
    assert compared(model, RewardCollator(0), gradients=False)[2] == 0
    assert enabled == [False]


def test_convolutions_show_in_the_gradients():
    """LFM2 mixes neighbours of the row outside attention: as one packed row, its gradients tell most."""
    model = tiny("lfm2", layer_types=["conv", "full_attention"], initializer_range=0.1)
    add_token_logps(model)
    share_prefixes(model)
    token, _, gradient = compared(model, RewardCollator(0, "prefix_shared"))
    assert gradient > 0.05
    assert not startup_checks._holds((0.0, 0.0, gradient), rounding(model, model, "no"))
    assert token < 0.2


def test_nan_and_missing_tokens_are_differences(model, monkeypatch):
    add_token_logps(model)

    class Short(RewardCollator):
        def chunks(self, rows):
            (chunk,) = super().chunks(rows)
            return [chunk | {name: chunk[name][1:] for name in ("token_index", "target_ids", "completion_index")}]

    assert compared(model, Short(0))[0] == math.inf
    own = own_logits.forward_chunk
    with monkeypatch.context() as patch:
        patch.setattr(own_logits, "forward_chunk", lambda *args: TokenLogps(math.nan * own(*args).token_logps))
        token, completion, _ = compared(model, RewardCollator(0), gradients=False)
    assert math.isnan(token)
    assert not startup_checks._holds((token, completion, 0.0), Rounding(1.0, True))
    with torch.no_grad():  # values that the model itself doesn't have are no fault of the layout
        model.lm_head.weight.fill_(math.nan)
    assert compared(model, RewardCollator(0)) == (0, 0, 0)


# Bounds


@pytest.mark.parametrize(
    ("dtype", "precision", "token", "completion"),
    [
        (torch.float32, "no", 4e-3, 4e-4), (torch.float32, "bf16", 3.1, 0.31), (torch.float32, "fp16", 0.39, 0.039),
        (torch.bfloat16, "no", 3.1, 0.31), (torch.float16, "no", 0.39, 0.039), (torch.bfloat16, "fp16", 3.1, 0.31),
    ],
)  # fmt: skip
def test_bounds_are_by_the_coarsest_precision(dtype, precision, token, completion, model):
    bounds = rounding(model.to(dtype), model, precision)
    assert bounds.token == pytest.approx(token, rel=0.02)
    assert bounds.completion == pytest.approx(completion, rel=0.02)
    # 2.2 nats of 120, on a completion of 48 tokens, are no rounding in any precision
    assert bounds.completion < 2.2 / 48**0.5
    assert not startup_checks._holds((0.0, 2.2 / 48**0.5, 0.0), bounds)
    assert startup_checks._holds((0.99 * token, 0.99 * completion, 0.99 * bounds.gradient), bounds)
    for wrong in ((1.1 * token, 0.0, 0.0), (0.0, 1.1 * completion, 0.0), (0.0, 0.0, 1.1 * bounds.gradient)):
        assert not startup_checks._holds(wrong, bounds)


def test_a_quantised_model_and_an_adapter_compute_in_dtypes_of_their_own(model):
    model.config.quantization_config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16
    )
    assert rounding(model, model, "no").epsilon == torch.finfo(torch.float16).eps
    model.lm_head.weight.data = model.lm_head.weight.data.bfloat16()
    assert rounding(model, model, "no").epsilon == torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("backend", "rounded", "as_in"),
    [
        (torch.backends, "tf32", torch.float16), (torch.backends.cuda.matmul, "tf32", torch.float16),
        (torch.backends.mkldnn.matmul, "bf16", torch.bfloat16),
    ],
)  # fmt: skip
def test_products_of_float32_may_be_rounded_by_a_setting(backend, rounded, as_in, model):
    before = backend.fp32_precision
    assert not rounding(model, model, "no").half
    backend.fp32_precision = rounded  # `tf32` of TrainingArguments is the first
    try:
        assert rounding(model, model, "no").epsilon == torch.finfo(as_in).eps
    finally:
        backend.fp32_precision = before


def test_a_mixture_of_experts_may_route_otherwise_after_a_rounding(model):
    routed = tiny("mixtral", num_local_experts=4, sliding_window=None).bfloat16()
    bounds, plain = rounding(routed, routed, "no"), rounding(model.bfloat16(), model, "no")
    assert bounds.completion == 3 * plain.completion
    assert bounds.token == plain.token


# Against the model itself


class Packed(RewardCollator):
    """Says that it is padded, and packs: the model's own attention sees all of the row."""

    def chunks(self, rows):
        columns = max(len(row["completion_ids"]) for row in rows)
        return pack([
            (b * columns + k, row["prompt_ids"], completion, [1] * len(completion))
            for b, row in enumerate(rows) for k, completion in enumerate(row["completion_ids"])
        ])  # fmt: skip


def test_a_packed_collator_that_leaks_future_tokens_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="`data_collator` is a Packed, whose batches do not give"):
        trainer(tmp_path, data_collator=Packed(0))
    assert trainer(tmp_path, data_collator=Packed(0), startup_checks=False).data_collator.layout == "padded"


def test_a_scale_of_the_logits_that_is_not_known_here_is_found(tmp_path):
    with pytest.raises(UnsupportedError, match="`model` is a MptForCausalLM, whose log-prob"):
        trainer(tmp_path, mpt(0.5))


def test_a_model_that_sees_later_tokens_is_refused(tmp_path):
    """On text alone, PaliGemma attends in both directions."""
    with pytest.raises(
        UnsupportedError, match=r"`model` is a PaliGemma.*, whose logits change by .* nats with a token"
    ):
        trainer(tmp_path, build_tiny("PaliGemmaForConditionalGeneration"))


def test_how_far_a_model_looks_ahead():
    causal, both_ways = tiny("mistral"), build_tiny("PaliGemmaForConditionalGeneration")
    short = {"prompt_ids": [7], "completion_ids": [[9], [8]]}
    for row in (*rows(), short):
        assert look_ahead(causal, causal, row, CPU) < 1e-6
        assert look_ahead(both_ways, both_ways, row, CPU) > 1e-3


def test_a_model_that_needs_more_than_text_is_refused(tmp_path):
    needs = that_raises(ValueError("You must specify pixel_values"))
    with pytest.raises(UnsupportedError, match=r"`model` is a GitLike, which can't be run on text alone \(You must"):
        trainer(tmp_path, needs)
    needs = that_raises(AttributeError("'NoneType' object has no attribute 'shape'"))
    type(needs).main_input_name = "pixel_values"
    with pytest.raises(UnsupportedError, match=r"can't be run on text alone \('NoneType'"):
        trainer(tmp_path, needs)


def test_a_model_that_fails_for_another_reason_is_told_so(tmp_path):
    broken = that_raises(TypeError("rotate() takes 2 arguments"))
    type(broken).main_input_name = "pixel_values"
    failed = r"`model` is a GitLike, whose own forward failed on a row of text with TypeError \(rotate\(\) takes 2"
    with pytest.raises(UnsupportedError, match=failed):
        trainer(tmp_path, broken)


@pytest.mark.parametrize("heads", [1, 32])
@pytest.mark.parametrize("name", ["DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"])
def test_an_index_of_keys_whose_scores_tie_is_found(name, heads, tmp_path):
    """ReLU makes scores 0 where no head sees a match; which of such keys are taken depends on the padding."""
    model = build_tiny(name, index_n_heads=heads)
    assert model.config.index_topk < min(len(row["prompt_ids"]) for row in rows())
    if heads == 32:  # without ties
        assert trainer(tmp_path, model).data_collator.layout == "padded"
        return
    with pytest.raises(UnsupportedError, match=rf"`model` is a {name}, whose log-prob.*`layout: padded`"):
        trainer(tmp_path, model)


def test_a_model_of_two_precisions_is_right_or_refused(tmp_path):
    """HY-V4 keeps its head in float32, and scales nothing."""
    trainer(tmp_path, tiny("hy_v4"))


def test_nemotron_which_drops_the_segments_falls_back_and_says_why(tmp_path, caplog):
    nca = trainer(tmp_path, tiny("nemotron"))
    assert nca.data_collator.layout == "padded"
    (line,) = said(caplog)
    assert "Layout: padded, the model's layers don't pass the arguments of its forward on to NemotronAttention;" in line
    nca.train()
    with pytest.raises(
        UnsupportedError, match=r"`layout: prefix_shared` can't be used here: .* to NemotronAttention\."
    ):
        trainer(tmp_path, tiny("nemotron"), layout="prefix_shared")


def test_a_model_that_mixes_positions_otherwise_is_padded_or_refused(tmp_path, caplog, monkeypatch):
    """LFM2's convolutions, as if nothing in the model told of them."""
    monkeypatch.setattr("nca_align.training.layout.recurrent_layers", lambda config: set())
    lfm2 = {"layer_types": ["conv", "full_attention"], "initializer_range": 0.1}
    assert trainer(tmp_path, tiny("lfm2", **lfm2)).data_collator.layout == "padded"
    assert "since prefix_shared does not give the model's own log-probabilities (" in said(caplog)[-1]
    with pytest.raises(UnsupportedError, match=r"`layout: prefix_shared` does not .*Use `layout: padded`, which"):
        trainer(tmp_path, tiny("lfm2", **lfm2), layout="prefix_shared")


RIGHT: dict[str, Callable] = {
    "cohere": lambda: tiny("cohere", logit_scale=0.3),
    "gemma2": lambda: tiny("gemma2", sliding_window=32, query_pre_attn_scalar=8),
    "granite": lambda: tiny("granite", logits_scaling=3.0),
    "mistral": lambda: tiny("mistral", sliding_window=32),
    "mpt": lambda: mpt("inv_sqrt_d_model"),  # type: ignore[arg-type]
    "gpt_oss": lambda: tiny("gpt_oss", num_local_experts=4, num_experts_per_tok=2, sliding_window=32),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(name, tmp_path, caplog):
    nca = trainer(tmp_path, RIGHT[name]())
    assert any("agrees with the model's own logits on the first rows: tokens within" in line for line in said(caplog))
    assert nca.data_collator.layout == ("padded" if name == "mpt" else "prefix_shared")


@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
@pytest.mark.parametrize("precision", [{"bf16": True}, {"dtype": torch.bfloat16}])
def test_half_precision_passes(layout, precision, tmp_path):
    model = build_model(build_tokenizer())
    if "dtype" in precision:
        model, precision = model.to(precision["dtype"]), {}
    trainer(tmp_path, model, layout=layout, **precision).train()


def test_a_window_that_packed_rows_do_not_keep_is_found_by_a_longer_row(tmp_path, monkeypatch):
    """The first rows are shorter than the window: without a longer one, nothing shows."""
    own = attention.attend_segments

    def windowless(*args, **kwargs):
        return own(*args, **(kwargs | {"sliding_window": None}))

    monkeypatch.setattr(attention, "attend_segments", windowless)
    window = {"sliding_window": 100}
    short = reward_rows(3, 2)
    long = [*short[:2], short[2] | {"prompt": [{"role": "user", "content": "the lazy dog " * 80}]}]
    model = tiny("mistral", **window)
    assert trainer(tmp_path, model, short, max_length=256).data_collator.layout == "prefix_shared"  # no row is as long
    assert trainer(tmp_path, tiny("mistral", **window), long, max_length=256).data_collator.layout == "padded"


def test_padding_that_changes_an_indexed_attention_is_found_by_a_longer_row():
    rows, config = [{"prompt_ids": tokens(20), "completion_ids": [tokens(20)] * 2}], tiny("mistral").config
    for name in ("sliding_window", "attention_chunk_size", "index_topk"):
        config.sliding_window = None
        setattr(config, name, 16)
        row, unsaid = row_beyond_window(rows * 2, config)
        assert row is not None
        delattr(config, name) if name != "sliding_window" else None
        lengths = [len(row["prompt_ids"]) + len(completion) for completion in row["completion_ids"]]
        assert max(lengths) == 32  # twice the window, of rows of 40
        assert len(set(lengths)) == 2  # one is padded
        assert unsaid == ""


@pytest.mark.parametrize("stream", [False, True])
def test_the_row_beyond_the_window_is_no_longer_than_the_datas(stream):
    config = tiny("mistral", sliding_window=30).config
    rows = [
        {"prompt_ids": tokens(20), "completion_ids": [tokens(5), tokens(n)], "rewards": [0.0, 1.0]} for n in (4, 15, 9)
    ]
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if stream else Dataset.from_list(rows)
    row, _ = row_beyond_window(dataset, config)
    assert len(row["prompt_ids"]) + max(map(len, row["completion_ids"])) == 35
    config.sliding_window = 35
    assert row_beyond_window(dataset, config) == (None, "")
    config.sliding_window = 8192
    long = Dataset.from_list([rows[0] | {"prompt_ids": tokens(9000)}])
    assert "window of 8192 tokens is not covered" in row_beyond_window(long, config)[1]


@pytest.mark.parametrize("number", [1, 2, 5])
def test_sample_rows_are_the_first_two_and_small(number):
    long = [
        {
            "prompt_ids": list(range(100)), "completion_ids": [[k] * 100 for k in range(5)],
            "rewards": [0.0, 1.0, 2.0, 3.0, 4.0], "ref_logps": [-1.0] * 5,
        }
    ] * number  # fmt: skip
    sample = sample_rows(iter(long))
    assert len(sample) == min(number, 2)
    for row in sample:
        assert row == {
            "prompt_ids": list(range(36, 100)),  # its end, where the completions go on
            "completion_ids": [[k] * 48 for k in range(3)],
            "rewards": [0.0, 1.0, 2.0],
        }


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("process", [0, 1, 2])
def test_one_process_that_disagrees_decides_for_all(process, wrong, tmp_path, monkeypatch):
    checks = trainer(tmp_path)._checks
    differences = [(1e-6, 1e-6, 0.0)] * 3
    differences[process] = (wrong, 1e-6, 0.0)
    monkeypatch.setattr(startup_checks, "gather_object", lambda own: differences)
    assert not startup_checks._holds(checks._worst((0.0, 0.0, 0.0)), Rounding(1.0, True))


# Against the reference

ADAPTERS: dict[str, Callable] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
    "embed_tokens": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "trainable_token_indices": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices=list(range(4, 200))
    ),
    "modules_to_save": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True),
    "pissa": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa"),
    "olora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="olora"),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "lokr": lambda: peft.LoKrConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=50, target_modules=["q_proj", "v_proj"]),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj"]),
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, target_modules=["q_proj"], total_step=10),
    "p_tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prompt_tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}  # fmt: skip
# those whose "ref" TRL copies wholly, so that nothing shows without our copy
COPIED_BY_TRL = {"lora", "modules_to_save", "dora", "p_tuning", "prompt_tuning"}


def adapted(name: str):
    """A policy with an adapter as training leaves it: each of its weights has moved."""
    torch.manual_seed(0)
    policy = peft.get_peft_model(build_model(build_tokenizer()), ADAPTERS[name]())
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return policy


def log_ratios(nca: NCATrainer) -> torch.Tensor:
    nca.model.eval()
    batch = nca.data_collator([nca.train_dataset[i] for i in range(2)])
    with torch.no_grad():
        return (nca._batch_logps(nca.model, batch)[0] - nca._reference_logps(batch))[batch["valid"]]


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_training_goes_on_from_is_copied_whole(name, tmp_path):
    policy = adapted(name)
    before = copy.deepcopy(policy.eval())
    nca = trainer(tmp_path, policy)
    ids = torch.tensor([nca.train_dataset[0]["prompt_ids"]])
    with torch.no_grad():
        assert torch.equal(policy.eval()(ids).logits, before(ids).logits)  # the copy leaves the policy as it was
    assert log_ratios(nca).abs().max() == 0
    nca.train()
    assert log_ratios(nca).abs().max() > 0  # and the reference doesn't move with it


@pytest.mark.parametrize("name", sorted(ADAPTERS.keys() - COPIED_BY_TRL - {"pissa", "olora", "adalora"}))
def test_a_copy_that_lacks_a_part_is_found(name, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "set_up_reference_adapter", lambda *args: None)
    with pytest.raises(UserError, match=r"The log-ratios at the start are up to .* nats.*is not the same"):
        trainer(tmp_path, adapted(name)).train()


@pytest.mark.parametrize("name", ["embed_tokens", "ia3", "loha", "vera"])
def test_a_copy_that_lacks_a_part_is_found_in_bfloat16(name, tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "set_up_reference_adapter", lambda *args: None)
    with pytest.raises(UserError, match="is not the same"):
        trainer(tmp_path, adapted(name), bf16=True).train()


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_new_adapter_starts_at_its_reference(name, tmp_path):
    nca = trainer(tmp_path, peft_config=ADAPTERS[name]())
    assert log_ratios(nca).abs().max() < 1e-3
    nca._checks.check_reference(nca.model)  # as a run begins


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_an_initialisation_that_edits_the_base_has_the_initial_adapter_as_reference(name, tmp_path, monkeypatch):
    nca = trainer(tmp_path, peft_config=ADAPTERS[name]())
    batch = nca.data_collator([nca.train_dataset[0]])
    plain = trainer(tmp_path)
    expected = plain._reference_logps(batch)  # of the model before the adapter was put on it
    assert nca._reference_logps(batch).tolist()[0] == pytest.approx(expected.tolist()[0], abs=1e-3)
    monkeypatch.setattr(adapters, "set_up_reference_adapter", lambda *args: None)
    with pytest.raises(UserError, match="a new LORA adapter does not start as the model"):
        trainer(tmp_path, peft_config=ADAPTERS[name]()).train()


def test_a_new_adapter_that_starts_elsewhere_is_refused_with_the_way_out(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    elsewhere = peft.LoHaConfig(r=4, target_modules=["q_proj"], init_weights=False)
    with pytest.raises(UserError, match="`init_lora_weights: false` starts the adapter with random weights"):
        trainer(tmp_path, peft_config=config).train()
    with pytest.raises(UserError, match="give `get_peft_model"):
        trainer(tmp_path, peft_config=elsewhere).train()
    trainer(tmp_path, peft.get_peft_model(build_model(build_tokenizer()), elsewhere)).train()
    trainer(tmp_path, peft_config=config, startup_checks=False).train()


def test_a_given_reference_that_differs_is_said_once(tmp_path, caplog):
    nca = trainer(tmp_path, ref_model=build_model(build_tokenizer(), seed=5), max_steps=2)
    nca.train()
    assert sum("the `ref_model` given is another model" in line for line in said(caplog)) == 1
    caplog.clear()
    trainer(tmp_path, ref_model=build_model(build_tokenizer())).train()
    assert not any("ref_model" in line for line in said(caplog))


def test_weights_that_change_after_the_trainer_is_made_are_found(tmp_path):
    nca = trainer(tmp_path)
    with torch.no_grad():
        nca.model.lm_head.weight.mul_(1.1)
    with pytest.raises(UserError, match="its weights changed after the trainer was made"):
        nca.train()


def test_ref_logps_of_another_model_in_the_data_are_found(tmp_path):
    prepared = trainer(tmp_path).train_dataset
    wrong = prepared.add_column("ref_logps", [[-3.0] * len(row["rewards"]) for row in prepared])
    nca = NCATrainer(
        build_model(build_tokenizer()), args=trainer(tmp_path).args, train_dataset=wrong,
        processing_class=build_tokenizer(),
    )  # fmt: skip
    with pytest.raises(UserError, match="the data set's column `ref_logps` is of another model"):
        nca.train()


@pytest.mark.parametrize("peft_config", [None, ADAPTERS["lora"]()])
@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
def test_cached_values_in_bfloat16_are_within_rounding(layout, peft_config, tmp_path):
    nca = trainer(tmp_path, precompute_ref_log_probs=True, bf16=True, layout=layout, peft_config=peft_config)
    assert "ref_logps" in nca.train_dataset.column_names
    nca.train()
    batch = nca.data_collator([nca.train_dataset[0]])
    bounds = rounding(nca.model, nca.model, "bf16")
    assert bounds.completion * batch["lengths"].max() ** 0.5 < 2.2


@pytest.mark.parametrize("name", ["attention_dropout", "resid_pdrop"])
def test_dropout_that_no_module_does_is_turned_off(name, tmp_path, caplog):
    model = (
        tiny("phi", resid_pdrop=0.5) if name == "resid_pdrop" else build_model(build_tokenizer(), attention_dropout=0.5)
    )
    nca = trainer(tmp_path, model, max_steps=1)
    batch = nca.data_collator([nca.train_dataset[0]])
    model.train()
    with torch.no_grad():
        draws = [nca._batch_logps(model, batch)[0] for _ in range(2)]
    assert torch.equal(*draws)
    nca.train()
    assert not any("dropout" in line for line in said(caplog))


def test_dropout_that_is_left_on_is_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("nca_align.trainer.disable_functional_dropout", lambda model: None)
    trainer(tmp_path, build_model(build_tokenizer(), attention_dropout=0.5)).train()
    (line,) = [line for line in said(caplog) if "dropout" in line]
    assert "LlamaForCausalLM has dropout, or other noise, that `disable_dropout: true` doesn't turn off" in line


def test_dropout_that_the_user_chose_is_fine(tmp_path, caplog):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5)
    trainer(tmp_path, peft_config=config, disable_dropout=False).train()
    trainer(tmp_path, build_model(build_tokenizer(), attention_dropout=0.5), disable_dropout=False).train()
    assert not any("dropout" in line or "log-ratio" in line for line in said(caplog))


# When


def test_a_run_is_the_same_without_the_checks(tmp_path):
    losses = []
    for checks in (True, False):
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5)
        nca = trainer(tmp_path, peft_config=config, disable_dropout=False, max_steps=3, startup_checks=checks)
        nca.train()
        losses.append([line["loss"] for line in nca.state.log_history if "loss" in line])
        identity = nca._resume.run_identity()
        assert "startup_checks" not in identity
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


def test_without_the_checks_nothing_is_compared_and_that_is_said(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(startup_checks, "own_logps", None)
    nca = trainer(tmp_path, startup_checks=False)
    monkeypatch.setattr(startup_checks.StartupChecks, "_log_ratio", None)
    nca.train()
    assert said(caplog) == ["Layout: prefix_shared, each shared token once; not checked (`startup_checks: false`)."]


def test_a_run_is_checked_once_and_a_resumed_one_is_not(tmp_path, monkeypatch):
    calls = []
    own = startup_checks.StartupChecks._log_ratio

    def counted(self, *args, **kwargs):
        calls.append(self.trainer.state.global_step)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(startup_checks.StartupChecks, "_log_ratio", counted)
    options = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1}
    first = trainer(tmp_path, max_steps=2, **options)
    first.train()
    first.train()  # goes on from what it trained, away from the reference
    assert calls == [0]
    trainer(tmp_path, max_steps=3, resume_changed=["max_steps"], **options).train(resume_from_checkpoint=True)
    assert calls == [0]
