"""At K = 2 NCATrainer is TRL's DPOTrainer: same losses, step by step, on preference data of two sources."""

import inspect
import re

import pytest
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from conftest import SOURCES, SOURCES_REAL_SLOW, build_model, build_tokenizer, pair_rows
from nca_align import NCAConfig, NCATrainer
from nca_align.errors import notify_once

STEPS = 5


def preference_rows(tokenizer, source: str, max_prompt_tokens: int = 64, n: int = 32) -> Dataset:
    rows = []
    for row in pair_rows(source):
        prompt = row["chosen"][:-1]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        if len(ids) <= max_prompt_tokens:
            rows.append({"chosen": row["chosen"], "rejected": row["rejected"]})
    assert len(rows) >= n, "too few rows have prompts that neither trainer cuts"
    return Dataset.from_list(rows[:n])


def arguments(tmp_path, **own) -> dict:
    return {
        "output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "max_length": 128, "max_steps": STEPS, "seed": 7,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "beta": 0.1, "lr_scheduler_type": "constant",
    } | own  # fmt: skip


def losses(trainer) -> list[float]:
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("source", SOURCES_REAL_SLOW)
@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
@pytest.mark.parametrize(("ours", "theirs"), [("nca", "nca_pair"), ("infonca", "sigmoid")])
def test_five_steps_equal_dpo_trainer(ours, theirs, layout, source, tmp_path):
    tokenizer = build_tokenizer()
    rows = preference_rows(tokenizer, source)
    dpo = DPOTrainer(
        build_model(tokenizer), args=DPOConfig(**arguments(tmp_path, loss_type=theirs)), train_dataset=rows,
        processing_class=tokenizer, ref_model=build_model(tokenizer),
    )  # fmt: skip
    nca = NCATrainer(
        build_model(tokenizer), args=NCAConfig(**arguments(tmp_path, loss_type=ours, layout=layout)),
        train_dataset=rows, processing_class=tokenizer,
    )  # fmt: skip
    expected, actual = losses(dpo), losses(nca)
    assert len(expected) == STEPS
    assert len({round(loss, 4) for loss in expected}) > 1, "nothing moved, so equal losses would show nothing"
    assert actual == pytest.approx(expected, abs=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "rewards/margins"):
        theirs_logged = [line[name] for line in dpo.state.log_history if name in line]
        ours_logged = [line[name] for line in nca.state.log_history if name in line]
        assert ours_logged == pytest.approx(theirs_logged, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("source", SOURCES)
def test_with_sft_equals_dpo_trainer(source, tmp_path):
    tokenizer = build_tokenizer()
    rows = preference_rows(tokenizer, source)
    weights = {"loss_weights": [1.0, 0.3], "gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}
    dpo = DPOTrainer(
        build_model(tokenizer), args=DPOConfig(**arguments(tmp_path, loss_type=["nca_pair", "sft"], **weights)),
        train_dataset=rows, processing_class=tokenizer, ref_model=build_model(tokenizer),
    )  # fmt: skip
    nca = NCATrainer(
        build_model(tokenizer), args=NCAConfig(**arguments(tmp_path, loss_type=["nca", "sft"], **weights)),
        train_dataset=rows, processing_class=tokenizer,
    )  # fmt: skip
    assert losses(nca) == pytest.approx(losses(dpo), abs=1e-5)


def test_trls_other_losses_are_refused_as_its_own(tmp_path):
    """All that its trainer computes, so that a loss which TRL adds is known as well."""
    names = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))
    assert {"ipo", "hinge", "apo_zero", "sft"} < names
    for name in names - {"sft"}:
        with pytest.raises(ValueError, match=f"`loss_type` is '{name}', which is DPOTrainer's; use ") as refused:
            NCAConfig(**arguments(tmp_path, loss_type=name))
        elsewhere = name not in ("sigmoid", "nca_pair")
        assert ("use DPOTrainer itself: it isn't here; docs/guide/baselines.md" in str(refused.value)) == elsewhere
        beta = DPOConfig(tmp_path, use_cpu=True, bf16=False).beta
        assert (f"the same `beta` (DPOConfig's default is {beta})" in str(refused.value)) != elsewhere
    with pytest.raises(ValueError, match="'IPO', which is DPOTrainer's"):
        NCAConfig.of(DPOConfig(**arguments(tmp_path, loss_type="IPO")), "model")


def test_a_loss_that_stays_is_not_said_to_change(tmp_path, caplog):
    NCAConfig.of(DPOConfig(**arguments(tmp_path, loss_type="sft")), "model")
    assert "the loss is sft, `alpha`" in caplog.text


def test_padding_free_passes_with_one_notice(tmp_path, caplog):
    """As in DPOTrainer, which falls back to padding, and would say so a second time."""
    notify_once.cache_clear()
    tokenizer = build_tokenizer()
    NCATrainer(
        build_model(tokenizer), args=DPOConfig(**arguments(tmp_path, padding_free=True)),
        train_dataset=preference_rows(tokenizer, SOURCES[0]), processing_class=tokenizer,
    )  # fmt: skip
    (said,) = [line for line in caplog.messages if "padding_free" in line]
    assert said.startswith("Without effect in this run: `padding_free` (needs ")


@pytest.mark.parametrize("source", SOURCES)
def test_a_plain_dpo_config_is_taken_and_what_changes_is_said_once(source, tmp_path, caplog):
    tokenizer = build_tokenizer()
    rows = preference_rows(tokenizer, source)
    dpo_args = DPOConfig(**arguments(tmp_path, beta=0.25, seed=11))
    nca = NCATrainer(build_model(tokenizer), args=dpo_args, train_dataset=rows, processing_class=tokenizer)
    assert (nca.args.beta, nca.beta, nca.args.seed, nca.args.max_length) == (0.25, 0.25, 11, 128)
    assert (nca.args.alpha, nca.args.loss_type, nca.args.max_prompt_length) == (0.01, ["nca"], 64)
    said = [record.message for record in caplog.records if "DPOConfig" in record.message]
    assert len(said) == 1
    for part in ("loss is nca instead of sigmoid", "`alpha` is 0.01", "last 64 tokens", "`beta` 0.25"):
        assert part in said[0]
    dpo = DPOTrainer(
        build_model(tokenizer), args=DPOConfig(**arguments(tmp_path, beta=0.25, seed=11, loss_type="nca_pair")),
        train_dataset=rows, processing_class=tokenizer, ref_model=build_model(tokenizer),
    )  # fmt: skip
    assert losses(nca) == pytest.approx(losses(dpo), abs=1e-5)
