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
