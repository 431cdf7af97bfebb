"""Data formats that hold all completions of a prompt in one row, each with its score."""

import re
from collections.abc import Iterable
from typing import Any

from ..columns import read_cell
from ..messages import plain_completions
from ..options import DEFAULT_SCORE, DataOptions
from ..schema import data_format
from ..several_rewards import (
    column_of,
    combine,
    completion_values,
    given_values,
    names_of_rows,
    objectives_of_rows,
    one_reward,
)
from ..validation import (
    MISSING,
    Row,
    RowError,
    assistant_message,
    check_pair,
    optional_score,
    read_conversation,
    read_list,
    read_text,
    required_number,
    user_message,
)

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
REPAIRED = "score 10 repaired to 1"
_SCORE_BUG = "score 10 that should be 1"


def _has_completions(rows: list[dict[str, Any]], options: DataOptions) -> bool:
    columns = set(rows[0])
    # In the place of `rewards` may be columns that the options name.
    chosen = () if options.score == DEFAULT_SCORE else (options.score, column_of(options.score))
    scored = bool(options.reward_weights) or not columns.isdisjoint(("rewards", *chosen))
    return columns.issuperset(("prompt", "completions")) and scored


@data_format(
    "own",
    "prompt, completions, rewards",
    conversations="prompt|completions",
    scores=names_of_rows,
    objectives=objectives_of_rows,
    matches=_has_completions,
)
def rewarded_completions(row: dict[str, Any], options: DataOptions) -> Row:
    """`prompt, completions, rewards` as they are; only text that holds lists or numbers is read.

    `rewards` may hold several by name, and so may columns of K numbers: `reward_weights` or `score` says which count.
    """
    several = bool(options.weights) or options.score != DEFAULT_SCORE
    given = [] if several else one_reward(row["rewards"])
    completions = plain_completions(read_list(row["completions"], "completions"))
    result = Row(read_conversation(row["prompt"], "prompt"), completions, [])
    if options.weights:
        found = given_values(row, options.weights, len(completions))
        return combine(result, [completion_values(own, options) for own in found], options)
    if several:
        fields = [own[options.score] for own in given_values(row, [options.score], len(completions))]
        result.rewards = [required_number(value, field) for field, value in fields]
        return result
    for k, pair in enumerate(zip(completions, given, strict=False)):
        check_pair(*pair, k)
    result.rewards = [required_number(item, f"rewards[{k}]") for k, item in enumerate(given)]
    return result


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


def _ultrafeedback_value(completion: dict[str, Any], score: str, here: str) -> tuple[str, Any]:
    """The field that a score stands in, and its value there."""
    if score == "mean_aspects":
        return f"{here}.annotations", _mean_rating(completion)
    if score in completion:
        return f"{here}.{score}", completion[score]
    annotation = (completion.get("annotations") or {}).get(score) or {}
    return f"{here}.annotations.{score}.Rating", annotation.get("Rating")


def _ultrafeedback_scores(rows: Iterable[dict[str, Any]]) -> set[str]:
    names = set()
    for row in rows:
        completions = row["completions"] if isinstance(row["completions"], list) else ()
        for completion in (completion for completion in completions if isinstance(completion, dict)):
            names |= {name for name in completion if "score" in name}
            if completion.get("annotations"):
                names |= {"mean_aspects", *completion["annotations"]}
    return names


def _ultrafeedback_aspects(rows: Iterable[dict[str, Any]]) -> list[str]:
    completions = (own for row in rows for own in row["completions"] or () if isinstance(own, dict))
    return list(dict.fromkeys(name for own in completions for name in own.get("annotations") or ()))


@data_format(
    "raw UltraFeedback",
    "instruction, completions",
    prompts="instruction",
    scores=_ultrafeedback_scores,
    objectives=_ultrafeedback_aspects,
)
def ultrafeedback(row: dict[str, Any], options: DataOptions) -> Row:
    """openbmb/UltraFeedback: a completion without a score is left out.

    A completion's `custom_system_prompt` is the principle that it was sampled with, differs between the completions of
    one prompt, and was not part of the prompt in the paper's data: it isn't here either.
    """
    result = Row([user_message(row["instruction"], "instruction")], [], [])
    models, found = [], []
    for k, completion in enumerate(read_list(row["completions"], "completions")):
        here = f"completions[{k}]"
        if not isinstance(completion, dict):
            raise RowError(
                here, "wrong type", f"is a {type(completion).__name__}; it must be an object with a response"
            )
        given = {name: _ultrafeedback_value(completion, name, here) for name in options.weights or [options.score]}
        scores = [optional_score(value, field) for field, value in given.values()]
        if scores == [None] * len(scores):
            result.notes.append(MISSING)
            continue
        field, score = given.get(DEFAULT_SCORE, ("", None))
        if score == 10 and _is_rated_low(completion):
            result.notes.append(REPAIRED if options.score_bug == "repair" else _SCORE_BUG)
            if options.score_bug == "drop":
                continue
            given[DEFAULT_SCORE] = (field, 1.0)
        found.append(completion_values(given, options))
        result.completions.append(assistant_message(completion.get("response"), f"{here}.response"))
        models.append(completion.get("model"))
    if "models" in row:
        result.extra["models"] = models  # one for each completion that is left
    if options.weights:
        return combine(result, found, options)
    result.rewards = [score for own in found for score in own.values() if score is not None]
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


def _has_generated_responses(rows: list[dict[str, Any]], options: DataOptions) -> bool:
    columns = set(rows[0])
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
    return _answered(row["prompt"], "all_generated_responses", responses, "all_rm_scores", scores)


def _answered(prompt: Any, answers: str, texts: list, rewards: str, scores: list) -> Row:
    """A row of answers as text and their scores, from the columns `answers` and `rewards`."""
    prompt = read_conversation(prompt, "prompt")
    return Row(
        [user_message(prompt, "prompt")] if isinstance(prompt, str) else prompt,
        [assistant_message(text, f"{answers}[{k}]") for k, text in enumerate(texts)],
        [required_number(score, f"{rewards}[{k}]") for k, score in enumerate(scores)],
    )


def _has_labelled_rollouts(rows: list[dict[str, Any]], options: DataOptions) -> bool:
    """Whether `correctness` holds labels of several solutions: HelpSteer2 has a grade of one answer by that name."""
    columns = set(rows[0])
    if not columns.issuperset(("prompt", "correctness")) or columns.isdisjoint(("completions", "steps")):
        return False
    labels = [read_cell(row["correctness"]) for row in rows]
    steps = [read_cell(row.get("steps")) for row in rows if row.get("completions") is None]
    return (
        any(isinstance(own, list) for own in labels)
        and all(label in (0, 1, None) for own in labels if isinstance(own, list) for label in own)
        and all(isinstance(own, list) and all(isinstance(read_cell(one), list) for one in own) for own in steps)
    )


@data_format(
    "labelled rollouts",
    "prompt, completions or steps, correctness",
    answers="completions|correctness",
    conversations="prompt",
    matches=_has_labelled_rollouts,
)
def labelled_rollouts(row: dict[str, Any], options: DataOptions) -> Row:
    """Windy0822/ultrainteract_math_rollout: sampled solutions, and whether each is right.

    A solution is its text in `completions`, or else its `steps` with an empty line between. Labels beyond the solutions
    are left out.
    """
    name = "completions" if row.get("completions") is not None else "steps"
    given, labels = (read_list(row[key], key) for key in (name, "correctness"))
    texts = ["\n\n".join(read_list(own, f"steps[{k}]")) if name == "steps" else own for k, own in enumerate(given)]
    if len(labels) < len(texts):
        raise RowError(
            "correctness", "unequal lengths", f"has {len(labels)} values for {len(texts)} {name}; give one each"
        )
    return _answered(row["prompt"], name, texts, "correctness", labels[: len(texts)])


def _is_process_bench(rows: list[dict[str, Any]], options: DataOptions) -> bool:
    columns = set(rows[0])
    return columns.issuperset(("problem", "steps", "label")) and any(
        isinstance(read_cell(row["steps"]), list) for row in rows
    )


@data_format("ProcessBench", "problem, steps, label", prompts="problem", matches=_is_process_bench)
def process_bench(row: dict[str, Any], options: DataOptions) -> Row:
    """Qwen/ProcessBench: a solution in steps, and the number of its first wrong one from 0, −1 where it is right.

    Its completion is the steps with an empty line between, as its authors ask for; its reward is 1 where it is right.
    """
    steps = [read_text(step, f"steps[{j}]") for j, step in enumerate(read_list(row["steps"], "steps"))]
    right = required_number(row["label"], "label") < 0
    return Row(
        [user_message(row["problem"], "problem")],
        [assistant_message("\n\n".join(steps), "steps")],
        [float(right)],
    )
