"""The study: its data and grids, and that every number that is told of it is one of its tables."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nca_align.scorers import vader, within_words

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
study_results = pytest.importorskip("study_results")

TASKS = {"vader": (4, vader), "words": (8, within_words)}
SPLITS = {"train": 112, "validation": 32, "test": 64}  # at the least
CELLS = {"task1": 21, "task2": 12, "alpha": 6, "completions": 6}


def rows(task: str, split: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "data/study" / task / f"{split}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", TASKS)
class TestData:
    def test_prompts_are_enough_and_in_one_split_each(self, task):
        prompts = {split: [row["prompt"][-1]["content"] for row in rows(task, split)] for split in SPLITS}
        everything = [prompt for own in prompts.values() for prompt in own]
        assert len(everything) == len(set(everything))
        assert all(len(prompts[split]) >= least for split, least in SPLITS.items())

    def test_every_prompt_has_k_completions_with_the_rewards_that_the_scorer_gives(self, task):
        pytest.importorskip("vaderSentiment")
        k, scorer = TASKS[task]
        for split in SPLITS:
            for row in rows(task, split):
                count = len(row["completions"])
                assert k - 1 <= count == len(row["rewards"]) <= k  # an empty one is left out
                assert scorer(prompts=[row["prompt"]] * count, completions=row["completions"]) == row["rewards"]

    def test_rewards_say_something(self, task):
        unequal = [len(set(row["rewards"])) > 1 for row in rows(task, "train")]
        assert sum(unequal) > 0.9 * len(unequal)


@pytest.mark.parametrize(("name", "cells"), CELLS.items())
def test_grids_are_the_studys(name, cells):
    import yaml

    from nca_align.grid import Evaluation, expand, from_mapping

    config = yaml.safe_load((ROOT / f"configs/study/{name}.yaml").read_text())
    found = expand(config["base"], config["grid"], name)
    assert len(found) == cells
    assert {cell.settings["seed"] for cell in found} == {1, 2, 3}
    assert all((ROOT / cell.options["dataset_name"]).is_dir() for cell in found)
    evaluation = from_mapping(Evaluation, "evaluation", config["evaluation"])
    assert evaluation.prompts is None


def comparison(folder: Path) -> None:
    """Two methods, three seeds: rewards that rise in a straight line with the KL, one method twice as fast."""
    columns = ["cell", "method", "alpha", "seed", "split", "step", "reward", "kl", "minutes"]
    folder.mkdir(parents=True)
    with open(folder / "comparison.csv", "w", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        for method, slope in (("nca", 0.1), ("dpo", 0.2)):
            for seed in (1, 2, 3):
                for split in ("validation", "test"):
                    for step in (0, 32, 64):
                        kl = step / 16
                        table.writerow(
                            {"cell": f"{method}-{seed}", "method": method, "seed": seed, "split": split, "step": step,
                             "reward": 0.4 + slope * kl + 0.01 * seed, "kl": kl, "minutes": step / 10,
                             "alpha": 0.3 if method == "nca" else ""}
                        )  # fmt: skip
    (folder / "provenance.json").write_text(json.dumps({"commit": "abc"}))


def test_tables_are_means_over_seeds_at_the_end_and_at_equal_kl(tmp_path):
    comparison(tmp_path / "runs" / "task")
    page = tmp_path / "study.md"
    page.write_text("before\n<!-- task -->\nold\n<!-- end -->\nafter\n")
    study_results.main(tmp_path / "runs", tmp_path / "study")
    means = study_results.read(tmp_path / "study" / "task-means.csv")
    found = {(row["method"], row["figure"]): row for row in means}
    assert float(found["nca", "reward at KL 2"]["mean"]) == pytest.approx(0.4 + 0.2 + 0.02)
    assert float(found["dpo", "reward"]["mean"]) == pytest.approx(0.4 + 0.8 + 0.02)
    assert ("dpo", "reward at KL 5") not in found  # none came so far
    row = found["nca", "reward"]
    assert float(row["high"]) - float(row["mean"]) == pytest.approx(4.3027 * 0.01 / 3**0.5, abs=1e-5)
    assert row["n"] == "3"
    text = page.read_text()
    assert text.startswith("before\n<!-- task -->\n| method | alpha |")
    assert text.endswith("<!-- end -->\nafter\n")
    lines = [line for line in text.splitlines() if line.startswith(("| nca", "| dpo"))]
    assert lines[0].startswith("| dpo")  # sorted by the reward at equal KL
    assert "0.82 ± 0.02" in lines[1]
    assert json.loads((tmp_path / "study" / "provenance.json").read_text())["task"]["minutes"] == pytest.approx(38.4)


def test_an_ablations_table_has_task_1s_own_setting_beside_the_others(tmp_path):
    for name in ("task1", "alpha"):
        comparison(tmp_path / "runs" / name)
    study_results.main(tmp_path / "runs", tmp_path / "study")
    rows = study_results.read(tmp_path / "study" / "alpha.csv")
    assert len(rows) == 36 + 18
    assert sum(row["method"] == "dpo" for row in rows) == 18


def test_without_runs_it_says_what_to_run(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/study_results.py", tmp_path], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "holds no comparison; run scripts/study.sh first" in result.stderr


class TestNumbers:
    """Numbers with a decimal point; others are settings and counts."""

    def tables(self) -> dict[str, str]:
        found = sorted((ROOT / "docs/study").glob("*-means.csv"))
        if not found:
            pytest.skip("the study's tables are not in docs/study")
        return {
            path.name.removesuffix("-means.csv"): study_results.markdown(study_results.read(path)) for path in found
        }

    def test_the_pages_tables_are_those_of_the_csv_files(self):
        text = (ROOT / "docs/study.md").read_text()
        assert study_results.fill(text, self.tables()) == text
        assert all(f"<!-- {name} -->" in text for name in self.tables())

    def test_the_means_are_those_of_the_evaluations(self):
        for name in self.tables():
            means = study_results.means(study_results.read(ROOT / "docs/study" / f"{name}.csv"))
            for told, again in zip(study_results.read(ROOT / "docs/study" / f"{name}-means.csv"), means, strict=True):
                assert float(told["mean"]) == pytest.approx(float(str(again["mean"])))

    def test_numbers_in_prose_are_in_a_table_of_the_page(self):
        tables = "\n".join(self.tables().values())
        known = set(re.findall(r"\d+\.\d+", tables))
        page = re.sub(r"<!-- \w+ -->\n.*?<!-- end -->", "", (ROOT / "docs/study.md").read_text(), flags=re.DOTALL)
        results = page[page.index("## Results") :]
        readme = (ROOT / "README.md").read_text()
        section = re.search(r"## The study\n.*?(?=\n## )", readme, re.DOTALL)
        for number in re.findall(r"(?<![\w.])\d+\.\d+", results + (section[0] if section else "")):
            assert number in known, number
