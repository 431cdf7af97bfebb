"""The folder of a comparison: its files, those of a cell in `cells`, and what became of a cell."""

from pathlib import Path

ROWS, SELECTED, ENDPOINTS, PROVENANCE = "comparison.csv", "selected.csv", "endpoints.csv", "provenance.json"
SETTINGS, CONFIG, LOG, ERROR, DONE = "settings.json", "config.yaml", "log.txt", "error.txt", "done.json"


def is_done(cell: Path) -> bool:
    """Whether the cell in this folder is finished."""
    return (cell / DONE).exists()


def failure(cell: Path) -> str | None:
    """Why the cell failed the last time that it ran; None where it didn't, or was finished all the same."""
    if is_done(cell) or not (cell / ERROR).exists():
        return None
    lines = (cell / ERROR).read_text(encoding="utf-8", errors="replace").strip().split("\n")
    return lines[-1] if lines else "no reason was written"
