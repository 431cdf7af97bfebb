"""`nca-align compare`: methods and settings beside each other, a training run a cell, from one YAML file."""

import fnmatch
import math
import os
import platform
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from ...errors import UserError, cli_main, first_few
from ...evaluation.comparison_folder import CONFIG, DONE, ENDPOINTS, LOG, PROVENANCE, ROWS, SELECTED, failure, is_done
from ...evaluation.comparison_rows import Row, interval_of, setting_name
from ...evaluation.endpoints import FIELDS, endpoint_rows, ladder_notes
from ...options import option, parse, require_at_least_1
from ...pages.terminal import print_rows
from ...store.files import read_json, write_csv, write_json
from ...store.ownership import own_folder
from ...store.provenance import LIBRARIES, commit, versions
from .grid import Cell, EvaluationSettings, cell_options, expand, from_mapping
from .power import power_lines
from .runner import prepare, run_cells
from .splits import read_splits
from .tables import COLUMNS, Endpoints, Selection, finished_rows, seeds_of, selected_rows, unselected_settings


@dataclass
class CompareOptions:
    """Options of `nca-align compare`; `base`, `grid`, `evaluation`, `select`, `endpoints` are mappings of the file."""

    output_dir: str = option("folder of the tables and, in `cells`, of the runs")
    base: dict[str, Any] | str | None = option("in the file: options of `nca-align train` that all cells share", None)
    grid: dict[str, Any] | str | None = option(
        "in the file: method, strategy, alpha, beta, learning_rate, num_completions, reward_weights, seed, each with "
        "its values; or a list of such mappings",
        None,
    )
    evaluation: dict[str, Any] | str | None = option(
        "in the file: scorer, validation, test, prompts, num_completions, max_new_tokens, steps …", None
    )
    select: dict[str, Any] | str | None = option(
        "in the file: metric and at_kl, by which validation chooses settings", None
    )
    endpoints: dict[str, Any] | str | None = option(
        "in the file: reference and at_kl, by which the ends of runs are compared at equal KL", None
    )
    parallel: int = option("cells at a time; on several GPUs one each", 1)
    timeout_minutes: float | None = option("a cell that takes longer is stopped and counts as failed", None)
    only: str = option("run the cells whose name this pattern matches, such as 'nca-*'", "*")
    dry_run: bool = option("list the cells, with an estimate, and run none", False)
    report: bool = option("write report.html and its figures at the end", False)

    def __post_init__(self):
        require_at_least_1(self, "parallel")
        if self.timeout_minutes is not None and not self.timeout_minutes > 0:
            raise UserError(f"`timeout_minutes` is {self.timeout_minutes}; it must be above 0")


@cli_main("nca-align compare", goes_on="finished cells stay, and the same command goes on with the others")
def main(argv: list[str] | None = None) -> int:
    """Run what isn't finished of a comparison and write its tables; 1 where a cell failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    (options,) = parse(
        [CompareOptions], argv, "nca-align compare", "Train methods and settings beside each other, and compare them."
    )
    for name in ("base", "grid", "evaluation"):
        if getattr(options, name) is None:
            raise UserError(f"`{name}` is missing; `nca-align compare` takes it from the YAML file of `--config`")
    evaluation = from_mapping(EvaluationSettings, "evaluation", options.evaluation)
    selection = from_mapping(Selection, "select", options.select or {})
    if selection.at_kl is not None and evaluation.validation_steps is not None:
        raise UserError(
            f"`at_kl` of `select` is {selection.at_kl}, but `validation_steps` of `evaluation` is "
            f"{evaluation.validation_steps}. Choosing at a KL needs validation at every evaluation. Leave one out."
        )
    endpoints = from_mapping(Endpoints, "endpoints", options.endpoints or {})
    cells = expand(options.base, options.grid, "the comparison's YAML file")
    endpoints.check(cells)
    chosen = [cell for cell in cells if fnmatch.fnmatch(cell.name, options.only)]
    if not chosen:
        names = first_few([cell.name for cell in cells])
        raise UserError(f"`only` is {options.only!r}, which matches none of the {len(cells)} cells: {names}")
    output = Path(options.output_dir)
    if options.dry_run:
        _print_cells(chosen, output, options.parallel)
        print(*power_lines(cells, output, endpoints, evaluation), sep="\n")
        return 0
    with own_folder(output):
        prepare(cells, output, evaluation)
        todo = [cell for cell in chosen if not is_done(cell.folder(output))]
        print(f"{len(chosen)} cells, {len(chosen) - len(todo)} of them finished; in {output}")
        if todo:  # what is wrong with the data, once and at once
            script, data_options, _, args, _ = cell_options(todo[0].folder(output) / CONFIG)
            train, held_out = read_splits(script, data_options, args, evaluation)
            prompts = {name: len(rows) for name, rows in {"training": train, **held_out}.items()}
            print(f"Prompts: {', '.join(f'{name} {count}' for name, count in prompts.items())}")
            _write_provenance(output, argv, options, cells, prompts)
        tables = partial(_write_tables, output, cells, selection, endpoints)
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is running ends with us
        try:
            run_cells(todo, output, options.parallel, options.timeout_minutes, tables)
        finally:
            signal.signal(signal.SIGTERM, before)
        rows, selected = tables()
    failed = {cell.name: why for cell in chosen if (why := failure(cell.folder(output)))}
    for name, why in failed.items():
        print(f"Failed: {name}: {why} ({output / 'cells' / name / LOG})", file=sys.stderr)
    if rows:
        _print_selected(selected)
        for line in [*unselected_settings(rows, selection, seeds_of(cells)), *ladder_notes(rows)]:
            print(line)
        print(
            f"All figures: {output / ROWS}; chosen on validation: {output / SELECTED}; methods at equal KL: "
            f"{output / ENDPOINTS}"
        )
    if rows and options.report:
        from ..report.command import write_report

        for path in write_report([output], output):
            print(f"Written: {path}")
    return 1 if failed else 0


def _write_tables(
    output: Path, cells: Sequence[Cell], selection: Selection, endpoints: Endpoints
) -> tuple[list[Row], list[Row]]:
    """The tables of all cells that are finished: their rows, and those that were chosen."""
    rows = finished_rows(cells, output)
    selected = selected_rows(rows, selection, seeds_of(cells))
    if rows:
        write_csv(output / ROWS, rows, COLUMNS)
        write_csv(output / SELECTED, selected)
        write_csv(output / ENDPOINTS, endpoint_rows(rows, endpoints.at_kl, endpoints.reference), FIELDS)
    return rows, selected


def _print_selected(selected: Sequence[Row]) -> None:
    rows = []
    for line in selected:
        intervals = [interval_of(line, f"test_{name}") for name in ("reward", "kl", "win_rate", "logratio_best")]
        texts = ["–" if math.isnan(own.mean) else own.text(".3f") for own in intervals]
        rows.append((setting_name(line), f"{line['seeds']}", *texts))
    print_rows(("chosen on validation", "seeds", "test reward", "KL, nats", "win rate", "best log-ratio"), rows)


def _print_cells(cells: Sequence[Cell], output: Path, parallel: int) -> None:
    took = []
    for cell in cells:
        folder = cell.folder(output)
        state = "new"
        if is_done(folder):
            took.append(read_json(folder / DONE)["minutes"])
            state = f"finished, {took[-1]:.1f} minutes"
        elif (why := failure(folder)) is not None:
            state = f"failed: {why}"
        elif any(folder.glob("checkpoint-*")):
            state = "begun"
        print(f"{cell.name}: {state}")
    left = len(cells) - len(took)
    estimate = f"about {median(took) * left / parallel:.0f} minutes" if took else "no estimate before one is finished"
    print(f"{len(cells)} cells, {left} to run: {estimate if left else 'nothing to do'}")


def _write_provenance(
    output: Path, argv: list[str], options: CompareOptions, cells: Sequence[Cell], prompts: dict[str, int]
) -> None:
    about = {
        "command": ["nca-align", "compare", *argv],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(*LIBRARIES),
        "commit": commit(),
        "machine": {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version()},
        "config": asdict(options),
        "cells": [cell.name for cell in cells],
        "prompts": prompts,
    }
    write_json(output / PROVENANCE, about)
