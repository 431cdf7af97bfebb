"""What the quickstart logged last → docs/quickstart.csv, and from it the figures in the README.

    python scripts/quickstart_results.py [RUN]        (runs/quickstart by default)

In the README `<!-- quickstart; held-out; rewards/rank_1 --><!-- -->` becomes a figure, `training` one of the last step.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nca_align.evaluation.training_log import last_evaluation
from nca_align.store.files import write_csv
from study_results import ROOT, fill_pages, read_told


def rows(log: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row a metric of the last evaluation, and of the last step that was logged; and the seconds of the training.

    transformers counts those of the last start alone: they are the whole of a run that nothing interrupted.
    """
    held_out = last_evaluation(log) or {}
    training = next(line for line in reversed(log) if "logratios/rank_1" in line)
    for label, line, prefix in (("held-out", held_out, "eval_"), ("training", training, "")):
        for name, value in line.items():
            if name.startswith(prefix) and "/" in name:
                yield {"label": label, "step": line["step"], "figure": name.removeprefix(prefix), "mean": value}
    for line in [line for line in log if "train_runtime" in line][-1:]:
        yield {"label": "training", "step": line["step"], "figure": "train_runtime", "mean": line["train_runtime"]}


if __name__ == "__main__":
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "runs/quickstart"
    state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
    write_csv(ROOT / "docs/quickstart.csv", list(rows(state["log_history"])))
    fill_pages([ROOT / "README.md"], read_told(ROOT / "docs/study"))
