"""Rows of `prompt, completions, rewards` → `prompt_ids, completion_ids, rewards`, a prompt's ids once for all K."""

import json
import logging
import sys
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from ..config import NCAConfig, prompt_limit
from ..errors import UserError
from ..store.fingerprints import derived_fingerprint

logger = logging.getLogger("nca_align")

# Counts beside the ids, one number a row, which the trainer adds up, reports and drops
CUT_COLUMNS = ("prompt_cut", "completions_cut", "boundary_tokens")


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None,
    max_length: int | None,
    length_column: str,
    num_proc: int | None = None,
    name: str = "train",
) -> tuple[Dataset | IterableDataset, list[str]]:
    """`tokenize_rows` over a data set, cached on disk where its rows are; and a sentence on each thing that was cut."""
    if max_prompt_length is not None:
        prompt_limit(max_prompt_length, max_length)  # the config's own check may have seen other values
    limits: dict[str, Any] = {
        "max_prompt_length": max_prompt_length, "max_length": max_length, "length_column": length_column,
    }  # fmt: skip
    function = partial(tokenize_rows, tokenizer=tokenizer, **limits)
    if isinstance(dataset, IterableDataset):
        dataset = dataset.map(function, batched=True, batch_size=64, with_indices=True)
        return dataset.remove_columns(list(CUT_COLUMNS)), []
    options: dict[str, Any] = {}
    if hasattr(tokenizer, "backend_tokenizer"):  # a hash of what decides the ids, steady from process to process
        state = (
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.chat_template,
            tokenizer.bos_token,
            tokenizer.eos_token,
        )
        options["new_fingerprint"] = derived_fingerprint("nca_align tokens 2", dataset, state, limits)
    try:
        dataset = dataset.map(
            function,
            batched=True,
            batch_size=64,
            with_indices=True,
            num_proc=num_proc,
            desc=f"Tokenizing {name}",
            **options,
        )
    except ValueError as error:
        if (text := str(error)).startswith(
            "Row "
        ):  # also from a worker process: raised here, it is told in one sentence
            raise UserError(text.replace(":", f" of `{name}`:", 1)) from error
        raise
    cut = {column: sum(dataset[column]) for column in CUT_COLUMNS}
    notices = []
    if cut["boundary_tokens"]:
        notices.append(
            f"`{name}`: the tokenised prompt is not the beginning of every tokenised conversation (its chat template "
            "renders it differently alone, or tokens merge across the boundary): completions start where they diverge, "
            f"and {cut['boundary_tokens'] / len(dataset):.2f} tokens a prompt are left out."
        )
    if cut["prompt_cut"] or cut["completions_cut"]:
        notices.append(
            f"`{name}`: {cut['prompt_cut']} of {len(dataset)} prompts cut to their last {max_prompt_length} tokens "
            f"(`max_prompt_length`), {cut['completions_cut']} completions at {max_length} (`max_length`)."
        )
    return dataset.remove_columns(list(CUT_COLUMNS)), notices


def rows_that_fit(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: NCAConfig, name: str = "train"
) -> Dataset:
    """The rows of which nothing would be cut by `max_prompt_length` and `max_length`, and in the log how many others.

    NCATrainer cuts a prompt's beginning, TRL's trainers a conversation's end: of these all see the same tokens.

    Raises:
        ValueError: there is none.
    """
    limits = prompt_limit(args.max_prompt_length, args.max_length), args.max_length
    whole: Any = tokenize_dataset(dataset, tokenizer, None, None, "length", name=name)[0]
    most_of_prompt, most = (limit if limit is not None else sys.maxsize for limit in limits)
    kept = [
        i for i, (prompt, completions) in enumerate(zip(whole["prompt_ids"], whole["completion_ids"], strict=True))
        if len(prompt) <= most_of_prompt and len(prompt) + max(map(len, completions)) <= most
    ]  # fmt: skip
    if not kept:
        raise UserError(
            f"every prompt of `{name}` is longer than `max_prompt_length` {limits[0]}, or with a completion than "
            f"`max_length` {limits[1]}; raise them"
        )
    if len(kept) < len(dataset):
        logger.warning(
            "%d of %d prompts of `%s` are left out, for every method alike: they are longer than `max_prompt_length` "
            "%s, or with a completion than `max_length` %s.", len(dataset) - len(kept), len(dataset), name, *limits,
        )  # fmt: skip
    return dataset.select(kept)


def tokenize_rows(
    batch: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None,
    max_length: int | None,
    length_column: str,
) -> dict[str, list]:
    """Tokenise and cut a batch of rows, for `Dataset.map(batched=True, with_indices=True)`.

    A prompt's tokens are the tokenised prompt as far as every one of its K tokenised conversations begins with it; the
    completions start where they diverge. The end of a prompt is kept within `max_prompt_length`, then the beginning of
    each completion within `max_length`.

    Args:
        batch: columns `prompt` (text, messages), `completions`, `rewards`, and `tools`, `chat_template_kwargs` if any.
        indices: the rows' numbers, for errors, also of the training that follows.
        tokenizer: its chat template renders messages; text gets one EOS at its end, and a BOS where the tokenizer adds
            one and the text doesn't begin with it.
        max_prompt_length, max_length: tokens; None for no limit.
        length_column: name of the output column for the row's unique tokens, the prompt counted once.

    Returns:
        Columns `prompt_ids`, `completion_ids`, `rewards`, `length_column`, `row_number`, and `CUT_COLUMNS`: whether the
        prompt was cut, how many completions were, and how many of the prompt's last tokens were left out because a
        conversation goes on differently.

    Raises:
        ValueError: a template that drops or refuses a system prompt, or no token in front of a completion or in it.
    """
    rows = [_render({name: batch[name][i] for name in batch}, indices[i], tokenizer) for i in range(len(indices))]
    ids = {}  # one call of the tokenizer for all texts that it adds special tokens to, and one for all others
    for special in {special for _, special in rows}:
        texts = [text for texts, own in rows if own is special for text in texts]
        ids[special] = iter(tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"])
    columns = ("prompt_ids", "completion_ids", "rewards", length_column, "row_number", *CUT_COLUMNS)
    output: dict[str, list] = {name: [] for name in columns}
    for i, (texts, special) in enumerate(rows):
        prompt, *wholes = [next(ids[special]) for _ in texts]
        if isinstance(batch["prompt"][i], str):
            wholes = [_one_eos(whole, tokenizer.eos_token_id) for whole in wholes]
        boundary = min(common_prefix_length(prompt, whole) for whole in wholes)
        if boundary == 0:
            raise UserError(
                f"Row {indices[i]}: `prompt` gives no token in front of the completions, whose first one can't be "
                "scored then; give a prompt that isn't empty."
            )
        for k, whole in enumerate(wholes):
            if len(whole) == boundary:
                raise UserError(f"Row {indices[i]}: `completions[{k}]` gives no token after the prompt; leave it out.")
        kept = prompt[:boundary][-max_prompt_length:] if max_prompt_length else prompt[:boundary]
        end = None if max_length is None else boundary + max_length - len(kept)
        completions = [whole[boundary:end] for whole in wholes]
        cut = sum(len(c) < len(whole) - boundary for c, whole in zip(completions, wholes, strict=True))
        unique_tokens = len(kept) + sum(map(len, completions))
        values = (
            kept, completions, batch["rewards"][i], unique_tokens, indices[i],
            int(len(kept) < boundary), cut, len(prompt) - boundary,
        )  # fmt: skip
        for name, value in zip(columns, values, strict=True):
            output[name].append(value)
    return output


def _render(row: dict[str, Any], index: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], bool]:
    """The text of the prompt, then of each whole conversation; and whether the tokenizer should add special tokens."""
    prompt, completions = row["prompt"], row["completions"]
    if isinstance(prompt, str):
        eos = tokenizer.eos_token or ""
        texts = [prompt, *(prompt + (c if c.endswith(eos) else c + eos) for c in completions)]
        bos = tokenizer.bos_token
        return texts, not (bos and prompt.startswith(bos))  # no second BOS before text that is rendered already
    if tokenizer.chat_template is None:
        raise UserError(
            f"Row {index}: `prompt` holds messages, but the tokenizer has no chat template to render them; set its "
            "`chat_template` to the one that the model was trained with, or give the prompt as text."
        )
    tools = row.get("tools")
    options = {
        "tokenize": False,
        "tools": json.loads(tools) if isinstance(tools, str) and tools else tools or None,
        # a column of structs has every row's keys, None where this row has no such one
        **{k: v for k, v in (row.get("chat_template_kwargs") or {}).items() if v is not None},
    }
    try:
        texts = [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options),
            *(tokenizer.apply_chat_template(prompt + completion, **options) for completion in completions),
        ]
    except Exception as error:  # jinja's own errors, and whatever a template calls
        raise UserError(
            f"Row {index}: the chat template can't render `prompt` ({_roles(prompt)}): {error}. "
            "Use a template that can, or leave those turns out of the data."
        ) from error
    for message in prompt:
        content = message["content"]
        if message["role"] == "system" and isinstance(content, str) and content.strip() not in texts[0]:
            raise UserError(
                f"Row {index}: the chat template leaves out the system prompt of `prompt`, so it has no system role; "
                "use a template that has one, or put the system prompt into the first user turn."
            )
    return texts, False


def _roles(messages: list[dict[str, Any]]) -> str:
    return ", ".join(message["role"] for message in messages)


def _one_eos(ids: list[int], eos: int | None) -> list[int]:
    """`ids` with one EOS at its end where the tokenizer put another behind the text's own."""
    while len(ids) > 1 and ids[-1] == ids[-2] == eos:
        ids = ids[:-1]
    return ids
