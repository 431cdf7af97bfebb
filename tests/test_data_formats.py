"""Formats that score each of a row's completions: ours, raw UltraFeedback, ranked answers, generated responses."""

import json
import logging

import pytest
from datasets import Dataset, IterableDataset, Json, List, Value

from conftest import SOURCES, reward_rows, scored_rows
from nca_align.data import DataOptions, convert_dataset, to_reward_dataset
from nca_align.data.formats import FORMATS
from nca_align.data.prompts import load_prompts

FIELDS = ("prompt", "completions", "rewards")


def convert(rows, **options):
    return convert_dataset(Dataset.from_list(rows), DataOptions(**options))


def said(text):
    return [{"role": "assistant", "content": text}]


def asked(text):
    return [{"role": "user", "content": text}]


def ultrafeedback(*completions, **columns):
    return {"source": "evol", "instruction": "Why?", "models": [c["model"] for c in completions]} | columns | {
        "completions": list(completions)
    }  # fmt: skip


def scored(model, overall, ratings=None, **fields):
    annotations = None
    if ratings is not None:
        aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
        annotations = {a: {"Rating": r, "Rationale": "…"} for a, r in zip(aspects, ratings, strict=True)}
    return {"model": model, "response": f"by {model}", "overall_score": overall, "annotations": annotations} | fields


def ranked(*scores, prompt="Why?"):
    row = {}
    for k, score in enumerate(scores):
        row[f"A{k}"] = [*asked(prompt), *said("N/A" if score == "N/A" else f"answer {k}")]
        row[f"score_A{k}"] = None if score == "N/A" else score
    return row


EXAMPLES = {
    "own": reward_rows(3, [2, 3, 4]),
    "raw UltraFeedback": [ultrafeedback(scored("a", 7.0), scored("b", 3.5))] * 2,
    "ranked answers": [ranked(1.0, 2.0, 0.5, 3.0), ranked(4.0, 1.0, "N/A", "N/A")],
    "generated responses": [{"prompt": "Why?", "all_generated_responses": ["a", "b"], "all_rm_scores": [0.1, 0.2]}],
    "labelled rollouts": [{"prompt": "Why?", "completions": ["a", "b"], "correctness": [True, False]}],
    "ProcessBench": [{"problem": "Why?", "steps": ["a", "b"], "label": label} for label in (-1, 1)],
    "pairs": [{"prompt": "Why?", "chosen": "a", "rejected": "b"}],
    "trajectory pairs": [{"trajectory": [{"from": "user", "value": "Why?"}], "chosen": "a", "rejected": "b"}],
    "flat scored rows": [{"prompt": "Why?", "response": r, "score": s} for r, s in (("a", 1), ("b", 2))],
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_format_is_recognised_and_its_result_comes_back_as_it_is(name):
    once, report = convert(EXAMPLES[name], min_completions=1)
    assert (report.format, report.kept, report.dropped) == (name, len(once), {})
    assert once.features["rewards"] == List(Value("float64"))
    twice, report = convert_dataset(once, DataOptions(preference="hard", min_completions=1))
    assert report.format == "own"
    assert twice is once


@pytest.mark.parametrize("name", FORMATS)
def test_the_prompts_of_every_format_come_without_its_answers(name, tmp_path):
    rows = [row | {"id": i} for i, row in enumerate(EXAMPLES[name])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_prompts(str(tmp_path / "rows.jsonl"), None, "train")
    assert set(found.column_names) == {
        "prompt",
        "id",
        *({"models", "source", "score", "steps", "label"} & set(rows[0])),
    }


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name != "flat scored rows"])
def test_a_stream_gives_the_rows_that_the_data_set_gives(name):
    dataset = Dataset.from_list(EXAMPLES[name])
    options = DataOptions(min_completions=1)
    stream = to_reward_dataset(dataset.to_iterable_dataset(), options)
    assert isinstance(stream, IterableDataset)
    assert list(stream) == to_reward_dataset(dataset, options).to_list()


def test_an_endless_stream_without_known_types_is_read_lazily():
    def endless():
        while True:
            yield from reward_rows(2)

    stream = to_reward_dataset(IterableDataset.from_generator(endless))
    assert list(stream.take(3)) == [*reward_rows(2), reward_rows(2)[0]]


def test_own_columns_tools_and_template_arguments_are_kept():
    row = reward_rows(1)[0]
    extra = {"id": 7, "tools": [{"type": "function"}], "chat_template_kwargs": {"enable_thinking": False}}
    converted, _ = convert([row | extra])
    assert converted[0] == row | extra


def test_tools_and_template_arguments_that_are_json_text_are_read():
    row = reward_rows(1)[0]
    texts = {"tools": '[{"type": "function"}]', "chat_template_kwargs": '{"enable_thinking": false}'}
    converted, _ = convert([row | texts, row | {"tools": "", "chat_template_kwargs": None}])
    assert converted.features["tools"] == Json()
    assert converted[0]["tools"] == [{"type": "function"}]
    assert converted[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert converted[1]["tools"] is None
    with pytest.raises(ValueError, match=r"row 0: `tools` is not readable JSON"):
        convert([row | {"tools": "[", "chat_template_kwargs": "{}"}])
    with pytest.raises(ValueError, match=r"`chat_template_kwargs` is \[1\]; it must map names"):
        convert([row | {"chat_template_kwargs": "[1]"}])


def test_numbers_as_text_whole_numbers_and_ties_become_floats():
    for rewards in (["1", "2.5", "2.5"], [" 1e0", "+2.5", "2.50"]):
        converted, _ = convert([{"prompt": "p", "completions": ["a", "b", "c"], "rewards": rewards}])
        assert converted[0]["rewards"] == [1.0, 2.5, 2.5]
    converted, _ = convert([{"prompt": "p", "completions": ["a", "b"], "rewards": [1, 1]}])
    assert converted[0]["rewards"] == [1.0, 1.0]
    assert converted.features["rewards"] == List(Value("float64"))


def test_message_fields_survive():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]}
    plain = said("no")[0] | {"tool_calls": None}
    row = {"prompt": [*asked("p")], "completions": [[call], [plain]], "rewards": [1.0, 0.0]}
    assert to_reward_dataset(Dataset.from_list([row]))[0] == row
    text = row | {"completions": json.dumps([[call], said("no")]), "rewards": "[1, 0]"}
    assert to_reward_dataset(Dataset.from_list([text]))[0] == row | {"completions": [[call], said("no")]}


@pytest.mark.parametrize("source", SOURCES)
def test_ultrafeedback_layout(source):
    rows = scored_rows(source)
    converted, report = convert(rows)
    assert len(rows) >= 60
    assert (report.rows, report.kept, report.dropped, report.completions) == (len(rows), len(rows), {}, {})
    for row, given in zip(converted, rows, strict=True):
        assert row["prompt"] == asked(given["instruction"])
        assert row["completions"] == [said(c["response"]) for c in given["completions"]]
        assert row["rewards"] == [c["overall_score"] for c in given["completions"]]
        assert (row["source"], row["models"]) == (given["source"], given["models"])
    assert set(converted.column_names) == {*FIELDS, "source", "models"}


def test_ultrafeedback_scores_can_be_chosen():
    row = ultrafeedback(
        scored("a", 7.0, ["5", "N/A", "3", "4"], **{"fine-grained_score": 4.1}),
        scored("b", 3.5, ["1", "2", "3", "4"], **{"fine-grained_score": 2.6}),
        scored("c", 4.0, ["N/A"] * 4, **{"fine-grained_score": None}),
    )
    for score, rewards in {
        "overall_score": [7.0, 3.5, 4.0],
        "mean_aspects": [4.0, 2.5],
        "truthfulness": [3.0, 3.0],
        "fine-grained_score": [4.1, 2.6],
    }.items():
        converted, report = convert([row], score=score)
        assert converted[0]["rewards"] == rewards
        assert converted[0]["models"] == ["a", "b", "c"][: len(rewards)]
        assert report.completions == ({} if len(rewards) == 3 else {"missing score": 1})
    with pytest.raises(ValueError, match=r"row 0: `completions` has 1 after some were left out \(2 missing score\)"):
        convert([row], score="honesty")
    with pytest.raises(ValueError, match=r"`score` is 'humour', which `train` .* doesn't have; choose among .*honesty"):
        convert([row], score="humour")
    with pytest.raises(ValueError, match=r"`score` is 'mean_aspects'.*choose among overall_score"):
        convert([ultrafeedback(scored("a", 1.0), scored("b", 2.0))], score="mean_aspects")
    with pytest.raises(ValueError, match=r"`score` is 'honesty', which `train` \(own\) doesn't have; leave the option"):
        convert(reward_rows(1), score="honesty")


def test_ultrafeedback_score_bug_is_repaired_or_dropped_and_counted():
    row = ultrafeedback(
        scored("bug", 10.0, ["1", "2", "N/A", "2"]),
        scored("bug by mean", 10.0, **{"fine-grained_score": 2.0}),
        scored("good", 10.0, ["5", "5", "5", "5"], **{"fine-grained_score": 1.0}),
        scored("bad", 1.0, ["1", "1", "1", "1"]),
        scored("unrated", 10.0),
    )
    repaired, report = convert([row])
    assert repaired[0]["rewards"] == [1.0, 1.0, 10.0, 1.0, 10.0]
    assert report.completions == {"score 10 repaired to 1": 2}
    dropped, report = convert([row], score_bug="drop")
    assert dropped[0]["rewards"] == [10.0, 1.0, 10.0]
    assert dropped[0]["models"] == ["good", "bad", "unrated"]
    assert report.completions == {"score 10 that should be 1": 2}


def test_ultrafeedback_leaves_out_missing_scores_in_one_line(caplog):
    rows = [
        ultrafeedback(scored("a", None), scored("b", 2.0), scored("c", 3.0)),
        ultrafeedback(scored("a", float("nan")), scored("b", 2.0), scored("c", 3.0)),
    ]
    with caplog.at_level(logging.WARNING, "nca_align"):
        converted, _ = convert(rows)
    assert [row["rewards"] for row in converted] == [[2.0, 3.0]] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "`train` (raw UltraFeedback): 2 of 2 prompts kept; single completions left out or repaired: 2 missing score"
    ]


def test_the_principle_that_a_completion_was_sampled_with_is_no_part_of_the_prompt():
    row = ultrafeedback(*(scored(m, 1.0, custom_system_prompt=f"Be {m}.") for m in ("kind", "brief")))
    assert convert([row])[0][0]["prompt"] == asked("Why?")


def test_ultrafeedback_errors_name_row_and_field():
    good = ultrafeedback(scored("a", 1.0), scored("b", 2.0))
    for bad, message in [
        (ultrafeedback(scored("a", 1.0, response=None), scored("b", 2.0)), r"`completions\[0\].response` is null"),
        (
            ultrafeedback(scored("a", 1.0), scored("b", 2.0, response=" ")),
            r"`completions\[1\].response` is ' ', an empty",
        ),
        (ultrafeedback(scored("a", float("inf")), scored("b", 2.0)), r"`completions\[0\].overall_score` is inf"),
        (ultrafeedback(scored("a", 1.0), models=["a"]), r"`completions` has 1; there must be at least two"),
        (good | {"instruction": None}, r"`instruction` is null; it must be text"),
    ]:
        with pytest.raises(ValueError, match="`train`, row 1: " + message):
            convert([good, bad])
    with pytest.raises(ValueError, match=r"row 0: `completions\[0\]` is a str; it must be an object"):
        convert([{"instruction": "Why?", "completions": ["a", "b"]}])


def test_sources_can_be_excluded_and_are_counted():
    rows = [ultrafeedback(scored("a", 1.0), scored("b", 2.0), source=s) for s in ("evol", "truthful_qa", "evol")]
    converted, report = convert(rows, exclude_sources=["truthful_qa"])
    assert converted["source"][:] == ["evol", "evol"]
    assert (report.dropped, report.kept) == ({"source truthful_qa": 1}, 2)
    own, report = convert_dataset(to_reward_dataset(Dataset.from_list(rows)), DataOptions(exclude_sources=["evol"]))
    assert (own["source"][:], report.dropped) == (["truthful_qa"], {"source evol": 2})
    with pytest.raises(ValueError, match=r"`exclude_sources` is \['x'\], but `train` has no column `source`"):
        convert(reward_rows(1), exclude_sources=["x"])


def test_ranked_answers_keep_their_own_scores_and_leave_out_what_is_missing():
    rows = [ranked(1.0, 4.0, 2.0, 3.0), ranked(2.0, "N/A", 5.0, "N/A"), ranked(2.0, None, 1.0, float("nan"))]
    converted, report = convert([row | {"prompt": "Why?", "prompt_id": "x"} for row in rows])
    assert [row["rewards"] for row in converted] == [[1.0, 4.0, 2.0, 3.0], [2.0, 5.0], [2.0, 1.0]]
    assert converted[1]["completions"] == [said("answer 0"), said("answer 2")]
    assert converted[1]["prompt"] == asked("Why?")
    assert set(converted.column_names) == {*FIELDS, "prompt_id"}
    assert report.completions == {"no answer": 2, "missing score": 2}


def test_ranked_answers_keep_system_prompts_and_turns():
    turns = [{"role": "system", "content": "Be brief."}, *asked("Hi"), *said("Hello"), *asked("Why?")]
    row = {f"A{k}": turns + said(f"answer {k}") for k in range(11)} | {f"score_A{k}": float(k) for k in range(11)}
    converted, _ = convert([row])
    assert converted[0]["prompt"] == turns
    assert converted[0]["completions"] == [said(f"answer {k}") for k in range(11)]  # A10 after A9
    assert converted[0]["rewards"] == [float(k) for k in range(11)]
    with pytest.raises(ValueError, match=r"row 0: `A3` has another prompt"):
        convert([row | {"A3": asked("Other?") + said("x")}])
    with pytest.raises(ValueError, match=r"`completions` has 0 after some were left out \(4 no answer\)"):
        convert([ranked("N/A", "N/A", "N/A", "N/A")])


def test_generated_responses_and_the_pair_beside_them():
    row = {
        "prompt": "Why?", "prompt_id": "x",
        "all_generated_responses": ["a", "b", "c"], "all_rm_scores": [0.2, 0.1, 0.3],
        "chosen": asked("Why?") + said("c"), "rejected": asked("Why?") + said("b"),
    }  # fmt: skip
    converted, _ = convert([row])
    assert converted[0] == {
        "prompt": asked("Why?"), "prompt_id": "x", "completions": [said(t) for t in "abc"], "rewards": [0.2, 0.1, 0.3],
    }  # fmt: skip
    hard, _ = convert([row], preference="hard")
    assert (hard[0]["completions"], hard[0]["rewards"]) == ([said("c"), said("b")], [1.0, 0.0])
    with pytest.raises(ValueError, match=r"`all_rm_scores` has 1 values for 3 responses"):
        convert([row | {"all_rm_scores": [0.5]}])
    with pytest.raises(ValueError, match=r"`all_rm_scores\[1\]` is null, a missing score"):
        convert([row | {"all_rm_scores": [0.5, None, 0.1]}])
