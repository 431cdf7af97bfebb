"""Every refusal of a row, and dropping with counts instead."""

import logging

import pytest
from datasets import Dataset, IterableDataset

from conftest import reward_rows
from nca_align.data import DataOptions, RowError, check_row, convert_dataset, to_reward_dataset

USER = {"role": "user", "content": "q"}
GOOD = {"prompt": "q", "completions": ["a", "b"], "rewards": [1.0, 0.0]}
CHAT = {
    "prompt": [USER],
    "completions": [[{"role": "assistant", "content": text}] for text in "ab"],
    "rewards": [1.0, 0.0],
}


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (GOOD, {"rewards": [1.0, float("nan")]}, r"`rewards\[1\]` is nan; it must be a finite number"),
        (GOOD, {"rewards": [float("-inf"), 0.0]}, r"`rewards\[0\]` is -inf; it must be a finite number"),
        (GOOD, {"rewards": [1.0, None]}, r"`rewards\[1\]` is null, a missing score; every completion needs a number"),
        (GOOD, {"rewards": ["N/A", "1"]}, r"`rewards\[0\]` is 'N/A', a missing score"),
        (GOOD, {"rewards": ["high", "1"]}, r"`rewards\[0\]` is 'high'; it must be a number"),
        (GOOD, {"rewards": ["nan", "1"]}, r"`rewards\[0\]` is nan; it must be a finite number"),
        (GOOD, {"rewards": [[1.0], [0.0]]}, r"`rewards\[0\]` is \[1.0\] \(list\); it must be a number"),
        (GOOD, {"rewards": 1.0}, r"`rewards` is 1.0 \(float\); it must be a list"),
        (GOOD, {"rewards": None}, r"`rewards` is null; it must be a list"),
        (GOOD, {"rewards": "[1, 0"}, r"`rewards` is not readable JSON list"),
        (GOOD, {"rewards": [1.0]}, r"`rewards` has 1 values for 2 completions; give one each"),
        (GOOD, {"completions": "a"}, r"`completions` is 'a' \(str\); it must be a list"),
        (GOOD, {"completions": ["a"], "rewards": [1.0]}, r"`completions` has 1; there must be at least two to compare"),
        (GOOD, {"completions": [], "rewards": []}, r"`completions` has 0; there must be at least two"),
        (GOOD, {"completions": ["a", ""]}, r"`completions\[1\]` is '', an empty completion; it must have content"),
        (GOOD, {"completions": ["a", " \n"]}, r"`completions\[1\]` is ' \\n', an empty completion"),
        (GOOD, {"completions": ["a", None]}, r"`completions\[1\]` is null, an empty completion; it must"),
        (GOOD, {"completions": [1, 2]}, r"`completions\[0\]` is 1 \(int\); it must be text"),
        (
            GOOD,
            {"completions": CHAT["completions"]},
            r"`completions\[0\]` is a list of messages, but the prompt is text",
        ),
        (GOOD, {"prompt": " "}, r"`prompt` is ' '; it must not be empty"),
        (GOOD, {"prompt": None}, r"`prompt` is null; it must be text or a list of messages"),
        (GOOD, {"prompt": 3}, r"`prompt` is 3 \(int\); it must be text or a list of messages"),
        (CHAT, {"prompt": []}, r"`prompt` is \[\]; it must not be empty"),
        (CHAT, {"completions": ["a", "b"]}, r"`completions\[0\]` is text, but the prompt is a list of messages"),
        (CHAT, {"completions": [CHAT["completions"][0], []]}, r"`completions\[1\]` is \[\], an empty completion"),
        (CHAT, {"prompt": [{"role": "user", "content": None}]}, r"`prompt\[0\].content` is null; it must be text"),
        (CHAT, {"prompt": [{"content": "q"}]}, r"`prompt\[0\]` is .* \(dict\); it must be a message {role, content}"),
        (
            CHAT,
            {"prompt": [{"role": "user", "content": [{"type": "x"}]}]},
            r"`prompt\[0\].content` holds a part of .*'x'",
        ),
        (
            CHAT,
            {"completions": [CHAT["completions"][0], [{"role": "assistant", "content": " "}]]},
            r"`completions\[1\]\[0\].content` is ' ', an empty completion",
        ),
    ],
)
def test_one_error_names_row_and_field_and_drop_counts_it(base, change, message):
    # The types of a column are those of all its rows: a good row stands beside only where it has the same.
    try:
        dataset, bad = Dataset.from_list([base, base, base | change]), 2
    except Exception:
        dataset, bad = Dataset.from_list([base | change]), 0
    with pytest.raises(
        ValueError,
        match=rf"^`train`, row {bad}: {message}.*; mend the row, or .* `--on_invalid drop` \(in YAML `.*: drop`\)$",
    ):
        to_reward_dataset(dataset)
    with pytest.raises(ValueError, match=rf"^`train`, row {bad}: {message}"):
        list(to_reward_dataset(dataset.to_iterable_dataset()))
    if bad:
        kept, report = convert_dataset(dataset, DataOptions(on_invalid="drop"))
        assert (len(kept), report.rows, sum(report.dropped.values())) == (2, 3, 1)
    else:
        with pytest.raises(ValueError, match=r"0 of 1 prompts kept; dropped: 1 .*at least one must be left \(row 0: "):
            to_reward_dataset(dataset, DataOptions(on_invalid="drop"))


def test_check_row_takes_what_is_sound_and_tells_field_and_cause():
    check_row(**GOOD)
    check_row(**CHAT)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    check_row([USER], [[call, {"role": "tool", "content": ""}, *CHAT["completions"][0]], [call]], [0, True])
    with pytest.raises(RowError) as caught:
        check_row("q", ["a", "b"], [0.0, float("nan")])
    assert (caught.value.field, caught.value.cause) == ("rewards[1]", "reward not finite")
    with pytest.raises(RowError, match=r"`completions` is \('a', 'b'\) \(tuple\); it must be a list"):
        check_row("q", ("a", "b"), [0.0, 1.0])


def test_dropping_reports_counts_by_cause_in_one_line(caplog):
    rows = reward_rows(5)
    rows[1]["rewards"][0] = float("nan")
    rows[2]["rewards"][1] = float("inf")
    rows[4]["rewards"].pop()
    with caplog.at_level(logging.WARNING, "nca_align"):
        kept = to_reward_dataset(Dataset.from_list(rows), DataOptions(on_invalid="drop"), name="test")
    assert kept.to_list() == [rows[0], rows[3]]
    assert [record.getMessage() for record in caplog.records] == [
        "`test` (own): 2 of 5 prompts kept; dropped: 2 reward not finite, 1 unequal lengths"
    ]
    with pytest.raises(ValueError, match=r"`test`, row 1: `rewards\[0\]` is nan; .* \(2 more rows are invalid\)"):
        to_reward_dataset(Dataset.from_list(rows), name="test")


def test_a_stream_drops_with_counts(caplog):
    rows = reward_rows(300)
    rows[1]["rewards"][0] = rows[299]["rewards"][0] = float("nan")
    stream = to_reward_dataset(Dataset.from_list(rows).to_iterable_dataset(), DataOptions(on_invalid="drop"))
    with caplog.at_level(logging.WARNING, "nca_align"):
        assert list(stream) == rows[:1] + rows[2:299]
    assert [record.getMessage() for record in caplog.records] == [
        "`train, rows 0 to 255` (own): 255 of 256 prompts kept; dropped: 1 reward not finite",
        "`train, rows 256 to 299` (own): 43 of 44 prompts kept; dropped: 1 reward not finite",
    ]


def test_text_and_messages_can_not_be_mixed():
    def mixed():
        yield GOOD
        yield CHAT

    with pytest.raises(ValueError, match=r"row 1: `prompt` is messages, but rows before it are text; use one"):
        list(to_reward_dataset(IterableDataset.from_generator(mixed)))


def test_unknown_formats_are_told_with_what_was_found_and_what_is_known():
    with pytest.raises(ValueError) as caught:
        to_reward_dataset(Dataset.from_list([{"completions": ["a", "b"], "rewards": [1, 2], "id": 1}]), name="test")
    message = str(caught.value)
    assert message.startswith(
        "`test` has the columns completions, id, rewards, which is not a known format, only `prompt`"
    )
    for columns in ("prompt, completions, rewards (own)", "instruction, completions", "score_A0", "trajectory"):
        assert columns in message
    with pytest.raises(ValueError, match=r"the columns text, which is not a known format; known are"):
        to_reward_dataset(Dataset.from_list([{"text": "q"}]))


def test_empty_data_and_other_objects_are_refused():
    with pytest.raises(ValueError, match=r"`train` is empty; it must have at least one row"):
        to_reward_dataset(Dataset.from_dict({"prompt": [], "completions": [], "rewards": []}))
    with pytest.raises(TypeError, match=r"`dataset` is a list; it must be one split"):
        to_reward_dataset([GOOD])


def test_a_format_set_on_the_data_set_is_set_aside():
    rows = reward_rows(2)
    assert to_reward_dataset(Dataset.from_list(rows).with_format("numpy")).to_list() == rows


class TestTemplateInputs:
    """What training would refuse once it renders the rows is found where they are read, and can be dropped."""

    @pytest.mark.parametrize(
        ("changed", "cause"),
        [
            ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "reserved argument"),
            ({"prompt": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}, "can't be continued"),
            ({"completions": [[{"role": "tool", "content": "1"}]] * 2}, "doesn't continue the prompt's"),
        ],
    )
    def test_they_are_counted_by_cause(self, changed, cause):
        row = {
            "prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The quick"}],
            "completions": [[{"role": "assistant", "content": text}] for text in (" brown", " fox")],
            "rewards": [1.0, 0.0], "chat_template_kwargs": None,
        }  # fmt: skip
        rows = Dataset.from_list([row, row | changed], on_mixed_types="use_json")
        dataset, report = convert_dataset(rows, DataOptions(on_invalid="drop"))
        assert (len(dataset), sum(report.dropped.values())) == (1, 1)
        assert cause in next(iter(report.dropped))
