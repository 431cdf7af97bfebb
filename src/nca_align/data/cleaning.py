"""What a row says of its prompt, cleaned: one way for training, sampling, scoring, evaluation and servers."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from .messages import content_kind
from .schema import PROMPT_COLUMNS
from .validation import RowError

# Arguments of transformers' `apply_chat_template` that say how it is called. Its `documents` are the template's own.
RESERVED = frozenset({
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "conversations", "max_length",
    "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens",
    "tokenize", "tokenizer_kwargs", "tools", "truncation",
})  # fmt: skip
# Fields of a message that a template puts before `content`.
REASONING = {"reasoning_content", "reasoning", "thinking"}


class Prompt(NamedTuple):
    """A row's prompt, and what its messages are rendered with.

    Args:
        content: text, messages, or token ids.
        tools: JSON schemas of the tools, or None.
        arguments: further arguments of the chat template.
    """

    content: Any
    tools: list[dict[str, Any]] | None
    arguments: dict[str, Any]

    @property
    def continues(self) -> bool:
        """Whether it ends in an assistant's turn: a completion is the rest of that turn."""
        return self.kind == "messages" and self.content[-1].get("role") == "assistant"

    @property
    def kind(self) -> str:
        """`text`, `messages` or `token ids`."""
        return content_kind(self.content)


def clean_prompt(row: Mapping[str, Any]) -> Prompt:
    """A row's `prompt`, `tools` and `chat_template_kwargs`, from objects or from JSON text, without null values.

    Raises:
        RowError: unreadable JSON, arguments that are no object, a reserved one, or an assistant's turn at the end that
            can't be continued.
    """
    if not row["prompt"] and row["prompt"] != "":
        raise RowError("prompt", "empty prompt", f"is {row['prompt']!r}; it must be text or a list of messages")
    tools, arguments = (_read_json(row.get(name), name) for name in PROMPT_COLUMNS)
    if not isinstance(tools, (list, type(None))):
        raise RowError("tools", "wrong type", f"is {tools!r}; it must be a list of tools, a JSON schema each")
    if not isinstance(arguments, (dict, type(None))):
        raise RowError("chat_template_kwargs", "wrong type", f"is {arguments!r}; it must map names to values")
    if reserved := RESERVED.intersection(arguments or {}):
        raise RowError(
            "chat_template_kwargs",
            "reserved argument",
            f"holds `{min(reserved)}`, which the library itself sets; leave it out",
        )
    prompt = Prompt(without_nulls(row["prompt"]), tools or None, arguments or {})
    if prompt.continues:
        last = prompt.content[-1]
        if not isinstance(last.get("content"), str) or last.get("tool_calls"):
            raise RowError(
                "prompt",
                "turn that can't be continued",
                "ends in an assistant's turn with `tool_calls` or without text, which no completion can continue. End "
                "it in the turn before or after",
            )
    return prompt


def _read_json(value: Any, name: str) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise RowError(name, "unreadable JSON", f"is not readable JSON ({error})") from None
    return without_nulls(value)


def without_nulls(value: Any) -> Any:
    """`value` without the empty keys that a table gives each object: those that another row's object has."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def joined_messages(prompt: Prompt, completion: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of both; a completion that continues the prompt's last turn stands in one turn with it.

    Raises:
        RowError: the completion begins with what can't continue that turn.
    """
    messages, completion = list(prompt.content), without_nulls(completion)
    if prompt.continues:
        last, first = messages.pop(), completion[0]
        text = first.get("content", "")
        if first.get("role") != "assistant" or REASONING.intersection(first) or not isinstance(text, str):
            raise RowError(
                "completions",
                "turn that doesn't continue the prompt's",
                "must continue the assistant's turn that ends `prompt`. Begin with an assistant's message of text, "
                "without a field of its own for reasoning",
            )
        completion[0] = {**last, **first, "content": last["content"] + text}
    return messages + completion


def completion_of(prompt: str | list[dict[str, Any]], text: str) -> str | list[dict[str, Any]]:
    """`text` as a completion of the prompt's kind."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def text_of(completion: str | list[dict]) -> str:
    """A completion's text: itself, what its messages say, or its token ids as numbers."""
    if isinstance(completion, str):
        return completion
    if content_kind(completion) == "token ids":
        return " ".join(map(str, completion))
    return "\n".join(message.get("content") or "" for message in completion)
