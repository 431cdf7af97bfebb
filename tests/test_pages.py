"""Charts and tables: colours that stay with a method and follow the reader's system, and texts that are only texts."""

import io
import re

import numpy as np
import pytest
from rich.console import Console

from nca_align.commands.compare.methods import METHODS
from nca_align.pages.charts import Chart, Series, bars, chart_svg, histogram
from nca_align.pages.html import COLOURS, STYLE
from nca_align.pages.styles import PAGE_COLOURS, ordered_styles, styles
from nca_align.pages.terminal import print_rows


def test_a_method_has_one_colour_in_all_charts():
    alone, ablation = styles(["nca"]), styles(["dpo", "nca, α 0.3", "nca, α 1"])
    assert alone["nca"] == ablation["nca, α 0.3"]
    assert ablation["nca, α 1"] == (alone["nca"][0], "--")
    assert ablation["dpo"] == styles(["kto", "sft", "dpo"])["dpo"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_looks_the_same_beside_whatever_others(method):
    look = styles([method])[method]
    for others in (METHODS, METHODS[::-1], ("mine", method, "nca"), ("sft", "mine", method)):
        assert styles([*others])[method] == look


def test_curves_in_an_order_run_from_one_colour_to_another_on_a_page_too():
    for n in (1, 2, 4, 16, 25):
        found = [colour for colour, _ in ordered_styles([f"{i}." for i in range(n)]).values()]
        assert len({*found}) == n
        assert {*found} <= PAGE_COLOURS.keys()
    assert (found[0], found[-1]) == (COLOURS["a"], COLOURS["b"])
    svg = chart_svg(Chart("t", [Series(f"{i}", [0, 1], [0, i]) for i in range(5)], "step", colours=ordered_styles))
    assert svg.count("color-mix(in srgb, var(--b) 50%, var(--a))") >= 2  # the curve, and its key


@pytest.mark.parametrize(
    "names",
    [
        [f"nca, α {i}" for i in range(24)],
        [f"{method}, β {i}" for method in ("nca", "dpo", "mine") for i in range(8)],
        ["best", "2.", "3.", "4.", "5.", "6.", "7.", "8."],
    ],
)
def test_no_two_curves_look_alike(names):
    found = styles(names)
    assert [*found] == names
    assert len({*found.values()}) == len(names)


def test_a_chart_on_a_page_has_the_style_sheets_colours_alone():
    series = [Series(name, [1, 10], [0.0, 1.0], y_bars=[(-1.0, 1.0)] * 2) for name in ("nca", "dpo, a", "dpo, b")]
    chart = Chart("t", series, "step", log_x=True, marks={"here": 2.0})
    for svg in (chart_svg(chart), histogram(np.array([0.0, 1, 2]), np.array([3, 4]), "x", "rows", {"here": 1.0})):
        assert set(re.findall(r"var\(--(\w+)\)", svg)) <= {*COLOURS}
        assert not re.search(r"[:\"] ?#[0-9a-f]{3}", svg)
        assert ">here</text>" in svg
    dark = STYLE.partition("@media")[2]
    assert all(f"--{name}: #" in dark for name in COLOURS)


def test_what_hovering_shows_is_text():
    name = 'a <b> "c" \x1b'
    shown = chart_svg(Chart("t", [Series(name, [1], [12500.0])], "step"))
    assert '<title>a &lt;b&gt; "c" ␛: 1, 12.5k</title>' in shown
    assert "<title>a &lt;b&gt;: 7</title>" in bars(["a <b>"], [7.0], "x")
    assert "<title>0 to 1: 3 rows</title>" in histogram(np.array([0.0, 1, 2]), np.array([3, 4]), "x", "rows")


def test_a_long_curve_has_no_points_to_hover_over():
    assert "<title>" not in chart_svg(Chart("t", [Series("a", range(100), range(100))], "step"))


def test_a_table_aligns_numbers_and_reads_no_markup():
    file = io.StringIO()
    rows = [("[bold]a[/bold]", "1", "new"), ("b", "12345", "")]
    print_rows(("name", "n", ""), rows, marked=1, console=Console(file=file, width=60))
    assert [line.rstrip() for line in file.getvalue().splitlines()] == [
        "name                n", "[bold]a[/bold]      1  new", "b               12345"
    ]  # fmt: skip
