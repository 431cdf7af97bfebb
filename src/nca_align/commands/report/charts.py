"""What the charts of `nca-align report` show, on its page and in its pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...evaluation.comparison_rows import Row, Setting, labels, over_steps, runs_of
from ...evaluation.frontier import Curve, curves_of
from ...evaluation.intervals import Interval
from ...evaluation.training_log import by_rank, error_bars, logged, prefixes, rank_name
from ...pages.charts import Chart, Series
from ...pages.styles import ordered_styles
from .endpoints import endpoint_charts
from .runs import Comparison, Run

Groups = Mapping[Setting, Sequence[Curve]]
MOST_CURVES = 8  # of a chart with bars


_ERRORS = "Bars: two standard errors over prompts to either side; they say nothing about other seeds."


def run_charts(run: Run) -> dict[str, list[Chart]]:
    """Whose prompts → whatever charts the log has numbers for; training's alone where nothing was held out."""
    groups = prefixes(run.log)
    held_out = {prefix: name for prefix, name in groups.items() if prefix} or groups
    return {name: _run_charts(run.log, prefix, name) for prefix, name in held_out.items()}


def _run_charts(log: list[dict[str, Any]], prefix: str, name: str) -> list[Chart]:
    ranks = by_rank(log, "rewards", prefix)
    ratios = {f"{which}, {name}": f"{prefix}logratios/{which}" for which in ("best", "worst")}
    if prefix:
        ratios |= {f"{which}, training": f"logratios/{which}" for which in ("best", "worst")}
    answers, share = f"{prefix}generation/", (0.0, 1.0)
    told: list[tuple[str, dict[str, str], tuple[float, float] | None, str]] = [
        ("Implicit reward by rank",
         {rank_name(rank): f"{prefix}rewards/rank_{rank}" for rank in ranks}, None,
         "β · log(π/π_ref), the mean over prompts, of the completion with the best reward, the second best and so on. "
         "The wider the lines fan out in their order, the better the model tells the completions apart; 0 is the "
         "reference."),
        ("Log-ratio of the best and the worst completion", ratios, None,
         "log(π/π_ref) in nats, the mean over prompts: above 0 the model finds a completion likelier than the "
         "reference did. A loss on differences alone lets both fall as long as they part (the paper's Figure 2)."),
        ("Ranking accuracy",
         {"pairs in order": f"{prefix}rewards/accuracies", "best on top": f"{prefix}rewards/top1"}, share,
         "Share of the pairs with unequal rewards that the implicit reward orders as the reward does (a coin gets 0.5; "
         "equal counts as wrong, which is why step 0 can be lower), and share of the prompts whose best completion is "
         "on top."),
        ("Log-ratio of right and of wrong completions",
         {side: f"{prefix}logratios/{side}" for side in ("right", "wrong")}, None,
         "log(π/π_ref) in nats, the mean over completions: apart where labels are learnt."),
        ("Right and wrong completions told apart",
         {"right above wrong (AUC)": f"{prefix}outcome/auc", "sign right": f"{prefix}outcome/accuracy"}, share,
         "AUC: chance that a right completion, of any prompt, has a higher implicit reward than a wrong one. Sign: "
         "share of the completions that are right above 0 and wrong below; 0 is half."),
        ("Calibration of σ(implicit reward)",
         {"Brier score": f"{prefix}outcome/brier", "calibration error": f"{prefix}outcome/ece"}, None,
         "As a probability that a completion is right: mean squared error, and mean gap by ten bins. 0 is perfect."),
        ("Distance of the model from its target", {"KL(w || p)": f"{prefix}kl/target_model"}, None,
         "KL(w || softmax(r)) in nats, the mean over prompts: 0 where the model's distribution over the completions is "
         "the target."),
        ("Reward of its own answers", {name: f"{answers}reward"}, None, f"Mean reward of sampled answers. {_ERRORS}"),
        ("KL from the reference", {name: f"{answers}kl"}, None,
         f"KL(π || π_ref) in nats an answer, estimated from the same samples. {_ERRORS}"),
        ("Win rate against the reference", {name: f"{answers}win_rate"}, None,
         "Chance that an answer has a higher reward than one of the reference to the same prompt, ties counting half; "
         f"0.5 is no difference. {_ERRORS}"),
        ("Length of its answers", {name: f"{answers}tokens"}, None,
         f"Mean tokens. A reward that only length buys shows here. {_ERRORS}"),
        ("Diversity and cut answers",
         {own.replace("_", "-"): f"{answers}{own}" for own in ("distinct_1", "distinct_2", "cut")}, share,
         "Distinct-n: different n-grams as a share of all, over all answers; a fall is a collapse onto few phrases. "
         "Cut: share of the answers that reached the limit of tokens."),
    ]  # fmt: skip
    charts = [Chart(title, _logged(log, metrics), "step", note, y_range) for title, metrics, y_range, note in told]
    charts[0] = replace(charts[0], colours=ordered_styles)
    charts[2] = replace(charts[2], levels={"chance": 0.5})
    charts.insert(3, _calibration(log, f"{prefix}calibration/"))
    return [chart for chart in charts if chart.series]


def _logged(log: list[dict[str, Any]], metrics: Mapping[str, str]) -> list[Series]:
    """A series for each (name, metric) that was logged, its bars two standard errors where these were logged too."""
    found = []
    for name, metric in metrics.items():
        steps, values = logged(log, metric)
        if steps:
            found.append(Series(name, steps, values, y_bars=error_bars(log, metric)))
    return found


def _calibration(log: list[dict[str, Any]], prefix: str) -> Chart:
    """By bins of the target, at the first and the last step."""
    key = f"{prefix}target_bin_"
    lines = [line for line in log if any(own.startswith(key) for own in line)]
    shown = []
    for line in lines[:: max(1, len(lines) - 1)]:
        bins = sorted(own.removeprefix(key) for own in line if own.startswith(key))
        x = [line[f"{key}{i}"] for i in bins]
        shown.append(Series(f"step {line['step']}", x, [line[f"{prefix}model_bin_{i}"] for i in bins]))
    note = (
        "All completions in five bins by their target. Across: the mean target; up: the mean share that the model "
        "gives them, softmax of the implicit rewards. On the dashed line the model does what the rewards ask; "
        "flatter, it tells completions apart too little; steeper, too much."
    )
    x_label = "target, softmax(rewards / α)"
    return Chart("Target against model distribution", shown, x_label, note, (0, 1), diagonal=True)


def frontier_chart(rows: Sequence[Row], groups: Groups) -> Chart:
    """Mean reward against mean KL of each setting, evaluation by evaluation, on the test split."""
    names, shown, runs = labels([*groups]), [], runs_of(rows)
    for setting in groups:
        reward, kl = (dict(over_steps(runs[setting], column)) for column in ("reward", "kl"))
        across, up = zip(*((kl[step], reward[step]) for step in reward if step in kl), strict=True)
        bars = [(one.low, one.high) for one in across]
        shown.append(_over_seeds(names[setting], [one.mean for one in across], up, bars))
    return Chart(
        "Reward against KL, paths of runs", shown, "KL(π || π_ref), nats",
        "Test prompts. Each line is the path of one setting, each point one evaluation of its runs, from the first "
        "step to the last. Near the start the gradients of NCA and InfoNCA are equal up to scale: what is alike on the "
        f"way may end apart. Points are means over seeds ({seeds(groups)}), bars their 95% t-intervals in both "
        "directions, cut at the chart's edge.",
    )  # fmt: skip


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
            points = [point for point in points if point[0] > 0 or column != "accuracy"]
            # one without values stays in the legend, so that no colour changes
            shown.append(_over_seeds(names[setting], [step for step, _ in points], [value for _, value in points]))
        if any(one.x for one in shown):
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
    chosen, ends = one.chosen(), endpoint_charts(one.rows)
    if not chosen:
        return ends, over_seeds(curves_of(one.rows)) if ends else ""
    paths = [frontier_chart(one.rows, chosen), *likelihood_charts(one.rows, chosen)]
    return [*ends, paths[0]] if ends else paths, over_seeds(chosen)


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
