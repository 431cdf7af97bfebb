"""Flat scored rows, grouped by prompt."""

import random

import pytest
from datasets import Dataset

from nca_align.data import DataOptions, convert_dataset, to_reward_dataset
from nca_align.errors import UserError


def helpsteer(prompt, response, helpfulness, correctness=0):
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "correctness": correctness}


def said(text):
    return [{"role": "assistant", "content": text}]


def asked(text):
    return [{"role": "user", "content": text}]


def convert(rows, **options):
    return convert_dataset(Dataset.from_list(rows), DataOptions(**options))


def test_rows_of_a_prompt_are_grouped_wherever_they_lie():
    rows = [helpsteer(f"q{i % 300}", f"a{i}", i % 5, i) for i in range(1000)]
    shuffled = random.Random(0).sample(rows, len(rows))
    converted, report = convert(shuffled)
    assert (report.format, report.rows, report.kept) == ("flat scored rows", 300, 300)
    assert converted["prompt"][:3] == [asked(row["prompt"]) for row in shuffled[:3]]  # in the order of first rows
    seen = {
        (row["prompt"][0]["content"], completion[0]["content"], reward, correctness)
        for row in converted
        for completion, reward, correctness in zip(row["completions"], row["rewards"], row["correctness"], strict=True)
    }
    assert seen == {(r["prompt"], r["response"], float(r["helpfulness"]), r["correctness"]) for r in rows}


def test_columns_beside_completions_lose_what_these_lose():
    """`nca-align evaluate --answers` reads one value a completion."""
    scores = (1, None, 3)
    rows = [helpsteer("q", f"a{i}", score) | {"answer": f"{i}", "parts": [f"{i}"]} for i, score in enumerate(scores)]
    converted, report = convert(rows, on_invalid="drop")
    assert report.completions == {"missing score": 1}
    (row,) = converted
    assert row["completions"] == [said("a0"), said("a2")]
    assert (row["answer"], row["parts"], row["helpfulness"]) == (["0", "2"], [["0"], ["2"]], [1, 3])


@pytest.mark.parametrize("steps", [3, "1. Think", ["1. Think", "2. Answer"], None])
def test_a_column_of_steps_makes_no_other_format_of_them(steps):
    """`correctness` beside `steps` are labelled rollouts only where it has a label for each of several solutions."""
    rows = [helpsteer("q", f"a{i}", i, 4 - i) | {"steps": steps} for i in range(2)]
    others = [{}] if isinstance(steps, list) else [{}, {"problem": "q", "label": True}]  # ProcessBench has these two
    for more in others:
        converted, report = convert([row | more for row in rows], score="helpfulness")
        assert report.format == "flat scored rows"
        assert converted[0]["rewards"] == [0.0, 1.0]


def test_grades_by_completion_are_no_labels():
    row = {"prompt": "q", "completions": ["a", "b"], "correctness": [4, 1], "verbosity": [2, 3]}
    with pytest.raises(ValueError, match=r"a number for each \(correctness, verbosity\)\. Take one by `score`"):
        convert([row])
    assert convert([row], score="correctness")[0][0]["rewards"] == [4.0, 1.0]
    assert convert([row | {"correctness": [1, 0]}])[1].format == "labelled rollouts"


def test_helpsteer_turns_become_messages():
    prompt = "Hi\nthere\n<extra_id_1>Assistant\nHello\n<extra_id_1>User\nWhy?"
    converted, _ = convert([helpsteer(prompt, "a", 4), helpsteer(prompt, "b", 1)])
    assert converted[0]["prompt"] == asked("Hi\nthere") + said("Hello") + asked("Why?")
    assert converted[0]["completions"] == [said("a"), said("b")]


@pytest.mark.parametrize("texts", [("True", "False"), ("true", "false"), ("TRUE", " FALSE ")])
def test_truth_values_of_a_csv_are_labels_and_no_objectives(texts):
    rows = [
        {"prompt": "q", "completion": f"a{i}", "label": own, "help": str(i), "checked": own}
        for i, own in enumerate(texts)
    ]
    assert convert(rows, labels=True)[0][0]["rewards"] == [1.0, 0.0]
    assert convert(rows, reward_weights=[2.0])[0][0]["rewards"] == [0.0, 2.0]


def test_the_score_column_is_chosen_or_known():
    rows = [helpsteer("q", "a", 4, 1), helpsteer("q", "b", 1, 2)]
    assert convert(rows)[0][0]["rewards"] == [4.0, 1.0]
    assert convert(rows, score="correctness")[0][0]["rewards"] == [1.0, 2.0]
    with pytest.raises(ValueError, match=r"`score` is 'kindness', .* choose among correctness, helpfulness"):
        convert(rows, score="kindness")
    own_name = [{"prompt": "q", "response": r, "stars": s} for r, s in (("a", "3"), ("b", "4.5"))]
    assert convert(own_name, score="stars")[0][0]["rewards"] == [3.0, 4.5]
    with pytest.raises(
        ValueError, match=r"`train` has the columns prompt, response, stars, which is not a known format"
    ):
        convert(own_name)


def test_a_completion_continues_text_and_answers_messages():
    rows = [{"prompt": "The sky is", "completion": c, "reward": r} for c, r in ((" blue", 1.0), (" red", 0.0))]
    assert convert(rows)[0][0] == {"prompt": "The sky is", "completions": [" blue", " red"], "rewards": [1.0, 0.0],
                                   "reward": [1.0, 0.0]}  # fmt: skip
    chat = [{"prompt": asked("q"), "completion": said(c), "reward": r} for c, r in (("a", 1.0), ("b", 0.0))]
    converted = convert(chat)[0][0]
    assert (converted["prompt"], converted["completions"]) == (asked("q"), [said("a"), said("b")])


def test_other_tools_are_another_prompt():
    rows = [helpsteer("q", a, 1) | {"tools": t} for a, t in (("a", "[1]"), ("b", "[2]"), ("c", "[1]"), ("d", "[2]"))]
    converted, _ = convert(rows)
    assert converted["tools"][:] == [[1], [2]]
    assert [[c[0]["content"] for c in row["completions"]] for row in converted] == [["a", "c"], ["b", "d"]]


def test_errors_name_the_source_row_and_dropping_spares_the_prompt():
    rows = [helpsteer("q", "a", 4), helpsteer("p", "x", 3), helpsteer("q", "b", None), helpsteer("q", " ", 2),
            helpsteer("q", "c", 1)]  # fmt: skip
    with pytest.raises(ValueError, match=r"`train`, row 2: `helpfulness` is null, a missing score.*\(1 more rows"):
        convert(rows)
    converted, report = convert(rows, on_invalid="drop")
    assert [(row["prompt"], row["rewards"]) for row in converted] == [(asked("q"), [4.0, 1.0])]
    assert report.dropped == {"fewer than two completions": 1}
    assert report.completions == {"missing score": 1, "empty completion": 1}
    with pytest.raises(ValueError, match=r"row 1: `completions` has 1; there must be at least two"):
        convert([rows[0], rows[1], rows[4]])


def test_a_source_is_excluded_for_the_whole_prompt():
    rows = [helpsteer(q, a, 1) | {"source": q} for q in ("good", "bad") for a in "ab"]
    converted, report = convert(rows, exclude_sources=["bad"])
    assert (converted["source"][:], report.dropped) == ([["good", "good"]], {"source bad": 1})


def test_a_stream_of_flat_rows_is_refused():
    stream = Dataset.from_list([helpsteer("q", "a", 4), helpsteer("q", "b", 1)]).to_iterable_dataset()
    with pytest.raises(
        NotImplementedError,
        match=r"`train` is a stream of flat scored rows.*load it without streaming, or give `min_com",
    ):
        to_reward_dataset(stream)
    logged = {"step": 1, "prompt": "q", "completion": "a", "advantage": 0.0, "own": 1.0}
    with pytest.raises(
        NotImplementedError, match=r"what a step logged again needs all of them; load it without streaming$"
    ):
        to_reward_dataset(Dataset.from_list([logged]).to_iterable_dataset(), DataOptions(min_completions=1))


def test_a_stream_of_flat_rows_for_labels_is_a_row_a_completion(caplog):
    rows = [helpsteer(f"q{i}", f"a{i}", i % 2) | {"source": "web", "tools": f'[{{"n": {i}}}]'} for i in range(5)]
    whole = to_reward_dataset(Dataset.from_list(rows), DataOptions(min_completions=1))
    stream = Dataset.from_list(rows).to_iterable_dataset()
    read = list(to_reward_dataset(stream, DataOptions(min_completions=1)))
    assert read == whole.to_list()
    assert [len(row["completions"]) for row in read] == [1] * 5
    assert "each is a row of one completion, and those of a prompt aren't put together" in caplog.text
    rows[3]["helpfulness"] = None
    stream = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(UserError, match="`train`, row 3: `helpfulness` is null, a missing score"):
        list(to_reward_dataset(stream, DataOptions(min_completions=1)))
    kept = list(to_reward_dataset(stream, DataOptions(min_completions=1, on_invalid="drop")))
    assert kept == [row for i, row in enumerate(read) if i != 3]
