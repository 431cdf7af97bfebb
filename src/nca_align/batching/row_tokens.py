"""The token ids of rows as they are trained on, each with the mask of what the model wrote, or why it can't be used."""

from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from ..data.cleaning import Prompt, clean_prompt
from ..data.messages import has_context
from ..errors import InvalidRowError, UserError
from .rendering import has_literal_thought, holds_typed_tokens, prompt_text, row_texts, text_ids
from .trajectories import TurnTemplate, turn_template, written_mask


def rows_or_errors(
    batch: dict[str, list],
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int | None,
    max_length: int | None,
    length_column: str,
) -> list[Any]:
    """Each row of `tokenize_rows`, or the error that it raises of it."""
    several = [any(map(has_context, completions)) for completions in batch["completions"]]
    turns = turn_template(tokenizer) if any(several) else None
    texts: list[str] = []
    plain: list[bool] = []
    found: list[Any] = []  # a row's prompt, its turns' template where it has several, and its remarks; or its error
    for i, completions in enumerate(batch["completions"]):
        own = turns if several[i] else None
        try:
            prompt = clean_prompt({column: values[i] for column, values in batch.items()})
            rendered, typed, literal = [], False, False
            if prompt.kind != "token ids":
                template = own.template if own else None
                try:
                    rendered = row_texts(tokenizer, prompt, completions, template)
                except InvalidRowError:
                    turns = turns or turn_template(tokenizer)
                    if own or turns.template is None:
                        raise
                    # TRL's training template, where it keeps what the tokenizer's own leaves out, of the same prompt
                    template = turns.template
                    rendered = row_texts(tokenizer, prompt, completions, template)
                    if rendered[:1] != [prompt_text(tokenizer, prompt)]:
                        raise
                typed = holds_typed_tokens(tokenizer, prompt, completions)
                literal = has_literal_thought(tokenizer, prompt, completions, rendered, template)
        except UserError as error:
            found.append(error)
            continue
        texts += rendered
        plain += [prompt.kind == "text"] * len(rendered)
        found.append((prompt, own, typed, literal))
    ids = iter(zip(texts, text_ids(tokenizer, texts, plain), strict=True))
    tokenized: list[Any] = []
    for i, completions in enumerate(batch["completions"]):
        if isinstance(found[i], UserError):
            tokenized.append(found[i])
            continue
        prompt, own, typed, literal = found[i]
        if prompt.kind == "token ids":
            whole_prompt = list(prompt.content)
            wholes = [("", whole_prompt + completion) for completion in completions]
        else:
            (_, whole_prompt), *wholes = [next(ids) for _ in range(1 + len(completions))]
        given = (batch.get("completion_mask") or [None] * len(found))[i]
        try:
            boundary = min(common_prefix_length(whole_prompt, whole) for _, whole in wholes)
            masks = _masks(tokenizer, own, prompt, completions, wholes, boundary, given)
            completion_ids = [whole[boundary:] for _, whole in wholes]
            kept, rests = truncate(whole_prompt[:boundary], completion_ids, max_prompt_length, max_length)
            mask = cut_masks(masks, rests)
        except InvalidRowError as error:
            tokenized.append(error)
            continue
        cut = [k for k, (rest, whole) in enumerate(zip(rests, completion_ids, strict=True)) if len(rest) < len(whole)]
        scored = list(zip(rests, batch["rewards"][i], strict=True))
        alike = [k for k in cut if any(own == rests[k] and reward != scored[k][1] for own, reward in scored)]
        calls = prompt.kind == "messages" and any(own.get("tool_calls") for turns in completions for own in turns)
        tokenized.append({
            "prompt_ids": kept, "completion_ids": rests, "completion_mask": mask, "rewards": batch["rewards"][i],
            length_column: len(kept) + sum(map(len, rests)), "row_number": indices[i],
            "prompt_cut": int(len(kept) < boundary), "completions_cut": len(cut), "cut_alike": len(alike),
            "boundary_tokens": len(whole_prompt) - boundary, "typed_tokens": int(typed),
            "literal_thoughts": int(literal), "unnamed_tools": int(calls and not prompt.tools),
        })  # fmt: skip
    return tokenized


def _masks(
    tokenizer, turns: TurnTemplate | None, prompt: Prompt, completions: list,
    wholes: list[tuple[str, list[int]]], boundary: int, given: list | None,
) -> list[list[int]]:  # fmt: skip
    """Of each completion's ids behind `boundary`, 1 where the model wrote it: by its turns, as `given`, or all.

    Raises:
        InvalidRowError: no token in front of the completions, or in one; and see `written_mask`.
    """
    if boundary == 0:
        raise InvalidRowError(
            "`prompt` gives no token, so a completion's first token can't be scored; give a prompt that isn't empty",
            cause="prompt without a token",
        )
    masks = []
    for k, (text, whole) in enumerate(wholes):
        where = f"`completions[{k}]`"
        if len(whole) == boundary:
            raise InvalidRowError(
                f"{where} gives no token after the prompt; leave it out.", cause="completion without a token"
            )
        mask = list(map(int, given[k])) if given and given[k] is not None else [1] * (len(whole) - boundary)
        if turns is not None:  # of all K, so that they are compared alike
            try:
                mask = written_mask(tokenizer, turns, prompt, completions[k], text, whole, boundary)
            except InvalidRowError as error:
                raise InvalidRowError(f"{where} {str(error).lstrip()}", cause=error.cause) from error
        masks.append(mask)
    return masks


def cut_masks(masks: list[list[int]], rests: list[list[int]]) -> list[list[int]] | None:
    """The masks of completions that were cut to `rests`; None where the model wrote all that is left.

    Raises:
        InvalidRowError: it wrote nothing of one.
    """
    cut = [mask[: len(rest)] for mask, rest in zip(masks, rests, strict=True)]
    for k, mask in enumerate(cut):
        if not any(mask):
            raise InvalidRowError(
                f"`completions[{k}]` has nothing to train on before `max_length` cuts it, only tokens that the model "
                "didn't write. Raise `max_length`, or leave it out",
                cause="nothing to train on",
            )
    return None if all(map(all, cut)) else cut


def truncate(
    prompt: list[int], completions: list[list[int]], max_prompt_length: int | None, max_length: int | None
) -> tuple[list[int], list[list[int]]]:
    """A prompt's end within `max_prompt_length`, and each completion's beginning that fits `max_length` behind it."""
    kept = prompt[-max_prompt_length:] if max_prompt_length else prompt
    room = None if max_length is None else max_length - len(kept)
    return kept, [completion[:room] for completion in completions]
