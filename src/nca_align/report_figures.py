"""The plots of `nca-align report` as PNG, for papers and slides: the page's charts, drawn with matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path

from .charts import Bars, Chart
from .report_charts import frontier_chart, likelihood_charts, run_charts, seeds
from .reporting import Comparison, Run


def write_figures(found: Sequence[Run | Comparison], output: Path) -> list[Path]:
    """Write `report-NAME.png` of each run and comparison that has something to show; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    written: list[Path] = []
    names = [one.name for one in found]
    for i, one in enumerate(found):
        again = names[:i].count(one.name)
        path = output / f"report-{one.name}{f'-{again + 1}' if again else ''}.png"
        if charts := charts_of(one):
            plot(charts, f"{one.name}; {bars_of(one)}", path)
            written.append(path)
    return written


def charts_of(one: Run | Comparison) -> list[Chart]:
    """What is plotted: of a run its held-out prompts, of a comparison's cell those of the test."""
    if isinstance(one, Run):
        charts = run_charts(one)
        return charts.get("test") or next(reversed(charts.values()), [])
    chosen = one.chosen()
    return [frontier_chart(one.rows, chosen), *likelihood_charts(one.rows, chosen)] if chosen else []


def bars_of(one: Run | Comparison) -> str:
    """What the bars are, in words."""
    if isinstance(one, Run):
        return "bars: two standard errors over prompts"
    return f"test split, means over seeds, bars: 95% t-intervals, {seeds(one.chosen())}"


def plot(charts: Sequence[Chart], title: str, path: Path) -> None:
    """The charts in rows of two."""
    from matplotlib import pyplot as plt

    rows = -(-len(charts) // 2)
    picture, axes = plt.subplots(rows, 2, figsize=(11, 3.8 * rows), layout="constrained", squeeze=False)
    for axis, chart in zip(axes.flat, charts, strict=False):
        for i, one in enumerate(chart.series):
            axis.errorbar(
                one.x, one.y, xerr=_arms(one.x, one.x_bars), yerr=_arms(one.y, one.y_bars), label=one.name,
                color=f"C{i % 10}", linestyle=("-", "--", ":")[i // 10 % 3], marker="o", markersize=3, elinewidth=0.8,
            )  # fmt: skip
        axis.set(title=chart.title, xlabel=chart.x_label)
        if chart.y_range is not None:
            axis.set_ylim(*chart.y_range)
        if chart.diagonal:
            axis.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=0.8)
        elif axis.get_ylim()[0] < 0 < axis.get_ylim()[1]:
            axis.axhline(0, color="grey", linewidth=0.6)
        axis.legend(fontsize="small")
    for axis in axes.flat[len(charts) :]:
        axis.set_visible(False)
    picture.suptitle(title)
    picture.savefig(path, dpi=120)
    plt.close(picture)


def _arms(values: Sequence[float], bars: Bars | None) -> list[float] | None:
    """Half the width of each interval; 0 where there is none."""
    if bars is None:
        return None
    return [high - value if math.isfinite(high) else 0.0 for value, (_, high) in zip(values, bars, strict=True)]
