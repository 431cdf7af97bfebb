"""What the charts of `nca-align report` show, on its page and in its pictures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...evaluation.comparison_rows import Row, Setting, labels, over_steps, runs_of
from ...evaluation.frontier import Curve
from ...evaluation.intervals import Interval
from ...pages.charts import Chart, Series
from ..train.summary import by_rank
from .runs import Comparison, Run, curve, prefixes

Groups = Mapping[Setting, Sequence[Curve]]
MOST_CURVES = 8  # of a chart with bars


def run_charts(run: Run) -> dict[str, list[Chart]]:
    """Whose prompts → whatever charts the log has numbers for; training's alone where nothing was held out."""
    groups = prefixes(run.log)
    held_out = {prefix: name for prefix, name in groups.items() if prefix} or groups
    return {
        name: [*_ranks(run.log, prefix, name), *_calibration(run.log, prefix), *_generation(run.log, prefix, name)]
        for prefix, name in held_out.items()
    }


def _logged(log: list[dict[str, Any]], keys: Mapping[str, str]) -> list[Series]:
    """A series for each (name, metric) that was logged."""
    return [Series(name, *points) for name, key in keys.items() if (points := curve(log, key))[0]]


def _ranks(log: list[dict[str, Any]], prefix: str, name: str) -> list[Chart]:
    ranks = list(by_rank(log, "rewards", prefix))[:MOST_CURVES]
    rewards = {"best" if rank == 1 else f"{rank}.": f"{prefix}rewards/rank_{rank}" for rank in ranks}
    ratios = {f"{which}, {name}": f"{prefix}logratios/{which}" for which in ("best", "worst")}
    if prefix:
        ratios |= {f"{which}, training": f"logratios/{which}" for which in ("best", "worst")}
    accuracy = {"pairs in order": f"{prefix}rewards/accuracies", "best on top": f"{prefix}rewards/top1"}
    charts = [
        Chart(
            "Implicit reward by rank", _logged(log, rewards), "step",
            "β · log(π/π_ref), the mean over prompts, of the completion with the best reward, the second best and so "
            "on. The wider the lines fan out in their order, the better the model tells the completions apart; 0 is "
            "the reference.",
        ),
        Chart(
            "Log-ratio of the best and the worst completion", _logged(log, ratios), "step",
            "log(π/π_ref) in nats, the mean over prompts: above 0 the model finds a completion likelier than the "
            "reference did. A loss on differences alone lets both fall as long as they part (the paper's Figure 2).",
        ),
        Chart(
            "Ranking accuracy", _logged(log, accuracy), "step",
            "Share of the pairs with unequal rewards that the implicit reward orders as the reward does (a coin gets "
            "0.5; equal counts as wrong, which is why step 0 can be lower), and share of the prompts whose best "
            "completion is on top.",
            (0, 1),
        ),
    ]  # fmt: skip
    return [chart for chart in charts if chart.series]


def _calibration(log: list[dict[str, Any]], prefix: str) -> list[Chart]:
    """Target against model distribution: by bins of the target at the first and the last step, and their distance."""
    key = f"{prefix}calibration/target_bin_"
    lines = [line for line in log if any(own.startswith(key) for own in line)]
    shown = []
    for line in lines[:: max(1, len(lines) - 1)]:
        bins = sorted(own.removeprefix(key) for own in line if own.startswith(key))
        x = [line[f"{key}{i}"] for i in bins]
        shown.append(Series(f"step {line['step']}", x, [line[f"{prefix}calibration/model_bin_{i}"] for i in bins]))
    charts = [
        Chart(
            "Target against model distribution", shown, "target, softmax(rewards / α)",
            "All completions in five bins by their target. Across: the mean target; up: the mean share that the model "
            "gives them, softmax of the implicit rewards. On the dashed line the model does what the rewards ask; "
            "flatter, it tells completions apart too little; steeper, too much.",
            (0, 1), diagonal=True,
        ),
        Chart(
            "Distance of the model from its target", _logged(log, {"KL(w || p)": f"{prefix}kl/target_model"}), "step",
            "KL(w || softmax(r)) in nats, the mean over prompts: 0 where the model's distribution over the "
            "completions is the target.",
        ),
    ]  # fmt: skip
    return [chart for chart in charts if chart.series]


def _generation(log: list[dict[str, Any]], prefix: str, name: str) -> list[Chart]:
    """What the model itself answers: reward, KL, wins, length and diversity over steps."""
    charts = []
    for key, title, note in (
        ("reward", "Reward of its own answers", "Mean reward of sampled answers."),
        ("kl", "KL from the reference", "KL(π || π_ref) in nats an answer, estimated from the same samples."),
        ("win_rate", "Win rate against the reference", "Chance that an answer has a higher reward than one of the "
         "reference to the same prompt, ties counting half; 0.5 is no difference."),
        ("tokens", "Length of its answers", "Mean tokens. A reward that only length buys shows here."),
    ):  # fmt: skip
        steps, values = curve(log, f"{prefix}generation/{key}")
        errors = dict(zip(*curve(log, f"{prefix}generation/{key}_error"), strict=True))
        arms = [2 * errors.get(step, math.nan) for step in steps]
        bars = [(value - arm, value + arm) for value, arm in zip(values, arms, strict=True)]
        if steps:
            note += " Bars: two standard errors over prompts to either side; they say nothing about other seeds."
            charts.append(Chart(title, [Series(name, steps, values, y_bars=bars)], "step", note))
    names = {"distinct-1": "distinct_1", "distinct-2": "distinct_2", "cut": "cut"}
    if diversity := _logged(log, {label: f"{prefix}generation/{key}" for label, key in names.items()}):
        note = (
            "Distinct-n: different n-grams as a share of all, over all answers; a fall is a collapse onto few phrases. "
            "Cut: share of the answers that reached the limit of tokens."
        )
        charts.append(Chart("Diversity and cut answers", diversity, "step", note, (0, 1)))
    return charts


def frontier_chart(rows: Sequence[Row], groups: Groups) -> Chart:
    """Mean reward against mean KL of each setting, evaluation by evaluation, on the test split."""
    names, shown, runs = labels([*groups]), [], runs_of(rows)
    for setting in groups:
        reward, kl = (dict(over_steps(runs[setting], column)) for column in ("reward", "kl"))
        across, up = zip(*((kl[step], reward[step]) for step in reward if step in kl), strict=True)
        bars = [(one.low, one.high) for one in across]
        shown.append(_over_seeds(names[setting], [one.mean for one in across], up, bars))
    return Chart(
        "Reward against KL, test prompts", shown, "KL(π || π_ref), nats",
        "Each line is one setting, each point one evaluation of its runs from the first step to the last: how far "
        "they went from the reference, and the reward that this gave. Higher at the same KL is better. Points are "
        f"means over seeds ({seeds(groups)}), bars their 95% t-intervals in both directions, cut at the chart's edge.",
    )  # fmt: skip


def equal_kl_chart(kl: float, groups: Groups, ranked: Mapping[Setting, Interval]) -> Chart:
    """Mean rewards at a KL, from the best; settings without one stay in the legend, so that no colour changes."""
    places = {setting: [place] for place, setting in enumerate(ranked)}
    means = {setting: [mean] for setting, mean in ranked.items()}
    shown = [
        _over_seeds(name, places.get(setting, []), means.get(setting, []))
        for setting, name in labels([*groups]).items()
    ]
    return Chart(f"Reward at KL {kl:g}", shown, "")


def likelihood_charts(rows: Sequence[Row], groups: Groups) -> list[Chart]:
    """Log-ratios of the best and the worst completion, and the ranking accuracy, setting by setting over steps."""
    names, charts = labels([*groups]), []
    ratio = (
        "log(π/π_ref) in nats of the {} completion of the test rows, the mean over prompts; above 0 it is likelier now"
    )
    seen = "log(π/π_ref) in nats of the best completion of training prompts: the paper's Figure 2"
    accuracy = (
        "Share of the pairs with unequal rewards that the implicit reward orders right (a coin gets 0.5); at step 0 "
        "all implicit rewards are equal"
    )
    for split, column, title, what in (
        ("train", "logratio_best", "Log-ratio of the best completion, training prompts", seen),
        ("test", "logratio_best", "Log-ratio of the best completion, test prompts", ratio.format("best")),
        ("test", "logratio_worst", "Log-ratio of the worst completion, test prompts", ratio.format("worst")),
        ("test", "accuracy", "Ranking accuracy, test prompts", accuracy),
    ):
        shown, runs = [], runs_of(rows, split)
        for setting in groups:
            points = over_steps(runs.get(setting, {}), column)
            if points := [point for point in points if point[0] > 0 or column != "accuracy"]:
                steps, values = zip(*points, strict=True)
                shown.append(_over_seeds(names[setting], steps, values))
        if shown:
            note = f"{what}. Means over seeds ({seeds(groups)}), bars their 95% t-intervals, cut at the chart's edge."
            charts.append(Chart(title, shown, "step", note))
    return charts


def plotted(one: Run | Comparison) -> tuple[list[Chart], str]:
    """What the plot of a run or comparison shows, and what its bars are in words.

    Of a run these are its held-out prompts, of a comparison's cell those of the test.
    """
    if isinstance(one, Run):
        charts = run_charts(one)
        return charts.get("test") or next(reversed(charts.values()), []), "bars: two standard errors over prompts"
    chosen = one.chosen()
    if not chosen:
        return [], ""
    return [frontier_chart(one.rows, chosen), *likelihood_charts(one.rows, chosen)], over_seeds(chosen)


def over_seeds(groups: Groups) -> str:
    """What points and bars of means over seeds are, and how they lie in a plot."""
    return (
        f"means over seeds ({seeds(groups)}), bars: 95% t-intervals\n"
        "bars are cut at a chart's edge, and points of one step stand side by side"
    )


def seeds(groups: Groups) -> str:
    """n in words."""
    ns = sorted({len(own) for own in groups.values()})
    alone = "; one seed has no interval" if ns[:1] == [1] else ""
    return f"n = {ns[0]}{alone}" if len(ns) == 1 else f"n from {ns[0]} to {ns[-1]}{alone}"


def _over_seeds(
    name: str, x: Sequence[float], y: Sequence[Interval], x_bars: Sequence[tuple[float, float]] | None = None
) -> Series:
    return Series(name, x, [one.mean for one in y], x_bars, [(one.low, one.high) for one in y])
