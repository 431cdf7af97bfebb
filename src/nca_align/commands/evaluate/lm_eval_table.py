"""The table of `nca-align evaluate --lm_eval`: what is kept of lm_eval's results, and both models side by side."""

import math
import statistics
from typing import Any, NamedTuple

from rich.console import Console

from ...evaluation.intervals import Estimate
from ...pages.terminal import print_rows


class Line(NamedTuple):
    """One line of the table: a figure of a task for both models.

    Args:
        task, metric: as lm_eval names them; the metric with its filter, where it has one.
        questions: how many.
        base, aligned: the figure and its standard error; NaN where lm_eval gives none.
        change: aligned − base, and its standard error over the same questions (paired), NaN where the figure is no
            mean over questions.
    """

    task: str
    metric: str
    questions: int
    base: Estimate
    aligned: Estimate
    change: Estimate


def plain_results(results: dict[str, Any]) -> dict[str, Any]:
    """Of lm_eval's results, by task: number of questions, figures with their errors, and the questions' own values."""
    plain: dict[str, Any] = {}
    for task, entry in results["results"].items():
        figures = {}
        for key, value in entry.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = entry.get(f"{metric}_stderr,{kind}")
            # A group's figure is put together from its tasks' and has no questions of its own.
            samples = {
                str(one["doc_id"]): float(one[metric])
                for one in results["samples"].get(task, [])
                if one["filter"] == kind and isinstance(one.get(metric), (int, float))
            }
            figures[key] = {
                "value": float(value), "error": float(error) if isinstance(error, (int, float)) else None,
                "questions": samples,
            }  # fmt: skip
        plain[task] = {"questions": entry.get("sample_len", 0), "figures": figures}
    return plain


def compare(base: dict[str, Any], aligned: dict[str, Any]) -> list[Line]:
    """Both models' figures, line by line, with the change and its error over the same questions.

        error = std_i(aligned_i − base_i) / √n

    which is smaller than the two errors suggest where most questions come out alike.

    Args:
        base, aligned: by task `questions` and `figures`, each with `value`, `error` and its `questions`.
    """
    lines = []
    for task, entry in aligned.items():
        for key, now in entry["figures"].items():
            before = base[task]["figures"][key]
            metric, _, kind = key.partition(",")
            pairs = [
                (now["questions"][i], before["questions"][i]) for i in now["questions"] if i in before["questions"]
            ]
            means = all(
                figure["questions"] and math.isclose(statistics.fmean(figure["questions"].values()), figure["value"])
                for figure in (now, before)
            )
            error = math.nan
            if means and len(pairs) == len(now["questions"]) > 1:
                error = statistics.stdev(p - q for p, q in pairs) / math.sqrt(len(pairs))
            name = metric if kind == "none" else f"{metric} ({kind})"
            change = Estimate(now["value"] - before["value"], error)
            lines.append(Line(task, name, entry["questions"], _estimate(before), _estimate(now), change))
    return lines


def _estimate(figure: dict[str, Any]) -> Estimate:
    return Estimate(figure["value"], math.nan if figure["error"] is None else figure["error"])


def print_table(lines: list[Line], title: str, console: Console | None = None) -> None:
    """The table, with a standard error after each ±."""
    rows = [
        (line.task, line.metric, f"{line.questions}", line.base.text(), line.aligned.text(), line.change.text("+.3f"))
        for line in lines
    ]
    print_rows(("task", "metric", "n", "base", "aligned", "change"), rows, 2, title, console=console)
