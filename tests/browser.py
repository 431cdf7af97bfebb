"""A real browser for pages that this package writes; the tests that need one skip, with the reason, without it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SHELL = Path("/usr/bin/chromium-headless-shell")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@contextmanager
def browser() -> Iterator:
    """A headless Chromium; skips the calling test where it or playwright is not installed."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'")
    if not SHELL.exists():
        pytest.skip(f"{SHELL} is not installed: apt-get install --no-install-recommends {SHELL.name}")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(SHELL), args=ARGUMENTS)
        try:
            yield chromium
        finally:
            chromium.close()


def open_page(chromium, path: Path, width: int = 1280, dark: bool = False):
    """The file in a tab of its own, and what went wrong in it: console and page errors, and requests that leave it."""
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light")
    problems: list[str] = []

    def on_request(request) -> None:
        address = urlsplit(request.url)
        if address.scheme != "file" or Path(unquote(address.path)) != path.resolve():
            problems.append(f"request: {request.url}")

    page.on("console", lambda m: problems.append(f"console: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(f"page error: {error}"))
    page.on("request", on_request)
    page.goto(path.resolve().as_uri())
    page.wait_for_load_state("networkidle")
    return page, problems


def overflow(page) -> int:
    """Pixels by which the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def faults(page) -> list[str]:
    """What a reader would stumble over: labels on each other or cut, empty columns, titles twice, scrolling sideways.

    A letter's box is higher than the letter: boxes count without 2 pixels above and below.
    """
    return page.evaluate("""() => {
      const found = [];
      const box = e => e.getBoundingClientRect();
      const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4;
      for (const svg of document.querySelectorAll('svg')) {
        const name = svg.getAttribute('aria-label'), whole = box(svg), texts = [...svg.querySelectorAll('text')];
        const said = text => name + ': “' + text.textContent.trim() + '”';
        texts.forEach((text, i) => {
          const own = box(text);
          if (own.left < whole.left - 1 || own.right > whole.right + 1
              || own.top < whole.top - 1 || own.bottom > whole.bottom + 1) found.push(said(text) + ' is cut');
          for (const other of texts.slice(i + 1))
            if (meet(own, box(other))) found.push(said(text) + ' and “' + other.textContent.trim() + '” overlap');
          for (const line of svg.querySelectorAll('path[style*="--warn"]')) {
            const mark = box(line);
            if (own.left < mark.left && mark.right < own.right
                && own.top + 2 < mark.bottom && mark.top < own.bottom - 2)
              found.push(said(text) + ' is crossed by a line');
          }
        });
      }
      for (const table of document.querySelectorAll('table')) {
        const rows = [...table.querySelectorAll('tbody tr, tr')].filter(row => row.querySelector('td'));
        const columns = Math.max(...rows.map(row => row.cells.length));
        for (let i = 0; i < columns; i++)
          if (rows.every(row => !row.cells[i].textContent.trim()))
            found.push('column ' + i + ' of “' + table.textContent.slice(0, 40) + '” is empty');
      }
      for (const part of document.querySelectorAll('.scroll'))
        if (part.scrollWidth > part.clientWidth)
          found.push('a table scrolls sideways: “' + part.textContent.slice(0, 40) + '”');
      const seen = new Set(), above = [];
      for (const head of document.querySelectorAll('h1, h2, h3')) {
        const level = +head.tagName[1] - 1, text = head.textContent.trim();
        above.length = level;
        if (above.includes(text)) found.push('“' + text + '” stands under its own title');
        above[level] = text;
        const path = above.join(' > ');
        if (seen.has(path)) found.push('“' + path + '” stands twice');
        seen.add(path);
      }
      if (document.documentElement.scrollWidth > document.documentElement.clientWidth)
        found.push('the page scrolls sideways');
      return found;
    }""")
