"""What the quickstart logged last → docs/quickstart.csv, and from it the figures in the README.

    python scripts/quickstart_results.py [RUN]        (runs/quickstart by default)

In the README `<!-- quickstart; held-out; rewards/rank_1 --><!-- -->` becomes a figure, `training` one of the last step.
"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nca_align.evaluation.intervals import Estimate
from nca_align.evaluation.training_log import last_evaluation
from nca_align.store.files import write_csv
from study_results import ROOT, fill_pages, read_told


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


if __name__ == "__main__":
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs/quickstart"
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    write_csv(ROOT / "docs/quickstart.csv", list(rows(state["log_history"])))
    fill_pages([ROOT / "README.md"], read_told(ROOT / "docs/study"))
