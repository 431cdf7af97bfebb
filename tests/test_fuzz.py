"""Any data, file or options: the documented result or a documented error, and every row and completion accounted for.

500 cases in CI, always the same ones; `make long` draws 10,000 others. `FUZZ_SEED` repeats a failure of those.
"""

import csv
import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow.feather
import pytest
import yaml
from datasets import Dataset, disable_progress_bars, enable_progress_bars
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from nca_align import NCAConfig
from nca_align.data import DataOptions, check_row, convert_dataset, read_reward_dataset, to_reward_dataset
from nca_align.data.formats import FORMATS
from nca_align.data.formats.completions import ASPECTS, REPAIRED
from nca_align.data.options import DEFAULT_SCORE
from nca_align.errors import UserError
from nca_align.options import parse

SEED = int(os.environ.get("FUZZ_SEED") or random.SystemRandom().randrange(1 << 32))


def cases(ci: int, long: int):
    """Run a test on `ci` cases, always the same ones, and marked `long` on `long` cases from `SEED`."""

    def decorate(test):
        common = {
            "deadline": None,
            "database": None,
            "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
        }
        variants = {
            "ci": settings(max_examples=ci, derandomize=True, **common)(given(st.data())(_body(test))),
            "long": seed(SEED)(settings(max_examples=long, **common)(given(st.data())(_body(test)))),
        }

        sizes = [
            pytest.param(size, marks=mark) for size, mark in (("ci", pytest.mark.slow), ("long", pytest.mark.long))
        ]

        @pytest.mark.parametrize("size", sizes)
        def run(size, tmp_path_factory):
            print(f"FUZZ_SEED={SEED}")
            test.folder = tmp_path_factory.mktemp("fuzz")
            variants[size]()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


def _body(test):
    def body(data):
        test(data.draw, test.folder)

    body.__name__ = body.__qualname__ = test.__name__
    return body


@pytest.fixture(autouse=True)
def _no_bars():
    disable_progress_bars()
    yield
    enable_progress_bars()


# Values

TEXT = st.one_of(
    st.sampled_from(["Yes.", "No!", "Yes, no.", "N/A", "", " ", "[1, 2", "null", "\x00", "日本\u202e", '{"a": 1}']),
    st.text(max_size=8),
)
FULL = st.text(min_size=1, max_size=8).filter(str.strip)
FLOAT = st.one_of(st.integers(-3, 11).map(float), st.floats(-1e6, 1e6), st.sampled_from([float("nan"), float("inf")]))
SOUND_FLOAT = st.floats(-100, 100, width=32)
ROLE = st.sampled_from(["user", "assistant", "system", "tool", ""])
NAME = st.text(max_size=4).filter(lambda name: "\x00" not in name)  # pyarrow cuts a field's name there
JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats() | TEXT | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAME, inner, max_size=3),
    max_leaves=6,
)


def maybe(values, sound: bool):
    """`values`, of which some are null where the data need not be sound."""
    return values if sound else st.one_of(values, values, values, st.none())


def messages(sound: bool, last: str = "assistant"):
    if sound:
        turn = st.tuples(FULL, FULL)
        return st.tuples(st.lists(turn, max_size=1), FULL).map(
            lambda parts: (
                [
                    {"role": role, "content": text}
                    for pair in parts[0]
                    for role, text in zip(("user", "assistant"), pair, strict=True)
                ]
                + [{"role": last, "content": parts[1]}]
            )
        )
    return st.lists(st.fixed_dictionaries({"role": maybe(ROLE, False), "content": maybe(TEXT, False)}), max_size=3)


FORMS = {
    "plain": dict,
    "ShareGPT": lambda turn: {"from": NAMES.get(turn["role"], turn["role"]), "value": turn["content"]},
    "roles": lambda turn: turn | {"role": NAMES.get(turn["role"], turn["role"])},
    "parts": lambda turn: turn | {"content": [{"type": "text", "text": turn["content"]}]},
}  # each turn as another tool writes it
NAMES = {"user": "human", "assistant": "gpt"}


def columns(
    fmt: str, kind: str, k: int, named: dict[str, str], numbers: str, extra: list[str], form: str, sound: bool
) -> dict[str, Any]:
    """A strategy for each column of a format: values that are sound, or of the right type and anything else."""
    text, number = (FULL, SOUND_FLOAT) if sound else (TEXT, FLOAT)

    def chats(last: str):
        return messages(sound, last).map(lambda turns: list(map(FORMS[form], turns)))

    said, asked = (
        {"text": text, "messages": chats(last), "JSON": chats(last).map(json.dumps)}[kind]
        for last in ("assistant", "user")
    )
    text, said, asked = maybe(text, sound), maybe(said, sound), maybe(asked, sound)
    number = maybe(number if numbers == "numbers" else number.map(str), sound)
    size = {"min_size": k if sound else 0, "max_size": k}
    asked = asked if fmt != "flat scored rows" else st.sampled_from(["Why?", "How?"]).map(FLAT_PROMPTS[kind])
    in_json = st.lists(chats("assistant"), **size).map(json.dumps)
    rating = st.fixed_dictionaries({"Rating": st.sampled_from(["1", "4", "N/A"])})
    bad_json = [] if sound else ["[{", "7"]
    result = {
        "own": {
            "prompt": asked,
            "completions": in_json if kind == "JSON" else st.lists(said, **size),
            "rewards": st.lists(number, **size),
        },
        "pairs": {"prompt": asked, "chosen": said, "rejected": said},
        "trajectory pairs": {
            "trajectory": st.lists(
                st.fixed_dictionaries({"from": st.sampled_from(["user", "gpt", "human"]), "value": text}),
                min_size=1,
                max_size=3,
            ),
            "chosen": text,
            "rejected": text,
        },
        "generated responses": {
            "prompt": asked,
            "all_generated_responses": st.lists(text, **size),
            "all_rm_scores": st.lists(number, **size),
        },
        "labelled rollouts": {
            "prompt": asked, "completions": st.lists(text, **size), "correctness": st.lists(st.booleans(), **size)
        },
        "ProcessBench": {
            "problem": text, "steps": st.lists(text, min_size=int(sound), max_size=k), "label": st.integers(-1, k)
        },
        "flat scored rows": {
            "prompt": asked, named["answer"]: text if kind == "JSON" else said, named["score"]: number
        },
        "ranked answers": {f"A{i}": maybe(messages(sound), sound) for i in range(k)}
        | {f"score_A{i}": number for i in range(k)},
        "raw UltraFeedback": {
            "instruction": text,
            "completions": st.lists(
                st.fixed_dictionaries(
                    {
                        "response": text,
                        "overall_score": maybe(st.sampled_from([1.0, 5.0, 10.0]) if sound else FLOAT, sound),
                        "fine-grained_score": maybe(st.sampled_from([1.0, 4.0]), sound),
                        "annotations": st.fixed_dictionaries(dict.fromkeys(ASPECTS, rating)),
                    }
                ),
                **size,
            ),
        },
    }[fmt]  # fmt: skip
    others = {
        "source": st.sampled_from(["a", "b"]),
        "tools": st.sampled_from(["", '[{"name": "f"}]', *bad_json]),
        "chat_template_kwargs": st.sampled_from(['{"a": true}', *bad_json]),
        "note": maybe(TEXT, False),
        "score_chosen": number,
        "score_rejected": number,
    }
    return result | {name: others[name] for name in extra if name not in result}


FLAT_PROMPTS = {
    "text": str,
    "messages": lambda text: [{"role": "user", "content": text}],
    "JSON": lambda text: json.dumps([{"role": "user", "content": text}]),
}


class Table(list):
    """Rows; `sound` where nothing in them may be refused or dropped."""

    def __init__(self, rows: list[dict[str, Any]], sound: bool):
        super().__init__(rows)
        self.sound = sound


@st.composite
def tables(draw) -> Table[dict[str, Any]]:
    """Rows of one of the known formats, each column of one type; up to two of the rows may be unsound."""
    fmt, k = draw(st.sampled_from(list(FORMATS))), draw(st.integers(2, 4))
    kind = draw(st.sampled_from(["text", "messages", "JSON"]))
    named = {
        "answer": draw(st.sampled_from(["response", "completion"])),
        "score": draw(st.sampled_from(["reward", "helpfulness"])),
    }
    numbers = draw(st.sampled_from(["numbers", "text"]))
    form = draw(st.sampled_from(list(FORMS))) if fmt != "ranked answers" else "plain"
    extra = draw(st.lists(st.sampled_from(EXTRA), max_size=2, unique=True).map(lambda names: sum(names, ())))
    sound, other = (
        st.fixed_dictionaries(columns(fmt, kind, k, named, numbers, extra, form, sound)) for sound in (True, False)
    )
    rows = draw(st.lists(sound, min_size=1, max_size=5))
    if fmt == "ranked answers":  # all answers of a row have one prompt
        asked = {"role": "user", "content": "Why?"}
        rows = [row | {f"A{i}": [asked, *row["A0"][:-1], *row[f"A{i}"][-1:]] for i in range(k)} for row in rows]
    if fmt == "pairs" and kind == "messages" and draw(st.booleans()):  # the prompt is inside
        rows = [row | {side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    unsound = draw(st.lists(other, max_size=2))
    for row in unsound:
        rows.insert(draw(st.integers(0, len(rows))), row)
    return Table(rows, sound=not unsound and fmt not in ("flat scored rows", "raw UltraFeedback"))


EXTRA = [("source",), ("tools",), ("chat_template_kwargs",), ("note",), ("score_chosen", "score_rejected")]


@st.composite
def data_options(draw, rows: list[dict[str, Any]]) -> DataOptions:
    """Options, of which one in ten doesn't fit the rows."""
    fits = draw(st.integers(0, 9)) > 0
    return DataOptions(
        score=draw(st.sampled_from(["overall_score"] if fits else ["mean_aspects", "honesty", "nothing"])),
        preference=draw(st.sampled_from(["scores", "hard"])),
        on_invalid=draw(st.sampled_from(["raise", "drop", "drop", "drop"])),
        score_bug=draw(st.sampled_from(["repair", "drop"])),
        exclude_sources=draw(st.sampled_from([[], ["a"]])) if "source" in rows[0] or not fits else [],
        validation_fraction=draw(st.sampled_from([0.0, 0.4])),
        min_completions=1 if "label" in rows[0] else None,  # ProcessBench has one
    )


# What must hold


def check_refusal(error: Exception, expected: bool = True) -> None:
    """A documented error, in one line, and no other exception that passed for one."""
    assert expected, error
    assert isinstance(error, UserError), repr(error)
    assert "\n" not in str(error)


def must_be_read(rows: Table, options: DataOptions) -> bool:
    return rows.sound and options.score == DEFAULT_SCORE and not options.exclude_sources


def source_prompts(rows: list[dict], fmt: str) -> int:
    """The prompts that rows in this format hold."""
    if FORMATS[fmt].grouped:
        keys = ("prompt", "tools", "chat_template_kwargs")
        return len({json.dumps([row.get(key) for key in keys], sort_keys=True) for row in rows})
    return len(rows)


def source_completions(row: dict, fmt: str) -> int:
    if fmt == "ranked answers":
        return sum(1 for name in row if name.startswith("A") and name[1:].isdigit())
    if fmt == "ProcessBench":
        return 1
    value = row.get("all_generated_responses", row.get("completions"))
    value = json.loads(value) if isinstance(value, str) else value
    return len(value) if isinstance(value, list) else 2


def check_accounts(rows: list[dict], result: Dataset, report, unreadable: int = 0) -> None:
    """Rows in = rows out + rows counted as dropped, and the same of the completions where no row was dropped."""
    assert report.rows == source_prompts(rows, report.format) + unreadable
    assert report.kept + sum(report.dropped.values()) == report.rows
    assert len(result) == report.kept
    for row in result:
        check_row(row["prompt"], row["completions"], row["rewards"], least=1 if report.format == "ProcessBench" else 2)
    if not report.dropped:
        out = sum(len(row["completions"]) for row in result)
        left_out = sum(count for cause, count in report.completions.items() if cause != REPAIRED)
        grouped = FORMATS[report.format].grouped
        given = len(rows) if grouped else sum(source_completions(row, report.format) for row in rows)
        assert out + left_out == given


@cases(ci=250, long=5000)
def test_a_table_becomes_valid_rows_and_each_is_accounted_for(draw, folder):
    rows = draw(tables())
    options = draw(data_options(rows))
    dataset = Dataset.from_list(rows)
    try:
        result, report = convert_dataset(dataset, options)
    except (ValueError, TypeError, NotImplementedError) as error:
        check_refusal(error, expected=not must_be_read(rows, options))
        return
    check_accounts(rows, result, report)
    again = to_reward_dataset(
        result, options if report.format == "own" else DataOptions(min_completions=options.min_completions)
    )
    assert same(list(again), list(result))
    assert again.features == result.features
    if not FORMATS[report.format].grouped:
        streamed = to_reward_dataset(dataset.to_iterable_dataset(), options)
        assert same(list(streamed), list(result))


def same(one: Any, other: Any) -> bool:
    """Equal, with NaN equal to itself."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@cases(ci=150, long=3000)
def test_a_file_is_read_or_refused_in_one_sentence(draw, folder):
    rows = draw(tables())
    options = draw(data_options(rows))
    kind = draw(st.sampled_from(["jsonl", "jsonl", "json", "parquet", "arrow", "csv"]))
    mixed = draw(st.integers(0, 2)) if kind in ("jsonl", "json") else 0
    for _ in range(mixed):  # anything anywhere
        row = rows[draw(st.integers(0, len(rows) - 1))]
        row[draw(st.sampled_from(list(row)))] = draw(JSON_VALUE)
    file = folder / f"rows.{kind}"
    lines = [json.dumps(row).encode() for row in rows]
    broken: list[bytes] = []
    if kind == "jsonl":
        broken = draw(st.lists(st.sampled_from([b"{", b"[1]", b"\xff\xfe", b'{"a": }']), max_size=2))
        for line in broken:
            lines.insert(draw(st.integers(0, len(lines))), line)
        file.write_bytes(b"\n".join([*lines, b""]))
    elif kind == "json":
        file.write_bytes(b"[" + b",".join(lines) + b"]")
    elif kind == "parquet":
        Dataset.from_list(rows).to_parquet(file)
    elif kind == "arrow":
        pyarrow.feather.write_feather(Dataset.from_list(rows).data.table, file)
    else:
        write_csv(file, rows)
    try:
        data = read_reward_dataset(str(file), options=options)
    except (ValueError, TypeError, NotImplementedError) as error:
        check_refusal(error)
        return
    report = data.reports["train"]
    readable = [row for row in rows if is_text(row)]
    unreadable = len(broken) + len(rows) - len(readable)
    assert report.rows == source_prompts(readable, report.format) + unreadable or kind == "csv"
    assert report.kept + sum(report.dropped.values()) == report.rows
    assert report.dropped.get("unreadable line", 0) == unreadable
    assert sum(map(len, data.dataset.values())) == report.kept
    assert len(data.validation_indices or []) == len(data.dataset.get("validation", []))
    # In a column of several types `datasets` reads text as the JSON that it may be, where a stream has the text.
    if not (mixed or FORMATS[report.format].grouped):
        streamed = read_reward_dataset(str(file), options=options, streaming=True).dataset["train"]
        assert len(list(streamed)) == report.kept


def is_text(row: dict) -> bool:
    """False with half a character in it, a surrogate alone, which JSON can hold and no file of text."""
    try:
        return bool(json.dumps(row, ensure_ascii=False).encode())
    except UnicodeEncodeError:
        return False


def write_csv(file: Path, rows: list[dict]) -> None:
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        for row in rows:
            cells = {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
            writer.writerow(cells)


FIELDS = ["alpha", "beta", "loss_type", "loss_weights", "negative_weight", "max_length", "max_prompt_length", "layout",
          "tokens_per_forward", "precompute_ref_log_probs", "learning_rate", "per_device_train_batch_size", "bf16",
          "save_strategy", "eval_strategy", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "report_to",
          "label_smoothing", "padding_free", "gradient_checkpointing", "optim", "max_steps", "seed", "score",
          "preference", "on_invalid", "exclude_sources", "validation_fraction", "nothing", "alhpa"]  # fmt: skip
SCALAR = st.one_of(
    st.sampled_from([0, 1, -1, 0.1, 1e-6, "nca", "infonca", "sigmoid", "padded", "auto", "no", "true", "5e-6", "1e400",
                     "", None, True, False, "steps", "cosine", "adamw_torch", float("nan"), float("inf"), 10**30]),
    JSON_VALUE,
)  # fmt: skip


@cases(ci=100, long=2000)
def test_options_are_taken_or_refused_in_one_sentence(draw, folder):
    values = draw(st.dictionaries(st.sampled_from(FIELDS), SCALAR, max_size=4))
    flags = draw(st.lists(st.one_of(st.sampled_from([f"--{name}" for name in FIELDS]), TEXT), max_size=3))
    file = folder / "options.yaml"
    file.write_text(yaml.safe_dump({"output_dir": str(folder), "use_cpu": True, **values}), encoding="utf-8")
    flags = [flag for flag in flags if flag not in ("-h", "--help")]
    try:
        config, options = parse((NCAConfig, DataOptions), ["--config", str(file), *flags], "train")
    except UserError as error:
        check_refusal(error)
        return
    assert 0 < config.alpha < float("inf")
    assert 0 < config.beta < float("inf")
    assert config.layout in ("auto", "prefix_shared", "padded")
    assert 0 <= options.validation_fraction < 1
