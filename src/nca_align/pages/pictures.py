"""Charts beside each other in one file, for papers, slides and messages."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from .charts import Chart, draw, in_our_style
from .html import COLOURS
from .styles import apart

_LONGEST = 30  # letters of a label
_LINE = 12.0  # points from one label to the next


@in_our_style
def picture(charts: Sequence[Chart], title: str) -> Figure:
    """The charts in rows of two; those with the first one's curves share its legend, below, others name each curve."""
    rows = -(-len(charts) // 2)
    figure = Figure((11, 3.8 * rows), layout="constrained")
    every = figure.subplots(rows, 2, squeeze=False).flatten()
    first = charts[0].styles()
    shared = sum(chart.styles() == first for chart in charts) > 1
    labels = []
    for axes, chart in zip(every, charts, strict=False):
        draw(axes, chart)
        axes.set_title(chart.title)
        labels.append(_end_labels(axes, chart) if not (shared and chart.styles() == first) else [])
    for axes in every[len(charts) :]:
        axes.set_visible(False)
    if shared:
        figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(title)
    _spread(figure, labels)
    return figure


@in_our_style
def write_pictures(charts: Sequence[Chart], title: str, paths: Sequence[Path]) -> None:
    """Write the `picture` of the charts to each path, in the format of its ending: PNG for slides, PDF for papers."""
    drawn = picture(charts, title)
    for path in paths:
        drawn.savefig(path, dpi=120, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)


def write_png(charts: Sequence[Chart], title: str, path: Path) -> None:
    """Write the `picture` of the charts as PNG."""
    write_pictures(charts, title, [path])


@in_our_style
def story(main: Chart | None, others: Sequence[Chart], title: str, note: str = "") -> Figure:
    """A large chart at the left, the others one above the other at its right, all over the same steps.

    Each curve has its name at its end, in its colour: no legend can lie over a line.
    """
    charts = [*([main] if main is not None else []), *others]
    figure = Figure((11 if main is not None and others else 7.5, max(4.4, 2.3 * len(others))), layout="constrained")
    every = _places(figure, main is not None, len(others))
    steps = [x for chart in charts for one in chart.series for x in one.x]
    edge = 0.02 * (max(steps) - min(steps)) or 0.5
    for axes, chart in zip(every, charts, strict=True):
        draw(axes, chart if chart in (main, charts[-1]) else replace(chart, x_label=""))
        axes.set_xlim(min(steps) - edge, max(steps) + edge)
        axes.set_title(chart.title, loc="left", fontsize="medium")
    figure.suptitle(title, fontsize="large", fontweight="bold")
    if note:
        figure.supxlabel(note, fontsize="small", color=COLOURS["soft"])
    labels = [_end_labels(axes, chart) for axes, chart in zip(every, charts, strict=True)]
    _spread(figure, labels)
    return figure


def _places(figure: Figure, has_main: bool, others: int) -> list[Axes]:
    """Axes of the large chart, where there is one, and of the others."""
    if not (has_main and others):
        return list(figure.subplots(max(1, others), 1, squeeze=False).flatten())
    grid = figure.add_gridspec(others, 2, width_ratios=(3, 2))
    return [figure.add_subplot(grid[:, 0]), *(figure.add_subplot(grid[i, 1]) for i in range(others))]


def _end_labels(axes: Axes, chart: Chart) -> list[Annotation]:
    """The name of each curve and level at the right, as high as it ends."""
    ends = {name: (level, COLOURS["soft"]) for name, level in chart.levels.items()}
    for one in chart.series:
        if one.name and len(one.y):
            ends.setdefault(one.name, (one.y[-1], chart.styles()[one.name][0]))
    low, high = axes.get_ylim()
    return [
        axes.annotate(
            name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…",
            (1, min(max(y, low), high)), (5, 0), ("axes fraction", "data"), "offset points", color=colour,
            fontsize="small", verticalalignment="center", annotation_clip=False,
        )
        for name, (y, colour) in ends.items()
    ]  # fmt: skip


def _spread(figure: Figure, labels: Sequence[list[Annotation]]) -> None:
    """Move the labels of each axes up and down so that none lies on another."""
    figure.draw_without_rendering()  # the layout has made room for them, and places are known
    points = 72 / figure.dpi
    for axes, own in zip(figure.axes, labels, strict=False):
        box = axes.get_window_extent()
        wanted = [axes.transData.transform((0, label.xy[1]))[1] * points for label in own]
        for label, old, new in zip(own, wanted, apart(wanted, _LINE, box.y0 * points, box.y1 * points), strict=True):
            label.set_position((5, new - old))
