"""Rows of `prompt, completions, rewards` → `prompt_ids, completion_ids, rewards`, a prompt's ids once for all K.

Where completions have turns that the model didn't write, `completion_mask` tells which tokens it did.
"""

import logging
import sys
from functools import partial
from typing import Any

import trl
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from ..config import NCAConfig, prompt_limit
from ..data.cleaning import clean_prompt
from ..errors import InvalidRowError, UserError
from ..store.fingerprints import derived_fingerprint
from .rendering import conversation_text, holds_typed_tokens, prompt_text, text_ids
from .trajectories import has_context, turn_template, written_mask

logger = logging.getLogger("nca_align")

_TOKENS = {
    "prompt_ids": List(Value("int64")), "completion_ids": List(List(Value("int64"))),
    "completion_mask": List(List(Value("int8"))),
}  # fmt: skip
# Counts beside the ids, one number a row, which the trainer adds up, reports and drops
CUT_COLUMNS = ("prompt_cut", "completions_cut", "boundary_tokens", "typed_tokens")


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None,
    max_length: int | None,
    length_column: str = "length",
    num_proc: int | None = None,
    name: str = "train",
    training: bool = False,
) -> tuple[Dataset | IterableDataset, list[str]]:
    """`tokenize_rows` over a data set, cached on disk where its rows are; and a sentence on each thing that was cut.

    Raises:
        ValueError: what `tokenize_rows` refuses; and in `training`, rows without one completion that is whole.
    """
    if max_prompt_length is not None:
        prompt_limit(max_prompt_length, max_length)  # the config's own check may have seen other values
    limits: dict[str, Any] = {
        "max_prompt_length": max_prompt_length, "max_length": max_length, "length_column": length_column,
    }  # fmt: skip
    function = partial(tokenize_rows, tokenizer=tokenizer, **limits, name=name)
    if isinstance(dataset, IterableDataset):
        dataset = dataset.map(function, batched=True, batch_size=64, with_indices=True)
        return dataset.remove_columns(list(CUT_COLUMNS)), []
    options: dict[str, Any] = {}
    if hasattr(tokenizer, "backend_tokenizer"):  # a hash of what decides the ids, steady from process to process
        # a template is given all special tokens by their names
        special = sorted(tokenizer.special_tokens_map.items())
        # TRL's, since it may render completions of several turns
        state = (tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, special, trl.__version__)
        options["new_fingerprint"] = derived_fingerprint("nca_align tokens 5", dataset, state, limits)
    numbers = dict.fromkeys((length_column, "row_number", *CUT_COLUMNS), Value("int64"))
    dataset = dataset.map(
        function,
        batched=True,
        batch_size=64,
        with_indices=True,
        features=Features({**dataset.features, **_TOKENS, **numbers}),
        num_proc=num_proc,
        desc=f"Tokenizing {name}",
        **options,
    )
    if dataset.data.column("completion_mask").null_count == len(dataset):
        dataset = dataset.remove_columns("completion_mask")
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
    if cut["prompt_cut"] or cut["completions_cut"]:
        notices.append(
            f"`{name}`: {cut['prompt_cut']} of {len(dataset)} prompts cut to their last {max_prompt_length} tokens "
            f"(`max_prompt_length`), {cut['completions_cut']} completions at {max_length} (`max_length`)."
        )
    return dataset.remove_columns(list(CUT_COLUMNS)), notices


def refuse_cutting_all(cut: int, completions: int, max_length: int | None, name: str) -> None:
    """Raise a UserError where every completion is cut."""
    if cut and cut == completions:
        raise UserError(
            f"`max_length` is {max_length}, which cuts every completion of `{name}`, so that no answer's end would be "
            "trained on; raise it, or give `max_length: null` for no limit."
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
    whole: Any = tokenize_dataset(dataset, tokenizer, None, None, name=name)[0]
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
        Columns `prompt_ids`, `completion_ids`, `completion_mask` (K lists with 1 for each token that the model wrote;
        None where it wrote all), `rewards`, `length_column`, `row_number`, and `CUT_COLUMNS`: whether the prompt was
        cut, how many completions were, how many of the prompt's last tokens were left out because a conversation goes
        on differently, and whether messages hold special tokens as text.

    Raises:
        ValueError: a template that drops or refuses a system prompt, no token in front of a completion or in it, an
            EOS within a completion's messages, or a completion of several turns that can't be told apart.
    """
    named = [f"Row {index} of `{name}`" if name else f"Row {index}" for index in indices]
    texts, plain, typed, prompts = [], [], [], []
    several = [any(map(has_context, completions)) for completions in batch["completions"]]
    turns = turn_template(tokenizer) if any(several) else None
    for i, completions in enumerate(batch["completions"]):
        template = turns.template if turns and several[i] else None
        try:
            prompt = clean_prompt({column: values[i] for column, values in batch.items()})
            prompts.append(prompt)
            if prompt.kind == "token ids":
                typed.append(False)
                continue
            texts.append(prompt_text(tokenizer, prompt, template))
            texts += [conversation_text(tokenizer, prompt, completion, template) for completion in completions]
            typed.append(holds_typed_tokens(tokenizer, prompt, completions))
        except UserError as error:
            raise UserError(f"{named[i]}: {error}") from error
        plain += [prompt.kind == "text"] * (1 + len(completions))
    ids = iter(zip(texts, text_ids(tokenizer, texts, plain), strict=True))
    tokenized = []
    for i, completions in enumerate(batch["completions"]):
        if prompts[i].kind == "token ids":
            whole_prompt = list(prompts[i].content)
            wholes = [("", whole_prompt + completion) for completion in completions]
        else:
            (_, whole_prompt), *wholes = [next(ids) for _ in range(1 + len(completions))]
        boundary = min(common_prefix_length(whole_prompt, whole) for _, whole in wholes)
        if boundary == 0:
            raise UserError(
                f"{named[i]}: `prompt` gives no token in front of the completions, whose first one can't be scored "
                "then; give a prompt that isn't empty."
            )
        given = (batch.get("completion_mask") or [None] * len(prompts))[i]
        masks = []
        for k, (text, whole) in enumerate(wholes):
            if len(whole) == boundary:
                raise UserError(f"{named[i]}: `completions[{k}]` gives no token after the prompt; leave it out.")
            mask = list(map(int, given[k])) if given else [1] * (len(whole) - boundary)
            if turns and has_context(completions[k]):
                where = f"{named[i]}: `completions[{k}]`"
                try:
                    mask = written_mask(tokenizer, turns, prompts[i], completions[k], text, whole, boundary)
                except InvalidRowError as error:
                    raise InvalidRowError(f"{where} {error}") from error
            masks.append(mask)
        completion_ids = [whole[boundary:] for _, whole in wholes]
        kept, rests = truncate(whole_prompt[:boundary], completion_ids, max_prompt_length, max_length)
        cut = sum(len(rest) < len(whole) for rest, whole in zip(rests, completion_ids, strict=True))
        tokenized.append({
            "prompt_ids": kept, "completion_ids": rests, "completion_mask": cut_masks(masks, rests, named[i]),
            "rewards": batch["rewards"][i],
            length_column: len(kept) + sum(map(len, rests)), "row_number": indices[i],
            "prompt_cut": int(len(kept) < boundary), "completions_cut": cut,
            "boundary_tokens": len(whole_prompt) - boundary, "typed_tokens": int(typed[i]),
        })  # fmt: skip
    return {column: [row[column] for row in tokenized] for column in tokenized[0]}


def cut_masks(masks: list[list[int]], rests: list[list[int]], row: str) -> list[list[int]] | None:
    """The masks of completions that were cut to `rests`; None where the model wrote all that is left.

    Raises:
        InvalidRowError: it wrote nothing of one; `row` names it.
    """
    cut = [mask[: len(rest)] for mask, rest in zip(masks, rests, strict=True)]
    for k, mask in enumerate(cut):
        if not any(mask):
            raise InvalidRowError(
                f"{row}: `completions[{k}]` has nothing to train on before `max_length` cuts it, only tokens that the "
                "model didn't write; raise `max_length`, or leave it out"
            )
    return None if all(map(all, cut)) else cut


def truncate(
    prompt: list[int], completions: list[list[int]], max_prompt_length: int | None, max_length: int | None
) -> tuple[list[int], list[list[int]]]:
    """A prompt's end within `max_prompt_length`, and each completion's beginning that fits `max_length` behind it."""
    kept = prompt[-max_prompt_length:] if max_prompt_length else prompt
    room = None if max_length is None else max_length - len(kept)
    return kept, [completion[:room] for completion in completions]
