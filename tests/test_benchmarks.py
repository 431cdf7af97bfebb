"""The benchmarks' own parts: lengths, examples, the summary, the GPU script on a CPU. No figure is measured here."""

import csv
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import needs_real_data, pair_rows, scored_rows

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import lengths  # noqa: E402
import shapes  # noqa: E402
import summarise  # noqa: E402
from machine import RESULTS, peak_memory, provenance, refusal  # noqa: E402

SOURCES = {"ultrafeedback": (300, 2), "vicuna": (60, 4)}


def script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def told_figures() -> dict[tuple[str, str], float]:
    with open(RESULTS / "figures.csv") as file:
        return {(row["result"], row["row"]): float(row["figure"]) for row in csv.DictReader(file)}


class TestTold:
    """Every figure of speed and memory that is told is one of `figures.csv`, and that is of the result files."""

    def test_the_file_is_of_the_results(self):
        told = told_figures()
        found = {(result, row): value for result, row, value in summarise.figures(summarise.read_results(RESULTS))}
        assert told == pytest.approx(found)

    def test_the_readmes_table(self):
        told = told_figures()

        def cell(k: int, *rows: str) -> str:
            values = [told.get((f"mistral-60m-k{k}", row)) for row in rows]
            return " / ".join(f"{value:#.3g}" for value in values if value is not None) or "not run"

        text = (BENCHMARKS.parent / "README.md").read_text().replace("**", "")
        for name, rows in {
            "the authors' way: padded, full logits, a reference pass a step": ["baseline"],
            "TRL's DPOTrainer on K − 1 pairs with the best, reference pass / cached": ["trl", "trl_cached"],
            "padded, reference pass / cached": ["padded", "padded_cached"],
            "prefix_shared, reference pass / cached": ["prefix_shared", "prefix_shared_cached"],
            "the limit: language modelling on the same unique tokens": ["limit"],
        }.items():
            assert f"| {name} | {cell(4, *rows)} | {cell(16, *rows)} |" in text


class TestLengths:
    @pytest.mark.parametrize("source", SOURCES)
    def test_table_holds_every_row_with_its_completions(self, source):
        count, k = SOURCES[source]
        rows = lengths.read_lengths(source)
        assert len(rows) == count
        assert {len(completions) for _, completions in rows} == {k}
        assert min(min(prompt, *completions) for prompt, completions in rows) > 0

    def test_table_holds_numbers_alone(self):
        header, *rows = lengths.TABLE.read_text().splitlines()
        assert header == ",".join(lengths.COLUMNS)
        assert len(rows) == sum(count for count, _ in SOURCES.values())
        for row in rows:
            source, *numbers = row.replace(" ", ",").split(",")
            assert source in SOURCES
            assert all(number.isdecimal() for number in numbers)

    @pytest.mark.parametrize("rows_of", [scored_rows, pair_rows])
    def test_measured_are_the_tokens_of_each_conversation(self, rows_of, tokenizer, model_dir, tmp_path, monkeypatch):
        monkeypatch.setattr("nca_align.models.smollm2.smollm2_path", lambda: model_dir)
        rows, expected = rows_of("own")[:5], []
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        def length(messages, **options) -> int:
            return len(tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"])

        for row in rows:
            if "chosen" in row:
                prompt, answers = row["chosen"][:-1], [row["chosen"][-1:], row["rejected"][-1:]]
            else:
                prompt = [{"role": "user", "content": row["instruction"]}]
                answers = [[{"role": "assistant", "content": one["response"]}] for one in row["completions"]]
            start = length(prompt, add_generation_prompt=True)
            expected.append(("a", start, " ".join(str(length(prompt + answer) - start) for answer in answers)))
        assert lengths.measure("a", str(tmp_path / "rows.jsonl")) == expected

    @pytest.mark.slow
    @needs_real_data
    @pytest.mark.parametrize(("source", "rows_of"), [("ultrafeedback", pair_rows), ("vicuna", scored_rows)])
    def test_table_is_what_the_data_gives(self, source, rows_of, tmp_path):
        from nca_align.errors import UserError

        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows_of("real")))
        try:
            measured = lengths.measure(source, str(path))
        except UserError as error:
            pytest.skip(str(error))
        assert [(prompt, [int(n) for n in text.split()]) for _, prompt, text in measured] == lengths.read_lengths(
            source
        )


class TestExamples:
    def test_spread_lengths_are_the_stated_ones(self):
        assert shapes.spread_example(4).completions == ((120, 260, 300, 400),)
        assert shapes.spread_example(4).unique_tokens == 1280
        assert shapes.spread_example(16).unique_tokens == 5280
        for k in (2, 8, 16, 32):
            (completions,) = shapes.spread_example(k).completions
            gaps = [after - before for before, after in itertools.pairwise(completions)]
            assert (len(completions), completions[0], completions[-1]) == (k, 59, 576)
            assert max(gaps) - min(gaps) <= 1

    @pytest.mark.parametrize("source", SOURCES)
    def test_real_lengths_are_rows_of_the_table_within_trainings_limits(self, source):
        example = shapes.real_example(source, 3)
        assert len(example.prompts) == 3
        for prompt, completions in zip(example.prompts, example.completions, strict=True):
            assert prompt <= 512
            assert prompt + max(completions) <= 1024

    def test_rows_have_the_examples_lengths_and_the_same_tokens_every_time(self):
        example = shapes.real_example("ultrafeedback", 2)
        rows = example.rows(128)
        assert rows == example.rows(128)
        assert tuple(len(row["prompt_ids"]) for row in rows) == example.prompts
        assert tuple(tuple(map(len, row["completion_ids"])) for row in rows) == example.completions

    @pytest.mark.parametrize(("k", "kept"), [(2, 2), (4, 2), (16, 4), (32, 8)])
    def test_warm_up_batch_is_smaller_and_keeps_the_longest(self, k, kept):
        example = shapes.spread_example(k)
        part = example.part()
        assert len(part.completions[0]) == kept
        assert max(part.completions[0]) == max(example.completions[0]) // 2
        assert part.padded_tokens * 2 <= example.padded_tokens


class TestMachine:
    def test_peak_is_what_a_call_takes_and_nothing_earlier(self):
        import torch

        torch.ones(100 << 20)  # 400 MB, freed again
        memory = peak_memory(lambda: torch.ones(50 << 20))
        if memory is None:
            pytest.skip("this system does not tell a process's peak memory")
        assert 200e6 < memory[1] < 260e6

    def test_what_does_not_fit_says_so_with_its_estimate(self, capsys):
        assert refusal("row", 8e9, int(10e9), "measured") is None
        reason = refusal("row", 9.5e9, int(10e9), "measured")
        assert reason == "does not fit: about 9.5 GB (measured), 10.0 GB are free"
        assert reason in capsys.readouterr().out

    def test_nothing_is_refused_where_the_system_tells_nothing(self):
        assert refusal("row", None, None, "") is None

    def test_provenance_names_machine_versions_and_command(self):
        origin = provenance("python x.py", "nothing-of-this-name")
        assert origin["command"] == "python x.py"
        assert origin["hardware"]["torch_threads"] >= 1
        assert origin["versions"]["torch"]
        assert origin["versions"]["nothing-of-this-name"] is None


def results(**medians: float) -> summarise.Results:
    """Four values of K whose every way has a time, from what each way costs a unique token."""
    files = {}
    for k in (4, 8, 16, 32):
        example = shapes.spread_example(k)
        rows = {
            way: {"median": cost * example.unique_tokens, "spread": [0.0, 1.0], "seconds": []}
            for way, cost in medians.items()
        }
        files[f"mistral-60m-k{k}"] = {
            "model": {"name": "mistral-60m", "parameters": 60_000_000},
            "example": {
                "prompts": example.prompts, "completions": example.completions,
                "unique_tokens": example.unique_tokens, "padded_tokens": example.padded_tokens,
            },
            "rows": rows | {"trl": {"skipped": "does not fit: about 40.0 GB"}},
        } | provenance("python benchmarks/run.py")  # fmt: skip
    counts = {"system_seconds": [0.1], "page_faults": [9]}
    files["linear"] = {
        "rows": {
            f"K = {tokens}, {way}": {"unique_tokens": tokens, "median": tokens**power, "spread": [1, 2], **counts}
            for way, power in (("jemalloc", 1), ("glibc's default", 3))
            for tokens in (1, 2, 4)
        }
    } | provenance("python benchmarks/run.py")
    return files


class TestSummary:
    def test_targets_are_judged_by_their_ratios(self):
        files = results(baseline=4.5, padded_cached=2.0, prefix_shared=1.4, prefix_shared_cached=1.05, limit=1.0)
        lines = {target.what: target.row() for target in summarise.targets(files)}
        assert lines["cached, time of the packed limit, K = 32"].endswith("| ≤ 1.1 × | 1.050 × | met |")
        assert lines["live, step rate of the authors' way, K = 4"].endswith("| ≥ 1.9 × | 3.214 × | met |")
        assert lines["cached, step rate of the authors' way, K = 16"].endswith("| 4.286 × | met |")
        assert lines["cached, step rate of our own padded, K = 16"].endswith("| 1.905 × | met |")
        straight = "cached, R² of time against unique tokens, K = 4 to 32"
        assert lines[f"{straight}, jemalloc"].endswith("| 1.000 | met |")
        assert lines[f"{straight}, glibc's default"].endswith("| **missed** |")
        assert lines["cached, step rate of TRL on the pairs, K = 4"].endswith("|  | not measured |")

    def test_a_missed_target_is_said_to_be_missed(self):
        files = results(baseline=1.0, prefix_shared_cached=1.2, limit=1.0)
        lines = {target.what: target.row() for target in summarise.targets(files)}
        assert lines["cached, time of the packed limit, K = 4"].endswith("| 1.200 × | **missed** |")

    def test_r_squared_is_one_on_a_line_and_that_of_numpy_off_it(self):
        import numpy as np

        assert summarise.r_squared([(1, 3), (2, 5), (4, 9)]) == pytest.approx(1.0)
        points = [(1, 1.0), (2, 3.0), (3, 2.0), (4, 5.0)]
        assert summarise.r_squared(points) == pytest.approx(np.corrcoef(*zip(*points, strict=True))[0, 1] ** 2)

    def test_tables_name_what_was_skipped_and_where_figures_come_from(self, tmp_path):
        for name, result in results(prefix_shared_cached=1.05, limit=1.0).items():
            (tmp_path / f"{name}.json").write_text(json.dumps(result))
        text = summarise.tables(summarise.read_results(tmp_path))
        assert "| trl | does not fit: about 40.0 GB |" in text
        assert "200 and 120, 260, 300, 400; 1280 unique" in text
        assert text.index("## mistral-60m-k4") < text.index("## mistral-60m-k16")  # by number, not by letter
        assert text.count("GB; python") == 1  # one machine, named once

    def test_files_are_written_beside_the_results(self, tmp_path):
        pytest.importorskip("matplotlib")
        for name, result in results(baseline=4.0, prefix_shared_cached=1.05, limit=1.0).items():
            (tmp_path / f"{name}.json").write_text(json.dumps(result))
        summarise.main(tmp_path)
        assert (tmp_path / "tables.md").read_text().startswith("# Results")
        assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
        assert "mistral-60m-k4,baseline,5120.0\n" in (tmp_path / "figures.csv").read_text()

    def test_an_empty_folder_stops_with_what_to_run(self, tmp_path):
        with pytest.raises(SystemExit, match="holds no result files; run"):
            summarise.main(tmp_path)


@pytest.mark.slow
class TestScripts:
    def test_gpu_script_runs_tiny_without_trl(self, tmp_path, monkeypatch):
        blocked = tmp_path / "blocked"
        for package in ("trl", "datasets"):
            (blocked / package).mkdir(parents=True)
            (blocked / package / "__init__.py").write_text("raise ImportError('the script must not need it')")
        monkeypatch.setenv("PYTHONPATH", str(blocked))
        result = script("gpu.py", "--tiny", "--repeats", 2, "--output", tmp_path)
        assert result.returncode == 0, result.stderr
        (file,) = tmp_path.glob("gpu-tiny-*.json")
        rows = json.loads(file.read_text())["rows"]
        assert len(rows["padded, SDPA"]["seconds"]) == 2
        assert rows["prefix_shared, SDPA"]["agrees"]
        assert 0 < rows["prefix_shared, SDPA"]["logps_off"] < 2e-2

    def test_gpu_script_without_a_card_skips_by_name_and_writes_nothing(self, tmp_path):
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
        result = script("gpu.py", "--output", tmp_path)
        assert result.returncode == 0
        assert result.stdout == "7B shape: skipped, there is no CUDA device; no result is written\n"
        assert not list(tmp_path.iterdir())

    def test_a_configuration_runs_small_and_its_ways_agree(self, tmp_path):
        result = script("run.py", "--smoke", "--full", "--only", "mistral-60m-k4", "--output", tmp_path)
        assert result.returncode == 0, result.stderr
        rows = json.loads((tmp_path / "mistral-60m-k4.json").read_text())["rows"]
        assert all(row["median"] > 0 for row in rows.values())
        losses = {rows[way]["loss"] for way in rows if way.startswith(("baseline", "padded", "prefix_shared"))}
        assert max(losses) - min(losses) < 1e-4
        assert rows["trl"]["loss"] == pytest.approx(rows["trl_cached"]["loss"], abs=1e-5)

    def test_step_times_are_measured_under_both_allocators(self, tmp_path):
        result = script("run.py", "--smoke", "--only", "linear", "--output", tmp_path)
        assert result.returncode == 0, result.stderr
        rows = json.loads((tmp_path / "linear.json").read_text())["rows"]
        assert list(rows) == [f"K = {k}, {way}" for way in ("jemalloc", "glibc's default") for k in (4, 8, 16, 32)]
        for name, row in rows.items():
            assert "jemalloc is not installed" in row.get("skipped", "") or len(row["page_faults"]) == 1, name
            assert "glibc" not in name or row["median"] > 0

    def test_an_unknown_configuration_is_refused_by_name(self):
        result = script("run.py", "--only", "mistral")
        assert result.returncode == 2
        assert "`--only` is mistral, but must be one of mistral-60m-k2" in result.stderr
