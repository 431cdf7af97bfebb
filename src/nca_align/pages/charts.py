"""Charts, drawn once by matplotlib: on a page as SVG, in a file as PNG or PDF, with the same colours.

A colour is a name of the page's style sheet, so that a chart on a page follows light and dark.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from .html import COLOURS, card, escape, visible
from .styles import PAGE_COLOURS, Style, axis_range, number, styles

_MOST_POINTS = 40  # of a curve whose points are marked
_LONGEST = 18  # letters beside a row of a chart
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 11, "text.parse_math": False, "text.color": COLOURS["text"],
    "axes.spines.left": False, "axes.spines.right": False, "axes.spines.top": False, "axes.spines.bottom": False,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": COLOURS["line"],
    "axes.labelcolor": COLOURS["soft"], "xtick.labelcolor": COLOURS["soft"], "ytick.labelcolor": COLOURS["soft"],
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.major.pad": 7, "legend.frameon": False, "svg.fonttype": "none",
    "svg.hashsalt": "", "pdf.fonttype": 42,
}  # fmt: skip
in_our_style = rc_context(_STYLE)
Bars = Sequence[tuple[float, float]]  # low and high of each point


@dataclass(frozen=True)
class Series:
    """Points joined by a line; intervals in either direction where they are known.

    Series of one name in a chart have one colour. One without a name is in no legend, and in no colour of a curve.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    x_bars: Bars | None = None
    y_bars: Bars | None = None
    thin: bool = False


@dataclass(frozen=True)
class Chart:
    """A title, curves, and the words under them.

    Args:
        x_label: what is across; the axis has no numbers without it.
        y_range: by default that of the points, and of their bars as far as these are not much wider.
        diagonal: draw x = y.
        log_x: whether the x axis is logarithmic.
        marks: vertical lines, from their names to where they stand.
        levels: horizontal lines, likewise.
        colours: names of curves → their styles; `ordered_styles` where they have an order.
    """

    title: str
    series: Sequence[Series]
    x_label: str
    note: str = ""
    y_range: tuple[float, float] | None = None
    diagonal: bool = False
    log_x: bool = False
    marks: dict[str, float] = field(default_factory=dict)
    levels: dict[str, float] = field(default_factory=dict)
    colours: Callable[[Sequence[str]], dict[str, Style]] = styles

    def styles(self) -> dict[str, Style]:
        """Those of its curves."""
        return self.colours([one.name for one in self.series])


def chart_card(chart: Chart) -> str:
    """The chart on a card of a page."""
    return card(chart.title, chart_svg(chart), chart.note)


@in_our_style
def chart_svg(chart: Chart) -> str:
    """The chart as SVG, with a legend in HTML, which finds room on a phone too."""
    keys = []
    for name, (colour, line) in chart.styles().items():
        fill = PAGE_COLOURS[colour]
        if line != "-":
            fill = f"repeating-linear-gradient(90deg, {fill} 0 4px, transparent 4px 6px)"
        keys.append(f'<span><span class="key" style="background: {fill}"></span>{escape(name)}</span>')
    axes = _page_axes(marks=chart.marks)
    draw(axes, chart)
    return f'<div class="note legend">{" ".join(keys)}</div>{_svg(axes, chart.title)}'


@in_our_style
def histogram(
    edges: np.ndarray, counts: np.ndarray, label: str, unit: str, marks: dict[str, float] | None = None
) -> str:
    """Bars between `edges` as SVG, with vertical lines at `marks`; `label` names the axis, `unit` what is counted."""
    axes = _page_axes(marks=marks)
    tips = [
        f"{number(left)} to {number(right)}: {n:,} {unit}"
        for left, right, n in zip(edges, edges[1:], counts, strict=False)
    ]
    _tip(axes.bar(edges[:-1], counts, 0.94 * np.diff(edges), align="edge", color=COLOURS["a"]), tips)
    axes.set(xlabel=label, xlim=(edges[0], edges[-1]), ylim=(0, counts.max() * 1.05 or 1))
    _finish(axes, marks or {})
    return _svg(axes, f"Histogram of {label}")


@in_our_style
def bars(labels: Sequence[str], values: Sequence[float], label: str) -> str:
    """One horizontal bar each as SVG, with its value beside it."""
    n, texts = len(labels), [f"{value:,.0f}" for value in values]
    axes = _page_axes(26 * n + 6, left=min(130, max(map(len, labels)) * 6.5 + 12), right=62, top=0, bottom=0)
    drawn = axes.barh(range(n), values, 0.7, color=COLOURS["a"])
    _tip(drawn, [f"{name}: {text}" for name, text in zip(labels, texts, strict=True)])
    axes.bar_label(drawn, texts, padding=6, color=COLOURS["soft"])
    axes.set_yticks(range(n), labels)
    axes.set(xlim=(0, max(*values, 1e-9)), ylim=(n - 0.5, -0.5), xticks=[])
    axes.grid(visible=False)
    return _svg(axes, label)


def draw(axes: Axes, chart: Chart) -> None:
    """The chart's curves; bars stop at its edge, and those over one step stand side by side."""
    for i, one in enumerate(chart.series):
        colour, line = chart.styles()[one.name] if one.name else (COLOURS["text"], "-")
        x = _beside(one.x, i, chart)
        known = one.name in axes.get_legend_handles_labels()[1]
        _, _, error_bars = axes.errorbar(
            x, one.y, _arms(one.y, one.y_bars), _arms(one.x, one.x_bars), label="" if known else one.name,
            color=colour, linestyle=line, linewidth=0.8 if one.thin else 2, alpha=0.5 if one.thin else 1, elinewidth=1,
        )  # fmt: skip
        for bar in error_bars:
            bar.set_alpha(0.55)
        if len(x) <= _MOST_POINTS and not one.thin:
            points = [axes.plot(*point, "o", color=colour, markersize=5)[0] for point in zip(x, one.y, strict=True)]
            _tip(points, [f"{one.name}: {number(a)}, {number(b)}" for a, b in zip(one.x, one.y, strict=True)])
    if any(one.x_bars for one in chart.series):
        axes.set_xlim(*axis_range([x for one in chart.series for x in one.x], []))
    if chart.y_range or len(chart.series) > 1:  # of one curve all of its bars are shown
        ends = [end for one in chart.series for bar in one.y_bars or () for end in bar]
        values = [y for one in chart.series for y in one.y]
        axes.set_ylim(*(chart.y_range or axis_range([*values, *chart.levels.values()], ends)))
    if chart.diagonal:
        axes.plot([0, 1], [0, 1], color=COLOURS["soft"], linestyle="--", linewidth=1)
    elif axes.get_ylim()[0] < 0 < axes.get_ylim()[1]:
        axes.axhline(0, color=COLOURS["soft"], linewidth=0.8)
    for level in chart.levels.values():
        axes.axhline(level, color=COLOURS["soft"], linestyle="--", linewidth=1)
    axes.set_xlabel(chart.x_label)
    axes.xaxis.set_visible(bool(chart.x_label))
    if chart.log_x:
        axes.set_xscale("log")
    _finish(axes, chart.marks, whole=all(float(x).is_integer() for one in chart.series for x in one.x))


def _page_axes(
    height: float = 210, left: float = 44, right: float = 19, top: float = 16, bottom: float = 40,
    marks: dict[str, float] | None = None,
) -> Axes:  # fmt: skip
    """Axes in a figure of a page, with so many pixels around them, and room for the names of `marks` above."""
    width = 360  # about what a chart gets on a phone and in a column of a wide page: text stays its size
    top += 13 * max(0, len(marks or {}) - 1)
    figure = Figure((width / 72, height / 72))
    return figure.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height))


def _finish(axes: Axes, marks: dict[str, float], whole: bool = False) -> None:
    """Round numbers on the axes, across of `whole` ones such as steps, and lines at those `marks` that are in sight."""
    low, high = axes.get_xlim()
    if axes.get_xscale() == "log":
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=whole))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(number)
    _mark(axes, {name: x for name, x in marks.items() if low <= x <= high})


def _mark(axes: Axes, marks: dict[str, float]) -> None:
    """Lines at `marks` and their names above the axes, where neither another name nor a line goes through one."""
    placed: list[Any] = []
    first, last = axes.bbox.x0, axes.figure.bbox.x1  # at the left are the axis's own numbers
    for i, (name, x) in enumerate(sorted(marks.items(), key=lambda mark: mark[1])):
        axes.axvline(x, color=COLOURS["warn"], linewidth=1.5, linestyle="--")
        sides = ("right", "left") if i < len(marks) / 2 and len(marks) > 1 else ("left", "right")
        for height, side in ((height, side) for height in range(len(marks)) for side in sides):
            text = axes.annotate(
                name, (x, 1), (2 if side == "left" else -2, 5 + 13 * height), ("data", "axes fraction"),
                "offset points", color=COLOURS["warn"], horizontalalignment=side,
            )  # fmt: skip
            own = text.get_window_extent()
            box = own.expanded(1.15, 1)  # a page's letters may be wider
            if first <= own.x0 and box.x1 <= last and not box.count_overlaps(placed):
                placed.append(box)
                break
            text.remove()


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


def _tip(drawn: Any, texts: Sequence[str]) -> None:
    """Have a page show each text where the mouse is over its shape: `_svg` looks for these ids."""
    for one, text in zip(drawn, texts, strict=True):
        one.set_gid(f"tip: {visible(text)}")


def _svg(axes: Axes, label: str) -> str:
    """The figure for a page: its colours by their names in the style sheet, and its tips."""
    file = io.StringIO()
    axes.figure.savefig(file, format="svg", transparent=True)  # type: ignore[union-attr]
    text = re.sub(r"^.*?<svg |<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    text = re.sub(r"""<g id=(["'])tip: (.*?)\1>""", r"<g><title>\2</title>", text)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # other figures have the same ones
    text = re.sub(r"(?<=: )#[0-9a-f]{6}", lambda found: PAGE_COLOURS.get(found[0], found[0]), text)
    return f'<svg role="img" aria-label="{escape(label)}" {text}'
