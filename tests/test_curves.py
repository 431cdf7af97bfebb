"""What is drawn of a run at its end, by its log."""

import random
from itertools import combinations, product

import pytest

from nca_align import NCAConfig
from nca_align.commands.train.curves import draw_curves, plot_curves, run_title
from nca_align.pages.styles import apart

RATIOS, PAIRS, REWARD, LOSS = (
    "Log-ratio log(π/π_ref) by rank, nats", "Pairs ordered as their rewards are", "Reward of its own answers", "Loss"
)  # fmt: skip


def ranked(step: int, prefix: str, k: int, noise: random.Random) -> dict:
    ratios = [step * (2 - rank) / 50 + noise.gauss(0, 0.3) * (step > 0) for rank in range(1, k + 1)]
    return {
        "step": step, f"{prefix}loss": 1 / (1 + step), f"{prefix}rewards/accuracies": min(1, step) * 0.6,
        f"{prefix}logratios/best": ratios[0], **{f"{prefix}logratios/rank_{i}": r for i, r in enumerate(ratios, 1)},
    }  # fmt: skip


@pytest.mark.parametrize(("name", "parts"), [("order", "β 0.1"), ("reads", "α 0.3, β 0.1")])
def test_a_loss_of_ones_own_has_its_short_name_and_alpha_if_it_reads_it(name, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "title_losses.py").write_text(
        "def order(pi_logps, ref_logps, rewards, alpha, beta, mask):\n"
        "    return -(rewards * (pi_logps - ref_logps) * mask).sum(1)\n\n"
        "def reads(*tensors_and_numbers):\n    return order(*tensors_and_numbers) / tensors_and_numbers[3]\n"
    )
    args = NCAConfig("x", loss_type=f"title_losses:{name}", alpha=0.3, beta=0.1, use_cpu=True, bf16=False)
    assert run_title("a/model", args, []) == f"model: {name}, {parts}"


def run_log(steps=96, k=4, every=8, evaluations=(), answers=False, prefix="eval_") -> list[dict]:
    noise = random.Random(k)
    log = [ranked(step, "", k, noise) for step in range(every, steps + 1, every)]
    for step in evaluations:
        log.append(ranked(step, prefix, k, noise))
        if answers:
            log.append({"step": step, f"{prefix}generation/reward": 0.5, f"{prefix}generation/reward_error": 0.1})
    return log


def panels(figure) -> dict:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def ends(axes) -> list[str]:
    """What stands at the ends of the lines."""
    return [text.get_text() for text in axes.texts]


def widths(axes) -> list[float]:
    return [line.get_linewidth() for line in axes.lines if len(line.get_xdata()) > 2]


@pytest.mark.parametrize(
    ("log", "shown"),
    [
        (run_log(evaluations=(0, 48, 96), answers=True), [RATIOS, PAIRS, REWARD, LOSS]),
        (run_log(evaluations=(0, 48, 96), answers=True, prefix="eval_test_"), [RATIOS, PAIRS, REWARD, LOSS]),
        (run_log(evaluations=(96,)), [RATIOS, PAIRS, LOSS]),
        (run_log(), [RATIOS, PAIRS, LOSS]),
        (run_log(steps=500, k=16, every=5, evaluations=range(0, 501, 100)), [RATIOS, PAIRS, LOSS]),
        (run_log(steps=3, every=1, evaluations=(3,), answers=True), [RATIOS, PAIRS, REWARD, LOSS]),
        (run_log(steps=1, every=1, k=2), [RATIOS, PAIRS, LOSS]),
        (run_log(steps=5000, every=10, evaluations=range(0, 5001, 50)), [RATIOS, PAIRS, LOSS]),
        ([{"step": step, "loss": 1.0} for step in (1, 2, 3)], [LOSS]),
    ],
)  # fmt: skip
def test_the_figure_has_a_panel_for_what_was_logged_and_no_label_lies_on_another(log, shown):
    figure = draw_curves(log, "a-model-with-quite-a-long-name: nca, α 0.3, β 0.1, K ≤ 16")
    assert [*panels(figure)] == shown
    texts = [text for axes in figure.axes for text in (*axes.texts, axes.title, axes._left_title) if text.get_text()]
    assert len(texts) >= 2
    boxes = [text.get_window_extent() for text in [*texts, *figure.texts]]
    whole = figure.bbox
    for box in boxes:
        assert whole.x0 <= box.x0 < box.x1 <= whole.x1
        assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    for text, axes in product(texts, figure.axes):
        inside = axes.get_window_extent()
        assert not text.get_window_extent().overlaps(inside)  # where the lines are
    assert all(axes.get_legend() is None for axes in figure.axes)


def test_held_out_prompts_are_thick_training_thin_and_chance_is_marked():
    log = run_log(evaluations=(0, 48, 96), answers=True)
    shown = panels(draw_curves(log))
    assert ends(shown[RATIOS]) == ["best", "2.", "3.", "4."]
    thick, thin = widths(shown[RATIOS])[:4], widths(shown[RATIOS])[4:]
    assert min(thick) > max(thin)
    assert len(thin) == 4
    assert ends(shown[PAIRS]) == ["chance", "held-out", "training"]
    assert any([*line.get_ydata()] == [0.5, 0.5] for line in shown[PAIRS].lines)
    held_out = next(line for line in shown[PAIRS].lines if line.get_linewidth() == 2)
    assert [*held_out.get_xdata()] == [48, 96]  # at step 0 all implicit rewards are equal, which tells nothing
    (bars,) = shown[REWARD].containers
    assert bars.lines[2][0].get_segments()[0][:, 1] == pytest.approx([0.3, 0.7])


@pytest.mark.parametrize("evaluated", [False, True])
def test_single_completions_stand_by_label_as_others_do_by_rank(evaluated):
    log = [
        {"step": step, f"{prefix}logratios/right": step / 9, f"{prefix}logratios/wrong": -step / 9}
        for step in range(8, 97, 8) for prefix in (["", "eval_"] if evaluated else [""])
    ]  # fmt: skip
    figure = draw_curves(log)
    shown = panels(figure)[RATIOS.replace("rank", "label")]
    assert ends(shown) == ["right", "wrong"]
    (note,) = [text.get_text() for text in figure.texts if "prompts" in text.get_text()]
    assert note.startswith("Thick: held-out prompts. Thin: training" if evaluated else "Training prompts.")
    assert note.endswith("Right: completions of label 1. Above 0 they are likelier than before training.")
    curves = [line for line in shown.lines if len(line.get_xdata()) > 2]
    lines = {(line.get_ydata()[-1] > 0, line.get_linewidth()): line.get_color() for line in curves}
    thick = max(width for _, width in lines)
    assert lines[True, thick] != lines[False, thick]
    if evaluated:
        assert len(lines) == 4
        assert all(colour == lines[above, thick] for (above, _), colour in lines.items())


def test_without_held_out_prompts_training_is_thick():
    shown = panels(draw_curves(run_log()))
    assert min(widths(shown[RATIOS])) == 2
    assert ends(shown[LOSS]) == ["training"]


def test_a_long_training_curve_is_averaged_and_keeps_its_mean():
    log = run_log(steps=5000, every=10)
    line = max(panels(draw_curves(log))[RATIOS].lines, key=lambda one: one.get_ydata()[-1])
    assert len(line.get_xdata()) <= 60
    logged = [one["logratios/rank_1"] for one in log]
    assert line.get_ydata()[0] == pytest.approx(sum(logged[:9]) / 9)
    assert line.get_xdata()[-1] == 5000


def test_ranks_have_colours_in_their_order():
    lines = [line for line in panels(draw_curves(run_log(k=16)))[RATIOS].lines if len(line.get_xdata()) > 2]
    blues = [int(line.get_color()[5:], 16) for line in lines]
    assert blues == sorted(blues, reverse=True)
    assert len({*blues}) == 16


def test_nothing_to_draw(tmp_path):
    assert plot_curves([{"step": 3, "train_loss": 0.6}], tmp_path / "curves.png") is None
    assert not [*tmp_path.iterdir()]
    assert plot_curves(run_log(), tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_title_names_model_loss_and_k(tmp_path):
    args = NCAConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, loss_type=["nca", "sft"], alpha=0.3, beta=0.1)
    assert run_title("some/where/model-7b", args, run_log(k=6)) == "model-7b: nca + sft, α 0.3, β 0.1, K ≤ 6"
    args = NCAConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, loss_type=["all_pairs"], beta=0.1)
    assert run_title("m", args, []) == "m: all_pairs, β 0.1"


def test_labels_stand_apart_in_their_order_and_near_to_where_they_belong():
    assert apart([5.0, 1.0, 20.0], 3, 0, 30) == [5.0, 1.0, 20.0]
    assert apart([5.0, 5.0, 20.0], 4, 0, 30) == [3.0, 7.0, 20.0]
    assert apart([1.0, 1.0], 4, 0, 30) == [0.0, 4.0]
    assert apart([30.0, 29.0, 30.0], 4, 0, 30) == [26.0, 22.0, 30.0]
    assert apart([1.0] * 5, 4, 0, 8) == [0.0, 2.0, 4.0, 6.0, 8.0]  # no room
    assert apart([], 4, 0, 8) == []
