"""Tables in a terminal."""

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text


def print_rows(
    header: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    words: int = 1,
    title: str | None = None,
    ruled: bool = False,
    marked: int | None = None,
    console: Console | None = None,
) -> None:
    """Print a table: its first `words` columns and those without a name hold words, the others numbers.

    Args:
        header: names of the columns; without any no line is printed for them.
        rows: their cells, which are never read as markup.
        words: how many columns are aligned to the left.
        title: stands above the table.
        ruled: whether a line stands under the header.
        marked: the row that stands out.
        console: where to; by default the terminal.
    """
    table = Table(box=SIMPLE_HEAD if ruled else None, pad_edge=False, title=title, show_header=any(header))
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < words or not name else "right")
    for i, row in enumerate(rows):
        cells = (Text(cell) if isinstance(cell, str) else cell for cell in row)
        table.add_row(*cells, style="bold" if i == marked else None)
    (console or Console()).print(table)
