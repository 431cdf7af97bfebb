"""Calls of tools: their arguments as an object or as JSON text are the same row, and none is left out unsaid."""

import json
import re
from functools import partial

import pytest
import trl.chat_template_utils as trl_templates
from datasets import Dataset

from nca_align.batching.rendering import protocol_messages
from nca_align.batching.tokenization import tokenize_dataset
from nca_align.errors import UserError
from test_trajectories import ALONE, CHATML, PROMPT, tokenised, tokenizer_of, turn

TEMPLATES = {
    match[1]: template
    for name, template in vars(trl_templates).items()
    if (match := re.fullmatch(r"(\w+)_chat_template", name)) and isinstance(template, str)
}


def calling(arguments, content: str = "", **more) -> dict:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return turn(content, tool_calls=[call], **more)


def outcome(template: str, prompt: list, *completions) -> dict | str:
    """The row's tokens, or why it is refused."""
    try:
        return tokenised(tokenizer_of(template), *completions, prompt=prompt)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("family", [
    "qwen2_5", "llama3_1", "glm4moe", "gptoss", "deepseekv3",
    pytest.param("all", marks=pytest.mark.slow),
])  # fmt: skip
def test_arguments_as_json_text_are_those_as_an_object(family):
    """A template may write text as one quoted string, join it, or refuse it."""
    arguments = {"a": 17, "say": 'a "b"\nc', "é": "ü"}
    asked = [*PROMPT, calling(arguments), turn("42", "tool", name="add")]
    for template in TEMPLATES.values() if family == "all" else [TEMPLATES[family]]:
        for prompt in (PROMPT, asked):
            found = []
            for form in (dict, partial(json.dumps, ensure_ascii=False)):
                own = [turn | calling(form(arguments)) if "tool_calls" in turn else turn for turn in prompt]
                found.append(outcome(template, own, [calling(form({"a": 17, "say": 'a "b"\nc'}))], ALONE))
            if family != "all":
                assert "17" in tokenizer_of(template).decode(found[0]["completion_ids"][0])
            assert found[0] == found[1]


@pytest.mark.parametrize("given", [None, "", "{}", {}])
def test_a_call_without_arguments_has_an_empty_object(given):
    assert outcome(CHATML, PROMPT, [calling(given)], ALONE) == outcome(CHATML, PROMPT, [calling({})], ALONE)
    assert "add{}" in tokenizer_of(CHATML).decode(outcome(CHATML, PROMPT, [calling(given)], ALONE)["completion_ids"][0])


@pytest.mark.parametrize("calls", ["add", ["add"], [{"function": "add", "arguments": {}}], [{}], {"name": "add"}])
def test_calls_that_are_none_are_refused_in_one_sentence(calls):
    prompt = [*PROMPT, turn("", tool_calls=calls), turn("42", "tool")]
    for row in ((PROMPT, [turn("", tool_calls=calls)]), (prompt, ALONE)):
        assert "can't be rendered by the chat template" in outcome(TEMPLATES["llama3_1"], *row, ALONE)
    assert len(protocol_messages(prompt)[1]["tool_calls"]) == len(calls)


def test_a_null_argument_stays_in_json_text():
    """A table gives each object the keys of all with nulls in them, so that nulls of an object are left out."""
    row = outcome(CHATML, PROMPT, [calling('{"a": null}')], ALONE)
    assert 'add{"a": null}' in tokenizer_of(CHATML).decode(row["completion_ids"][0])


NO_CALLS = CHATML.replace("m.tool_calls or []", "[]")
NO_NUMBERS = CHATML.replace("call.function.arguments | tojson", "call.function.arguments | list")
NO_RESULTS = CHATML.replace("messages %}", "messages if m.role != 'tool' %}")
LEFT_OUT = "`completions[0]` turn 0 has `%s`, which the chat template leaves out"
ASKED = [*PROMPT, calling({"a": 0}), turn("TOOLRESULT", "tool")]


@pytest.mark.parametrize(("template", "prompt", "completion", "said"), [
    (NO_CALLS, PROMPT, calling({"a": 17}), LEFT_OUT % "tool_calls"),
    # what the prompt says is no part of the completion
    (NO_CALLS, [turn("Please add 17 to a.", "user")], calling({"a": 17}), LEFT_OUT % "tool_calls"),
    (NO_NUMBERS, PROMPT, calling({"a": 17}), LEFT_OUT % "tool_calls"),
    (NO_NUMBERS, PROMPT, calling({"a": 17}, "Not 170, 1.17 or 17.5."), LEFT_OUT % "tool_calls"),
    (CHATML, PROMPT, turn("It is 42.", reasoning_content="CARRY"), LEFT_OUT % "reasoning_content"),
    (CHATML.replace("m.content }}", "m.content.split('</think>')[-1] }}"), PROMPT,
     turn("<think>CARRY</think>It is 42."), LEFT_OUT % "content"),
    (CHATML.replace("{{ m.content }}", ""), PROMPT, turn("It is 42."), "turn 0 has `content`, which"),
    (NO_CALLS, ASKED, turn("It is 42."), "`prompt` turn 1 has `tool_calls`, which the chat template leaves out"),
    (NO_RESULTS, ASKED, turn("It is 42."), "`prompt` turn 2 has `content`, which the chat template leaves out"),
    (CHATML.replace("{{ m.role }}", "{{ m.role }}{{ raise_exception('no!') if m.reasoning }}"), PROMPT,
     turn("It is 42.", reasoning="CARRY"), "`completions[0]` can't be rendered by the chat template (user, assistant)"),
])  # fmt: skip
def test_a_completion_of_one_turn_of_which_the_template_leaves_out_a_part_is_refused(
    template, prompt, completion, said
):
    """Else two completions might be the same tokens with two rewards."""
    assert said in outcome(template, prompt, [completion], ALONE)


@pytest.mark.parametrize("value", [17, 2.5, -3, 1e-7, 1e10, True, [1, 2], 'é\n"x"', "C:\\x", {"in": [0.1]}])
@pytest.mark.parametrize("family", ["qwen2_5", "lfm2_v2", "deepseekv3"])
def test_what_the_template_writes_of_arguments_is_found_there(family, value):
    assert isinstance(outcome(TEMPLATES[family], PROMPT, [calling({"v": value})], ALONE), dict)
    prompt = [*PROMPT, turn("I add ")]
    assert isinstance(outcome(CHATML, prompt, [calling({"v": value}, "17 to 25.")], ALONE), dict)


@pytest.mark.parametrize("family", ["deepseekv3", "qwen3"])
def test_null_content_beside_calls_is_an_empty_one(family):
    null, empty = calling("{}", content=None), calling("{}")
    result = turn("42", "tool", name="add")
    for prompt in (PROMPT, [*PROMPT, null, result]):
        found = outcome(TEMPLATES[family], prompt, [null], ALONE)
        assert isinstance(found, dict)
        own = [empty if message is null else message for message in prompt]
        assert found == outcome(TEMPLATES[family], own, [empty], ALONE)


@pytest.mark.parametrize("given", ['{"n": 2.50}', '{"n": 1e-7}', r'{"p": "a\/b \u003c"}'])
def test_arguments_that_the_template_prints_as_they_stand_are_there(given):
    row = outcome(TEMPLATES["deepseekv3"], PROMPT, [calling(given)], ALONE)
    assert given in tokenizer_of(TEMPLATES["deepseekv3"]).decode(row["completion_ids"][0])


FIRST_CALL = CHATML.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")


@pytest.mark.parametrize(("template", "own"), [
    (NO_CALLS, calling({}, "I call add now.")),
    (FIRST_CALL, calling({"a": 1}) | {"tool_calls": calling({"a": 1})["tool_calls"] * 2}),
])  # fmt: skip
def test_a_call_whose_words_stand_elsewhere_is_missed_all_the_same(template, own):
    assert isinstance(outcome(CHATML, PROMPT, [own], ALONE), dict)
    for completion in ([own], [own, turn("42", "tool"), *ALONE]):
        assert LEFT_OUT % "tool_calls" in outcome(template, PROMPT, completion, ALONE)
    said = outcome(template, [*PROMPT, own, turn("42", "tool")], ALONE, ALONE)
    assert "`prompt` turn 1 has `tool_calls`, which the chat template leaves out" in said


@pytest.mark.parametrize("thought", ["<think>\nCARRY\n</think>\n\n", "CARRY</think>"])
def test_reasoning_that_the_own_template_drops_is_kept_by_trls_training_template(thought):
    """DeepSeek-R1's cuts all in front of `</think>`, since it is made for earlier turns."""
    tokenizer = tokenizer_of(TEMPLATES["deepseek_r1_distill"])
    whole = tokenizer.apply_chat_template([*PROMPT, turn(thought + "42")], tokenize=False)
    assert "CARRY" not in whole  # the own one does drop it
    row, plain = (tokenised(tokenizer, [turn(text + "42")], ALONE) for text in (thought, ""))
    assert thought.strip() + ("\n\n42" if "\n" in thought else "42") in tokenizer.decode(row["completion_ids"][0])
    for name in ("prompt_ids", "completion_mask"):
        assert row[name] == plain[name]
    assert row["completion_ids"][1] == plain["completion_ids"][1]
    earlier = [turn("Hi", "user"), turn(thought + "Yes"), *PROMPT]  # the training template has another prompt here
    assert ", which the chat template leaves out" in outcome(
        TEMPLATES["deepseek_r1_distill"], earlier, [turn(thought + "42")], ALONE
    )


@pytest.mark.parametrize(("family", "field"), [
    ("qwen3", None), ("qwen2_5", None), ("qwen3_8", "reasoning_content"), ("gptoss", "thinking"),
])  # fmt: skip
def test_a_thought_that_the_template_prints_as_literal_text_is_told(family, field):
    """Qwen3's reads it, Qwen2.5's has no thoughts, and the others write their own beside it."""
    if family not in TEMPLATES:
        pytest.skip(f"this TRL has no template of {family}")
    tokenizer = tokenizer_of(TEMPLATES[family])
    thoughts = [[turn("<think>\nCARRY\n</think>\n\nIt is 42.")], [turn("<think>CARRY</think>It is 42.")]]
    row = {"prompt": PROMPT, "completions": [*thoughts, ALONE], "rewards": [2.0, 1.0, 0.0]}
    _, notices = tokenize_dataset(Dataset.from_list([row]), tokenizer, None, None)
    told = [notice for notice in notices if "`<think>` in `content`" in notice]
    assert [f"`{field}`" in notice for notice in told] == [True] * (field is not None)
    own = [turn("It is 42.", **{field or "reasoning_content": "CARRY"})]
    if field:  # what the notice says to do ends it
        assert tokenised(tokenizer, own, ALONE)["literal_thoughts"] == 0
