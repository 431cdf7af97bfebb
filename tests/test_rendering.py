"""From a row to a prompt: the same ids in training, sampling and evaluation, the same messages elsewhere."""

import inspect
import json
import re
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerBase

from conftest import build_tokenizer
from nca_align import GenerationEvaluator
from nca_align.batching.rendering import prompt_ids
from nca_align.batching.tokenization import tokenize_rows
from nca_align.commands.evaluate.reward_and_kl import sampled_ids
from nca_align.commands.sample import server
from nca_align.commands.sample.local_engines import prompt_reader
from nca_align.commands.sample.options import SampleOptions
from nca_align.data.cleaning import RESERVED, clean_prompt
from nca_align.errors import InvalidRowError, UserError
from nca_align.rewards.reward_models import model_scorer
from nca_align.rewards.sequence_classifiers import SequenceClassifier

# As templates of today's models: BOS, tools and arguments, and thoughts that are taken out of earlier turns.
THINKING = (
    "{{ bos_token }}{% if tools %}[{{ tools | tojson }}]{% endif %}{% if loud %}LOUD{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['reasoning_content'] %}<think>{{ m['reasoning_content'] }}</think>{% endif %}"
    "{% if loop.last or not m['content'] %}{{ m['content'] }}"
    "{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% for m in messages if m['role'] != 'system' %}" + THINKING.split("{% for m in messages %}")[1]


def tokenizer_of(kind: str):
    tokenizer = build_tokenizer({"plain": None, "thinking": THINKING, "no system": NO_SYSTEM}.get(kind, THINKING))
    if kind == "adds BOS and EOS":
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "<|im_end|>")]
        both = TemplateProcessing(single="<s> $A <|im_end|>", special_tokens=special)
        tokenizer.backend_tokenizer.post_processor = both
    return tokenizer


def turns(*contents: str, first: str = "user") -> list[dict]:
    roles = ("user", "assistant") if first == "user" else ("system", "user", "assistant")
    return [{"role": roles[i % len(roles)], "content": content} for i, content in enumerate(contents)]


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
NULL_CALL = [
    {"type": "function", "id": None, "function": {"name": "weather", "arguments": {"city": "Rome", "day": None}}}
]
ASKED = [*turns("Hi"), {"role": "assistant", "tool_calls": CALL}, {"role": "tool", "content": "Sunny"}]
NULL_ASKED = [*turns("Hi"), {"role": "assistant", "content": None, "tool_calls": NULL_CALL, "name": None},
              {"role": "tool", "content": "Sunny", "tool_calls": None}]  # fmt: skip
REASONED = [*turns("Hi"), {"role": "assistant", "reasoning_content": "Hm.", "content": "The quick"}]

# kind → the row, and what it must come to beside `prompt`: other content, tools, arguments, or the error
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any] | str]] = {
    "text": ({"prompt": "A question:"}, {}),
    "text that begins with BOS": ({"prompt": "<s>A question:"}, {}),
    "text that ends in a space": ({"prompt": "A question: "}, {}),
    "text in other letters": ({"prompt": "Ça va? 你好 😀"}, {}),
    "messages": ({"prompt": turns("Hi")}, {}),
    "messages in other letters": ({"prompt": turns("Ça va? 你好 😀")}, {}),
    "a system prompt": ({"prompt": turns("Be kind.", "Hi", first="system")}, {}),
    "several turns": ({"prompt": turns("Hi", "Hello", "What now?")}, {}),
    "thoughts in an earlier turn": ({"prompt": turns("Hi", "<think>Hm.</think>Hello", "What now?")}, {}),
    "an assistant's turn at the end": ({"prompt": turns("Hi", "The quick")}, {}),
    "an empty assistant's turn at the end": ({"prompt": turns("Hi", "")}, {}),
    "an assistant's turn with a space at its end": ({"prompt": turns("Hi", "The quick ")}, {}),
    "an assistant's turn with its reasoning": ({"prompt": REASONED}, {}),
    "an assistant's call of a tool at the end": (
        {"prompt": ASKED[:2]},
        r"`prompt` ends in an assistant's turn with `tool_calls` or without text",
    ),
    "a tool's turn at the end": ({"prompt": ASKED}, {}),
    "no content": ({"prompt": turns("")}, {}),
    "null keys in messages": ({"prompt": NULL_ASKED}, {"content": ASKED}),
    "tools": ({"prompt": turns("Hi"), "tools": TOOLS}, {"tools": TOOLS}),
    "tools as text": ({"prompt": turns("Hi"), "tools": json.dumps(TOOLS)}, {"tools": TOOLS}),
    "null keys in tools": (
        {"prompt": turns("Hi"), "tools": [TOOLS[0] | {"strict": None}]}, {"tools": TOOLS},
    ),
    "an empty list of tools": ({"prompt": turns("Hi"), "tools": []}, {}),
    "no tools as text": ({"prompt": turns("Hi"), "tools": " "}, {}),
    "tools that are no JSON": ({"prompt": turns("Hi"), "tools": "["}, "`tools` is not readable JSON"),
    "arguments": ({"prompt": turns("Hi"), "chat_template_kwargs": {"loud": True}}, {"arguments": {"loud": True}}),
    "arguments as text": ({"prompt": turns("Hi"), "chat_template_kwargs": '{"loud": 1}'}, {"arguments": {"loud": 1}}),
    "null arguments": ({"prompt": turns("Hi"), "chat_template_kwargs": {"loud": None, "bos_token": None}}, {}),
    "no arguments": ({"prompt": turns("Hi"), "chat_template_kwargs": None}, {}),
    "arguments that are a list": ({"prompt": turns("Hi"), "chat_template_kwargs": "[1]"}, "`chat_template_kwargs` is"),
    "another template": (
        {"prompt": turns("Hi"), "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        "`chat_template_kwargs` holds `chat_template`, which the library itself sets",
    ),
    "a null template": ({"prompt": turns("Hi"), "chat_template_kwargs": {"chat_template": None}}, {}),
    "tools among the arguments": (
        {"prompt": turns("Hi"), "chat_template_kwargs": {"tools": TOOLS}}, "holds `tools`",
    ),
}  # fmt: skip
# what is another with some tokenizers
OTHERWISE = {
    ("no system", "a system prompt"): "the chat template leaves out the system prompt",
    **{("plain", kind): "the tokenizer has no chat template" for kind, (row, expected) in ROWS.items()
       if not isinstance(row["prompt"], str) and not isinstance(expected, str)},
}  # fmt: skip
BY_TOKENIZER = [
    (tokenizer, kind) for tokenizer in ("thinking", "plain", "no system", "adds BOS and EOS") for kind in ROWS
]


def completions(prompt) -> list:
    texts = ("yes and no", "brown fox")
    return list(texts) if isinstance(prompt, str) else [[{"role": "assistant", "content": text}] for text in texts]


def joined(content, completion):
    """The whole conversation, with one turn where the completion is the rest of the prompt's last."""
    if isinstance(content, str):
        return content + completion
    if content[-1]["role"] != "assistant":
        return content + completion
    return [*content[:-1], {**content[-1], "content": content[-1]["content"] + completion[0]["content"]}]


def expected_of(tokenizer: str, kind: str) -> tuple[dict, dict]:
    """The row with completions, and what it comes to; where it is refused, only after checking that."""
    row, expected = ROWS[kind]
    row = row | {"completions": completions(row["prompt"]), "rewards": [0.0, 1.0]}
    expected = OTHERWISE.get((tokenizer, kind), expected)
    if isinstance(expected, str):
        return row, {"error": expected}
    return row, {"content": row["prompt"], "tools": None, "arguments": {}} | expected


def trained(tokenizer, row: dict) -> dict:
    columns = {name: [value] for name, value in row.items()}
    found = tokenize_rows(columns, [7], tokenizer, None, None, "length")
    return {name: values[0] for name, values in found.items()}


def sampled(tokenizer, row: dict, model_dir: str) -> list[int]:
    options = SampleOptions(dataset_name="x", output="x", model_name_or_path=model_dir)
    found = prompt_reader(options, tokenizer)(row)
    if isinstance(found, InvalidRowError):
        raise found
    return found


WAYS = {
    "sampling": sampled,
    "evaluation during training": lambda tokenizer, row, _: GenerationEvaluator([row], tokenizer, len)._prompts[0],
    "evaluation of samples": lambda tokenizer, row, _: sampled_ids(tokenizer, row, 0)["prompt_ids"],
}


@pytest.mark.parametrize(("name", "kind"), BY_TOKENIZER)
def test_training_sampling_and_evaluation_have_the_same_ids(name, kind, model_dir):
    tokenizer = tokenizer_of(name)
    row, expected = expected_of(name, kind)
    if "error" in expected:
        with pytest.raises(UserError, match=f"Row 7: .*{re.escape(expected['error'])}"):
            trained(tokenizer, row)
        for ids_of in WAYS.values():
            with pytest.raises(UserError, match=re.escape(expected["error"])):
                ids_of(tokenizer, row, model_dir)
        return
    content = expected["content"]
    if isinstance(content, str):
        ids = tokenizer(content.removeprefix("<s>"), add_special_tokens=False)["input_ids"]
        begins = name == "adds BOS and EOS" or content.startswith("<s>")
        ids = [tokenizer.bos_token_id] * begins + ids
    else:
        rest = content[-1]["role"] == "assistant"
        ids = tokenizer.apply_chat_template(
            content, tools=expected["tools"], add_generation_prompt=not rest, continue_final_message=rest,
            return_dict=False, **expected["arguments"],
        )  # fmt: skip
        assert ids.count(tokenizer.bos_token_id) == (name != "no system")
    for ids_of in WAYS.values():
        assert ids_of(tokenizer, row, model_dir) == ids
    found = trained(tokenizer, row)
    assert found["prompt_ids"] == ids[: len(ids) - found["boundary_tokens"]]
    assert found["boundary_tokens"] <= (1 if kind.endswith(("in a space", "space at its end")) else 0)
    for completion, rest in zip(row["completions"], found["completion_ids"], strict=True):
        whole = joined(content, completion)
        if isinstance(whole, str):
            text = whole + "<|im_end|>"
        else:
            text = tokenizer.apply_chat_template(
                whole, tools=expected["tools"], tokenize=False, **expected["arguments"]
            )
        assert (
            tokenizer.decode(found["prompt_ids"] + rest)
            == "<s>" * (isinstance(content, str) and begins and not content.startswith("<s>")) + text
        )


@pytest.fixture(scope="module")
def scorer_dir(tmp_path_factory) -> str:
    tokenizer = tokenizer_of("adds BOS and EOS")
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_labels=1,
            num_attention_heads=2, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("scorer")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def score(scorer_dir):
    return model_scorer(scorer_dir, None, False, 4)


@pytest.mark.parametrize("kind", ROWS)
def test_a_reward_model_reads_the_same_conversation(kind, score, monkeypatch):
    row, expected = expected_of("thinking", kind)
    rendered, read = [], []
    template, outputs = PreTrainedTokenizerBase.apply_chat_template, SequenceClassifier.outputs
    monkeypatch.setattr(
        PreTrainedTokenizerBase, "apply_chat_template",
        lambda self, messages, **given: rendered.append((messages, given)) or template(self, messages, **given),
    )  # fmt: skip
    monkeypatch.setattr(SequenceClassifier, "outputs", lambda self, rows: read.extend(rows) or outputs(self, rows))
    arguments = ([row] * 2, row["completions"])
    if "error" in expected:
        with pytest.raises(InvalidRowError, match=re.escape(expected["error"])):
            score(*arguments)
        return
    assert len(score(*arguments)) == 2
    if isinstance(row["prompt"], str):
        assert [(inputs["input_ids"].index(1), inputs["input_ids"].count(1)) for inputs in read] == [(0, 1)] * 2
        return
    wanted = [joined(expected["content"], completion) for completion in row["completions"]]
    assert [messages for messages, _ in rendered] == [
        [{"content": ""} | message if "tool_calls" in message else message for message in own] for own in wanted
    ]
    for _, given in rendered:
        assert given == {"tools": expected["tools"], "tokenize": False, **expected["arguments"]}


@pytest.mark.parametrize("kind", ROWS)
def test_a_server_is_asked_for_the_same_prompt(kind, monkeypatch):
    row, expected = expected_of("thinking", kind)
    bodies = []

    def ask(self, path, body, read):
        bodies.append(body)
        return read({"choices": [{"text": "a", "message": {"content": "a"}}]})

    monkeypatch.setattr(server.Client, "ask", ask)
    options = SampleOptions(
        dataset_name="x", output="x", base_url="http://x", num_completions=1, model_name_or_path="m"
    )
    engine = server.server_engine(options, "m")
    if "error" in expected:
        (failed,) = engine(options, 0, {0: row}, lambda done: None).values()
        assert isinstance(failed, InvalidRowError)
        assert expected["error"] in str(failed)
        assert not bodies
        return
    engine(options, 0, {0: row}, lambda done: None)
    (body,) = bodies
    content = expected["content"]
    if isinstance(content, list):  # OpenAI's protocol has arguments as JSON text
        content = json.loads(json.dumps(content).replace('{"city": "Rome"}', json.dumps('{"city": "Rome"}')))
    assert body.get("messages" if isinstance(content, list) else "prompt") == content
    rest = not isinstance(content, str) and content[-1]["role"] == "assistant"
    named = {"tools": expected["tools"], "chat_template_kwargs": expected["arguments"]}
    told = {name: value for name, value in named.items() if value}
    if rest:
        told |= {"add_generation_prompt": False, "continue_final_message": True}
    known = ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
    assert {name: body[name] for name in known if name in body} == told


def test_what_transformers_is_told_is_reserved():
    """A new argument of `apply_chat_template` must not become one that a row can set."""
    names = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    assert names - {"self", "documents", "kwargs"} <= RESERVED


@pytest.mark.parametrize(
    "first",
    [
        {"role": "tool", "content": "Sunny"},
        {"role": "assistant", "reasoning_content": "Hm.", "content": "brown"},
        {"role": "assistant", "content": [{"type": "text", "text": "brown"}]},
    ],
)
def test_a_completion_that_can_not_continue_the_prompt(first):
    row = {"prompt": turns("Hi", "The quick"), "completions": [[first], *completions([])], "rewards": [0.0, 1.0, 2.0]}
    with pytest.raises(UserError, match="Row 7: `completions` must continue the assistant's turn that ends `prompt`"):
        trained(tokenizer_of("thinking"), row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": None}, "`prompt` is None; it must be text or a list of messages"),
        ({"prompt": []}, r"`prompt` is \[\]; it must be text or a list of messages"),
        ({"prompt": "Hi", "tools": "5"}, "`tools` is 5; it must be a list of tools"),
        ({"prompt": "Hi", "tools": '{"type": "function"}'}, "`tools` is {'type': 'function'}; it must be a list"),
    ],
)
def test_a_row_that_is_none_is_refused_by_its_field(row, message):
    with pytest.raises(UserError, match=message):
        clean_prompt(row)


def test_a_text_keeps_each_eos_that_it_ends_in():
    tokenizer = build_tokenizer()
    ends = [tokenizer.eos_token_id] * 2
    assert prompt_ids(tokenizer, {"prompt": f"Hi{tokenizer.eos_token * 2}"})[-2:] == ends


def test_a_reward_model_refuses_a_row_as_training_does(score):
    row = {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}
    with pytest.raises(InvalidRowError, match="the conversation can't be rendered by the chat template"):
        score([row], [[{"role": "assistant", "content": "Yes."}]])


def test_a_completion_may_end_the_turn_with_a_call_of_a_tool():
    calling = [{"role": "assistant", "content": " I look it up.", "tool_calls": CALL}]
    row = {"prompt": turns("Hi", "Wait:"), "completions": [calling, *completions([])], "rewards": [0.0, 1.0, 2.0]}
    tokenizer = tokenizer_of("thinking")
    found = trained(tokenizer, row)
    text = tokenizer.decode(found["completion_ids"][0])
    assert text.startswith(" I look it up.[{")
    assert tokenizer.decode(found["prompt_ids"]).endswith("assistant\nWait:")
