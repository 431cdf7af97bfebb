"""Self-contained HTML pages: no script, no request, light and dark, readable on a phone.

Whatever comes from data goes through `escape`; the functions here do so with every text that they are given, and only
`page`, `section` and `card` take HTML.
"""

import html
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

_CONTROL = {c: chr(0x2400 + c) for c in range(32) if c not in (9, 10)} | {0x7F: "␡"}
_CONTROL |= {c: f"\\x{c:02x}" for c in range(0x80, 0xA0)}
_CONTROL |= {c: f"\\u{c:04x}" for c in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}  # turn the reading direction
_MOST_COLUMNS = 4  # of a table that a phone has the width for

STYLE = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
# of text, lines and curves: the style sheet's names and their values in light
COLOURS = dict(re.findall(r"--(\w+): (#\w{6});", STYLE.partition("@media")[0]))


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
        f'<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n<p class="soft">{escape(subtitle)}</p>\n'
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
    """A table of numbers; the row `marked` stands out. With `words`, of labels and what is said of them.

    A column without a value is left out. On a phone each row of a wide table becomes a list of names and values.
    """
    full = [i for i in range(max(map(len, rows), default=0)) if not i or any(str(row[i]) for row in rows)]
    names = [escape(header[i]) if header else "" for i in full]
    head = "".join(f"<th>{name}</th>" for name in names)
    lines = [f"<thead><tr>{head}</tr></thead>"] if any(names) else []
    kind = "words" if words else "stacked" if any(names) and len(names) > _MOST_COLUMNS else ""
    for i, row in enumerate(rows):
        told = [f' data-name="{name}"' if kind == "stacked" else "" for name in names]
        cells = "".join(f"<td{name}>{escape(row[place])}</td>" for name, place in zip(told, full, strict=True))
        lines.append(f"<tr{' class=mark' if i == marked else ''}>{cells}</tr>")
    return f'<div class="scroll"><table{f" class={kind}" if kind else ""}>{"".join(lines)}</table></div>'


def bullets(items: Sequence[str]) -> str:
    """A list of sentences."""
    return f'<ul class="card">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'
