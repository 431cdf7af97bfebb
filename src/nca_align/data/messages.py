"""Messages by other names, as {role, content}: ShareGPT's, its makers' roles, content in parts, older calls."""

from typing import Any

# ShareGPT's makers and those after them, such as FastChat's and LLaMA-Factory's; Llama 3's and OpenAI's first for tools
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "observation": "tool", "ipython": "tool", "function": "tool",
}  # fmt: skip
FUNCTION_CALL = "function_call"  # OpenAI's, before `tool_calls`
CONTEXT = {"system", "developer", "user", "tool"}  # roles of turns that the model doesn't write
_TEXTS = {"text", "input_text", "output_text"}  # OpenAI's types of parts that are text


def content_kind(value: Any) -> str:
    """What a prompt or a completion is: `text`, `token ids`, or else `messages`."""
    if isinstance(value, str):
        return "text"
    ids = isinstance(value, list) and bool(value) and isinstance(value[0], int) and not isinstance(value[0], bool)
    return "token ids" if ids else "messages"


def has_context(completion: Any) -> bool:
    """Whether a completion may hold tokens that the model didn't write: several turns, or one that isn't its own."""
    if content_kind(completion) != "messages":
        return False
    return len(completion) > 1 or completion[0].get("role") in CONTEXT


def plain_conversation(value: Any) -> Any:
    """A conversation with its messages as {role, content}; one message is a list of it. What can't be, is as it was."""
    if _is_message(value):
        value = [value]
    if not isinstance(value, list):
        return value
    return [_plain_message(item) if isinstance(item, dict) else item for item in value]


def plain_completions(values: Any) -> Any:
    """A row's `completions`, each as `plain_conversation` has it."""
    return [plain_conversation(value) for value in values] if isinstance(values, list) else values


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def resembles_message(value: Any) -> bool:
    """Whether a value is meant as a message, perhaps an incomplete one."""
    return isinstance(value, dict) and ("role" in value or {"from", "value"} <= value.keys())


def _plain_message(message: dict[str, Any]) -> dict[str, Any]:
    if {"from", "value"} <= message.keys():
        names = ("from", "value") if message.get("role") is None else ("role", "content")
        others = {key: item for key, item in message.items() if key not in ("role", "content", "from", "value")}
        message = {"role": message[names[0]], "content": message.get(names[1]), **others}
    role, content = message.get("role"), message.get("content")
    if isinstance(role, str) and role in ROLES:
        message = message | {"role": ROLES[role]}
    if isinstance(content, list) and other_part(content) is None:
        message = message | {"content": "".join(part["text"] for part in content)}
    if FUNCTION_CALL in message:
        function = message[FUNCTION_CALL]
        message = {key: item for key, item in message.items() if key != FUNCTION_CALL}
        if function and not message.get("tool_calls"):
            message["tool_calls"] = [{"type": "function", "function": function}]
    return message


def other_part(content: list) -> str | None:
    """The type of the first part of a message that is no text, or what it is; None where all are text."""
    for part in content:
        kind = str(part.get("type", "text") if isinstance(part, dict) else type(part).__name__)
        if kind not in _TEXTS:
            return kind
        if not isinstance(part.get("text"), str):
            return f"{kind} without text"
    return None
