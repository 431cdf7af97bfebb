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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datasets.exceptions import DatasetsError
from jinja2 import TemplateError

from ...errors import UserError, as_user_error, nearest, one_line
from ...evaluation.intervals import Estimate
from ...models.loading import ModelSource
from ...models.policy import as_reference
from ...options import Dtype, dtype_option, option, require_at_least_1
from ...pages.terminal import print_rows
from ...store.fingerprints import data_fingerprint
from ...store.hub import go_offline_without_network
from .kept_results import KeptResults
from .references import require_reference


@dataclass(kw_only=True)
class HarnessOptions:
    """Options of `nca-align evaluate --lm_eval`."""

    lm_eval: str = option("tasks, groups or patterns, with commas between; `lm_eval ls tasks` lists them")
    model_name_or_path: str = option("the aligned model, or an adapter's folder")
    reference: str | None = option("the model before training; by default what the adapter was trained from", None)
    include_path: str | None = option("a folder of tasks of your own, as YAML files", None)
    output: str | None = option("JSON file of the results; those that it has already are not computed again", None)
    num_fewshot: int | None = option("examples before a question; by default the task's", None)
    limit: float | None = option("questions a task at most, or below 1 a share of them", None)
    apply_chat_template: bool = option("ask by the model's chat template", False)
    confirm_run_unsafe_code: bool = option("run code that the model writes (humaneval)", False)
    dtype: Dtype = dtype_option()
    trust_remote_code: bool = option("run code that comes with a model", False)
    batch_size: int = option("questions a batch", 8)

    def __post_init__(self):
        if not [name for name in self.lm_eval.split(",") if name.strip()]:
            raise UserError(f"`lm_eval` is {self.lm_eval!r}; it must name tasks, with commas between")
        require_at_least_1(self, "batch_size")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"`num_fewshot` is {self.num_fewshot}; it must be 0 or more")
        if self.limit is not None and not self.limit > 0:
            raise UserError(f"`limit` is {self.limit}; it must be above 0")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise UserError(
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
    base: Estimate
    aligned: Estimate
    change: Estimate


def harness(options: HarnessOptions) -> list[Line]:
    """Run every task for the base and the aligned model, print the table, and return its lines.

    Killed and started again with the same `output` it goes on with the next task.

    Raises:
        UserError: a model or lm_eval is missing, a task is unknown, what a task needs is not here or can't be read, or
            `output` can't be written.
    """
    sources = _sources(options)
    aligned, reference = sources["model_name_or_path"], sources.get("reference")
    require_reference(aligned, reference)
    known = KeptResults(options.output, _is_result)
    evaluate, manager = _import_lm_eval(options)
    tasks = load_tasks(manager, options)

    settings = {name: getattr(options, name) for name in ("num_fewshot", "limit", "apply_chat_template", "dtype")}
    sides = [(reference or aligned, reference is None), (aligned, False)]
    found: list[dict[str, Any]] = []
    for source, adapter_off in sides:
        weights = f"base of {source.fingerprint()}" if adapter_off else source.fingerprint()
        keys = {name: json.dumps([name, weights, fingerprint, settings]) for name, fingerprint in tasks.items()}
        missing = [name for name in tasks if keys[name] not in known]
        if missing:
            known.check_writable()
        with _language_model(source, adapter_off, options) if missing else nullcontext() as model:
            for name in missing:
                with as_user_error(f"`lm_eval` {name}", also=(TemplateError,)):
                    results = evaluate(
                        model=model, tasks=[name], task_manager=manager, num_fewshot=options.num_fewshot,
                        limit=options.limit, apply_chat_template=options.apply_chat_template,
                        confirm_run_unsafe_code=options.confirm_run_unsafe_code, batch_size=options.batch_size,
                    )  # fmt: skip
                known[keys[name]] = plain_results(results)
        found.append({task: figures for name in tasks for task, figures in known[keys[name]].items()})
    lines = compare_tasks(*found)
    base = options.reference or aligned.path
    print_tasks(lines, f"{Path(base).name} → {Path(aligned.adapter or aligned.path).name}")
    return lines


def _sources(options: HarnessOptions) -> dict[str, ModelSource]:
    """The models by their options; refuses one that isn't there, or lacks a chat template that is asked for."""
    sources = {}
    for key in ("model_name_or_path", "reference"):
        if (name := getattr(options, key)) is None:
            continue
        sources[key] = ModelSource.of(name, key=key, trust_remote_code=options.trust_remote_code)
        if sources[key].load_tokenizer().chat_template is None and options.apply_chat_template:
            raise UserError(
                f"`apply_chat_template` is true, but the tokenizer of `{key}` {name} has no chat template. Leave it "
                "out, or give the tokenizer one."
            )
    return sources


def _is_result(entry: Any) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(task, dict) and set(task) == {"questions", "figures"} for task in entry.values()
    )


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
        UserError: a task is unknown, its data is not here and can't be downloaded, or can't be read, or it would run
            code unasked.
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
                    f"`lm_eval` names {name}, which needs something that is not here ({one_line(error)[:300]}). Run it "
                    "once where that can be downloaded, or take a task whose data is here (`include_path`)."
                ) from error
            except (DatasetsError, TemplateError, LookupError, TypeError) as error:
                why = one_line(error.__cause__ or error)[:300]
                raise UserError(
                    f"`lm_eval` names {name}, whose questions can't be read ({why}); mend its YAML file, or its data"
                ) from error
            for leaf in leaves.values():
                if getattr(leaf, "UNSAFE_CODE", False) and not options.confirm_run_unsafe_code:
                    raise UserError(
                        f"`lm_eval` names {name}, which runs code that the model writes. Where that can do no harm, "
                        "add `--confirm_run_unsafe_code true`."
                    )
            tasks[name] = data_fingerprint(
                {"task": task, "config": leaf.dump_config(), "questions": data_fingerprint(leaf.eval_docs)}
                for task, leaf in leaves.items()
            )
    return tasks


@contextmanager
def _language_model(source: ModelSource, adapter_off: bool, options: HarnessOptions) -> Iterator[Any]:
    """A model as lm_eval takes it, or what its adapter was trained from."""
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = source.load_policy(options.dtype), source.load_tokenizer()
    with as_reference(model) if adapter_off else nullcontext():
        yield HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)


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


def compare_tasks(base: dict[str, Any], aligned: dict[str, Any]) -> list[Line]:
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


def print_tasks(lines: list[Line], title: str) -> None:
    """The table, with a standard error after each ±."""
    rows = [
        (line.task, line.metric, f"{line.questions}", line.base.text(), line.aligned.text(), line.change.text("+.3f"))
        for line in lines
    ]
    print_rows(("task", "metric", "n", "base", "aligned", "change"), rows, 2, title)
