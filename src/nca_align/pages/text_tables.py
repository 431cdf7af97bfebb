"""Tables as text for papers and messages: Markdown, and LaTeX that needs no package but booktabs."""

import re
from collections.abc import Sequence

_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "α": r"$\alpha$",
    "β": r"$\beta$", "λ": r"$\lambda$", "π": r"$\pi$", "±": r"$\pm$", "−": "$-$", "–": "--", "’": "'", "<": "$<$",
    ">": "$>$", "†": r"$\dagger$", **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}  # fmt: skip


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A table of GitHub's Markdown, and `notes` below it, a paragraph each."""
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    return "\n\n".join([table, *notes]) + "\n"


def latex(header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A `tabular` with the rules of booktabs, one of them wherever the first column changes; `notes` are comments."""
    lines = [r"% in the preamble: \usepackage{booktabs}", *(f"% {note}" for note in notes)]
    lines += [rf"\begin{{tabular}}{{{'l' * len(header)}}}", r"\toprule", _line(header)]
    before = None
    for row in rows:
        lines += [r"\midrule"] if row[0] != before else []
        lines.append(_line(row))
        before = row[0]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _line(cells: Sequence[str]) -> str:
    escaped = ("".join(_LATEX.get(sign, sign) for sign in re.sub(r"(?<!\w)-(?=[\d.])", "−", cell)) for cell in cells)
    return f"{' & '.join(escaped)} \\\\"
