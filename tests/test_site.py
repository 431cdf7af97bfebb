"""The site of the docs: built without a warning, and each link within it leads somewhere, to its anchor too."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_site_is_whole(tmp_path):
    if find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: pip install '.[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    texts = {page: page.read_text() for page in tmp_path.rglob("*.html")}
    assert len(texts) > len(list((ROOT / "docs").rglob("*.md")))  # the recipes and the benchmark results too
    links = 0
    for page, text in texts.items():
        if page.name == "404.html":
            continue  # its links are absolute
        for target in re.findall(r'(?:href|src)="?([^" >]+)', text):
            if re.match(r"\w+:", target):
                continue
            name, _, anchor = unquote(target).partition("#")
            path = (page.parent / name).resolve() if name else page
            path = path / "index.html" if path.is_dir() else path
            assert path.exists(), f"{target} in {page}"
            if anchor and path in texts:
                assert re.search(rf'(?:id|name)="?{re.escape(anchor)}["\s>]', texts[path]), f"{target} in {page}"
            links += 1
    assert links > 500
