"""The figure that tells a run: `curves.png`."""

from pathlib import Path
from statistics import fmean
from typing import Any

from ...config import NCAConfig
from ...evaluation.training_log import Curve, Log, by_rank, error_bars, logged, prefixes, rank_name
from ...losses import reads_alpha
from ...user_functions import short_name

_MOST_POINTS = 60  # of a training curve
_CHANCE = 0.5  # of ordering a pair right


def plot_curves(log: Log, path: Path, title: str = "") -> Path | None:
    """Write `draw_curves` as a PNG; None where nothing was logged."""
    figure = draw_curves(log, title)
    if figure is not None:
        figure.savefig(path, dpi=120)
    return None if figure is None else path


def draw_curves(log: Log, title: str = "") -> Any:
    """The figure of what moved; None where nothing was logged.

    Panels: log-ratios by rank, ranking accuracy, rewards of the model's own answers, and the loss, each where the log
    has it. Training is thin where held-out prompts, thick, stand beside it. A long training curve is averaged.

    Args:
        log: a trainer's `log_history`.
        title: what is trained and how; see `run_title`.
    """
    from ...pages.charts import Chart, Series
    from ...pages.pictures import story
    from ...pages.styles import ordered_styles, plain_styles

    held_out = _held_out(log, "rewards/accuracies", "logratios/right", "logratios/wrong")
    ranked = bool(by_rank(log, "logratios", held_out) or by_rank(log, "logratios"))
    curves = {prefix: _ratios(log, prefix, ranked) for prefix in (held_out, "")}  # the first, thick ones are named
    evaluated = bool(curves[held_out])
    ratios = [
        Series(name, *(points if prefix else _averaged(points)), thin=evaluated and not prefix)
        for prefix, own in curves.items()
        for name, points in own.items()
    ]

    def both(name: str, training: str, first: int = 0) -> list[Series]:
        shown: list[Series] = []
        for label, metric in (("held-out", f"{held_out}{name}"), ("training", training)):
            steps, values = logged([line for line in log if line["step"] >= first], metric)
            if steps:
                thin = label == "training" and bool(shown)
                steps, values = _averaged((steps, values)) if label == "training" else (steps, values)
                shown.append(Series(label, steps, values, thin=thin))
        return shown

    answers = f"{_held_out(log, 'generation/reward')}generation/reward"
    steps, rewards = logged(log, answers)
    reward = [Series("", steps, rewards, y_bars=error_bars(log, answers))] if steps else []
    # before the first step all implicit rewards are equal, which counts as wrong
    accuracy = both("rewards/accuracies", "rewards/accuracies", first=1)
    auc = both("outcome/auc", "outcome/auc", first=1)
    panels = [
        Chart("Right above wrong completions", auc, "step", levels={"chance": _CHANCE}, colours=plain_styles),
        Chart("Pairs ordered as their rewards are", accuracy, "step", levels={"chance": _CHANCE}, colours=plain_styles),
        Chart("Reward of its own answers", reward, "step"),
        Chart("Loss", both("loss", "loss"), "step", colours=plain_styles),
    ]
    panels = [chart for chart in panels if chart.series]
    by = "rank" if ranked else "label"
    main = Chart(f"Log-ratio log(π/π_ref) by {by}, nats", ratios, "step", colours=ordered_styles) if ratios else None
    if main is None and not panels:
        return None
    return story(main, panels, title, _note(by if ratios else "", evaluated, bool(reward), log))


def run_title(model: Any, args: NCAConfig, log: Log) -> str:
    """Model, loss and K in one line: `smollm2-135m-instruct: nca, α 0.3, β 0.1, K ≤ 6`."""
    parts = [" + ".join(map(short_name, args.loss_type))]
    if any(map(reads_alpha, args.loss_type)):
        parts.append(f"α {args.alpha:g}")
    parts.append(f"β {args.beta:g}")
    ranks = max((len(by_rank(log, "logratios", prefix)) for prefix in prefixes(log)), default=0)
    if ranks:
        parts.append(f"K ≤ {ranks}")
    return f"{Path(str(model)).name}: {', '.join(parts)}"


def _ratios(log: Log, prefix: str, ranked: bool) -> dict[str, Curve]:
    """Log-ratios by rank, or of single completions by label: a line's name → its points."""
    if ranked:
        return {rank_name(rank): points for rank, points in by_rank(log, "logratios", prefix).items()}
    curves = {side: logged(log, f"{prefix}logratios/{side}") for side in ("right", "wrong")}
    return {side: points for side, points in curves.items() if points[0]}


def _held_out(log: Log, *metrics: str) -> str:
    """The prefix of the first held-out prompts that have one of the metrics."""
    found = [own for own in prefixes(log) if own and any(logged(log, f"{own}{metric}")[0] for metric in metrics)]
    return found[0] if found else "eval_"


def _averaged(points: Curve) -> Curve:
    """A long curve by means over stretches of equally many points, the last one short where they don't share evenly."""
    steps, values = points
    size = -(-len(steps) // _MOST_POINTS)
    starts = range(0, len(steps), size or 1)
    return [steps[min(i + size, len(steps)) - 1] for i in starts], [fmean(values[i : i + size]) for i in starts]


_LINES = {
    "rank": "Best: the completion with the highest reward. Above 0 it is likelier than before training.",
    "label": "Right: completions of label 1. Above 0 they are likelier than before training.",
}


def _note(by: str, evaluated: bool, answered: bool, log: Log) -> str:
    """What lines and bars are; `by` is what log-ratios stand by, "" where there are none."""
    points = max(len(logged(log, "logratios/best")[0]), len(logged(log, "loss")[0]))
    size = -(-points // _MOST_POINTS)
    smooth = f", means of {size} logs" if size > 1 else ""
    lines = f"Thick: held-out prompts. Thin: training prompts{smooth}." if evaluated else f"Training prompts{smooth}."
    bars = "Bars: two standard errors over prompts."
    return "\n".join([f"{lines} {bars}" if answered else lines, *([_LINES[by]] if by else [])])
