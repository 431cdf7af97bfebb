"""Token ids of a prompt."""

import json
from typing import Any

from ..data.prompts import clean_messages
from ..errors import UserError, one_line


class PromptError(UserError):
    """One row can't be completed, whatever the others are."""


def as_object(value: str | dict | list | None) -> Any:
    """A column that holds JSON as text, or already the object."""
    return json.loads(value) if isinstance(value, str) else value


def prompt_ids(tokenizer, row: dict) -> list[int]:
    """Token ids of a row's prompt, as training renders it: with the generation prompt, or the text as it stands.

    Raises:
        UserError: messages, and no chat template.
        PromptError: the template refuses this row.
    """
    if isinstance(row["prompt"], str):
        return tokenizer(row["prompt"])["input_ids"]
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, but `prompt` holds messages; use a chat "
            "model, or prompts that are text"
        )
    messages = clean_messages(row["prompt"])
    opens = messages[-1]["role"] != "assistant"  # an assistant's turn at the end is one to go on with
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=as_object(row.get("tools")),
            add_generation_prompt=opens,
            continue_final_message=not opens,
            return_dict=False,
            **(as_object(row.get("chat_template_kwargs")) or {}),
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise PromptError(f"the chat template refuses `prompt` ({one_line(error)[:200]}); mend or remove it") from error
