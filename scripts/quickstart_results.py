"""What the quickstart logged last → docs/quickstart.csv, and from it the table in the README.

python scripts/quickstart_results.py [RUN]        (runs/quickstart by default)
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nca_align.evaluation.intervals import Estimate
from nca_align.evaluation.training_log import last_evaluation
from nca_align.pages.text_tables import markdown
from nca_align.store.files import read_csv, write_csv

ROOT = Path(__file__).resolve().parents[1]
# rows of the README's table: (of which prompts, figure in the log) of each column
COLUMNS = ("before", "after", "gain", "gain at the same length")
TOLD: dict[str, list[tuple[str, str]]] = {
    "reward of the model's answers": [
        ("held-out", f"generation/{name}") for name in ("reference_reward", "reward", "gain", "gain_same_length")
    ],
}


def rows(log: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row a metric of the last evaluation, and of the last step that was logged; and the seconds of the training.

    What was logged with its error has a 95 % interval over prompts. transformers counts the seconds of the last start
    alone: they are the whole of a run that nothing interrupted.
    """
    held_out = dict(last_evaluation(log) or {})
    held_out |= next((line for line in reversed(log) if "eval_generation/reward" in line), {})
    training = next(line for line in reversed(log) if "logratios/rank_1" in line)
    for label, line, prefix in (("held-out", held_out, "eval_"), ("training", training, "")):
        for name, value in line.items():
            if name.startswith(prefix) and "/" in name and not name.endswith("_error"):
                row = {"label": label, "step": line["step"], "figure": name.removeprefix(prefix), "mean": value}
                prompts = line.get("eval_generation/prompts" if "generation/" in name else "eval_prompts", 0)
                _, low, high, _ = Estimate(value, line.get(f"{name}_error", math.nan)).interval(int(prompts))
                yield row | ({"low": low, "high": high} if math.isfinite(high) else {"low": None, "high": None})
    for line in [line for line in log if "train_runtime" in line][-1:]:
        runtime = {"label": "training", "step": line["step"], "figure": "train_runtime", "mean": line["train_runtime"]}
        yield runtime | {"low": None, "high": None}


def table(figures: list[dict[str, Any]]) -> str:
    """The README's table, of the rows of docs/quickstart.csv; ± is a 95 % interval over prompts."""
    known = {(row["label"], row["figure"]): row for row in figures}
    rows = []
    for name, keys in TOLD.items():
        rows.append([name, *(_shown(known[key]) for key in keys)])
    return markdown(["", *COLUMNS], rows)


def _shown(row: dict[str, Any]) -> str:
    text = f"{float(row['mean']):.2f}".replace("-", "−")
    return text + (f" ± {float(row['high']) - float(row['mean']):.2f}" if row["high"] not in ("", None) else "")


def with_block(page: str, name: str, text: str) -> str:
    """`page` with the lines of `text` between `<!-- NAME -->` and the next `<!-- end -->`."""
    before, mark, rest = page.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    assert mark, name
    assert end, name
    return f"{before}{mark}{text}{end}{after}"


if __name__ == "__main__":
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs/quickstart"
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    write_csv(ROOT / "docs/quickstart.csv", list(rows(state["log_history"])))
    readme = ROOT / "README.md"
    told = with_block(readme.read_text(encoding="utf-8"), "quickstart", table(read_csv(ROOT / "docs/quickstart.csv")))
    readme.write_text(told, encoding="utf-8")
