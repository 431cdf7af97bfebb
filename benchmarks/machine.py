"""Where a figure comes from (hardware, versions, commit), and how much memory a call takes."""

import contextlib
import ctypes
import gc
import json
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def provenance(command: str, *packages: str) -> dict[str, Any]:
    """Hardware, versions (of `packages` as well), commit, date and command, as they go into every result file."""
    return {
        "hardware": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        },
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("nca-align", "torch", "transformers", "trl", "accelerate", *packages)},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_source": bool(_git("status", "--porcelain", "--", "src", "benchmarks/*.py")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def write_result(folder: Path, configuration: str, result: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{configuration}.json"
    path.write_text(json.dumps({"configuration": configuration} | result, indent=1) + "\n")
    print(f"{path} written", flush=True)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).parents[1]
    try:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def free_memory() -> int | None:
    """Bytes that may still be taken without swapping; None where the system doesn't tell."""
    try:
        return _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    except OSError:
        return None


def peak_memory(call: Callable[[], Any]) -> tuple[int, int] | None:
    """(resident bytes before `call`, the most that it took above them); None where there is no `/proc/self/clear_refs`.

    The kernel's high-water mark is set back first, so that nothing earlier counts (`ru_maxrss` can't be set back, and
    begins at the parent's).
    """
    if not os.access(_CLEAR, os.W_OK):
        call()
        return None
    gc.collect()
    with contextlib.suppress(OSError):  # another libc than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is no part of the static memory
    before = _kilobytes(_STATUS, "VmRSS")
    _CLEAR.write_text("5")
    call()
    return before, _kilobytes(_STATUS, "VmHWM") - before


def refusal(name: str, estimate: float | None, free: int | None, how: str) -> str | None:
    """Why a row of this estimated size isn't run, or None where it fits; a tenth of the free memory is left alone."""
    if estimate is None or free is None:
        return None
    verdict = f"about {estimate / 1e9:.1f} GB ({how}), {free / 1e9:.1f} GB are free"
    if estimate > 0.9 * free:
        print(f"  {name}: does not fit: {verdict}", flush=True)
        return f"does not fit: {verdict}"
    print(f"  {name}: fits: {verdict}", flush=True)
    return None


def _kilobytes(file: Path, field: str) -> int:
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
