"""What `import nca_align` adds to `from trl import DPOTrainer`, in fresh processes; `run.py` calls this."""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from machine import RESULTS, provenance, write_result

_PROCESS = """
import json, time
times = [time.perf_counter()]
from trl import DPOTrainer
times.append(time.perf_counter())
import nca_align
times.append(time.perf_counter())
from nca_align import NCAConfig, NCATrainer, load_reward_dataset
times.append(time.perf_counter())
print(json.dumps([after - before for before, after in zip(times, times[1:])]))
"""
ROWS = ("from trl import DPOTrainer", "import nca_align", "from nca_align import NCAConfig, NCATrainer, …")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--command", default=" ".join(sys.argv))
    options = parser.parse_args()
    print("import", flush=True)
    processes = [
        json.loads(subprocess.run([sys.executable, "-c", _PROCESS], stdout=subprocess.PIPE, check=True).stdout)
        for _ in range(options.repeats + 1)
    ][1:]  # the first one fills the system's file cache
    rows = {}
    for name, seconds in zip(ROWS, zip(*processes, strict=True), strict=True):
        rows[name] = {
            "seconds": seconds,
            "median": statistics.median(seconds),
            "spread": [min(seconds), max(seconds)],
        }
        print(f"  {name}: {rows[name]['median']:.3f} s, each after those above", flush=True)
    write_result(options.output, "import", {"rows": rows} | provenance(options.command))


if __name__ == "__main__":
    main()
