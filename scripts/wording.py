"""How long the sentences are: of the README, the docs, `--help`, docstrings, comments and error messages.

    python scripts/wording.py [--worst 20] [--check] [FILE ...]

Code, tables and headings are left out. A list item ends a sentence, and inline code is one word.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONG, MEAN, SHARE = 35, 15.0, 0.05  # words of a long sentence; the target: the mean, and the share of long ones
_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bcf)(?<!\bvs)[.!?…][\"')\]*_]*\s+(?=[^a-z\s])")
_ITEM = re.compile(r"\s*(?:[-*+]|\d+[.)])\s+")
_SECTION = re.compile(r"(?:Args|Returns|Raises|Yields|Attributes|Source|Shapes):$")
_FIELD = re.compile(r"\**\w[\w.*, ]*: ")
_PRAGMA = re.compile(r"#\s*(?:!|noqa|type:|fmt:|pragma|\([\w\s,*+/·-]*\)$)")


@dataclass
class Sentence:
    group: str  # a page, or what of the sources it belongs to
    place: str  # file:line
    text: str

    @property
    def words(self) -> int:
        return len(re.findall(r"\S*\w\S*", self.text))


def _blank(found: re.Match[str], word: str = "") -> str:
    return word + "\n" * found[0].count("\n")


def plain(text: str) -> str:
    """Markdown without its marks, with as many lines."""
    text = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", partial(_blank, word="Code"), text, flags=re.S)
    text = re.sub(r"<!--.*?-->|</?\w[^>]*>", _blank, text, flags=re.S)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    return re.sub(r"\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])", r"\1", text)


def sentences(text: str) -> Iterator[tuple[int, str]]:
    """The sentences of a text in Markdown, each with its line, from 1."""
    text = re.sub(r"\A---\n.*?^---$|^\s*(```+|~~~+).*?^\s*\1\s*$", _blank, text, flags=re.S | re.M)
    blocks: list[tuple[int, list[str]]] = []
    fields = open_ = False  # within the arguments of a docstring; a block that the next line goes on
    for number, line in enumerate(plain(text).splitlines(), 1):
        stripped = line.strip()
        if not stripped or re.match(r"#+ |\||>?\s*$|[-=:| ]+$", stripped) or _SECTION.match(stripped):
            fields, open_ = (fields or bool(_SECTION.match(stripped))), False
            continue
        item = _ITEM.match(line) or (fields and _FIELD.match(stripped))
        words = _ITEM.sub("", line, count=1).strip() if _ITEM.match(line) else stripped
        if open_ and not item:
            blocks[-1][1].append(words)
        else:
            blocks.append((number, [words]))
        open_ = True
    for first, lines in blocks:
        text, start = "\n".join(lines), 0
        for end in [*(found.end() for found in _END.finditer(text)), len(text)]:
            if re.search(r"\w", text[start:end]):
                yield first + text[:start].count("\n"), " ".join(text[start:end].split())
            start = end


def literal(node: ast.expr | None) -> str:
    """A text of the code, with one word for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(part) or "value" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return literal(node.left) + (literal(node.right) or " value")
    return ""


def python_texts(source: str) -> Iterator[tuple[str, int, str]]:
    """The texts of a module: what each is, its line, and itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            yield "docstrings", node.body[0].lineno, ast.get_docstring(node) or ""
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            yield "error messages", node.lineno, literal(node.exc.args[-1])
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "option":
            given = [keyword.value for keyword in node.keywords if keyword.arg == "help"] or node.args[:1]
            yield "--help", node.lineno, literal(given[0] if given else None)
    begun, lines = 0, list[str]()
    for token in [*tokenize.generate_tokens(io.StringIO(source).readline)]:
        if token.type != tokenize.COMMENT or _PRAGMA.match(token.string):
            continue
        own_line = token.line.strip() == token.string
        if lines and not (own_line and token.start[0] == begun + len(lines)):
            yield "comments", begun, "\n".join(lines)
            lines = []
        begun = begun if lines else token.start[0]
        lines.append(token.string.lstrip("#").strip())
    if lines:
        yield "comments", begun, "\n".join(lines)


def of_file(path: Path) -> Iterator[Sentence]:
    """The sentences of a page, or of a module."""
    name = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    text = path.read_text(encoding="utf-8")
    texts = python_texts(text) if path.suffix == ".py" else [(name, 1, text)]
    for group, first, own in texts:
        for line, sentence in sentences(own):
            yield Sentence(group, f"{name}:{first + line - 1}", sentence)


def within_target(found: list[Sentence]) -> bool:
    long = sum(sentence.words > LONG for sentence in found)
    return not found or (sum(s.words for s in found) <= MEAN * len(found) and long <= SHARE * len(found))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="without any: all of the repository's")
    parser.add_argument("--worst", type=int, default=0, metavar="N", help="list the N longest sentences")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a page or a group is over the target")
    given = parser.parse_args(argv)
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("[bc]*/README.md")]
    pages = [page for page in pages if not page.name.startswith("plan")]  # which stay as they were committed
    files = given.files or [*sorted(pages), *sorted((ROOT / "src").rglob("*.py"))]
    found = [sentence for path in files for sentence in of_file(path.resolve())]
    groups = {name: [s for s in found if s.group == name] for name in dict.fromkeys(s.group for s in found)}
    for name, own in [*groups.items(), ("all", found)]:
        counts = [sentence.words for sentence in own] or [0]
        long = sum(count > LONG for count in counts) / len(counts)
        mark = "" if within_target(own) else "  over"
        print(f"{name:40}{len(own):6} sentences {sum(counts) / len(counts):5.1f} words {long:6.1%} above {LONG}{mark}")
    for sentence in sorted(found, key=lambda sentence: -sentence.words)[: given.worst]:
        print(f"{sentence.words:4} {sentence.place}: {sentence.text}")
    return int(given.check and not all(map(within_target, groups.values())))


if __name__ == "__main__":
    sys.exit(main())
