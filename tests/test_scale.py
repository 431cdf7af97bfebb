"""Data sets far larger than memory: loading, validating, streaming and training take the memory of a few batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import reward_rows
from nca_align.commands.train.command import main

ROWS_PER_GROUP = 5000
MEGABYTE = 1 << 20

# What a process does with the file named on its command line, and the most memory that it held meanwhile: of its own
# (anonymous), and with the pages of files that the kernel keeps for it and takes back when it needs them (resident).
MEASURED = """
import json, sys, threading, time
mode, file, pause = sys.argv[1:]
from datasets.arrow_writer import ArrowWriter
from nca_align.data import read_reward_dataset

write_table = ArrowWriter.write_table
def paused(*arguments, **options):  # as on a slow disk, which a reader that looks ahead would leave behind
    time.sleep(float(pause))
    return write_table(*arguments, **options)
ArrowWriter.write_table = paused

def now():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) << 10

start, peak, done = now(), 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, now())
        time.sleep(0.005)
watcher = threading.Thread(target=watch)
watcher.start()
began = time.perf_counter()
data = read_reward_dataset(file, streaming=mode == "stream", on_invalid="drop")
rows = completions = 0
for split in data.dataset.values():
    for batch in split.iter(1000):
        rows += len(batch["prompt"])
        completions += sum(map(len, batch["completions"]))
seconds = time.perf_counter() - began
done.set()
watcher.join()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
dropped = sum(sum(report.dropped.values()) for report in data.reports.values())
print(json.dumps({"rows": rows, "completions": completions, "dropped": dropped, "seconds": seconds,
                  "anonymous": peak - start, "resident": int(status["VmHWM"].split()[0]) << 10}))
"""


def write_parquet(file: Path, rows: int) -> None:
    """Rows of about a kilobyte, K from 2 to 5, each a prompt of its own; one in a thousand has a null reward."""
    words = "the quick brown fox jumps over the lazy dog and back again " * 4
    with pq.ParquetWriter(file, schema()) as writer:
        for start in range(0, rows, ROWS_PER_GROUP):
            numbers = range(start, min(start + ROWS_PER_GROUP, rows))
            sized = [(i, 2 + i % 4) for i in numbers]
            columns = {
                "prompt": [f"Question {i}: {words[:100]}?" for i in numbers],
                "completions": [[f"Answer {k} to {i}: {words[k * 7 :]}" for k in range(n)] for i, n in sized],
                "rewards": [[None if i % 1000 == 999 else float(k * i % 11) for k in range(n)] for i, n in sized],
            }
            writer.write_table(pa.table(columns, schema()))


def schema() -> pa.Schema:
    text, number = pa.string(), pa.float64()
    return pa.schema([("prompt", text), ("completions", pa.list_(text)), ("rewards", pa.list_(number))])


def measure(mode: str, rows: int, folder: Path, pause: float = 0.0) -> dict:
    file = folder / f"{rows}.parquet"
    if not file.exists():
        write_parquet(file, rows)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, mode, str(file), str(pause)], check=True, capture_output=True, text=True,
        env=os.environ | {"HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rows"] == rows - rows // 1000  # every row, but those that were dropped and counted
    assert found["dropped"] == (rows // 1000 if mode == "load" else 0)  # a stream logs them as it goes
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["load", "stream"])
def test_memory_does_not_grow_with_the_rows(mode, tmp_path):
    """Ten times the rows, 100 MB more of text: a stream takes no more, and loading some bytes a row for its number."""
    few, many = (measure(mode, rows, tmp_path, pause=0.02) for rows in (10_000, 100_000))
    grown = many["anonymous"] - few["anonymous"]
    if mode == "load":
        assert grown < 300 * 90_000
    else:
        assert grown < 10 * MEGABYTE
        assert many["resident"] - few["resident"] < 20 * MEGABYTE


@needs_proc
@pytest.mark.long
@pytest.mark.parametrize("mode", ["load", "stream"])
def test_a_million_rows(mode, tmp_path):
    found = measure(mode, 1_000_000, tmp_path)
    print({name: round(value / MEGABYTE) for name, value in found.items() if name in ("anonymous", "resident")})
    print(f"{found['seconds']:.0f} s")
    assert found["anonymous"] < 400 * MEGABYTE  # of 1.1 GB of text


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_streamed_file_trains(kind, model_dir, tmp_path):
    file = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        write_parquet(file, 64)
    else:
        file.write_text("\n".join(map(json.dumps, reward_rows(64, [4, 2, 3]))))
    options = {
        "model_name_or_path": model_dir, "dataset_name": file, "output_dir": tmp_path / "run", "max_steps": 3,
        "dataset_streaming": "true", "use_cpu": "true", "bf16": "false", "report_to": "none", "logging_steps": 1,
        "per_device_train_batch_size": 2, "max_length": 128, "save_strategy": "no",
    }  # fmt: skip
    assert main([part for name, value in options.items() for part in (f"--{name}", str(value))]) == 0
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3]
