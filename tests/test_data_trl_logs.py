"""The Parquet files that TRL's `log_completions` leaves load as rows, text and messages, with one reward or several."""

import pandas
import pytest
from datasets import Dataset

from conftest import build_model, build_tokenizer
from nca_align import load_reward_dataset
from nca_align.errors import UserError

TRAJECTORY = [
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
    {"role": "tool", "content": "2", "tool_calls": None},
    {"role": "assistant", "content": "It is 2.", "tool_calls": None},
]


def log(folder, step: int, prompts: list, completions: list, **rewards) -> None:
    """As `GRPOTrainer.log` writes it."""
    table = {"step": [step] * len(prompts), "prompt": prompts, "completion": completions, **rewards}
    table["advantage"] = [0.5, -0.5] * (len(prompts) // 2)
    folder.mkdir(exist_ok=True)
    pandas.DataFrame(table).to_parquet(folder / f"completions_{step:05d}.parquet")


def test_the_steps_of_a_log_are_one_data_set(tmp_path):
    for step in (1, 2):
        log(tmp_path / "c", step, ["1 + 1 =", "1 + 1 ="], [f" {step}", " 9"], accuracy_reward=[step / 2, 0.0])
    (row,) = load_reward_dataset(str(tmp_path / "c"), split="train", validation_fraction=0)
    assert (row["prompt"], row["completions"], row["rewards"]) == (
        "1 + 1 =", [" 1", " 9", " 2", " 9"], [0.5, 0.0, 1.0, 0.0],
    )  # fmt: skip


def test_a_generation_that_several_steps_log_counts_once(tmp_path):
    """TRL's log is a queue that logging doesn't clear; `log_extra` of a reward function adds columns of text."""

    def step(number, *completions):
        given = {"acc": [float(text == " 2") for text in completions], "answer": [text.strip() for text in completions]}
        log(tmp_path / "c", number, ["1 + 1 ="] * len(completions), list(completions), **given)

    step(1, " 2", " 9")
    step(2, " 2", " 9")  # the same generation
    step(3, " 3", " 9")  # another, of which one completion is as before
    step(4, " 3", " 9")
    (row,) = load_reward_dataset(str(tmp_path / "c"), split="train", validation_fraction=0)
    assert (row["completions"], row["rewards"]) == ([" 2", " 9", " 3", " 9"], [1.0, 0.0, 0.0, 0.0])
    assert row["answer"] == ["2", "9", "3", "9"]


def test_what_is_still_in_the_queue_counts_once(tmp_path):
    """An evaluation adds fewer completions than the queue holds."""
    for number, completions in enumerate(([" 2", " 9", " 3", " 4"], [" 3", " 4", " 5", " 9"])):
        table = {"step": number, "prompt": "1 + 1 =", "completion": completions, "acc": 1.0, "advantage": 0.0}
        (tmp_path / "c").mkdir(exist_ok=True)
        pandas.DataFrame(table).to_parquet(tmp_path / "c" / f"completions_{number:05d}.parquet")
    (row,) = load_reward_dataset(str(tmp_path / "c"), split="train", validation_fraction=0)
    assert row["completions"] == [" 2", " 9", " 3", " 4", " 5", " 9"]


def test_trajectories_and_several_rewards(tmp_path):
    prompt = [{"role": "user", "content": "1 + 1"}]
    given = {"accuracy_reward": [1.0, 0.0], "format_reward": [0.0, 1.0]}
    log(tmp_path / "c", 1, [prompt] * 2, [TRAJECTORY, [{"role": "assistant", "content": "3"}]], **given)
    with pytest.raises(
        UserError, match=r"with the columns accuracy_reward, format_reward\. Name the one that is the reward by"
    ):
        load_reward_dataset(str(tmp_path / "c"))
    with pytest.raises(
        UserError, match=r"`score` is 'acuracy_reward', which `train` .* doesn't have; choose among acc"
    ):
        load_reward_dataset(str(tmp_path / "c"), score="acuracy_reward")
    (row,) = load_reward_dataset(str(tmp_path / "c"), split="train", validation_fraction=0, score="format_reward")
    assert row["rewards"] == [0.0, 1.0]
    assert [message["role"] for message in row["completions"][0]] == ["assistant", "tool", "assistant"]
    weights = {"accuracy_reward": 2.0, "format_reward": 0.5}
    (row,) = load_reward_dataset(str(tmp_path / "c"), split="train", validation_fraction=0, reward_weights=weights)
    assert row["rewards"] == [2.0, 0.5]


@pytest.mark.slow
def test_what_grpo_logs_loads(tmp_path):
    """Of a real run of TRL's."""
    from trl import GRPOConfig, GRPOTrainer

    def length_reward(completions, **_):
        return [float(len(text)) for text in completions]

    tokenizer = build_tokenizer()
    args = GRPOConfig(
        output_dir=str(tmp_path), max_steps=2, num_generations=4, per_device_train_batch_size=4, logging_steps=1,
        max_completion_length=6, log_completions=True, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": ["The quick", "A dog"]})
    GRPOTrainer(build_model(tokenizer), length_reward, args, prompts, processing_class=tokenizer).train()
    rows = load_reward_dataset(str(tmp_path / "completions"), split="train", validation_fraction=0)
    assert sum(map(len, rows["completions"])) == 8
    for row in rows:
        assert row["rewards"] == list(map(float, map(len, row["completions"])))
