"""What the study's runs gave → docs/study: every evaluation, and means over seeds, as CSV; tables for docs/study.md.

    python scripts/study_results.py [RUNS] [OUTPUT]        (runs/study and docs/study by default)

`TASK.csv` has a row a cell, split and evaluation; `TASK-means.csv` a row a setting, on the test split: at the run's end
and at equal KL, each a mean over seeds with its 95 % t-interval, and n. `provenance.json` has commands, versions and
minutes. In OUTPUT.md the lines between `<!-- TASK -->` and `<!-- end -->` become the table of `TASK-means.csv`.
"""

import csv
import json
import math
import re
import sys
from pathlib import Path

from nca_align.comparison import write_csv
from nca_align.frontier import curves_of, mean_and_interval, over_steps, reward_at_kl

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("method", "strategy", "alpha", "beta", "learning_rate", "num_completions")
ABLATIONS = ("alpha", "completions")
EQUAL_KL = (1.0, 2.0, 3.0, 5.0)
AT_THE_END = ("reward", "kl", "win_rate", "tokens", "distinct_2", "logratio_best", "logratio_worst", "accuracy")


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def means(rows: list[dict[str, str]]) -> list[dict[str, object]]:
    """A row a setting and figure: `setting` names what varies, `figure` is a column at the run's end, or at a KL."""
    table: list[dict[str, object]] = []
    for setting, curves in curves_of(rows).items():
        found = {name: values[-1][1] for name in AT_THE_END if (values := over_steps(rows, setting, name))}
        for kl in EQUAL_KL:
            reached = [value for curve in curves if (value := reward_at_kl(curve, kl)) is not None]
            if len(reached) == len(curves):
                found[f"reward at KL {kl:g}"] = mean_and_interval(reached)
        for figure, interval in found.items():
            low, high = (value if math.isfinite(value) else None for value in (interval.low, interval.high))
            table.append(
                {**dict(setting), "figure": figure, "mean": interval.mean, "low": low, "high": high, "n": interval.n}
            )
    return table


def markdown(table: list[dict[str, object]]) -> str:
    """A row a setting, sorted by the reward at the highest KL that all came to; intervals behind ±."""
    settings: dict[tuple, dict[str, str]] = {}
    order: dict[tuple, float] = {}
    varied = [name for name in NAMES if len({str(row.get(name) or "") for row in table}) > 1] or ["method"]
    shared = [f"reward at KL {kl:g}" for kl in EQUAL_KL]
    counts = {figure: sum(row["figure"] == figure for row in table) for figure in shared}
    every = len({tuple(str(row.get(name) or "") for name in NAMES) for row in table})
    at = next((figure for figure in reversed(shared) if counts[figure] == every), "reward")
    for row in table:
        key = tuple(str(row.get(name) or "") for name in varied)
        settings.setdefault(key, {})[str(row["figure"])] = _shown(row)
        if row["figure"] == at:
            order[key] = float(str(row["mean"]))
    figures = [name for name in (*shared, *AT_THE_END) if any(name in found for found in settings.values())]
    lines = ["| " + " | ".join([*varied, *figures]) + " |", "| --- " * (len(varied) + len(figures)) + "|"]
    for key in sorted(settings, key=lambda key: -order.get(key, -math.inf)):
        cells = [*key, *(settings[key].get(figure, "not reached") for figure in figures)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(row: dict[str, object]) -> str:
    mean, high = float(str(row["mean"])), row["high"]
    digits = 1 if abs(mean) >= 10 else 2
    spread = "" if high in (None, "") else f" ± {float(str(high)) - mean:.{digits}f}"
    return f"{mean:.{digits}f}{spread}"


def fill(text: str, tables: dict[str, str]) -> str:
    """`text` with the tables between their marks."""
    for name, table in tables.items():
        mark = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = mark.sub(rf"\g<1>{table}\n\g<2>", text)
    return text


def main(runs: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    provenance, tables = {}, {}
    found = {path.parent.name: path for path in sorted(runs.glob("*/comparison.csv"))}
    for name, path in found.items():
        rows = read(path)
        last = {row["cell"]: float(row["minutes"]) for row in rows if row["minutes"]}
        if name in ABLATIONS and "task1" in found:  # its own setting among those that it varies
            rows += [row for row in read(found["task1"]) if row["method"] == "nca"]
        write_csv(output / f"{name}.csv", rows)
        tables[name] = means(rows)
        write_csv(output / f"{name}-means.csv", tables[name], [*NAMES, "figure", "mean", "low", "high", "n"])
        known = json.loads((path.parent / "provenance.json").read_text(encoding="utf-8"))
        provenance[name] = {**known, "minutes": round(sum(last.values()), 1), "cells": len(last)}
    if not provenance:
        sys.exit(f"{runs} holds no comparison; run scripts/study.sh first")
    (output / "provenance.json").write_text(json.dumps(provenance, indent=1, default=str) + "\n", encoding="utf-8")
    page = output.with_suffix(".md")
    if page.exists():
        page.write_text(fill(page.read_text(encoding="utf-8"), {k: markdown(v) for k, v in tables.items()}), "utf-8")
    print(f"{', '.join(tables)}: tables in {output}")


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(*(given + [ROOT / "runs/study", ROOT / "docs/study"][len(given) :]))
