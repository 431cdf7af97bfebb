"""What the study's runs gave → docs/study: evaluations, means over seeds, cells and plots; and the figures in the text.

    python scripts/study_results.py [RUNS] [OUTPUT]        (runs/study and docs/study by default)

Each comparison has a CSV file with a row a cell, split and evaluation; `cells.csv` has each cell's seed, minutes,
commit and versions. Cells that OUTPUT has and RUNS has not stay as they are, so that machines can share the work.
A part (`PARTS`) has `PART-means.csv`, a row a setting and figure of the test split, at the run's end and at equal KL:
mean over seeds, 95 % t-interval, n, and the same of the difference from NCA, seed by seed; and `PART.png`. Its first
rows are of the model before training. A setting is in them once it has all of the seeds.

In OUTPUT.md and the README the text between `<!-- table PART KIND -->` and `<!-- end -->` becomes a table, that between
`<!-- PART; LABEL; FIGURE -->` and `<!-- -->` a mean with its interval, with `; minus_nca` the difference from NCA.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from nca_align.commands.report.charts import frontier_chart, likelihood_charts, over_seeds
from nca_align.evaluation.comparison_rows import Row, Setting, final_values, labels, runs_of, setting_of, step_of
from nca_align.evaluation.frontier import Curve, curve_of, curves_of, reward_at_kl
from nca_align.evaluation.intervals import mean_and_interval
from nca_align.pages.charts import Chart, Series
from nca_align.pages.pictures import write_png
from nca_align.store.files import read_csv, write_csv

ROOT = Path(__file__).resolve().parents[1]
# figure at equal KL → split, column and KL
EQUAL_KL = {f"reward at KL {kl:g}": ("test", "reward", kl) for kl in (0.5, 1.0, 1.5, 3.0)} | {
    "train logratio_best at KL 1.1": ("train", "logratio_best", 1.1),
    "logratio_best at KL 1.1": ("test", "logratio_best", 1.1),
}
AT_THE_END = (
    "reward", "kl", "win_rate", "tokens", "cut", "distinct_2", "train logratio_best", "train logratio_worst",
    "logratio_best", "logratio_worst", "accuracy",
)  # fmt: skip
MINUS_NCA = ("minus_nca", "minus_nca_low", "minus_nca_high")
COLUMNS = ("label", "figure", "mean", "low", "high", "n", *MINUS_NCA)
FIGURES = (*EQUAL_KL, *AT_THE_END)
MISSING = {"equal": "not reached", "end": "–", "quickstart": "not measured"}
# of the quickstart's own answers, which a run before they were measured doesn't have
QUICKSTART = tuple(f"generation/{name}" for name in ("reference_reward", "reward", "gain", "gain_same_length"))
START = "before training"


def _nca(row: Row) -> bool:
    return row["method"] == "nca"


def _count(row: Row) -> bool:
    return bool(row["num_completions"])


def _pairs(row: Row) -> bool:
    return row["strategy"] == "best_worst"


def _alpha(row: Row) -> bool:
    return not _count(row) and not _pairs(row)


# parts with a number that varies → its name, and what stands across: of K its value where all completions are taken
AXES: dict[str, tuple[str, str, Callable[[str | None], float]]] = {
    "alpha": ("alpha", "log₁₀ α", lambda value: math.log10(float(value or "nan"))),
    "completions": ("num_completions", "K", lambda value: float(value or 4)),
}
# part → the comparisons that it is made of, and which of their rows
PARTS: dict[str, Sequence[tuple[str, Callable[[Row], bool]]]] = {
    "task1": [("task1", lambda row: True)],
    "task2": [("task2", lambda row: True)],
    "alpha": [("task1", _nca), ("ablations", _alpha)],
    "completions": [("task1", _nca), ("ablations", _count)],
    "preferences": [("task1", _nca), ("ablations", _pairs)],
}
COMPARISONS = tuple(dict.fromkeys(name for made_of in PARTS.values() for name, _ in made_of))


def part_rows(part: str, comparisons: Mapping[str, Sequence[dict[str, str]]]) -> list[dict[str, str]]:
    """The rows of a part, of settings with all seeds; none where a comparison has nothing for it yet."""
    own = [[row for row in whole(comparisons.get(name, [])) if wanted(row)] for name, wanted in PARTS[part]]
    return [row for rows in own for row in rows] if all(own) else []


def whole(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of settings with as many seeds as any has."""
    seeds = {setting: len(runs) for setting, runs in runs_of(rows).items()}
    return [row for row in rows if seeds.get(setting_of(row)) == max(seeds.values(), default=0)]


def seed_values(rows: Sequence[Row], setting: Setting) -> dict[str, dict[str, float]]:
    """Figure → seed → value; a figure that not every seed has is left out."""
    runs = {split: runs_of(rows, split).get(setting, {}) for split in ("train", "test")}
    found: dict[str, dict[str, float]] = {}
    for name in AT_THE_END:
        split, column = ("train", name.removeprefix("train ")) if name.startswith("train ") else ("test", name)
        found[name] = {seed: value for seed, (_, value) in final_values(runs[split], column).items()}
    for name, (split, column, kl) in EQUAL_KL.items():
        at = {
            seed: reward_at_kl(along(seed, own, runs[split].get(seed, []), column), kl)
            for seed, own in runs["test"].items()
        }
        found[name] = {seed: value for seed, value in at.items() if value is not None}
        if len(found[name]) < len(at):
            found[name] = {}
    return {name: values for name, values in found.items() if values}


def along(seed: str, test: Sequence[Row], rows: Sequence[Row], column: str) -> Curve:
    """The run's curve with a column of `rows`, where these have one at the same step, in the place of `test`'s reward.

    It is known how a reward begins (`reward_at_kl`), and not of a log-ratio, which is without the start.
    """
    values = {step_of(row): row.get(column) for row in rows if step_of(row) > 0 or column == "reward"}
    return curve_of(seed, [{**row, column: values.get(step_of(row))} for row in test], column)


def means(rows: Sequence[Row]) -> list[dict[str, object]]:
    """The rows of `PART-means.csv`; the first setting of NCA is what the others are compared with."""
    names = labels([*curves_of(rows)])
    values = {name: seed_values(rows, setting) for setting, name in names.items()}
    first: dict[str, dict[str, float]] = {}
    if nca := next((setting for setting in names if dict(setting)["method"] == "nca"), None):
        first = values[names[nca]]
        start = seed_values([row for row in rows if step_of(row) == 0], nca)
        start.pop("accuracy", None)  # of ties alone, which count as wrong
        values = {START: start} | values
    table: list[dict[str, object]] = []
    for label, figures in values.items():
        for figure, own in figures.items():
            line: dict[str, object] = {"label": label, "figure": figure, "n": len(own)}
            line |= _fields(("mean", "low", "high"), [*own.values()])
            base = {} if label == START or figures is first else first.get(figure, {})
            if base.keys() == own.keys():
                line |= _fields(MINUS_NCA, [own[seed] - base[seed] for seed in own])
            table.append(line)
    return table


def _fields(names: Sequence[str], values: Sequence[float]) -> dict[str, object]:
    found = mean_and_interval(values)[:3]
    return {name: value if math.isfinite(value) else None for name, value in zip(names, found, strict=True)}


def shown(row: Row, name: str = "mean") -> str:
    """`0.71 ± 0.04`, of `minus_nca` with its sign."""
    value, high = float(row[name]), row.get("high" if name == "mean" else f"{name}_high")
    digits = 1 if name == "mean" and abs(value) >= 10 else 2
    text = f"{value:{'+' if name != 'mean' else ''}.{digits}f}"
    text = text.lstrip("+-") if not float(text) else text
    spread = f" ± {float(high) - value:.{digits}f}" if high else ""
    return f"{text}{spread}".replace("-", "−")


def markdown(table: Sequence[Row], kind: str) -> str:
    """A row a setting: of kind `equal`, rewards at equal KL and in brackets the difference from NCA; `end`, the end."""
    equal = [figure for figure, (_, column, _) in EQUAL_KL.items() if column == "reward"]
    figures = tuple(equal) if kind == "equal" else AT_THE_END
    found: dict[str, dict[str, Row]] = {}
    for row in table:
        if kind == "end" or row["label"] != START:
            found.setdefault(row["label"], {})[row["figure"]] = row
    figures = tuple(name for name in figures if any(name in own for own in found.values()))
    lines = [f"| | n | {' | '.join(figures)} |", "| --- " * (len(figures) + 2) + "|"]
    for label, own in found.items():
        cells = []
        for name in figures:
            if name not in own:
                cells.append(MISSING[kind])
                continue
            gap = f" ({shown(own[name], 'minus_nca')})" if kind == "equal" and own[name]["minus_nca"] else ""
            cells.append(f"{shown(own[name])}{gap}")
        lines.append(f"| {label} | {next(iter(own.values()))['n']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def fill(text: str, tables: Mapping[str, Sequence[Row]]) -> str:
    """`text` with tables and figures between their marks; "not reached" where a table has no such figure.

    Raises:
        KeyError: a mark of a setting that no table has.
    """

    def table(mark: re.Match) -> str:
        part, kind = mark[1].split()
        return f"<!-- table {mark[1]} -->\n{markdown(tables[part], kind)}\n<!-- end -->" if part in tables else mark[0]

    def figure(mark: re.Match) -> str:
        part, label, name, *which = mark[1].split("; ")
        known = {row["figure"]: row for row in tables[part] if row["label"] == label}
        later = QUICKSTART if part == "quickstart" else FIGURES
        if not known or name not in (*later, *known):
            raise KeyError(mark[1])
        missing = MISSING["quickstart" if part == "quickstart" else "equal"]
        value = shown(known[name], *which) if name in known else missing
        return f"<!-- {mark[1]} -->{value}<!-- -->"

    text = re.sub(r"<!-- table (\w+ \w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)
    return re.sub(r"<!-- (\w+; [^>]+?) -->(?:(?!<!--).)*<!-- -->", figure, text, flags=re.DOTALL)


def read_comparisons(output: Path) -> dict[str, list[dict[str, str]]]:
    """Comparison → the rows of its CSV file."""
    return {name: read_csv(path) for name in COMPARISONS if (path := output / f"{name}.csv").exists()}


def read_tables(output: Path) -> dict[str, list[dict[str, str]]]:
    """Part → the rows of its `-means.csv`."""
    return {part: read_csv(path) for part in PARTS if (path := output / f"{part}-means.csv").exists()}


def read_told(output: Path) -> dict[str, list[dict[str, str]]]:
    """All tables of which figures are told: the parts', and the quickstart's."""
    quickstart = output.parent / "quickstart.csv"
    return read_tables(output) | ({"quickstart": read_csv(quickstart)} if quickstart.exists() else {})


def fill_pages(pages: Sequence[Path], tables: Mapping[str, Sequence[Row]]) -> None:
    """`fill` those of the files that are there."""
    for page in pages:
        if page.exists():
            page.write_text(fill(page.read_text(encoding="utf-8"), tables), encoding="utf-8")


def write_part(part: str, rows: Sequence[dict[str, str]], output: Path) -> None:
    """The means and the plot of a part."""
    table = means(rows)
    write_csv(output / f"{part}-means.csv", table, COLUMNS)
    groups = curves_of(rows)
    charts = [frontier_chart(rows, groups), *likelihood_charts(rows, groups)]
    if part in AXES:
        charts = [*charts, *axis_charts(part, groups, read_csv(output / f"{part}-means.csv"))]
    write_png(charts, f"{part}: {over_seeds(groups)}", output / f"{part}.png")


def axis_charts(part: str, groups: Mapping[Setting, Sequence[Curve]], table: Sequence[Row]) -> list[Chart]:
    """Figures with the number that varies in the part across."""
    name, across, place = AXES[part]
    at = {label: place(dict(setting).get(name)) for setting, label in labels([*groups]).items()}
    titles = {
        "reward": "Reward at the end",
        "reward at KL 1": "Reward at a KL of 1, of those that came so far",
        "kl": "KL at the end",
        "logratio_best": "Best completion's log-ratio at the end, test prompts",
        "train logratio_best": "Best completion's log-ratio at the end, training prompts",
    }
    if name == "num_completions":
        del titles["train logratio_best"]  # the best of two isn't the best of four
    charts = []
    for figure, title in titles.items():
        told = (row for row in table if row["figure"] == figure and row["label"] in at)
        rows = sorted(told, key=lambda row: at[row["label"]])
        x, y = [at[row["label"]] for row in rows], [float(row["mean"]) for row in rows]
        bars = [(float(row["low"] or -math.inf), float(row["high"] or math.inf)) for row in rows]
        if rows:
            charts.append(Chart(title, [Series("", x, y, y_bars=bars)], across, ""))
    return charts


def gathered(path: Path, rows: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
    """What the CSV file `path` has of other cells, if it is there, and `rows`."""
    new = {(row.get("comparison"), row["cell"]) for row in rows}
    known = read_csv(path) if path.exists() else []
    return [*(row for row in known if (row.get("comparison"), row["cell"]) not in new), *rows]


def cells(runs: Path) -> list[dict[str, object]]:
    """A row a cell of what it was made with."""
    table: list[dict[str, object]] = []
    for path in sorted(runs.glob("*/cells/*/cell.json")):
        about = json.loads(path.read_text(encoding="utf-8"))
        own = {"comparison": path.parents[2].name, "cell": path.parent.name, "seed": about["settings"]["seed"]}
        table.append(own | {key: about[key] for key in ("minutes", "commit")} | about["versions"])
    return table


def main(runs: Path, output: Path) -> None:
    output = output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    found = sorted(runs.glob("*/comparison.csv"))
    if not found:
        sys.exit(f"{runs} holds no comparison; run scripts/study.sh first")
    for path in found:
        own = output / f"{path.parent.name}.csv"
        write_csv(own, gathered(own, read_csv(path)))
    comparisons = read_comparisons(output)
    told = {(name, row["cell"]) for name, rows in comparisons.items() for row in rows}
    made = [row for row in cells(runs) if (row["comparison"], row["cell"]) in told]
    write_csv(output / "cells.csv", gathered(output / "cells.csv", made))
    parts = {part: rows for part in PARTS if (rows := part_rows(part, comparisons))}
    for part, rows in parts.items():
        write_part(part, rows, output)
    fill_pages([output.with_suffix(".md"), output.parents[1] / "README.md"], read_told(output))
    print(f"{', '.join(parts)}: tables and plots in {output}")


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(*(given + [ROOT / "runs/study", ROOT / "docs/study"][len(given) :]))
