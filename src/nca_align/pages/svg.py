"""Charts of a report as inline SVG: any number of curves with error bars, and means with their intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .html import Frame, escape, figure, number, svg

_COLOURS = "abcdefgh"
_ROOM = 0.06  # of the range, above and below
Bars = Sequence[tuple[float, float]]  # low and high of each point


@dataclass(frozen=True)
class Series:
    """Points joined by a line; intervals in either direction where they are known."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    x_bars: Bars | None = None
    y_bars: Bars | None = None


@dataclass(frozen=True)
class Chart:
    """A title, curves, and the words under them; `diagonal` draws x = y, both from 0 to 1."""

    title: str
    series: Sequence[Series]
    x_label: str
    note: str
    y_range: tuple[float, float] | None = None
    diagonal: bool = False


def card(chart: Chart) -> str:
    """The chart on a card of the page."""
    return figure(chart.title, curves(chart), chart.note)


def style(i: int) -> tuple[str, str]:
    """Colour and dash pattern of the i-th series: after the last colour they come again, dashed."""
    return f"var(--{_COLOURS[i % len(_COLOURS)]})", ("", "5 3", "2 2")[i // len(_COLOURS) % 3]


def y_range_of(chart: Chart) -> tuple[float, float]:
    """What the chart shows upwards: its own range, or that of its points and bars."""
    ys = [y for one in chart.series for y in one.y]
    ends = [end for one in chart.series for bar in one.y_bars or () for end in bar]
    return chart.y_range or axis_range(ys, ends)


def curves(chart: Chart) -> str:
    """A legend and the curves, whose bars stop at the chart's edge."""
    series, y_range = chart.series, y_range_of(chart)
    xs = [x for one in series for x in one.x]
    x_range = (0.0, 1.0) if chart.diagonal else (min(xs), max(xs))
    frame = Frame(x_range, y_range)
    parts = []
    if y_range[0] < 0 < y_range[1]:
        parts.append(_line(frame, x_range[0], 0, x_range[1], 0, "var(--soft)", "0.8"))
    if chart.diagonal:
        parts.append(_line(frame, 0, 0, 1, 1, "var(--soft)", "1", "4 3"))
    legend = []
    for i, one in enumerate(series):
        colour, dash = style(i)
        for j, (x, y) in enumerate(zip(one.x, one.y, strict=True)):
            for bars, across in ((one.x_bars, True), (one.y_bars, False)):
                if bars is None or not all(map(math.isfinite, bars[j])):
                    continue
                limits = x_range if across else y_range
                low, high = (min(max(end, limits[0]), limits[1]) for end in bars[j])
                ends = (low, y, high, y) if across else (x, low, x, high)
                parts.append(_line(frame, *ends, colour, "1", opacity="0.55"))
        points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(one.x, one.y, strict=True))
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
        if len(one.x) <= 40:
            parts += [
                f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2.6" fill="{colour}">'
                f"<title>{escape(one.name)}: {number(x)}, {number(y)}</title></circle>"
                for x, y in zip(one.x, one.y, strict=True)
            ]
        legend.append(_key(one.name, colour, dash))
    return f'<div class="note legend">{"".join(legend)}</div>' + frame.svg(chart.title, chart.x_label, parts)


def whiskers(rows: Sequence[tuple[str, float, float, float]], title: str, styles: Sequence[int]) -> str:
    """A row for each (name, mean, low, high), its name above a dot and its interval; `styles` number their colours."""
    low, high = axis_range([mean for _, mean, _, _ in rows], [end for _, _, *ends in rows for end in ends])
    left, right, step = 12, 300, 40

    def place(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * (right - left)

    parts = []
    for i, ((name, mean, *ends_of), own) in enumerate(zip(rows, styles, strict=True)):
        colour, y = style(own)[0], i * step + 28
        parts.append(f'<text x="{left}" y="{y - 12}">{escape(name)}</text>')
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y}" y2="{y}" stroke="var(--line)"/>')
        if all(map(math.isfinite, ends_of)):
            a, b = map(place, ends_of)
            parts.append(f'<line x1="{a:.1f}" x2="{b:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<circle cx="{place(mean):.1f}" cy="{y}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{right + 8}" y="{y + 4}">{mean:.3g}</text>')
    return svg(title, step * len(rows) + 8, parts)


def axis_range(values: Sequence[float], ends: Sequence[float]) -> tuple[float, float]:
    """What an axis shows of `values` and of the ends of their bars. Bars of few seeds can be far wider than all that is
    to be seen: they widen it, but at most threefold."""
    low, high = min(values), max(values)
    span = high - low or abs(low) * 0.1 or 1.0
    known = [end for end in ends if math.isfinite(end)]
    most = max(min([low, *known]), low - span), min(max([high, *known]), high + span)
    edge = max(_ROOM * (most[1] - most[0]), 0.02 * abs(low), 1e-9)  # of equal values too
    return most[0] - edge, most[1] + edge


def _line(
    frame: Frame, x1: float, y1: float, x2: float, y2: float, colour: str, width: str, dash: str = "",
    opacity: str = "1",
) -> str:  # fmt: skip
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{frame.x(x1):.1f}" y1="{frame.y(y1):.1f}" x2="{frame.x(x2):.1f}" y2="{frame.y(y2):.1f}" '
        f'stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}"{dashes}/>'
    )


def _key(name: str, colour: str, dash: str) -> str:
    fill = f"repeating-linear-gradient(90deg, {colour} 0 4px, transparent 4px 6px)" if dash else colour
    return f'<span class="entry"><span class="key" style="background: {fill}"></span>{escape(name)}</span> '
