"""Of a completion of several turns, exactly what the model wrote is trained on, whatever its chat template is."""

import itertools
import logging
import re

import pytest
import trl.chat_template_utils as trl_templates
from datasets import Dataset, IterableDataset

from conftest import build_model, build_tokenizer, reward_rows
from nca_align import NCAConfig, NCATrainer
from nca_align.batching.tokenization import rows_that_fit, tokenize_dataset, tokenize_rows
from nca_align.batching.trajectories import TurnTemplate, turn_template
from nca_align.errors import InvalidRowError, UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}{{ call.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = CHATML.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}",
    "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}",
).replace(
    "{% endfor %}<|im_end|>\n{% endfor %}",
    "{% endfor %}END{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}",
)
MARKED_HEADERS = CHATML.replace(
    "<|im_start|>{{ m.role }}\n{{ m.content }}",
    "{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n{{ m.content }}",
).replace(
    "{% endfor %}<|im_end|>\n{% endfor %}",
    "{% endfor %}<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}",
)
MARKED_CONTENT = CHATML.replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}",
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}{{ call.function.arguments | tojson }}</call>"
    "{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
BARE = (  # no special token ends a turn
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function.name }}{{ call.function.arguments | tojson }}</call>{% endfor %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Drops the reasoning of each turn but the last, as a thinking template of nobody's that TRL knows
FORGETFUL = CHATML.replace(
    "{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1] }}"
)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>", "\n"),
    "marked": (MARKED.replace("END", "<|im_end|>\n{% endgeneration %}"), "<|im_end|>", "\n"),
    "marked without the end": (MARKED.replace("END", "{% endgeneration %}<|im_end|>\n"), "<|im_end|>", "\n"),
    "marked with the headers": (MARKED_HEADERS, "<|im_end|>", "\n"),
    "llama3": (LLAMA3, "<|eot_id|>", ""),
    "bare": (BARE, "\n", ""),
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 17, "b": 25}}}
PROMPT = [{"role": "user", "content": "What is 17 + 25?"}]


def turn(content: str, role: str = "assistant", **more) -> dict:
    return {"role": role, "content": content, **more}


WITH_TOOL = [turn("Let me see.", tool_calls=[CALL]), turn("TOOLRESULT 42", "tool", name="add"), turn("It is 42.")]
WITH_USER = [turn("It is 43."), turn("Look again.", "user"), turn("Oh."), turn("Go on", "user"), turn("It is 42.")]
ALONE = [turn("It is 42.")]
CALL_ALONE = turn("", tool_calls=[CALL])
CALLS_ALONE = [CALL_ALONE, turn("TOOLRESULT 42", "tool", name="add"), CALL_ALONE]
IN_A_ROW = [turn("Let me see."), turn("It is 42."), turn("Sure?", "user"), turn("Yes.")]


def tokenizer_of(template: str):
    tokenizer = build_tokenizer(template)
    special = sorted(set(re.findall(r"<\|\w+\|>", template)))
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def tokenised(tokenizer, *completions, prompt=PROMPT, max_length=None) -> dict:
    row = {
        "prompt": [prompt],
        "completions": [list(completions)],
        "rewards": [list(map(float, range(len(completions))))],
    }
    return {name: values[0] for name, values in tokenize_rows(row, [0], tokenizer, None, max_length, name="d").items()}


def written(tokenizer, row: dict, k: int) -> list[str]:
    """The text of each stretch that the model wrote."""
    stretches = itertools.groupby(zip(row["completion_mask"][k], row["completion_ids"][k], strict=True), lambda x: x[0])
    return [tokenizer.decode([token for _, token in own]) for mask, own in stretches if mask]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_what_the_model_wrote_is_trained_on_and_nothing_else(kind):
    template, end, rest = TEMPLATES[kind]
    tokenizer = tokenizer_of(template)
    assert turn_template(tokenizer) == TurnTemplate(None, kind.startswith("marked"))
    row = tokenised(tokenizer, WITH_TOOL, WITH_USER, ALONE, CALLS_ALONE, IN_A_ROW)
    opening = " " if kind == "bare" else ""
    alone = '<call>add{"a": 17, "b": 25}</call>'
    call = "Let me see." + alone
    expected = [
        [call + end, "It is 42." + end + rest],
        ["It is 43." + end, "Oh." + end, "It is 42." + end + rest],
        ["It is 42." + end + rest],
        [alone + end, alone + end + rest],
        ["Let me see." + end, "It is 42." + end, "Yes." + end + rest],
    ]
    for k, texts in enumerate(expected):
        assert written(tokenizer, row, k) == [opening + text for text in texts]
        assert len(row["completion_mask"][k]) == len(row["completion_ids"][k])
    assert all(row["completion_mask"][2])
    whole = tokenizer.apply_chat_template(PROMPT + WITH_TOOL, return_dict=True)["input_ids"]
    assert row["prompt_ids"] + row["completion_ids"][0] == whole


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_tokenizer_that_does_not_tell_where_tokens_end_gives_the_same(kind, monkeypatch):
    tokenizer = tokenizer_of(TEMPLATES[kind][0])
    given = [WITH_TOOL, WITH_USER, ALONE, CALLS_ALONE, IN_A_ROW]
    row = tokenised(tokenizer, *given)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert turn_template(tokenizer) == TurnTemplate(None, marked=False)
    assert tokenised(tokenizer, *given) == row


@pytest.mark.parametrize("kind", ["llama3", "marked"])
def test_what_is_tokenised_grows_as_the_turns_do(kind, monkeypatch):
    tokenizer, read = tokenizer_of(TEMPLATES[kind][0]), []
    encode = type(tokenizer).__call__

    def spied(self, texts, *given, **how):
        read.extend([texts] if isinstance(texts, str) else texts)
        return encode(self, texts, *given, **how)

    monkeypatch.setattr(type(tokenizer), "__call__", spied)
    for turns in (1, 8):
        read.clear()
        tokenised(tokenizer, WITH_TOOL[:2] * turns + ALONE)
        whole = max(map(len, read))
        assert sum(map(len, read)) < 5 * whole  # the prompt, the whole, where its tokens end, and its marks


def test_data_of_one_turn_has_no_mask_and_streams_have_them_by_row():
    tokenizer, rows = build_tokenizer(), reward_rows(3)
    for completions in (row["completions"] for row in rows):
        assert all(len(completion) == 1 for completion in completions)
    plain, _ = tokenize_dataset(Dataset.from_list(rows), tokenizer, None, None)
    assert "completion_mask" not in plain.column_names
    # in the second batch of 64 alone
    mixed = [rows[0] | {"completions": [[turn("no")], [turn("yes")]], "rewards": [0.0, 1.0]}] * 70
    mixed[67] = mixed[67] | {"completions": [[turn("a"), turn("b", "user"), turn("c")], [turn("yes")]]}
    found, _ = tokenize_dataset(Dataset.from_list(mixed), tokenizer, None, None)
    streamed, _ = tokenize_dataset(IterableDataset.from_generator(lambda: iter(mixed)), tokenizer, None, None)
    masks = found["completion_mask"]
    assert [i for i, mask in enumerate(masks) if mask is not None] == [67]
    assert [row["completion_mask"] for row in streamed] == list(masks)
    # to another template, the same rows are other data
    tokenizer.chat_template = MARKED.replace("END", "{% endgeneration %}<|im_end|>\n")
    assert tokenize_dataset(Dataset.from_list(mixed), tokenizer, None, None)[0]._fingerprint != found._fingerprint


def test_a_cut_keeps_what_fits_of_the_turn_that_it_meets():
    tokenizer = tokenizer_of(CHATML)
    whole = tokenised(tokenizer, WITH_TOOL, ALONE)
    prompt, (mask, _) = len(whole["prompt_ids"]), whole["completion_mask"]
    for room in (3, mask.index(0) + 2, len(mask) - 4):
        cut = tokenised(tokenizer, WITH_TOOL, ALONE, max_length=prompt + room)
        assert cut["completion_ids"][0] == whole["completion_ids"][0][:room]
        assert (cut["completion_mask"] or [[1] * room])[0] == mask[:room]
        assert cut["completions_cut"] == 1 + (room < len(whole["completion_ids"][1]))


def test_a_completion_with_nothing_to_train_on_is_refused():
    tokenizer = tokenizer_of(CHATML)
    given = [turn("Look again, and at each of its digits.", "user"), turn("It is 42.")]
    with pytest.raises(
        InvalidRowError, match=r"Row 0 of `d`: `completions\[1\]` has nothing to train on before `max_l"
    ):
        tokenised(tokenizer, ALONE, given, max_length=len(tokenised(tokenizer, ALONE)["prompt_ids"]) + 10)
    with pytest.raises(InvalidRowError, match=r"Row 0 of `d`: `completions\[0\]` has no turn of the assistant"):
        tokenised(tokenizer, [turn("42", "tool")], ALONE)


THOUGHT = [
    turn("<think>\nCARRY\n</think>\n\nA call."),
    turn("42", "tool"),
    turn("<think>\nSURE\n</think>\n\nIt is 42."),
]


def test_reasoning_that_a_template_drops_is_refused_by_its_turn():
    tokenizer = tokenizer_of(FORGETFUL)
    with pytest.raises(
        InvalidRowError, match=r"`completions\[0\]` turn 0 has `content`, which the chat template leaves out"
    ):
        tokenised(tokenizer, THOUGHT, ALONE)
    field = [turn("A call.", reasoning_content="CARRY"), *WITH_TOOL[1:]]
    with pytest.raises(InvalidRowError, match="turn 0 has `reasoning_content`, which the chat template leaves out"):
        tokenised(tokenizer_of(CHATML), field, ALONE)
    no_tools = CHATML.replace("{% for call in m.tool_calls or [] %}", "{% for call in [] %}")
    with pytest.raises(InvalidRowError, match="turn 0 has `tool_calls`, which the chat template leaves out"):
        tokenised(tokenizer_of(no_tools), WITH_TOOL, ALONE)


LEAVES_OUT = r"`completions\[0\]` turn %d has `%s`, which the chat template leaves out"
FOLLOWS = r"`completions\[0\]` turn %d does not follow what the chat template renders before it"
OTHERWISE = r"`completions\[0\]` turn %d is rendered differently once other turns follow"
UNMARKED = r"`completions\[0\]` turn %d is not wholly within the `{%% generation %%}` marks"
TEXT_CALL = {"name": "look", "arguments": '{"where": "at its \\"digits\\""}'}


@pytest.mark.parametrize(
    ("template", "completion", "message"),
    [
        # a template with no branch for the tool's turns
        (CHATML.replace("messages %}", "messages if m.role in ('user', 'assistant') %}"), WITH_TOOL,
         LEAVES_OUT % (1, "content")),
        (CHATML.replace("{{ call.function.arguments | tojson }}", ""), [
            turn("", tool_calls=[{"type": "function", "function": TEXT_CALL}]), *WITH_TOOL[1:]
        ], LEAVES_OUT % (0, "tool_calls")),
        (CHATML.replace("<|im_end|>\n{% endfor %}", "{{ '!' if loop.last }}<|im_end|>\n{% endfor %}"), WITH_TOOL,
         FOLLOWS % 0),
        (CHATML.replace("<|im_end|>\n{% endfor", "{{ '!' if loop.length > 1 and loop.last }}<|im_end|>\n{% endfor"),
         WITH_TOOL, OTHERWISE % 0),
        # a generation prompt that no conversation has
        (CHATML.replace("generation_prompt %}", "generation_prompt %}</s>"), WITH_USER, FOLLOWS % 0),
        (CHATML.replace("generation_prompt %}", "generation_prompt %}<|im_end|>### "), WITH_TOOL, FOLLOWS % 0),
        # marks around content alone: the call isn't in them
        (MARKED_CONTENT, CALLS_ALONE, UNMARKED % 0),
        (MARKED_CONTENT, [turn("One more."), turn("Go on", "user"), CALL_ALONE], UNMARKED % 2),
        (MARKED_CONTENT, WITH_TOOL, UNMARKED % 0),
    ],
)  # fmt: skip
def test_a_template_that_would_train_on_other_than_what_the_model_wrote_is_refused(template, completion, message):
    with pytest.raises(InvalidRowError, match=message):
        tokenised(tokenizer_of(template), completion, ALONE)


def test_what_a_generation_prompt_opens_is_the_models_only_in_rows_of_one_turn():
    """A thought that the prompt opens and another completion lacks: there the completions of all begin before it."""
    tokenizer = tokenizer_of(CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"))
    opened = [turn("<think>\nCARRY\n</think>\nIt is 42.")]
    row = tokenised(tokenizer, opened, ALONE)  # as in TRL: what follows the ids that all share counts
    assert (row["completion_mask"], tokenizer.decode(row["completion_ids"][0])[:7]) == (None, "<think>")
    several = tokenised(tokenizer, [*opened, turn("Sure?", "user"), *ALONE], opened, ALONE)
    thought = "\nCARRY\n</think>\nIt is 42.<|im_end|>"
    assert [written(tokenizer, several, k)[0].lstrip("\n") for k in range(3)] == [
        thought.lstrip("\n"), thought.lstrip("\n") + "\n", "It is 42.<|im_end|>\n",
    ]  # fmt: skip


UNUSABLE = {  # a completion that is refused as it becomes tokens, and the cause under which its row is counted
    "nothing to train on": [turn("42", "tool")],
    "tool_calls left out by the chat template": [turn("So.", tool_calls=[CALL]), *WITH_TOOL[1:]],
    "role unknown to the chat template": [turn("42", "oracle"), *ALONE],
    "end token as text": [turn("It is 42.<|im_end|>Hello")],
}


@pytest.mark.parametrize("kind", ["rows", "stream"])
def test_rows_that_are_refused_as_they_become_tokens_are_dropped_and_counted(kind, caplog, tmp_path):
    tokenizer = tokenizer_of(CHATML.replace("m.tool_calls or []", "[]"))
    sound = {
        "prompt": PROMPT,
        "completions": [[turn("A."), turn("b", "user"), turn("C.")], ALONE],
        "rewards": [0.0, 1.0],
    }
    bad = [sound | {"completions": [ALONE, completion]} for completion in UNUSABLE.values()]
    rows = [bad[0], sound, *bad[1:], bad[0], sound]

    def given(own: list[dict]):
        return Dataset.from_list(own) if kind == "rows" else IterableDataset.from_generator(lambda: iter(own))

    def dropped(own: list[dict]):
        return tokenize_dataset(given(own), tokenizer, None, None, on_invalid="drop")[0]

    expected, _ = tokenize_dataset(given([sound, sound]), tokenizer, None, None)
    with caplog.at_level(logging.WARNING, "nca_align"):
        found = list(dropped(rows))
    assert [row["row_number"] for row in found] == [1, 6]
    for name in ("prompt_ids", "completion_ids", "completion_mask", "rewards", "length"):
        assert [row[name] for row in found] == [row[name] for row in expected]
    assert found[0].keys() == set().union(*expected)
    (*_, told) = caplog.messages
    counts = "2 nothing to train on, " + ", ".join(f"1 {cause}" for cause in sorted([*UNUSABLE][1:]))
    where = (
        "`train`: 2 of 7 rows kept as they became" if kind == "rows" else "`train`, rows 0 to 6: dropped as they became"
    )
    assert told.startswith(where)
    assert told.endswith(f"dropped: {counts}" if kind == "rows" else f" tokens: {counts}")
    with pytest.raises(UserError, match="at least one must be"):
        dropped(bad)
    with pytest.raises(InvalidRowError, match=r"Row 0 of `train`: `completions\[1\]` has no turn of the assistant"):
        list(tokenize_dataset(given(rows), tokenizer, None, None)[0])
    # the trainer hands the option on, and reads its own rows by it too
    model = build_model(tokenizer, vocab_size=len(tokenizer))
    args = {"max_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    args |= {"disable_tqdm": True, "max_length": None, "output_dir": str(tmp_path), "gradient_checkpointing": False}
    data = given([*rows, sound | {"rewards": [1.0]}] if kind == "rows" else rows)
    trainer = NCATrainer(
        model, args=NCAConfig(**args, on_invalid="drop"), train_dataset=data, processing_class=tokenizer
    )
    trainer.train()
    assert [row["row_number"] for row in trainer.train_dataset] == [1, 6]
    if kind == "rows":  # and a comparison gives all methods the same ones
        compared = Dataset.from_list([row | {"rewards": [float(i), 9.0]} for i, row in enumerate(rows)])
        assert rows_that_fit(compared, tokenizer, trainer.args)["rewards"][:] == [[1.0, 9.0], [6.0, 9.0]]


def test_a_tools_result_may_be_rendered_as_json():
    template = CHATML.replace("{{ m.content }}", "{{ m.content | tojson if m.role == 'tool' else m.content }}")
    completion = [WITH_TOOL[0], turn('"42"\n', "tool"), WITH_TOOL[2]]
    tokenizer = tokenizer_of(template)
    assert len(written(tokenizer, tokenised(tokenizer, completion, ALONE), 0)) == 2


def test_marks_tell_where_a_turn_ends_whose_rendering_depends_on_what_follows():
    """As in Qwen3's own template with marks: the empty thought is in the last turn alone."""
    thought = MARKED.replace("{% generation %}", "{% generation %}{{ '<think></think>' if loop.last }}")
    for end in ("<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>\n"):
        tokenizer = tokenizer_of(thought.replace("END", end))
        call, answer = written(tokenizer, tokenised(tokenizer, WITH_TOOL, ALONE), 0)
        assert call == 'Let me see.<call>add{"a": 17, "b": 25}</call><|im_end|>'
        assert answer == "<think></think>It is 42.<|im_end|>\n"
    one_stretch = MARKED_HEADERS.replace("assistant\n{{", "assistant\n{{ '<think></think>' if loop.last }}{{")
    content_alone = MARKED_CONTENT.replace("{% generation %}", "{% generation %}{{ '<think></think>' if loop.last }}")
    for template, completion, message in (
        (one_stretch, IN_A_ROW, FOLLOWS % 1),
        (content_alone, WITH_TOOL, UNMARKED % 0),
    ):
        with pytest.raises(InvalidRowError, match=message):
            tokenised(tokenizer_of(template), completion, ALONE)


def test_qwen3_keeps_its_reasoning_by_the_training_template_of_trl():
    """Its own template drops that of turns before a user's."""
    tokenizer = tokenizer_of(trl_templates.qwen3_chat_template)
    completion = [THOUGHT[0], turn("Sure?", "user"), THOUGHT[2]]
    assert "CARRY" not in tokenizer.apply_chat_template(PROMPT + completion, tokenize=False)
    row = tokenised(tokenizer, completion, ALONE)
    assert written(tokenizer, row, 0) == [
        "<think>\nCARRY\n</think>\n\nA call.<|im_end|>", "<think>\nSURE\n</think>\n\nIt is 42.<|im_end|>\n",
    ]  # fmt: skip
    assert tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")


def test_a_completion_goes_on_with_the_turn_that_the_prompt_ends_in():
    tokenizer = tokenizer_of(CHATML)
    row = tokenised(tokenizer, WITH_TOOL, ALONE, prompt=[*PROMPT, turn("Well: ")])
    assert written(tokenizer, row, 0)[0].startswith(" Let me see.<call>")  # the prompt's white space is in its token
    assert tokenizer.decode(row["prompt_ids"]).endswith("assistant\nWell:")


FAMILIES = sorted(
    match[1] for name in vars(trl_templates) if (match := re.fullmatch(r"(\w+)_training_chat_template", name))
)
PICTURES = {"get", "idefics3", "llava_next", "smolvlm"}  # take no text alone; and a function


CONVERSATIONS = {"users": WITH_USER, "tool": WITH_TOOL, "calls alone": CALLS_ALONE, "in a row": IN_A_ROW}
ALTERNATE = {"cohere", "cohere2", "gemma", "gemma3"}  # user and assistant in turns, nothing else
NO_TOOLS = ALTERNATE | {"deepseek_r1_distill", "lfm2", "llama3", "phi3", "phi3_5", "qwen2_5_vl"}
REFUSED = {
    "users": set(),
    "tool": NO_TOOLS | {
        "gptoss", "muse_glimmer",  # leave out what is said before a call
        "diffusion_gemma",  # renders it behind the tool's result
    },
    "calls alone": NO_TOOLS | {"deepseekv3", "diffusion_gemma"},  # have another header for the second call
    "in a row": ALTERNATE | {"diffusion_gemma"},  # makes one turn of both
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in PICTURES])
def test_marks_and_rendering_with_and_without_each_turn_agree(family, monkeypatch):
    """For each family that TRL has a training template of; or the row is refused."""
    tokenizer = tokenizer_of(getattr(trl_templates, f"{family}_chat_template"))
    turns = turn_template(tokenizer)
    assert turns.marked
    assert (turns.template or tokenizer.chat_template) == getattr(trl_templates, f"{family}_training_chat_template")
    for name, completion in CONVERSATIONS.items():
        if family in REFUSED[name]:
            with pytest.raises(UserError):
                tokenised(tokenizer, completion, ALONE)
            continue
        found = []
        for own in (turns, TurnTemplate(turns.template, marked=False)):
            with monkeypatch.context() as patch:
                patch.setattr("nca_align.batching.row_tokens.turn_template", lambda _, own=own: own)
                found.append(tokenised(tokenizer, completion, ALONE))
        assert found[0] == found[1]
        texts = written(tokenizer, found[0], 0)
        turned = [message for message in completion if message["role"] == "assistant"]
        for message, text in zip(turned, texts, strict=True):
            assert message["content"] in text
            assert ("add" in text) == ("17" in text) == ("tool_calls" in message)
            headers = text.replace("<|user|>", "").replace(
                " to=user", ""
            )  # what the model writes as its end or address
            assert not re.search("user|assistant|Look again|TOOLRESULT", headers), text
