"""Process rewards: steps of tokens, answers by vote, ProcessBench's F1 and its τ, and the command that gives them."""

import json
import re
import runpy
from fractions import Fraction
from itertools import compress, pairwise
from pathlib import Path
from statistics import fmean

import pytest
import torch
import trl.chat_template_utils as trl_templates
from datasets import Dataset
from transformers import AutoModelForCausalLM

from conftest import build_tokenizer, labelled_rows
from nca_align.batching.tokenization import tokenize_dataset
from nca_align.batching.tokenized_rows import masks_of
from nca_align.commands.evaluate.command import main
from nca_align.commands.evaluate.process_rewards import ProcessOptions, read_solutions
from nca_align.data import DataOptions, to_reward_dataset
from nca_align.errors import InvalidRowError
from nca_align.evaluation.process_rewards import (
    best_of_k,
    best_threshold,
    choose_answers,
    f1_of_first_errors,
    first_below,
    given_starts,
    marked_starts,
    step_rewards,
    steps_of_tokens,
    token_texts,
    vote,
)
from test_implicit import save_adapter
from test_trajectories import CALLS_ALONE, PROMPT, WITH_TOOL, WITH_USER, tokenizer_of, turn

TEXTS = [
    "Step one.\nStep two: 2 + 2 = 4.\n\n  Step three.",
    "\n\nA",
    "no break",
    "é 日本 🙂\nnext 🙂🙂\n",
    "a\n\n\nb\n \nc\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_token_texts_are_the_text_and_steps_its_lines(text):
    """Whatever the tokens: the texts of a step's tokens hold its line, and no other's."""
    tokenizer = build_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)
    steps = steps_of_tokens(texts, marked_starts("".join(texts), "\n"))
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    assert sorted(set(steps)) == list(range(len(lines)))
    assert steps == sorted(steps)
    for number, line in enumerate(lines):
        assert "".join(own for own, step in zip(texts, steps, strict=True) if step == number).strip() == line


def test_steps_by_a_marker_and_as_given():
    text = "First ки Second ки\nThird ки"
    assert [text[start:] for start in marked_starts(text, "ки")] == [text, "Second ки\nThird ки", "Third ки"]
    assert [text[start:] for start in given_starts(text, ["First", " Second ки", "Third ки"], "steps[0]")] == [
        text, "Second ки\nThird ки", "Third ки",
    ]  # fmt: skip
    assert given_starts("ab ab ab", ["ab", "ab", "ab"], "steps[0]") == [0, 3, 6]
    for given, message in (
        (["First", "Fourth"], "`steps[0][1]` is 'Fourth', which does not stand in the completion after the step"),
        (["Second", "First"], "`steps[0][1]` is 'First'"), ([""], "`steps[0][0]` is ''"),
        ([], "`steps[0]` is empty; a completion has at least one step"),
    ):  # fmt: skip
        with pytest.raises(InvalidRowError, match=re.escape(message)):
            given_starts(text, given, "steps[0]")


def test_a_tag_alone_is_no_step():
    """It belongs to the step that it opens or closes, and white space behind it to the step before."""
    text = "<think>\n\n</think>\n\nA\n<call>\n{1}\n</call>\n<b>B</b>\nC <d>\n<think>"
    starts = marked_starts(text, "\n")
    assert [text[a:b] for a, b in pairwise([*starts, len(text)])] == [
        "A\n", "<call>\n{1}\n</call>\n", "<b>B</b>\n", "C <d>\n<think>",
    ]  # fmt: skip
    assert marked_starts("<think>\n</think>", "\n") == [0]
    assert marked_starts("<think>ки1 ки", "ки") == [0]


ROWS = {
    "lines": ([turn("A 1.\nB 2.\n\nC 3.")], ["A 1.", "B 2.", "C 3."]),
    "thought": ([turn("<think>\nA 1.\nB 2.\n</think>\n\nC 3.")], ["A 1.", "B 2.", "C 3."]),
    "tool": (WITH_TOOL, ["Let me see.", "17", "It is 42."]),
    "calls alone": ([*CALLS_ALONE, *WITH_TOOL[1:]], ["17", "17", "It is 42."]),
    "user": (WITH_USER, ["It is 43.", "Oh.", "It is 42."]),
}


def whole_text(text: str) -> str:
    return text


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("as_ids", [False, True])
def test_steps_and_answers_are_those_of_what_the_model_wrote(name, as_ids):
    """Whatever a template writes around it: an empty thought, the tags of calls, headers; and of token ids too."""
    tokenizer = tokenizer_of(trl_templates.qwen3_chat_template)
    completion, expected = ROWS[name]
    text = {"prompt": PROMPT, "completions": [completion], "rewards": [1.0]}
    row = next(iter(tokenize_dataset(Dataset.from_list([text]), tokenizer, None, None)[0]))
    if as_ids:
        text = {"prompt": row["prompt_ids"], "completions": row["completion_ids"], "rewards": [1.0]}
    options = ProcessOptions(steps="newline", answers="test_process_rewards:whole_text")
    found = read_solutions(options, tokenizer, [row], [text])
    (((numbers, count),),), ((answer,),) = found.steps, found.answers
    ids = list(compress(row["completion_ids"][0], masks_of(row)[0]))
    steps = ["".join(tokenizer.decode([t]) for t, s in zip(ids, numbers, strict=True) if s == j) for j in range(count)]
    assert len(steps) == len(expected), steps
    assert all(words in step for words, step in zip(expected, steps, strict=True)), steps
    assert expected[-1] in answer
    assert not re.search("TOOLRESULT|Look again", answer)


def test_a_token_belongs_to_the_step_of_its_first_visible_character():
    texts = [
        "A",
        ".\n",
        "\n",
        " B",
        "C\nD",
        "",
        "\n",
    ]  # one token holds the end of a step and a whole one; the last ends
    starts = marked_starts("".join(texts), "\n")
    steps = steps_of_tokens(texts, starts)
    assert (len(starts), steps) == (3, [0, 0, 0, 1, 1, 1, 1])
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    assert step_rewards(rewards, steps, 3).tolist() == [7.0, 120.0, 0.0]


def test_votes():
    rewards, answers = [0.0, 0.0, 1.0, 0.5], ["3", "3", "4", None]
    assert vote(answers, [1.0] * 4, rewards) == 0.0
    assert vote(answers, [0.1, 0.2, 0.9, 0.8], rewards) == 1.0
    assert vote(answers, [0.1, 0.2, 0.3, 0.9], rewards) == 0.5  # without an answer it stands for itself
    assert vote([None, None], [0.5, 0.5], [1.0, 0.0]) == 0.5
    assert vote(["a", "b"], [0.5, 0.5], [1.0, 0.0]) == 0.5  # a tie
    assert vote(["a", "a"], [0.5, 0.1], [1.0, 0.0]) == 0.5  # one answer, judged in two ways
    assert best_of_k([2.0, 3.0, 3.0], [1.0, 0.0, 1.0]) == 0.5
    whole, least = [[2.0, 1.0, 0.0], [-1.0]], [[-3.0, -1.0, -2.0], [-1.0]]
    found = choose_answers(whole, least, [["x", "y", "y"], ["z"]], [[0.0, 1.0, 1.0], [1.0]])
    assert {name: interval.mean for name, interval in found.items()} == pytest.approx({
        "at random": fmean([2 / 3, 1]), "best of K, sum of steps": 0.5, "best of K, least step": 1, "majority": 1,
        "vote by sum of steps": 1, "vote by least step": 1, "the best": 1,
    })  # fmt: skip
    assert "majority" not in choose_answers(whole, None, None, [[0.0, 1.0, 1.0], [1.0]])


def draw(n, seed):
    """Step rewards with ties, and first errors of which some can't be found by any τ."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 6, (n,), generator=generator).tolist()
    rewards = [(4 * torch.randn(size, generator=generator)).round().div(4).tolist() for size in sizes]
    return rewards, [int(torch.randint(-1, size, (1,), generator=generator)) for size in sizes]


def f1_by_counting(rewards, labels, threshold):
    shares = []
    for wrong in (True, False):
        own = [
            next((j for j, reward in enumerate(row) if reward < threshold), -1) == label
            for row, label in zip(rewards, labels, strict=True) if (label >= 0) == wrong
        ]  # fmt: skip
        shares.append(Fraction(sum(own), len(own)))
    total = sum(shares)
    return float(2 * shares[0] * shares[1] / total) if total else 0.0, *map(float, shares)


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_best_of_all(seed):
    rewards, labels = draw(40, seed)
    chosen = best_threshold(rewards, labels)
    places = sorted({reward for row in rewards for reward in row})
    every = [places[0] - 1, *places, *((a + b) / 2 for a, b in pairwise(places)), places[-1] + 1]
    assert f1_by_counting(rewards, labels, chosen)[0] == pytest.approx(
        max(f1_by_counting(rewards, labels, threshold)[0] for threshold in every)
    )
    assert chosen not in places  # between two rewards, so that rounding changes no prediction
    for threshold in (chosen, 0.0, -0.25):
        found = f1_of_first_errors(rewards, labels, threshold)
        f1, wrong, right = f1_by_counting(rewards, labels, threshold)
        assert (found.f1.mean, found.wrong.mean, found.right.mean) == pytest.approx((f1, wrong, right))
        assert found.f1.low <= found.f1.mean <= found.f1.high
        assert found.counts == (sum(label >= 0 for label in labels), sum(label < 0 for label in labels))


def test_a_separable_case_has_an_f1_of_one_and_a_threshold_between():
    rewards, labels = [[1.0, -2.0, -3.0], [0.5, 0.7], [-2.5]], [1, -1, 0]
    assert -2.0 < best_threshold(rewards, labels) < 0.5
    assert f1_of_first_errors(rewards, labels, best_threshold(rewards, labels)).f1.mean == 1
    assert [first_below(row, -1.0) for row in rewards] == labels


def test_process_bench_rows_are_read():
    rows = [{"id": "gsm8k-0", "generator": "g", "problem": "p", "steps": ["a", "b"], "final_answer_correct": label < 0,
             "label": label} for label in (-1, 1)]  # fmt: skip
    read = to_reward_dataset(Dataset.from_list(rows), DataOptions(min_completions=1))
    assert read["rewards"][:] == [[1.0], [0.0]]
    assert read[0]["completions"] == [[{"role": "assistant", "content": "a\n\nb"}]]
    assert (read["steps"][:], read["label"][:]) == ([["a", "b"]] * 2, [-1, 1])


# The command


@pytest.fixture(scope="module")
def adapter_dir(model_dir, tmp_path_factory) -> str:
    return save_adapter(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path_factory.mktemp("adapter"), 1)


def solutions(n, k, seed):
    """Rows with steps by newline, which stand in a column as well, an answer, and a first wrong step."""
    rows = []
    for i, row in enumerate(labelled_rows(n, k, seed)):
        texts = [completion[0]["content"].split() for completion in row["completions"]]
        steps = [[" ".join(words[:2]), " ".join([*words[2:], "end"])] for words in texts]
        rows.append({
            "prompt": row["prompt"], "rewards": [float(y > 0) for y in row["rewards"]], "steps": steps,
            "completions": [[{"role": "assistant", "content": "\n".join(own)}] for own in steps],
            "answer": [f"{(i + j) % 2}" if j < 3 else None for j in range(len(steps))],
            "first_error": [-1 if y > 0 else j % 2 for j, y in enumerate(row["rewards"])],
        })  # fmt: skip
    return rows


def last_answer(text: str) -> str | None:
    return text.split()[-2] if len(text) > 30 else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, seed in (("train", 1), ("test", 2)):
        rows = solutions(4, [4, 1, 2], seed)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(folder, adapter_dir, *flags) -> int:
    return main(
        ["--implicit", "--dataset_name", str(folder), "--model_name_or_path", adapter_dir, "--beta", "0.5", *flags]
    )


def test_the_command_gives_steps_votes_and_f1(folder, adapter_dir, tmp_path, capsys):
    tables = []
    for name, steps in (("newline", "newline"), ("column", "column:steps")):
        files = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.json"
        flags = ["--steps", steps, "--answers", "answer", "--first_error", "first_error", "--threshold_split", "train"]
        assert run(folder, adapter_dir, *flags, "--token_scores", str(files[0]), "--output", str(files[1])) == 0
        tables.append((capsys.readouterr().out, *(file.read_text() for file in files)))
    assert tables[0] == tables[1]  # the lines are the column's steps
    text, lines, found = tables[0][0], *map(json.loads, ("[" + ",".join(tables[0][1].splitlines()) + "]", tables[0][2]))
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    rewards = []
    for line in lines:
        sums = [
            sum(r for r, s in zip(line["token_rewards"], line["token_steps"], strict=True) if s == j) for j in (0, 1)
        ]
        assert line["step_rewards"] == pytest.approx(sums, abs=1e-6)
        assert sum(line["step_rewards"]) == pytest.approx(line["implicit_reward"], abs=1e-6)
        pieces = [
            "".join(t for t, s in zip(line["tokens"], line["token_steps"], strict=True) if s == j) for j in (0, 1)
        ]
        assert pieces[0].strip() == rows[line["row"]]["steps"][line["completion"]][0]
        rewards.append((line["row"], line["completion"], line["step_rewards"]))
    process = found["process"]
    assert process["steps"] == 2
    least = {(i, k): min(own) for i, k, own in rewards}
    expected = fmean(
        best_of_k([least[i, k] for k in range(len(row["rewards"]))], row["rewards"]) for i, row in enumerate(rows)
    )
    assert process["chosen"]["best of K, least step"]["value"] == pytest.approx(expected)
    labels = [label for row in rows for label in row["first_error"]]
    f1, wrong, right = f1_by_counting([own for *_, own in rewards], labels, process["threshold"])
    errors = process["first_errors"]
    assert [errors[name]["value"] for name in ("f1", "wrong", "right")] == pytest.approx([f1, wrong, right])
    assert re.search(rf"first wrong step, τ = {process['threshold']:.4g} chosen on .*, split train", text)
    assert set(process["chosen"]) == {
        "at random", "best of K, sum of steps", "best of K, least step", "majority", "vote by sum of steps",
        "vote by least step", "the best",
    }  # fmt: skip
    assert re.search(r"as labels: AUC \d+\.\d %, sign right", text)
    assert max(map(len, text[text.index("as labels") :].splitlines())) <= 80


def test_answers_of_a_function_and_a_threshold_that_is_given(folder, adapter_dir, capsys):
    flags = ["--answers", "test_process_rewards:last_answer", "--steps", "newline", "--first_error", "first_error"]
    assert run(folder, adapter_dir, *flags, "--threshold", "-0.5") == 0
    text = capsys.readouterr().out
    assert "τ = -0.5 as given" in text
    assert re.search(r"majority +0\.\d{3}", text)


def test_single_completions_have_no_table_of_what_is_compared_or_chosen(adapter_dir, tmp_path, capsys):
    rows = solutions(6, 1, 3)
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(tmp_path, adapter_dir, "--steps", "newline", "--first_error", "first_error", "--threshold", "0") == 0
    text = capsys.readouterr().out
    mean = fmean(row["rewards"][0] for row in rows)
    assert text.startswith(f"6 prompts with one completion each; β 0.5, mean reward {mean:.3f}\nas labels: AUC")
    assert "2.0 steps a completion\n\nfirst wrong step" in text
    assert "–" not in text
    assert "chosen" not in text


MISTAKES = {
    "no steps": (["--first_error", "first_error", "--threshold", "0"], "`first_error` needs `steps`"),
    "no τ": (["--first_error", "first_error", "--steps", "newline"], "`first_error` needs one of `threshold` and"),
    "τ alone": (["--threshold", "0"], "need `first_error`"),
    "blank": (["--steps", "column:"], "`steps` is 'column:'; it must be newline, a text, or column:NAME"),
    "no column": (["--steps", "column:stages"], "`steps` names the column 'stages', which doesn't exist; there are"),
    "no answers": (["--answers", "reply"], "`answers` names the column 'reply', which doesn't exist"),
    "no function": (["--answers", "test_process_rewards:nothing"], "has no function `nothing`"),
    "same data": (
        ["--first_error", "first_error", "--steps", "newline", "--threshold_split", "test"],
        ", on which τ is chosen, is also evaluated on; give other data",
    ),
    "step number": (
        ["--first_error", "many", "--steps", "newline", "--threshold", "0"],
        "row 1: `many` is 2; it must be a step from 0 to 1, or -1 for none",
    ),
    "too few": (["--answers", "few"], "row 0: `few` has 1 values for 4 completions; give one each"),
    "not there": (["--steps", "column:few"], "row 0: `few` has 1 values for 4 completions"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_a_model_is_read(name, folder, adapter_dir, tmp_path, capsys, monkeypatch):
    flags, message = MISTAKES[name]
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    for i, row in enumerate(rows):
        row["few"] = ["a"]
        row["many"] = [2 if i == 1 else -1 for _ in row["rewards"]]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("nca_align.commands.evaluate.implicit.token_logratios", None)
    assert run(tmp_path, adapter_dir, *flags) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_example_tells_wrong_steps_that_its_reference_and_frequency_do_not():
    f1 = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "process_rewards.py"))["main"]()
    assert f1["implicit reward"] > 0.95
    assert f1["implicit reward"] > f1["log π"]
    assert max(f1["log π_ref"], f1["frequency"]) < 0.65
