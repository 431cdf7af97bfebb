"""The confirmation on SmolLM2: its grid, its table over several sittings, and its comparison of ladders."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import fmean, pstdev

import pytest
import yaml

from conftest import reward_rows

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts/study_words.py"
sys.path.insert(0, str(ROOT / "scripts"))

import study_words  # noqa: E402
from nca_align.commands.compare.grid import EvaluationSettings, expand, from_mapping  # noqa: E402
from nca_align.evaluation.ladder import Difference  # noqa: E402
from nca_align.store.files import read_csv, write_csv  # noqa: E402

SCORER = "def long(completions, **kwargs):\n    return [min(len(c[0]['content']), 60) / 60 for c in completions]\n"


@pytest.fixture(scope="module")
def config() -> dict:
    return yaml.safe_load(study_words.CONFIG.read_text())


def test_the_grid_is_the_plans(config):
    cells = expand(config["base"], config["grid"], "words.yaml")
    seeds = [cell.settings["seed"] for cell in cells]
    assert seeds == sorted(seeds)
    assert len({cell.settings["learning_rate"] for cell in cells}) == 1
    evaluation = from_mapping(EvaluationSettings, "evaluation", config["evaluation"])
    assert (evaluation.num_completions, evaluation.steps, evaluation.validation_steps) == (16, 1, 0)
    plan = " ".join((ROOT / "docs/study/plan-words.md").read_text().split())
    names = {"nca": "NCA", "infonca": "InfoNCA", "dpo": "DPO"}
    for seed in range(1, 7):
        for method, name in names.items():
            betas = [own.settings["beta"] for own in cells if own.name.startswith(f"{method}-") and
                     own.settings["seed"] == seed]  # fmt: skip
            if seed < 3:
                assert ", ".join(f"{beta:g}" for beta in betas) in plan
            else:
                assert " and ".join(f"{beta:g}" for beta in betas) + f" for {name}" in plan
    assert " and ".join(f"{kl:g}" for kl in study_words.KLS) in plan


def test_pilots_have_other_seeds_and_place_the_ladders(config):
    cells = expand(config["base"], study_words.pilots(config)["grid"], "pilots")
    seeds = Counter(cell.settings["seed"] for cell in cells)
    assert seeds == {101: 12, 102: 3}
    ends = [(kl, 0.6 / kl) for kl in (1.5, 0.75, 1.2)]
    assert study_words.betas_at((0.5, 1.1, 3.0), ends) == [1.2, 0.55, 0.2]  # none came to 0.5 or 3 nats


def row(method: str, seed: int, beta: float, kl: float) -> dict[str, str]:
    return {"method": method, "seed": str(seed), "beta": str(beta), "kl": str(kl)}


def test_ladders_lack_what_their_own_kls_say():
    rows = [
        row("nca", 1, 0.6, 0.8), row("nca", 1, 0.3, 1.7),  # spans 1.5 alone
        row("dpo", 1, 10, 0.2), row("dpo", 1, 0.5, 1.0),  # spans 0.75 alone
        row("infonca", 1, 1.0, 0.55), row("infonca", 1, 0.25, 2.2),  # spans both
        *[row("nca", 2, 0.5 / kl, kl) for kl in (0.5, 1.1, 3.0)],
    ]  # fmt: skip
    assert study_words.lacking(rows) == [
        {"method": "dpo", "num_completions": 4, "seed": 1, "beta": 0.2},
        {"method": "nca", "num_completions": 4, "seed": 1, "beta": 1.2},
        {"method": "infonca", "num_completions": 4, "seed": 1, "beta": 0.5},
    ]
    stuck = [row("dpo", 1, beta, 0.9 + beta / 100) for beta in (1, 2, 3, 4, 5, 6)]
    assert study_words.lacking(stuck[:5])
    assert not study_words.lacking(stuck)
    assert not study_words.lacking([row("dpo", 1, 1, 0.9), row("dpo", 1, 2.2, 1.0)])  # 2.2 again: it would never end


def test_ladders_are_run_until_they_lack_nothing(config, tmp_path, monkeypatch):
    """With runs that end at KL = c/β, c another one for each seed."""
    table, ran = tmp_path / "words.csv", []

    def run(asked, path):
        rows = read_csv(path) if path.exists() else []
        for cell in expand(config["base"], asked["grid"], "words.yaml"):
            own = cell.settings
            ran.append(cell.name)
            rows.append(row(own["method"], own["seed"], own["beta"], (0.03 + 0.1 * own["seed"]) / own["beta"]))
        write_csv(path, rows)
        return 0

    monkeypatch.setattr(study_words, "run", run)
    assert study_words.study(config, table) == 0
    assert len(ran) == len(set(ran))
    ladders = {}
    for own in read_csv(table):
        ladders.setdefault((own["method"], own["seed"]), []).append(float(own["kl"]))
    assert len(ladders) == 18
    for kls in ladders.values():
        assert study_words.LEAST <= len(kls) < study_words.MOST
        assert min(kls) <= study_words.KLS[0] < study_words.KLS[1] <= max(kls)


def finish(cell, output: Path, reward: float) -> None:
    """A finished cell's folder, as `nca-align compare` leaves it."""
    folder = cell.folder(output)
    folder.mkdir(parents=True)
    names = ("reward", "reward_error", "kl", "kl_error", "tokens", "cut", "distinct_2")
    log = [
        {f"eval_test_generation/{name}": reward * (step > 0) for name in names}
        | {f"eval_{split}_logratios/{end}": sign * step for split in ("train", "test")
           for end, sign in (("best", 1), ("worst", -1))}
        | {"step": step, "minutes": step / 10}
        for step in (0, 16)
    ]  # fmt: skip
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    made = {"minutes": 1.6, "commit": "abc", "versions": {"trl": "1.16.0"}}
    (folder / "cell.json").write_text(json.dumps(made))
    (folder / "done.json").write_text("{}")


def test_the_table_takes_finished_cells_and_keeps_those_of_other_machines(tmp_path, config):
    cells = expand(config["base"], config["grid"], "words.yaml")
    here, there, table = tmp_path / "here", tmp_path / "there", tmp_path / "words.csv"
    assert study_words.collect(cells, here, table) == set()
    finish(cells[1], here, 0.5)
    assert study_words.collect(cells, here, table) == {cells[1].name}
    finish(cells[0], there, 0.25)
    finish(cells[1], there, 0.75)  # again
    assert study_words.collect(cells, there, table) == {cell.name for cell in cells[:2]}
    first, second = read_csv(table)
    assert (first["cell"], first["reward"], second["reward"]) == (cells[0].name, "0.25", "0.5")
    assert first.items() >= {
        "method": cells[0].settings["method"], "seed": "1", "steps": "16", "logratio_worst": "-16",
        "train_logratio_best": "16", "trl": "1.16.0",
    }.items()  # fmt: skip
    before = table.read_text()
    study_words.collect(cells, there, table)
    assert table.read_text() == before


def test_methods_are_compared_between_the_ends_of_their_ladders():
    gains = {"nca": 0.2, "infonca": 0.1, "dpo": 0.2}
    rows = [
        {"method": method, "seed": str(seed), "beta": str(1 / kl), "kl": str(kl)}
        | dict.fromkeys(study_words.FIGURES, str(0.3 + gain * kl**0.5 + seed / 100 + (method == "dpo") * seed / 500))
        for method, gain in gains.items() for seed in range(1, 7) for kl in study_words.RUNGS
    ]  # fmt: skip
    found = {(own.method, own.column, own.kl): own for own in study_words.differences(rows)}
    assert len(found) == 2 * len(study_words.FIGURES) * len(study_words.KLS)
    for kl in study_words.KLS:
        assert found["infonca", "reward", kl].difference == pytest.approx(-0.1 * kl**0.5)
        assert found["dpo", "reward", kl].difference == pytest.approx(0.007)
        assert all(own.n == 6 for own in found.values())
    lines = study_words.comparisons(rows).splitlines()
    assert len(lines) == 2 + len(found)
    ahead = next(line for line in lines if line.startswith("| reward | 1.5 | DPO"))
    assert ahead.startswith("| reward | 1.5 | DPO, best and worst | 0.580 | 0.587 | +0.007 (")
    assert ahead.endswith("| 6 |")
    for chart in study_words.charts(rows):
        assert [series.name for series in chart.series] == [*study_words.NAMES.values()]
        assert all(series.x == [quarter / 4 for quarter in range(2, 13)] for series in chart.series)
    missing = [row for row in rows if (row["method"], row["seed"]) != ("dpo", "3") or float(row["kl"]) > 1]
    lines = study_words.comparisons(missing).splitlines()
    assert lines[3] == "| reward | 0.75 | DPO, best and worst | – | – | – | – | 5, 1 missing |"


def difference(method: str, kl: float, low: float, high: float, p: float, column: str = "reward") -> Difference:
    return Difference(method, "nca", kl, column, (low + high) / 2, 0.01, low, high, p, p, 6, 0, 0)


def test_the_plans_rule_says_whether_a_lead_stays():
    def said(*ends: tuple[float, float, float]) -> str:
        own = [difference("dpo", kl, *each) for kl, each in zip(study_words.KLS, ends, strict=True)]
        others = [difference("infonca", kl, -9, -8, 0.001) for kl in study_words.KLS]
        return study_words.answer([*own, *others, difference("dpo", 1.5, 1, 2, 0.001, "logratio_best")], "dpo")

    assert said((-0.2, -0.1, 0.01), (-0.3, -0.01, 0.04)) == "lead"
    assert said((-0.2, -0.1, 0.01), (-0.3, 0.01, 0.06)) == "undecided"
    assert said((-0.04, 0.05, 0.9), (-0.05, 0.01, 0.3)) == "beta"
    assert said((-0.04, 0.05, 0.9), (-0.05, 0.051, 0.3)) == "undecided"
    assert said((0.01, 0.1, 0.01), (0.02, 0.1, 0.01)) == "undecided"
    assert said((math.nan, math.nan, math.nan), (-0.3, -0.1, 0.01)) == "undecided"
    assert study_words.answer([], "dpo") == "undecided"


def test_pages_say_what_whole_ladders_say(tmp_path):
    rows = read_csv(study_words.TABLE)
    assert {(row["method"], int(row["seed"])) for row in rows} == {
        (method, seed) for method in study_words.NAMES for seed in range(1, 7)
    }
    assert study_words.lacking(rows) == []
    assert {(own.n, own.missing) for own in study_words.differences(rows)} == {(6, 0)}
    (clear,) = [own for own in study_words.differences(rows) if own.p_holm < 0.05]  # as the page says
    assert (clear.method, clear.column, clear.kl) == ("infonca", "train_logratio_best", 0.75)
    assert clear.difference < 0
    assert sum(float(row["minutes"]) for row in rows) / 120 == pytest.approx(3.6, abs=0.05)
    data = [json.loads(line)["rewards"] for line in (ROOT / "data/study/words/train.jsonl").read_text().splitlines()]
    assert round(fmean(map(pstdev, data)), 2) == 0.34  # and the page says so
    study_words.tell(tmp_path)
    for page in study_words.PAGES:
        assert "<!-- words verdicts -->\n- **InfoNCA**" in (tmp_path / page).read_text()
        assert (tmp_path / page).read_text() == (ROOT / page).read_text()
    assert (ROOT / "docs/study/words.png").exists()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_table(tmp_path, model_dir):
    (tmp_path / "tiny_scorer.py").write_text(SCORER)
    (tmp_path / "data").mkdir()
    for seed, (split, n) in enumerate([("train", 8), ("validation", 3), ("test", 4)]):
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, reward_rows(n, seed=seed))))
    asked = {
        "base": {
            "model_name_or_path": model_dir, "dataset_name": str(tmp_path / "data"), "use_peft": True, "lora_r": 4,
            "lora_target_modules": ["q_proj", "v_proj"], "bf16": False, "use_cpu": True, "report_to": "none",
            "gradient_checkpointing": False, "max_length": 128, "max_steps": 2, "per_device_train_batch_size": 2,
            "learning_rate": 1e-2, "alpha": 0.5,
        },
        "evaluation": {
            "scorer": "tiny_scorer:long", "num_completions": 2, "reference_completions": 1, "ranked": "best_worst",
            "max_new_tokens": 8, "steps": 1, "validation_steps": 0, "batch_size": 8,
        },
        "grid": [{"method": ["nca", "dpo"], "beta": 0.1, "seed": 1}, {"method": "nca", "beta": 0.1, "seed": 2}],
    }  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def start(name: str) -> subprocess.Popen:
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(asked | {"output_dir": str(tmp_path / name)}))
        return subprocess.Popen(
            [sys.executable, SCRIPT, "run", file, tmp_path / f"{name}.csv"], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def told(name: str) -> list[dict[str, str]]:
        return [{k: v for k, v in row.items() if k != "minutes"} for row in read_csv(tmp_path / f"{name}.csv")]

    whole = start("whole")
    killed = start("killed")
    try:
        while not list((tmp_path / "killed").glob("cells/*/done.json")):
            assert killed.poll() is None, killed.communicate()[0]
            time.sleep(0.05)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
    again = start("killed")
    assert again.wait() == 0, again.communicate()[0]
    assert whole.wait() == 0, whole.communicate()[0]
    again.communicate(), whole.communicate()
    assert len(told("whole")) == 3
    assert told("killed") == told("whole")
    # on another machine, with the table alone
    write_csv(tmp_path / "third.csv", read_csv(tmp_path / "whole.csv")[:2])
    third = start("third")
    output, _ = third.communicate()
    assert third.returncode == 0
    assert "3 cells, 2 of them in" in output
    assert [path.name for path in (tmp_path / "third/cells").iterdir()] == [told("whole")[2]["cell"]]
    assert told("third") == told("whole")
