"""Self-contained HTML pages: no script, no request, light and dark, readable on a phone.

Whatever comes from data goes through `escape`; the functions here do so with every text that they are given, and only
`page`, `section` and `card` take HTML.
"""

import html
from collections.abc import Sequence
from typing import NamedTuple

# of text, lines and curves, light and dark
COLOURS = {
    "text": ("#1b2430", "#e4e9f0"), "soft": ("#566273", "#9eabbc"), "line": ("#dde2e8", "#323c49"),
    "warn": ("#a63d00", "#ffb27a"), "a": ("#2f6bd8", "#79a8ff"), "b": ("#c05a0a", "#f2a45c"),
    "c": ("#14805e", "#5fcfa6"), "d": ("#8a4bc2", "#c79bf2"), "e": ("#b8336a", "#f58bb4"), "f": ("#7a6a00", "#d9c653"),
    "g": ("#0d7c99", "#63cbe6"), "h": ("#5b6472", "#aab4c2"),
}  # fmt: skip
_CONTROL = {c: chr(0x2400 + c) for c in range(32) if c not in (9, 10)} | {0x7F: "␡"}
_CONTROL |= {c: f"\\x{c:02x}" for c in range(0x80, 0xA0)}
_CONTROL |= {c: f"\\u{c:04x}" for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}  # turn the reading direction

_STYLE = """
:root {
  color-scheme: light dark; --page: #f5f6f8; --card: #fff; LIGHT
  --tint: #e4edfb; --tint2: #c9dcf8; --grey: #edf0f3; --grey2: #dde2e8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11151b; --card: #1a2029; DARK
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
svg text { font-family: inherit !important; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 12px; }
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
for _scheme, _place in enumerate(("LIGHT", "DARK")):
    _STYLE = _STYLE.replace(_place, " ".join(f"--{name}: {pair[_scheme]};" for name, pair in COLOURS.items()))


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


def card(title: str, content: str, note: str = "") -> str:
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
