"""`scripts/wording.py` on texts whose sentences and words were counted by hand."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "wording.py"
WORDING = runpy.run_path(str(SCRIPT))
PAGE = """# A heading with words that don't count

One two three. Four, five
six! Is `code with spaces` one word?

| a | table |
| --- | --- |
| is | left out |

- An item without a full stop
- [A link's](https://example.org/of.dots) text <!-- not. this. --> counts, e.g. Here
  and on the next line
```python
code = "left out. Of course."
```
1. The last item ends. With two sentences
"""
COUNTED = [(3, 3), (3, 3), (4, 4), (10, 6), (11, 11), (16, 4), (16, 3)]  # line, words
MODULE = '''"""Three words here."""
# A comment of
# two lines.
x = 1  # noqa: E501


def f(a):
    """Do it.

    Args:
        a: what it is done to, which takes
            two lines.
        b: no more.
    """
    if a:  # (B, K)
        raise ValueError(f"`a` is {a}; it must be 0. " + "Give it.")
    return option("how many of them", 3)
'''


def test_a_page_counted_by_hand():
    assert [(line, WORDING["Sentence"]("", "", text).words) for line, text in WORDING["sentences"](PAGE)] == COUNTED


def test_a_module_counted_by_hand(tmp_path):
    (tmp_path / "module.py").write_text(MODULE)
    found = [(s.group, int(s.place.rpartition(":")[2]), s.words) for s in WORDING["of_file"](tmp_path / "module.py")]
    assert sorted(found) == [
        ("--help", 17, 4), ("comments", 2, 5), ("docstrings", 1, 3), ("docstrings", 8, 2), ("docstrings", 11, 10),
        ("docstrings", 13, 3), ("error messages", 16, 2), ("error messages", 16, 7),
    ]  # fmt: skip


@pytest.mark.parametrize(("text", "code"), [("A short one. " * 19 + "Long" + " long" * 35, 0), ("long " * 16, 1)])
def test_check_tells_whether_the_target_is_met(text, code, tmp_path, capsys):
    """A mean of 15 words, and one sentence in twenty above 35."""
    (tmp_path / "page.md").write_text(text)
    assert WORDING["main"]([str(tmp_path / "page.md")]) == 0
    assert WORDING["main"]([str(tmp_path / "page.md"), "--check", "--worst", "1"]) == code
    assert ("  over\n" in capsys.readouterr().out) == bool(code)
