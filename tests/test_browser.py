"""The pages that commands write, in a real browser: no error, no request, no overflow on a phone, and readable."""

import json
from pathlib import Path

import numpy as np
import pytest

from browser import browser, faults, open_page, overflow
from conftest import needs_real_data, pair_rows, planned, reward_rows, scored_rows
from nca_align.commands.compare.tables import Selection, selected_rows
from nca_align.commands.inspect.command import main
from nca_align.commands.report.command import write_report
from nca_align.pages.charts import histogram
from nca_align.pages.html import card, page, section, table
from nca_align.store.files import read_csv, write_csv
from test_report import log_of, write_run

SCRIPT = "<script>document.title = 'taken'; console.error('taken')</script><img src='http://127.0.0.1:9/x.png'>"


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def inspect_page(model_dir, tmp_path_factory) -> Path:
    """The page of `nca-align inspect` on data that tries to break it."""
    folder = tmp_path_factory.mktemp("page")
    rows = reward_rows(40, [4, 2, 6])
    rows[0]["completions"][0][0]["content"] = f"</span></div>{SCRIPT} {'x' * 4000}\x00"
    rows[0]["completions"][2] += [{"role": "user", "content": "<b>Go on"}, {"role": "assistant", "content": "Done."}]
    rows[0]["completions"][1][0]["content"] = "日本語 😀 \u202e " + "long words " * 500
    data = folder / "rows-with-quite-a-long-name-as-data-sets-have-them<b>.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    page = folder / "page.html"
    assert main(["--dataset_name", str(data), "--model_name_or_path", model_dir, "--html", str(page)]) == 0
    return page


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_inspect_page(chromium, inspect_page, width, dark):
    page, problems = open_page(chromium, inspect_page, width, dark)
    assert problems == []
    assert overflow(page) <= 0
    assert page.title() != "taken"
    assert "<script>document.title" in page.inner_text("body")
    assert page.locator("script, img").count() == 0
    boxes = page.eval_on_selector_all("svg, .card, .scroll, .text", "all => all.map(e => e.getBoundingClientRect())")
    assert len(boxes) > 20
    for box in boxes:
        assert box["width"] > 0
        assert box["right"] <= width
    size = page.eval_on_selector("svg text", "e => e.getBoundingClientRect().height")
    assert 9 <= size <= 24  # chart labels are as legible on a phone as on a screen
    page.close()


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_what_is_behind_it(chromium, inspect_page, dark):
    """WCAG AA, a contrast of 4.5, for each kind of text on the page."""
    page, _ = open_page(chromium, inspect_page, 1280, dark)
    contrast = """selector => {
      const rgb = c => c.match(/[\\d.]+/g).map(Number);
      const light = c => rgb(c).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const e = document.querySelector(selector);
      const style = getComputedStyle(e);
      let behind = e;
      while (behind && (rgb(getComputedStyle(behind).backgroundColor)[3] ?? 1) === 0) behind = behind.parentElement;
      const ink = e instanceof SVGElement ? style.fill : style.color;
      const [a, b] = [light(ink), light(getComputedStyle(behind).backgroundColor)].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05);
    }"""
    for selector in (
        "h1", "p.soft", "li", "figcaption", ".tile b", ".warn b", "svg text", "th", "tr.mark td", ".words td",
        ".prompt span:nth-child(2)", ".completion span:nth-child(1)", ".completion span:nth-child(2)",
        ".completion span.context",
    ):  # fmt: skip
        assert page.evaluate(contrast, selector) >= 4.5, selector
    page.close()


ROOT = Path(__file__).resolve().parents[1]


def study_report(folder: Path, *samplers: str) -> Path:
    """The page of `nca-align report` on runs of the study, a world for a seed: their starts and ends, as compared."""
    runs = read_csv(ROOT / "docs/study/worlds.csv")
    usual = {"rewards": "true", "completions": "4", "prompts": "128", "steps": "128", "negative_weight": "1.0"}
    usual |= {"alpha": "1.0"}
    for sampler in samplers:
        rows = []
        for run in runs:
            about = {"method": run["loss"].split("_")[0], "alpha": 1, "beta": run["beta"], "seed": run["world"]}
            name = f"{about['method']}-{about['beta']}-{about['seed']}"
            same = all(run[key] == value for key, value in (usual | {"sampler": sampler}).items())
            if same and int(run["world"]) <= 6 and run["loss"] in ("nca", "infonca", "dpo_best_worst"):
                start = {"reward": 0, "kl": 0, "logratio_best": 0, "logratio_worst": 0}
                end = {key: run[f"test_{key.removeprefix('logratio_')}"] for key in start}
                steps = ((0, start), (128, end))
                rows += [{"cell": name, **about, "split": "test", "step": at, **own} for at, own in steps]
        (folder / sampler).mkdir(parents=True)
        write_csv(folder / sampler / "comparison.csv", rows, [*rows[0]])
        write_csv(folder / sampler / "selected.csv", selected_rows(rows, Selection(), planned(rows)))
    return write_report([folder / sampler for sampler in samplers], folder / "out")[0]


def run_report(folder: Path, *names: str) -> Path:
    """The page of `nca-align report` on runs, of the same name but in different folders."""
    runs = [write_run(folder / name / "run", log_of(seed=i, k=16)) for i, name in enumerate(names)]
    return write_report(runs, folder / "out")[0]


PAGES = {
    "inspect, quickstart": (ROOT / "data/quickstart", ["--alpha", "0.3"]),
    "inspect, quickstart, default α": (ROOT / "data/quickstart", []),
    "inspect, ties": (lambda: scored_rows("own"), []),
    "inspect, ties, real": (lambda: scored_rows("real"), []),
    "inspect, pairs": (lambda: pair_rows("own"), ["--max_length", "512"]),
    "inspect, pairs, real": (lambda: pair_rows("real"), ["--max_length", "512"]),
    "report, a comparison": (study_report, ["reference"]),
    "report, two comparisons": (study_report, ["other", "reference"]),
    "report, a run": (run_report, ["one"]),
    "report, two runs": (run_report, ["one", "two"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[needs_real_data] * n.endswith("real")) for n in PAGES])
def test_nothing_overlaps_is_cut_is_empty_or_stands_twice(chromium, name, model_dir, tmp_path):
    """At the width of a screen and of a phone."""
    source, more = PAGES[name]
    if name.startswith("inspect"):
        if not isinstance(source, Path):
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in source()))
            source = tmp_path / "rows.jsonl"
        path = tmp_path / "page.html"
        assert main(["--dataset_name", str(source), "--model_name_or_path", model_dir, "--html", str(path), *more]) == 0
    else:
        path = source(tmp_path, *more)
    for width in (1280, 390):
        page, problems = open_page(chromium, path, width)
        assert page.locator("svg text").count() > 20
        assert problems + faults(page) == []
        page.close()


@pytest.mark.slow
@pytest.mark.parametrize("between", [0.01, 0.3, 20])
@pytest.mark.parametrize("place", [0.05, 5, 95, 99.9])
def test_marks_close_to_each_other_and_to_an_edge_keep_their_names(chromium, tmp_path, place, between):
    marks = {"suggested": place, "your own long α": min(100.0, place + between), "a third": max(0.0, place - between)}
    chart = histogram(np.linspace(0, 100, 11), np.arange(1, 11), "x", "rows", marks)
    path = tmp_path / "page.html"
    path.write_text(page("A page", "", section("A part", card("A chart", chart))))
    for width in (1280, 390):
        tab, _ = open_page(chromium, path, width)
        texts = [text.strip() for text in tab.locator("svg text").all_text_contents()]
        assert [name for name in marks if name in texts] == [*marks]
        assert faults(tab) == []
        tab.close()


@pytest.mark.slow
def test_the_browser_sees_what_is_wrong(chromium, tmp_path):
    """Without this, the tests above might pass on anything."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<link rel=icon href='data:,'><div style='width: 500px'>wide</div><script>console.error('said'); "
        "fetch('http://127.0.0.1:9/').catch(() => 0); setTimeout(() => { throw new Error('thrown') })</script>"
    )
    page, problems = open_page(chromium, bad, 390)
    text = "\n".join(problems)
    assert "console: said" in text
    assert "page error: thrown" in text
    assert "request: http://127.0.0.1:9/" in text
    assert overflow(page) > 0
    page.close()


@pytest.mark.slow
def test_the_browser_sees_what_a_reader_would_stumble_over(chromium, tmp_path):
    """Without this, the tests of real pages might pass on anything."""
    svg = (
        '<svg aria-label="s" viewBox="0 0 200 100"><text x="10" y="50">one</text><text x="14" y="52">two</text>'
        '<text x="190" y="90">a long text</text><path d="M20,20 L20,80" style="stroke: var(--warn)"/></svg>'
    )
    wide = (
        "<div class=scroll><table><tr>" + "".join(f"<td>{i}{'0' * 90}</td>" for i in range(9)) + "</tr></table></div>"
    )
    empty = "<table><tr><td>a</td><td></td></tr></table>"
    path = tmp_path / "page.html"
    again = section("Part", card("Card", svg), card("Card", wide), card("Part", empty))
    path.write_text(page("Page", "", f"<h2>Page</h2>{again}"))
    tab, _ = open_page(chromium, path, 390)
    found = "\n".join(faults(tab))
    tab.close()
    for said in (
        "“one” and “two” overlap", "“a long text” is cut", "“one” is crossed by a line", "column 1 of “a” is empty",
        "a table scrolls sideways", "“Page” stands under its own title", "“Page > Part > Card” stands twice",
        "“Part” stands under its own title",
    ):  # fmt: skip
        assert said in found


def test_a_column_without_a_value_is_left_out():
    html = table(["name", "none", "n"], [["a", "", 1], ["b", "", 0]])
    assert "none" not in html
    assert html.count("<th>") == 2
    assert html.count("<td") == 4
    wide = table([f"{i}" for i in range(6)], [range(6)])
    assert 'data-name="5"' in wide  # a phone's label of the value
    assert 'data-name="<' not in table(["<b>"] * 6, [range(6)])
