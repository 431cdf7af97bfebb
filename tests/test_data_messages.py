"""Messages in other forms: ShareGPT's, roles by other names, content in parts; from every file, typed or not."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Json, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import build_tokenizer
from nca_align.batching.rendering import prompt_ids
from nca_align.batching.tokenization import tokenize_dataset, tokenize_rows
from nca_align.data import load_reward_dataset, to_reward_dataset
from nca_align.data.message_columns import with_plain_messages
from nca_align.data.messages import ROLES, other_part, plain_completions, plain_conversation
from nca_align.data.prompts import load_completions, load_prompts
from nca_align.errors import InvalidRowError, UserError

pytestmark = pytest.mark.usefixtures("own_datasets_cache")
SLOW = pytest.mark.slow
ROWS = [
    {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"p{i}"}],
        "completions": [[{"role": "assistant", "content": f"a{i}"}], [{"role": "assistant", "content": f"b{i}"}]],
        "rewards": [1.0, 0.5],
    }
    for i in range(3)
]
OTHER = {"user": "human", "assistant": "gpt"}


def other_role(turn: dict) -> dict:
    return turn | {"role": OTHER.get(turn["role"], turn["role"])}


def sharegpt(turn: dict) -> dict:
    return {"from": other_role(turn)["role"], "value": turn["content"]}


def parts(turn: dict) -> dict:
    text = turn["content"]
    return {"role": turn["role"], "content": [{"type": "text", "text": piece} for piece in (text[:1], text[1:])]}


FORMS = {"plain": dict, "roles": other_role, "ShareGPT": sharegpt, "parts": parts,
         "parts of ShareGPT": lambda turn: {"from": turn["role"], "value": parts(turn)["content"]}}  # fmt: skip


def written(form, alone: bool = False) -> list[dict]:
    """The rows in a form; a completion as its message alone, if wanted."""
    return [
        {
            "prompt": list(map(form, row["prompt"])),
            "completions": [form(one) if alone else [form(one)] for (one,) in row["completions"]],
            "rewards": row["rewards"],
        }
        for row in ROWS
    ]


def write(rows: list[dict], kind: str, folder) -> str:
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({name: json.dumps(value) for name, value in row.items()} for row in rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: str, **options) -> list[dict]:
    return list(load_reward_dataset(path, split="train", validation_fraction=0, **options))


@pytest.mark.parametrize(
    "kind", ["parquet", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("jsonl", "csv"))]
)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_every_file(form, kind, tmp_path):
    for alone in (False, True):
        path = write(written(FORMS[form], alone), kind, tmp_path)
        assert read(path) == read(path, streaming=True) == ROWS
        assert load_prompts(path, None, "train")["prompt"][:] == [row["prompt"] for row in ROWS]
        assert load_completions(path, None, "train")["completions"][:] == [row["completions"] for row in ROWS]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "JSON"])
@pytest.mark.parametrize("content", ["", None])
def test_openais_older_calls(content, kind, tmp_path):
    function = {"name": "add", "arguments": '{"a": 1}'}
    ask, answer = {"role": "user", "content": "p"}, {"role": "assistant", "content": "b", "function_call": None}
    old = {"role": "assistant", "content": content, "function_call": function}
    new = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    result = {"role": "function", "content": "3"}
    rows = [{"prompt": [ask, old, result], "completions": [[old], [answer]], "rewards": [1.0, 0.5]}] * 2
    if kind == "JSON":
        data = Dataset.from_list(rows).cast(
            Features({"prompt": List(Json()), "completions": List(List(Json())), "rewards": List(Value("float64"))})
        )
        (found, _) = to_reward_dataset(data)
    else:
        (found, _) = read(write(rows, kind, tmp_path))

    def there(turns: list[dict]) -> list[dict]:
        return [{key: own for key, own in turn.items() if own not in (None, "")} for turn in turns]

    assert there(found["prompt"]) == [ask, new, {"role": "tool", "content": "3"}]
    assert list(map(there, found["completions"])) == [[new], [{"role": "assistant", "content": "b"}]]


def test_one_row_of_another_form_among_many(tmp_path):
    """The types tell nothing of it: it is looked for."""
    for form in (other_role, parts):
        many = ROWS * 40 + written(form)
        assert read(write(many, "jsonl", tmp_path)) == ROWS * 41
    late = Dataset.from_list(ROWS * 40 + written(other_role))
    assert late.features["prompt"] == List({"role": Value("string"), "content": Value("string")})
    assert to_reward_dataset(late).to_list() == ROWS * 41
    assert to_reward_dataset(late).features == late.features


def test_what_is_plain_already_is_not_written_anew():
    typed = Dataset.from_list(ROWS)
    tools = [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "from"}}]}]
    free = Dataset.from_list(
        [row | {"prompt": [*row["prompt"], *tools]} for row in ROWS], on_mixed_types="use_json"
    ).cast_column("prompt", List(Json()))
    texts = Dataset.from_dict({"prompt": ["x"], "completions": [["a", "b"]], "rewards": [[1, 2]]})
    for dataset in (typed, free, texts):
        assert with_plain_messages(dataset, "train") is dataset


PAIR = {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
TURNS = [{"from": "human", "value": "p"}]
PLAIN = {"prompt": [{"role": "user", "content": "p"}],
         "completions": [[{"role": "assistant", "content": text}] for text in "ab"]}  # fmt: skip


@pytest.mark.parametrize("row", [
    {"conversations": TURNS, **PAIR},
    {"conversations": TURNS, **{name: [turn] for name, turn in PAIR.items()}},
    {name: [*TURNS, turn] for name, turn in PAIR.items()},
    {"conversations": TURNS, "completions": [*PAIR.values()], "rewards": [1, 0]},
    {"conversations": TURNS, "completions": [[turn] for turn in PAIR.values()], "rewards": [1, 0]},
    {"trajectory": TURNS, "chosen": "a", "rejected": "b"},
], ids=["LLaMA-Factory", "lists", "whole", "messages", "own", "UltraInteract"])  # fmt: skip
def test_sharegpts_columns(row, tmp_path):
    for kind in ("jsonl", "parquet"):
        path = write([row], kind, tmp_path)
        for streaming in (False, True):
            (found,) = read(path, streaming=streaming)
            assert {name: found[name] for name in PLAIN} == PLAIN
            assert found["rewards"] == [1.0, 0.0]


def test_llama_factorys_system_prompts_come_first(tmp_path):
    rows = [{"conversations": TURNS, "system": text, **PAIR} for text in ("Be brief.", "", None)]
    for kind in ("jsonl", "parquet"):
        path = write(rows, kind, tmp_path)
        for streaming in (False, True):
            first, *others = (row["prompt"] for row in read(path, streaming=streaming))
            assert first == [{"role": "system", "content": "Be brief."}, *PLAIN["prompt"]]
            assert others == [PLAIN["prompt"]] * 2


def test_prompts_alone_keep_their_column(tmp_path):
    """A conversation without answers beside it may end in one: it is not taken for a prompt."""
    path = write([{"conversations": [*TURNS, PAIR["chosen"]]}], "jsonl", tmp_path)
    with pytest.raises(UserError, match=r"--columns prompt=conversations"):
        load_prompts(path, None, "train")
    (row,) = load_prompts(path, None, "train", ["prompt=conversations"])
    assert row["prompt"] == [*PLAIN["prompt"], {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(("part", "kind"), [
    ({"type": "image_url", "image_url": {"url": "x"}}, "image_url"), ({"type": "image"}, "image"),
    ({"type": "text", "text": None}, "text without text"), ("text", "str"), ({"type": ["text"]}, r"\['text'\]"),
])  # fmt: skip
def test_parts_that_are_no_text_are_refused_by_name_or_dropped(part, kind, tmp_path):
    bad = ROWS[0] | {"prompt": [{"role": "user", "content": [{"type": "text", "text": "See:"}, part]}]}
    for rows in ([bad, *ROWS], [*ROWS * 30, bad]):
        path = write(rows, "jsonl", tmp_path)
        said = rf"row {rows.index(bad)}: `prompt\[0\].content` holds a part of the type '{kind}'; only parts"
        for streaming in (False, True):
            with pytest.raises(UserError, match=said.replace(r"\['text'\]", r"\[.text.\]").replace("'", ".")):
                read(path, streaming=streaming)
            assert read(path, streaming=streaming, on_invalid="drop") == [row for row in rows if row is not bad]


TEXT = st.text(max_size=4)
PART = st.one_of(st.builds(lambda text: {"type": "text", "text": text}, TEXT), st.just({"type": "image"}), TEXT)
CONTENT = st.one_of(TEXT, st.none(), st.lists(PART, max_size=3), st.integers())
ROLE = st.one_of(
    st.sampled_from([*ROLES, "user", "system"]), TEXT, st.none(), st.integers(), st.lists(TEXT, max_size=1)
)
MESSAGE = st.one_of(
    st.builds(lambda role, content: {"role": role, "content": content}, ROLE, CONTENT),
    st.builds(lambda role, content: {"from": role, "value": content}, ROLE, CONTENT),
    TEXT, st.none(),
)  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(messages=st.one_of(st.lists(MESSAGE, max_size=3), MESSAGE))
def test_what_is_plain_stays_and_nothing_is_lost(messages):
    plain = plain_conversation(messages)
    assert plain_conversation(plain) == plain
    assert plain_completions([messages]) == [plain]
    given = [messages] if isinstance(messages, dict) else messages
    for old, new in zip(given, plain, strict=True) if isinstance(plain, list) else ():
        if not isinstance(old, dict):
            assert new == old
            continue
        role, content = old.get("role", old.get("from")), old.get("content", old.get("value"))
        assert new["role"] == (ROLES.get(role, role) if isinstance(role, str) else role)
        sound = isinstance(content, list) and other_part(content) is None
        assert new["content"] == ("".join(part["text"] for part in content) if sound else content)


@pytest.mark.parametrize("role", ["ipython", "function", "observation"])
def test_a_tool_by_another_role_is_no_turn_of_the_model(role):
    turns = [{"role": "assistant", "content": "a()"}, {"role": role, "content": "42"}, *ROWS[0]["completions"][0]]
    rows = [ROWS[0] | {"completions": [own, ROWS[0]["completions"][1]]} for own in
            (turns, [turns[0], turns[1] | {"role": "tool"}, turns[2]])]  # fmt: skip
    found = [to_reward_dataset(Dataset.from_list([row])) for row in rows]
    named, plain = (tokenize_dataset(own, build_tokenizer(), None, None)[0][0] for own in found)
    assert named["completion_mask"] == plain["completion_mask"] is not None
    assert named["completion_ids"] == plain["completion_ids"]


NARRATOR = ROWS[0] | {"prompt": [{"role": "narrator", "content": "Hi"}]}


class TestUnknownRoles:
    """A template that prints whatever role it gets, as most do, would train on a turn that the model never saw."""

    def test_refused_in_training_and_sampling(self):
        tokenizer = build_tokenizer()
        said = "has a message of the role 'narrator', which the chat template doesn't name"
        with pytest.raises(InvalidRowError, match=said):
            prompt_ids(tokenizer, NARRATOR)
        answered = ROWS[0] | {"completions": [[{"role": "narrator", "content": "x"}]], "rewards": [1.0]}
        for row in (NARRATOR, answered):
            with pytest.raises(UserError, match=f"Row 7 of `train`: .*{said}"):
                tokenize_rows({name: [value] for name, value in row.items()}, [7], tokenizer, None, None, name="train")

    @pytest.mark.parametrize("quote", "'\"")
    def test_rendered_where_the_template_names_it(self, quote):
        tokenizer = build_tokenizer()
        plain = prompt_ids(tokenizer, {"prompt": [{"role": "user", "content": "Hi"}]})
        tokenizer.chat_template += f"{{% if messages[0].role == {quote}narrator{quote} %}}{{% endif %}}"
        assert len(prompt_ids(tokenizer, NARRATOR)) > len(plain)

    @pytest.mark.parametrize("role", ["system", "user", "tool"])
    def test_common_roles_need_no_naming(self, role):
        assert role not in build_tokenizer().chat_template
        assert prompt_ids(build_tokenizer(), {"prompt": [{"role": role, "content": "Hi"}]})

    def test_a_developer_is_named_and_printed(self):
        row = {"prompt": [{"role": "developer", "content": "Rules"}, {"role": "user", "content": "Hi"}]}
        tokenizer = build_tokenizer()
        with pytest.raises(InvalidRowError, match="role 'developer', which the chat template doesn't name"):
            prompt_ids(tokenizer, row)
        tokenizer.chat_template += "{% if messages[0].role == 'developer' %}{% endif %}"
        assert prompt_ids(tokenizer, row)
        tokenizer.chat_template = "{% for m in messages if m.role != 'developer' %}{{ m.content }}{% endfor %}"
        with pytest.raises(InvalidRowError, match="leaves out the developer prompt"):
            prompt_ids(tokenizer, row)
