"""Prompts as a model here reads them: its tokenizer, its room, and which rows it can't complete."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ...batching.rendering import prompt_ids
from ...errors import InvalidRowError, UserError
from ...models.loading import ModelSource
from .options import EngineOptions

if TYPE_CHECKING:
    from .options import SampleOptions


def model_source(options: EngineOptions) -> ModelSource:
    """The model that completes prompts, with its adapter."""
    return ModelSource.of(
        str(options.model_name_or_path), adapter=options.adapter, revision=options.model_revision,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip


def context_length(options: EngineOptions) -> int | None:
    """Tokens that the model takes, prompt and completion; None where its configuration doesn't say."""
    return getattr(model_source(options).load_config().get_text_config(), "max_position_embeddings", None)


def _ids_that_fit(tokenizer, room: int | None, max_new_tokens: int, row: dict) -> list[int]:
    ids = prompt_ids(tokenizer, row)
    if room is not None and len(ids) + max_new_tokens > room:
        raise InvalidRowError(
            f"`prompt` has {len(ids)} tokens, which with `max_new_tokens` {max_new_tokens} is more than the model's "
            f"{room}; leave the row out or lower it"
        )
    return ids


def prompts_that_fit(
    tokenizer, room: int | None, max_new_tokens: int, rows: Iterable[dict]
) -> tuple[dict[int, list[int]], dict[int, str]]:
    """Token ids of the prompts that can be completed, and why the others can't, each by the row's place."""
    ids: dict[int, list[int]] = {}
    failed: dict[int, str] = {}
    for i, row in enumerate(rows):
        try:
            ids[i] = _ids_that_fit(tokenizer, room, max_new_tokens, row)
        except InvalidRowError as error:
            failed[i] = str(error)
    return ids, failed


def check_prompts(options: "SampleOptions", rows: Iterable[dict]) -> None:
    """Refuse prompts that the model can't complete before anything is sampled.

    Raises:
        UserError: it names the first and says how many.
    """
    tokenizer = model_source(options).load_tokenizer()
    failed = prompts_that_fit(tokenizer, context_length(options), options.max_new_tokens, rows)[1]
    if failed:
        row, why = next(iter(failed.items()))
        raise UserError(
            f"row {row}: {why}; {len(failed)} such rows, and nothing has been sampled: `--on_error drop` leaves "
            "them out"
        )
