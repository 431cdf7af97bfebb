"""The verdict on a run, by its log, and the commands that come after it."""

import shlex
import sys
from math import nan

import pytest

from nca_align.commands.train.after_run import after_run
from nca_align.commands.train.summary import summary


def line(step: int, prefix: str, best: float, **others) -> dict:
    return {
        "step": step, f"{prefix}rewards/rank_1": best, f"{prefix}rewards/accuracies": 0.5 + best / 10,
        f"{prefix}logratios/best": 10 * best, f"{prefix}logratios/worst": -10 * best, **others,
    }  # fmt: skip


def evaluation(step: int, best: float, error: float = 1.0, prompts: int = 36) -> dict:
    errors = {"eval_logratios/best_error": error, "eval_rewards/accuracies_error": 0.03}
    return line(step, "eval_", best, eval_loss=0.7, eval_prompts=prompts, **errors)


def generation(step: int, gain=(0.25, 0.05), same=(0.2, 0.05), prompts: int = 36, **others) -> dict:
    figures = {
        "prompts": prompts, "reference_reward": 0.2, "reference_reward_error": 0.04, "reward": 0.2 + gain[0],
        "reward_error": 0.04, "gain": gain[0], "gain_error": gain[1], "gain_same_length": same[0],
        "gain_same_length_error": same[1], "reference_tokens": 38.2, "tokens": 52.4, "cut": 0.0, **others,
    }  # fmt: skip
    return {"step": step, **{f"eval_generation/{name}": value for name, value in figures.items()}}


def verdict(**more) -> str:
    return summary([generation(0, gain=(0, 0)), evaluation(0, 0.0), evaluation(4, 0.01), generation(4, **more)], [])


def test_from_the_start_to_the_last_evaluation():
    log = [evaluation(0, 0.0), line(1, "", 1.0), evaluation(2, 2.0), line(3, "", 3.0), evaluation(4, 4.0)]
    text = summary(log, [("Hi?", "a\n b", "c")])
    assert text.startswith("What moved, on held-out prompts, from step 0 to 4:\n")
    assert "log-ratio +40.00 ± 2.03 nats on held-out prompts (worst -40.00)" in text
    assert "+30.00 nats on training prompts (worst -30.00)" in text
    assert "Pairs that it orders as their rewards do: 90 ± 6 %. Chance is 50 %." in text
    assert text.endswith("A held-out prompt: Hi?\n  before: a b\n  after:  c")
    kept = summary(log, [], kept_step=2)
    assert kept.startswith("What moved, on held-out prompts, from step 0 to 2:\n")
    assert "log-ratio +20.00" in kept


@pytest.mark.parametrize(
    ("gain", "prompts", "expected"),
    [
        ((0.25, 0.05), 36, "Its own answers got better, by more than chance explains: mean reward 0.200 ± 0.081 →"),
        ((-0.25, 0.05), 36, "Its own answers got worse, by more than chance explains: mean reward 0.200 ± 0.081 →"),
        ((0.25, 0.13), 36, "No change in its own answers beyond chance: mean reward"),
        ((-0.25, 0.13), 36, "No change in its own answers beyond chance: mean reward"),
        ((0.0, 0.0), 36, "No change in its own answers beyond chance: mean reward"),
        # 2.1 standard errors are beyond chance with 36 prompts, not with 4
        ((0.21, 0.1), 36, "got better, by more than chance explains"),
        ((0.21, 0.1), 4, "No change in its own answers beyond chance"),
        ((0.25, nan), 1, "One prompt does not tell whether its own answers changed by more than chance"),
    ],
)
def test_better_or_worse_is_said_of_what_chance_does_not_explain(gain, prompts, expected):
    assert expected in verdict(gain=gain, prompts=prompts)


def test_the_difference_and_its_interval_are_told():
    assert "a difference of +0.250 ± 0.102." in verdict()
    assert "a difference of -0.250 ± 0.102." in verdict(gain=(-0.25, 0.05))


@pytest.mark.parametrize(
    ("same", "expected"),
    [
        ((0.2, 0.05), "the difference is +0.200 ± 0.102: length alone does not explain it"),
        ((0.05, 0.05), "the difference is +0.050 ± 0.102: length may explain it"),
        ((-0.2, 0.05), "the difference is -0.200 ± 0.102: length may explain it"),
        ((nan, nan), "Whether length did it is not known"),
    ],
)
def test_whether_length_did_it(same, expected):
    text = verdict(same=same)
    assert "Their length: 38 → 52 tokens. " in text
    assert expected in text
    assert expected not in verdict(gain=(0.01, 0.05), same=same)  # there is nothing to explain


def test_answers_that_were_cut_are_counted():
    assert "52 tokens, 12 % of them cut at `eval_new_tokens`." in verdict(cut=0.118)


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (0.3, "The best completion got likelier: log-ratio +3.00 ± 2.03 nats"),
        (-0.3, "The best completion got less likely: log-ratio -3.00 ± 2.03 nats"),
        (-0.1, "The best completion stayed as likely, within chance: log-ratio -1.00 ± 2.03 nats"),
    ],
)
def test_whether_the_best_completion_stayed_likely(best, expected):
    assert expected in summary([evaluation(4, best)], [])


def test_a_log_without_errors_has_figures_and_no_verdict_on_them():
    bare = line(4, "eval_", -0.3, eval_loss=0.7)
    text = summary([bare], [])
    assert "The best completion: log-ratio -3.00 nats on held-out prompts" in text
    assert "as their rewards do: 47 %." in text
    assert "±" not in text


def test_what_was_not_measured_is_said_with_how_to():
    assert "was not measured: `eval_scorer` does that" in summary([evaluation(4, 1.0)], [])
    # answers were rewarded at the start alone
    text = summary([evaluation(0, 0.0), generation(0), line(3, "", 3.0)], [])
    assert "was not measured: `eval_scorer` with `eval_strategy: epoch` does that" in text
    assert "see `nca-align train --help eval_scorer`." in text
    assert "`eval_scorer` with held-out rows does that" in summary([line(3, "", 3.0)], [], to_evaluate="held-out rows")


def test_where_nothing_moved_nothing_is_ranked():
    """Every pair is a tie then, which counts as out of order."""
    assert "Pairs that it orders" not in summary([line(1, "", 0.0)], [])
    assert "Pairs that it orders" in summary([line(1, "", 0.1)], [])
    assert "Pairs that it orders" not in summary([evaluation(1, 0.0)], [])


def test_an_evaluation_at_the_start_alone_says_nothing_of_what_moved():
    """`eval_on_start` with `eval_strategy: no`: there the training log says it."""
    text = summary([evaluation(0, 0.0), line(1, "", 1.0), line(3, "", 3.0), {"step": 3, "train_loss": 0.6}], [])
    assert text.startswith("What moved, on training prompts, from step 0 to 3:\n")
    assert "best completion: +30.00 nats on training prompts (worst -30.00), in the log of step 3." in text
    assert "as their rewards do: 80 %." in text


def test_the_kept_step_has_its_own_answers():
    log = [evaluation(2, 0.1), generation(2), evaluation(4, 0.1), generation(4, gain=(-0.25, 0.05))]
    assert "got worse" in summary(log, [])
    assert "got better" in summary(log, [], kept_step=2)


def test_nothing_to_say():
    nothing = "Nothing was logged; lower `logging_steps` to see what moves."
    assert summary([{"step": 3, "train_loss": 0.6}], []) == nothing
    assert summary([evaluation(0, 0.0), {"step": 3, "train_loss": 0.6}], []) == nothing


class TestAfterRun:
    @pytest.fixture(autouse=True)
    def _activated(self, monkeypatch):
        monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)

    def commands(self, *arguments) -> list[list[str]]:
        lines = after_run(*arguments).splitlines()
        return [shlex.split(line, comments=True) for line in lines if line.startswith("  ")]

    def test_paths_are_filled_in_and_quoted_and_free(self, tmp_path):
        run = tmp_path / "my run"
        found = self.commands(f"{run}/", True)
        assert found[0] == ["nca-align", "export", "--model_name_or_path", str(run), "--output", f"{run}-model"]
        assert found[-2:] == [["transformers", "serve", f"{run}-model"], ["transformers", "chat", f"{run}-model"]]
        (tmp_path / "my run-model").mkdir()  # export refuses a folder that is there
        assert self.commands(run, True)[0][-1] == f"{run}-model-2"

    def test_without_a_chat_template_there_is_no_chat(self):
        assert not any(command[:2] == ["transformers", "chat"] for command in self.commands("run", False))

    def test_a_shell_that_lacks_the_commands_is_told_of_them(self, monkeypatch):
        monkeypatch.setattr(sys, "prefix", "/env")
        assert self.commands("run", False)[0] == [".", "/env/bin/activate"]
        monkeypatch.setenv("VIRTUAL_ENV", "/env")
        assert self.commands("run", False)[0][0] == "nca-align"

    def test_code_that_comes_with_the_model_is_allowed_again(self):
        export, *_, serve, _ = self.commands("run", True, True)
        assert export[-2:] == ["--trust_remote_code", "true"]
        assert serve[-1] == "--trust-remote-code"
