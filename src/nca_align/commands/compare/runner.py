"""Running the cells of a comparison: a folder and a process each, finished ones left alone, failed ones told."""

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ...models.loading import model_fingerprint
from ...rewards.spec import ScorerSpec
from ...store.checkpoints import whole_checkpoints
from ...store.files import replacing, write_json
from ...store.fingerprints import files_fingerprint
from ...store.provenance import refuse_changes
from ...training.resume import PREEMPTED
from .grid import Cell, Evaluation

_GRACE = 20.0  # seconds
SETTINGS, CONFIG, LOG, ERROR, DONE = "settings.json", "config.yaml", "log.txt", "error.txt", "done.json"
# Of `nca-align train`, for every cell
_FORCED = {"eval_strategy": "no", "eval_on_start": False, "save_strategy": "no", "disable_tqdm": True}


def prepare(cells: Sequence[Cell], output: Path, evaluation: Evaluation) -> None:
    """Write each cell's settings into its folder, `output/cells/NAME`.

    Raises:
        UserError: a cell that has been trained there had other settings, data, model or evaluation.
    """
    base = cells[0].options  # data and model are those of all
    data = files_fingerprint(base["dataset_name"])
    model = model_fingerprint(str(base["model_name_or_path"]))
    scorers = [ScorerSpec.parse(own).fingerprint() for own in evaluation.scorer]
    about = {}
    for cell in cells:
        about[cell.name] = json.loads(json.dumps({
            "settings": cell.settings, "evaluation": asdict(evaluation),
            "identity": {
                **cell.identity(), **{f"evaluation.{key}": value for key, value in asdict(evaluation).items()},
                "scorer": scorers, "data": data, "model": model,
            },
        }, default=str))  # fmt: skip
        _refuse_other_settings(output / "cells" / cell.name, about[cell.name]["identity"])
    for cell in cells:
        folder = output / "cells" / cell.name
        folder.mkdir(parents=True, exist_ok=True)
        options = {**cell.options, **_FORCED, "output_dir": str(folder)}
        if not is_done(output, cell):
            write_json(folder / SETTINGS, about[cell.name])
            with replacing(folder / CONFIG) as file:
                file.write(yaml.safe_dump(options, sort_keys=False))


def _refuse_other_settings(folder: Path, new: dict[str, Any]) -> None:
    begun = (folder / DONE).exists() or whole_checkpoints(folder)
    if not begun or not (folder / SETTINGS).exists():
        return
    old = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["identity"]
    refuse_changes(
        f"the cell {folder.name} in `output_dir` was trained with other settings", old, new,
        f"go back to what it was, choose another `output_dir`, or remove {folder} to train it anew",
    )  # fmt: skip


def is_done(output: Path, cell: Cell) -> bool:
    """Whether the cell is finished."""
    return (output / "cells" / cell.name / DONE).exists()


def failure(output: Path, cell: Cell) -> str | None:
    """Why the cell failed the last time that it ran; None where it didn't, or was finished all the same."""
    path = output / "cells" / cell.name / ERROR
    return path.read_text(encoding="utf-8").strip() if path.exists() and not is_done(output, cell) else None


def run_cells(
    cells: Sequence[Cell], output: Path, parallel: int, timeout_minutes: float | None, after_each: Callable[[], object]
) -> None:
    """Run each in a process of its own, `parallel` at a time; whatever one does, the others go on.

    `after_each` is called, here, whenever one has ended. An interrupt ends those that are running, which go on from
    their last evaluation another time.
    """
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(parallel):
        slots.put(slot)
    running: set[subprocess.Popen] = set()

    def run(cell: Cell) -> str | None:
        slot = slots.get()
        try:
            return _run(cell, output / "cells" / cell.name, slot, parallel, timeout_minutes, running)
        finally:
            slots.put(slot)

    console = Console()
    columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with ThreadPoolExecutor(parallel) as pool, Progress(*columns, console=console) as progress:
        bar = progress.add_task("cells", total=len(cells))
        futures = {pool.submit(run, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                why, name = future.result(), futures[future].name
                after_each()
                progress.advance(bar)
                progress.console.print(f"{name}: {'done' if why is None else f'failed: {why}'}", markup=False)
        except BaseException:
            for future in futures:
                future.cancel()
            ours = list(running)
            running.clear()  # what ends now hasn't failed
            _end(ours)
            raise


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Let them save at the end of their step; one that is in the midst of a long evaluation is not waited for."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + _GRACE
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def _run(
    cell: Cell, folder: Path, slot: int, parallel: int, timeout_minutes: float | None, running: set[subprocess.Popen]
) -> str | None:
    """One cell from start to end; what made it fail, if it did, is also in `error.txt`."""
    (folder / ERROR).unlink(missing_ok=True)
    with open(folder / LOG, "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "nca_align.commands.compare.cell", str(folder)],
            stdin=subprocess.PIPE,  # its end, when this process is no more, ends the cell
            stdout=log, stderr=subprocess.STDOUT, env=_environment(cell, slot, parallel), start_new_session=True,
        )  # fmt: skip
        running.add(process)
        try:
            code = process.wait(None if timeout_minutes is None else timeout_minutes * 60)
            why = None if code == 0 else _reason(code, folder)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            why = f"it took longer than `timeout_minutes`, {timeout_minutes:g}; it goes on from its last evaluation"
        finally:
            interrupted = process not in running
            running.discard(process)
            if process.stdin is not None:
                process.stdin.close()
    if (folder / DONE).exists():  # whatever came after it
        return None
    if why is not None and not interrupted:
        (folder / ERROR).write_text(f"{why}\n", encoding="utf-8")
    return why


def _environment(cell: Cell, slot: int, parallel: int) -> dict[str, str]:
    """Of a cell: a GPU of its own, or its share of the cores."""
    environment = dict(os.environ)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    elif parallel > 1 and cell.options.get("cpu_threads") is None:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // parallel)))
    return environment


def _reason(code: int, folder: Path) -> str:
    """What the log ends with, of a cell that ended with `code`."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
    if code == PREEMPTED:
        return "stopped by SIGTERM; it goes on from its last checkpoint"
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {code}")
    return last.removeprefix("cell: error: ")
