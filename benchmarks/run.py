"""Measure: `make bench` (under 25 minutes on two CPU cores) or `make bench-full` (no limit of time).

    python benchmarks/run.py                        everything that `make bench` runs
    python benchmarks/run.py --full                 K = 2, 8, 32 as well, and every row
    python benchmarks/run.py --only mistral-60m-k4  one configuration (several: --only again); --list names them
    python benchmarks/run.py --smoke                all of it on tiny shapes, into a temporary folder

Each configuration is a process of its own and writes `benchmarks/results/<configuration>.json`; `summarise.py` makes
the tables and the plot. Run it with nothing else on the machine.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from machine import RESULTS
from timed import CONFIGURATIONS

HERE = Path(__file__).parent


def jobs(full: bool) -> dict[str, list[str]]:
    """Configuration → script and arguments, in the order in which they run."""
    timed = {name: ["timed.py", name] for name, configuration in CONFIGURATIONS.items() if full or configuration.rows}
    others = {
        "linear": ["linear.py"],
        "memory": ["memory.py", "memory"],
        "head": ["memory.py", "head"],
        "import": ["imports.py"],
    }
    return timed | others | {"gpu": ["gpu.py"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all configurations and rows")
    parser.add_argument("--only", action="append", default=[], help="a configuration; may be given several times")
    parser.add_argument("--list", action="store_true", help="name the configurations and stop")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, one round, into a temporary folder")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of step times")
    parser.add_argument("--output", type=Path, help="folder of the result files")
    options = parser.parse_args()
    everything, chosen = jobs(full=True), jobs(options.full)
    if options.list:
        print("\n".join(name if name in chosen else f"{name} (--full)" for name in everything))
        return
    if unknown := set(options.only) - set(everything):
        parser.error(f"`--only` is {', '.join(sorted(unknown))}, but must be one of {', '.join(everything)}.")
    if options.only:
        chosen = {name: everything[name] for name in options.only}
    full = options.full or any(name in CONFIGURATIONS and not CONFIGURATIONS[name].rows for name in options.only)
    output = options.output or (Path(tempfile.mkdtemp(prefix="benchmarks-")) if options.smoke else RESULTS)
    failed = []
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:  # nothing cached by an earlier run counts
        environment = os.environ | {
            "HF_DATASETS_CACHE": cache,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        for name, command in chosen.items():
            arguments = [*command[1:], "--output", str(output)]
            if name == "gpu":
                if not (options.smoke or torch.cuda.is_available()):
                    print("gpu: skipped, there is no CUDA device; `python benchmarks/gpu.py` on a machine with one")
                    continue
                arguments += ["--tiny"] if options.smoke else []
            else:
                arguments += ["--command", shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]])]
                if name != "import":
                    arguments += ["--full"] if full else []
                    arguments += ["--smoke"] if options.smoke else []
                if name in CONFIGURATIONS or name == "linear":
                    arguments += ["--repeats", str(1 if options.smoke else options.repeats)]
                elif name == "import" and options.smoke:
                    arguments += ["--repeats", "1"]
            start = time.perf_counter()
            result = subprocess.run([sys.executable, str(HERE / command[0]), *arguments], env=environment)
            failed += [name] if result.returncode else []
            print(f"{name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    print(f"{(time.perf_counter() - begin) / 60:.1f} minutes in all; results in {output}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
