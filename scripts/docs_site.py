"""A hook of MkDocs: what the docs link to outside of their folder comes into the site too.

On a code host such a link is a path in the repository. In the site it leads to a page or a file in `repository/`. The
menu is the index's: a section per heading of docs/README.md, with the pages of its table.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PLACE = "repository"  # in the site
_SECTION = re.compile(r"^## (\w+).*?\n(.*?)(?=^## |\Z)", re.M | re.S)
_ENTRY = re.compile(r"^\| \[([^\]]+)\]\(([^)]+\.md)\)", re.M)
_LINK = re.compile(r"\[([^\[\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")  # of a path; not of an address


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the menu from the index."""
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    sections = [
        {title: [{name: page} for name, page in _ENTRY.findall(body)]} for title, body in _SECTION.findall(index)
    ]
    config.nav = [{"nca-align": "README.md"}, *sections]
    return config


def source(file: File) -> str:
    """The path in the repository of a file of the site."""
    own = file.src_uri.removeprefix(f"{PLACE}/")
    return own if own != file.src_uri else f"docs/{own}"


def linked(text: str, path: str) -> set[str]:
    """The files of the repository that a page at `path` links to."""
    return {posixpath.normpath(posixpath.join(posixpath.dirname(path), target)) for _, target, _ in _LINK.findall(text)}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is linked to from the pages, and from the pages so added."""
    left = list(files.documentation_pages())
    while left:
        file = left.pop()
        for path in sorted(linked(file.content_string, source(file))):
            inside = path.removeprefix("docs/") if path.startswith("docs/") else f"{PLACE}/{path}"
            if not (ROOT / path).is_file() or files.get_file_from_path(inside):
                continue
            added = File.generated(config, inside, abs_src_path=str(ROOT / path))
            files.append(added)
            left += [added] if added.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links to where the files lie in the site; of a folder, which has no page, the words stay."""
    here = source(page.file)

    def led(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(here), found[2]))
        if not (ROOT / path).exists():
            return found[0]
        inside = path.removeprefix("docs/") if path.startswith("docs/") else f"{PLACE}/{path}"
        if not (ROOT / path).is_file():
            return found[1]
        target = posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or ".")
        return f"[{found[1]}]({target}{found[3] or ''})"

    return _LINK.sub(led, markdown)
