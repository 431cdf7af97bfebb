"""Data formats that hold all completions of a prompt in one row, each with its score."""

import re
from collections.abc import Iterable
from typing import Any

from ..messages import plain_completions
from ..options import DEFAULT_SCORE, DataOptions
from ..schema import data_format
from ..validation import (
    MISSING,
    Row,
    RowError,
    assistant_message,
    check_pair,
    optional_score,
    read_conversation,
    read_list,
    required_number,
    user_message,
)

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
REPAIRED = "score 10 repaired to 1"
_SCORE_BUG = "score 10 that should be 1"


@data_format("own", "prompt, completions, rewards", conversations="prompt|completions")
def rewarded_completions(row: dict[str, Any], options: DataOptions) -> Row:
    """`prompt, completions, rewards` as they are; only text that holds lists or numbers is read."""
    given = read_list(row["rewards"], "rewards")
    completions = plain_completions(read_list(row["completions"], "completions"))
    for k, pair in enumerate(zip(completions, given, strict=False)):
        check_pair(*pair, k)
    rewards = [required_number(item, f"rewards[{k}]") for k, item in enumerate(given)]
    return Row(read_conversation(row["prompt"], "prompt"), completions, rewards)


def _mean_rating(completion: dict[str, Any]) -> float | None:
    """The mean aspect rating; None where nothing was rated."""
    annotations = completion.get("annotations") or {}
    ratings = [
        optional_score((annotations.get(aspect) or {}).get("Rating"), f"annotations.{aspect}.Rating")
        for aspect in ASPECTS
    ]
    known = [rating for rating in ratings if rating is not None]
    return sum(known) / len(known) if known else None


def _is_rated_low(completion: dict[str, Any]) -> bool:
    mean = _mean_rating(completion)
    if mean is None:
        mean = optional_score(completion.get("fine-grained_score"), "fine-grained_score")
    return mean is not None and mean <= 2


def _ultrafeedback_score(completion: dict[str, Any], score: str, here: str) -> float | None:
    if score == "mean_aspects":
        return _mean_rating(completion)
    if score in completion:
        return optional_score(completion[score], f"{here}.{score}")
    annotation = (completion.get("annotations") or {}).get(score) or {}
    return optional_score(annotation.get("Rating"), f"{here}.annotations.{score}.Rating")


def _ultrafeedback_scores(rows: Iterable[dict[str, Any]]) -> set[str]:
    names = set()
    for row in rows:
        completions = row["completions"] if isinstance(row["completions"], list) else ()
        for completion in (completion for completion in completions if isinstance(completion, dict)):
            names |= {name for name in completion if "score" in name}
            if completion.get("annotations"):
                names |= {"mean_aspects", *completion["annotations"]}
    return names


@data_format("raw UltraFeedback", "instruction, completions", prompts="instruction", scores=_ultrafeedback_scores)
def ultrafeedback(row: dict[str, Any], options: DataOptions) -> Row:
    """openbmb/UltraFeedback: a completion without a score is left out.

    A completion's `custom_system_prompt` is the principle that it was sampled with, differs between the completions of
    one prompt, and was not part of the prompt in the paper's data: it isn't here either.
    """
    result = Row([user_message(row["instruction"], "instruction")], [], [])
    models = []
    for k, completion in enumerate(read_list(row["completions"], "completions")):
        here = f"completions[{k}]"
        if not isinstance(completion, dict):
            raise RowError(
                here, "wrong type", f"is a {type(completion).__name__}; it must be an object with a response"
            )
        score = _ultrafeedback_score(completion, options.score, here)
        if score is not None and options.score == DEFAULT_SCORE and score == 10 and _is_rated_low(completion):
            score, note = (1.0, REPAIRED) if options.score_bug == "repair" else (None, _SCORE_BUG)
            result.notes.append(note)
        elif score is None:
            result.notes.append(MISSING)
        if score is not None:
            result.completions.append(assistant_message(completion.get("response"), f"{here}.response"))
            result.rewards.append(score)
            models.append(completion.get("model"))
    if "models" in row:
        result.extra["models"] = models  # one for each completion that is left
    return result


@data_format("ranked answers", "A0, A1, score_A0, score_A1", answers=r"(score_)?A\d+|messages", conversations=r"A\d+")
def ranked_answers(row: dict[str, Any], options: DataOptions) -> Row:
    """ChenDRAG/ultrafeedback_reward: conversations A0, A1 … with score_A0, score_A1 …, in whatever order.

    "N/A" stands for an answer where a prompt has fewer; it is left out, as is an answer without a score.
    """
    result = Row([], [], [])
    for name in sorted((name for name in row if re.fullmatch(r"A\d+", name)), key=lambda name: int(name[1:])):
        conversation = read_list(row[name], name) if row[name] is not None else []
        last = conversation[-1] if conversation else {"content": "N/A"}
        if isinstance(last, dict) and last.get("content") == "N/A":
            result.notes.append("no answer")
            continue
        score = optional_score(row.get(f"score_{name}"), f"score_{name}")
        if score is None:
            result.notes.append(MISSING)
            continue
        if result.completions and conversation[:-1] != result.prompt:
            raise RowError(name, "prompts differ", "has another prompt than the row's first answer; all must share one")
        result.prompt = conversation[:-1]
        result.completions.append(conversation[-1:])
        result.rewards.append(score)
    if not result.completions:
        result.prompt = [{"role": "user", "content": "(no answer)"}]  # so that the missing answers are what is reported
    return result


def _has_generated_responses(columns: set[str], options: DataOptions) -> bool:
    # Beside the list stands a pair of its best and worst: less to learn from, unless hard preferences are asked for.
    pair = options.preference == "hard" and columns.issuperset(("chosen", "rejected"))
    return columns.issuperset(("prompt", "all_generated_responses", "all_rm_scores")) and not pair


@data_format(
    "generated responses",
    "prompt, all_generated_responses, all_rm_scores",
    answers="all_generated_responses|all_rm_scores|chosen|rejected|messages",
    conversations="prompt",
    matches=_has_generated_responses,
)
def generated_responses(row: dict[str, Any], options: DataOptions) -> Row:
    """princeton-nlp/llama3-ultrafeedback-armorm: lists of responses and of the reward model's scores."""
    responses = read_list(row["all_generated_responses"], "all_generated_responses")
    scores = read_list(row["all_rm_scores"], "all_rm_scores")
    if len(responses) != len(scores):
        raise RowError(
            "all_rm_scores",
            "unequal lengths",
            f"has {len(scores)} values for {len(responses)} responses; give one each",
        )
    prompt = read_conversation(row["prompt"], "prompt")
    return Row(
        [user_message(prompt, "prompt")] if isinstance(prompt, str) else prompt,
        [assistant_message(text, f"all_generated_responses[{k}]") for k, text in enumerate(responses)],
        [required_number(score, f"all_rm_scores[{k}]") for k, score in enumerate(scores)],
    )
