"""The pages that commands write, in a real browser: no error, no request, no overflow on a phone, and readable."""

import json
from pathlib import Path

import pytest

from browser import browser, open_page, overflow
from conftest import reward_rows
from nca_align.commands.inspect.command import main

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
    ):  # fmt: skip
        assert page.evaluate(contrast, selector) >= 4.5, selector
    page.close()


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
