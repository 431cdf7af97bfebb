"""NCATrainer end to end on tiny models: its log-probabilities, means, references, adapters and options."""

import copy
import errno
import json
import logging
import os
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig
from trl.trainer.dpo_trainer import DataCollatorForPreference

from conftest import build_model, build_tokenizer, reward_rows
from nca_align import NCAConfig, NCATrainer
from nca_align.batching.attention import share_prefixes
from nca_align.batching.collator import RewardCollator
from nca_align.errors import UserError
from nca_align.losses import reward_loss
from nca_align.models.loading import disable_nf4_repacking
from nca_align.models.logprobs import add_token_logps

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
TRAINED = LORA | {"init_lora_weights": False}  # as after training: it changes the model


def config(tmp_path, **own) -> NCAConfig:
    return NCAConfig(
        **{
            "output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "max_steps": 3, "logging_steps": 1,
            "per_device_train_batch_size": 2, "learning_rate": 1e-3, "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "beta": 0.1, "alpha": 0.5, "gradient_checkpointing": False, "seed": 3,
            "lr_scheduler_type": "constant", "max_length": 256,
        } | own
    )  # fmt: skip


def trainer(tmp_path, model=None, rows=None, eval_rows=None, tokenizer=None, **own) -> NCATrainer:
    tokenizer = tokenizer or build_tokenizer()
    given = {name: own.pop(name) for name in ("ref_model", "peft_config", "callbacks", "optimizers") if name in own}
    return NCATrainer(
        build_model(tokenizer) if model is None else model, args=config(tmp_path, **own),
        train_dataset=Dataset.from_list(rows or reward_rows(8)) if not isinstance(rows, IterableDataset) else rows,
        eval_dataset=Dataset.from_list(eval_rows) if isinstance(eval_rows, list) else eval_rows,
        processing_class=tokenizer, **given,
    )  # fmt: skip


def logged(nca: NCATrainer, name: str = "loss") -> list[float]:
    return [line[name] for line in nca.state.log_history if name in line]


def alone(model, tokenizer, row) -> list[float]:
    """float64 sums of a conversation's completion tokens, run by itself through the model's own forward."""
    sums = []
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    for completion in row["completions"]:
        ids = tokenizer.apply_chat_template(row["prompt"] + completion, return_dict=True)["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        sums.append(sum(logps[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))))
    return sums


@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
def test_log_probabilities_equal_each_conversation_alone(layout, tmp_path):
    """Padding, ragged K, chat template and boundary included."""
    tokenizer, rows = build_tokenizer(), reward_rows(6, [4, 2, 3])
    model = build_model(tokenizer)
    expected = [alone(copy.deepcopy(model), tokenizer, row) for row in rows]
    nca = trainer(tmp_path, model, rows, layout=layout, per_device_train_batch_size=6)
    batch = nca.data_collator([nca.train_dataset[i] for i in range(6)])
    with torch.no_grad():
        _, outputs = nca.compute_loss(nca.model, batch, return_outputs=True)
    for i, row in enumerate(expected):
        assert outputs["logps"][i, : len(row)].tolist() == pytest.approx(row, rel=1e-5)


@pytest.mark.parametrize(("loss_type", "layout"), [("nca", "prefix_shared"), ("infonca", "padded")])
def test_micro_batches_change_neither_losses_nor_metrics(loss_type, layout, tmp_path):
    """Mean over prompts: unequal K and lengths, a last batch that doesn't divide, evaluation in other batches."""
    rows = reward_rows(10, [4, 2, 3, 5])
    runs = []
    for size, accumulation, eval_size in [(4, 1, 3), (2, 2, 5), (1, 4, 1)]:
        nca = trainer(
            tmp_path, rows=rows, eval_rows=reward_rows(7, [3, 2], seed=9), loss_type=loss_type, layout=layout,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=-1,
            num_train_epochs=2, per_device_eval_batch_size=eval_size, eval_strategy="epoch",
        )  # fmt: skip
        nca.train()
        runs.append(nca.state.log_history)
    ignored = {"grad_norm", "num_tokens", "epoch", "total_flos"}
    for other in runs[1:]:
        assert len(other) == len(runs[0])
        for ours, theirs in zip(runs[0], other, strict=True):
            names = [
                name for name in ours if "runtime" not in name and "per_second" not in name and name not in ignored
            ]
            assert set(names) <= set(theirs)
            for name in names:
                assert theirs[name] == pytest.approx(ours[name], rel=2e-4, abs=2e-5), name
    assert max(logged(nca)) - min(logged(nca)) > 1e-3


def test_sft_is_the_mean_over_the_tokens_of_the_window(tmp_path):
    runs = []
    for size, accumulation in [(4, 1), (1, 4)]:
        nca = trainer(
            tmp_path, rows=reward_rows(8, [4, 2]), eval_rows=reward_rows(5), loss_type=["nca", "sft"],
            loss_weights=[1.0, 0.5], per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            per_device_eval_batch_size=size,
        )  # fmt: skip
        nca.train()
        runs.append([*logged(nca), nca.evaluate()["eval_loss"]])
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)


LOSS_TYPES = ["nca", "infonca", "all_pairs", "best_vs_rest", "plackett_luce", "gvpo"]


def weights_after(nca: NCATrainer) -> torch.Tensor:
    nca.train()
    return torch.cat([p.detach().flatten() for p in nca.model.parameters() if p.requires_grad])


# Both layouts of a loss that is a sum over completions, and of one that is not; the others packed
CHUNKED = [*(("padded", name) for name in ("nca", "infonca")), *(("prefix_shared", name) for name in LOSS_TYPES)]


@pytest.mark.parametrize(("layout", "loss_type"), [*CHUNKED, ("padded", "nca+sft")])
def test_tokens_per_forward_has_the_same_gradients(loss_type, layout, tmp_path):
    options = {"layout": layout, "loss_type": loss_type.split("+"), "gradient_accumulation_steps": 2, "optim": "sgd"}
    whole = trainer(tmp_path, rows=reward_rows(8, [5, 3, 4]), **options)
    bound = 100 if layout == "padded" else 24
    chunked = trainer(tmp_path, rows=reward_rows(8, [5, 3, 4]), tokens_per_forward=bound, **options)
    batch = chunked.data_collator([chunked.train_dataset[i] for i in range(2)])
    assert len(batch["chunks"]) > 3
    assert max(chunk["input_ids"].numel() for chunk in batch["chunks"]) <= bound
    before = torch.cat([p.detach().flatten() for p in whole.model.parameters()])
    expected = weights_after(whole)
    assert not torch.allclose(expected, before, atol=1e-5)
    torch.testing.assert_close(weights_after(chunked), expected, rtol=1e-5, atol=1e-6)
    assert logged(chunked) == pytest.approx(logged(whole), abs=1e-5)
    assert logged(chunked, "rewards/accuracies") == pytest.approx(logged(whole, "rewards/accuracies"))


class Forwards(TrainerCallback):
    """Counts forwards by whether they keep a graph."""

    def __init__(self):
        self.with_grad, self.without_grad = 0, 0

    def attach(self, nca: NCATrainer) -> "Forwards":
        own = nca._chunk_logps

        def counted(model, chunk, *args, **kwargs):
            if torch.is_grad_enabled():
                self.with_grad += 1
            else:
                self.without_grad += 1
            return own(model, chunk, *args, **kwargs)

        nca._chunk_logps = counted
        return self


@pytest.mark.parametrize("loss_type", ["nca", "infonca"])
@pytest.mark.parametrize("bound", [40, 10_000])
def test_what_is_read_has_a_second_forward_and_with_a_listwise_loss_all_of_several(bound, loss_type, tmp_path):
    nca = trainer(
        tmp_path, rows=reward_rows(2, 8), loss_type=loss_type, tokens_per_forward=bound, max_steps=1,
        precompute_ref_log_probs=True, startup_checks=False,
    )  # fmt: skip
    chunks = nca.data_collator(list(nca.train_dataset))["chunks"]
    assert (len(chunks) > 4) is (bound == 40)
    read = sum(chunk["segments"].read for chunk in chunks)
    forwards = Forwards().attach(nca)
    nca.train()
    assert forwards.with_grad == len(chunks)
    if loss_type == "nca" or len(chunks) == 1:
        assert forwards.without_grad == read
    else:  # each of two prompts gives up its keys for the other's
        assert forwards.without_grad == len(chunks) + read


@pytest.mark.parametrize("loss_type", ["nca", "infonca"])
def test_chunks_under_mixed_precision_and_checkpointing(loss_type, tmp_path):
    options = {
        "rows": reward_rows(8, [5, 3]), "loss_type": loss_type, "bf16": True, "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "optim": "sgd", "max_grad_norm": 0.0,
    }  # fmt: skip
    whole, chunked = trainer(tmp_path, **options), trainer(tmp_path, tokens_per_forward=40, **options)
    before = torch.cat([p.detach().flatten() for p in whole.model.parameters()])
    step = weights_after(whole) - before
    assert (weights_after(chunked) - before - step).norm() < 0.05 * step.norm()
    assert logged(chunked) == pytest.approx(logged(whole), abs=5e-3)


def test_both_passes_over_a_chunk_have_the_same_dropout(tmp_path):
    """With dropout the listwise weights come from the very log-probabilities that are differentiated."""
    tokenizer = build_tokenizer()
    nca = trainer(
        tmp_path, build_model(tokenizer, attention_dropout=0.5), reward_rows(2, 6), loss_type="infonca",
        layout="padded", tokens_per_forward=40, max_steps=1, disable_dropout=False, precompute_ref_log_probs=True,
        startup_checks=False,
    )  # fmt: skip
    seen: dict[bool, list] = {True: [], False: []}
    own = nca._chunk_logps

    def spied(*args, **kwargs):
        output = own(*args, **kwargs)
        seen[torch.is_grad_enabled()].append(output[0].detach().clone())
        return output

    nca._chunk_logps = spied
    nca.train()
    assert len(seen[True]) == len(seen[False]) == 12
    for first, second in zip(seen[False], seen[True], strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(seen[True][0], torch.zeros_like(seen[True][0]))
    with torch.no_grad():  # and the dropout was really on: another draw differs
        batch = nca.data_collator([nca.train_dataset[0], nca.train_dataset[1]])
        nca.model.train()
        draws = [own(nca.model, batch["chunks"][0], batch)[0] for _ in range(2)]
    assert not torch.equal(*draws)


# References


def test_full_fine_tuning_keeps_what_was_passed_as_reference(model_dir, tmp_path):
    """A model edited in memory: its reference is what was passed, not what the id on disk says."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3)
    passed = copy.deepcopy(model)
    nca = trainer(tmp_path, model)
    nca.train()
    batch = nca.data_collator([nca.train_dataset[0], nca.train_dataset[1]])
    expected = [alone(passed, build_tokenizer(), row) for row in reward_rows(8)[:2]]
    for row, values in zip(nca._reference_logps(batch).tolist(), expected, strict=True):
        assert row == pytest.approx(values, rel=1e-5)
    assert logged(nca, "rewards/best")[0] == 0


def test_a_given_reference_is_used(tmp_path):
    tokenizer = build_tokenizer()
    nca = trainer(tmp_path, ref_model=build_model(tokenizer, seed=5))
    batch = nca.data_collator([nca.train_dataset[0]])
    expected = alone(build_model(tokenizer, seed=5), tokenizer, reward_rows(8)[0])
    assert nca._reference_logps(batch)[0].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
def test_lora_has_the_bare_base_as_reference(layout, tmp_path):
    tokenizer = build_tokenizer()
    nca = trainer(tmp_path, peft_config=LoraConfig(**LORA), layout=layout)
    nca.train()
    batch = nca.data_collator([nca.train_dataset[0]])
    expected = alone(build_model(tokenizer), tokenizer, reward_rows(8)[0])
    assert nca._reference_logps(batch)[0].tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["embed_tokens"]}])
def test_continued_training_has_the_adapter_as_it_came_as_reference(extra, tmp_path):
    tokenizer = build_tokenizer()
    torch.manual_seed(1)
    policy = get_peft_model(build_model(tokenizer), LoraConfig(**TRAINED, **extra))
    came = copy.deepcopy(policy)
    nca = trainer(tmp_path, policy)
    nca.train()
    batch = nca.data_collator([nca.train_dataset[0]])
    reference = nca._reference_logps(batch)[0].tolist()
    assert reference == pytest.approx(alone(came, tokenizer, reward_rows(8)[0]), rel=1e-5)
    assert reference != pytest.approx(alone(build_model(tokenizer), tokenizer, reward_rows(8)[0]), rel=1e-3)
    assert logged(nca, "rewards/best")[0] == 0
    assert abs(logged(nca, "rewards/best")[-1]) > 0


def test_modules_to_save_and_tied_embeddings_train(tmp_path):
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, tie_word_embeddings=True)
    nca = trainer(tmp_path, model, peft_config=LoraConfig(**LORA, modules_to_save=["embed_tokens"]))
    before = nca.model.base_model.model.model.embed_tokens.modules_to_save["default"].weight.detach().clone()
    nca.train()
    after = nca.model.base_model.model.model.embed_tokens.modules_to_save["default"].weight
    assert not torch.equal(before, after)
    expected = alone(build_model(tokenizer, tie_word_embeddings=True), tokenizer, reward_rows(8)[0])
    batch = nca.data_collator([nca.train_dataset[0]])
    assert nca._reference_logps(batch)[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_eos_that_is_also_pad_is_scored_and_seen(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rows = reward_rows(3, [3, 2])
    expected = [alone(build_model(tokenizer), tokenizer, row) for row in rows]
    for layout in ("padded", "prefix_shared"):
        nca = trainer(tmp_path, rows=rows, tokenizer=tokenizer, layout=layout)
        batch = nca.data_collator([nca.train_dataset[i] for i in range(3)])
        assert (batch["chunks"][0]["target_ids"] == tokenizer.eos_token_id).sum() == 8
        logps = nca._chunk_logps(nca.model, batch["chunks"][0], batch)[0]
        for i, row in enumerate(expected):
            assert logps[i, : len(row)].tolist() == pytest.approx(row, rel=1e-5)


def test_prompt_tuning_is_padded_and_trains(tmp_path, caplog):
    from peft import PromptTuningConfig, TaskType

    nca = trainer(tmp_path, peft_config=PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4))
    assert nca.data_collator.layout == "padded"
    assert any("virtual tokens" in record.message for record in caplog.records)
    nca.train()
    assert logged(nca, "rewards/best")[-1] != 0
    with pytest.raises(NotImplementedError, match="virtual tokens"):
        trainer(
            tmp_path, layout="prefix_shared",
            peft_config=PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4),
        )  # fmt: skip


# QLoRA


def test_qlora_trains_saves_and_reloads_with_the_same_log_probabilities(model_dir, tokenizer, tmp_path):
    """NF4 with double quantisation, bf16 compute and bitsandbytes' paged AdamW, all on CPU."""
    import bitsandbytes as bnb
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    args = config(
        tmp_path, optim="paged_adamw_32bit", bf16=True, learning_rate=5e-3, gradient_checkpointing=True,
        model_init_kwargs={"dtype": "bfloat16"},
    )  # fmt: skip
    nca = NCATrainer(
        model_dir, args=args, train_dataset=Dataset.from_list(reward_rows(8)), processing_class=tokenizer,
        quantization_config=quantization, peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )  # fmt: skip
    assert isinstance(nca.model.base_model.model.model.layers[0].self_attn.q_proj.base_layer, bnb.nn.Linear4bit)
    nca.train()
    assert "Paged" in type(nca.optimizer.optimizer).__name__ or nca.optimizer.optimizer.is_paged
    nca.save_model()
    batch = nca.data_collator([nca.train_dataset[i] for i in range(4)])

    def logps(model):
        with torch.no_grad(), nca.accelerator.autocast():
            return nca._chunk_logps(model.eval(), batch["chunks"][0], batch)[0]

    trained = logps(nca.model)
    assert not torch.allclose(trained, nca._reference_logps(batch), atol=1e-2), "the adapter changed nothing"
    fresh = AutoModelForCausalLM.from_pretrained(model_dir, quantization_config=quantization, dtype=torch.bfloat16)
    fresh = PeftModel.from_pretrained(fresh, str(tmp_path))
    add_token_logps(fresh.get_base_model())
    share_prefixes(fresh.get_base_model())
    disable_nf4_repacking(fresh)
    torch.testing.assert_close(logps(fresh), trained, rtol=1e-6, atol=1e-4)


def test_evaluation_leaves_nf4_layers_with_a_gradient(tokenizer, tmp_path):
    """On a CPU with AVX512-BF16 bitsandbytes repacks them at the first forward in evaluation, and cuts the gradient."""
    from transformers import BitsAndBytesConfig

    build_model(tokenizer, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    args = config(tmp_path, model_init_kwargs={"dtype": "bfloat16"}, bf16=True, eval_strategy="steps", eval_steps=1)
    rows = Dataset.from_list(reward_rows(4))
    nca = NCATrainer(
        str(tmp_path / "model"), args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip

    def gradient() -> torch.Tensor:
        nca.model.train()
        batch = nca.data_collator([nca.train_dataset[0]])
        weights = [p for n, p in nca.model.named_parameters() if "layers.0" in n and p.requires_grad]
        logps = nca._chunk_logps(nca.model, batch["chunks"][0], batch)[0]
        return torch.cat([g.flatten() for g in torch.autograd.grad(logps.sum(), weights)])

    before = gradient()
    nca.evaluate()
    torch.testing.assert_close(gradient(), before)
    assert before.abs().max() > 0


# Reference cache


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "nca_align_reference"


def count_reference_forwards(monkeypatch) -> list[int]:
    calls = []
    own = NCATrainer.compute_ref_log_probs
    monkeypatch.setattr(
        NCATrainer, "compute_ref_log_probs", lambda self, model, batch: calls.append(1) or own(self, model, batch)
    )
    return calls


@pytest.mark.parametrize("peft", [True, False])
def test_cached_reference_trains_like_the_live_one_and_is_computed_once(peft, cache, tmp_path, monkeypatch):
    options = {"rows": reward_rows(8, [4, 2, 3]), "eval_rows": reward_rows(3, seed=4), "eval_strategy": "epoch"}

    def own(**more):
        return options | more | ({"peft_config": LoraConfig(**LORA)} if peft else {})

    live = trainer(tmp_path / "live", **own())
    live.train()
    live_evaluation = live.evaluate()["eval_loss"]
    calls = count_reference_forwards(monkeypatch)
    first = trainer(tmp_path / "first", **own(precompute_ref_log_probs=True))
    computed = len(calls)
    assert computed > 0
    first.train()
    assert len(calls) == computed, "a reference forward in training"
    assert logged(first) == pytest.approx(logged(live), abs=1e-5)
    assert first.evaluate()["eval_loss"] == pytest.approx(live_evaluation, abs=1e-5)
    second = trainer(tmp_path / "second", **own(precompute_ref_log_probs=True))
    second.train()
    second.evaluate()
    assert len(calls) == computed, "the second run computed references again"
    assert second.train_dataset["ref_logps"][:] == first.train_dataset["ref_logps"][:]


def test_an_adapter_of_another_seed_or_rank_shares_the_cache(cache, tmp_path, monkeypatch):
    calls = count_reference_forwards(monkeypatch)
    trainer(tmp_path, peft_config=LoraConfig(**LORA), precompute_ref_log_probs=True)
    before = len(calls)
    trainer(tmp_path, peft_config=LoraConfig(**LORA | {"r": 2}), precompute_ref_log_probs=True, seed=9)
    assert len(calls) == before > 0


def _template(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", ".<|im_end|>")


@pytest.mark.parametrize("what", ["template", "truncation", "weight", "completion", "config", "adapter"])
def test_whatever_changes_the_reference_is_noticed(what, cache, tmp_path, monkeypatch):
    calls = count_reference_forwards(monkeypatch)
    tokenizer, rows, model, options = build_tokenizer(), reward_rows(4), build_model(build_tokenizer()), {}
    torch.manual_seed(2)
    policy = get_peft_model(build_model(tokenizer), LoraConfig(**TRAINED))
    base = {"precompute_ref_log_probs": True}
    trainer(tmp_path, copy.deepcopy(policy) if what == "adapter" else copy.deepcopy(model), rows, **base)
    before = len(calls)
    if what == "template":
        _template(tokenizer)
    elif what == "truncation":
        options["max_length"] = 24
    elif what == "weight":
        with torch.no_grad():
            model.model.layers[1].self_attn.o_proj.weight[0, 0] += 1e-3
    elif what == "completion":
        rows[3]["completions"][1][0]["content"] += "!"
    elif what == "config":
        model = build_model(build_tokenizer(), rms_norm_eps=1e-2)
    elif what == "adapter":
        with torch.no_grad():
            next(p for n, p in policy.named_parameters() if "lora_B" in n)[0, 0] += 1e-3
        model = policy
    trainer(tmp_path, model, rows, tokenizer=tokenizer, **base, **options)
    assert len(calls) > before


@pytest.mark.parametrize(
    ("kind", "options", "change"),
    [
        (LoraConfig, LORA, {"lora_alpha": 9}), (LoraConfig, LORA, {"use_rslora": True}),
        (LoraConfig, LORA, {"alpha_pattern": {"q_proj": 32}}), (LoraConfig, LORA, {"rank_pattern": {"q_proj": 4}}),
        (LoHaConfig, {"r": 4, "target_modules": ["q_proj"]}, {"alpha": 3}),
        (LoKrConfig, {"r": 4, "target_modules": ["q_proj"]}, {"alpha": 3}),
    ],
)  # fmt: skip
def test_all_that_a_continued_adapters_forward_reads_is_in_the_key(kind, options, change, cache, tmp_path, monkeypatch):
    """The weights are the same, and the config alone says what is computed of them."""
    calls = count_reference_forwards(monkeypatch)

    def prepared(**change):
        torch.manual_seed(2)
        policy = get_peft_model(build_model(build_tokenizer()), kind(**options | change))
        for name, parameter in sorted(policy.named_parameters()):
            if parameter.requires_grad:
                parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
        return trainer(tmp_path, policy, precompute_ref_log_probs=True)

    first = prepared()
    once = len(calls)
    prepared()
    assert len(calls) == once > 0
    other = prepared(**change)
    assert len(calls) == 2 * once
    assert first.train_dataset["ref_logps"][0] != other.train_dataset["ref_logps"][0] or "rank_pattern" in change


@pytest.mark.parametrize("change", [{"init_lora_weights": False}, {"alpha_pattern": {"q_proj": 32}}])
def test_the_adapter_of_a_given_reference_is_in_the_key(change, cache, tmp_path, monkeypatch):
    calls = count_reference_forwards(monkeypatch)
    for own in ({}, {}, change):
        torch.manual_seed(2)
        given = get_peft_model(build_model(build_tokenizer()), LoraConfig(**LORA | own))
        nca = trainer(tmp_path, ref_model=given, precompute_ref_log_probs=True)
    once = len(calls) // 2
    assert len(calls) == 2 * once > 0
    expected = alone(given, build_tokenizer(), reward_rows(8)[0])
    assert nca.train_dataset["ref_logps"][0] == pytest.approx(expected, rel=1e-5)


def test_an_interrupted_computation_goes_on_where_it_stopped(cache, tmp_path, monkeypatch):
    from nca_align.training import reference_cache

    monkeypatch.setattr(reference_cache, "ROWS_PER_SHARD", 3)
    own = NCATrainer.compute_ref_log_probs
    calls = []

    def fails_at_the_third(self, model, batch):
        calls.append(len(batch["rewards"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return own(self, model, batch)

    rows = reward_rows(8)
    options = {"rows": rows, "precompute_ref_log_probs": True, "precompute_ref_batch_size": 3}
    monkeypatch.setattr(NCATrainer, "compute_ref_log_probs", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, **options)
    assert len(list(cache.rglob("*.parquet"))) == 2
    nca = trainer(tmp_path, **options)
    assert calls[3:] == [2], "the first two shards were computed again"
    live = trainer(tmp_path, rows=rows)
    batch = live.data_collator([live.train_dataset[i] for i in range(8)])
    assert nca.train_dataset["ref_logps"][:] == [
        pytest.approx(row, rel=1e-5) for row in live._reference_logps(batch).tolist()
    ]


@pytest.mark.parametrize("damage", [b"", b"PAR1 and no more", "zeros", "short"])
def test_a_shard_that_a_crash_left_unreadable_is_computed_anew(damage, cache, tmp_path, monkeypatch, caplog):
    from nca_align.training import reference_cache

    monkeypatch.setattr(reference_cache, "ROWS_PER_SHARD", 3)
    options = {"rows": reward_rows(8), "precompute_ref_log_probs": True}
    expected = trainer(tmp_path, **options).train_dataset["ref_logps"][:]
    broken, *others = sorted(cache.rglob("*.parquet"))
    before = [shard.stat().st_mtime_ns for shard in others]
    size = broken.stat().st_size
    broken.write_bytes({"zeros": bytes(size), "short": others[-1].read_bytes()}.get(damage, damage))
    nca = trainer(tmp_path, **options)
    assert nca.train_dataset["ref_logps"][:] == expected
    assert [shard.stat().st_mtime_ns for shard in others] == before
    assert ("000000000.parquet can't be read: its rows'" in caplog.text) == (damage != "short")


def test_what_a_killed_run_left_half_written_goes_and_another_runs_stays(cache, tmp_path):
    from nca_align.training.reference_cache import ReferenceCache

    own = ReferenceCache(("key",), 2)
    own.folder.mkdir(parents=True)
    old, new = own.folder / "000000000.1.partial", own.folder / "000000000.2.partial"
    for file in (old, new):
        file.write_bytes(b"PAR1")
    os.utime(old, (1, 1))
    ((_, _, shard),) = own.missing()
    own.write(shard, [[-1.0, -2.0], [-3.0]])
    assert sorted(own.folder.iterdir()) == [new, shard]
    assert own.read() == [[-1.0, -2.0], [-3.0]]


def test_a_shard_is_on_the_disk_before_it_has_its_name(cache, monkeypatch):
    from nca_align.training.reference_cache import ReferenceCache

    own = ReferenceCache(("key",), 1)
    ((_, _, shard),) = own.missing()
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (synced.append((shard.exists(), *own.folder.glob("*.partial"))), fsync(file))
    )
    own.write(shard, [[-1.0]])
    assert [(named, len(partial)) for named, *partial in synced] == [(False, 1), (True, 0)]  # the file, its folder


def test_a_disk_too_full_for_the_cache_is_told_with_what_to_do(cache, monkeypatch):
    from nca_align.training import reference_cache

    def full(table, where):
        where.write(b"PAR1")
        raise OSError(errno.ENOSPC, "Error writing bytes to file")

    own = reference_cache.ReferenceCache(("key",), 1)
    ((_, _, shard),) = own.missing()
    monkeypatch.setattr(reference_cache.pq, "write_table", full)
    with pytest.raises(
        UserError,
        match=r"^the cache of reference log-probabilities can't be written: Error writing .* MiB free in .*"
        r"; make room, or set HF_DATASETS_CACHE to another disk; the same command goes on",
    ):
        own.write(shard, [[-1.0]])
    assert not list(own.folder.iterdir())


def test_evaluate_on_new_data_after_training_has_the_right_reference(cache, model_dir, tmp_path):
    fresh = Dataset.from_list(reward_rows(5, [3, 2], seed=21))
    results = []
    for options in ({}, {"precompute_ref_log_probs": True}):
        nca = trainer(tmp_path, AutoModelForCausalLM.from_pretrained(model_dir), learning_rate=1e-2, **options)
        nca.train()
        results.append(nca.evaluate(fresh))
    assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], abs=1e-5)
    assert abs(results[0]["eval_logratios/best"]) > 0.1
    edited = AutoModelForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        edited.lm_head.weight.mul_(1.1)
    nca = trainer(tmp_path, edited, precompute_ref_log_probs=True)
    nca.train()
    with pytest.raises(ValueError, match="not those that it had before training"):
        nca.evaluate(fresh)
    nca = trainer(tmp_path, precompute_ref_log_probs=True)
    nca.train()
    with pytest.raises(ValueError, match="could not be loaded again from ''"):
        nca.evaluate(fresh)


@pytest.mark.parametrize("cached", [True, False])
def test_predict_takes_what_evaluate_takes(cached, cache, model_dir, tmp_path):
    """Raw rows of any format and a stream, before training and after it, when the reference isn't kept in memory."""
    pairs = Dataset.from_list(
        [{"prompt": f"Row {i}:", "chosen": " a good answer", "rejected": " no"} for i in range(3)]
    )
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    nca = trainer(tmp_path, model, precompute_ref_log_probs=cached, learning_rate=1e-2)
    for trained in (False, True):
        if trained:
            nca.train()
        for data in (pairs, pairs.to_iterable_dataset()) if not cached else (pairs,):
            expected, found = nca.evaluate(data), nca.predict(data)
            assert found.predictions is None
            assert (expected["eval_rewards/margins"] != 0) == trained
            for name in ("loss", "rewards/margins", "logps/chosen"):
                assert found.metrics[f"test_{name}"] == pytest.approx(expected[f"eval_{name}"], abs=1e-6)


def test_an_evaluation_within_a_step_leaves_its_line_whole(tmp_path):
    """It leaves the model in evaluation mode, in which the line's metrics were left out."""

    class Evaluate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            nca.evaluate()

    options = {"eval_rows": reward_rows(3, seed=2), "max_steps": 2}
    plain = trainer(tmp_path, **options)
    plain.train()
    nca = trainer(tmp_path, callbacks=[Evaluate()], **options)
    nca.train()
    for name in ("loss", "rewards/best", "num_tokens"):
        assert len(logged(nca, name)) == 2
        assert logged(nca, name) == logged(plain, name)


def test_a_stream_takes_the_live_reference(cache, tmp_path, caplog):
    rows = reward_rows(8)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    live = trainer(tmp_path, rows=stream, precompute_ref_log_probs=True)
    assert any("is a stream" in record.message for record in caplog.records)
    live.train()
    assert len(logged(live)) == 3
    assert logged(live, "rewards/best")[-1] != 0


# Data


def test_a_stream_and_a_dict_of_evaluation_sets_train(tmp_path):
    sets = {"easy": Dataset.from_list(reward_rows(3)), "hard": Dataset.from_list(reward_rows(4, 2, seed=3))}
    nca = trainer(
        tmp_path, rows=Dataset.from_list(reward_rows(8)).to_iterable_dataset(), eval_rows=sets, eval_strategy="steps",
        eval_steps=3, load_best_model_at_end=False,
    )  # fmt: skip
    nca.train()
    assert logged(nca, "eval_easy_loss")
    assert logged(nca, "eval_hard_rewards/accuracies")


def test_checkpoints_resume_and_the_best_model_is_loaded(tmp_path):
    rows, evaluation = reward_rows(8), reward_rows(4, seed=2)
    options = {
        "rows": rows, "eval_rows": evaluation, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps",
        "eval_steps": 2, "max_steps": 6,
    }  # fmt: skip
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert logged(resumed) == logged(whole)
    state = json.loads((tmp_path / "resumed" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    best = trainer(
        tmp_path / "best", **options, load_best_model_at_end=True, metric_for_best_model="rewards/accuracies",
        greater_is_better=True,
    )  # fmt: skip
    best.train()
    scores = {line["step"]: line["eval_rewards/accuracies"] for line in best.state.log_history if "eval_loss" in line}
    assert best.state.best_metric == max(scores.values())
    card = (tmp_path / "best" / "checkpoint-6" / ".." / "README.md").read_text()
    assert "Noise Contrastive Alignment of Language Models with Explicit Rewards" in card
    assert "chen2024noise" in card


def test_batch_rebalance_keeps_the_prompts_of_a_step_and_evens_their_loads(tmp_path):
    rows = reward_rows(16, [6, 2, 2, 3])
    options = {"rows": rows, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2}
    plain = trainer(tmp_path, **options)
    balanced = trainer(tmp_path, **options, train_sampling_strategy="batch_rebalance")
    steps: dict[str, list] = {}
    spreads = {}
    for name, nca in {"plain": plain, "balanced": balanced}.items():
        seen: list = []
        own = nca.get_batch_samples
        nca.get_batch_samples = lambda *a, own=own, seen=seen: (lambda out: seen.append(out[0]) or out)(own(*a))
        nca.train()
        steps[name] = [sorted(r for b in batches for r in b["rewards"].flatten().tolist() if r) for batches in seen]
        loads = [[b["lengths"].sum().item() for b in batches] for batches in seen]
        spreads[name] = max(max(window) / (sum(window) / len(window)) for window in loads)
    assert steps["balanced"] == steps["plain"]
    assert spreads["balanced"] < spreads["plain"]
    assert logged(balanced) == pytest.approx(logged(plain), abs=1e-5)


@pytest.mark.parametrize("prompts", [9, 10])
def test_what_batch_rebalance_repeats_in_a_last_step_has_no_weight(prompts, tmp_path):
    """Two groups a step of 4 prompts: one of 9 is left for the last step, whose second group is a repeat."""
    options = {"rows": reward_rows(prompts, [4, 2, 3]), "per_device_train_batch_size": 2, "num_train_epochs": 1}
    options |= {"gradient_accumulation_steps": 2, "max_steps": -1}
    plain = trainer(tmp_path, **options)
    balanced = trainer(tmp_path, **options, train_sampling_strategy="batch_rebalance")
    seen: list = []
    own = balanced.get_batch_samples
    balanced.get_batch_samples = lambda *a: (lambda out: seen.append(out[0]) or out)(own(*a))
    for nca in (plain, balanced):
        nca.train()
    assert sum(float(batch["weights"].sum()) for batches in seen for batch in batches) == prompts
    assert sum(len(batch["weights"]) for batches in seen for batch in batches) == prompts + prompts % 2
    assert logged(balanced) == pytest.approx(logged(plain), abs=1e-5)


def test_prepared_data_comes_back_as_it_is(tmp_path):
    nca = trainer(tmp_path)
    assert nca._prepare_dataset(nca.train_dataset, nca.processing_class, nca.args, "train") is nca.train_dataset


# Layout


def test_auto_says_what_it_chose_and_why(tmp_path, caplog):
    nca = trainer(tmp_path)
    assert nca.data_collator.layout == "prefix_shared"
    lines = [r.message for r in caplog.records if r.message.startswith("Layout:")]
    assert len(lines) == 1
    assert "prefix_shared" in lines[0]
    assert "gradients within" in lines[0]
    assert trainer(tmp_path, layout="padded").data_collator.layout == "padded"


def test_a_mismatch_falls_back_under_auto_and_stops_an_explicit_layout(tmp_path, caplog, monkeypatch):
    from nca_align.batching import attention

    def blind(query, key, value, segments, **kwargs):  # sees all of the row
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        ).transpose(1, 2)

    monkeypatch.setattr(attention, "attend_segments", blind)
    nca = trainer(tmp_path)
    assert nca.data_collator.layout == "padded"
    assert any(
        "since prefix_shared does not give" in r.message and r.levelno == logging.WARNING for r in caplog.records
    )
    nca.train()
    with pytest.raises(
        NotImplementedError,
        match="`layout: prefix_shared` does not give the log-probabilities",
    ):
        trainer(tmp_path, layout="prefix_shared")


def test_the_model_card_says_what_the_model_was_trained_by(model_dir, tmp_path):
    """A folder of this machine as a base, ragged K, options of the loss, and no name on the Hub."""
    rows = reward_rows(5, k=[4, 3, 2])
    nca = trainer(tmp_path / "mine", model_dir, rows, loss_type=["nca", "sft"], loss_weights=[1.0, 0.1], alpha=0.25)
    nca.create_model_card(dataset_name="me/scores", tags="demo")
    card = (tmp_path / "mine" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["tags"] == ["nca-align", "nca", "sft", "demo", "trl", "generated_from_trainer"]
    assert metadata["datasets"] == ["me/scores"]
    assert "base_model" not in metadata
    assert metadata["library_name"] == "transformers"
    assert f"`{Path(model_dir).name}` trained on prompts with several rewarded completions each" in card
    assert str(tmp_path) not in card
    assert "None" not in card
    (tmp_path / "rows.jsonl").touch()
    nca.create_model_card(dataset_name=str(tmp_path / "rows.jsonl"))  # no path of this machine
    assert str(tmp_path) not in (tmp_path / "mine" / "README.md").read_text()
    assert "5 prompts with 2 to 4 completions each." in card
    for line in (
        "| `loss_type` | nca, sft |",
        "| `loss_weights` | 1.0, 0.1 |",
        "| `alpha` | 0.25 |",
        "| `beta` | 0.1 |",
    ):
        assert line in card
    assert "https://arxiv.org/abs/2402.05369" in card


# Refusals


@pytest.mark.parametrize(
    ("own", "said"),
    [({}, True), ({"max_position_embeddings": 256}, False),
     ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, False)],
    ids=["more", "as many", "scaled"],
)  # fmt: skip
def test_a_length_above_the_models_positions_is_told(own, said, tmp_path, caplog):
    model = build_model(build_tokenizer(), **{"max_position_embeddings": 128} | own)
    trainer(tmp_path, model, max_length=256)
    assert ("`max_length` is 256, but the model has 128 positions" in caplog.text) == said


def test_arguments_that_cannot_be_used_are_refused(tmp_path):
    tokenizer, rows = build_tokenizer(), Dataset.from_list(reward_rows(4))

    def make(**own):
        given = {"args": config(tmp_path), "train_dataset": rows, "processing_class": tokenizer} | own
        return NCATrainer(build_model(tokenizer), **given)

    with pytest.raises(TypeError, match=r"`data_collator` is a DataCollatorForPreference.*Leave it out"):
        make(data_collator=DataCollatorForPreference(pad_token_id=0))
    with pytest.raises(NotImplementedError, match="`compute_metrics` can't be used"):
        make(compute_metrics=lambda prediction: {})
    with pytest.raises(ValueError, match="`train_dataset` is None"):
        make(train_dataset=None)
    with pytest.raises(TypeError, match="`train` data is a list"):
        make(train_dataset=reward_rows(2))
    splits = r"with the splits `train`, `validation`, but must be one of them: `train_dataset=dataset\['train'\]`"
    with pytest.raises(TypeError, match=f"`train_dataset` is a DatasetDict {splits}"):
        make(train_dataset=DatasetDict({"train": rows, "validation": rows}))
    with pytest.raises(NotImplementedError, match="column `image`"):
        make(train_dataset=Dataset.from_list([{"image": 1, **reward_rows(1)[0]}]))
    with pytest.raises(TypeError, match="`args` is a dict"):
        make(args={"output_dir": "x"})
    with pytest.raises(NotImplementedError, match="split_batches"):
        make(args=config(tmp_path, accelerator_config={"split_batches": True}))
    with pytest.raises(NotImplementedError, match="dispatch_batches"):
        make(args=config(tmp_path, accelerator_config={"dispatch_batches": True}))
    with pytest.raises(ValueError, match=r"`loss_type` is .ipo., which is DPOTrainer"):
        make(args=DPOConfig(str(tmp_path), loss_type="ipo", bf16=False, use_cpu=True))


def test_what_would_train_nothing_is_refused(tmp_path):
    rows = reward_rows(3)
    options = config(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match="`dataloader_drop_last` is true, but `train_dataset` has 3 rows, fewer than"):
        NCATrainer("no/such-model", args=options, train_dataset=Dataset.from_list(rows))
    with pytest.raises(ValueError, match="`max_length` is 2, which cuts every completion of `train`"):
        trainer(tmp_path, rows=rows, max_length=2, max_prompt_length=1)
    # one that is whole is enough, and rows to evaluate on may be cut
    rows[0]["completions"][1] = [{"role": "assistant", "content": "a"}]
    assert trainer(tmp_path, rows=rows, eval_rows=rows[1:], max_length=10, max_prompt_length=1).train_dataset


def test_bad_rows_are_refused_before_the_model_is_loaded(tmp_path):
    rows = reward_rows(3)
    rows[1]["rewards"][2] = float("nan")
    with pytest.raises(ValueError, match=r"[Rr]ow 1.*`rewards"):
        NCATrainer("no/such-model", args=config(tmp_path), train_dataset=Dataset.from_list(rows))


def test_chosen_and_rejected_are_one_and_zero_also_beside_scores(tmp_path):
    rows = [
        {"prompt": "A question", "chosen": " good", "rejected": " bad one", "score_chosen": 7.0, "score_rejected": 9.0}
    ] * 4
    nca = trainer(tmp_path, rows=rows)
    assert nca.train_dataset["rewards"][:] == [[1.0, 0.0]] * 4


# What TRL may rename


def test_every_override_is_really_called(tmp_path, monkeypatch):
    """Fails loudly when a TRL or transformers release renames what the trainer overrides."""
    overrides = [
        "_prepare_dataset", "get_batch_samples",
        "compute_loss", "training_step", "prediction_step", "evaluate", "evaluation_loop", "log", "floating_point_ops",
        "_precompute_ref_logps", "compute_ref_log_probs",
    ]  # fmt: skip
    called = set()
    for name in overrides:
        assert name in NCATrainer.__dict__
        assert any(name in parent.__dict__ for parent in NCATrainer.__mro__[1:]), f"no parent has {name} any more"
        own = getattr(NCATrainer, name)
        monkeypatch.setattr(
            NCATrainer, name, lambda self, *a, name=name, own=own, **k: called.add(name) or own(self, *a, **k)
        )
    nca = trainer(
        tmp_path,
        eval_rows=reward_rows(2),
        eval_strategy="steps",
        eval_steps=1,
        precompute_ref_log_probs=True,
        max_steps=1,
    )
    nca.train()
    assert called == set(overrides)


# One of each value


def test_beta_and_alpha_set_afterwards_reach_loss_and_metrics(tmp_path):
    """TRL's loss reads `trainer.beta`; the metrics and every loss here do as well."""
    nca = trainer(tmp_path, ref_model=build_model(build_tokenizer(), seed=5), loss_type="infonca")
    batch = nca.data_collator([nca.train_dataset[i] for i in range(4)])

    def evaluated() -> tuple[float, float, float]:
        nca.model.eval()
        with torch.no_grad():
            loss, outputs = nca.compute_loss(nca.model, batch, return_outputs=True)
        about = outputs["logps"], nca._reference_logps(batch), batch["rewards"], nca.args.alpha, nca.beta
        metric = nca._log.evaluation.gather()["rewards/best"]
        return loss.item(), reward_loss(*about, "infonca", batch["valid"]).mean().item(), metric

    first, expected, best = evaluated()
    assert first == pytest.approx(expected, rel=1e-5)
    nca.beta *= 3
    second, expected, tripled = evaluated()
    assert second == pytest.approx(expected, rel=1e-5)
    assert second != pytest.approx(first, rel=1e-2)
    assert tripled == pytest.approx(3 * best, rel=1e-5)
    nca.args.alpha *= 3
    third, expected, _ = evaluated()
    assert third == pytest.approx(expected, rel=1e-5)
    assert third != pytest.approx(second, rel=1e-2)


@pytest.mark.parametrize("beta", [-1.0, 0.0, float("inf")])
def test_a_beta_that_is_set_afterwards_is_checked_as_the_configs(beta, tmp_path):
    nca = trainer(tmp_path)
    nca.beta = beta
    with pytest.raises(UserError, match=f"`beta` is {beta}; it must be a finite number above 0"):
        nca.train()


def test_a_beta_that_is_set_afterwards_is_the_runs_own(tmp_path):
    nca = trainer(tmp_path)
    before = nca._resume.run_identity()
    nca.beta = 0.7
    assert nca._resume.run_identity() == before | {"beta": 0.7}


@pytest.mark.parametrize("layout", ["padded", "prefix_shared", "auto"])
def test_a_collator_that_was_given_decides_its_layout_and_its_chunks(layout, tmp_path):
    """Also for the model, whose own attention would read a packed row as one conversation."""
    tokenizer, rows = build_tokenizer(), reward_rows(4, [3, 2])
    nca = NCATrainer(
        build_model(tokenizer), args=config(tmp_path, max_steps=1, layout="padded"), processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows), data_collator=RewardCollator(0, layout, tokens_per_forward=80),
    )  # fmt: skip
    assert nca.data_collator.layout == ("padded" if layout == "padded" else "prefix_shared")
    batch = nca.data_collator([nca.train_dataset[i] for i in range(4)])
    assert len(batch["chunks"]) > 2
    assert max(chunk["input_ids"].numel() for chunk in batch["chunks"]) <= 80
    expected = [alone(build_model(tokenizer), tokenizer, row) for row in rows]
    for logps, row in zip(nca._reference_logps(batch).tolist(), expected, strict=True):
        assert logps[: len(row)] == pytest.approx(row, rel=1e-5)
    forwards = Forwards().attach(nca)
    nca.train()
    assert forwards.with_grad > 1


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "how",
    [{"layout": "padded"}, {"tokens_per_forward": 40, "loss_type": "infonca"}, {"precompute_ref_log_probs": True}],
)
def test_an_adapter_on_the_head_trains(how, tied, cache, tmp_path):
    """The head's own module computes, so that its adapter counts; TRL's own log-probabilities would leave it out."""
    tokenizer, row = build_tokenizer(), reward_rows(8)[0]

    def base():
        return build_model(tokenizer, tie_word_embeddings=tied)

    nca = trainer(tmp_path, base(), peft_config=LoraConfig(r=4, target_modules=["q_proj", "lm_head"]), **how)
    nca.train()
    trained = dict(nca.model.named_parameters())["base_model.model.lm_head.lora_B.default.weight"]
    assert trained.abs().max() > 1e-4
    batch = nca.data_collator([nca.train_dataset[0]])
    reference = nca._reference_logps({name: value for name, value in batch.items() if name != "ref_logps"})
    assert reference[0].tolist() == pytest.approx(alone(base(), tokenizer, row), abs=1e-4)
    nca.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    with torch.no_grad():
        policy = nca._batch_logps(nca.model.eval(), batch)[0][0].tolist()
    assert policy == pytest.approx(alone(loaded, tokenizer, row), abs=1e-4)
    assert max(abs(p - r) for p, r in zip(policy, reference[0].tolist(), strict=True)) > 1e-2
