"""The example of trajectories: a calculator that runs nothing, and rows in which its results are no terms."""

import importlib.util
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from nca_align.batching.tokenization import tokenize_dataset
from nca_align.models.loading import ModelSource

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "calculator.py"


@pytest.fixture(scope="module")
def example() -> Any:
    spec: Any = importlib.util.spec_from_file_location("calculator", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("17 * 25", "425"), (" 7/2 ", "3.5"), ("-(2 + 3) * 4", "-20"), ("0.1 + 0.2", "0.3"), ("8 - 50", "-42"),
        *((bad, "error") for bad in (
            "1 / 0", "2 ** 9", "9 × 9", "", "(", "3 = 3", "x", "True + 1", "'a' * 9", "__import__('os')", "1e308 * 10",
            "[1][0]", "abs(1)", "(" * 999 + "1" + ")" * 999, "-" * 5000 + "1",
        )),
    ],
)  # fmt: skip
def test_the_calculator_knows_numbers_and_four_signs(example, text, value):
    assert example.calculate(text) == value


def test_no_held_out_wording_is_trained_on_and_the_answer_is_the_last_number(example):
    tasks = list(example.draw_tasks(random.Random(0), 30, 12))
    seen, unseen = ({task.question.translate({48 + n: None for n in range(10)}) for task in tasks if task.unseen is own}
                    for own in (False, True))  # fmt: skip
    assert (len(seen), len(unseen), seen & unseen) == (9, 3, set())
    for task in tasks:
        said = lambda text: example.reward(task, [{"role": "assistant", "content": text}])  # noqa: B023, E731
        assert (said(f"The answer is {task.answer}."), said("12"), said("No idea."), said("")) == (1, 0, 0, 0)
        assert said(f"It is 12, no, {int(task.answer):,}") == 1


def test_conversations_that_are_alike_get_turns_of_their_own(example, model_dir):
    model, tokenizer = example.load(model_dir)
    first, second = ([{"role": "user", "content": text}] for text in ("What is 2 times 3?", "Add 4 to 5."))
    drawn = example.write_turns(model, tokenizer, [first, second, first, first], 1)
    assert len(set(drawn)) == 4
    assert example.write_turns(model, tokenizer, [first, second, first, first], 1) == drawn


def test_the_example_trains_on_what_the_model_wrote_alone(example, model_dir, tmp_path, monkeypatch, capsys):
    """A tiny model calls nothing by itself, so that its turns are given; all else is the example's."""
    turns = itertools.cycle(["No idea.", "<calc>17 * 25</calc>", "<calc>6 - 8</calc> now", "It is 425.", "It is -2."])
    monkeypatch.setattr(example, "write_turns", lambda model, tokenizer, given, seed: [next(turns) for _ in given])
    sizes = ["--tasks", "3", "--rollouts", "5", "--held_out", "2", "--held_out_rollouts", "3", "--max_steps", "2"]
    assert example.main(["--model", model_dir, "--output_dir", str(tmp_path), *sizes, "--cpu_threads", "1"]) == 0
    assert re.search(r"^other wordings +2 +0\.\d+", capsys.readouterr().out, re.M)
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 2
    rows = [json.loads(line) for line in (tmp_path / "trajectories.jsonl").read_text().splitlines()]
    tokenizer = ModelSource.of(model_dir).load_tokenizer()
    tokenised, _ = tokenize_dataset(Dataset.from_list(rows), tokenizer, 192, 384)
    called = 0
    for row, given in zip(tokenised, rows, strict=True):
        for messages, ids, mask in zip(
            given["completions"], row["completion_ids"], row["completion_mask"], strict=True
        ):
            read = tokenizer.decode([token for token, own in zip(ids, mask, strict=True) if not own])
            wrote = tokenizer.decode([token for token, own in zip(ids, mask, strict=True) if own])
            results = [message["content"] for message in messages if message["role"] == "tool"]
            answers = [message["content"] for message in messages if message["role"] == "assistant"]
            header = "\n<|im_start|>tool\n{}<|im_end|>\n<|im_start|>assistant\n"
            assert read == "".join(header.format(result) for result in results)
            assert wrote == "".join(f"{answer}<|im_end|>" for answer in answers) + "\n"
            called += len(results)
    assert called > 5
