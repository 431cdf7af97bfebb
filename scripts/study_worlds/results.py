"""docs/study/worlds.csv → docs/study: each comparison of the plan (tables.csv), KLs beside the optimum's, the picture.

python scripts/study_worlds/results.py
"""

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from plan import DPO, FAST, FEWER, KLS, LADDERS, MAIN, RATES
from runs import FOLDER, WORLDS_CSV, finished

from nca_align.commands.report.endpoints import ladder_series
from nca_align.evaluation.intervals import mean_and_interval
from nca_align.evaluation.ladder import Difference, compare_at_kl, ladder_values, ladders_of
from nca_align.pages import text_tables
from nca_align.pages.charts import Chart, Series
from nca_align.pages.pictures import write_png
from nca_align.store.files import write_csv

FIGURES = ("test_reward", "train_best", "train_worst", "test_best", "test_worst")
ROOT = FOLDER.parents[1]
PAGES = (ROOT / "README.md", FOLDER / "README.md", FOLDER / "figures.md")
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
                from_start = sum(
                    not any(not rung.is_start and rung.kl <= kl for rung in own) for own in ladder.values()
                )
                mean, low, high, n = mean_and_interval(values) if enough else (None, None, None, len(values))
                own = differences.get((figure, kl, method))
                own = own if own and own.n >= LEAST * worlds else None
                yield {
                    "table": table.name, "figure": figure, "kl": kl, "method": method, "reference": table.reference,
                    "worlds": worlds, "n": n, "from_start": from_start,
                    "mean": mean, "mean_low": low, "mean_high": high, **_difference(own),
                }  # fmt: skip


def _difference(own: Difference | None) -> dict[str, float | None]:
    values = (None,) * 6 if own is None else (own.n, own.difference, own.low, own.high, own.p, own.p_holm)
    names = ("pairs", "difference", "difference_low", "difference_high", "p", "p_holm")
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
        ("reference", "train_best", "Best training completion, the reference's own"),
        ("other", "train_best", "Best training completion, another policy's"),
        ("reference", "test_reward", "Reward on test prompts, the reference's own"),
        ("other", "test_reward", "Reward on test prompts, another policy's"),
    ]
    found = []
    for sampler, figure, title in titles:
        own = [row for row in _of(rows, sampler=sampler) if row["loss"] not in DPO[1:]]
        ladders = ladders_of(own, [figure], method=loss_name, key="world", kl="test_kl")
        series = [ladder_series(name, ladder, figure) for name, ladder in ladders.items()]
        label = "expected reward" if figure == "test_reward" else "log π/π_ref, nats"
        found.append(Chart(title, series, "KL(π‖π_ref) on test prompts, nats", label))
    return found


def by_count(every: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Part b: reward at a KL of 1 against K, for as many prompts and for as many annotations."""
    found = []
    for many, title in (
        ("128 prompts", "128 prompts, K scored completions each"),
        ("512 annotations", "512 / K prompts: 512 scores in all"),
    ):
        series = []
        for name in NAMES.values():
            own = [line for line in every if line["table"] == f"b. {name}, {many}" and line["kl"] == 1]
            bars = [(line["mean_low"], line["mean_high"]) for line in own]
            K = [int(line["method"].split()[-1]) for line in own]
            series.append(Series(name, K, [line["mean"] for line in own], y_bars=bars))
        found.append(Chart(title, series, "K, scored completions a prompt"))
    return found


def shown(value: float | None, signed: bool = False) -> str:
    """Two digits, with a true minus; `–` where there is none."""
    if value is None:
        return "–"
    text = f"{value:{'+' if signed else ''}.2f}"
    return (text.lstrip("+-") if not float(text) else text).replace("-", "−")


def cell(line: Mapping[str, Any]) -> str:
    """`0.82 (+0.10 ± 0.04 *)`: the mean, the difference from the reference method, * where its adjusted p is < 0.05.

    † stands where most worlds have no run at or below the KL but the reference, `n` where not all worlds reach it.
    """
    text = shown(line["mean"])
    if line["difference"] is not None:
        half = shown((line["difference_high"] - line["difference_low"]) / 2)
        text += f" ({shown(line['difference'], signed=True)} ± {half}{' *' if line['p_holm'] < 0.05 else ''})"
    text += " †" if line["mean"] is not None and line["from_start"] > line["worlds"] / 2 else ""
    fewest = min(line["n"], line["pairs"] or line["n"])
    return text + (f" n {fewest}" if 0 < fewest < line["worlds"] and line["mean"] is not None else "")


def markdown(table: str, figure: str, every: Sequence[Mapping[str, Any]]) -> str:
    """A row a method, a column a KL; the reference method is in bold."""
    own = [line for line in every if (line["table"], line["figure"]) == (table, figure)]
    own = sorted(own, key=lambda line: line["method"] != line["reference"])
    rows: dict[str, list[str]] = {}
    for line in own:
        name = f"**{line['method']}**" if line["method"] == line["reference"] else line["method"]
        rows.setdefault(name, []).append(cell(line))
    return text_tables.markdown(["", *(f"KL {kl:g}" for kl in KLS)], [[name, *cells] for name, cells in rows.items()])


def optimum_markdown(every: Sequence[Mapping[str, Any]]) -> str:
    """Part c's ratios."""
    header, rows = ["method", "α", "β", "KL", "1/(2α²β²)", "KL over that", "KL over the exact optimum's"], []
    for line in sorted(every, key=lambda line: (line["method"], line["alpha"], -line["beta"])):
        ratios = (
            f"{line[f'over_{name}']:.2g} ({line[f'over_{name}_low']:.2g} to {line[f'over_{name}_high']:.2g})"
            for name in ("rule", "optimum")
        )
        about = (f"{line['alpha']:g}", f"{line['beta']:.2g}", f"{line['kl']:.2f}", f"{line['rule']:.2g}")
        rows.append([line["method"], *about, *ratios])
    return text_tables.markdown(header, rows)


def fill(page: str, every: Sequence[Mapping[str, Any]], optimum: Sequence[Mapping[str, Any]]) -> str:
    """`page` with a table or the README's bullets between each `<!-- table … -->` and the next `<!-- end -->`."""

    def table(mark: re.Match) -> str:
        name, _, figure = mark[1].partition("; ")
        if not figure:
            text = bullets(every) if name == "of the study" else optimum_markdown(optimum)
        else:
            text = markdown(name, figure, every)
        return f"<!-- table {mark[1]} -->\n{text.rstrip()}\n<!-- end -->"

    return re.sub(r"<!-- table ([^>]+?) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def bullets(every: Sequence[Mapping[str, Any]]) -> str:
    """What the README tells, at a KL of 1 and one of 2: the figures are filled in, the words are ours."""
    found = {(line["table"], line["figure"], line["method"], line["kl"]): line for line in every}
    own = "a. completions of the reference"
    nca, infonca, best_worst, all_pairs, _ = NAMES.values()

    def gap(table: str, figure: str, method: str, kl: float = 1) -> str:
        line = found[table, figure, method, kl]
        return f"{shown(line['difference'], signed=True)} ± {half(line)}"

    def half(line: Mapping[str, Any]) -> str:
        return shown(line["difference_high"] - line["difference"])

    def beside(figure: str, method: str, kl: float = 1) -> str:
        line = found[own, figure, method, kl]
        return f"{shown(abs(line['difference']))} ± {half(line)} {'lower' if line['difference'] < 0 else 'higher'}"

    def gains(of: str) -> list[str]:
        return [gap(f"b. {loss}, {of}", "test_reward", "K = 16") for loss in (infonca, nca, all_pairs, best_worst)]

    level, worlds = found[own, "train_best", nca, 1]["mean"], found[own, "train_best", infonca, 2]["pairs"]
    told = [
        f"""**Reward.** InfoNCA's reward is {beside("test_reward", infonca)} than NCA's. With DPO on the best and
        the worst completion it is {beside("test_reward", best_worst)} (n = 20 worlds). A prompt's rewards have a
        standard deviation of 1.""",
        f"""**Likelihood.** With NCA, the best completion of training prompts has a log-ratio of {shown(level)} nats.
        With InfoNCA it is {beside("train_best", infonca)}, with DPO {beside("train_best", best_worst)} (n = 20). On
        test prompts, InfoNCA's differs by {gap(own, "test_best", infonca)}. At a KL of 2 nats, InfoNCA's is
        {beside("train_best", infonca, 2)} on training prompts (n = {worlds}), unless NCA trains longer.""",
        """**More completions.** From K = 2 to 16, the reward changes by {} with InfoNCA and by {} with NCA (n = 10).
        It changes by {} with DPO on all pairs, and by {} with DPO on the best and the worst.""".format(
            *gains("128 prompts")
        )
        + """ With 512 scores in all, more completions mean fewer prompts. The reward then changes by {}, {}, {} and
        {}.""".format(*gains("512 annotations")),
    ]
    texts = (f"- {' '.join(text.split())}" for text in told)
    return "\n".join(textwrap.fill(text, 118, subsequent_indent="  ", break_on_hyphens=False) for text in texts)


def main(root: Path = ROOT) -> None:
    """Write all of it under `root`: docs/study, and the README's bullets."""
    rows, output = finished(WORLDS_CSV), root / FOLDER.relative_to(ROOT)
    every, optimum = [line for table in tables(rows) for line in lines(table)], [*beside_optimum(rows)]
    for page in PAGES:
        path = root / page.relative_to(ROOT)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(fill(page.read_text(encoding="utf-8"), every, optimum), encoding="utf-8")
    write_csv(output / "tables.csv", every)
    write_csv(output / "optimum.csv", optimum)
    write_png(charts(rows), "20 worlds: ends of runs, a line a ladder of β", output / "worlds.png")
    write_png(
        by_count(every),
        "Reward at a KL of 1 nat: mean over ten simulated worlds, with 95 % intervals",
        output / "why.png",
    )


if __name__ == "__main__":
    main()
