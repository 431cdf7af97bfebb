"""Runs in processes of one thread each. A CSV file gets a row a run, so that a killed command goes on."""

import csv
import multiprocessing
import os
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

import torch
from training import Run, train

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "study"
PILOTS_CSV, WORLDS_CSV = FOLDER / "pilots.csv", FOLDER / "worlds.csv"
DIGITS = 6  # significant ones of a figure


def finished(path: Path) -> list[dict[str, float | int | str]]:
    """The rows of the file; a last line that was cut off is taken away from it."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8")
    if not whole.endswith("\n"):
        path.write_text(whole[: whole.rfind("\n") + 1], encoding="utf-8")
    types: dict = {field.name: field.type for field in fields(Run)}
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: types.get(name, float)(value) for name, value in row.items()} for row in csv.DictReader(file)]


def run_of(row: dict) -> Run:
    """What a row is of."""
    return Run(**{field.name: row[field.name] for field in fields(Run)})


def run_all(wanted: Iterable[Run], path: Path, processes: int = os.cpu_count() or 1) -> list[dict]:
    """Train what the file has not yet, world by world, and add a row a run; all rows."""
    done = {run_of(row) for row in finished(path)}
    left = sorted(dict.fromkeys(run for run in wanted if run not in done), key=lambda run: (run.world, run.sampler))
    print(f"{path.name}: {len(done)} runs are there, {len(left)} are to come", flush=True)
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(processes, torch.set_num_threads, (1,)) as pool,
        path.open("a", encoding="utf-8", newline="") as file,
    ):
        for count, (run, figures) in enumerate(pool.imap_unordered(_trained, left), 1):
            row = asdict(run) | {name: f"{value:.{DIGITS}g}" for name, value in figures.items()}
            if file.tell() == 0:
                file.write(",".join(row) + "\n")
            file.write(",".join(map(str, row.values())) + "\n")
            file.flush()
            if count % 50 == 0:
                print(f"{path.name}: {count} of {len(left)}, world {run.world}", flush=True)
    return finished(path)


def _trained(run: Run) -> tuple[Run, dict[str, float]]:
    return run, train(run)
