"""Endpoints at equal KL: the charts, tables and words on a comparison's ladders."""

import math
from collections.abc import Sequence

from ...evaluation.comparison_rows import Row, metric_of
from ...evaluation.endpoints import FIGURES, endpoint_ladders, ladder_notes
from ...evaluation.intervals import Interval, mean_and_interval
from ...evaluation.ladder import Ladder
from ...pages import html as pages
from ...pages.charts import Chart, Series, chart_card
from ...pages.html import card
from ...pages.text_tables import latex, markdown
from .runs import Comparison

WHAT = (
    "The ends of a method's runs with several β are a ladder. Of each seed a figure is taken at the KL, between the "
    "two ends around it straight in √KL. Differences are paired by seed. Their intervals hold together with 95% "
    "confidence (Bonferroni), and p is adjusted by Holm, both over all methods and KLs of one figure. Where p is above "
    "0.05 these runs show no difference. A method's own interval is a plain 95% t-interval. All are over seeds, and "
    "don't say what other prompts or another model would give."
)
_RULE = (
    "Unless KLs were named, they are a quarter and three quarters along the span in √KL that the most ladders share "
    "with the reference’s."
)
HEADER = ("KL", "figure", "method", "seeds", "at this KL", "difference", "p (Holm)")


def endpoint_charts(rows: Sequence[Row]) -> list[Chart]:
    """Figures against KL at the ends of runs: a line for each ladder, a point for each of its β."""
    ladders, charts = endpoint_ladders(rows), []
    for column, name in FIGURES.items():
        shown = [ladder_series(method, ladder, column) for method, ladder in ladders.items()]
        if any(one.x for one in shown):
            note = (
                "Test prompts. Each line is the ladder of one method, each point the end of its runs with one β: the "
                "mean over seeds, with 95% t-intervals in both directions, cut at the chart's edge."
            )
            title = f"{name.capitalize()} against KL, ends of runs"
            charts.append(Chart(title, shown, "KL(π || π_ref), nats", note))
    return charts


def ladder_series(name: str, ladder: Ladder, column: str) -> Series:
    """The column against KL, a point for each β in the order of KL: means over pairing keys, 95 % intervals of both."""
    ends: dict[float, list[tuple[float, float]]] = {}
    for rung in (rung for rungs in ladder.values() for rung in rungs):
        if math.isfinite(rung.values[column]):
            ends.setdefault(rung.beta or 0.0, []).append((rung.kl, rung.values[column]))
    points = [[mean_and_interval(own) for own in zip(*both, strict=True)] for both in ends.values()]
    points.sort(key=lambda point: point[0].mean)
    x, y = ([point[i] for point in points] for i in (0, 1))
    x_bars, y_bars = ([(one.low, one.high) for one in own] for own in (x, y))
    return Series(name, [one.mean for one in x], [one.mean for one in y], x_bars, y_bars)


def endpoint_cells(table: Sequence[Row]) -> list[list[str]]:
    """The rows of `endpoints.csv` as texts under `HEADER`; † marks a method of which a run doubled back."""
    cells = []
    for row in table:
        mean = f"{row['spanned']} of {row['seeds']} span it"
        if row["mean"] not in (None, ""):
            mean = _text(row, "mean", "mean_low", "mean_high")
        difference = p = ""
        if row["difference"] not in (None, ""):
            difference = _text(row, "difference", "low", "high")
            difference = f"+{difference}" if metric_of(row, "difference") > 0 else difference
            p_holm = metric_of(row, "p_holm")
            p = "" if math.isnan(p_holm) else "< 0.001" if p_holm < 0.001 else f"{p_holm:.3f}"
        if row["method"] == row["reference"]:
            difference = "reference"
        method = f"{row['method']} †" if row["doubled_back"] else row["method"]
        cells.append([f"{float(row['kl']):g}", FIGURES[row["column"]], method, str(row["seeds"]), mean, difference, p])
    return cells


def endpoint_notes(found: Comparison, table: Sequence[Row]) -> list[str]:
    """What is to be known of the ladders behind a table, in sentences."""
    marked = ["† One of the method's runs doubled back in KL."] if any(row["doubled_back"] for row in table) else []
    return [*marked, *ladder_notes(found.rows)]


def table_texts(found: Comparison, at_kl: Sequence[float]) -> dict[str, str]:
    """Ending of a file → the table as its text; nothing where there is no table."""
    if not (table := found.at_equal_kl(at_kl)):
        return {}
    notes = [f"Differences are from {table[0]['reference']}. {WHAT}", *endpoint_notes(found, table)]
    return {kind: write(HEADER, endpoint_cells(table), notes) for kind, write in (("md", markdown), ("tex", latex))}


def endpoint_section(found: Comparison, own: str, at_kl: Sequence[float]) -> str:
    """The part of the page, whose heading begins with `own`."""
    title, charts = f"{own}Endpoints at equal KL, test split", endpoint_charts(found.rows)
    table = found.at_equal_kl(at_kl)
    notes = endpoint_notes(found, table)
    if not charts:
        alone = "No method has two β, so that no ladder of ends says how methods compare at equal KL."
        return pages.section(title, pages.bullets([alone, *notes]))
    if not table:
        notes.insert(0, "No KL lies between the ends of two methods: there is none to compare at.")
    cells, cards = endpoint_cells(table), []
    less = f"less {table[0]['reference']}" if table else ""
    header = [name if name != "difference" else less for name in HEADER[2:]]
    for kl, figure in dict.fromkeys((row[0], row[1]) for row in cells):
        rows = [row[2:] for row in cells if row[:2] == [kl, figure]]
        cards.append(card(f"{figure.capitalize()} at KL = {kl} nats", pages.table(header, rows)))
    return pages.section(
        title, f'<p class="note">{pages.escape(WHAT)} {_RULE}</p>', *([pages.bullets(notes)] if notes else []),
        f'<div class="grid wide">{"".join([*map(chart_card, charts), *cards])}</div>',
    )  # fmt: skip


def _text(row: Row, mean: str, low: str, high: str) -> str:
    """The figure with its interval, where it has one."""
    return Interval(metric_of(row, mean), metric_of(row, low), metric_of(row, high), int(row["seeds"])).text()
