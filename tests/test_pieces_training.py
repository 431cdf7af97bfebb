"""A step in pieces is exact whatever else it has: adapters, precision, dropout, checkpointing, experts, scales."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from conftest import build_model, build_tokenizer, reward_rows
from nca_align import NCATrainer
from nca_align.batching.collator import RewardCollator
from nca_align.errors import UserError
from nca_align.models.logprobs import completion_logps
from test_attention import build
from test_trainer import config, logged, weights_after

LORA = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "init_lora_weights": False}
REENTRANT, PLAIN = (
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": on}} for on in (True, False)
)
BOUND = 20  # cuts prompts, and completions, into several parts
ROWS = reward_rows(2, [4, 3])


def made(tmp_path: Path, bound: int | None, **own) -> NCATrainer:
    """A trainer of a model that is the same each time."""
    tokenizer, family, lora = build_tokenizer(), own.pop("family", None), own.pop("lora", None)
    model: Any = build(family, vocab_size=len(tokenizer)) if family else build_model(tokenizer, **own.pop("model", {}))
    rows = own.pop("rows", ROWS)
    given: dict[str, Any] = {name: own.pop(name) for name in ("eval_dataset",) if name in own}
    if own.pop("nf4", False):
        model.save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
        given["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    torch.manual_seed(5)  # of a new adapter
    nca = NCATrainer(
        model, args=config(tmp_path, tokens_per_forward=bound, **{"startup_checks": False, "optim": "sgd"} | own),
        train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=LoraConfig(**(LORA | lora)) if lora is not None else None, **given,
    )  # fmt: skip
    for parameter in nca.model.parameters():  # TRL holds an adapter on NF4 in bfloat16, whose rounding would hide all
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return nca


def stepped(nca: NCATrainer, scale: float | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of a batch of all rows, by the model as accelerate wraps it."""
    model = nca.accelerator.prepare_model(nca.model)
    if scale is not None:
        nca.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    batch = nca.data_collator(list(nca.train_dataset))
    if nca.args.tokens_per_forward is None:
        assert len(batch["chunks"]) == 1
    else:
        parts = [(chunk["segments"].read, len(chunk["token_index"]) > 0) for chunk in batch["chunks"]]
        assert parts[:2] == [(True, False)] * 2
        assert (True, True) in parts
    loss = nca.training_step(model, batch)
    found = {name: p.grad for name, p in nca.model.named_parameters() if p.requires_grad}
    return float(loss), {name: own.float() / (scale or 1) for name, own in found.items() if own is not None}


def assert_same(found: tuple, expected: tuple, tolerance: float) -> None:
    (loss, gradients), (expected_loss, own) = found, expected
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert gradients.keys() == own.keys()
    size = torch.cat([gradient.flatten() for gradient in own.values()]).norm()
    assert size > 1e-3
    assert torch.cat([(gradients[name] - own[name]).flatten() for name in own]).norm() <= tolerance * size


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "listwise": {"loss_type": "infonca"},
    "all of it": {"lora": {}, "loss_type": ["nca", "sft"], **PLAIN},
    "the last layer": {"lora": {"layers_to_transform": [1]}, "loss_type": "plackett_luce"},
    "the first layer": {"lora": {"layers_to_transform": [0]}, **PLAIN},
    "reentrant, lora": {"lora": {}, **REENTRANT},
    "reentrant, full": {"loss_type": "infonca", **REENTRANT},
    "nf4": {"lora": {}, "nf4": True, **PLAIN},
    "nf4, reentrant": {"lora": {}, "nf4": True, "loss_type": "infonca", **REENTRANT},
    "experts": {"family": "Mixtral", "router_aux_loss_coef": 0.5, **PLAIN},
    "experts, lora": {"family": "Mixtral", "router_aux_loss_coef": 0.5, "lora": {"target_modules": ["q_proj", "gate"]}},
    "bf16": {"bf16": True},
    "bf16, checkpointed": {"bf16": True, "loss_type": "infonca", **PLAIN},
}
FAST = ("the last layer", "reentrant, lora")


@pytest.mark.parametrize(
    ("case", "scale"),
    [pytest.param(case, None, marks=() if case in FAST else pytest.mark.slow) for case in CASES]
    + [pytest.param(case, 1024.0, marks=pytest.mark.slow) for case in ("listwise", "all of it")],
)
def test_gradients_are_those_of_the_whole_row(case, scale, tmp_path):
    whole = stepped(made(tmp_path, None, **CASES[case]))
    found = stepped(made(tmp_path, BOUND, **CASES[case]), scale)
    assert_same(found, whole, 0.03 if "bf16" in case else 1e-5)


DROPOUT = {"disable_dropout": False, "model": {"attention_dropout": 0.3}, "lora": {"lora_dropout": 0.4}}


@pytest.mark.parametrize(
    ("loss_type", "own"),
    [("infonca", PLAIN), *(pytest.param("nca", own, marks=pytest.mark.slow) for own in ({}, REENTRANT))],
)
def test_with_dropout_gradients_are_those_of_the_loss_that_was_found(loss_type, own, tmp_path):
    """All forwards of a piece have the same: a numeric derivative in float64 says so."""
    nca = made(tmp_path, BOUND, loss_type=loss_type, precompute_ref_log_probs=True, **DROPOUT, **own)
    nca.model.double()
    trained = [p for p in nca.model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trained]

    def loss(step: float, seed: int = 7) -> float:
        with torch.no_grad():
            for parameter, direction in zip(trained, directions, strict=True):
                parameter.add_(direction, alpha=step)
        nca.model.zero_grad()
        torch.manual_seed(seed)
        found = stepped(nca)[0]
        with torch.no_grad():
            for parameter, direction in zip(trained, directions, strict=True):
                parameter.sub_(direction, alpha=step)
        return found

    numeric = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert abs(loss(0.0, seed=8) - loss(0.0)) > 1e-3  # dropout is on
    along = sum(float((p.grad * own).sum()) for p, own in zip(trained, directions, strict=True))
    assert along == pytest.approx(numeric, rel=1e-2)
    assert abs(along) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "own", [{"gradient_accumulation_steps": 2}, {"sync_ref_model": True, "ref_model_sync_steps": 1}, {"lora": {}}]
)
def test_runs_and_evaluations_are_those_of_whole_rows(own, tmp_path):
    """With a live reference."""
    rows, held_out = reward_rows(8, [4, 3]), Dataset.from_list(reward_rows(5, [3, 2], seed=9))
    runs = []
    for bound in (None, BOUND):
        nca = made(tmp_path, bound, rows=rows, eval_dataset=held_out, eval_strategy="steps", eval_steps=1, **own)
        runs.append((weights_after(nca), nca))
    (expected, whole), (found, nca) = runs
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for name in ("loss", "eval_loss", "eval_rewards/best", "logratios/best"):
        assert len(logged(whole, name)) == 3
        assert logged(nca, name) == pytest.approx(logged(whole, name), abs=1e-4)


# What is said, and refused


def test_gradients_of_compute_loss_are_refused_in_pieces(tmp_path):
    nca = made(tmp_path, BOUND)
    batch = nca.data_collator(list(nca.train_dataset))
    with pytest.raises(NotImplementedError, match="`compute_loss` was called with gradients on a batch in pieces"):
        nca.compute_loss(nca.model, batch)
    with torch.no_grad():
        assert float(nca.compute_loss(nca.model, batch)) == pytest.approx(stepped(nca)[0], rel=1e-5)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("prefix_shared", "each shared token once, in pieces of up to 20 tokens; agrees"),
        ("padded", "as asked for; a forward has rows of up to 20 tokens together, or one that is longer; agrees"),
    ],
)
def test_the_bound_and_what_may_be_beyond_it_are_told(layout, said, tmp_path, caplog):
    nca = made(tmp_path, BOUND, layout=layout, startup_checks=True)
    sizes = [chunk["input_ids"].numel() for chunk in nca.data_collator(list(nca.train_dataset))["chunks"]]
    assert (max(sizes) > BOUND) is (layout == "padded")
    assert f"Layout: {layout}, {said}" in caplog.text


@pytest.mark.parametrize("option", ["torch_compile", "ddp_static_graph"])
def test_a_collator_in_pieces_is_refused_beside_what_its_option_is(option, tmp_path):
    args = config(tmp_path, **{option: True})
    with pytest.raises(UserError, match=f"`{option}` is True, but .*`tokens_per_forward`"):
        NCATrainer(
            build_model(build_tokenizer()), args=args, train_dataset=Dataset.from_list(ROWS),
            data_collator=RewardCollator(0, "auto", tokens_per_forward=BOUND), processing_class=build_tokenizer(),
        )  # fmt: skip


def test_scores_of_a_model_are_those_of_whole_rows():
    """What `evaluate --implicit` compares: a bound of one conversation cuts the tree of many."""
    model = build("Llama")
    rows = [
        {"prompt_ids": [*range(3, 40)], "completion_ids": [[50 + k] * (3 + 9 * k) for k in range(5)]},
        {"prompt_ids": [7], "completion_ids": [[9], [8, 9]]},
    ]
    few, many = (completion_logps(model, rows, size) for size in (1, 100))
    for one, other in zip(few, many, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
