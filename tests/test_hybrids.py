"""Models with recurrent layers in the trainer: each prompt once, and the run is the padded one.

Tiny random models: short convolutions (LFM2), Mamba 2 (Granite) and the gated delta rule (Qwen3.5), beside attention.
"""

import copy
import logging
import re

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import tiny_models
from conftest import build_tokenizer, labelled_rows, reward_rows, slow_but
from nca_align import NCAConfig, NCATrainer
from nca_align.batching.recurrent import RecurrentCache

CONVOLUTIONS, MAMBA_2, GATED_DELTA = "Lfm2ForCausalLM", "GraniteMoeHybridForCausalLM", "Qwen3_5ForCausalLM"
# five prompts in steps of three: the last step of a pass has two
ROWS, HELD_OUT = reward_rows(5, [4, 2, 3]), reward_rows(3, [2, 4], seed=5)
LORA = LoraConfig(r=4, target_modules="all-linear")


def trainer(folder, name: str, rows=None, peft_config=None, callbacks=None, model=None, **own) -> NCATrainer:
    args = NCAConfig(
        **{
            "output_dir": str(folder), "bf16": False, "use_cpu": True, "max_steps": 4, "logging_steps": 1,
            "per_device_train_batch_size": 3, "per_device_eval_batch_size": 2, "save_strategy": "no",
            "report_to": "none", "disable_tqdm": True, "beta": 0.1, "alpha": 0.5, "max_length": 128,
            "gradient_checkpointing": False, "lr_scheduler_type": "constant",
            # plain descent shows a wrong scale of the gradients, which Adam and clipping would hide
            "optim": "sgd", "learning_rate": 0.02, "max_grad_norm": 1e6,
        } | own
    )  # fmt: skip
    return NCATrainer(
        model or tiny_models.build(name), args=args, train_dataset=Dataset.from_list(rows or ROWS),
        eval_dataset=Dataset.from_list(HELD_OUT if args.alpha is not None else labelled_rows(3, 2)),
        processing_class=build_tokenizer(), peft_config=copy.deepcopy(peft_config), callbacks=callbacks,
    )  # fmt: skip


def trained(nca: NCATrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in nca.model.parameters() if p.requires_grad])


def figures(nca: NCATrainer) -> list[dict[str, float]]:
    """What is logged of each step and evaluation, without times and without what the layout decides."""
    left_out = ("runtime", "per_second", "num_tokens", "flos")
    return [
        {name: value for name, value in line.items() if not any(part in name for part in left_out)}
        for line in nca.state.log_history
    ]


def run(folder, name: str, layout: str, rows=None, **own) -> tuple[NCATrainer, list[dict], torch.Tensor]:
    """A run, its figures, and the step that its weights have taken."""
    nca = trainer(folder, name, rows, layout=layout, **own)
    before = trained(nca).clone()
    nca.train()
    nca.evaluate()
    return nca, figures(nca), trained(nca) - before


OUTCOME = {"loss_type": "outcome", "alpha": None}
CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
CASES = {
    "nca": (CONVOLUTIONS, {}),
    "infonca in pieces": (MAMBA_2, {"loss_type": "infonca", "tokens_per_forward": 40}),
    "checkpointing in pieces": (GATED_DELTA, {"tokens_per_forward": 40, **CHECKPOINTING}),
} | {
    f"{name[:4]} {loss} {bound} {how}": (
        name,
        {"loss_type": loss, "tokens_per_forward": bound} | own,
    )
    for name in (CONVOLUTIONS, MAMBA_2, GATED_DELTA)
    for loss, bound, how, own in (
        ("nca", 40, "lora", {"peft_config": LORA}),
        ("infonca", None, "lora, checkpointing", {"peft_config": LORA, **CHECKPOINTING}),
        ("nca", None, "precomputed", {"precompute_ref_log_probs": True, "gradient_accumulation_steps": 2}),
        ("plackett_luce", 40, "precomputed, checkpointing", {"precompute_ref_log_probs": True, **CHECKPOINTING}),
        ("outcome", None, "single", OUTCOME | {"rows": labelled_rows(5, 1, seed=3)}),
        ("outcome", 40, "single and several", OUTCOME | {"rows": labelled_rows(5, [1, 3], seed=4)}),
    )
}


@pytest.mark.parametrize("case", slow_but(CASES, "nca", "checkpointing in pieces"))
def test_a_hybrid_shares_prompts_and_trains_as_padded(case, tmp_path, caplog):
    """Losses, metrics, evaluations and weights after steps of plain descent, in steps of unequal prompts."""
    name, own = CASES[case]
    caplog.set_level(logging.INFO, "nca_align")
    shared, found, step = run(tmp_path / "shared", name, "auto", **own)
    assert shared.data_collator.layout == "prefix_shared"
    said = r"Layout: prefix_shared, each shared token once.*; agrees with the model's own logits .*gradients within"
    assert any(re.match(said, line) for line in caplog.messages)
    chunks = shared.data_collator([shared.train_dataset[i] for i in range(3)])["chunks"]
    several = any(len(row["rewards"]) > 1 for row in own.get("rows", ROWS))
    assert any(chunk["segments"].read for chunk in chunks) is several  # states were handed on
    padded, expected, padded_step = run(tmp_path / "padded", name, "padded", **own)
    assert padded.data_collator.layout == "padded"
    assert shared.state.num_input_tokens_seen <= padded.state.num_input_tokens_seen
    assert padded_step.norm() > 1e-3
    assert (step - padded_step).norm() < 1e-3 * padded_step.norm()
    assert len(found) == len(expected) == 7  # four steps, two evaluations, the whole run
    for name in ("loss", "grad_norm"):  # all log-ratios are 0 there but for rounding, and so are in no order
        assert found[0][name] == pytest.approx(expected[0][name], rel=1e-3)
    for line, other in zip(found[1:], expected[1:], strict=True):
        assert line == pytest.approx(other, rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("lost", ["keep_states", "keep_state_gradients"])
def test_without_the_states_or_their_gradients_it_would_be_another_run(lost, tmp_path, monkeypatch, caplog):
    """And the check at the start finds it."""
    monkeypatch.setattr(f"nca_align.batching.kept_path.KeptPath.{lost}", lambda *args: None)
    nca = trainer(tmp_path, CONVOLUTIONS, max_steps=1)
    assert nca.data_collator.layout == "padded"
    assert any("since prefix_shared does not give the model's own" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "`gradient_checkpointing_kwargs: {use_reentrant: true}` keeps no graph of recurrent states",
        ),
        ({"pad_to_multiple_of": 8}, "`pad_to_multiple_of` 8 asks for padding"),
    ],
)
def test_what_has_no_states_to_hand_on_is_padded_and_trains(own, reason, tmp_path, caplog):
    caplog.set_level(logging.INFO, "nca_align")
    nca = trainer(tmp_path, CONVOLUTIONS, max_steps=1, **own)
    assert nca.data_collator.layout == "padded"
    assert not nca.data_collator.recurrent
    assert any(line.startswith(f"Layout: padded, {reason}") for line in caplog.messages)
    before = trained(nca).clone()
    nca.train()
    assert not torch.equal(trained(nca), before)


def test_a_position_bias_is_padded_by_name(tmp_path, caplog):
    nca = trainer(tmp_path, "InklingForCausalLM", max_steps=1)
    assert nca.data_collator.layout == "padded"
    said = "Layout: padded, the model adds a position bias to its attention's scores; agrees with"
    assert any(line.startswith(said) for line in caplog.messages)
    nca.train()


def test_generation_has_transformers_own_cache(tmp_path):
    """After a run in pieces, one that is handed to a user generates and evaluates as it did."""
    nca = trainer(tmp_path, GATED_DELTA, max_steps=1)
    nca.train()
    assert nca.data_collator.layout == "prefix_shared"
    model = nca.model.eval()
    fresh = tiny_models.build(GATED_DELTA)
    fresh.load_state_dict(model.state_dict())
    ids = torch.arange(7, 19)[None]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), fresh.generate(ids, **options))
    assert not isinstance(model(ids, use_cache=True).past_key_values, RecurrentCache)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["auto", "padded"])
@pytest.mark.parametrize("name", [MAMBA_2, GATED_DELTA, "NemotronHForCausalLM"])
def test_a_resumed_run_ends_as_one_that_was_not_stopped(name, layout, tmp_path):
    options = {"layout": layout, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    whole = trainer(tmp_path, name, tokens_per_forward=40, **options)
    whole.train()
    expected = trained(whole).clone()
    rest = trainer(tmp_path, name, tokens_per_forward=40, **options)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (rest.data_collator.layout == "prefix_shared") is (layout == "auto")
    assert rest.state.global_step == 4
    assert torch.equal(trained(rest), expected)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(torch.cat([p.detach().flatten() for p in saved.parameters()]), expected)
