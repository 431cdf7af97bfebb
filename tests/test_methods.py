"""Methods on the same reward data: the same tokens, prompts and steps, and losses that are known to be equal."""

import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from conftest import CHAT_TEMPLATE, build_model, build_tokenizer, labelled_rows, reward_rows
from nca_align import NCAConfig
from nca_align.commands.compare import methods
from nca_align.commands.compare.methods import METHODS, build_trainer, check_method
from nca_align.errors import UserError, notify_once

BETA = 0.1


def options(tmp_path, **more) -> NCAConfig:
    return NCAConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
        gradient_checkpointing=False, learning_rate=1e-3, beta=BETA, max_length=None, save_strategy="no",
        warmup_steps=0,
        **({"alpha": 0.3, "per_device_train_batch_size": 2, "num_train_epochs": 1, "logging_steps": 1} | more),
    )  # fmt: skip


def trainer_of(method, tokenizer, tmp_path, rows=None, **more):
    strategy = more.pop("strategy", None)
    rows = rows or (labelled_rows if method == "outcome" else reward_rows)(6, 4)
    model = build_model(tokenizer)
    return build_trainer(
        method, model, options(tmp_path, **more), Dataset.from_list(rows), tokenizer, strategy=strategy,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_as_many_steps_as_there_are_batches_of_prompts(method, tokenizer, tmp_path):
    trainer = trainer_of(method, tokenizer, tmp_path)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert trainer.state.global_step == 3 == len(losses)
    assert all(map(math.isfinite, losses))
    adapter = [p for name, p in trainer.model.named_parameters() if "lora_B.default" in name]
    assert len(adapter) == 4
    assert all(p.abs().sum() > 0 for p in adapter)


@pytest.mark.parametrize(
    ("method", "strategy", "rows", "times"),
    [("dpo", "all_pairs", 2, 6), ("dpo", "best_each", 2, 3), ("dpo", "best_worst", 2, 1), ("kto", "rewards", 8, 1),
     ("infonca", "best_worst", 2, 1), ("infonca", "all_pairs", 2, 6), ("nca", "first_3", 2, 1)],
)  # fmt: skip
def test_a_batch_holds_rows_in_proportion_to_those_of_a_prompt(method, strategy, rows, times, tokenizer, tmp_path):
    trainer = trainer_of(method, tokenizer, tmp_path, strategy=strategy)
    assert trainer.args.per_device_train_batch_size == rows
    assert trainer.args.gradient_accumulation_steps == times
    assert trainer.args.max_steps == 3


@pytest.mark.parametrize("logs", [{"logging_steps": 2}, {"logging_strategy": "no", "logging_steps": None}])
def test_what_a_comparison_decides_is_not_told_as_a_users_word(logs, tokenizer, tmp_path, caplog):
    """It gives `max_steps` for the epochs, and NCAConfig names options of its user that are not read."""
    notify_once.cache_clear()
    trainer = trainer_of("nca", tokenizer, tmp_path, num_train_epochs=2, **logs)
    assert trainer.args.max_steps == 6
    assert trainer.args.is_unsaid("logging_steps") is (logs["logging_steps"] is None)
    assert not [line for line in caplog.messages if "Without effect" in line]


@pytest.mark.parametrize("share", [0.6, 1.0, 1.02, 2.1, 5.1, 5.8])
@pytest.mark.parametrize(("size", "times"), [(1, 32), (2, 16), (4, 4), (8, 1)])
def test_a_step_takes_rows_in_proportion_whatever_is_accumulated(size, times, share, tmp_path):
    given = options(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=times)
    for whole in (False, True) if share >= 1 else (False,):
        args = SimpleNamespace(**methods._same_steps(given, 1000, round(1000 * share), whole))
        taken = args.per_device_train_batch_size * args.gradient_accumulation_steps
        assert taken == pytest.approx(size * times * share, rel=0.5 / size if whole else 0.07)
        assert args.max_steps == math.ceil(1000 / (size * times))
        assert args.gradient_accumulation_steps == times or not whole


def test_trls_trainers_get_the_same_tokens(tokenizer, tmp_path):
    rows = reward_rows(3, 2)
    ours = trainer_of("nca", tokenizer, tmp_path, rows).train_dataset
    pairs = trainer_of("dpo", tokenizer, tmp_path, rows).train_dataset
    single = trainer_of("kto", tokenizer, tmp_path, rows).train_dataset
    for row, pair in zip(ours, pairs, strict=True):
        high = row["rewards"].index(max(row["rewards"]))
        assert pair["prompt_ids"] == row["prompt_ids"]
        assert pair["chosen_ids"] == row["completion_ids"][high]
        assert pair["rejected_ids"] == row["completion_ids"][1 - high]
    assert sorted(single["completion_ids"]) == sorted(ids for row in ours for ids in row["completion_ids"])


@pytest.mark.parametrize(("method", "strategy"), [("nca", None), ("nca", "best_plus_1"), ("dpo", None), ("kto", None)])
def test_every_method_renders_the_prompt_with_its_tools_and_template_arguments(method, strategy, tmp_path):
    """As `rows_that_fit`, and the evaluations, do."""
    template = "{% if tools %}[{{ tools[0]['function']['name'] }}]{% endif %}{% if loud %}LOUD{% endif %}"
    tokenizer = build_tokenizer(template + CHAT_TEMPLATE)
    tools = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {}}}])
    one, two, three = reward_rows(3, 2)
    rows = [
        one | {"tools": tools, "chat_template_kwargs": {"loud": True}},
        two | {"tools": None, "chat_template_kwargs": None},
        three | {"tools": tools, "chat_template_kwargs": {"loud": False}},
    ]
    tokens = trainer_of(method, tokenizer, tmp_path, rows, strategy=strategy).train_dataset["prompt_ids"]
    started = {tokenizer.decode(ids).split("<|im_start|>")[0] for ids in tokens}
    assert started == {"[weather]LOUD", "", "[weather]"}


@pytest.mark.parametrize(("method", "refused"), [("nca", False), ("dpo", True), ("kto", True)])
def test_trls_trainers_refuse_prompts_that_they_would_not_continue(method, refused, tokenizer, tmp_path):
    rows = reward_rows(2, 2)
    rows[1]["prompt"] = [*rows[1]["prompt"], {"role": "assistant", "content": "So: "}]
    message = f"row 1: `prompt` ends in an assistant's turn. TRL's `method` {method} doesn't continue"
    with pytest.raises(UserError, match=message) if refused else nullcontext():
        assert len(trainer_of(method, tokenizer, tmp_path, rows).train_dataset) == 2


@pytest.mark.parametrize(("method", "refused"), [("nca", False), ("dpo", True), ("sft", True), ("kto", True)])
def test_trls_trainers_refuse_completions_with_turns_that_the_model_did_not_write(method, refused, tokenizer, tmp_path):
    rows = reward_rows(2, 2)
    rows[1]["completions"][1] += [{"role": "tool", "content": "42"}, {"role": "assistant", "content": "So 42."}]
    message = r"row 1: `completions\[1\]` is not one turn of the assistant. TRL's trainers train on all that stands"
    with pytest.raises(UserError, match=message) if refused else nullcontext():
        assert len(trainer_of(method, tokenizer, tmp_path, rows).train_dataset) == 2


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_trls_trainers_refuse_token_ids(method, tokenizer, tmp_path):
    rows = [{"prompt": [5, 6], "completions": [[7, 8], [9]], "rewards": [1.0, 0.0], "completion_mask": [[0, 1], [1]]}]
    with pytest.raises(UserError, match="holds token ids, but TRL's trainers read text"):
        trainer_of(method, tokenizer, tmp_path, rows)


def first_loss(trainer) -> float:
    trainer.train()
    return next(line["loss"] for line in trainer.state.log_history if "loss" in line)


def losses_of(method, tokenizer, tmp_path, rows, alpha: float) -> torch.Tensor:
    """The losses of a run, in which the second and third depend on the gradients of the first."""
    trainer = trainer_of(method, tokenizer, tmp_path, rows, alpha=alpha, train_sampling_strategy="sequential")
    trainer.train()
    return torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])


@pytest.mark.parametrize(("theirs", "ours"), [("nca_pair", "nca"), ("dpo", "infonca"), ("dpo", "all_pairs")])
def test_dpotrainer_on_pairs_is_the_listwise_loss_on_hard_targets(theirs, ours, tokenizer, tmp_path):
    rows = reward_rows(6, 2)
    hard = [row | {"rewards": [float(reward == max(row["rewards"])) for reward in row["rewards"]]} for row in rows]
    one = losses_of(theirs, tokenizer, tmp_path, rows, alpha=0.3)
    other = losses_of(ours, tokenizer, tmp_path, hard, alpha=1e-3)
    assert one[0] != one[2]
    torch.testing.assert_close(one, other, rtol=0, atol=2e-4)  # transformers logs four digits


def test_sft_is_the_likelihood_of_the_best_alone(tokenizer, tmp_path):
    rows = reward_rows(2, 3)
    trainer = trainer_of("sft", tokenizer, tmp_path, rows)
    best = [row["completions"][row["rewards"].index(max(row["rewards"]))][0]["content"] for row in rows]
    given = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in trainer.train_dataset["chosen_ids"]]
    assert given == best
    total, count = 0.0, 0
    for row in trainer.train_dataset:  # the model is its reference still
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        logps = trainer.model(ids).logits.detach()[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
        total -= float(logps.gather(1, torch.tensor(row["chosen_ids"])[:, None]).sum())
        count += len(row["chosen_ids"])
    assert first_loss(trainer) == pytest.approx(total / count, abs=2e-4)


def test_what_can_not_be_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"must be one of nca, infonca.*kto .* did you mean 'dpo'"):
        check_method("dpoo", None)
    for typo in ("best_wurst", 3):
        with pytest.raises(ValueError, match="must be one of rewards, first_N, best_plus_N"):
            check_method("nca", typo)
    with pytest.raises(ValueError, match="`strategy` is 'rewards' with `method` dpo, which trains on pairs"):
        check_method("dpo", "rewards")
    with pytest.raises(ValueError, match="`strategy` is 'all_pairs' with `method` kto, which trains on no pairs"):
        check_method("KTO", "all_pairs")
    with pytest.raises(ValueError, match="`strategy` is 'all_pairs' with `method` sft, which trains on the best"):
        check_method("sft", "all_pairs")
    assert check_method("InfoNCA", None) == ("infonca", "rewards")
    assert check_method("ipo", None) == ("ipo", "best_worst")
