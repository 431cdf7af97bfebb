"""`nca-align evaluate --lm_eval`: what is run, what is kept, the table, and what is said where something is missing.

`make check-lm-eval` runs this file in an environment that has lm_eval, and so the class at its end as well.
"""

import importlib.util
import json
import math
import re
import shutil
import sys
import types
from contextlib import contextmanager, nullcontext
from pathlib import Path

import jinja2
import pytest
from datasets import load_dataset
from jinja2 import TemplateError
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from nca_align.commands.evaluate import lm_eval_harness as harness_module
from nca_align.commands.evaluate.command import main
from nca_align.commands.evaluate.lm_eval_harness import (
    HarnessOptions,
    Line,
    compare_tasks,
    harness,
    load_tasks,
    plain_results,
    print_tasks,
)
from nca_align.errors import UserError
from nca_align.evaluation.intervals import Estimate

ROOT = Path(__file__).resolve().parents[1]
TASKS = "tests/lm_eval_tasks"


@pytest.fixture(scope="module")
def adapter(model_dir, tokenizer, tmp_path_factory) -> str:
    """An adapter on the tiny model that changes what it says."""
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def results(values: list[float], task: str = "opposites") -> dict:
    """What lm_eval returns for a task with a figure that is a mean, and one whose parts are unknown."""
    mean = sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return {
        "results": {
            task: {"name": task, "alias": task, "sample_len": len(values), "acc,none": mean, "acc_stderr,none": error,
                   "f1,none": 0.5, "f1_stderr,none": "N/A"},
        },
        "samples": {task: [{"doc_id": i, "filter": "none", "acc": value} for i, value in enumerate(values)]},
    }  # fmt: skip


class TestTable:
    def figures(self, values: list[float]) -> dict:
        return plain_results(results(values))

    def test_the_figures_are_lm_evals_and_the_changes_error_is_paired(self):
        before, after = [0.0, 0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0, 1.0]
        acc, f1 = compare_tasks(self.figures(before), self.figures(after))
        assert (acc.task, acc.metric, acc.questions) == ("opposites", "acc", 5)
        assert acc.base == (0.4, results(before)["results"]["opposites"]["acc_stderr,none"])
        assert acc.aligned == (0.8, results(after)["results"]["opposites"]["acc_stderr,none"])
        differences = [a - b for a, b in zip(after, before, strict=True)]
        variance = sum((d - 0.4) ** 2 for d in differences) / 4
        assert acc.change == pytest.approx((0.4, math.sqrt(variance / 5)))
        assert f1.base[0] == 0.5
        assert all(math.isnan(error) for _, error in (f1.base, f1.aligned, f1.change))

    def test_what_comes_out_alike_has_no_error_of_its_change(self):
        """Each figure is uncertain by 0.2, and yet their difference is not: it is the same questions."""
        line, _ = compare_tasks(self.figures([0.0, 1.0, 1.0]), self.figures([0.0, 1.0, 1.0]))
        assert line.base[1] > 0.3
        assert line.change == (0.0, 0.0)

    def test_no_paired_error_where_the_figure_is_no_mean_of_the_questions(self):
        base, aligned = self.figures([0.0, 1.0, 1.0]), self.figures([1.0, 1.0, 1.0])
        aligned["opposites"]["figures"]["acc,none"]["value"] = 0.9
        line, _ = compare_tasks(base, aligned)
        assert line.change[0] == pytest.approx(0.9 - 2 / 3)
        assert math.isnan(line.change[1])

    def test_it_fits_a_terminal_of_80_columns(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        known = (0.4, 0.013), (0.45, 0.013), (0.05, 0.008)
        unknown = ((mean, math.nan) for mean in (0.4, 0.3, -0.1))
        print_tasks(
            [
                Line("gsm8k", "exact_match (flexible-extract)", 1319, *map(Estimate._make, known)),
                Line("bbh", "exact_match", 6511, *map(Estimate._make, unknown)),
            ],
            "base → aligned",
        )
        text = capsys.readouterr().out
        assert all(len(line) <= 80 for line in text.splitlines())
        assert re.search(r"gsm8k +exact_match +1319 +0.400 ± 0.013 +0.450 ± 0.013 +\+0.050 ± 0.008", text)
        assert re.search(r"bbh +exact_match +6511 +0.400 +0.300 +-0.100", text)


class TestGoingOn:
    @pytest.fixture
    def ran(self, monkeypatch):
        """What was evaluated, as (side, task); both figures of a task differ by side."""
        calls: list[tuple[str, str]] = []

        @contextmanager
        def model(source, adapter_off, options):
            yield "base" if adapter_off or source.key == "reference" else "aligned"

        def evaluate(model, tasks, **settings):
            calls.append((model, tasks[0]))
            if tasks[0] == "killed":
                raise KeyboardInterrupt
            return results([0.0, 1.0, float(model == "aligned")], tasks[0])

        monkeypatch.setattr(harness_module, "_language_model", model)
        monkeypatch.setattr(harness_module, "_import_lm_eval", lambda options: (evaluate, None))
        monkeypatch.setattr(
            harness_module, "load_tasks", lambda manager, options: {name: name for name in options.lm_eval.split(",")}
        )
        return calls

    def test_what_is_there_is_not_run_again(self, ran, adapter, tmp_path, capsys):
        settings = {"model_name_or_path": adapter, "output": str(tmp_path / "table.json")}
        with pytest.raises(KeyboardInterrupt):
            harness(HarnessOptions(lm_eval="a,killed", **settings))
        assert ran == [("base", "a"), ("base", "killed")]
        lines = harness(HarnessOptions(lm_eval="a,b", **settings))
        assert ran[2:] == [("base", "b"), ("aligned", "a"), ("aligned", "b")]
        assert harness(HarnessOptions(lm_eval="a,b", **settings)) == lines
        assert len(ran) == 5
        assert [(line.task, line.metric) for line in lines] == [("a", "acc"), ("a", "f1"), ("b", "acc"), ("b", "f1")]
        assert lines[0].change[0] == pytest.approx(1 / 3)
        assert "aligned" in capsys.readouterr().out

    @pytest.mark.parametrize("change", [{"limit": 5.0}, {"num_fewshot": 1}, {"apply_chat_template": True}])
    def test_other_settings_are_other_figures(self, ran, adapter, tmp_path, change):
        settings = {"lm_eval": "a", "model_name_or_path": adapter, "output": str(tmp_path / "table.json")}
        harness(HarnessOptions(**settings))
        harness(HarnessOptions(**settings, **change))
        assert ran == [("base", "a"), ("aligned", "a")] * 2
        assert len(json.loads((tmp_path / "table.json").read_text())) == 4

    def test_a_base_that_is_named_is_run_once_for_two_adapters(self, ran, adapter, model_dir, tmp_path):
        settings = {"lm_eval": "a", "reference": model_dir, "output": str(tmp_path / "table.json")}
        harness(HarnessOptions(model_name_or_path=adapter, **settings))
        harness(HarnessOptions(model_name_or_path=model_dir, **settings))  # the base itself counts as known
        assert ran == [("base", "a"), ("aligned", "a")]


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"lm_eval": " ,"}, "`lm_eval` is ' ,'; it must name tasks"),
            ({"batch_size": 0}, "`batch_size` is 0; it must be at least 1"),
            ({"num_fewshot": -1}, "`num_fewshot` is -1; it must be 0 or more"),
            ({"limit": 0.0}, "`limit` is 0.0; it must be above 0"),
            ({"include_path": "nowhere"}, "`include_path` is 'nowhere', and there is no such folder"),
        ],
    )
    def test_options(self, settings, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            HarnessOptions(**({"lm_eval": "gsm8k", "model_name_or_path": "m"} | settings))

    def test_a_whole_model_needs_its_base_named(self, model_dir):
        with pytest.raises(UserError, match=r"`reference` is missing. .* is a whole model, not an adapter"):
            harness(HarnessOptions(lm_eval="gsm8k", model_name_or_path=model_dir))

    @pytest.mark.parametrize("key", ["model_name_or_path", "reference"])
    def test_a_model_that_is_not_there(self, key, model_dir):
        settings = {"model_name_or_path": model_dir, "reference": model_dir, key: "nowhere"}
        with pytest.raises(UserError, match=f"^`{key}` nowhere could not be loaded"):
            harness(HarnessOptions(lm_eval="gsm8k", **settings))
        with pytest.raises(UserError, match=r"^`model_name_or_path` nowhere could not be loaded"):
            harness(HarnessOptions(lm_eval="gsm8k", model_name_or_path="nowhere"))

    @pytest.mark.parametrize("key", ["model_name_or_path", "reference"])
    def test_a_chat_template_that_a_model_has_not(self, key, model_dir, tmp_path):
        shutil.copytree(model_dir, tmp_path / "text")
        (tmp_path / "text" / "chat_template.jinja").unlink()
        settings = {"model_name_or_path": model_dir, "reference": model_dir, key: str(tmp_path / "text")}
        message = f"`apply_chat_template` is true, but the tokenizer of `{key}` {tmp_path}/text has no chat template"
        with pytest.raises(UserError, match=message):
            harness(HarnessOptions(lm_eval="gsm8k", apply_chat_template=True, **settings))

    @pytest.mark.parametrize(
        ("place", "content", "message"),
        [
            ("gone/x.json", None, "whose folder does not exist"),
            (".", None, "which holds no table of `nca-align evaluate`"),
            ("x.json", "{broken", "which holds no table of `nca-align evaluate`; choose another file"),
            ("x.json", "[1]", "which holds no table"),
            ("x.json", '{"a": 1}', "which holds no table"),
            ("x.json", '{"a": {"policy": "b", "prompts": 3}}', "which holds no table"),
        ],
    )
    def test_an_output_that_can_hold_no_table(self, place, content, message, adapter, tmp_path, monkeypatch):
        monkeypatch.setattr(harness_module, "load_tasks", lambda *args: pytest.fail("worked before it looked"))
        if content is not None:
            (tmp_path / place).write_text(content)
        with pytest.raises(UserError, match=f"`output` is '{re.escape(str(tmp_path / place))}', {message}"):
            harness(HarnessOptions(lm_eval="a", model_name_or_path=adapter, output=str(tmp_path / place)))
        assert content is None or (tmp_path / place).read_text() == content

    @pytest.mark.parametrize(
        "error",
        [ValueError("Sample larger than population or is negative"), TemplateError("no system role")],
    )
    def test_what_lm_eval_refuses(self, error, adapter, tmp_path, monkeypatch, capsys):
        def evaluate(**settings):
            raise error

        monkeypatch.setattr(harness_module, "_language_model", lambda *about: nullcontext())
        monkeypatch.setattr(harness_module, "_import_lm_eval", lambda options: (evaluate, None))
        monkeypatch.setattr(harness_module, "load_tasks", lambda manager, options: {"opposites": "x"})
        flags = ["--lm_eval", "opposites", "--model_name_or_path", adapter, "--output", str(tmp_path / "x.json")]
        assert main(flags) == 2
        said = f"error: `lm_eval` opposites failed: {error} (NCA_ALIGN_TRACEBACK=1 shows where)"
        assert said in capsys.readouterr().err

    def test_without_the_package(self, adapter, monkeypatch):
        monkeypatch.setitem(sys.modules, "lm_eval", None)
        with pytest.raises(UserError, match=r"not installed here .*: pip install 'lm-eval\[hf\]==0.4.13'"):
            harness(HarnessOptions(lm_eval="gsm8k", model_name_or_path=adapter))

    def test_it_is_imported_only_when_it_is_needed(self):
        assert "lm_eval" not in vars(harness_module)

    @pytest.fixture
    def manager(self, tmp_path):
        """An index of tasks, most of which can't be loaded; the errors are the real ones."""

        def load(names):
            if names == ["broken"]:
                (tmp_path / "x.jsonl").write_text('{"a": broken')
                return load_dataset("json", data_files=str(tmp_path / "x.jsonl"))
            if names == ["column"]:
                return jinja2.Template("{{question.strip()}}", undefined=jinja2.StrictUndefined).render(other=1)
            if names == ["gsm8k"]:
                return load_dataset("openai/gsm8k", "main")  # the real error, since the tests are offline
            return {"tasks": {"humaneval": types.SimpleNamespace(UNSAFE_CODE=True)}}

        known = ["gsm8k", "humaneval", "broken", "column"]
        return types.SimpleNamespace(
            all_tasks=known, load=load, match_tasks=lambda patterns: [name for name in known if name in patterns]
        )

    @pytest.mark.parametrize(
        ("tasks", "message"),
        [
            ("gsm8", "`lm_eval` names 'gsm8', and there is no such task (did you mean `gsm8k`?)"),
            ("gsm8k", "`lm_eval` names gsm8k, which needs something that is not here (Couldn't reach 'openai/gsm8k' "
             "on the Hub (OfflineModeIsEnabled)). Run it once where that can be downloaded, or take a task whose"),
            ("broken", "`lm_eval` names broken, whose questions can't be read (JSON parse error: Invalid value. in row "
             "0); mend its YAML file, or its data"),
            ("column", "`lm_eval` names column, whose questions can't be read ('question' is undefined); mend its"),
            ("humaneval", "`lm_eval` names humaneval, which runs code that the model writes"),
        ],
    )  # fmt: skip
    def test_tasks(self, manager, tasks, message):
        with pytest.raises(UserError, match=re.escape(message)):
            load_tasks(manager, HarnessOptions(lm_eval=tasks, model_name_or_path="m"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: make check-lm-eval")
class TestWithLmEval:
    @pytest.fixture(autouse=True)
    def in_the_project(self, monkeypatch):
        monkeypatch.chdir(ROOT)  # the tasks' data is found from there

    def test_the_figures_are_those_of_lm_evals_own_loading(self, adapter, model_dir, tmp_path):
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        settings = {"lm_eval": "opposites,sums", "include_path": TASKS, "model_name_or_path": adapter}
        lines = harness(HarnessOptions(**settings, output=str(tmp_path / "table.json"), dtype="float32"))
        assert [(line.task, line.metric, line.questions) for line in lines] == [
            ("opposites", "acc", 16), ("opposites", "brier_score", 16), ("sums", "exact_match (number)", 8),
        ]  # fmt: skip
        assert lines[1].base != lines[1].aligned  # else base and aligned could be one and the same
        for side, peft in (("base", {}), ("aligned", {"peft": adapter})):
            own = simple_evaluate(
                model="hf", model_args={"pretrained": model_dir, "dtype": "float32", **peft}, device="cpu",
                tasks=["opposites", "sums"], task_manager=TaskManager(include_path=TASKS), batch_size=8,
            )["results"]  # fmt: skip
            for line in lines:
                entry = own[line.task]
                name, _, kind = line.metric.partition(" ")
                kind = kind.strip("()") or "none"
                error = entry[f"{name}_stderr,{kind}"]
                figure = (entry[f"{name},{kind}"], math.nan if error == "N/A" else error)
                assert getattr(line, side) == pytest.approx(figure, nan_ok=True)

    def test_changed_questions_are_other_figures(self, adapter, tmp_path):
        """The key holds the questions themselves, not only the task's name."""
        from lm_eval.tasks import TaskManager

        rows = (ROOT / TASKS / "opposites.jsonl").read_text().splitlines()
        yaml = (ROOT / TASKS / "opposites.yaml").read_text()
        keys = []
        for n in (16, 15):
            folder = tmp_path / f"{n}"
            folder.mkdir()
            (folder / "opposites.jsonl").write_text("\n".join(rows[:n]))
            (folder / "opposites.yaml").write_text(yaml.replace(TASKS, str(folder)))
            options = HarnessOptions(lm_eval="opposites", include_path=str(folder), model_name_or_path=adapter)
            manager = TaskManager(include_path=str(folder), include_defaults=False)
            keys.append(load_tasks(manager, options))
            assert load_tasks(manager, options) == keys[-1]
        assert keys[0] != keys[1]

    @pytest.mark.parametrize(
        ("rows", "settings", "message"),
        [
            ('{"a": broken', {}, "`lm_eval` names mine, whose questions can't be read \\(JSON parse error"),
            ('{"other": 1}', {}, "`lm_eval` names mine, whose questions can't be read \\('word' is undefined"),
            (None, {"num_fewshot": 500}, "`lm_eval` mine failed: Sample larger than population"),
        ],
    )
    def test_what_is_wrong_with_a_task(self, rows, settings, message, adapter, tmp_path):
        text = (ROOT / TASKS / "opposites.yaml").read_text().replace("task: opposites", "task: mine")
        (tmp_path / "mine.yaml").write_text(text.replace(TASKS, str(tmp_path)))
        (tmp_path / "opposites.jsonl").write_text(rows or (ROOT / TASKS / "opposites.jsonl").read_text())
        options = {"lm_eval": "mine", "include_path": str(tmp_path), "model_name_or_path": adapter}
        with pytest.raises(UserError, match=message):
            harness(HarnessOptions(**options, **settings))

    def test_a_task_whose_data_is_not_here(self, adapter):
        with pytest.raises(UserError, match=r"names gsm8k, which needs something that is not here .*openai/gsm8k"):
            harness(HarnessOptions(lm_eval="gsm8k", model_name_or_path=adapter))
