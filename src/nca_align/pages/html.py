"""Self-contained HTML pages with charts as inline SVG: no script, no request, light and dark, readable on a phone.

Whatever comes from data goes through `escape`; the functions here do so with every text that they are given, and only
`page`, `section` and `figure` take HTML.
"""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_WIDTH, _HEIGHT = 360, 210  # about what a chart gets on a phone and in a column of a wide page: text stays its size
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 16, 36
_CONTROL = {c: chr(0x2400 + c) for c in range(32) if c not in (9, 10)} | {0x7F: "␡"}
_CONTROL |= {c: f"\\x{c:02x}" for c in range(0x80, 0xA0)}
_CONTROL |= {c: f"\\u{c:04x}" for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}  # turn the reading direction

_STYLE = """
:root {
  color-scheme: light dark; --page: #f5f6f8; --card: #fff; --text: #1b2430; --soft: #566273; --line: #dde2e8;
  --a: #2f6bd8; --b: #c05a0a; --c: #14805e; --warn: #a63d00;
  --d: #8a4bc2; --e: #b8336a; --f: #7a6a00; --g: #0d7c99; --h: #5b6472;
  --tint: #e4edfb; --tint2: #c9dcf8; --grey: #edf0f3; --grey2: #dde2e8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11151b; --card: #1a2029; --text: #e4e9f0; --soft: #9eabbc; --line: #323c49;
    --a: #79a8ff; --b: #f2a45c; --c: #5fcfa6; --warn: #ffb27a;
    --d: #c79bf2; --e: #f58bb4; --f: #d9c653; --g: #63cbe6; --h: #aab4c2;
    --tint: #20304b; --tint2: #2c446e; --grey: #262e39; --grey2: #333e4c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 24px 16px 48px; max-width: 1240px; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 36px 0 12px; }
h3 { font-size: 15px; margin: 0 0 6px; }
p { margin: 0 0 8px; max-width: 75ch; }
.soft { color: var(--soft); }
figcaption, .note { font-size: 13px; color: var(--soft); }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 540px), 1fr)); }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; margin: 0; min-width: 0;
}
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); margin: 20px 0; }
.tile { font-size: 13px; }
.tile b { display: block; font-size: 24px; line-height: 1.2; font-weight: 600; }
.warn b { color: var(--warn); }
ul.card { padding-left: 34px; }
li { margin-bottom: 6px; max-width: 90ch; }
svg { display: block; width: 100%; height: auto; margin: 4px 0; }
svg text { font-size: 11px; fill: var(--soft); }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 4px; }
.key:not(:first-child) { margin-left: 12px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 12px; }
.entry .key:first-child { margin-left: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: right; padding: 4px 4px 4px 8px; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; overflow-wrap: normal; }
td { white-space: nowrap; }
th:first-child, td:first-child, .words td { text-align: left; padding-left: 4px; }
.words td { white-space: normal; }
.words td:first-child { color: var(--soft); width: 45%; }
tr.mark td { background: var(--tint); font-weight: 600; }
.text {
  white-space: pre-wrap; font: 13px/1.6 ui-monospace, Menlo, Consolas, monospace; margin: 6px 0 0;
  max-height: 30em; overflow: auto;
}
.prompt span:nth-child(odd) { background: var(--grey); }
.prompt span:nth-child(even) { background: var(--grey2); }
.completion span:nth-child(odd) { background: var(--tint); }
.completion span:nth-child(even) { background: var(--tint2); }
"""


def visible(text: str) -> str:
    """`text` with its control characters as signs, so that none acts on a terminal or a page."""
    return text.translate(_CONTROL)


def escape(value: object) -> str:
    """Any value as text of a page, never markup."""
    return html.escape(visible(str(value)))


def page(title: str, subtitle: str, body: str) -> str:
    """A whole document; `body` is HTML."""
    # the policy holds a browser to what this module promises: nothing is fetched, and nothing runs
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f'<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n<p class="soft">{escape(subtitle)}</p>\n'
        f"{body}\n</body></html>\n"
    )


def section(title: str, *parts: str, grid: str = "") -> str:
    """A headed part of the page; `parts` are HTML, side by side in a `grid` ("grid", "grid wide") with room."""
    inner = "\n".join(parts)
    return f"<h2>{escape(title)}</h2>\n" + (f'<div class="{grid}">{inner}</div>' if grid else inner)


def figure(title: str, content: str, note: str = "") -> str:
    """A card around a chart or another piece of HTML."""
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f'<figure class="card"><h3>{escape(title)}</h3>{content}{caption}</figure>'


class Tile(NamedTuple):
    """A figure that stands out: its value, what it is, and whether it asks for attention."""

    value: str
    label: str
    warn: bool = False


def tiles(items: Sequence[Tile]) -> str:
    """A row of tiles."""
    cards = (
        f'<div class="card tile{" warn" if tile.warn else ""}"><b>{escape(tile.value)}</b>{escape(tile.label)}</div>'
        for tile in items
    )
    return f'<div class="tiles">{"".join(cards)}</div>'


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], marked: int | None = None, words: bool = False
) -> str:
    """A table of numbers; the row `marked` stands out. With `words`, of labels and what is said of them."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    lines = [f"<thead><tr>{head}</tr></thead>"] if any(header) else []
    for i, row in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f"<tr{' class=mark' if i == marked else ''}>{cells}</tr>")
    return f'<div class="scroll"><table{" class=words" if words else ""}>{"".join(lines)}</table></div>'


def bullets(items: Sequence[str]) -> str:
    """A list of sentences."""
    return f'<ul class="card">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """About `n` round values from `low` to `high`."""
    if high <= low:
        return [low]
    step = 10 ** math.floor(math.log10((high - low) / n))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (step * m) <= n)
    return [round(i * step, 12) + 0.0 for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """`1,234`, `0.25`, `12k`: short enough for an axis."""
    if abs(value) >= 10_000:
        return f"{value / 1000:,.4g}k" if abs(value) < 1e6 else f"{value / 1e6:,.4g}M"
    return f"{value:,.0f}" if value == round(value) else f"{value:.3g}"


def histogram(
    edges: np.ndarray, counts: np.ndarray, label: str, unit: str, marks: dict[str, float] | None = None
) -> str:
    """Bars between `edges`, with vertical lines at `marks`; `label` names the axis, `unit` what is counted."""
    low, high = float(edges[0]), float(edges[-1])
    marks = {name: x for name, x in (marks or {}).items() if low <= x <= high}
    frame = Frame((low, high), (0, float(counts.max()) * 1.05 or 1))
    bars = []
    for left, right, n in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True):
        x, width = frame.x(left), max(frame.x(right) - frame.x(left) - 1, 0.5)
        tip = f"{number(left)} to {number(right)}: {n:,} {unit}"
        bars.append(_bar(x + 0.5, frame.y(n), width, frame.y(0) - frame.y(n), tip))
    return frame.svg(f"Histogram of {label}", label, [*bars, *frame.marks(marks)])


def bars(labels: Sequence[str], values: Sequence[float], label: str, show: str = ",.0f") -> str:
    """One horizontal bar each, with its value beside it."""
    step, most = 26, max(*values, 1e-9)
    wide = min(130, max(len(name) for name in labels) * 6.5 + 12)
    room = _WIDTH - wide - 62
    parts = []
    for i, (name, value) in enumerate(zip(labels, values, strict=True)):
        y, length, text = i * step + 4, room * value / most, format(value, show)
        parts.append(f'<text x="{wide - 8:.1f}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        parts.append(_bar(wide, y, max(length, 1), 18, f"{name}: {text}"))
        parts.append(f'<text x="{wide + length + 6:.1f}" y="{y + 14}">{text}</text>')
    return svg(label, step * len(labels) + 6, parts)


def lines(
    series: dict[str, tuple[Sequence[float], Sequence[float]]],
    label: str,
    y_range: tuple[float, float],
    log_x: bool = False,
    marks: dict[str, float] | None = None,
) -> str:
    """One line for each of up to three `series` (x, y), with a legend, and vertical lines at `marks`."""
    xs = [x for x, _ in series.values()]
    x_range = (min(map(min, xs)), max(map(max, xs)))
    marks = {name: x for name, x in (marks or {}).items() if x_range[0] <= x <= x_range[1]}
    frame = Frame(x_range, y_range, log_x)
    parts, legend = [], ""
    for colour, (name, (x, y)) in zip("abc", series.items(), strict=False):
        points = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in zip(x, y, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="var(--{colour})" stroke-width="2"/>')
        legend += f'<span class="key" style="background: var(--{colour})"></span>{escape(name)}'
    return f'<div class="note">{legend}</div>' + frame.svg(label, label, [*parts, *frame.marks(marks)])


class Frame:
    """A plot's axes: data to coordinates, grid, ticks."""

    def __init__(self, x_range: tuple[float, float], y_range: tuple[float, float], log_x: bool = False):
        self.log_x, self.y_range = log_x, y_range
        low, high = (math.log10(v) for v in x_range) if log_x else x_range
        self.x_range = (low, high) if high > low else (low - 0.5, high + 0.5)

    def x(self, value: float) -> float:
        low, high = self.x_range
        value = math.log10(value) if self.log_x else value
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def marks(self, marks: dict[str, float]) -> list[str]:
        parts = []
        for i, (name, value) in enumerate(sorted(marks.items(), key=lambda mark: mark[1])):
            x = self.x(value)
            anchor = "end" if x > _WIDTH * 0.6 else "start"
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" stroke="var(--warn)" '
                f'stroke-width="1.5" stroke-dasharray="4 3"/><text x="{x + (-4 if anchor == "end" else 4):.1f}" '
                f'y="{_TOP - 5 + 13 * (i % 2)}" text-anchor="{anchor}" style="fill: var(--warn)">{escape(name)}</text>'
            )
        return parts

    def svg(self, label: str, x_label: str, parts: Sequence[str]) -> str:
        grid = []
        for value in ticks(*self.y_range):
            y = self.y(value)
            grid.append(
                f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
                f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
            )
        low, high = self.x_range
        if self.log_x:
            places = [10.0**e for e in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)]
        else:
            places = ticks(low, high, 6)
        for value in places:
            x = min(max(self.x(value), 12), _WIDTH - 16)  # the outermost stay inside
            grid.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{number(value)}</text>')
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        grid.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
        return svg(label, _HEIGHT, [*grid, *parts])


def _bar(x: float, y: float, width: float, height: float, tip: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<rect {place} rx="1.5" fill="var(--a)"><title>{escape(tip)}</title></rect>'


def svg(label: str, height: int, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
