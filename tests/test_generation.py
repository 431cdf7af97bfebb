"""Evaluation by generation: exact KL, wins, diversity, and the callbacks in trainers of every kind."""

import itertools
import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from conftest import build_model, reward_rows
from nca_align import GenerationCallback, GenerationEvaluator, NCAConfig, RankingCallback
from nca_align.generation import distinct, neutral_generation, win_rate
from nca_align.methods import build_trainer
from nca_align.policies import as_reference

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
PROMPTS = [{"prompt": [{"role": "user", "content": text}]} for text in ("Hello?", "What is the best way?", "And then")]


def length_of(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def evaluator(tokenizer, rows=PROMPTS, **more) -> GenerationEvaluator:
    options = {"num_completions": 3, "max_new_tokens": 6, "batch_size": 6} | more
    return GenerationEvaluator(rows, tokenizer, ["test_generation:length_of"], **options)


@pytest.fixture
def policy(tokenizer):
    torch.manual_seed(1)
    return get_peft_model(build_model(tokenizer), LORA).eval()


class TestFigures:
    def test_a_policy_that_is_its_reference_has_no_kl_and_wins_half(self, tokenizer, policy):
        figures = evaluator(tokenizer)(policy, policy)
        assert figures.kl.mean == pytest.approx(0, abs=1e-5)
        assert figures.win_rate.mean == 0.5
        assert (figures.prompts, figures.completions) == (3, 9)

    def test_an_adapter_is_measured_against_the_model_without_it(self, tokenizer, policy):
        figures = evaluator(tokenizer)(policy)
        given = evaluator(tokenizer)(policy, policy.get_base_model())  # the adapter's layers are in it: no reference
        bare = evaluator(tokenizer)(policy, lambda: as_reference(policy))
        assert figures == bare
        assert figures.kl.mean > 0.05
        assert given.kl.mean == pytest.approx(0, abs=1e-5)

    def test_kl_is_that_of_the_enumerated_distributions(self):
        """Answers of at most two tokens of a vocabulary of seven: the KL is a sum over all of them."""
        tokenizer = _WordTokenizer()
        model = build_model(tokenizer, initializer_range=1.0)
        torch.manual_seed(3)
        strong = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
        policy = get_peft_model(model, strong).eval()
        rows = [{"prompt": "a b"}, {"prompt": "c"}]
        figures = GenerationEvaluator(
            rows, tokenizer, ["test_generation:nothing"], num_completions=400, max_new_tokens=2, batch_size=800
        )(policy)
        exact, deviation = zip(
            *(_exact_kl(policy, tokenizer(row["prompt"])["input_ids"], 2) for row in rows), strict=True
        )
        error = math.hypot(*deviation) / 2 / math.sqrt(400)
        assert sum(exact) / 2 > 10 * error
        assert figures.kl.mean == pytest.approx(sum(exact) / 2, abs=4 * error)

    def test_the_models_own_generation_settings_change_nothing_and_are_kept(self, tokenizer, policy):
        plain = evaluator(tokenizer)(policy)
        own = policy.get_base_model().generation_config
        own.repetition_penalty, own.top_k, own.temperature = 5.0, 1, 0.1
        assert evaluator(tokenizer)(policy) == plain
        assert policy.get_base_model().generation_config is own
        with neutral_generation(policy, [3], 0):
            assert policy.get_base_model().generation_config.top_k == 0

    def test_batches_give_every_prompt_its_own_answers_and_nothing_else_moves(self, tokenizer, policy):
        policy.train()
        before = torch.get_rng_state()
        figures = evaluator(tokenizer, batch_size=3)(policy)
        assert torch.equal(torch.get_rng_state(), before)
        assert policy.training
        assert evaluator(tokenizer, batch_size=3)(policy) == figures  # the same seeds

    def test_scorers_get_the_rows_other_columns(self, tokenizer, policy):
        rows = [row | {"wanted": float(i), "completions": ["x"], "rewards": [9.0]} for i, row in enumerate(PROMPTS)]
        figures = GenerationEvaluator(rows, tokenizer, ["test_generation:wanted_of"], max_new_tokens=2)(policy)
        assert figures.reward.mean == 1.0
        assert figures.win_rate.mean == 0.5

    @pytest.mark.parametrize(
        ("rows", "more", "message"),
        [
            ([], {}, "`dataset` is empty"),
            (PROMPTS, {"num_completions": 0}, "`num_completions` is 0; it must be at least 1"),
            (PROMPTS, {"scorers": []}, "`scorers` is empty"),
            (PROMPTS, {"scorers": ["nowhere:none"]}, "nowhere"),
        ],
    )
    def test_what_can_not_be_is_refused(self, rows, more, message, tokenizer):
        scorers = more.pop("scorers", ["test_generation:length_of"])
        with pytest.raises(ValueError, match=message):
            GenerationEvaluator(rows, tokenizer, scorers, **more)

    def test_a_model_without_an_adapter_needs_a_reference(self, tokenizer, model):
        with pytest.raises(ValueError, match="`reference` is missing, and the model has no adapter"):
            evaluator(tokenizer)(model)


def wanted_of(completions, wanted, **kwargs):
    return wanted


def nothing(completions, **kwargs):
    return [0.0] * len(completions)


def test_win_rate_counts_ties_as_half():
    assert win_rate([1.0, 2.0], [1.0, 0.0]) == (0.5 + 1 + 1 + 1) / 4
    assert win_rate([0.0], [5.0, 5.0]) == 0


def test_distinct_is_one_without_repetition_and_falls_with_it():
    assert distinct(["a b c", "d e"], 2) == 1.0
    assert distinct(["a b a b"], 2) == 2 / 3
    assert distinct(["a", ""], 2) == 0.0


class _WordTokenizer:
    """Six letters and an end, one token each."""

    vocabulary = ("<end>", "a", "b", "c", "d", "e", "f")
    bos_token_id, eos_token_id, pad_token_id, chat_template = 1, 0, 0, None

    def __len__(self):
        return len(self.vocabulary)

    def __call__(self, text):
        return {"input_ids": [self.vocabulary.index(word) for word in text.split()]}

    def decode(self, ids, skip_special_tokens):
        return " ".join(self.vocabulary[i] for i in ids if i)


@torch.no_grad()
def _exact_kl(policy, prompt: list[int], length: int) -> tuple[float, float]:
    """KL(policy ‖ bare model) over all answers of at most `length` tokens, and the deviation of one sample of it."""

    def logp(answer):
        logits = policy(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        return float(logits.gather(1, torch.tensor(answer)[:, None]).sum())

    answers = [[*begun, 0] for t in range(length) for begun in itertools.product(range(1, 7), repeat=t)]
    answers += [list(ids) for ids in itertools.product(range(1, 7), repeat=length)]
    own = [logp(answer) for answer in answers]
    with policy.disable_adapter():
        ratios = [p - logp(answer) for p, answer in zip(own, answers, strict=True)]
    weights = [math.exp(p) for p in own]
    assert sum(weights) == pytest.approx(1)
    mean = sum(w * r for w, r in zip(weights, ratios, strict=True))
    return mean, math.sqrt(sum(w * (r - mean) ** 2 for w, r in zip(weights, ratios, strict=True)))


def options(tmp_path, **more) -> NCAConfig:
    return NCAConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, logging_steps=1,
        gradient_checkpointing=False, per_device_train_batch_size=2, num_train_epochs=2, learning_rate=1e-2, beta=0.1,
        alpha=0.3, max_length=None, save_strategy="no", warmup_steps=0, **more,
    )  # fmt: skip


def trained(method, tokenizer, tmp_path, with_callbacks: bool, **more):
    dataset = Dataset.from_list(reward_rows(4, 3))
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)
    trainer = build_trainer(
        method, build_model(tokenizer), options(tmp_path, **more), dataset, tokenizer, peft_config=lora
    )
    if with_callbacks:
        generation = {name: evaluator(tokenizer) for name in ("validation", "test")}
        trainer.add_callback(GenerationCallback(trainer, generation, steps=[0, 2, 4]))
        ranking = {"test": dataset}
        trainer.add_callback(RankingCallback(trainer, ranking, tokenizer, alpha=0.3, beta=0.1, steps=[0, 4]))
    trainer.train()
    return trainer


class TestCallbacks:
    @pytest.mark.parametrize("method", ["nca", "dpo", "kto", "sft"])
    def test_they_log_at_their_steps_and_change_no_training(self, method, tokenizer, tmp_path):
        without = trained(method, tokenizer, tmp_path, False)
        trainer = trained(method, tokenizer, tmp_path, True)
        log = trainer.state.log_history
        kl = {line["step"]: line["eval_test_generation/kl"] for line in log if "eval_test_generation/kl" in line}
        assert list(kl) == [0, 2, 4]
        assert kl[0] == pytest.approx(0, abs=1e-5)
        assert kl[4] != 0
        best = {line["step"]: line for line in log if "eval_test_logratios/best" in line}
        assert list(best) == [0, 4]
        assert best[0]["eval_test_logratios/best"] == pytest.approx(0, abs=1e-5)
        assert {f"eval_test_rewards/rank_{k}" for k in (1, 2, 3)} < set(best[4])
        losses = [[line["loss"] for line in own.state.log_history if "loss" in line] for own in (without, trainer)]
        assert losses[0] == losses[1]
        weights = [[p for p in own.model.parameters() if p.requires_grad] for own in (without, trainer)]
        assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))

    def test_ranking_logs_what_nca_trainer_logs_itself(self, tokenizer, tmp_path):
        dataset = Dataset.from_list(reward_rows(4, [2, 4, 3]))
        trainer = build_trainer(
            "nca", build_model(tokenizer), options(tmp_path), dataset, tokenizer, peft_config=LORA
        )  # fmt: skip
        trainer.eval_dataset = trainer.train_dataset
        callback = RankingCallback(trainer, {"": dataset}, tokenizer, alpha=0.3, beta=0.1)
        own = trainer.evaluate()
        found = callback.measure(trainer.model)
        shared = {name for name in own if name.split("/")[0].removeprefix("eval_") in ("rewards", "logratios", "kl")}
        assert len(shared) > 15
        assert found == pytest.approx({name: own[name] for name in found}, abs=2e-4)
        assert shared <= set(found)

    def test_without_steps_they_run_wherever_the_trainer_evaluates(self, tokenizer, tmp_path):
        dataset = Dataset.from_list(reward_rows(4, 3))
        trainer = build_trainer("nca", build_model(tokenizer), options(tmp_path), dataset, tokenizer, peft_config=LORA)
        trainer.eval_dataset = trainer.train_dataset
        trainer.add_callback(GenerationCallback(trainer, {"": evaluator(tokenizer)}))
        trainer.evaluate()
        assert "eval_generation/win_rate" in trainer.state.log_history[-1]

    def test_full_fine_tuning_without_a_reference_is_refused(self, tokenizer, tmp_path):
        dataset = Dataset.from_list(reward_rows(4, 3))
        trainer = build_trainer("nca", build_model(tokenizer), options(tmp_path), dataset, tokenizer)
        trainer.ref_model = None
        callback = GenerationCallback(trainer, {"": evaluator(tokenizer)})
        with pytest.raises(ValueError, match="`reference` is missing for GenerationCallback"):
            callback.measure(trainer.model)

    def test_a_sharded_launch_is_refused(self, tokenizer, tmp_path, monkeypatch):
        dataset = Dataset.from_list(reward_rows(4, 3))
        trainer = build_trainer("nca", build_model(tokenizer), options(tmp_path), dataset, tokenizer, peft_config=LORA)
        trainer.is_fsdp_enabled = True
        with pytest.raises(NotImplementedError, match="GenerationCallback runs the model outside of training"):
            GenerationCallback(trainer, {"": evaluator(tokenizer)})
