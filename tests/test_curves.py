"""What is said of a run at its end, by its log."""

from nca_align.commands.train.summary import summary


def line(step: int, prefix: str, best: float, **others) -> dict:
    return {
        "step": step, f"{prefix}rewards/rank_1": best, f"{prefix}rewards/rank_2": -best,
        f"{prefix}rewards/accuracies": 0.5 + best / 10, f"{prefix}logratios/best": 10 * best,
        f"{prefix}logratios/worst": -10 * best, f"{prefix}logratios/rank_1": 10 * best, **others,
    }  # fmt: skip


def evaluation(step: int, best: float) -> dict:
    return line(step, "eval_", best, eval_loss=0.7)


def test_from_the_evaluation_at_the_start_to_the_last_one():
    log = [evaluation(0, 0.0), line(1, "", 1.0), evaluation(2, 2.0), line(3, "", 3.0), evaluation(4, 4.0)]
    text = summary(log, [("Hi?", "a\n b", "c")])
    assert text.startswith("What moved, on held-out prompts, from step 0 to 4:\n")
    assert "of the best completion: +0.000 → +4.000" in text
    assert "all equal → 90% (chance" in text
    assert "in the log of step 3: log-ratio of the best completion +30.00, of the worst -30.00 nats" in text
    assert text.endswith("A held-out prompt: Hi?\n  before: a b\n  after:  c")
    assert summary(log, [], kept_step=2).startswith("What moved, on held-out prompts, from step 0 to 2:\n")


def test_an_evaluation_at_the_start_alone_says_nothing_of_what_moved():
    """`eval_on_start` with `eval_strategy: no`: there the training log says it."""
    text = summary([evaluation(0, 0.0), line(1, "", 1.0), line(3, "", 3.0), {"step": 3, "train_loss": 0.6}], [])
    assert text.startswith("What moved, on training prompts, from step 0 to 3:\n")
    assert "of the best completion: +0.000 → +3.000" in text
    assert "all equal → 80% (chance" in text


def test_nothing_to_say():
    nothing = "Nothing was logged; lower `logging_steps` to see what moves."
    assert summary([{"step": 3, "train_loss": 0.6}], []) == nothing
    assert summary([evaluation(0, 0.0), {"step": 3, "train_loss": 0.6}], []) == nothing
