"""Preference pairs: TRL's forms, scores beside them, and UltraInteract's trajectories."""

import pytest
from datasets import Dataset

from conftest import SOURCES, pair_rows
from nca_align.data import DataOptions, convert_dataset, to_reward_dataset

SYSTEM = {"role": "system", "content": "Be brief."}


def convert(row, **options):
    rows = row if isinstance(row, list) else [row]
    return to_reward_dataset(Dataset.from_list(rows), DataOptions(**options))[0]


def said(text):
    return [{"role": "assistant", "content": text}]


def asked(text):
    return [{"role": "user", "content": text}]


def triple(row):
    return row["prompt"], row["completions"], row["rewards"]


@pytest.mark.parametrize("preference", ["scores", "hard"])
def test_trl_rows_are_chosen_then_rejected_with_rewards_1_and_0(preference):
    expected = (asked("q"), [said("good"), said("bad")], [1.0, 0.0])
    for row in (
        {"prompt": asked("q"), "chosen": said("good"), "rejected": said("bad")},
        {"prompt": "q", "chosen": said("good"), "rejected": said("bad")},
        {"chosen": asked("q") + said("good"), "rejected": asked("q") + said("bad")},
        {"prompt": None, "chosen": asked("q") + said("good"), "rejected": asked("q") + said("bad")},
        {"prompt": asked("q"), "chosen": asked("q") + said("good"), "rejected": asked("q") + said("bad")},
    ):
        assert triple(convert(row, preference=preference)) == expected
    text = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    assert triple(convert(text, preference=preference)) == ("The sky is", [" blue.", " green."], [1.0, 0.0])


def test_an_implicit_prompt_of_text_is_extracted_as_trl_does():
    from trl.data_utils import extract_prompt

    row = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    assert triple(convert(row)) == ("The sky is", [" blue.", " green."], [1.0, 0.0])
    assert extract_prompt(row) == {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}


def test_hard_preferences_ignore_scores_and_scores_are_used_by_default():
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": "7.5", "score_rejected": 8}
    row["score_chosen"], row["score_rejected"] = 7.5, 8.0
    assert convert(row, preference="hard")["rewards"] == [1.0, 0.0]
    assert convert(row)["rewards"] == [7.5, 8.0]
    assert convert({**row, "score_chosen": "7.5"})["rewards"] == [7.5, 8.0]
    with pytest.raises(ValueError, match=r"row 1: `score_rejected` is null, a missing score"):
        convert([row, row | {"score_rejected": None}])


@pytest.mark.parametrize("source", SOURCES)
def test_binarized_rows_keep_their_scores_and_ties(source):
    rows = pair_rows(source)
    converted, report = convert_dataset(Dataset.from_list(rows))
    assert (report.format, report.kept) == ("pairs", {"own": 128, "real": 300}[source])
    for row, given in zip(converted, rows, strict=True):
        assert row["prompt"] == given["chosen"][:-1]
        assert row["completions"] == [given["chosen"][-1:], given["rejected"][-1:]]
        assert row["rewards"] == [given["score_chosen"], given["score_rejected"]]
    assert sum(a == b for a, b in converted["rewards"]) == {"own": 3, "real": 34}[source]
    hard = to_reward_dataset(Dataset.from_list(rows), DataOptions(preference="hard"))
    assert hard["rewards"][:] == [[1.0, 0.0]] * len(rows)


def test_binarized_conversations_keep_system_prompts_and_turns_and_drop_messages():
    turns = [SYSTEM, *asked("Hi"), *said("Hello"), *asked("Why?")]
    row = {
        "prompt": "Hi",
        "chosen": turns + said("a"),
        "rejected": turns + said("b"),
        "messages": turns,
        "prompt_id": "x",
    }
    assert convert(row) == {
        "prompt": turns, "completions": [said("a"), said("b")], "rewards": [1.0, 0.0], "prompt_id": "x"
    }  # fmt: skip


def test_completions_of_several_messages_split_where_they_part():
    call = [{"role": "assistant", "content": "let me look"}, {"role": "tool", "content": ""}]
    row = {"chosen": asked("q") + call + said("a"), "rejected": asked("q") + said("b")}
    assert triple(convert(row)) == (asked("q"), [call + said("a"), said("b")], [1.0, 0.0])


def test_json_in_text_cells_is_read_and_keeps_message_fields():
    row = {"prompt": "q", "chosen": '[{"role": "assistant", "content": "a", "name": "x"}]', "rejected": "b"}
    with pytest.raises(ValueError, match=r"row 0: `rejected` is of another kind than `chosen`"):
        convert(row)
    row["rejected"] = '[{"role": "assistant", "content": "b"}]'
    assert convert(row)["completions"] == [[said("a")[0] | {"name": "x"}], said("b")]
    odd = {"prompt": "[INST] q", "chosen": "[1, 2]", "rejected": "[x"}
    assert triple(convert(odd)) == ("[INST] q", ["[1, 2]", "[x"], [1.0, 0.0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "", "rejected": "b"}, r"`chosen` is '', an empty completion"),
        ({"prompt": "q", "chosen": said("a"), "rejected": []}, r"`rejected` is \[\], an empty completion"),
        ({"prompt": "q", "chosen": "a", "rejected": "\n"}, r"`completions\[1\]` is '\\n', an empty completion"),
        ({"chosen": "xa", "rejected": "yb"}, r"`chosen` has no beginning in common with `rejected`; give a `prompt`"),
        ({"chosen": said("a"), "rejected": said("a")}, r"`chosen` has no beginning in common"),
        ({"prompt": "q", "chosen": 1, "rejected": 2}, r"`chosen` is 1 \(int\); it must be text or a list of messages"),
        ({"prompt": "q", "chosen": None, "rejected": "b"}, r"`chosen` is null; it must be text or a list of messages"),
    ],
)
def test_pair_errors_name_row_and_field(row, message):
    with pytest.raises(ValueError, match="`train`, row 0: " + message):
        convert(row)


def test_ultrainteract_trajectories_become_turns():
    row = {
        "task": "Math_CoT", "dataset": "gsm8k", "id": "1", "parent_id": "0", "chosen": "right", "rejected": "wrong",
        "trajectory": [
            {"from": "user", "value": "2 + 2?"}, {"from": "assistant", "value": "5"}, {"from": "user", "value": "No."}
        ],
    }  # fmt: skip
    for preference in ("scores", "hard"):
        assert convert(row, preference=preference) == {
            "task": "Math_CoT", "dataset": "gsm8k", "id": "1", "parent_id": "0",
            "prompt": asked("2 + 2?") + said("5") + asked("No."),
            "completions": [said("right"), said("wrong")], "rewards": [1.0, 0.0],
        }  # fmt: skip
    human = {
        "trajectory": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}],
        "chosen": "a",
        "rejected": "b",
    }
    assert convert(human)["prompt"] == asked("x") + said("y")
    robot = convert(row | {"trajectory": [row["trajectory"][0], {"from": "robot", "value": "x"}]})
    assert robot["prompt"][-1] == {"role": "robot", "content": "x"}  # which only a template that names it renders
    with pytest.raises(ValueError, match=r"row 0: `prompt\[0\].content` is null; it must be text"):
        convert(row | {"trajectory": [{"from": "user", "value": None}]})
