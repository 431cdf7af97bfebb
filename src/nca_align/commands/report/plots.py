"""The plots of `nca-align report` as PNG, for papers and slides: the page's charts, drawn with matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path

from ...pages.svg import Bars, Chart, axis_range, y_range_of
from .charts import Groups, frontier_chart, likelihood_charts, run_charts, seeds
from .runs import Comparison, Run


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
    return over_seeds(one.chosen())


def over_seeds(groups: Groups) -> str:
    """What points and bars of means over seeds are, and how `plot` lays them."""
    return (
        f"means over seeds ({seeds(groups)}), bars: 95% t-intervals\n"
        "bars are cut at a chart's edge, and points of one step stand side by side"
    )


def plot(charts: Sequence[Chart], title: str, path: Path) -> None:
    """The charts in rows of two; those with the first one's curves share its legend, below."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    rows = -(-len(charts) // 2)
    picture, axes = plt.subplots(rows, 2, figsize=(11, 3.8 * rows), layout="constrained", squeeze=False)
    first = _names(charts[0])
    shared = sum(_names(chart) == first for chart in charts) > 1
    for axis, chart in zip(axes.flat, charts, strict=False):
        for i, one in enumerate(chart.series):
            _, _, bars = axis.errorbar(
                _beside(one.x, i, chart), one.y, xerr=_arms(one.x, one.x_bars), yerr=_arms(one.y, one.y_bars),
                label=one.name, color=f"C{i % 10}" if one.name else "black", marker="o", markersize=3, elinewidth=0.8,
                linestyle=("-", "--", ":")[i // 10 % 3],
            )  # fmt: skip
            for own in bars:
                own.set_alpha(0.55)
        if all(float(value).is_integer() for one in chart.series for value in one.x):  # steps, K
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set(title=chart.title, xlabel=chart.x_label)
        if chart.y_range or len(chart.series) > 1:  # of one curve all of its bars are shown
            axis.set_ylim(*y_range_of(chart))
        if any(one.x_bars for one in chart.series):
            axis.set_xlim(*axis_range([x for one in chart.series for x in one.x], []))
        if chart.diagonal:
            axis.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=0.8)
        elif axis.get_ylim()[0] < 0 < axis.get_ylim()[1]:
            axis.axhline(0, color="grey", linewidth=0.6)
        if any(_names(chart)) and not (shared and _names(chart) == first):
            axis.legend(fontsize="small")
    for axis in axes.flat[len(charts) :]:
        axis.set_visible(False)
    if shared:
        picture.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    picture.suptitle(title)
    picture.savefig(path, dpi=120)
    plt.close(picture)


def _names(chart: Chart) -> list[str]:
    return [one.name for one in chart.series]


def _beside(x: Sequence[float], i: int, chart: Chart) -> list[float]:
    """`x`, a little to the side for each series where bars stand over the same steps."""
    if not any(one.y_bars for one in chart.series) or any(one.x_bars for one in chart.series):
        return list(x)
    every = [value for one in chart.series for value in one.x]
    return [value + (i - (len(chart.series) - 1) / 2) * 0.012 * (max(every) - min(every)) for value in x]


def _arms(values: Sequence[float], bars: Bars | None) -> list[float] | None:
    """Half the width of each interval; 0 where there is none."""
    if bars is None:
        return None
    return [high - value if math.isfinite(high) else 0.0 for value, (_, high) in zip(values, bars, strict=True)]
