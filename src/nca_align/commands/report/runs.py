"""What runs and comparisons logged, read from their folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...evaluation.comparison_folder import ENDPOINTS, PROVENANCE, ROWS, SELECTED, failure
from ...evaluation.comparison_rows import Row, Setting, setting_of
from ...evaluation.endpoints import endpoint_rows
from ...evaluation.frontier import Curve, curves_of
from ...store.checkpoints import whole_checkpoints
from ...store.files import read_csv, read_json

_COLUMNS = ("method", "seed", "split", "step", "reward", "kl")


@dataclass(frozen=True)
class Run:
    """One training run: its name and the trainer's log, a line a step and kind."""

    name: str
    log: list[dict[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """What `nca-align compare` wrote: rows of its tables, and the cells without a result with the reason.

    `endpoints` is None where `compare` wrote none, as before it had them.
    """

    name: str
    rows: list[dict[str, str]]
    selected: list[dict[str, str]]
    failed: list[tuple[str, str]]
    provenance: dict[str, Any]
    endpoints: list[dict[str, str]] | None = None

    def at_equal_kl(self, at_kl: Sequence[float] = ()) -> Sequence[Row]:
        """The rows of `endpoints.csv`; with `at_kl` those at these KLs, with the same reference."""
        if self.endpoints is not None and not at_kl:
            return self.endpoints
        return endpoint_rows(self.rows, at_kl, self.endpoints[0]["reference"] if self.endpoints else None)

    def chosen(self) -> dict[Setting, list[Curve]]:
        """Test curves of the settings that validation chose, in the order of `selected.csv`."""
        curves = curves_of(self.rows)
        return {setting: curves[setting] for row in self.selected if (setting := setting_of(row)) in curves}


def read_run(path: Path) -> Run | Comparison:
    """The folder of `nca-align compare` or `train`; of a run not at its end, what its last checkpoint logged."""
    if not path.is_dir():
        raise UserError(
            f"run {path} is not a folder; give the `output_dir` of `nca-align train` or `nca-align compare`"
        )
    if (path / ROWS).is_file():
        return _comparison(path)
    state = path / "trainer_state.json"
    if not state.is_file():
        saved = whole_checkpoints(path)
        if (path / "cells").is_dir():
            raise UserError(
                f"run {path} is a comparison with no finished cell; wait for the first, which writes the tables"
            )
        if not saved:
            raise UserError(
                f"run {path} holds neither trainer_state.json nor comparison.csv. Give the `output_dir` of `nca-align "
                "compare`, or of a run of `nca-align train` that has saved once."
            )
        state = saved[max(saved)] / "trainer_state.json"
    log = _json(state).get("log_history")
    if not isinstance(log, list):
        raise UserError(f"{state} has no `log_history`, so it is not a trainer's state; give another folder")
    return Run(path.resolve().name, [line for line in log if isinstance(line, dict) and "step" in line])


def _comparison(path: Path) -> Comparison:
    rows = read_csv(path / ROWS)
    if missing := [name for name in _COLUMNS if not rows or name not in rows[0]]:
        raise UserError(
            f"{path / 'comparison.csv'} has no rows with `{missing[0]}`; run `nca-align compare` until a cell is done"
        )
    if not (path / SELECTED).is_file():
        raise UserError(f"{path} has no selected.csv; run `nca-align compare` again, which writes it")
    about = path / PROVENANCE
    provenance = _json(about) if about.is_file() else {}
    reasons = {cell.name: failure(cell) for cell in sorted(path.glob("cells/*"))}
    grid = provenance.get("cells", reasons)  # others have left it
    failed = [(name, why) for name, why in reasons.items() if why is not None and name in grid]
    endpoints = read_csv(path / ENDPOINTS) if (path / ENDPOINTS).is_file() else None
    return Comparison(path.resolve().name, rows, read_csv(path / SELECTED), failed, provenance, endpoints)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as JSON: {error}; write it again, or give another folder") from error
    return found if isinstance(found, dict) else {}
