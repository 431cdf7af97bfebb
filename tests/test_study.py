"""The study: its data and grids, and that every number that is told of it is one of its tables."""

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import quickstart_results  # noqa: E402
import study_results  # noqa: E402
from nca_align.commands.compare.grid import KEYS  # noqa: E402
from nca_align.commands.compare.tables import METRICS  # noqa: E402
from nca_align.scorers import vader, within_words  # noqa: E402
from nca_align.store.files import read_csv, write_csv  # noqa: E402

START = study_results.START

TASKS = {"vader": (4, vader), "words": (8, within_words)}
SPLITS = {"train": 112, "validation": 32, "test": 64}  # at the least
CELLS = {"task1": 21, "task2": 12, "ablations": 15}


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

    from nca_align.commands.compare.grid import EvaluationSettings, expand, from_mapping

    config = yaml.safe_load((ROOT / f"configs/study/{name}.yaml").read_text())
    found = expand(config["base"], config["grid"], name)
    assert len(found) == cells
    assert {cell.settings["seed"] for cell in found} == {1, 2, 3}
    assert all((ROOT / cell.options["dataset_name"]).is_dir() for cell in found)
    evaluation = from_mapping(EvaluationSettings, "evaluation", config["evaluation"])
    assert evaluation.prompts is None


def comparison(folder: Path, slopes=(("nca", 0.1), ("dpo", 0.2)), **more) -> None:
    """Two methods, three seeds: rewards that rise with √KL, one method's twice as fast."""
    columns = ["cell", *KEYS, "split", "step", *METRICS, "minutes"]
    rows = []
    for method, slope in slopes:
        for seed in (1, 2, 3):
            about = {
                "cell": f"{method}-{seed}",
                "method": method,
                "seed": seed,
                "alpha": 0.3 if method == "nca" else "",
            }
            cell = folder / "cells" / f"{method}-{seed}"
            cell.mkdir(parents=True)
            made = {"settings": {"seed": seed}, "minutes": 6.4, "commit": "abc", "versions": {"trl": "1.16.0"}}
            (cell / "cell.json").write_text(json.dumps(made))
            for split, step in itertools.product(("validation", "test"), (0, 32, 64)):
                kl = step / 16
                drawn = {"reward": 0.4 + slope * kl**0.5 + 0.01 * seed, "kl": kl, "logratio_best": -1, "accuracy": 0.5}
                rows.append(about | {"split": split, "step": step, "minutes": step / 10} | drawn | more)
    write_csv(folder / "comparison.csv", rows, columns)


def test_tables_are_means_over_seeds_at_the_end_and_at_equal_kl(tmp_path):
    comparison(tmp_path / "runs" / "task1")
    page = tmp_path / "docs" / "study.md"
    page.parent.mkdir()
    page.write_text(
        "before\n<!-- table task1 equal -->\nold\n<!-- end -->\n<!-- table task1 end --><!-- end -->\nafter\n"
        "DPO has <!-- task1; dpo; reward at KL 1.5 -->?<!-- -->, "
        "<!-- task1; dpo; reward at KL 1.5; minus_nca --><!-- --> more.\n"
    )
    (tmp_path / "README.md").write_text("NCA has <!-- task1; nca; reward -->9<!-- -->.\n")
    study_results.main(tmp_path / "runs", tmp_path / "docs" / "study")
    found = {(row["label"], row["figure"]): row for row in read_csv(tmp_path / "docs" / "study" / "task1-means.csv")}
    assert float(found["nca", "reward at KL 1.5"]["mean"]) == pytest.approx(0.4 + 0.1 * 1.5**0.5 + 0.02)
    assert float(found["dpo", "reward"]["mean"]) == pytest.approx(0.4 + 0.4 + 0.02)
    assert ("nca", "train logratio_best") not in found  # no row has one
    assert ("nca", "logratio_best at KL 1.1") not in found  # all had gone further at their first evaluation
    assert ("dpo", "win_rate") not in found  # nor had one
    row = found["dpo", "reward at KL 1.5"]
    assert float(row["high"]) - float(row["mean"]) == pytest.approx(4.3027 * 0.01 / 3**0.5, abs=1e-5)
    assert float(row["minus_nca"]) == pytest.approx(0.1 * 1.5**0.5)
    assert float(row["minus_nca_high"]) == pytest.approx(float(row["minus_nca"]))  # the seeds differ alike: paired
    assert row["n"] == "3"
    assert found["nca", "reward"]["minus_nca"] == ""
    assert float(found[START, "reward"]["mean"]) == pytest.approx(0.42)
    assert (START, "accuracy") not in found  # ties alone
    text = page.read_text()
    assert text.count(START) == 1
    assert f"| {START} | 3 | 0.42 ± 0.02 | 0.00 ± 0.00 | −1.00 ± 0.00 | – |" in text
    assert text.startswith("before\n<!-- table task1 equal -->\n| | n | reward at KL 0.5 |")
    assert "| nca | 3 | 0.49 ± 0.02 | 0.52 ± 0.02 | 0.54 ± 0.02 | 0.59 ± 0.02 |" in text
    assert (
        "| dpo | 3 | 0.56 ± 0.02 (+0.07 ± 0.00) | 0.62 ± 0.02 (+0.10 ± 0.00) | 0.66 ± 0.02 (+0.12 ± 0.00) | 0.77"
        in text
    )
    assert "-->0.66 ± 0.02<!-- -->, <!-- task1; dpo; reward at KL 1.5; minus_nca -->+0.12 ± 0.00<!-- --> more." in text
    assert (tmp_path / "README.md").read_text() == "NCA has <!-- task1; nca; reward -->0.62 ± 0.02<!-- -->.\n"
    cells = read_csv(tmp_path / "docs" / "study" / "cells.csv")
    assert [row["seed"] for row in cells] == ["1", "2", "3"] * 2
    assert (cells[0]["commit"], cells[0]["trl"], cells[0]["minutes"]) == ("abc", "1.16.0", "6.4")
    assert (tmp_path / "docs" / "study" / "task1.png").stat().st_size > 10_000


def test_a_seed_that_diverged_leaves_no_mean(tmp_path):
    comparison(tmp_path / "task1")
    rows = read_csv(tmp_path / "task1" / "comparison.csv")
    next(row for row in rows if (row["cell"], row["split"], row["step"]) == ("dpo-2", "test", "64"))["reward"] = "nan"
    figures = {(row["label"], row["figure"]) for row in study_results.means(rows)}
    assert ("dpo", "reward") not in figures
    assert ("dpo", "reward at KL 1.5") in figures  # it had come so far before
    assert ("dpo", "reward at KL 3") not in figures


@pytest.mark.slow
def test_an_ablations_table_has_task_1s_own_setting_first(tmp_path):
    comparison(tmp_path / "runs" / "task1")
    comparison(tmp_path / "runs" / "ablations", [("nca", 0.1)], alpha=1.0)
    rows = read_csv(tmp_path / "runs" / "ablations" / "comparison.csv")
    for changes in ({"num_completions": 2}, {"strategy": "best_worst"}):
        rows += [{**row, "alpha": 0.3, **changes} for row in rows[: 3 * 6]]
    write_csv(tmp_path / "runs" / "ablations" / "comparison.csv", rows)
    study_results.main(tmp_path / "runs", tmp_path / "docs" / "study")
    tables = study_results.read_tables(tmp_path / "docs" / "study")
    assert list(dict.fromkeys(row["label"] for row in tables["alpha"])) == [START, "nca, α 0.3", "nca, α 1"]
    assert {row["label"] for row in tables["preferences"]} == {START, "nca", "nca, best_worst"}
    assert {row["label"] for row in tables["completions"]} == {START, "nca, K all", "nca, K 2"}
    assert all(row["minus_nca"] for row in tables["alpha"] if row["label"] == "nca, α 1")


def test_cells_of_another_machine_join_those_that_are_there(tmp_path):
    output = tmp_path / "docs" / "study"
    comparison(tmp_path / "first" / "task1", [("nca", 0.1)])
    study_results.main(tmp_path / "first", output)
    second = tmp_path / "second" / "task1"
    comparison(second)
    rows = [row for row in read_csv(second / "comparison.csv") if row["cell"] in ("nca-3", "dpo-1", "dpo-2")]
    write_csv(second / "comparison.csv", [{**row, "accuracy": 0.9} for row in rows])
    for name in ("nca-1", "nca-2"):
        (second / "cells" / name / "cell.json").unlink()
    # dpo-3 is finished too, but the table doesn't have it yet, as where `compare` was killed
    study_results.main(tmp_path / "second", output)
    found = {row["cell"]: row["accuracy"] for row in read_csv(output / "task1.csv")}
    assert found == {"nca-1": "0.5", "nca-2": "0.5", "nca-3": "0.9", "dpo-1": "0.9", "dpo-2": "0.9"}
    assert {row["cell"] for row in read_csv(output / "cells.csv")} == set(found)
    told = {row["label"] for row in study_results.read_tables(output)["task1"]}
    assert told == {START, "nca"}  # DPO has two seeds yet
    study_results.main(tmp_path / "second", output)
    assert len(read_csv(output / "task1.csv")) == 5 * 6


def test_what_was_not_reached_is_told_and_a_setting_that_is_in_no_table_is_an_error():
    rows = [{"label": "nca", "figure": "reward", "mean": "-0.001", "high": "", "n": "1"}]
    mark = "<!-- task1; nca; reward at KL 3 -->1.5<!-- -->"
    assert study_results.fill(mark, {"task1": rows}) == mark.replace("1.5", "not reached")
    assert study_results.fill("<!-- task1; nca; reward --><!-- -->", {"task1": rows}).endswith("-->0.00<!-- -->")
    for wrong in ("task1; nca; rewards", "task1; dpo; reward"):
        with pytest.raises(KeyError, match=wrong):
            study_results.fill(f"<!-- {wrong} -->1<!-- -->", {"task1": rows})


def test_log_ratios_at_equal_kl_are_those_between_two_evaluations(tmp_path):
    comparison(tmp_path / "task1", [("nca", 0.1)])
    rows = read_csv(tmp_path / "task1" / "comparison.csv")
    for row in rows:
        row["kl"] = str({"0": 0.0, "32": 0.81, "64": 1.21}[row["step"]])
        row["logratio_best"] = str({"0": 5.0, "32": -1.0, "64": -3.0}[row["step"]])
    (found,) = (row for row in study_results.means(rows) if row["figure"] == "logratio_best at KL 1.1")
    assert found["mean"] == pytest.approx(-1 - 2 * (1.1**0.5 - 0.9) / (1.1 - 0.9))
    assert found["n"] == 3


def test_the_quickstarts_figures_are_those_that_it_logged_last():
    log = [
        {"step": 8, "logratios/rank_1": 1.0, "logratios/best": 1.0, "loss": 2.0},
        {"step": 8, "eval_loss": 1.0, "eval_logratios/rank_1": -1.0, "eval_rewards/rank_1": -0.1},
        {"step": 16, "logratios/rank_1": 3.0, "logratios/best": 3.0, "loss": 1.0},
        {"step": 16, "eval_loss": 1.0, "eval_logratios/rank_1": -2.0, "eval_logratios/best": -2.0, "eval_prompts": 36,
         "eval_logratios/best_error": 1.0},
        {"step": 16, "eval_generation/reward": 0.5, "eval_generation/reward_error": 0.1, "eval_generation/prompts": 4},
        {"step": 16, "train_runtime": 90.5},
    ]  # fmt: skip
    assert [tuple(row.values()) for row in quickstart_results.rows(log)] == [
        ("held-out", 16, "logratios/rank_1", -2.0, None, None),
        ("held-out", 16, "logratios/best", -2.0, pytest.approx(-2 - 2.0301, abs=1e-4), pytest.approx(0.0301, abs=1e-4)),
        ("held-out", 16, "generation/reward", 0.5, pytest.approx(0.1818, abs=1e-4), pytest.approx(0.8182, abs=1e-4)),
        ("held-out", 16, "generation/prompts", 4, None, None),
        ("training", 16, "logratios/rank_1", 3.0, None, None), ("training", 16, "logratios/best", 3.0, None, None),
        ("training", 16, "train_runtime", 90.5, None, None),
    ]  # fmt: skip


def test_a_figure_that_no_quickstart_has_yet_is_not_made_up():
    tables = {"quickstart": [{"label": "held-out", "figure": "logratios/best", "mean": "-2", "high": "-1"}]}
    marked = "<!-- quickstart; held-out; generation/gain --><!-- -->"
    assert study_results.fill(marked, tables) == marked.replace("--><", "-->not measured<")
    tables["quickstart"].append({"label": "held-out", "figure": "generation/gain", "mean": "0.25", "high": "0.35"})
    assert study_results.fill(marked, tables) == marked.replace("--><", "-->0.25 ± 0.10<")
    with pytest.raises(KeyError):
        study_results.fill(marked.replace("gain", "again"), tables)


def test_a_part_that_is_none_is_refused_before_any_runs():
    result = subprocess.run(["bash", ROOT / "scripts/study.sh", "task1", "alpha"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "no part `alpha`; there are task1, task2 and ablations\n"


@pytest.mark.slow
def test_without_runs_it_says_what_to_run(tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "scripts/study_results.py", tmp_path], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "holds no comparison; run scripts/study.sh first" in result.stderr


class TestNumbers:
    """Every number with a decimal point that is told of a result stands between marks, and is its table's."""

    PAGES = ("docs/study.md", "README.md")

    def tables(self) -> dict[str, list[dict[str, str]]]:
        found = study_results.read_tables(ROOT / "docs/study")
        assert list(found) == list(study_results.PARTS)
        return found

    def test_the_pages_tables_and_figures_are_those_of_the_csv_files(self):
        tables = self.tables()
        for page in self.PAGES:
            text = (ROOT / page).read_text()
            assert study_results.fill(text, study_results.read_told(ROOT / "docs/study")) == text
        text = (ROOT / "docs/study.md").read_text()
        assert all(f"<!-- table {part} {kind} -->\n| |" in text for part in tables for kind in ("equal", "end"))

    def test_the_means_are_those_of_the_evaluations(self):
        comparisons = study_results.read_comparisons(ROOT / "docs/study")
        for name, told in self.tables().items():
            means = study_results.means(study_results.part_rows(name, comparisons))
            for line, again in zip(told, means, strict=True):
                for key in ("mean", "low", "high", *study_results.MINUS_NCA):
                    value = again.get(key)
                    assert line[key] == "" if value is None else float(line[key]) == pytest.approx(value), (name, line)

    def test_every_cell_says_what_it_was_made_with(self):
        known = {(row["comparison"], row["cell"]) for row in read_csv(ROOT / "docs/study/cells.csv")}
        comparisons = study_results.read_comparisons(ROOT / "docs/study")
        assert {(name, row["cell"]) for name, rows in comparisons.items() for row in rows} == known
        for row in read_csv(ROOT / "docs/study/cells.csv"):
            assert re.fullmatch("[0-9a-f]{40}", row["commit"])
            assert float(row["minutes"]) > 0
            assert row["trl"]

    def test_the_designs_counts_and_times_are_those_of_the_data_and_the_cells(self):
        page = " ".join((ROOT / "docs/study.md").read_text().split())
        cut = {task: [own for row in rows(task, "train") for own in row["truncated"]] for task in TASKS}
        words, vader = (f"{sum(own)} of the {len(own):,}" for own in (cut["words"], cut["vader"]))
        assert f"{vader} training completions of task 1 and {words} of task 2 were cut" in page
        minutes: dict[str, list[float]] = {"kto": [], "dpo-all_pairs": [], "nca-best_worst-seed3": [], "": []}
        for row in read_csv(ROOT / "docs/study/cells.csv"):
            minutes[next(name for name in minutes if row["cell"].startswith(name))].append(float(row["minutes"]))
        kto, all_pairs, last, usual = minutes.values()
        assert (
            f"took {min(usual):.0f} to {max(usual):.0f} minutes on one core (KTO's {fmean(kto):.0f} and those of DPO "
            f"on all pairs {fmean(all_pairs):.0f}; `nca-best_worst-seed3`, the last one, had both cores, {last[0]:.0f})"
        ) in page
        every = [*kto, *all_pairs, *last, *usual]
        assert len(every) == sum(CELLS.values())
        assert round(sum(every) / 60 / 2) == 7
        assert "seven hours of two cores" in page

    def test_a_number_in_the_text_stands_between_marks(self):
        page, readme = (ROOT / "docs/study.md").read_text(), (ROOT / "README.md").read_text()
        section = re.search(r"## The study\n.*?(?=\n## )", readme, re.DOTALL)
        quickstart = re.search(r"On 36 held-out prompts.*?\n\n", readme, re.DOTALL)
        assert section is not None
        assert quickstart is not None
        for text in (page[page.index("## Results") :], section[0], quickstart[0]):
            settings = r"`(?:α = |alpha: )?(?:0\.01|0\.3|1\.1|1\.5)`|95% t-intervals"  # what isn't a result
            marked = r"<!-- table .*?<!-- end -->|<!-- \w+; [^>]+ -->.*?<!-- -->"
            bare = re.sub(f"{marked}|{settings}", "", text, flags=re.DOTALL)
            assert not re.findall(r"(?<![\w.])(?:[+−-]?\d+\.\d+|\d+ ?(?:%|per cent|nats))", bare)
