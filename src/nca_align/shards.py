"""Work over a data set in shards: killed at any moment and started again, it goes on, and the file is the same.

Each shard is written to a hidden name and renamed when whole, so a shard that is there is complete. The folder
`OUTPUT.parts` holds them beside the configuration that made them; when the last is done they are joined, in order, to
OUTPUT by one more rename, and the folder goes.
"""

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features
from tqdm.auto import tqdm

from .errors import UserError
from .provenance import KEY, read_provenance, sidecar


@dataclass
class Shard:
    """What the work on one shard gave: its rows in order, things counted, and the rows that failed, each with why."""

    rows: list[dict]
    counts: Counter = field(default_factory=Counter)
    failed: dict[int, str] = field(default_factory=dict)


# (shard, number of its first row, its rows, a function to say that so many of them are done)
Work = Callable[[int, int, list[dict], Callable[[int], object]], Shard]


def run_sharded(
    output: str,
    dataset: Dataset,
    features: Features,
    start: Callable[[], Work],
    step: dict[str, Any],
    history: list[dict] | None = None,
    shard_size: int = 64,
    drop_failed: bool = False,
    unit: str = "row",
) -> dict[str, int]:
    """Run the work on every shard that is not there yet, and join the shards to `output`.

    Args:
        output: a path that ends in `.parquet` or `.jsonl`.
        dataset: the input rows.
        features: the types of the output rows.
        start: called once, and only where work is left, to load what the work needs.
        step: `command` and `config`, compared with what an existing output says, and anything else to record.
        history: the steps that made the input.
        shard_size: input rows in a shard, the unit in which work is kept.
        drop_failed: leave rows that failed out; otherwise they stop the run once all other rows are done and kept.
        unit: what the progress bar counts.

    Returns:
        What was counted, over all shards: `rows` written, and the work's own counts.

    Raises:
        UserError: `output` has another ending, or is there from another configuration, or rows failed.
    """
    path = Path(output)
    if path.suffix not in (".parquet", ".jsonl"):
        raise UserError(f"`output` is {output!r}; it must end in .parquet or .jsonl")
    step = json.loads(json.dumps(step))
    parts = path.with_name(path.name + ".parts")
    if path.exists():
        made = read_provenance(path)
        _refuse_other(output, made[-1] if made else None, step)
        shutil.rmtree(parts, ignore_errors=True)  # a kill may have come between the last rename and this
        print(f"{output} is complete already: nothing to do", file=sys.stderr)
        return made[-1]["counts"]
    if (parts / "config.json").exists() and any(parts.glob(f"0*{path.suffix}")):  # else there is nothing to protect
        _refuse_other(f"{parts}, an unfinished run,", json.loads((parts / "config.json").read_text()), step)

    firsts = list(range(0, len(dataset), shard_size))
    done = [i for i in range(len(firsts)) if _is_done(parts, i, path.suffix, drop_failed)]
    work: Work | None = None
    size = {i: min(shard_size, len(dataset) - first) for i, first in enumerate(firsts)}
    with tqdm(total=len(dataset), initial=sum(size[i] for i in done), unit=f" {unit}", dynamic_ncols=True) as bar:
        for i in sorted(set(size) - set(done)):
            if work is None:
                work = start()
                parts.mkdir(parents=True, exist_ok=True)
                _write(parts / "config.json", json.dumps(step).encode())
            rows = dataset.select(range(firsts[i], firsts[i] + size[i])).to_list()
            before = bar.n
            shard = work(i, firsts[i], rows, bar.update)
            about = {"counts": {**shard.counts, "rows": len(shard.rows)}, "failed": shard.failed}
            _write(parts / f"{i:06d}.json", json.dumps(about).encode())
            _write_rows(parts / f"{i:06d}{path.suffix}", shard.rows, features)  # last: this one says "done"
            bar.update(before + size[i] - bar.n)

    abouts = [json.loads((parts / f"{i:06d}.json").read_text()) for i in range(len(firsts))]
    failed = {int(row): why for about in abouts for row, why in about["failed"].items()}
    if failed and not drop_failed:
        row, why = next(iter(failed.items()))
        more = f" and {len(failed) - 1} more (rows {_few(list(failed)[1:])})" if len(failed) > 1 else ""
        raise UserError(
            f"row {row}: {why}{more}; the other {len(dataset) - len(failed)} rows are done and kept in {parts}: mend "
            "it and run the same command again, or add `--on_error drop` to leave such rows out"
        )
    counts = Counter(failed=len(failed))
    for about in abouts:
        counts.update(about["counts"])
    if not counts["rows"]:
        raise UserError(f"none of the {len(dataset)} rows is left for {output} ({dict(counts)}); see {parts}")
    steps = [*(history or []), step | {"counts": dict(sorted(counts.items()))}]
    _join(path, parts, len(firsts), features, json.dumps(steps))
    shutil.rmtree(parts)
    return steps[-1]["counts"]


def _few(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (", …" if len(rows) > 5 else "")


def _is_done(parts: Path, i: int, suffix: str, drop_failed: bool) -> bool:
    if not (parts / f"{i:06d}{suffix}").exists():
        return False
    return drop_failed or not json.loads((parts / f"{i:06d}.json").read_text())["failed"]


def _refuse_other(what: str, made: dict | None, step: dict) -> None:
    fix = "choose another `output`, or delete it first"
    if made is None:
        raise UserError(f"{what} is there already and does not say what made it; {fix}")
    if made["command"] != step["command"]:
        raise UserError(f"{what} is there already, made by `{made['command']}` and not `{step['command']}`; {fix}")
    old, new = made["config"], step["config"]
    differences = [
        f"`{key}` {old.get(key)!r} there and {new.get(key)!r} here"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]
    if differences:
        raise UserError(f"{what} is there already, of another configuration: {', '.join(differences)}; {fix}")


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _write_rows(path: Path, rows: list[dict], features: Features) -> None:
    if path.suffix == ".jsonl":
        _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        return
    columns = {name: [row[name] for row in rows] for name in features}
    sink = pa.BufferOutputStream()
    pq.write_table(Dataset.from_dict(columns, features=features).data.table.combine_chunks(), sink)
    _write(path, sink.getvalue().to_pybytes())


def _join(path: Path, parts: Path, n: int, features: Features, provenance: str) -> None:
    temporary = parts / ".joined.tmp"
    shards = [parts / f"{i:06d}{path.suffix}" for i in range(n)]
    if path.suffix == ".jsonl":
        with open(temporary, "wb") as file:
            for shard in shards:
                file.write(shard.read_bytes())
        _write(sidecar(path), (json.dumps(json.loads(provenance), indent=1) + "\n").encode())
    else:
        schema = features.arrow_schema
        schema = schema.with_metadata({**(schema.metadata or {}), KEY: provenance.encode()})
        with pq.ParquetWriter(temporary, schema) as writer:
            for shard in shards:
                writer.write_table(pq.read_table(shard).replace_schema_metadata(schema.metadata))
    os.replace(temporary, path)
