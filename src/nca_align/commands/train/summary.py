"""In plain words what moved in a run, by its log."""

from typing import Any

from ...evaluation.training_log import Log, by_rank, last_evaluation


def summary(log: Log, answers: list[tuple[Any, str, str]], kept_step: int | None = None) -> str:
    """What moved from the start to the last evaluation, and prompts answered before and after; where none came after
    the start, to the last training log.

    Args:
        log: a trainer's `log_history`.
        answers: prompt, answer before, answer after.
        kept_step: the step whose model is kept; None for the last one.
    """
    evaluated = last_evaluation(log, kept_step)
    trained = next((line for line in reversed(log) if "logratios/rank_1" in line), None)
    # of step 0 alone, by `eval_on_start`, nothing has moved
    prefix, last = ("eval_", evaluated) if evaluated is not None and evaluated["step"] > 0 else ("", trained)
    if last is None:
        return "Nothing was logged; lower `logging_steps` to see what moves."
    # without a line of step 0 all are 0 there
    start = next((line for line in log if line["step"] == 0 and f"{prefix}rewards/rank_1" in line), {})
    where = "held-out prompts" if prefix else "training prompts"
    text = [f"What moved, on {where}, from step 0 to {last['step']}:"]
    for rank in by_rank([last], "rewards", prefix):
        key = f"{prefix}rewards/rank_{rank}"
        name = "best" if rank == 1 else f"{rank}."
        text.append(f"  implicit reward of the {name} completion: {start.get(key, 0):+.3f} → {last[key]:+.3f}")
    accuracy = f"{prefix}rewards/accuracies"
    if accuracy in last:
        text.append(f"  pairs that it orders as their rewards do: all equal → {last[accuracy]:.0%} (chance is 50%)")
    ratio = f"{prefix}logratios/best"
    text.append(f"  log-ratio of the best completion: {start.get(ratio, 0):+.2f} → {last[ratio]:+.2f} nats")
    if prefix and trained is not None:
        text.append(
            f"On the prompts that it was trained on, in the log of step {trained['step']}: log-ratio of the best "
            f"completion {trained['logratios/best']:+.2f}, of the worst {trained['logratios/worst']:+.2f} nats."
        )
    for prompt, before, after in answers:
        question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        text += [f"A held-out prompt: {question}", f"  before: {_line(before)}", f"  after:  {_line(after)}"]
    return "\n".join(text)


def _line(answer: str) -> str:
    return " ".join(answer.split())
