"""Work over a data set in shards: killed at any moment and started again, it goes on, and the file is the same.

Each shard is written to a hidden name and renamed when whole, so a shard that is there is complete. The folder
`OUTPUT.parts` holds them beside the configuration that made them; when the last is done they are joined, in order, to
OUTPUT by one more rename, and the folder goes.
"""

import json
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Features

from .. import progress
from ..errors import UserError, first_few
from ..processes import ALONE, Processes
from .files import read_json, write_json
from .ownership import own_file
from .provenance import read_provenance, refuse_changes
from .row_files import join_files, refuse_no_json, write_rows


@dataclass
class Shard:
    """What the work on one shard gave: its rows in order, things counted, and the rows that failed, each with why."""

    rows: list[dict]
    counts: Counter = field(default_factory=Counter)
    failed: dict[int, str] = field(default_factory=dict)


Progress = Callable[[int], object]  # says that so many more rows are done; 0: that all of them have begun
# (shard's number, number of its first row, its rows, `Progress`)
ShardFunction = Callable[[int, int, list[dict], Progress], Shard]


def run_sharded(
    output: str,
    dataset: Dataset,
    features: Features,
    start: Callable[[], ShardFunction],
    step: dict[str, Any],
    shard_size: int,
    history: list[dict] | None = None,
    drop_failed: bool = False,
    unit: str = "row",
    at_once: int = 1,
    processes: Processes = ALONE,
) -> dict[str, int]:
    """Run the work on every shard that is not there yet, and join the shards to `output`.

    Args:
        output: a path that ends in `.parquet` or `.jsonl`.
        dataset: the input rows.
        features: the types of the output rows.
        start: called once, and only where work is left, to load what the function that it returns needs. Each process
            calls its own.
        step: `command` and `config`, compared with what an existing output says, and anything else to record; of it
            `sources`, the hashes of files with code, may change while rows that failed are mended.
        shard_size: input rows in a shard, the unit in which work is kept.
        history: the steps that made the input.
        drop_failed: leave rows that failed out; otherwise they stop the run once all other rows are done and kept.
        unit: what the progress bar counts.
        at_once: shards under way at a time, in threads; the next is begun when all rows of one have begun.
        processes: those that the shards are dealt to; each comes here, and the first joins what all have made.

    Returns:
        What was counted, over all shards: `rows` written, and the work's own counts.

    Raises:
        UserError: `output` has another ending, can't hold a column, is there from another configuration or in another
            job's hands, or rows failed.
    """
    path = Path(output)
    if path.suffix not in (".parquet", ".jsonl"):
        raise UserError(f"`output` is {output!r}; it must end in .parquet or .jsonl")
    if path.suffix == ".jsonl":
        refuse_no_json(features)
    step = json.loads(json.dumps(step))
    parts = path.with_name(path.name + ".parts")
    firsts = range(0, len(dataset), shard_size)
    shards = [parts / f"{i:06d}{path.suffix}" for i in range(len(firsts))]
    numbers = [range(first, min(first + shard_size, len(dataset))) for first in firsts]  # of the rows of each

    def plan() -> tuple[dict[str, int] | None, list[int]]:
        """What was counted where all is done already, and the shards that are left."""
        if path.exists() and not parts.exists():  # without owning it: it may be where nothing can be written
            return _finished(path, step), []
        owning.enter_context(own_file(path))
        if path.exists():
            counts = _finished(path, step)
            shutil.rmtree(parts, ignore_errors=True)  # a kill may have come between the last rename and this
            return counts, []
        if parts.exists() and not shards[0].exists() and _is_other(parts, step):
            shutil.rmtree(parts)  # the first shard refused it, perhaps, when others had begun
        done = _done(shards, step, drop_failed)
        left = [i for i in range(len(shards)) if shards[i] not in done]
        return None, left

    def begin() -> None:
        parts.mkdir(parents=True, exist_ok=True)
        write_json(parts / "config.json", step)

    def join() -> dict[str, int]:
        counts = _counts(shards, drop_failed, len(dataset), path)
        join_files(path, shards, features, [*(history or []), step | {"counts": counts}])
        shutil.rmtree(parts)
        return counts

    with ExitStack() as owning:
        counts, left = processes.once(plan)
        if counts is not None:
            return counts
        own = {i: len(numbers[i]) for i in left[processes.index :: processes.count]}
        if own:
            run_shard = start()
        if left:
            processes.once(begin)
        if own:
            alone = processes.count == 1
            finished = len(dataset) - sum(own.values()) if alone else 0
            desc = None if alone else f"Process 1 of {processes.count}"  # which shows the bar, of its own share
            with progress.bar(finished + sum(own.values()), unit, processes.first, initial=finished, desc=desc) as bar:

                def make(i: int, advance: Progress) -> None:
                    rows = dataset.select(numbers[i]).to_list()
                    _write(shards[i], run_shard(i, firsts[i], rows, advance), features)

                _each(make, own, at_once, bar)
        processes.wait()
        return processes.once(join)


def _write(path: Path, shard: Shard, features: Features) -> None:
    about = {"counts": {**shard.counts, "rows": len(shard.rows)}, "failed": shard.failed}
    write_json(path.with_suffix(".json"), about)
    write_rows(path, shard.rows, features)  # last: this one says "done"


def _each(make: Callable[[int, Progress], None], own: dict[int, int], at_once: int, bar: Any) -> None:
    """`make` of every shard, by its number with that of its rows; an error or an interrupt ends all."""
    ending, counting = threading.Event(), threading.Lock()
    failed: list[BaseException] = []  # the first one is the cause of the others

    def one(i: int, begun: threading.Event) -> None:
        done = 0

        def advance(rows: int) -> None:
            nonlocal done
            if ending.is_set():
                raise CancelledError
            done += rows
            begun.set()
            with counting:
                bar.update(rows)

        try:
            make(i, advance)
            advance(own[i] - done)
        except BaseException as error:
            failed.append(error)
            ending.set()
            raise
        finally:
            begun.set()

    if at_once == 1:  # here, where an interrupt comes at once
        for i in own:
            one(i, threading.Event())
        return
    with ThreadPoolExecutor(at_once) as pool:
        under_way = []
        try:
            for i in own:
                begun = threading.Event()
                under_way.append(pool.submit(one, i, begun))
                begun.wait()  # so that rows are begun in their order
                if failed:
                    break
            for _ in as_completed(under_way):
                if failed:
                    break
        finally:
            ending.set()
    if failed:
        raise failed[0]


def _finished(path: Path, step: dict) -> dict[str, int]:
    made = read_provenance(path)
    _refuse_other(str(path), made[-1] if made else None, step)
    if edited := _edited(made[-1], step):
        raise UserError(
            f"{path} is complete, but the code of {edited} changed since it was made. Delete it to make it anew, or "
            "choose another `output`."
        )
    print(f"{path} is complete already: nothing to do", file=sys.stderr)
    return made[-1]["counts"]


def _done(shards: list[Path], step: dict, drop_failed: bool) -> set[Path]:
    """The shards that are done; all others, and with them those of failed rows that may be mended, are to be made.

    Raises:
        UserError: they are of another configuration, or of code that was edited.
    """
    there = [shard for shard in shards if shard.exists()]
    if not there:
        return set()
    parts = there[0].parent
    made = read_json(parts / "config.json")
    _refuse_other(f"{parts}, an unfinished run,", made, step)
    done = {shard for shard in there if drop_failed or not _about(shard)["failed"]}
    if done and (edited := _edited(made, step)):
        fix = f"delete {parts} to make all rows anew"
        if len(done) == len(there):
            raise UserError(
                f"the code of {edited} changed since {parts} was begun, and {len(done)} of its shards are done. To go "
                f"on, {fix}, or undo the change."
            )
        print(
            f"the code of {edited} changed; {len(done)} shards without failed rows stay as they are: {fix}",
            file=sys.stderr,
        )
    return done


def _counts(shards: list[Path], drop_failed: bool, rows: int, path: Path) -> dict[str, int]:
    """What was counted over all shards.

    Raises:
        UserError: rows failed and aren't to be left out, or none is left.
    """
    abouts = [_about(shard) for shard in shards]
    failed = {int(row): why for about in abouts for row, why in about["failed"].items()}
    counts = Counter(failed=len(failed))
    for about in abouts:
        counts.update(about["counts"])
    if failed and not drop_failed:
        row, why = next(iter(failed.items()))
        causes = [f"{n} {key.removeprefix('failed: ')}" for key, n in counts.items() if key.startswith("failed: ")]
        told = [f"and {len(failed) - 1} more: {first_few(list(failed)[1:])}"]
        if causes:
            told.append(f"of all {', '.join(causes)}")
        more = f" ({'; '.join(told)})" if len(failed) > 1 else ""
        raise UserError(
            f"row {row}{more}: {why}. The other {rows - len(failed)} rows are done and kept in {shards[0].parent}. "
            "Mend it and run the same command again, or add `--on_error drop` to leave such rows out."
        )
    if not counts["rows"]:
        why = "".join(f"; row {row}: {why}" for row, why in list(failed.items())[:1])
        raise UserError(f"none of the {rows} rows is left for {path} ({dict(counts)}){why}; see {shards[0].parent}")
    return dict(sorted(counts.items()))


def _about(shard: Path) -> dict[str, dict]:
    """What was counted in a shard, and which of its rows failed."""
    return read_json(shard.with_suffix(".json"))


def _refuse_other(what: str, made: dict | None, step: dict) -> None:
    fix = "choose another `output`, or delete it first"
    if made is None:
        raise UserError(f"{what} is there already, but doesn't say what made it; {fix}")
    if made["command"] != step["command"]:
        raise UserError(f"{what} is there already, made by `{made['command']}` and not `{step['command']}`; {fix}")
    refuse_changes(
        f"{what} is there already, of another configuration", made["config"], step["config"], fix,
        form="{} there and {} here",
    )  # fmt: skip


def _is_other(parts: Path, step: dict) -> bool:
    try:
        made = read_json(parts / "config.json")
    except (OSError, ValueError):
        return True
    return any(made.get(name) != step.get(name) for name in ("command", "config", "sources"))


def _edited(made: dict, step: dict) -> str:
    """The sources that are not what they were; none where it isn't known what they were."""
    old, new = made.get("sources", {}), step.get("sources", {})
    return ", ".join(f"`{name}`" for name in old if new.get(name) != old[name])
