"""Evaluations in the midst of training: in trainers of every kind, and that the training goes on as without them."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from conftest import build_model, reward_rows
from nca_align import GenerationCallback, NCAConfig, NCATrainer, RankingCallback
from nca_align.commands.compare.methods import build_trainer
from nca_align.errors import UserError
from nca_align.evaluation import callbacks
from test_generation import LORA, evaluator


def options(tmp_path, **more) -> NCAConfig:
    return NCAConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, logging_steps=1,
        gradient_checkpointing=False, per_device_train_batch_size=2, num_train_epochs=2, learning_rate=1e-2, beta=0.1,
        alpha=0.3, max_length=None, warmup_steps=0, **{"save_strategy": "no"} | more,
    )  # fmt: skip


def trained(method, tokenizer, tmp_path, with_callbacks: bool, starts_as_reference: bool = False, **more):
    dataset = Dataset.from_list(reward_rows(4, 3))
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.1)
    trainer = build_trainer(
        method, build_model(tokenizer), options(tmp_path, **more), dataset, tokenizer, peft_config=lora
    )
    if with_callbacks:
        generation = {name: evaluator(tokenizer) for name in ("validation", "test")}
        trainer.add_callback(GenerationCallback(trainer, generation, [0, 2, 4], None, starts_as_reference))
        ranking = {"test": dataset}
        trainer.add_callback(
            RankingCallback(
                trainer, ranking, tokenizer, alpha=0.3, beta=0.1, steps=[0, 4], starts_as_reference=starts_as_reference
            )
        )
    trainer.train()
    return trainer


class _StopAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


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

    def test_a_start_that_is_the_reference_is_told_by_its_answers(self, tokenizer, tmp_path):
        usual, short = (
            [line for line in trained("nca", tokenizer, tmp_path, True, starts).state.log_history if "loss" not in line]
            for starts in (False, True)
        )
        first = [line for line in short if line["step"] == 0]
        figures = {key: value for line in first for key, value in line.items()}
        assert figures["eval_test_generation/kl"] == figures["eval_test_logratios/best"] == 0
        assert figures["eval_test_generation/win_rate"] == 0.5
        assert {*figures} == {key for line in usual if line["step"] == 0 for key in line}
        later = [[line for line in own if line["step"] > 0 and "train_runtime" not in line] for own in (usual, short)]
        assert later[0] == later[1]  # and wins are over those same answers

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

    def test_a_reference_with_a_key_is_read_from_the_disk_by_other_runs(
        self, tokenizer, tmp_path, own_datasets_cache, monkeypatch
    ):
        dataset = Dataset.from_list(reward_rows(4, [2, 4, 3]))
        read: list[int] = []
        logps_of = callbacks.completion_logps

        def counted(model, rows, size):
            read.append(len(rows))
            return logps_of(model, rows, size)

        monkeypatch.setattr(callbacks, "completion_logps", counted)

        def measured(key: tuple[str, ...] | None) -> tuple[dict[str, float], list[int]]:
            torch.manual_seed(1)
            policy = get_peft_model(build_model(tokenizer), LORA)
            trainer = build_trainer("nca", policy, options(tmp_path), dataset, tokenizer)
            callback = RankingCallback(trainer, {"": dataset}, tokenizer, alpha=0.3, beta=0.1, reference_key=key)
            read.clear()
            return callback.measure(trainer.model), [*read]

        figures, reads = measured(None)
        assert reads == [4, 4]
        assert [measured(("a",)), measured(("a",))] == [(figures, [4, 4]), (figures, [4])]
        assert measured(("b",)) == (figures, [4, 4])

    def test_without_steps_they_run_wherever_the_trainer_evaluates(self, tokenizer, tmp_path):
        dataset = Dataset.from_list(reward_rows(4, 3))
        trainer = build_trainer("nca", build_model(tokenizer), options(tmp_path), dataset, tokenizer, peft_config=LORA)
        trainer.eval_dataset = trainer.train_dataset
        trainer.add_callback(GenerationCallback(trainer, {"": evaluator(tokenizer)}))
        trainer.evaluate()
        assert "eval_generation/win_rate" in trainer.state.log_history[-1]

    def test_once_a_step_however_many_data_sets_are_evaluated_and_the_best_model_can_go_by_it(
        self, tokenizer, tmp_path
    ):
        dataset = Dataset.from_list(reward_rows(4, 3))
        names = {"validation": dataset, "test": dataset}
        args = options(
            tmp_path, eval_strategy="steps", eval_steps=2, eval_on_start=True, metric_for_best_model="generation/kl",
            save_strategy="steps", save_steps=2, load_best_model_at_end=True, greater_is_better=True,
            startup_checks=False,  # the adapter starts with random weights
        )  # fmt: skip
        trainer = NCATrainer(
            build_model(tokenizer), args=args, train_dataset=dataset, eval_dataset=names, processing_class=tokenizer,
            peft_config=LORA,
        )  # fmt: skip
        trainer.add_callback(GenerationCallback(trainer, {"": evaluator(tokenizer)}))
        trainer.train()
        lines = [line for line in trainer.state.log_history if "eval_generation/kl" in line]
        assert [line["step"] for line in lines] == [0, 2, 4]
        assert trainer.state.best_metric == max(line["eval_generation/kl"] for line in lines[1:])

    def test_a_resumed_run_has_each_step_once(self, tokenizer, tmp_path):
        """`eval_on_start` evaluates again where a run goes on, in TRL's trainers."""

        def run(stop: int):
            trainer = build_trainer(
                "dpo", build_model(tokenizer), options(tmp_path, max_steps=4, save_strategy="steps", save_steps=2),
                Dataset.from_list(reward_rows(4, 3)), tokenizer, peft_config=LORA,
            )  # fmt: skip
            trainer.eval_dataset, trainer.args.eval_strategy = trainer.train_dataset, IntervalStrategy.STEPS
            trainer.args.eval_on_start, trainer.args.eval_steps = True, 2
            trainer.add_callback(GenerationCallback(trainer, {"": evaluator(tokenizer)}))
            if stop < 4:
                trainer.add_callback(_StopAt(stop))
            trainer.train(resume_from_checkpoint=stop == 4)
            log = trainer.state.log_history
            return [[line["step"] for line in log if key in line] for key in ("eval_loss", "eval_generation/kl")]

        assert run(2)[1] == [0, 2]
        assert run(4) == [[0, 2, 2, 4], [0, 2, 4]]

    def test_an_adapter_that_is_trained_on_is_measured_against_where_it_came_from(self, tokenizer, tmp_path):
        def run(with_callback: bool):
            torch.manual_seed(1)
            policy = get_peft_model(build_model(tokenizer), LORA)
            trainer = build_trainer(
                "nca", policy, options(tmp_path), Dataset.from_list(reward_rows(4, 3)), tokenizer
            )  # fmt: skip
            assert "ref" in trainer.model.peft_config
            if with_callback:
                trainer.add_callback(GenerationCallback(trainer, {"": evaluator(tokenizer)}, steps=[0, 2, 4]))
            trainer.train()
            return trainer

        trainer, without = run(True), run(False)
        kl = [line["eval_generation/kl"] for line in trainer.state.log_history if "eval_generation/kl" in line]
        assert kl[0] == pytest.approx(0, abs=1e-5)
        assert kl[1] != 0
        assert [p.requires_grad for p in trainer.model.parameters()] == [
            p.requires_grad for p in without.model.parameters()
        ]
        assert all(
            torch.equal(a, b) for a, b in zip(trainer.model.parameters(), without.model.parameters(), strict=True)
        )

    def test_a_model_in_nf4_trains_on_after_its_forwards_without_gradients(self, tokenizer, tmp_path):
        build_model(tokenizer, hidden_size=128, intermediate_size=128).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")

        def losses(with_callback: bool) -> list[float]:
            quantization = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
            )
            torch.manual_seed(1)
            trainer = build_trainer(
                "dpo", str(tmp_path / "model"), options(tmp_path), Dataset.from_list(reward_rows(4, 3)), tokenizer,
                peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
                quantization_config=quantization,
            )  # fmt: skip
            if with_callback:
                trainer.add_callback(GenerationCallback(trainer, {"": evaluator(tokenizer)}, steps=[0, 4]))
                layers = [m for m in trainer.model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
                assert layers
                assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
            trainer.train()
            if with_callback:
                kl = [line["eval_generation/kl"] for line in trainer.state.log_history if "eval_generation/kl" in line]
                assert (kl[0], len(kl)) == (pytest.approx(0, abs=1e-5), 2)
            return [line["loss"] for line in trainer.state.log_history if "loss" in line]

        without = losses(False)
        assert without[0] != without[-1]
        assert losses(True) == without

    def test_ranking_in_several_processes_is_refused(self, tokenizer, tmp_path, monkeypatch):
        dataset = Dataset.from_list(reward_rows(4, 3))
        trainer = build_trainer("nca", build_model(tokenizer), options(tmp_path), dataset, tokenizer, peft_config=LORA)
        monkeypatch.setattr(type(trainer.args), "world_size", 2)
        with pytest.raises(NotImplementedError, match="RankingCallback runs in one process, but there are 2"):
            RankingCallback(trainer, {"": dataset}, tokenizer, alpha=0.3, beta=0.1)

    def test_full_fine_tuning_without_a_reference_is_refused(self, tokenizer, tmp_path):
        dataset = Dataset.from_list(reward_rows(4, 3))
        trainer = build_trainer("nca", build_model(tokenizer), options(tmp_path), dataset, tokenizer)
        trainer.ref_model = None
        with pytest.raises(ValueError, match="`reference` is missing for GenerationCallback"):
            GenerationCallback(trainer, {"": evaluator(tokenizer)})
        given = GenerationCallback(trainer, {"": evaluator(tokenizer)}, reference=build_model(tokenizer))
        assert given.measure(trainer.model)["eval_generation/kl"] == pytest.approx(0, abs=1e-5)

    @pytest.mark.parametrize("adapter", [None, LORA])
    def test_the_trained_model_is_no_reference_for_itself(self, adapter, tokenizer, tmp_path):
        dataset = Dataset.from_list(reward_rows(4, 3))
        model = build_model(tokenizer)
        trainer = build_trainer("nca", model, options(tmp_path), dataset, tokenizer, peft_config=adapter)
        with pytest.raises(ValueError, match="`reference` of GenerationCallback is the model that is trained"):
            GenerationCallback(trainer, {"": evaluator(tokenizer)}, reference=model)  # also below its adapter

    def test_a_prompt_that_is_too_long_is_refused_before_training(self, tokenizer, tmp_path):
        dataset = Dataset.from_list(reward_rows(4, 3))
        trainer = build_trainer("nca", build_model(tokenizer), options(tmp_path), dataset, tokenizer, peft_config=LORA)
        with pytest.raises(UserError, match="is more than the model's 2048"):
            GenerationCallback(trainer, {"": evaluator(tokenizer, max_new_tokens=2048)})

    def test_a_sharded_launch_is_refused(self, tokenizer, tmp_path, monkeypatch):
        dataset = Dataset.from_list(reward_rows(4, 3))
        trainer = build_trainer("nca", build_model(tokenizer), options(tmp_path), dataset, tokenizer, peft_config=LORA)
        trainer.is_fsdp_enabled = True
        with pytest.raises(NotImplementedError, match="GenerationCallback runs the model outside of training"):
            GenerationCallback(trainer, {"": evaluator(tokenizer)})
