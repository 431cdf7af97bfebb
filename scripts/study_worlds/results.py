"""docs/study/worlds.csv → docs/study: each comparison of the plan (tables.csv), KLs beside the optimum's, the picture.

python scripts/study_worlds/results.py
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from plan import DPO, FAST, FEWER, KLS, LADDERS, MAIN, RATES
from runs import FOLDER, WORLDS_CSV, finished

from nca_align.evaluation.intervals import mean_and_interval
from nca_align.evaluation.ladder import Difference, compare_at_kl, ladder_values, ladders_of
from nca_align.pages.charts import Chart, Series
from nca_align.pages.pictures import write_png
from nca_align.store.files import write_csv

FIGURES = ("test_reward", "train_best", "train_worst", "test_best", "test_worst")
LEAST = 0.75  # of the worlds have to reach a KL
Row = Mapping[str, Any]
NAMES = {
    "nca": "NCA", "infonca": "InfoNCA", "dpo_best_worst": "DPO, best and worst", "dpo_all_pairs": "DPO, all pairs",
    "dpo_random_pair": "DPO, random pair",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Methods beside a reference one; each of the figures is one family of comparisons.

    Args:
        name: which part, and of what.
        rows: a run's end each.
        method: of a row.
        reference: the method that the others are compared with.
        figures: columns of the rows.
    """

    name: str
    rows: Sequence[Row]
    method: Callable[[Row], str]
    reference: str
    figures: Sequence[str] = ("test_reward",)


def loss_name(row: Row) -> str:
    """`NCA, λ 0.5`."""
    weight = row["negative_weight"]
    return NAMES[row["loss"]] + (f", λ {weight:g}" if weight != 1 else "")


def _of(rows: Sequence[Row], rate: float = 0.0, **but: Any) -> list[Row]:
    """The plan's usual runs, but for what is given."""
    usual = {"alpha": 1, "sampler": "reference", "rewards": "true", "completions": 4, "prompts": 128, "steps": 128}
    return [
        row for row in rows
        if row["learning_rate"] == (rate or RATES[row["loss"], row["negative_weight"]])
        and all(row[name] == value for name, value in (usual | but).items())
    ]  # fmt: skip


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """The plan's."""
    fewer = [row for row in rows if row["world"] in FEWER]
    second = {key: ladder[1] for key, ladder in LADDERS.items()}
    four = [row for row in fewer if row["beta"] != second[row["loss"], row["negative_weight"], row["learning_rate"]]]
    for sampler, whose in (("reference", "the reference"), ("other", "another policy")):
        own = [row for row in _of(rows, sampler=sampler) if row["loss"] not in DPO[1:]]
        yield Table(f"a. completions of {whose}", own, loss_name, "NCA", FIGURES)
    checks: dict[str, dict[str, Any]] = {
        "128 steps": {},
        "256 steps": {"steps": 256},
        f"learning rate {FAST}": {"rate": FAST},
    }
    for name, but in checks.items():
        own = [row for row in _of(fewer, **but) if (row["loss"], row["negative_weight"]) in MAIN]
        yield Table(f"a. {name}", own, loss_name, "NCA", FIGURES)
    for many, prompts in (("128 prompts", lambda K: 128), ("512 annotations", lambda K: 512 // K)):
        for loss, name in NAMES.items():
            own = [
                row
                for K in (2, 4, 8, 16)
                for row in _of(four, completions=K, prompts=prompts(K))
                if row["loss"] == (DPO[0] if K == 2 and loss in DPO else loss) and row["negative_weight"] == 1
            ]
            yield Table(f"b. {name}, {many}", own, lambda row: f"K = {row['completions']}", "K = 2")
    for K in (4, 8, 16):
        own = [row for row in _of(four, completions=K) if row["negative_weight"] == 1]
        yield Table(f"b. K = {K}", own, loss_name, "InfoNCA")
    for loss in ("nca", "infonca"):
        own = [row for a in (0.3, 1, 3) for row in _of(fewer, alpha=a) if loss_name(row) == NAMES[loss]]
        yield Table(
            f"c. {NAMES[loss]}", own, lambda row: f"α = {row['alpha']:g}", "α = 1", ("test_reward", "train_best")
        )
    for kind in ("true", "noise", "hack", "ties"):
        own = [row for row in _of(four, rewards=kind) if (row["loss"], row["negative_weight"]) in MAIN]
        yield Table(f"d. {kind}", own, loss_name, "NCA")


def lines(table: Table) -> Iterator[dict[str, Any]]:
    """A line a figure, KL and method: its mean over worlds (95 % interval) and its difference from the reference."""
    start = dict.fromkeys(table.figures, 0.0)  # of the reference: rewards have a mean of 0
    ladders = ladders_of(table.rows, table.figures, method=table.method, key="world", kl="test_kl", start=start)
    worlds = len({row["world"] for row in table.rows})
    found = compare_at_kl(ladders, table.reference, table.figures, KLS, partial=True)
    differences = {(own.column, own.kl, own.method): own for own in found}
    for figure in table.figures:
        for kl in KLS:
            for method, ladder in ladders.items():
                values = [*ladder_values(ladder, figure, kl).values()]
                enough = len(values) >= LEAST * worlds
                mean, low, high, n = mean_and_interval(values) if enough else (None, None, None, len(values))
                own = differences.get((figure, kl, method))
                own = own if own and own.n >= LEAST * worlds else None
                yield {
                    "table": table.name, "figure": figure, "kl": kl, "method": method, "reference": table.reference,
                    "worlds": worlds, "n": n, "mean": mean, "mean_low": low, "mean_high": high, **_difference(own),
                }  # fmt: skip


def _difference(own: Difference | None) -> dict[str, float | None]:
    values = (None,) * 5 if own is None else (own.difference, own.low, own.high, own.p, own.p_holm)
    names = ("difference", "difference_low", "difference_high", "p", "p_holm")
    return {
        name: value if value is None or math.isfinite(value) else None
        for name, value in zip(names, values, strict=True)
    }


def beside_optimum(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Part c: each rung's KL over 1/(2α²β²), and over that of the exact optimum, as geometric means over worlds."""
    groups: dict[tuple, list[Row]] = {}
    for alpha in (0.3, 1.0, 3.0):
        for row in _of([row for row in rows if row["world"] in FEWER], alpha=alpha):
            if loss_name(row) in (NAMES["nca"], NAMES["infonca"]):
                groups.setdefault((NAMES[row["loss"]], alpha, row["beta"]), []).append(row)
    for (method, alpha, beta), own in groups.items():
        line: dict[str, Any] = {"method": method, "alpha": alpha, "beta": beta, "n": len(own)}
        rule = 1 / (2 * (alpha * beta) ** 2)
        line |= {
            name: fmean(row[column] for row in own) for name, column in (("kl", "test_kl"), ("optimum", "optimum_kl"))
        }
        line["rule"] = rule
        for name, below in (("rule", [rule] * len(own)), ("optimum", [row["optimum_kl"] for row in own])):
            ratios = [math.log(row["test_kl"] / kl) for row, kl in zip(own, below, strict=True)]
            ends = zip(("", "_low", "_high"), mean_and_interval(ratios)[:3], strict=True)
            line |= {f"over_{name}{end}": math.exp(value) for end, value in ends}
        yield line


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Part a: figures against KL, a point a rung: means over worlds with 95 % intervals."""
    titles = [
        ("reference", "train_best", "Best completion of a training prompt, sampled by the reference"),
        ("other", "train_best", "Best completion of a training prompt, sampled by another policy"),
        ("reference", "test_reward", "Reward on test prompts, sampled by the reference"),
        ("other", "test_reward", "Reward on test prompts, sampled by another policy"),
    ]
    found = []
    for sampler, figure, title in titles:
        groups: dict[str, dict[float, list[Row]]] = {}
        for row in _of(rows, sampler=sampler):
            if row["loss"] not in DPO[1:]:
                groups.setdefault(loss_name(row), {}).setdefault(row["beta"], []).append(row)
        series = []
        for name, rungs in groups.items():
            x, y = (
                [mean_and_interval([row[column] for row in own]) for own in rungs.values()]
                for column in ("test_kl", figure)
            )
            at = [own.mean for own in x], [own.mean for own in y]
            series.append(Series(name, *at, [own[1:3] for own in x], [own[1:3] for own in y]))
        label = "expected reward" if figure == "test_reward" else "log π/π_ref, nats"
        found.append(Chart(title, series, "KL(π‖π_ref) on test prompts, nats", label))
    return found


def main(output: Path = FOLDER) -> None:
    """Write all of it."""
    rows = finished(WORLDS_CSV)
    write_csv(output / "tables.csv", [line for table in tables(rows) for line in lines(table)])
    write_csv(output / "optimum.csv", [*beside_optimum(rows)])
    worlds = len({row["world"] for row in rows})
    write_png(charts(rows), f"{worlds} worlds: ends of runs, one line a ladder of β", output / "worlds.png")


if __name__ == "__main__":
    main()
