"""`nca-align evaluate --lm_eval`: tasks of lm-evaluation-harness for the base and the aligned model, side by side.

lm_eval is an extra (`pip install 'nca-align[lm-eval]'`) and imported only here, once the options are known to be sound.
"""

import json
import logging
import math
import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.table import Table

from .arguments import nearest
from .errors import UserError, one_line
from .files import replacing
from .hub import go_offline_without_network
from .policies import adapter_base, as_reference, is_adapter, load_policy, load_tokenizer
from .provenance import data_fingerprint, weights_fingerprint
from .smollm2 import resolve_model


@dataclass(kw_only=True)
class HarnessOptions:
    """Options of `nca-align evaluate --lm_eval`."""

    lm_eval: str = field(
        metadata={"help": "tasks, groups or patterns, with commas between; `lm_eval ls tasks` lists them"}
    )
    model_name_or_path: str = field(metadata={"help": "the aligned model, or an adapter's folder"})
    reference: str | None = field(
        default=None, metadata={"help": "the model before training; by default what the adapter was trained from"}
    )
    include_path: str | None = field(default=None, metadata={"help": "a folder of tasks of your own, as YAML files"})
    output: str | None = field(
        default=None, metadata={"help": "JSON file of the results; those that it has already are not computed again"}
    )
    num_fewshot: int | None = field(
        default=None, metadata={"help": "examples before a question; by default the task's"}
    )
    limit: float | None = field(default=None, metadata={"help": "questions a task at most, or below 1 a share of them"})
    apply_chat_template: bool = field(default=False, metadata={"help": "ask by the model's chat template"})
    confirm_run_unsafe_code: bool = field(
        default=False, metadata={"help": "run code that the model writes (humaneval)"}
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto", metadata={"help": "auto: bfloat16 on a GPU, float32 on a CPU"}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with a model"})
    batch_size: int = field(default=8, metadata={"help": "questions a batch"})

    def __post_init__(self):
        if not [name for name in self.lm_eval.split(",") if name.strip()]:
            raise ValueError(f"`lm_eval` is {self.lm_eval!r}; it must name tasks, with commas between")
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` is {self.batch_size}; it must be at least 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"`num_fewshot` is {self.num_fewshot}; it must be 0 or more")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"`limit` is {self.limit}; it must be above 0")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ValueError(
                f"`include_path` is {self.include_path!r}, and there is no such folder; give one of YAML files"
            )


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
    base: tuple[float, float]
    aligned: tuple[float, float]
    change: tuple[float, float]


def harness(options: HarnessOptions) -> list[Line]:
    """Run every task for the base and the aligned model, print the table, and return its lines.

    Killed and started again with the same `output` it goes on with the next task.

    Raises:
        UserError: lm_eval is missing, a task is unknown, or what a task needs is not here.
    """
    policy = resolve_model(options.model_name_or_path)
    if options.reference is None and not is_adapter(policy):
        raise UserError(
            f"`reference` is missing: `model_name_or_path` {options.model_name_or_path} is no adapter, whose base it "
            "would be; name the model before training"
        )
    evaluate, manager = _import_lm_eval(options)
    tasks = load_tasks(manager, options)

    path = Path(options.output) if options.output is not None else None
    known: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}
    settings = {name: getattr(options, name) for name in ("num_fewshot", "limit", "apply_chat_template", "dtype")}
    found: dict[str, dict[str, Any]] = {}
    for side in ("base", "aligned"):
        alone = side == "aligned" or options.reference is not None  # else the adapter's model, with the adapter off
        weights = weights_fingerprint(policy if side == "aligned" else resolve_model(options.reference or policy))
        keys = {
            name: json.dumps([name, weights if alone else f"base of {weights}", fingerprint, settings])
            for name, fingerprint in tasks.items()
        }
        missing = [name for name in tasks if keys[name] not in known]
        with _language_model(options, side) if missing else nullcontext() as model:
            for name in missing:
                known[keys[name]] = _plain(
                    evaluate(
                        model=model, tasks=[name], task_manager=manager, num_fewshot=options.num_fewshot,
                        limit=options.limit, apply_chat_template=options.apply_chat_template,
                        confirm_run_unsafe_code=options.confirm_run_unsafe_code, batch_size=options.batch_size,
                    )
                )  # fmt: skip
                if path is not None:  # after each task, and whole: a kill loses the one in work
                    with replacing(path) as file:
                        file.write(json.dumps(known, indent=1) + "\n")
        found[side] = {task: figures for name in tasks for task, figures in known[keys[name]].items()}
    lines = compare(found["base"], found["aligned"])
    base = options.reference or adapter_base(policy)
    print_table(lines, f"{Path(base).name} → {Path(policy).name}")
    return lines


def _import_lm_eval(options: HarnessOptions):
    """lm_eval's `simple_evaluate`, and its index of tasks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            "`lm_eval` needs the package of that name, which is not installed here "
            f"({one_line(error)}): pip install 'lm-eval[hf]==0.4.13'"
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return simple_evaluate, TaskManager(include_path=options.include_path)


def load_tasks(manager: Any, options: HarnessOptions) -> dict[str, str]:
    """The tasks that `lm_eval` names, each with a hash of its configuration and questions; before any model is loaded.

    Raises:
        UserError: a task is unknown, its data is not here and can't be downloaded, or it would run code unasked.
    """
    go_offline_without_network()
    tasks: dict[str, str] = {}
    for asked in filter(None, map(str.strip, options.lm_eval.split(","))):
        names = manager.match_tasks([asked])
        if not names:
            raise UserError(
                f"`lm_eval` names {asked!r}, and there is no such task{nearest(asked, manager.all_tasks)}; `lm_eval ls "
                "tasks` lists them, and `include_path` adds your own"
            )
        for name in names:
            try:
                leaves = manager.load([name])["tasks"]
            except (OSError, ImportError, ValueError) as error:
                raise UserError(
                    f"`lm_eval` names {name}, and what that needs is not here ({one_line(error)[:300]}); run it once "
                    "where it can be downloaded, or take a task whose data is here (`include_path`)"
                ) from error
            for leaf in leaves.values():
                if getattr(leaf, "UNSAFE_CODE", False) and not options.confirm_run_unsafe_code:
                    raise UserError(
                        f"`lm_eval` names {name}, which runs code that the model writes; in a place where that can do "
                        "no harm add `--confirm_run_unsafe_code true`"
                    )
            tasks[name] = data_fingerprint(
                {"task": task, "config": leaf.dump_config(), "questions": data_fingerprint(leaf.eval_docs)}
                for task, leaf in leaves.items()
            )
    return tasks


@contextmanager
def _language_model(options: HarnessOptions, side: str) -> Iterator[Any]:
    """The base or the aligned model, as lm_eval takes it."""
    from lm_eval.models.huggingface import HFLM

    name = (side == "base" and options.reference) or options.model_name_or_path
    model = load_policy(resolve_model(name), options.dtype, options.trust_remote_code, as_trained=True)
    tokenizer = load_tokenizer(resolve_model(name), options.trust_remote_code)
    with as_reference(model) if side == "base" and options.reference is None else nullcontext():
        yield HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)


def _plain(results: dict[str, Any]) -> dict[str, Any]:
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
            change = (now["value"] - before["value"], error)
            lines.append(Line(task, name, entry["questions"], _estimate(before), _estimate(now), change))
    return lines


def _estimate(figure: dict[str, Any]) -> tuple[float, float]:
    return figure["value"], math.nan if figure["error"] is None else figure["error"]


def print_table(lines: list[Line], title: str, console: Console | None = None) -> None:
    """The table, with a standard error after each ±."""

    def text(figure: tuple[float, float], form: str = ".3f") -> str:
        value, error = figure
        return f"{value:{form}}" + ("" if math.isnan(error) else f" ± {error:.3f}")

    table = Table(box=None, pad_edge=False, title=title)
    for name in ("task", "metric", "n", "base", "aligned", "change"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for line in lines:
        table.add_row(
            line.task, line.metric, f"{line.questions}", text(line.base), text(line.aligned), text(line.change, "+.3f")
        )
    (console or Console()).print(table)
