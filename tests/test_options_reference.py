"""docs/reference/options.md is what the dataclasses of the options say, all commands and modes among them."""

import runpy
from pathlib import Path

from nca_align.cli import COMMANDS
from nca_align.commands.evaluate.command import MODES

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = runpy.run_path(str(ROOT / "scripts" / "options_reference.py"))


def test_the_page_is_of_these_options():
    text = REFERENCE["PAGE"].read_text()
    assert text == REFERENCE["page"](), "write it again: python scripts/options_reference.py"
    told = {line.removeprefix("## nca-align ") for line in text.splitlines() if line.startswith("## ")}
    assert told == {*COMMANDS, *(f"evaluate --{mode}" for mode in MODES)} - {"env"}  # which has no options
    assert "| `alpha` | float |" in text
    assert "| `bf16` | true or false |  |" in text  # transformers' own, with another default here
    assert "| `label_smoothing` | `0` | no loss here reads it" in text
