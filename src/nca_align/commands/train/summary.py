"""The verdict on a run, by its log: whether its own answers got better, by more than chance, and what it cost."""

import math
from collections.abc import Mapping
from typing import Any

from ...evaluation.intervals import Estimate, Interval
from ...evaluation.training_log import Log, last_evaluation
from ...training.console import has_moved

_MARGIN = "  ± is a 95% interval over the prompts. It is one run: another seed may end elsewhere."
_RATIOS = ("logratios/best", "logratios/right", "logratios/wrong")
_Line = Mapping[str, Any]


def summary(
    log: Log,
    answers: list[tuple[Any, str, str]],
    kept_step: int | None = None,
    to_evaluate: str = "`eval_strategy: epoch`",
) -> str:
    """The verdict in words: own answers before and after, their length, the best completion, the ranking.

    "Before" are the reference's answers, which each evaluation has beside the policy's. So a run that was resumed has
    them, and one whose step 0 was not evaluated.

    Args:
        log: a trainer's `log_history`.
        answers: prompt, answer before, answer after.
        kept_step: the step whose model is kept; None for the last one.
        to_evaluate: what would have had held-out prompts evaluated, in words.
    """
    evaluated = last_evaluation(log, kept_step)
    if evaluated is not None and evaluated["step"] == 0:  # by `eval_on_start` alone: there nothing has moved
        evaluated = None
    trained = next((line for line in reversed(log) if any(name in line for name in _RATIOS)), None)
    if (last := evaluated or trained) is None:
        return "Nothing was logged; lower `logging_steps` to see what moves."
    where, prefix = ("held-out prompts", "eval_") if evaluated else ("training prompts", "")
    text = [f"What moved, on {where}, from step 0 to {last['step']}:"]
    text += [
        f"  {line}"
        for line in (
            *_own_answers(log, evaluated, to_evaluate), *_best_completion(evaluated, trained or {}),
            *_labels(last, prefix)
        )
    ]  # fmt: skip
    if f"{prefix}rewards/accuracies" in last and has_moved(last, prefix):
        share = _estimate(last, f"{prefix}rewards/accuracies").interval(_prompts(last)).text(".0%").replace("%", "")
        text.append(f"  Pairs that it orders as their rewards do: {share} %. Chance is 50 %.")
    if any("±" in line for line in text):
        text.append(_MARGIN)
    for prompt, before, after in answers:
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        text += [f"A held-out prompt: {question}", f"  before: {_line(before)}", f"  after:  {_line(after)}"]
    return "\n".join(text)


def _own_answers(log: Log, evaluated: _Line | None, to_evaluate: str) -> list[str]:
    """Whether the answers got better, and whether their length explains it."""
    name = "eval_generation/gain"
    line = next((line for line in log if evaluated and name in line and line["step"] == evaluated["step"]), None)
    if line is None:
        how = "`eval_scorer`" if evaluated else f"`eval_scorer` with {to_evaluate}"
        see = "see `nca-align train --help eval_scorer`"
        return [f"Whether its own answers got better was not measured: {how} does that, {see}."]

    def of(metric: str) -> Interval:
        return _estimate(line, f"eval_generation/{metric}").interval(int(line["eval_generation/prompts"]))

    gain, same = of("gain"), of("gain_same_length")
    rewards = f"mean reward {of('reference_reward').text()} → {of('reward').text()}, a difference of {_signed(gain)}"
    verdict, change = "One prompt does not tell whether its own answers changed by more than chance", _change(gain)
    if change is not None:
        verdict = {
            1: "Its own answers got better, by more than chance explains",
            -1: "Its own answers got worse, by more than chance explains",
            0: "No change in its own answers beyond chance",
        }[change]
    length = (
        f"Their length: {line['eval_generation/reference_tokens']:.0f} → {line['eval_generation/tokens']:.0f} tokens"
    )
    if share := round(100 * line["eval_generation/cut"]):
        length += f", {share} % of them cut at `eval_new_tokens`"
    if change:
        if _change(same) is None:
            why = "Whether length did it is not known: it takes prompts with answers of unlike length"
        elif _change(same) == change:
            why = f"At the same length the difference is {_signed(same)}: length alone does not explain it"
        else:
            why = f"At the same length the difference is {_signed(same)}: length may explain it"
        length += f". {why}"
    return [f"{verdict}: {rewards}.", f"{length}."]


def _labels(last: _Line, prefix: str) -> list[str]:
    """What became of right and of wrong completions, and how well they are told apart."""
    sides = [f"{last[name]:+.2f} nats of {side} completions" for side in ("right", "wrong")
             if (name := f"{prefix}logratios/{side}") in last]  # fmt: skip
    lines = [f"Log-ratio: {', '.join(sides)}."] if sides else []
    if f"{prefix}outcome/auc" in last:
        auc, brier, ece = (last[f"{prefix}outcome/{name}"] for name in ("auc", "brier", "ece"))
        lines.append(
            f"A right completion is above a wrong one, of any prompt, {100 * auc:.0f} % of the time (AUC; chance is 50 "
            f"%). As a probability: Brier score {brier:.3f}, calibration error {ece:.3f}."
        )
    return lines


def _best_completion(evaluated: _Line | None, trained: _Line) -> list[str]:
    """Whether the best completion stayed likely, on held-out prompts by more than chance; nothing of single ones."""
    if "logratios/best" not in trained and "eval_logratios/best" not in (evaluated or {}):
        return []
    training = ""
    if "logratios/best" in trained:
        training = (
            f"{trained['logratios/best']:+.2f} nats on training prompts (worst {trained['logratios/worst']:+.2f})"
        )
    if evaluated is None:
        return [f"Log-ratio of the best completion: {training}, in the log of step {trained['step']}."]
    if "eval_logratios/best" not in evaluated:  # single completions are held out
        return [f"Log-ratio of the best completion: {training}."]
    ratio = _estimate(evaluated, "eval_logratios/best").interval(_prompts(evaluated))
    verdict = {
        1: "The best completion got likelier",
        -1: "The best completion got less likely",
        0: "The best completion stayed as likely, within chance",
        None: "The best completion",
    }[_change(ratio)]
    held_out = (
        f"log-ratio {ratio.text('+.2f')} nats on held-out prompts (worst {evaluated['eval_logratios/worst']:+.2f})"
    )
    return [f"{verdict}: {held_out}{training and f', {training}'}."]


def _estimate(line: _Line, metric: str) -> Estimate:
    return Estimate(line[metric], line.get(f"{metric}_error", math.nan))


def _prompts(line: _Line) -> int:
    return int(line.get("eval_prompts", 1))


def _change(interval: Interval) -> int | None:
    """1 above 0, −1 below, 0 where the interval holds 0; None where there is no interval."""
    if not math.isfinite(interval.low):
        return None
    return (interval.low > 0) - (interval.high < 0)


def _signed(interval: Interval) -> str:
    return f"{'+' if interval.mean > 0 else ''}{interval.text()}"


def _line(answer: str) -> str:
    return " ".join(answer.split())
