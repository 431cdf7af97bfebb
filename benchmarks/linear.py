"""Step time against unique tokens, and what of it is the system's; `run.py` calls this.

K = 4, 8, 16 and 32 in one process, interleaved, in random order, after one step of each: prefix_shared with the
reference cached. `glibc's default` is a process as it is; `jemalloc` one under an allocator that keeps what is freed
for the next step (Debian's libjemalloc2), where it is installed.
"""

import argparse
import ctypes.util
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import RESULTS, provenance, write_result

SIZES = (4, 8, 16, 32)
ROW = "prefix_shared_cached"


def environments() -> dict[str, dict[str, str] | None]:
    """Way → what it adds to the environment, None where it can't be run."""
    library = ctypes.util.find_library("jemalloc")
    keep = {"LD_PRELOAD": library or "", "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"}
    return {"jemalloc": keep if library else None, "glibc's default": {}}


def measure(smoke: bool, repeats: int) -> dict[str, dict[str, Any]]:
    from shapes import build_model, spread_example, tiny_example
    from steps import build_steps

    policy = build_model("tiny" if smoke else "mistral-60m", seed=0)
    examples = {k: tiny_example(k) if smoke else spread_example(k) for k in SIZES}
    steps = {k: build_steps([ROW], policy, None, example, example.part())[ROW] for k, example in examples.items()}
    rows = {k: {"seconds": [], "system_seconds": [], "page_faults": []} for k in SIZES}
    generator = random.Random(0)
    for number in range(repeats + 1):
        for k in sorted(SIZES, reverse=True) if number == 0 else generator.sample(SIZES, len(SIZES)):
            policy.zero_grad(set_to_none=True)
            before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
            steps[k](False)
            seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
            if number:
                rows[k]["seconds"].append(seconds)
                rows[k]["system_seconds"].append(after.ru_stime - before.ru_stime)
                rows[k]["page_faults"].append(after.ru_minflt - before.ru_minflt)
    return {
        f"K = {k}": row
        | {"unique_tokens": examples[k].unique_tokens, "median": statistics.median(row["seconds"])}
        | {"spread": [min(row["seconds"]), max(row["seconds"])]}
        for k, row in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--here", action="store_true", help="measure in this process, and print it")
    parser.add_argument("--full", action="store_true", help="nothing more than without it")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--command", default=" ".join(sys.argv))
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.smoke, options.repeats)))
        return
    print("linear", flush=True)
    rows: dict[str, Any] = {}
    for way, environment in environments().items():
        if environment is None:
            rows |= {f"K = {k}, {way}": {"skipped": f"{way} is not installed"} for k in SIZES}
            continue
        command = [sys.executable, __file__, "--here", "--repeats", str(options.repeats)]
        command += ["--smoke"] if options.smoke else []
        result = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
        rows |= {f"{k}, {way}": row for k, row in json.loads(result.stdout.splitlines()[-1]).items()}
    for name, row in rows.items():
        print(f"  {name}: {row.get('skipped') or format(row['median'], '.2f') + ' s'}", flush=True)
    write_result(options.output, "linear", {"rows": rows} | provenance(options.command))


if __name__ == "__main__":
    main()
