"""Result files → `tables.md` (targets first), `figures.csv` and `steps.png` beside them.

python benchmarks/summarise.py [folder]
"""

import csv
import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import RESULTS

SPREAD = re.compile(r"mistral-60m-k\d+")
IMPORT = "import nca_align"
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Target:
    """A figure to reach.

    Args:
        what: in words.
        bound: the figure.
        value: as measured; None where it wasn't.
        at_least: whether `bound` is a lower one.
        unit: of both.
    """

    what: str
    bound: float
    value: float | None
    at_least: bool = False
    unit: str = "×"

    def row(self) -> str:
        sign = "≥" if self.at_least else "≤"
        if self.value is None:
            measured, met = "", "not measured"
        else:
            measured = f"{self.value:.3f} {self.unit}".strip()
            met = "met" if (self.value >= self.bound if self.at_least else self.value <= self.bound) else "**missed**"
        return f"| {self.what} | {sign} {self.bound:g} {self.unit}".rstrip() + f" | {measured} | {met} |"


def read_results(folder: Path) -> Results:
    """Configuration → result: step times first, by rising K."""
    results = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}

    def place(name: str) -> tuple:
        return "unique_tokens" not in results[name].get("example", {}), [
            int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)
        ]

    return {name: results[name] for name in sorted(results, key=place)}


def targets(results: Results) -> Iterator[Target]:
    """The figures of the step times, memory and imports, on the spread lengths unless another thing is said."""

    def ratio(k: int, row: str, other: str, model: str = "mistral-60m") -> float | None:
        seconds = [_median(results, f"{model}-k{k}", name) for name in (row, other)]
        return None if None in seconds else seconds[0] / seconds[1]

    for way, row, bound in (("cached", "prefix_shared_cached", 1.1), ("live", "prefix_shared", 1.5)):
        for k in (4, 8, 16, 32):
            yield Target(f"{way}, time of the packed limit, K = {k}", bound, ratio(k, row, "limit"))
        smollm2 = ratio(4, row, "limit", "smollm2-135m")
        yield Target(f"{way}, time of the packed limit, SmolLM2, K = 4", bound, smollm2)
    for k, live, cached in ((4, 1.9, 2.6), (16, 3.0, 4.1)):
        for way, row, bound in (("live", "prefix_shared", live), ("cached", "prefix_shared_cached", cached)):
            yield Target(f"{way}, step rate of the authors' way, K = {k}", bound, ratio(k, "baseline", row), True)
    yield Target("cached, step rate of TRL on the pairs, K = 4", 5.0, ratio(4, "trl", "prefix_shared_cached"), True)
    padded = ratio(16, "padded_cached", "prefix_shared_cached")
    yield Target("cached, step rate of our own padded, K = 16", 1.9, padded, True)
    linear = results.get("linear", {}).get("rows", {})
    for way in ("jemalloc", "glibc's default"):
        points = [
            (row["unique_tokens"], row["median"])
            for name, row in linear.items()
            if name.endswith(f", {way}") and "median" in row
        ]
        straight = r_squared(points) if points else None
        yield Target(f"cached, R² of time against unique tokens, K = 4 to 32, {way}", 0.99, straight, True, "")
    memory = results.get("memory", {}).get("rows", {})
    for malloc in ("", ", glibc's default"):
        in_pieces, small = (
            memory.get(f"{row}{malloc}", {}).get("peak_bytes")
            for row in ("K = 32, prefix_shared_pieces", "K = 4, prefix_shared_cached")
        )
        times = in_pieces / small if in_pieces and small else None
        yield Target(f"memory of K = 32, 1,280 tokens a forward, over that of K = 4{malloc}", 1.2, times)
    in_pieces = ratio(32, "prefix_shared_pieces", "prefix_shared_cached")
    yield Target("time of K = 32, 1,280 tokens a forward, over that of all at once", 1.25, in_pieces)
    yield Target("`import nca_align` after TRL's", 0.3, _median(results, "import", IMPORT), unit="s")
    cards = [
        (f"7B on {result['card']}, {row}, memory", figures["reserved_with_optimizer_bytes"] / 1e9)
        for result in results.values()
        for row, figures in result["rows"].items()
        if row.startswith("prefix_shared") and "reserved_with_optimizer_bytes" in figures
    ]
    for what, taken in cards or [("7B on a CUDA card, memory", None)]:
        yield Target(what, 24.0, taken, unit="GB")


def r_squared(points: list[tuple[float, float]]) -> float:
    """Share of the variance of y that a straight line in x explains."""
    n = len(points)
    mean_x, mean_y = (sum(values) / n for values in zip(*points, strict=True))
    xy = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return xy**2 / (sum((x - mean_x) ** 2 for x, _ in points) * sum((y - mean_y) ** 2 for _, y in points))


def _median(results: Results, configuration: str, row: str) -> float | None:
    return results.get(configuration, {}).get("rows", {}).get(row, {}).get("median")


def tables(results: Results) -> str:
    """The whole Markdown text."""
    lines = ["# Results", "", "Made by `benchmarks/summarise.py` from the files beside it.", "", "## Targets", ""]
    lines += ["| what | target | measured | |", "| --- | --- | --- | --- |", *(t.row() for t in targets(results))]
    lines += ["", "![Step times](steps.png)"]
    for name, result in results.items():
        rows = result["rows"]
        lines += ["", f"## {name}", ""]
        if "example" in result and "unique_tokens" in result["example"]:
            example = result["example"]
            lengths = "; ".join(
                f"{prompt} and {', '.join(map(str, completions))}"
                for prompt, completions in zip(example["prompts"], example["completions"], strict=True)
            )
            lines += [
                f"{result['model']['name']}, {result['model']['parameters'] / 1e6:.1f}M parameters, random weights. "
                f"Tokens of prompt and completions: {lengths}; {example['unique_tokens']} unique, "
                f"{example['padded_tokens']} padded.",
                "",
            ]
        elif name == "linear":
            lines += [
                "A step at rising K, and how much of its processor time is the system's, which gives memory out.",
                "",
            ]
        elif "card" in result:
            lines += [f"{result['card']}: {result['model']['weights']}, {result['model']['adapter']}.", ""]
        if name == "linear":
            lines += _linear_table(rows)
        elif any("peak_bytes" in row for row in rows.values()) and "card" not in result:
            lines += _memory_table(rows)
        else:
            lines += _time_table(rows)
        lines += ["", _origin(result)]
    lines += ["", "## Machines and versions", ""]
    for machine in dict.fromkeys(map(_machine, results.values())):
        lines.append(
            f"- {', '.join(name for name, result in results.items() if _machine(result) == machine)}: {machine}"
        )
    return "\n".join(lines) + "\n"


def figures(results: Results) -> Iterator[tuple[str, str, float]]:
    """(result, row, figure): the targets, and each row's median in seconds."""
    yield from (("targets", target.what, target.value) for target in targets(results) if target.value is not None)
    for name, result in results.items():
        yield from ((name, row, found["median"]) for row, found in result["rows"].items() if "median" in found)


def _time_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    memory = any("peak_bytes" in row for row in rows.values())
    against = [name for name in ("limit", "baseline") if "median" in rows.get(name, {})]
    columns = ["", "median, s", "spread, s", *(f"÷ {name}" for name in against)]
    columns += ["peak, GB", "log-probabilities off", "gradients off"] if memory else []
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for name, row in rows.items():
        if "median" not in row:
            lines.append(f"| {name} | {row['skipped']} |" + " |" * (len(columns) - 2))
            continue
        cells = [name, f"{row['median']:.3f}", "{:.3f} to {:.3f}".format(*row["spread"])]
        cells += [f"{row['median'] / rows[other]['median']:.3f}" for other in against]
        if memory:
            cells += [f"{row['peak_bytes'] / 1e9:.2f}", f"{row['logps_off']:.1e}", f"{row['gradient_off']:.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _linear_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| | unique tokens | median, s | ms a token | system's seconds | page faults |", "| --- " * 6 + "|"]
    for name, row in rows.items():
        if "skipped" in row:
            lines.append(f"| {name} | {row['skipped']} | | | | |")
            continue
        system, faults = (statistics.median(row[key]) for key in ("system_seconds", "page_faults"))
        seconds, tokens = row["median"], row["unique_tokens"]
        lines.append(
            f"| {name} | {tokens} | {seconds:.3f} | {1e3 * seconds / tokens:.3f} | {system:.2f} | {faults:,.0f} |"
        )
    return lines


def _memory_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| | peak over static, GB | static, GB |", "| --- | --- | --- |"]
    for name, row in rows.items():
        cells = (
            [row["skipped"], ""]
            if "skipped" in row
            else [f"{row[k] / 1e9:.2f}" for k in ("peak_bytes", "static_bytes")]
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _origin(result: dict[str, Any]) -> str:
    commit = (result["commit"] or "unknown")[:10] + (", uncommitted changes" if result["uncommitted_source"] else "")
    return f"{result['date'][:10]}, commit {commit}, `{result['command']}`"


def _machine(result: dict[str, Any]) -> str:
    hardware, versions = result["hardware"], result["versions"]
    named = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    return (
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['torch_threads']} threads, "
        f"{hardware['memory_gb']} GB; {named}"
    )


def plot(results: Results, path: Path) -> None:
    """Step time against unique tokens, and every configuration's ways against the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), width_ratios=[1, 1.4], layout="constrained")
    ways = ("baseline", "trl", "padded_cached", "prefix_shared", "prefix_shared_cached", "limit")
    colours = dict(zip(ways, pyplot.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    for way in ways:
        points = sorted(
            (result["example"]["unique_tokens"], result["rows"][way]["median"])
            for name, result in results.items()
            if SPREAD.fullmatch(name) and _median(results, name, way) is not None
        )
        if points:
            left.plot(*zip(*points, strict=True), marker="o", label=way, color=colours[way])
    left.set(xlabel="unique tokens", ylabel="seconds a step", title="60M parameters, K = 2 … 32")
    left.legend()
    timed = [name for name in results if _median(results, name, "limit") is not None]
    for i, way in enumerate(ways[:-1]):
        values = [(_median(results, name, way) or 0.0) / _median(results, name, "limit") for name in timed]
        bars = right.bar([n + (i - 2) * 0.17 for n in range(len(timed))], values, 0.16, label=way, color=colours[way])
        right.bar_label(bars, [f"{value:.2f}" if value else "" for value in values], fontsize=6, rotation=90, padding=2)
    right.axhline(1.0, color=colours["limit"], linewidth=1)
    right.set(ylabel="time, limit = 1", title="against the packed limit")
    right.set_xticks(range(len(timed)), timed, rotation=20, ha="right", fontsize=8)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def main(folder: Path) -> None:
    results = read_results(folder)
    if not results:
        sys.exit(f"{folder} holds no result files; run benchmarks/run.py first.")
    (folder / "tables.md").write_text(tables(results))
    with open(folder / "figures.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("result", "row", "figure"), *figures(results)])
    plot(results, folder / "steps.png")
    print(f"tables.md, figures.csv and steps.png written in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)
