"""Data formats of preference pairs, chosen and rejected, with scores or hard."""

from typing import Any

from ..messages import plain_conversation
from ..options import DataOptions
from ..schema import data_format
from ..validation import (
    Row,
    RowError,
    assistant_message,
    check_filled,
    read_conversation,
    read_list,
    required_number,
    user_message,
)

HARD_REWARDS = (1.0, 0.0)


@data_format("pairs", "chosen, rejected", answers="chosen|rejected|messages", conversations="prompt|chosen|rejected")
def preference_pair(row: dict[str, Any], options: DataOptions) -> Row:
    """TRL's preference rows, text or conversational, and HuggingFaceH4/ultrafeedback_binarized with its scores.

    A conversation in `chosen` that begins with the prompt's turns is split there, a prompt that is implicit is
    extracted as TRL does.
    """
    chosen, rejected = (read_conversation(row[name], name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError(
            "rejected", "text and messages mixed", "is of another kind than `chosen`; both must be text or messages"
        )
    prompt = row.get("prompt")
    if prompt is not None:
        prompt = read_conversation(prompt, "prompt")
    if prompt is None or (isinstance(prompt, str) and isinstance(chosen, list)):
        prompt, chosen, rejected = _split_off_prompt(prompt, chosen, rejected)
    elif isinstance(prompt, list) and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return Row(prompt, [chosen, rejected], _rewards(row, options))


def _split_off_prompt(prompt: str | None, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        check_filled(side, name)
    if prompt is not None and isinstance(chosen[0], dict) and chosen[0].get("role") == "assistant":
        return [user_message(prompt, "prompt")], chosen, rejected  # the messages hold the answers alone
    if chosen[0] != rejected[0] or (isinstance(chosen, list) and min(len(chosen), len(rejected)) == 1):
        raise RowError("chosen", "no shared prompt", "has no beginning in common with `rejected`; give a `prompt`")
    from trl.data_utils import extract_prompt  # loads torch: not for those who need it not

    parts = extract_prompt({"chosen": chosen, "rejected": rejected})
    return parts["prompt"], parts["chosen"], parts["rejected"]


def _rewards(row: dict[str, Any], options: DataOptions) -> list[float]:
    names = ("score_chosen", "score_rejected")
    if options.preference == "hard" or not all(name in row for name in names):
        return list(HARD_REWARDS)
    return [required_number(row[name], name) for name in names]


@data_format("trajectory pairs", "trajectory, chosen, rejected", prompts="trajectory", answers="chosen|rejected")
def trajectory_pair(row: dict[str, Any], options: DataOptions) -> Row:
    """openbmb/UltraInteract_pair: a trajectory of {from, value} turns, and the two next turns."""
    prompt = plain_conversation(read_list(row["trajectory"], "trajectory"))
    return Row(prompt, [assistant_message(row[name], name) for name in ("chosen", "rejected")], _rewards(row, options))
