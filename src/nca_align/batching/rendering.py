"""From a row to token ids: the text of a prompt and of whole conversations, and the ids of such texts."""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from ..data.cleaning import REASONING, Prompt, clean_prompt, joined_messages, without_nulls
from ..errors import InvalidRowError, UserError, one_line
from .left_out import (
    call_arguments,
    calls_of,
    function_of,
    refuse_calls_left_out,
    refuse_left_out,
    shared_length,
    strings_in,
)

# What chat templates have; few of them name each. A `developer` they leave out, or print, unless they name it.
_ROLES = frozenset({"system", "user", "assistant", "tool"})


def prompt_ids(tokenizer, row: dict[str, Any]) -> list[int]:
    """Token ids of a row's prompt: as given, of text, or of messages with the generation prompt.

    Messages that end in an open turn have no generation prompt.

    Training has the same ones, as far as each of a row's conversations begins with them; where completions have several
    turns, another template may render its prompt, see `trajectories`.

    Raises:
        UserError: messages, and no chat template.
        InvalidRowError: the template doesn't render this row.
    """
    prompt = clean_prompt(row)
    if prompt.kind == "token ids":
        return list(prompt.content)
    return text_ids(tokenizer, [prompt_text(tokenizer, prompt)], [isinstance(prompt.content, str)])[0]


def prompt_text(tokenizer, prompt: Prompt, template: str | None = None) -> str:
    """The prompt as the model reads it; an assistant's turn at its end stays open, as in TRL's `data_utils`.

    `template` takes the place of the tokenizer's own.

    Raises:
        UserError: messages, and no chat template.
        InvalidRowError: the template refuses the prompt, or leaves out its system prompt, a call or a tool's result.
    """
    if isinstance(prompt.content, str):
        return prompt.content
    if tokenizer.chat_template is None:
        raise UserError(
            "`prompt` holds messages, but the tokenizer has no chat template to render them. Use a chat model, give "
            "the prompt as text, or set the tokenizer's `chat_template` to the one that the model was trained with."
        )
    opening: dict[str, Any] = {
        "add_generation_prompt": not prompt.continues,
        "continue_final_message": prompt.continues,
    }
    text = apply_template(tokenizer, prompt, prompt.content, template, "`prompt`", **opening)
    for message in prompt.content:
        content = message.get("content")
        role = message.get("role")
        if role in ("system", "developer") and isinstance(content, str) and content.strip() not in text:
            raise InvalidRowError(
                f"the chat template leaves out the {role} prompt of `prompt`, so it has no {role} role. Use a template "
                f"that has one, or put the {role} prompt into the first user turn",
                cause=f"{role} prompt left out by the chat template",
            )
    refuse_left_out(prompt.content, text, "`prompt`", context=True)
    render = partial(apply_template, tokenizer, prompt, template=template, **opening)
    refuse_calls_left_out(prompt.content, 0, text, render, "`prompt`")
    return text


def conversation_text(
    tokenizer, prompt: Prompt, completion: Any, template: str | None = None, where: str = "the conversation"
) -> str:
    """Prompt and completion as the model is trained on them: text ends in one EOS, messages as the template ends them.

    Raises:
        InvalidRowError: the template refuses the conversation; it begins with `where`.
    """
    if isinstance(prompt.content, str):
        eos = tokenizer.eos_token or ""
        return prompt.content + completion + ("" if completion.endswith(eos) else eos)
    return apply_template(tokenizer, prompt, joined_messages(prompt, completion), template, where)


def row_texts(tokenizer, prompt: Prompt, completions: Sequence[Any], template: str | None = None) -> list[str]:
    """The text of a prompt, and of the conversation with each of its completions.

    Raises:
        InvalidRowError: the template refuses one, or leaves out a part of it.
    """
    opening = prompt_text(tokenizer, prompt, template)
    texts = [opening]
    for k, completion in enumerate(completions):
        where = f"`completions[{k}]`"
        text = conversation_text(tokenizer, prompt, completion, template, where)
        if prompt.kind == "messages":
            refuse_left_out(without_nulls(completion), text[shared_length(opening, text) :], where)
            messages = joined_messages(prompt, completion)
            render = partial(apply_template, tokenizer, prompt, template=template)
            refuse_calls_left_out(messages, len(messages) - len(completion), text, render, where)
        texts.append(text)
    return texts


def has_literal_thought(
    tokenizer, prompt: Prompt, completions: Sequence[Any], texts: Sequence[str], template: str | None = None
) -> bool:
    """Whether a thought that stands in `content` is other text than one in the field that the template reads.

    Args:
        texts: of `row_texts`.
    """
    field = reasoning_field(tokenizer, template)
    if prompt.kind != "messages" or prompt.continues or field is None:
        return False
    for completion, text in zip(completions, texts[1:], strict=True):
        own, thoughts = [], []
        for message in without_nulls(completion):
            before, tag, after = str(message.get("content", "")).partition("</think>")
            if tag and message.get("role") == "assistant" and not REASONING.intersection(message):
                thoughts.append(before.strip().removeprefix("<think>").strip())
                message = message | {field: thoughts[-1], "content": after.strip()}
            own.append(message)
        if any(thoughts):
            with suppress(InvalidRowError):
                other = conversation_text(tokenizer, prompt, own, template)
                if all(thought in other for thought in thoughts) and "".join(other.split()) != "".join(text.split()):
                    return True
    return False


def reasoning_field(tokenizer, template: str | None = None) -> str | None:
    """The field of a message in which the chat template reads a thought."""
    text = template or (tokenizer.get_chat_template() if tokenizer.chat_template else "")
    named = (name for name in sorted(REASONING, key=len, reverse=True) if re.search(rf"[.'\"]{name}\b", text))
    return next(named, None)


def _refuse_unknown_role(tokenizer, messages: list[dict[str, Any]], where: str) -> None:
    """Refuse a role that no chat template need know, where this one doesn't name it: most print whatever they get."""
    templates = tokenizer.chat_template
    text = "".join(templates.values()) if isinstance(templates, dict) else templates
    for role in {str(message.get("role")) for message in messages} - _ROLES:
        if f"'{role}'" not in text and f'"{role}"' not in text:
            raise InvalidRowError(
                f"{where} has a message of the role {role!r}, which the chat template doesn't name. The model was "
                f"never trained on it. Use one of {', '.join(sorted(_ROLES))}, or a template that names it",
                cause="role unknown to the chat template",
            )


def _arguments_text(call: dict[str, Any]) -> str:
    """The arguments of a message's call as JSON text: as it stands, if it is text."""
    given = function_of(call).get("arguments") or {}
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


def _with_arguments(messages: list[dict[str, Any]], form: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """The messages with the arguments of their calls in a form."""

    def formed(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        function = function_of(call)
        own = function | {"arguments": form(call)}
        return own if function is call else call | {"function": own}

    return [
        message | {"tool_calls": list(map(formed, message["tool_calls"]))} if calls_of(message) else message
        for message in messages
    ]


def protocol_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as OpenAI's protocol has them: the arguments of calls as JSON text."""
    return _with_arguments(messages, _arguments_text)


def apply_template(
    tokenizer, prompt: Prompt, messages: list[dict[str, Any]], template: str | None = None, where: str = "", **how: Any
) -> Any:
    """Messages with the prompt's tools and arguments through `template`, or the tokenizer's own: text.

    The arguments of calls are objects, as transformers documents them and vLLM parses them. A template that refuses
    these gets them as JSON text: DeepSeek's join them to other texts. A null content beside calls is an empty one.

    Args:
        where: the messages, as the beginning of an error.
        **how: further arguments of `apply_chat_template`.

    Raises:
        InvalidRowError: the template refuses them.
    """
    _refuse_unknown_role(tokenizer, messages, where)
    how = {"tokenize": False} | ({} if template is None else {"chat_template": template}) | how
    calls = any(map(calls_of, messages))
    refusals = []
    for form in (call_arguments, _arguments_text) if calls else (call_arguments,):
        try:
            turns = [{"content": ""} | turn if calls_of(turn) else turn for turn in _with_arguments(messages, form)]
            return tokenizer.apply_chat_template(turns, tools=prompt.tools, **how, **prompt.arguments)
        except Exception as error:  # jinja's own errors, and whatever a template calls
            refusals.append(error)
    roles = ", ".join(str(message.get("role")) for message in messages)
    raise InvalidRowError(
        f"{where} can't be rendered by the chat template ({roles}): {one_line(refusals[0])[:300]}; use "
        "a template that can, or leave those turns out of the data",
        cause="refused by the chat template",
    ) from refusals[0]


def holds_typed_tokens(tokenizer, prompt: Prompt, completions: Sequence[Any]) -> bool:
    """Whether messages hold special tokens as text; a prompt of text may hold a template's own.

    Raises:
        InvalidRowError: one is an EOS within a completion, which the model would learn to end at.
    """
    if isinstance(prompt.content, str):
        return False
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = re.compile("|".join(map(re.escape, special)) or "(?!)").search
    for k, completion in enumerate(completions):
        if tokenizer.eos_token and any(tokenizer.eos_token in text for text in strings_in(completion)):
            raise InvalidRowError(
                f"`completions[{k}]` holds the token {tokenizer.eos_token!r} as text. This token ends a text, so the "
                "model would learn to end in the middle. Take it out: the chat template writes its own",
                cause="end token as text",
            )
    return any(map(found, strings_in([prompt.content, *completions])))


def adds_special_tokens(tokenizer, text: str) -> bool:
    """Whether the tokenizer is to add its special tokens to text that no template rendered: not before a BOS."""
    return not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))


def text_ids(tokenizer, texts: Sequence[str], plain: Sequence[bool]) -> list[list[int]]:
    """Token ids of texts that a chat template rendered, and of those that are `plain`.

    A plain text has the special tokens that the tokenizer puts in front, no second BOS, and no EOS of its own adding.
    """
    special = [own and adds_special_tokens(tokenizer, text) for text, own in zip(texts, plain, strict=True)]
    ids: list[list[int]] = [[] for _ in texts]
    for adding in set(special):  # one call for all texts of a kind
        places = [i for i, own in enumerate(special) if own is adding]
        found = tokenizer([texts[i] for i in places], add_special_tokens=adding, verbose=False)["input_ids"]
        for i, tokens in zip(places, found, strict=True):
            ids[i] = _without_added_eos(tokenizer, texts[i], tokens) if plain[i] else tokens
    return ids


def _without_added_eos(tokenizer, text: str, ids: list[int]) -> list[int]:
    """`ids` with as many EOS at their end as the text has: a prompt goes on, and a conversation has its own."""
    eos, ends = tokenizer.eos_token_id, 1
    while tokenizer.eos_token and text.endswith(tokenizer.eos_token * ends):
        ends += 1
    while ids[-ends:] == [eos] * ends:
        ids = ids[:-1]
    return ids
