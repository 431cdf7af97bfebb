"""The confirmation on SmolLM2: runs what is missing of docs/study/words.csv, and compares ladders of β at equal KL.

    bash scripts/study_words.sh pilots       runs the pilots and prints the ladders that they give
    bash scripts/study_words.sh              runs the study: CONFIG, then the rungs that its ladders lack
    bash scripts/study_words.sh run C T      runs the configuration C alone, into the table T
    python scripts/study_words.py compare    prints the planned comparisons
    python scripts/study_words.py tell       writes them on the pages, with the picture

A run trains the cells that the table has no row of, in the order of the grid. A row is added whenever a cell is
finished, so that a commit of the table is all that another machine needs to go on. Which rungs a ladder lacks follows
from the table too.
"""

import json
import math
import sys
import textwrap
import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from nca_align.commands.compare import command as compare_command
from nca_align.commands.compare.grid import Cell, expand
from nca_align.commands.compare.tables import rows_of
from nca_align.evaluation.comparison_folder import is_done
from nca_align.evaluation.intervals import mean_and_interval
from nca_align.evaluation.ladder import Difference, compare_at_kl, ladder_values, ladders_of
from nca_align.pages.charts import Chart, Series
from nca_align.pages.pictures import write_png
from nca_align.pages.text_tables import markdown
from nca_align.store.files import read_csv, read_json, write_csv
from quickstart_results import with_block

ROOT = Path(__file__).resolve().parents[1]
CONFIG, TABLE = ROOT / "configs/study/words.yaml", ROOT / "docs/study/words.csv"
PILOTS_TABLE = ROOT / "docs/study/pilots-words.csv"
PILOTS = {"nca": (0.3, 0.1, 0.03, 0.01), "infonca": (3.0, 1.0, 0.3, 0.1), "dpo": (3.0, 1.0, 0.3, 0.1)}  # of β
RUNGS = (0.5, 1.1, 3.0)  # nats, at which the ladders placed by the pilots were to end
KLS = (0.75, 1.5)  # nats, of docs/study/plan-words.md
BELOW, MIDDLE, ABOVE = 0.4, 1.1, 2.5  # nats, at which a rung is to end that a ladder lacks
LEAST, MOST = 3, 6  # rungs of a ladder
NEAR = 0.05  # of reward, within which methods count as equal
FIGURES = {
    "reward": "reward", "logratio_best": "log-ratio of the best, test",
    "train_logratio_best": "log-ratio of the best, training",
}  # fmt: skip
NAMES = {"nca": "NCA", "infonca": "InfoNCA", "dpo": "DPO, best and worst"}
SAID = {
    "lead": "NCA's lead stays", "beta": "NCA's lead was a matter of β", "undecided": "undecided",
}  # fmt: skip
PAGES = {"README.md": ["words verdicts"], "docs/study/README.md": ["words verdicts", "words table"]}
_SETTINGS = ("method", "strategy", "alpha", "beta", "learning_rate", "num_completions", "seed")
_TEST = (
    "reward", "reward_error", "kl", "kl_error", "tokens", "cut", "distinct_2", "logratio_best", "logratio_worst",
)  # fmt: skip
_TRAIN = ("logratio_best", "logratio_worst")
_PAUSE = 10.0  # seconds between looks for cells that have finished


def row_of(cell: Cell, folder: Path) -> dict[str, Any]:
    """The finished cell's row: its settings, the figures of its end, and what it was made with."""
    rows = rows_of(cell, folder)
    start, *_, test = [row for row in rows if row["split"] == "test"]
    train = [row for row in rows if row["split"] == "train"][-1]
    about = read_json(folder / "cell.json")
    return {
        "cell": cell.name, **{name: cell.settings[name] for name in _SETTINGS},
        **{name: test[name] for name in _TEST}, **{f"train_{name}": train[name] for name in _TRAIN},
        "start_reward": start["reward"], "steps": test["step"], "minutes": about["minutes"],
        "commit": about["commit"], **about["versions"],
    }  # fmt: skip


def collect(cells: Sequence[Cell], output: Path, table: Path) -> set[str]:
    """Add the finished cells to the table, sorted by seed, method and β; returns the names of all that it has."""
    known = {row["cell"]: row for row in read_csv(table)} if table.exists() else {}
    new = {
        cell.name: row_of(cell, cell.folder(output))
        for cell in cells
        if cell.name not in known and is_done(cell.folder(output))
    }
    if new:
        order = [*NAMES]
        both = (known | new).values()
        write_csv(
            table, sorted(both, key=lambda row: (int(row["seed"]), order.index(row["method"]), -float(row["beta"])))
        )
    return {*known, *new}


def pilots(asked: dict[str, Any]) -> dict[str, Any]:
    """The comparison `asked` with other seeds, β on a coarse grid, and few answers."""
    grid = [
        {"method": method, "beta": beta, "num_completions": 4, "seed": seed}
        for seed in (101, 102) for method, betas in PILOTS.items() for beta in betas
        if seed == 101 or beta == 0.1  # the spread over seeds shows at one β
    ]  # fmt: skip
    few = asked["evaluation"] | {"prompts": 32, "num_completions": 4}
    return asked | {"output_dir": asked["output_dir"] + "-pilots", "grid": grid, "evaluation": few}


def betas_at(kls: Sequence[float], ends: Sequence[tuple[float, float]]) -> list[float]:
    """β for each KL by the KLs and β of runs, straight in both logarithms, with two digits.

    For a KL beyond all runs, the line through the two that ended nearest is extended.
    """
    known = sorted((math.log(kl), math.log(beta)) for kl, beta in ends)
    found = []
    for kl in map(math.log, kls):
        i = min(max(bisect_left(known, (kl,)), 1), len(known) - 1)
        (below, first), (above, second) = known[i - 1 : i + 1]
        found.append(first + (kl - below) / (above - below) * (second - first))
    return [*dict.fromkeys(float(f"{math.exp(beta):.2g}") for beta in found)]


def lacking(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """The grid of what ladders lack by their own KLs: a rung at most for each, first those that don't span `KLS`.

    Beyond a ladder's ends, the KL is taken to be in proportion to 1/β. A ladder gets no rung any more when it has
    `MOST`, or when the β asked for is one of its own.
    """
    ladders: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        ladders[int(row["seed"]), row["method"]].append((float(row["kl"]), float(row["beta"])))
    beyond: list[dict[str, Any]] = []
    between: list[dict[str, Any]] = []
    for (seed, method), ends in sorted(ladders.items()):
        (low, largest), (high, smallest) = min(ends), max(ends)
        spans = low <= KLS[0] and high >= KLS[-1]
        if low > KLS[0]:
            beta = largest * low / BELOW
        elif high < KLS[-1]:
            beta = smallest * high / ABOVE
        else:
            (beta,) = betas_at([MIDDLE], ends)
        beta = float(f"{beta:.2g}")
        if len(ends) < (LEAST if spans else MOST) and beta not in (own for _, own in ends):
            cell = {"method": method, "num_completions": 4, "seed": seed, "beta": beta}
            (between if spans else beyond).append(cell)
    return beyond + between


def run(asked: dict[str, Any], table: Path) -> int:
    """Train what the table hasn't of the comparison `asked`, and add it; 0 where nothing is left."""
    cells, output = expand(asked["base"], asked["grid"], "configs/study/words.yaml"), Path(asked["output_dir"])
    done = collect(cells, output, table)
    left = [cell for cell in cells if cell.name not in done]
    print(f"{len(cells)} cells, {len(cells) - len(left)} of them in {table}", flush=True)
    if not left:
        return 0
    output.mkdir(parents=True, exist_ok=True)
    keys = {key for one in (asked["grid"] if isinstance(asked["grid"], list) else [asked["grid"]]) for key in one}
    grids = [{key: value for key, value in cell.settings.items() if key in keys} for cell in left]
    file = output / "left.yaml"
    file.write_text(json.dumps(asked | {"grid": grids}), encoding="utf-8")  # which is YAML
    over = threading.Event()

    def look() -> None:
        while not over.wait(_PAUSE):
            collect(cells, output, table)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:  # in this process: a kill of it ends the cells too
        return compare_command.main(["--config", str(file)])
    finally:
        over.set()
        thread.join()
        collect(cells, output, table)


def study(asked: dict[str, Any], table: Path) -> int:
    """Run what is asked for, and then what the ladders lack, until they lack nothing."""
    code = run(asked, table)
    while code == 0 and (grid := lacking(read_csv(table))):
        code = run(asked | {"grid": grid}, table)
    return code


def differences(rows: Sequence[dict[str, str]]) -> list[Difference]:
    """InfoNCA and DPO less NCA at equal KL between the ends of runs, paired by seed."""
    return compare_at_kl(ladders_of(rows, [*FIGURES]), "nca", [*FIGURES], KLS)


def comparisons(rows: Sequence[dict[str, str]]) -> str:
    """A line a comparison: both means over seeds, their difference, and its interval; – where a seed is missing."""
    ladders, lines = ladders_of(rows, [*FIGURES]), []

    def mean(method: str, own: Difference) -> str:
        return shown(fmean(ladder_values(ladders[method], own.column, own.kl).values()))

    for own in differences(rows):
        told = ["–"] * 4
        if math.isfinite(own.difference):
            interval = f"{shown(own.low, '+')} to {shown(own.high, '+')}"
            difference = f"{shown(own.difference, '+')} ({interval})"
            told = [mean("nca", own), mean(own.method, own), difference, f"{own.p_holm:.2g}"]
        seeds = f"{own.n}" + (f", {own.missing} missing" if own.missing else "")
        lines.append([FIGURES[own.column], f"{own.kl:g}", NAMES[own.method], *told, seeds])
    return markdown(["figure", "KL", "method", "NCA", "method's", "difference from NCA", "p, Holm", "seeds"], lines)


def shown(value: float, sign: str = "") -> str:
    """With three digits and a true minus."""
    return f"{value:{sign}.3f}".replace("-", "−")


def answer(found: Sequence[Difference], method: str) -> str:
    """What the plan's rule says of one method: `lead`, else `beta`, else `undecided`."""
    own = [one for one in found if one.method == method and one.column == "reward"]
    if own and all(one.difference < 0 and one.p_holm < 0.05 for one in own):
        return "lead"
    return "beta" if own and all(one.low >= -NEAR and one.high <= NEAR for one in own) else "undecided"


def verdicts(rows: Sequence[dict[str, str]]) -> str:
    """What the plan's rule says of each method, and the differences that it goes by."""
    found, told = differences(rows), []
    for method in ("infonca", "dpo"):
        gaps = " and ".join(
            f"{shown(own.difference, '+')} ± {shown(own.high - own.difference)} at {own.kl:g}"
            for own in found if own.method == method and own.column == "reward"
        )  # fmt: skip
        line = f"- **{NAMES[method]}**: {SAID[answer(found, method)]}. Reward minus NCA's is {gaps} nats."
        told.append(textwrap.fill(line, 118, subsequent_indent="  ", break_on_hyphens=False))
    return "\n".join(told) + "\n"


def charts(rows: Sequence[dict[str, str]]) -> list[Chart]:
    """Figures against KL: means over seeds between the ends of runs, where every ladder has them."""
    ladders, kls = ladders_of(rows, [*FIGURES]), [quarter / 4 for quarter in range(1, 17)]
    found = []
    for figure, title in (("reward", "Reward on test prompts"), ("train_logratio_best", "Best training completion")):
        series = []
        for name, own in ladders.items():
            values = {kl: list(ladder_values(own, figure, kl).values()) for kl in kls}
            means = {kl: mean_and_interval(each) for kl, each in values.items() if len(each) == len(own)}
            bars = [(mean.low, mean.high) for mean in means.values()]
            series.append(Series(NAMES[name], [*means], [mean.mean for mean in means.values()], y_bars=bars))
        label = "reward" if figure == "reward" else "log π/π_ref, nats"
        found.append(Chart(title, series, "KL(π‖π_ref) on test prompts, nats", label))
    return found


def tell(root: Path = ROOT) -> None:
    """Write the table, the sentences and the picture of docs/study and of the README under `root`."""
    rows = read_csv(TABLE)
    parts = {"words table": comparisons(rows), "words verdicts": verdicts(rows)}
    for page, names in PAGES.items():
        text, path = (ROOT / page).read_text(encoding="utf-8"), root / page
        for name in names:
            text = with_block(text, name, parts[name])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    write_png(charts(rows), "SmolLM2, six seeds: between the ends of runs", root / "docs/study/words.png")


def main(arguments: Sequence[str]) -> int:
    what, *paths = arguments or [""]
    given = [Path(path) for path in paths]
    if what == "run":
        config, table = given
        return run(yaml.safe_load(config.read_text(encoding="utf-8")), table)
    if what == "study":
        return study(yaml.safe_load(CONFIG.read_text(encoding="utf-8")), TABLE)
    if what == "pilots":
        code = run(pilots(yaml.safe_load(CONFIG.read_text(encoding="utf-8"))), PILOTS_TABLE)
        rows = read_csv(PILOTS_TABLE)
        for method in PILOTS if code == 0 else ():
            own = [row for row in rows if row["seed"] == "101" and row["method"] == method]
            print(f"{method}: {betas_at(RUNGS, [(float(row['kl']), float(row['beta'])) for row in own])}")
        return code
    if what == "compare":
        print(comparisons(read_csv(*given or [TABLE])), end="")
        return 0
    if what == "tell":
        tell()
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
