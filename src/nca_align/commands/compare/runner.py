"""Running the cells of a comparison: a folder and a process each, finished ones left alone, failed ones told."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from ... import progress
from ...evaluation.comparison_folder import CONFIG, ERROR, LOG, SETTINGS, failure, is_done
from ...models.loading import model_fingerprint
from ...rewards.scorers import ScorerSpec
from ...store.checkpoints import whole_checkpoints
from ...store.files import read_json, replacing, write_json
from ...store.fingerprints import files_fingerprint
from ...store.provenance import refuse_changes
from ...training.stopping import PREEMPTED
from .grid import Cell, EvaluationSettings

_GRACE, _PAUSE = 20.0, 0.1  # seconds that a cell has to save in, and between looks at those that run
# Of `nca-align train`, for every cell
_FORCED = {"eval_strategy": "no", "eval_on_start": False, "save_strategy": "no", "disable_tqdm": True}


def prepare(cells: Sequence[Cell], output: Path, evaluation: EvaluationSettings) -> None:
    """Write each cell's settings into its folder, `output/cells/NAME`.

    Raises:
        UserError: a cell that has been trained there had other settings, data, model or evaluation.
    """
    base = cells[0].options  # data and model are those of all
    data = files_fingerprint(base["dataset_name"])
    model = model_fingerprint(str(base["model_name_or_path"]))
    scorers = [ScorerSpec.parse(own).fingerprint() for own in evaluation.scorer]
    asked = asdict(evaluation)
    alike = {f"evaluation.{key}": value for key, value in asked.items()}
    alike |= {"scorer": scorers, "data": data, "model": model}
    abouts = []
    for cell in cells:
        about = {"settings": cell.settings, "evaluation": asked, "identity": cell.identity() | alike}
        abouts.append(json.loads(json.dumps(about, default=str)))
        _refuse_other_settings(cell.folder(output), abouts[-1]["identity"])
    for cell, about in zip(cells, abouts, strict=True):
        folder = cell.folder(output)
        folder.mkdir(parents=True, exist_ok=True)
        if not is_done(folder):
            write_json(folder / SETTINGS, about)
            with replacing(folder / CONFIG) as file:
                yaml.safe_dump({**cell.options, **_FORCED, "output_dir": str(folder)}, file, sort_keys=False)


def _refuse_other_settings(folder: Path, new: dict[str, Any]) -> None:
    begun = is_done(folder) or whole_checkpoints(folder)
    if not begun or not (folder / SETTINGS).exists():
        return
    old = read_json(folder / SETTINGS)["identity"]
    refuse_changes(
        f"the cell {folder.name} in `output_dir` was trained with other settings", old, new,
        f"go back to what it was, choose another `output_dir`, or remove {folder} to train it anew",
    )  # fmt: skip


def run_cells(
    cells: Sequence[Cell], output: Path, parallel: int, timeout_minutes: float | None, after_each: Callable[[], object]
) -> None:
    """Run each in a process of its own, `parallel` at a time; whatever one does, the others go on.

    `after_each` is called, here, whenever one has ended. An interrupt ends those that are running, which go on from
    their last evaluation another time.
    """
    waiting = list(cells)
    running: dict[int, tuple[Cell, subprocess.Popen, float]] = {}  # slot → when it began
    with progress.bar(len(cells), "cell") as bar:
        try:
            while waiting or running:
                for slot in range(parallel):
                    if waiting and slot not in running:
                        cell = waiting.pop(0)
                        process = _start(cell, cell.folder(output), _environment(cell, slot, parallel))
                        running[slot] = cell, process, time.monotonic()
                time.sleep(_PAUSE)
                for slot, (cell, process, began) in list(running.items()):
                    why = _end_reason(process, cell.folder(output), began, timeout_minutes)
                    if why is None:
                        continue
                    process.communicate()
                    del running[slot]
                    if not is_done(cell.folder(output)):  # else what came after it counts for nothing
                        (cell.folder(output) / ERROR).write_text(f"{why}\n", encoding="utf-8")
                    after_each()
                    bar.update()
                    failed = failure(cell.folder(output))
                    progress.print_line(f"{cell.name}: {f'failed: {failed}' if failed else 'done'}")
        finally:
            _end([process for _, process, _ in running.values()])


def _start(cell: Cell, folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    (folder / ERROR).unlink(missing_ok=True)
    with open(folder / LOG, "a", encoding="utf-8") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "nca_align.commands.compare.cell", str(folder)],
            stdin=subprocess.PIPE,  # its end, when this process is no more, ends the cell
            stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip


def _end_reason(process: subprocess.Popen, folder: Path, began: float, timeout_minutes: float | None) -> str | None:
    """How the process ended, at the latest now if it has had its time; None while it goes on."""
    if process.poll() is not None:
        return _reason(process.returncode, folder)
    if timeout_minutes is None or time.monotonic() - began < timeout_minutes * 60:
        return None
    process.kill()
    return f"it took longer than `timeout_minutes`, {timeout_minutes:g}; it goes on from its last evaluation"


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
        process.communicate()


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
