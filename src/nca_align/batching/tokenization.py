"""Rows of `prompt, completions, rewards` → `prompt_ids, completion_ids, rewards`, a prompt's ids once for all K.

Where completions have turns that the model didn't write, `completion_mask` tells which tokens it did.
"""

import logging
import sys
from collections import Counter
from functools import partial
from typing import Any

import trl
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase

from ..config import NCAConfig, prompt_limit
from ..data.schema import show_counts
from ..errors import InvalidRowError, UserError, notify
from ..store.fingerprints import derived_fingerprint
from .rendering import reasoning_field
from .row_tokens import rows_or_errors

logger = logging.getLogger("nca_align")

_TOKENS = {
    "prompt_ids": List(Value("int64")), "completion_ids": List(List(Value("int64"))),
    "completion_mask": List(List(Value("int8"))),
}  # fmt: skip
# Counts beside the ids, one number a row, which the trainer adds up, reports and drops
CUT_COLUMNS = (
    "prompt_cut",
    "completions_cut",
    "cut_alike",
    "boundary_tokens",
    "typed_tokens",
    "literal_thoughts",
    "unnamed_tools",
)
# Beside a row that is to be dropped: a few words under which it is counted, and the error
_NOTES = Features({"_cause": Value("string"), "_problem": Value("string")})


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None,
    max_length: int | None,
    length_column: str = "length",
    num_proc: int | None = None,
    name: str = "train",
    training: bool = False,
    on_invalid: str = "raise",
) -> tuple[Dataset | IterableDataset, list[str]]:
    """`tokenize_rows` over a data set, cached on disk where its rows are; and a sentence on each thing that was cut.

    With `on_invalid` `drop`, a row that `tokenize_rows` refuses is left out, and the log counts such rows by cause: of
    a stream as it is read.

    Raises:
        ValueError: what `tokenize_rows` refuses; no row is left; and in `training`, rows without one completion that is
            whole.
    """
    if max_prompt_length is not None:
        prompt_limit(max_prompt_length, max_length)  # the config's own check may have seen other values
    limits: dict[str, Any] = {
        "max_prompt_length": max_prompt_length, "max_length": max_length, "length_column": length_column,
    }  # fmt: skip
    drops = on_invalid == "drop"
    function = partial(_noted_rows if drops else tokenize_rows, tokenizer=tokenizer, **limits, name=name)
    if isinstance(dataset, IterableDataset):
        dataset = dataset.map(function, batched=True, batch_size=64, with_indices=True)
        if drops:
            dataset = dataset.map(partial(_sound_rows, name=name), batched=True, batch_size=64)
            dataset = dataset.remove_columns(list(_NOTES))
            if next(iter(dataset), None) is None:
                raise UserError(f"`{name}`: the stream has no row left, as the log says; at least one must be left")
        return dataset.remove_columns(list(CUT_COLUMNS)), []
    options: dict[str, Any] = {}
    if hasattr(tokenizer, "backend_tokenizer"):  # a hash of what decides the ids, steady from process to process
        # a template is given all special tokens by their names
        special = sorted(tokenizer.special_tokens_map.items())
        # TRL's, since it may render completions of several turns
        state = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, special, trl.__version__)
        options["new_fingerprint"] = derived_fingerprint("nca_align tokens 10", dataset, state, limits, drops)
    numbers = dict.fromkeys((length_column, "row_number", *CUT_COLUMNS), Value("int64"))
    dataset = dataset.map(
        function,
        batched=True,
        batch_size=64,
        with_indices=True,
        features=Features({**dataset.features, **_TOKENS, **numbers, **(_NOTES if drops else {})}),
        num_proc=num_proc,
        desc=f"Tokenizing {name}",
        **options,
    )
    if dataset.data.column("completion_mask").null_count == len(dataset):
        dataset = dataset.remove_columns("completion_mask")
    if drops:
        dataset = _without_invalid(dataset, name)
    cut = {column: sum(dataset[column]) for column in CUT_COLUMNS}
    if training:
        refuse_cutting_all(cut["completions_cut"], sum(map(len, dataset["rewards"])), max_length, name)
    notices = []
    if cut["boundary_tokens"]:
        notices.append(
            f"`{name}`: the tokenised prompt is not the beginning of every tokenised conversation (its chat template "
            "renders it differently alone, or tokens merge across the boundary): completions start where they diverge, "
            f"and {cut['boundary_tokens'] / len(dataset):.2f} tokens a prompt are left out."
        )
    if cut["typed_tokens"]:
        notices.append(
            f"`{name}`: {cut['typed_tokens']} of {len(dataset)} rows hold special tokens as text within their messages,"
            " where they end or begin a turn as those of the chat template do; take them out if that isn't meant."
        )
    if cut["literal_thoughts"]:
        notices.append(
            f"`{name}`: {cut['literal_thoughts']} of {len(dataset)} rows hold `<think>` in `content`, which the chat "
            "template prints as other text than a thought of its own. Give the thought in the message's field "
            f"`{reasoning_field(tokenizer)}`, which the template reads."
        )
    if cut["prompt_cut"] or cut["completions_cut"]:
        notices.append(
            f"`{name}`: {cut['prompt_cut']} of {len(dataset)} prompts cut to their last {max_prompt_length} tokens "
            f"(`max_prompt_length`), {cut['completions_cut']} completions at {max_length} (`max_length`)."
        )
    if cut["cut_alike"]:
        notices.append(
            f"`{name}`: {cut['cut_alike']} of the completions that are cut are now the same tokens as another of their "
            f"prompt, with another reward, so that their difference teaches nothing; raise `max_length` {max_length}."
        )
    if cut["unnamed_tools"]:
        notices.append(
            f"`{name}`: completions of {cut['unnamed_tools']} of {len(dataset)} rows call tools, but the rows have no "
            "`tools` for the chat template. Add this column, a list of JSON schemas, if the model had read them."
        )
    return dataset.remove_columns(list(CUT_COLUMNS)), notices


def refuse_cutting_all(cut: int, completions: int, max_length: int | None, name: str) -> None:
    """Raise a UserError where every completion is cut."""
    if cut and cut == completions:
        raise UserError(
            f"`max_length` is {max_length}, which cuts every completion of `{name}`, so no answer's end would be "
            "trained on. Raise it, or give `max_length: null` for no limit."
        )


def rows_that_fit(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: NCAConfig, name: str = "train"
) -> Dataset:
    """The rows of which nothing would be cut by `max_prompt_length` and `max_length`, and in the log how many others.

    NCATrainer cuts a prompt's beginning, TRL's trainers a conversation's end: of these all see the same tokens.

    Raises:
        ValueError: there is none.
    """
    limits = prompt_limit(args.max_prompt_length, args.max_length), args.max_length
    whole: Any = tokenize_dataset(dataset, tokenizer, None, None, name=name, on_invalid=args.on_invalid)[0]
    most_of_prompt, most = (limit if limit is not None else sys.maxsize for limit in limits)
    kept = [
        i for i, prompt, completions in zip(
            whole["row_number"], whole["prompt_ids"], whole["completion_ids"], strict=True
        )
        if len(prompt) <= most_of_prompt and len(prompt) + max(map(len, completions)) <= most
    ]  # fmt: skip
    if not kept:
        raise UserError(
            f"every prompt of `{name}` is longer than `max_prompt_length` {limits[0]}, or longer than `max_length` "
            f"{limits[1]} with a completion; raise them"
        )
    if len(kept) < len(whole):
        logger.warning(
            "%d of %d prompts of `%s` are left out, for every method alike: they are longer than `max_prompt_length` "
            "%s, or with a completion than `max_length` %s.", len(whole) - len(kept), len(whole), name, *limits,
        )  # fmt: skip
    return dataset.select(kept)


def rows_that_become_tokens(dataset: Dataset, *arguments: Any, **more: Any) -> Dataset:
    """`dataset` without the rows that `tokenize_dataset` drops, whose arguments these are.

    Raises:
        ValueError: as it does.
    """
    kept: Any = tokenize_dataset(dataset, *arguments, **more)[0]["row_number"]
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def tokenize_rows(
    batch: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None,
    max_length: int | None,
    length_column: str = "length",
    name: str | None = None,
) -> dict[str, list]:
    """Tokenise and cut a batch of rows, for `Dataset.map(batched=True, with_indices=True)`.

    A prompt's tokens are the tokenised prompt as far as every one of its K tokenised conversations begins with it; the
    completions start where they diverge. The end of a prompt is kept within `max_prompt_length`, then the beginning of
    each completion within `max_length`.

    Args:
        batch: columns `prompt` (text, messages, token ids), `completions`, `rewards`, and `tools`,
            `chat_template_kwargs`, `completion_mask` if any.
        indices: the rows' numbers, for errors, also of the training that follows.
        tokenizer: its chat template renders messages; text gets one EOS at its end, and a BOS where the tokenizer adds
            one and the text doesn't begin with it.
        max_prompt_length, max_length: tokens; None for no limit.
        length_column: name of the output column for the row's unique tokens, the prompt counted once.
        name: of the data set, for errors.

    Returns:
        Columns `prompt_ids`, `completion_ids`, `completion_mask`, `rewards`, `length_column`, `row_number`, and
        `CUT_COLUMNS`. `completion_mask` has K lists with 1 for each token that the model wrote, or None where it wrote
        all. `CUT_COLUMNS` say

        - whether the prompt was cut, and how many completions were;
        - how many of these became the same as another of another reward;
        - how many of the prompt's last tokens were left out because a conversation goes on differently;
        - whether messages hold special tokens as text;
        - whether completions call tools that the row doesn't have.

    Raises:
        InvalidRowError: a template drops or refuses a part of the row, or there is no token in a completion or before
            it. Or a completion's messages hold an EOS, or its turns can't be told apart.
        UserError: messages, and no chat template.
    """
    rows = rows_or_errors(batch, indices, tokenizer, max_prompt_length, max_length, length_column)
    for row, index in zip(rows, indices, strict=True):
        if isinstance(row, UserError):
            raise _named(row, index, name) from row
    return {column: [row[column] for row in rows] for column in rows[0]}


def _named(error: UserError, index: int, name: str | None) -> UserError:
    text = f"Row {index}{f' of `{name}`' if name else ''}: {error}"
    if isinstance(error, InvalidRowError):
        return InvalidRowError(text, cause=error.cause, place=None if name is None else (name, index))
    return UserError(text)


def _noted_rows(
    batch: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None,
    max_length: int | None,
    length_column: str,
    name: str,
) -> dict[str, list]:
    """`tokenize_rows` with the columns of `_NOTES`, which are null for a sound row; another has no ids."""
    rows = rows_or_errors(batch, indices, tokenizer, max_prompt_length, max_length, length_column)
    noted = []
    for i, row in enumerate(rows):
        notes: dict[str, Any] = dict.fromkeys(_NOTES)
        if isinstance(row, InvalidRowError):
            notes = {"_cause": row.cause, "_problem": f"row {indices[i]}: {row}"}
            row = dict.fromkeys(_TOKENS) | dict.fromkeys((length_column, *CUT_COLUMNS), 0)
            row |= {"rewards": batch["rewards"][i], "row_number": indices[i]}
        elif isinstance(row, UserError):  # what is wrong with all rows
            raise _named(row, indices[i], name) from row
        noted.append(row | notes)
    return {column: [row[column] for row in noted] for column in noted[0]}


def _without_invalid(dataset: Dataset, name: str) -> Dataset:
    """The sound rows of those that `_noted_rows` made, without its notes; the log counts the others by cause.

    Raises:
        UserError: there is none.
    """
    causes = dataset["_cause"][:]
    sound = [i for i, cause in enumerate(causes) if cause is None]
    if len(sound) < len(dataset):
        dropped = show_counts(Counter(filter(None, causes)))
        told = f"`{name}`: {len(sound)} of {len(dataset)} rows kept as they became tokens; dropped: {dropped}"
        if not sound:
            raise UserError(f"{told}; at least one must be left ({dataset[0]['_problem']})")
        notify(told)
        dataset = dataset.select(sound)
    return dataset.remove_columns(list(_NOTES))


def _sound_rows(batch: dict[str, list], name: str) -> dict[str, list]:
    """`_without_invalid` of a stream's batch, whose other rows the log counts."""
    causes = batch["_cause"]
    if dropped := Counter(filter(None, causes)):
        first, last = batch["row_number"][0], batch["row_number"][-1]
        logger.warning(
            "`%s`, rows %d to %d: dropped as they became tokens: %s", name, first, last, show_counts(dropped)
        )
    return {
        column: [value for value, cause in zip(values, causes, strict=True) if cause is None]
        for column, values in batch.items()
    }
