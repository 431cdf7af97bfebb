"""Held-out prompts and names of splits."""

import json

import pytest
from datasets import Dataset, DatasetDict

from nca_align.data import held_out_split, load_reward_dataset, select_split, split_validation


def dataset(prompts):
    return Dataset.from_list([{"prompt": prompt, "id": i} for i, prompt in enumerate(prompts)])


def test_the_share_is_exact_disjoint_and_complete():
    rows = dataset([f"q{i}" for i in range(1000)])
    for fraction, count in ((0.05, 50), (0.1, 100), (0.999, 999)):
        train, validation, indices = split_validation(rows, fraction)
        assert (len(train), len(validation), len(indices)) == (1000 - count, count, count)
        assert validation["id"][:] == indices
        assert sorted(train["id"][:] + indices) == list(range(1000))


def test_equal_prompts_stay_together():
    rows = dataset([[{"role": "user", "content": f"q{i % 40}"}] for i in range(200)])
    train, validation, _ = split_validation(rows, 0.25)
    held_out = {prompt[0]["content"] for prompt in validation["prompt"]}
    assert len(held_out) == 10
    assert held_out.isdisjoint(prompt[0]["content"] for prompt in train["prompt"])
    assert len(validation) == 50


def test_the_same_prompts_whatever_the_order_and_others_for_another_seed():
    prompts = [f"q{i}" for i in range(100)]
    held_out = set(split_validation(dataset(prompts), 0.2)[1]["prompt"])
    assert set(split_validation(dataset(prompts[::-1]), 0.2)[1]["prompt"]) == held_out
    assert set(split_validation(dataset(prompts), 0.2, seed=1)[1]["prompt"]) != held_out
    # pinned: what a run held out can be found again on any machine and with any later version
    assert split_validation(dataset(prompts), 0.03)[2] == PINNED


PINNED = [57, 60, 86]


def test_too_few_prompts_hold_out_none():
    rows = dataset(["a", "b", "c"])
    assert split_validation(rows, 0.3) == (rows, None, [])
    assert split_validation(rows, 0) == (rows, None, [])
    assert len(split_validation(rows, 0.34)[1]) == 1
    for fraction in (-0.1, 1):
        with pytest.raises(ValueError, match=rf"`fraction` is {fraction}; it must be at least 0 and less than 1"):
            split_validation(rows, fraction)


def test_what_is_held_out_in_python_is_told(tmp_path, caplog):
    rows = [{"prompt": f"p{i}", "completions": ["a", "b"], "rewards": [1.0, 0.0]} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = load_reward_dataset(str(tmp_path / "rows.jsonl"))
    assert {name: len(split) for name, split in splits.items()} == {"train": 23, "validation": 1}
    assert "1 of its rows are held out as `validation`. `validation_fraction=0` keeps all" in caplog.text
    caplog.clear()
    assert len(load_reward_dataset(str(tmp_path / "rows.jsonl"), validation_fraction=0)["train"]) == 24
    assert "held out" not in caplog.text


def test_splits_are_found_by_name_or_purpose():
    names = {"train_prefs": 1, "test_prefs": 2}
    assert select_split(names, "train_prefs") == select_split(names, "train") == 1
    assert select_split(names, "test") == select_split(names, "validation") == 2
    rows = dataset(["a"])
    assert select_split(DatasetDict({"train": rows}), "train") is rows
    with pytest.raises(ValueError, match=r"the split `test` is not in the data set, which has train; name one"):
        select_split({"train": 1}, "test")
    with pytest.raises(ValueError, match=r"the split `eval` .* has validation, test"):
        select_split({"validation": 1, "test": 2}, "eval")


@pytest.mark.parametrize(
    ("names", "found"),
    [(["train"], "train"), (["train", "test_prefs"], "test_prefs"), (["train", "validation", "test"], "test")],
)
def test_what_is_evaluated_is_held_out_or_all_that_there_is(names, found):
    assert held_out_split(names) == found


@pytest.mark.parametrize(
    ("names", "which"),
    [(["train", "more"], "none is known to be held out"), (["dev", "validation"], "dev and validation are held out")],
)
def test_where_no_one_split_is_held_out_it_must_be_chosen(names, which):
    with pytest.raises(ValueError, match=f"has the splits {', '.join(names)}, of which {which}; choose one by `split`"):
        held_out_split(names)
