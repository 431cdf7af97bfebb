"""When a run logs and evaluates where its user said nothing, and that a user's own word stays."""

import json

import pytest
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig

from conftest import reward_rows
from nca_align import NCAConfig
from nca_align.commands.train.command import main
from nca_align.training.log_schedule import logging_interval
from test_trainer import logged, trainer

UNSAID = {"logging_steps": None, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 1}


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == 5


def logged_steps(nca, name: str = "loss") -> list[int]:
    return [line["step"] for line in nca.state.log_history if name in line]


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 19, 20, 21, 99, 100, 101, 12345])
def test_ten_points_or_every_step_and_trls_interval_in_long_runs(steps):
    every = logging_interval(steps)
    points = steps // every + bool(steps % every)
    assert points >= min(10, steps)
    assert every == 10 if steps >= 100 else every <= 10


def test_a_small_run_of_the_defaults_logs_each_step_and_evaluates_its_end(tmp_path):
    """24 rows, of which one is held out, made nine steps: below TRL's ten, and nothing was logged."""
    nca = trainer(tmp_path, eval_rows=reward_rows(1, seed=5), max_steps=9, **UNSAID)
    nca.train()
    assert logged_steps(nca) == list(range(1, 10))
    assert logged_steps(nca, "eval_loss") == [9]


def test_the_last_step_is_logged_and_a_users_own_interval_stays(tmp_path):
    nca = trainer(tmp_path, max_steps=7, logging_steps=3)
    nca.train()
    assert logged_steps(nca) == [3, 6, 7]
    whole = trainer(tmp_path, max_steps=7, logging_steps=1)
    whole.train()
    losses = logged(whole)
    assert logged(nca) == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:6]) / 3, losses[6]])


def test_an_interval_beyond_the_run_logs_its_end(tmp_path):
    nca = trainer(tmp_path, max_steps=3, logging_steps=500)
    nca.train()
    assert logged_steps(nca) == [3]


def test_a_share_of_all_steps_is_transformers_own(tmp_path):
    nca = trainer(tmp_path, max_steps=8, logging_steps=0.5)
    nca.train()
    assert logged_steps(nca) == [4, 8]


def test_a_run_that_a_callback_stops_logs_and_evaluates_where_it_stopped(tmp_path):
    nca = trainer(tmp_path, eval_rows=reward_rows(2, seed=5), max_steps=40, callbacks=[Stop()], **UNSAID)
    nca.train()
    assert logged_steps(nca) == [4, 5]
    assert logged_steps(nca, "eval_loss") == [5]


@pytest.mark.parametrize(
    ("said", "evaluated"),
    [
        ({"eval_strategy": "no"}, []),
        ({"eval_strategy": "steps", "eval_steps": 2}, [2, 3]),
        ({"eval_on_start": True}, [0, 3]),
    ],
)
def test_what_a_user_says_of_evaluations_stays(said, evaluated, tmp_path):
    nca = trainer(tmp_path, eval_rows=reward_rows(2, seed=5), **said)
    nca.train()
    assert logged_steps(nca, "eval_loss") == evaluated


@pytest.mark.parametrize("own", [{}, {"logging_strategy": "epoch"}])
def test_evaluations_by_steps_are_at_each_step_that_is_logged(own, tmp_path):
    """`eval_steps` "defaults to `logging_steps`": TRL's 10 left a run of nine steps its end alone."""
    nca = trainer(tmp_path, eval_rows=reward_rows(1, seed=5), max_steps=9, eval_strategy="steps", **UNSAID, **own)
    nca.train()
    assert logged_steps(nca, "eval_loss") == list(range(1, 10))
    assert own or logged_steps(nca) == list(range(1, 10))


def test_no_logging_is_obeyed(tmp_path):
    nca = trainer(tmp_path, logging_strategy="no", logging_steps=None)
    nca.train()
    assert not logged_steps(nca)


def test_without_rows_to_evaluate_the_end_is_not(tmp_path):
    nca = trainer(tmp_path, logging_steps=None)
    nca.train()
    assert not logged_steps(nca, "eval_loss")


def test_what_nothing_was_said_of_is_known_also_of_a_plain_dpo_config():
    own = {"bf16": False, "use_cpu": True}
    for config in (NCAConfig("x", **own), NCAConfig.of(DPOConfig("x", **own), "model")):
        assert config.is_unsaid("logging_steps")
        assert (config.logging_steps, config.eval_strategy) == (10, "no")  # scripts and callbacks read them
    # a plain DPOConfig's evaluation may be dear: its word is kept, said or not
    assert [config.is_unsaid("eval_strategy") for config in (NCAConfig("x", **own), config)] == [True, False]
    said = NCAConfig.of(DPOConfig("x", logging_steps=3, eval_strategy="epoch", **own), "model")
    assert (said.logging_steps, said.eval_strategy) == (3, "epoch")
    assert not said.is_unsaid("logging_steps")
    later = NCAConfig("x", **own)
    later.logging_steps, later.eval_strategy = 5, "epoch"
    assert not later.is_unsaid("logging_steps")
    assert not later.is_unsaid("eval_strategy")


@pytest.mark.parametrize(("own", "evaluated"), [({}, [*range(1, 10)]), ({"logging_steps": 4}, [4, 8, 9])])
def test_evaluations_by_steps_come_with_the_log_lines(tmp_path, own, evaluated):
    config = {"eval_strategy": "steps", "max_steps": 9} | UNSAID | own
    nca = trainer(tmp_path, eval_rows=reward_rows(1, seed=5), **config)
    nca.train()
    assert logged_steps(nca, "eval_loss") == evaluated


def test_one_config_makes_several_trainers(tmp_path):
    """What is settled for the one is not said for the other, which has no rows to evaluate."""
    first = trainer(tmp_path, eval_rows=reward_rows(1, seed=5), **UNSAID)
    first.train()
    second = type(first)(
        first.model, args=first.args, train_dataset=Dataset.from_list(reward_rows(4)),
        processing_class=first.processing_class,
    )  # fmt: skip
    second.train()
    assert first.args.is_unsaid("logging_steps")
    assert first.args.is_unsaid("eval_strategy")
    assert not logged_steps(second, "eval_loss")


@pytest.mark.slow
def test_the_command_evaluates_what_the_data_hold_out_and_no_more(model_dir, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, reward_rows(24))))
    options = {
        "model_name_or_path": model_dir, "dataset_name": tmp_path / "rows.jsonl", "use_cpu": "true", "bf16": "false",
        "report_to": "none", "max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "no",
    }  # fmt: skip
    shared = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    for name, own, evaluated in (
        ("held-out", [], [3]),
        ("none", ["--validation_fraction", "0"], []),
        ("no", ["--eval_strategy", "no"], []),
    ):
        assert main([*shared, *own, "--output_dir", str(tmp_path / name)]) == 0
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        assert [line["step"] for line in log if "loss" in line] == [1, 2, 3]
        assert [line["step"] for line in log if "eval_loss" in line] == evaluated
