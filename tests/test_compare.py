"""`nca-align compare`: cells as real runs, skipped, resumed, failed and compared; selection sees validation alone."""

import csv
import json
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

import psutil
import pytest
import yaml
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import TrainerCallback

from conftest import labelled_rows, planned, reward_rows
from nca_align.commands.compare import cell as cell_module
from nca_align.commands.compare import command as compare_command
from nca_align.commands.compare import runner
from nca_align.commands.compare.cell import run_cell
from nca_align.commands.compare.grid import Cell, EvaluationSettings, cell_options, expand, from_mapping
from nca_align.commands.compare.splits import read_splits, three_splits
from nca_align.commands.compare.tables import (
    COLUMNS,
    Selection,
    ValidationRows,
    rows_of,
    seeds_of,
    select,
    selected_rows,
    unselected_settings,
)
from nca_align.commands.report.runs import read_run
from nca_align.data import DataOptions, RewardData
from nca_align.data.strategies import PAIRS
from nca_align.errors import UserError
from nca_align.evaluation.comparison_folder import failure
from nca_align.evaluation.endpoints import FIELDS
from nca_align.evaluation.intervals import detectable_difference
from nca_align.store import ownership
from nca_align.store.checkpoints import last_common_checkpoint
from nca_align.store.fingerprints import files_fingerprint
from test_ownership import wait_until

ROOT = Path(__file__).resolve().parents[1]
SCORER = "def long(completions, **kwargs):\n    return [min(len(c[0]['content']), 60) / 60 for c in completions]\n"


@pytest.fixture
def config(tmp_path, model_dir, monkeypatch) -> dict:
    """A comparison of 2 × 2 cells with two seeds; `write` makes its file."""
    (tmp_path / "tiny_scorer.py").write_text(SCORER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tiny_scorer", raising=False)  # an earlier test's
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = tmp_path / "data"
    data.mkdir()
    for seed, (split, n) in enumerate([("train", 8), ("validation", 3), ("test", 4)]):
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, reward_rows(n, seed=seed))))
    return {
        "output_dir": str(tmp_path / "out"),
        "base": {
            "model_name_or_path": model_dir, "dataset_name": str(data), "use_peft": True, "lora_r": 4,
            "lora_target_modules": ["q_proj", "v_proj"], "bf16": False, "use_cpu": True, "report_to": "none",
            "gradient_checkpointing": False, "max_length": 128, "max_steps": 8, "per_device_train_batch_size": 2,
            "logging_steps": 2, "learning_rate": 1e-2, "alpha": 0.5, "lr_scheduler_type": "constant",
        },
        "grid": {"method": ["nca", "dpo"], "beta": [0.1, 0.5], "seed": [1, 2]},
        "evaluation": {
            "scorer": ["tiny_scorer:long"], "num_completions": 2, "max_new_tokens": 8, "steps": 3, "batch_size": 8,
        },
    }  # fmt: skip


def write(config: dict, tmp_path: Path) -> list[str]:
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return ["--config", str(path)]


def read(path: Path) -> list[dict]:
    with open(path) as file:
        return list(csv.DictReader(file))


# Tables, from what a trainer logs


def log_line(step: int, split: str = "test", **figures) -> dict:
    return {f"eval_{split}_{name.replace('__', '/')}": value for name, value in figures.items()} | {"step": step}


def cell(method: str = "nca", seed: int = 1, **settings) -> Cell:
    known = {
        "strategy": "rewards",
        "alpha": 0.5,
        "beta": 0.1,
        "learning_rate": 1e-3,
        "num_completions": None,
        "reward_weights": None,
    }
    whole = {"method": method, **known, **settings, "seed": seed}
    return Cell("-".join(map(str, whole.values())), whole, {})


def rows(own: Cell, validation: list[float], test: list[float], kl: float = 1.0) -> list[dict]:
    """Rewards at steps 0, 1 … of both splits, the KL growing by `kl` a step."""
    return [
        {"cell": own.name, **own.settings, "split": split, "step": step, "reward": value, "kl": kl * step, "minutes": 1}
        for split, values in (("validation", validation), ("test", test))
        for step, value in enumerate(values)
    ]


def test_rows_join_the_lines_of_a_step_and_keep_the_splits_apart(tmp_path):
    log = [
        {"step": 0, "minutes": 0.5},
        log_line(0, generation__reward=0.25, generation__kl=0.0),
        log_line(2, "validation", generation__reward=-1.0),
        {"step": 2, "loss": 1.25},
        log_line(2, logratios__best=0.75, rewards__accuracies=0.5) | log_line(2, "validation", logratios__best=2.0),
        log_line(2, generation__reward=0.375, generation__unknown=1.0),
        {"step": 2, "minutes": 1.5},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    own = cell()
    found = rows_of(own, tmp_path)
    assert [(row["split"], row["step"], row["minutes"]) for row in found] == [
        ("test", 0, 0.5), ("test", 2, 1.5), ("validation", 2, 1.5)
    ]  # fmt: skip
    assert all(row["cell"] == own.name and set(row) <= set(COLUMNS) for row in found)
    first, last, validation = ({k: v for k, v in row.items() if k not in own.settings} for row in found)
    assert (first["reward"], first["kl"]) == (0.25, 0.0)
    assert (last["reward"], last["logratio_best"], last["accuracy"]) == (0.375, 0.75, 0.5)
    assert (validation["reward"], validation["logratio_best"]) == (-1.0, 2.0)
    assert "kl" not in last


def test_selection_sees_no_test_number():
    """Any change of the test rows leaves what is chosen as it was, and any change of validation's can change it."""
    draw = random.Random(0)
    cells_ = [cell(m, s, beta=b, alpha=a) for m in ("nca", "infonca") for b in (0.1, 1) for a in (1, 2) for s in (1, 2)]
    validation = {own.name: [draw.random(), draw.random()] for own in cells_}

    def table(test):
        return [row for own in cells_ for row in rows(own, validation[own.name], [test(), test()])]

    first = table(draw.random)
    for selection in (Selection(), Selection(at_kl=0.5)):
        chosen = select(ValidationRows.of(first), selection, seeds_of(cells_))
        assert len(chosen) == 2
        for _ in range(5):
            other = table(lambda: draw.uniform(-100, 100))
            assert other != first
            assert select(ValidationRows.of(other), selection, seeds_of(cells_)) == chosen
            assert [line["alpha"] for line in selected_rows(other, selection, seeds_of(cells_))] == [
                found["settings"]["alpha"] for found in chosen.values()
            ]
    assert all(row["split"] == "validation" for row in ValidationRows.of(first).rows)
    worst = min(cells_, key=lambda own: validation[own.name][-1])
    validation[worst.name] = [9.0, 9.0]
    found = select(ValidationRows.of(table(draw.random)), Selection(), seeds_of(cells_))
    (best,) = [found[group]["settings"] for group in found if group[0] == worst.settings["method"]]
    assert best == {k: v for k, v in worst.settings.items() if k != "seed"}


def test_the_mean_over_seeds_decides_and_the_test_is_of_what_was_chosen():
    table = [
        *rows(cell(seed=1, beta=0.1), [0, 10.0], [0, 1.0]), *rows(cell(seed=2, beta=0.1), [0, 0.0], [0, 2.0]),
        *rows(cell(seed=1, beta=0.5), [0, 6.0], [0, 3.0]), *rows(cell(seed=2, beta=0.5), [0, 6.5], [0, 5.0]),
        *rows(cell("dpo", alpha=None), [0, 1.0], [0, 7.0]),
    ]  # fmt: skip
    nca, dpo = selected_rows(table, Selection(), planned(table))
    assert (nca["beta"], nca["seeds"], nca["candidates"], nca["validation_reward"]) == (0.5, 2, 2, 6.25)
    assert (nca["test_reward"], nca["test_kl"], nca["minutes"]) == (4.0, 1.0, 1)
    # 4 ± t(0.975, 1) · s / √2 with t = 12.7062 and s = √2
    assert nca["test_reward_low"] == pytest.approx(4 - 12.7062, abs=1e-3)
    assert nca["test_reward_high"] == pytest.approx(4 + 12.7062, abs=1e-3)
    assert (dpo["test_reward"], dpo["test_reward_low"], dpo["test_win_rate"]) == (7.0, None, None)


def test_strategies_are_compared_and_other_settings_chosen():
    table = [row for strategy in ("rewards", "best_worst") for beta in (0.1, 0.5)
             for row in rows(cell(strategy=strategy, beta=beta), [beta], [1.0])]  # fmt: skip
    lines = selected_rows(table, Selection(), planned(table))
    assert [(line["strategy"], line["beta"]) for line in lines] == [("rewards", 0.5), ("best_worst", 0.5)]


def test_unfinished_and_diverged_settings_are_not_chosen():
    table = [
        *rows(cell(seed=1, beta=0.1), [1.0], [0]), *rows(cell(seed=2, beta=0.1), [1.0], [0]),
        *rows(cell(seed=1, beta=0.5), [9.0], [0]),
        *rows(cell(seed=1, beta=2.0), [9.0], [0]), *rows(cell(seed=2, beta=2.0), [float("nan")], [0]),
    ]  # fmt: skip
    (line,) = selected_rows(table, Selection(), planned(table))
    assert (line["beta"], line["candidates"]) == (0.1, 1)
    (why,) = unselected_settings(table, Selection(), planned(table))
    assert why == (
        "2 of 3 settings of nca rewards had no part in the choice: a run isn't finished or has no finite `reward`."
    )
    table = rows(cell(), [float("inf")], [0])
    assert selected_rows(table, Selection(), planned(table)) == []


def test_selection_at_equal_kl():
    """A run that goes further ends higher, but is behind where both have the same KL."""
    table = [*rows(cell(beta=0.1), [0, 1.0, 2.0], [0, 1, 2], kl=4.0), *rows(cell(beta=0.5), [0, 1.5], [0, 5], kl=4.0)]
    assert selected_rows(table, Selection(), planned(table))[0]["beta"] == 0.1
    (line,) = selected_rows(table, Selection(at_kl=2.0), planned(table))
    assert (line["beta"], line["validation_reward"], line["test_reward_at_kl"]) == (
        0.5,
        *(pytest.approx(x / 2**0.5) for x in (1.5, 5)),
    )
    (line,) = selected_rows(table, Selection(at_kl=6.0), planned(table))  # which only one of them reaches
    assert (line["beta"], line["validation_reward"]) == (0.1, pytest.approx(1 + (6**0.5 - 2) / (8**0.5 - 2)))
    for values, message in [
        ({"metric": "loss"}, "`metric` of `select` is 'loss'; it must be one of reward,"),
        ({"at_kl": 0}, "`at_kl` of `select` is 0; it must be a finite number of nats, above 0"),
    ]:
        with pytest.raises(ValueError) as error:
            Selection(**values)
        assert str(error.value).startswith(message)


# Splits


def test_three_splits():
    def data(**sizes) -> RewardData:
        made = {name: Dataset.from_list(reward_rows(n, seed=i)) for i, (name, n) in enumerate(sizes.items())}
        return RewardData(DatasetDict(made))

    options, evaluation = DataOptions(validation_fraction=0.25), EvaluationSettings(scorer=["m:f"], prompts=3)
    train, held_out = three_splits(data(train=8, validation=4, test=2), "train", evaluation, options)
    assert (len(train), len(held_out["validation"]), len(held_out["test"])) == (8, 3, 2)
    # one held-out split is the test's, and validation comes from what is trained on
    both = data(train_prefs=8, test_prefs=4)
    train, held_out = three_splits(both, "train", evaluation, options)
    assert (len(train), len(held_out["validation"]), len(held_out["test"])) == (6, 2, 3)
    prompts = [json.dumps(row["prompt"]) for split in (train, *held_out.values()) for row in split]
    assert len(set(prompts)) == len(prompts) == 11
    with pytest.raises(UserError, match=r"are both 'test_prefs', and `validation_fraction` 0.0 holds out no prompt"):
        three_splits(both, "train", evaluation, DataOptions(validation_fraction=0.0))
    for name in ("validation", "test"):
        with pytest.raises(UserError, match=f"`{name}` of `evaluation` is 'train', which is trained on"):
            three_splits(
                data(train=8, validation=4, test=2),
                "train",
                EvaluationSettings(scorer=["m:f"], **{name: "train"}),
                options,
            )


def test_a_prompt_in_two_splits_stays_in_the_one_that_is_held_out(caplog):
    names = ("train", "validation", "test")
    made = {name: Dataset.from_list(reward_rows(4, seed=i)) for i, name in enumerate(names)}
    own = {name: split["prompt"][:] for name, split in made.items()}
    made["train"] = concatenate_datasets([made[name].select([2]) for name in names] + [made["train"].select([0])])
    made["validation"] = concatenate_datasets([made["validation"], made["test"].select([0, 1])])
    with caplog.at_level("WARNING", "nca_align"):
        train, held_out = three_splits(
            RewardData(DatasetDict(made)), "train", EvaluationSettings(scorer=["m:f"]), DataOptions()
        )
    assert train["prompt"][:] == [own["train"][2], own["train"][0]]
    assert {name: split["prompt"][:] for name, split in held_out.items()} == {k: own[k] for k in names[1:]}
    assert "2 of 4 training prompts are left out: a held-out split has them too." in caplog.text
    assert "2 of 6 validation prompts are left out" in caplog.text
    made["train"] = made["test"]
    with pytest.raises(UserError, match="every prompt of the training split is also in a held-out split"):
        three_splits(RewardData(DatasetDict(made)), "train", EvaluationSettings(scorer=["m:f"]), DataOptions())


# The command, without running a cell


def test_refusals_of_the_command(config, tmp_path, capsys):
    def said(flags=(), **changes) -> str:
        assert compare_command.main([*write(config | changes, tmp_path), *flags]) == 2
        return capsys.readouterr().err

    assert "`grid` is missing; `nca-align compare` takes it from the YAML file" in said(grid=None)
    assert "unknown key `gird`" in said(gird={})
    assert "`parallel` is 0; it must be at least 1" in said(["--parallel", "0"])
    assert "`seed` in `grid` is 'one'; it must be a whole number" in said(grid={"method": "nca", "seed": "one"})
    assert "`timeout_minutes` is 0.0; it must be above 0" in said(["--timeout_minutes", "0"])
    assert "`only` is 'kto*', which matches none of the 8 cells: nca-beta0.1-seed1" in said(["--only", "kto*"])
    assert "`beta` in the comparison's YAML file is 'x'" in said(grid={"method": "nca", "beta": "x"})
    assert "missing_scorer" in said(evaluation={"scorer": "missing_scorer:f"})
    assert "`reference` of `endpoints` is 'kto'; it must be a method with at least two β in the grid: nca, dpo" in said(
        endpoints={"reference": "kto"}
    )
    assert "`at_kl` of `endpoints` is 0; it must be a finite number of nats, above 0" in said(endpoints={"at_kl": [0]})
    assert "`at_kl` of `select` is 2, but `validation_steps` of `evaluation` is 1" in said(
        evaluation=config["evaluation"] | {"validation_steps": 1}, select={"at_kl": 2}
    )
    assert not list((tmp_path / "out").glob("cells/*"))
    assert "`test` of `evaluation` is 'train', which is trained on" in said(
        evaluation=config["evaluation"] | {"test": "train"}
    )  # at once, not in each cell
    assert not [*(tmp_path / "out" / "cells").glob("*/log.txt")]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("compare/*.yaml")), ids=lambda path: path.stem)
def test_the_papers_comparisons(path):
    """Their options are those of the recipe, and their cells are what the paper varies."""
    config, recipe = (yaml.safe_load(p.read_text()) for p in (path, ROOT / "configs" / "nca_mistral7b.yaml"))
    assert set(config["base"]) <= {*recipe, "validation_fraction"}
    assert all(value == recipe.get(key, value) for key, value in config["base"].items())
    from_mapping(EvaluationSettings, "evaluation", config["evaluation"])
    from_mapping(Selection, "select", config["select"])
    cells_ = expand(config["base"] | {"use_cpu": True}, config["grid"], path.name)
    settings = [{key: own.settings[key] for key in ("alpha", "beta", "strategy")} for own in cells_]
    if path.stem == "ablation":
        assert {own["beta"] for own in settings} == {3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1}
        assert {own["alpha"] for own in settings} == {0.01, 0.1, 0.33, 1, 3.33}
        assert len(cells_) == 2 * 8 * 5
    else:
        assert {"rewards", "best_plus_1", "best_plus_2", *PAIRS} < {own["strategy"] for own in settings}
        assert len(cells_) == 2 * 9
        assert {(own["alpha"], own["beta"]) for own in settings} == {(0.01, 0.01)}


def test_the_example_of_the_docs(tmp_path, capsys, monkeypatch):
    page = (ROOT / "docs" / "guide" / "comparing.md").read_text()
    example, commands = (re.search(rf"^```{kind}\n(.+?)^```", page, re.M | re.S)[1] for kind in ("yaml", "bash"))
    (tmp_path / "compare.yaml").write_text(example)
    monkeypatch.chdir(tmp_path)
    dry, real = (shlex.split(line, comments=True) for line in commands.splitlines())
    assert dry[:2] == real[:2] == ["nca-align", "compare"]
    for command in (dry, [*real, "--dry_run"]):
        assert compare_command.main(command[2:]) == 0
        assert "24 cells, 24 to run" in capsys.readouterr().out


def test_a_dry_run_lists_cells_and_writes_nothing(config, tmp_path, capsys):
    arguments = [*write(config, tmp_path), "--dry_run"]
    assert compare_command.main(arguments) == 0
    said = capsys.readouterr().out
    assert said.count(": new\n") == 8
    assert "8 cells, 8 to run: no estimate before one is finished" in said
    assert not (tmp_path / "out").exists()
    done = tmp_path / "out" / "cells" / "nca-beta0.1-seed1"
    done.mkdir(parents=True)
    (done / "done.json").write_text(json.dumps({"steps": 8, "minutes": 2.0}))
    (done / "trainer_state.json").write_text(json.dumps({"log_history": [log_line(8, generation__reward=1.0)]}))
    (tmp_path / "out" / "cells" / "nca-beta0.1-seed2").mkdir()
    (tmp_path / "out" / "cells" / "nca-beta0.1-seed2" / "error.txt").write_text("no memory\n")
    assert compare_command.main([*arguments, "--parallel", "2"]) == 0
    said = capsys.readouterr().out
    assert "nca-beta0.1-seed1: finished, 2.0 minutes" in said
    assert "nca-beta0.1-seed2: failed: no memory" in said
    assert "8 cells, 7 to run: about 7 minutes" in said


def finish(folder: Path, kl: float, reward: float) -> None:
    """A cell's folder as if it had run to this end."""
    folder.mkdir(parents=True)
    log = [log_line(0, generation__reward=0.0, generation__kl=0.0)]
    log.append(log_line(8, generation__reward=reward, generation__kl=kl, logratios__best=kl, logratios__worst=-kl))
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    (folder / "done.json").write_text(json.dumps({"steps": 8, "minutes": 2.0}))


def test_a_dry_run_says_what_difference_can_be_shown(config, tmp_path, capsys):
    """By the spread of the data's rewards, then of what is finished: first ends of runs, then ladders at equal KL."""
    rewards = [row["rewards"] for row in map(json.loads, (tmp_path / "data" / "test.jsonl").read_text().splitlines())]
    arguments = [*write(config | {"endpoints": {"at_kl": 2}}, tmp_path), "--dry_run"]

    def said() -> str:
        assert compare_command.main(arguments) == 0
        return capsys.readouterr().out

    within = statistics.fmean(map(statistics.variance, rewards)) ** 0.5
    least = detectable_difference(within * (2 / (4 * 2)) ** 0.5, 2, 1)  # 4 prompts with 2 answers each, 2 seeds
    first = said()
    assert f"Power: 2 seeds show a difference in reward of {least:.2g} at equal KL with a chance of 80%" in first
    assert "two-sided 5% / 1; methods beside the reference: 1, KLs: 1)" in first
    assert f"the data's rewards have a standard deviation of {within:.2g} within a prompt, and 4 test prompts" in first
    cells = tmp_path / "out" / "cells"
    for seed in (1, 2):
        finish(cells / f"nca-beta0.1-seed{seed}", 4.0, 1.0)
        finish(cells / f"nca-beta0.5-seed{seed}", 1.0, 0.2 * seed)
    least = detectable_difference(0.2 / 2**0.5, 2, 1)  # of the gaps 0.8 and 0.6 between both settings of nca
    assert f"in reward of {least:.2g} at equal KL" in (second := said())
    assert "the spread of differences between ends of runs, seed by seed and not yet at equal KL" in second
    for seed in (1, 2):
        finish(cells / f"dpo-beta0.1-seed{seed}", 4.0, 1.0 + seed)
        finish(cells / f"dpo-beta0.5-seed{seed}", 1.0, 0.2 * seed + seed)
    least = detectable_difference(1 / 2**0.5, 2, 1)  # dpo is 1 ahead with seed 1, 2 with seed 2
    assert f"in reward of {least:.2g} at equal KL" in (third := said())
    assert "the spread of differences at equal KL, seed by seed, in the ladders that are finished" in third


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"method": ["nca", "dpo"], "seed": [1, 2]}, "fewer than two methods have two β"),
        ({"method": ["nca", "dpo"], "beta": [0.1, 0.5], "seed": 1}, "one seed shows no difference"),
    ],
)
def test_a_dry_run_says_where_nothing_can_be_shown(grid, said, config, tmp_path, capsys):
    assert compare_command.main([*write(config | {"grid": grid}, tmp_path), "--dry_run"]) == 0
    assert f"Power: {said}" in capsys.readouterr().out


def test_finished_cells_are_compared_at_equal_kl(config, tmp_path, capsys):
    """The command's `endpoints.csv`, of cells that have run, with the reference and KLs of the file."""
    for method, ahead in (("nca", 0.0), ("dpo", 0.25)):
        for seed in (1, 2):
            finish(tmp_path / "out" / "cells" / f"{method}-beta0.1-seed{seed}", 4.0, 1.0 + ahead)
            finish(tmp_path / "out" / "cells" / f"{method}-beta0.5-seed{seed}", 1.0, 0.5 + ahead)
    asked = config | {"endpoints": {"reference": "dpo", "at_kl": [2.25]}}
    assert compare_command.main([*write(asked, tmp_path), "--report"]) == 0
    assert "methods at equal KL: " in capsys.readouterr().out
    table = read(tmp_path / "out" / "endpoints.csv")
    assert [*table[0]] == [*FIELDS]
    (nca, dpo) = (row for row in table if row["column"] == "reward")
    assert (nca["method"], nca["reference"], nca["kl"], nca["n"]) == ("nca", "dpo", "2.25", "2")
    assert float(nca["difference"]) == pytest.approx(-0.25)
    assert (float(dpo["mean"]), dpo["difference"]) == (pytest.approx(1.0), "")
    assert (tmp_path / "out" / "endpoints-out.md").exists()


def test_a_cell_that_was_trained_is_not_trained_otherwise(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare_command, "run_cells", lambda *_: None)
    config["grid"] = {"method": "nca"}
    assert compare_command.main(write(config, tmp_path)) == 0
    folder = tmp_path / "out" / "cells" / "nca"
    config["base"]["max_steps"] = 4  # nothing was trained yet
    assert compare_command.main(write(config, tmp_path)) == 0
    assert yaml.safe_load((folder / "config.yaml").read_text())["max_steps"] == 4
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "trainer_state.json").write_text("{}")
    assert compare_command.main(write(config, tmp_path)) == 0
    config["base"] |= {"logging_steps": 1, "cpu_threads": 1}  # which change no figure
    assert compare_command.main(write(config, tmp_path)) == 0

    def refused() -> str:
        capsys.readouterr()
        assert compare_command.main(write(config, tmp_path)) == 2
        return capsys.readouterr().err

    (tmp_path / "tiny_scorer.py").write_text(SCORER + "\n")
    assert "the cell nca in `output_dir` was trained with other settings: `scorer`" in refused()
    (tmp_path / "tiny_scorer.py").write_text(SCORER)
    with open(tmp_path / "data" / "test.jsonl", "a") as file:
        file.write("\n" + json.dumps(reward_rows(1, seed=9)[0]))
    config["base"]["learning_rate"] = 1.0
    config["evaluation"]["num_completions"] = 1
    said = refused()
    for part in ("`data` '", "`learning_rate` 0.01 → 1.0", "`evaluation.num_completions` 2 → 1", f"or remove {folder}"):
        assert part in said


def test_the_datas_fingerprint_is_of_every_file_whole(tmp_path):
    """Folders, files saved to disk in one, and patterns; what `datasets` caches there changes nothing."""
    rows = reward_rows(3)
    saved = tmp_path / "saved"
    prints = []
    for reward in (0.25, 0.5):
        changed = [rows[0] | {"rewards": [reward, *rows[0]["rewards"][1:]]}, *rows[1:]]
        DatasetDict({"train": Dataset.from_list(changed)}).save_to_disk(saved)
        (tmp_path / "part-1.jsonl").write_text("\n".join(map(json.dumps, changed)))
        prints.append((files_fingerprint(str(saved)), files_fingerprint(str(tmp_path / "part-*.jsonl"))))
    assert all(before != after for before, after in zip(*prints, strict=True))
    assert files_fingerprint(str(tmp_path / "part-1.jsonl")) == prints[1][1]
    (saved / "train" / "cache-0123.arrow").write_text("x")
    (saved / ".git").mkdir(exist_ok=True)
    (saved / ".git" / "index").write_text(str(len(prints)))
    assert files_fingerprint(str(saved)) == prints[1][0]
    assert files_fingerprint("org/data") == "org/data"


def test_another_reward_model_in_the_same_folder_is_another_scorer(config, tmp_path, model_dir, capsys, monkeypatch):
    monkeypatch.setattr(compare_command, "run_cells", lambda *_: None)
    reward_model = tmp_path / "reward-model"
    shutil.copytree(model_dir, reward_model)
    config["grid"], config["evaluation"]["scorer"] = {"method": "nca"}, [str(reward_model)]
    assert compare_command.main(write(config, tmp_path)) == 0
    checkpoint = tmp_path / "out" / "cells" / "nca" / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    assert compare_command.main(write(config, tmp_path)) == 0
    (reward_model / "model.safetensors").write_bytes(b"others")
    assert compare_command.main(write(config, tmp_path)) == 2
    assert "was trained with other settings: `scorer`" in capsys.readouterr().err


def test_failures_are_named_whatever_is_asked_for_beside(config, tmp_path, capsys, monkeypatch):
    """Of a comparison without a figure there is no report, and what failed is said; one that is done hasn't failed."""

    def fail(todo, output, *_):
        for own in todo:
            (output / "cells" / own.name / "error.txt").write_text("no such reward model\n")

    monkeypatch.setattr(compare_command, "run_cells", fail)
    config["grid"] = {"method": ["nca", "dpo"]}
    assert compare_command.main([*write(config, tmp_path), "--report"]) == 1
    said = capsys.readouterr()
    assert said.err.count("no such reward model") == 2
    assert "Prompts: training 8, validation 3, test 4" in said.out
    folder = tmp_path / "out"
    assert json.loads((folder / "provenance.json").read_text())["prompts"] == {
        "training": 8, "validation": 3, "test": 4
    }  # fmt: skip
    with pytest.raises(UserError, match="is a comparison with no finished cell; wait for the first"):
        read_run(folder)
    own = folder / "cells" / "dpo"
    (own / "done.json").write_text(json.dumps({"steps": 8, "minutes": 1.0}))
    assert failure(folder / "cells" / "dpo") is None
    assert failure(folder / "cells" / "nca") == "no such reward model"


UNFINISHED = "of each setting a run isn't finished or has no finite `reward`."


def test_what_nothing_can_be_chosen_of_is_told():
    own = {
        "sft": rows(cell("sft"), [0.1, 0.2], [0.1, 0.2], kl=1.0),
        "nca": rows(cell(), [0.1, 0.2], [0.1, 0.2], kl=6.0),
    }
    every = [row for found in own.values() for row in found]
    assert unselected_settings(every, Selection(), planned(every)) == []
    (line,) = unselected_settings(every, Selection(at_kl=5), planned(every))
    assert line == (
        "Nothing chosen of sft rewards: of each setting a run isn't finished or has no finite `reward` at a KL of 5, "
        "which it may never have come to."
    )
    lacking = [*rows(cell(beta=0.1, seed=1), [0.1], [0.1]), *rows(cell(beta=0.5, seed=2), [0.1], [0.1])]
    said = [f"Nothing chosen of nca rewards: {UNFINISHED}"]
    assert unselected_settings(lacking, Selection(), planned(lacking)) == said


def test_a_method_of_which_a_seeds_cell_failed_is_not_chosen():
    """A mean over the seeds that are left would be of other runs than the others'."""
    grid = [cell(method, seed) for method in ("nca", "sft") for seed in (1, 2, 3)]
    grid += [cell("kto", num_completions=2)]  # of which there is nothing at all
    table = [row for own in grid[:6] if own != grid[2] for row in rows(own, [0.5], [0.5])]
    assert [line["method"] for line in selected_rows(table, Selection(), seeds_of(grid))] == ["sft"]
    said = [f"Nothing chosen of {name}: {UNFINISHED}" for name in ("nca rewards", "kto rewards K 2")]
    assert unselected_settings(table, Selection(), seeds_of(grid)) == said


def test_the_choice_goes_by_the_mean_where_settings_have_other_numbers_of_seeds():
    grid = [*(cell(beta=0.1, seed=seed) for seed in (1, 2, 3)), cell(beta=0.5)]
    table = [row for own in grid for row in rows(own, [own.settings["beta"]], [0.5])]
    (line,) = selected_rows(table, Selection(), seeds_of(grid))
    assert line["beta"] == 0.5


def test_cells_share_what_there_is(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 0)
    own = cell()
    assert runner._environment(own, 1, 4)["OMP_NUM_THREADS"] == "2"
    assert "OMP_NUM_THREADS" not in runner._environment(own, 0, 1)
    assert "OMP_NUM_THREADS" not in runner._environment(Cell("x", {}, {"cpu_threads": 3}), 1, 4)
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 2)
    assert [runner._environment(own, slot, 4)["CUDA_VISIBLE_DEVICES"] for slot in range(4)] == ["0", "1", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert runner._environment(own, 1, 2)["CUDA_VISIBLE_DEVICES"] == "7"


def test_why_a_cell_failed(tmp_path):
    def why(code: int, log: str = "") -> str:
        (tmp_path / "log.txt").write_text(log)
        return runner._reason(code, tmp_path)

    assert why(2, "loading\ncell: error: `beta` is odd\n\n") == "`beta` is odd"
    assert why(1, "Traceback …\nRuntimeError: no memory\n") == "RuntimeError: no memory"
    assert why(3) == "exit code 3"
    assert why(-signal.SIGKILL, "step 3") == "ended by SIGKILL (out of memory?)"
    assert why(75) == "stopped by SIGTERM; it goes on from its last checkpoint"


def test_a_cell_that_was_finished_has_not_failed_whatever_came_after(tmp_path, monkeypatch):
    finished = "import pathlib, sys; pathlib.Path(sys.argv[-1], 'done.json').write_text('{}'); sys.exit(1)"
    popen = subprocess.Popen
    monkeypatch.setattr(runner.subprocess, "Popen", lambda args, **kw: popen([args[0], "-c", finished, args[-1]], **kw))
    own = cell()
    own.folder(tmp_path).mkdir(parents=True)
    runner.run_cells([own], tmp_path, 1, None, lambda: None)
    assert (own.folder(tmp_path) / "done.json").exists()
    assert not (own.folder(tmp_path) / "error.txt").exists()
    assert failure(own.folder(tmp_path)) is None


# Real cells


def until(scorer, calls: int):
    """`scorer`, which fails after so many calls."""
    left = iter(range(calls))

    def called(completions, **kwargs):
        if next(left, None) is None:
            raise UserError("cut off")
        return scorer(completions)

    return called


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nca", "dpo", "kto"])
def test_a_cell_goes_on_from_its_last_evaluation(method, config, tmp_path):
    """Cut off in the evaluation after its last step, it has the figures of a cell that was not; and is then `model`."""
    evaluation = EvaluationSettings(**config["evaluation"])
    grid = {"method": method, "beta": 0.1, "seed": 3}
    (own,) = expand(config["base"], grid, "compare.yaml")
    tiny_scorer = import_module("tiny_scorer")
    found, folders = [], [tmp_path / name / "cells" / own.name for name in ("whole", "cut")]
    for folder in folders:
        runner.prepare([own], folder.parents[1], evaluation)
        if folder is folders[1]:
            with pytest.MonkeyPatch.context() as patch:
                # the reference's answers to two splits at step 0, the policy's at steps 2 and 4
                patch.setattr(tiny_scorer, "long", until(tiny_scorer.long, 6))
                with pytest.raises(UserError, match="cut off"):
                    run_cell(folder)
            assert last_common_checkpoint(folder).name == "checkpoint-4"
            assert not (folder / "done.json").exists()
        with pytest.MonkeyPatch.context() as patch:
            if folder is folders[1]:  # the reference's answers again, and the policy's at step 6: none of before
                patch.setattr(tiny_scorer, "long", until(tiny_scorer.long, 4))
            run_cell(folder)
        found.append([{k: v for k, v in row.items() if k != "minutes"} for row in rows_of(own, folder)])
        assert json.loads((folder / "done.json").read_text())["steps"] == 8
        assert json.loads((folder / "cell.json").read_text())["settings"] == own.settings
        assert (folder / "model" / "adapter_config.json").exists()
        assert not list(folder.glob("checkpoint-*"))
    assert found[0] == found[1]
    assert [row["step"] for row in found[0]] == [0, 2, 4, 8] * 3
    ranked = [row for row in found[0] if row["split"] == "train"]
    assert all(row["logratio_best"] is not None and "reward" not in row for row in ranked)
    found = [[row for row in rows if row["split"] != "train"] for rows in found]
    of_labels = {"auc", "brier", "ece"}
    assert all(set(COLUMNS) - set(row) - {"kendall_tau", "minutes"} == of_labels for row in found[0])
    assert found[0][3]["kl"] > found[0][0]["kl"] == 0


def test_a_training_that_stops_early_is_no_finished_cell(config, tmp_path, monkeypatch):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True

    monkeypatch.setattr(cell_module, "build_trainer", partial(cell_module.build_trainer, callbacks=[Stop()]))
    (own,) = expand(config["base"], {"method": "nca"}, "compare.yaml")
    runner.prepare([own], tmp_path, EvaluationSettings(**config["evaluation"]))
    with pytest.raises(UserError, match="training ended before its last step, 8; see the log above"):
        run_cell(tmp_path / "cells" / own.name)
    assert not (tmp_path / "cells" / own.name / "done.json").exists()


@pytest.mark.slow
def test_prompts_with_fewer_completions_than_a_cells_k_are_told(config, tmp_path, caplog):
    rows_ = [row | {"completions": row["completions"][: 2 + i % 2], "rewards": row["rewards"][: 2 + i % 2]}
             for i, row in enumerate(reward_rows(8, 3))]  # fmt: skip
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows_)))
    for count, told in ((2, False), (3, True)):
        grid = {"method": "nca", "num_completions": count}
        (own,) = expand(config["base"] | {"max_steps": -1}, grid, "compare.yaml")
        runner.prepare([own], tmp_path, EvaluationSettings(**config["evaluation"] | {"steps": 1}))
        with caplog.at_level("WARNING", "nca_align"):
            run_cell(tmp_path / "cells" / own.name)
        assert ("4 of 8 training prompts have fewer than 3 completions and are left out of this" in caplog.text) == told


def test_all_cells_of_a_grid_see_the_same_rows(config, tmp_path):
    """A loss of labels alone reads rows of one completion; beside others it reads those that they can read."""
    lone = [row | {key: row[key][:1] for key in ("completions", "rewards")} for row in reward_rows(3, 2, seed=9)]
    rows_ = [*lone, *reward_rows(5, 2)]
    for file in (tmp_path / "data").iterdir():  # labels everywhere, or no held-out row would be left
        own = rows_ if file.stem == "train" else [json.loads(line) for line in file.read_text().splitlines()]
        labelled = [row | {"rewards": [float(k == 0) for k in range(len(row["rewards"]))]} for row in own]
        file.write_text("\n".join(map(json.dumps, labelled)))
    base = config["base"] | {"on_invalid": "drop"}

    def prompts(cells: list[Cell]) -> dict[str, list]:
        found = {}
        for own in cells:
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(own.options))
            script, options, _, args, _ = cell_options(tmp_path / "config.yaml")
            train, _ = read_splits(script, options, args, EvaluationSettings(**config["evaluation"]))
            found[own.settings["method"]] = train["prompt"][:]
        return found

    alone = prompts(expand(base, {"method": "outcome"}, "f"))
    assert {name: len(read) for name, read in alone.items()} == {"outcome": 8}
    read = prompts(expand(base, {"method": ["outcome", "nca", "kto"]}, "f"))
    assert len(read["nca"]) == 5
    assert read["outcome"] == read["nca"] == read["kto"]


@pytest.mark.slow
def test_cells_differ_in_the_weights_of_several_rewards(config, tmp_path):
    """A weight of 1 gives the figures of that reward alone, and each weighting is chosen for by itself."""
    for file in (tmp_path / "data").iterdir():
        rows_ = [row | {"rewards": {"a": row["rewards"], "b": row["rewards"][::-1]}}
                 for row in map(json.loads, file.read_text().splitlines())]  # fmt: skip
        file.write_text("\n".join(map(json.dumps, rows_)))
    base, table = config["base"] | {"max_steps": 2}, []
    weighed = expand(base, {"method": "nca", "reward_weights": [{"a": 1}, {"a": 0.5, "b": 1}]}, "compare.yaml")
    alone = expand(base | {"score": "a"}, {"method": "nca"}, "compare.yaml")
    for output, cells in ((tmp_path / "weighed", weighed), (tmp_path / "alone", alone)):
        runner.prepare(cells, output, EvaluationSettings(**config["evaluation"] | {"steps": 1}))
        for own in cells:
            run_cell(own.folder(output))
            table.append(rows_of(own, own.folder(output)))
    one, both, score = ([{key: value for key, value in row.items() if key not in ("cell", "minutes", "reward_weights")}
                         for row in rows_] for rows_ in table)  # fmt: skip
    assert one == score != both
    chosen = selected_rows([*table[0], *table[1]], Selection(), seeds_of(weighed))
    assert [line["reward_weights"] for line in chosen] == ["a 1", "a 0.5 b 1"]


@pytest.mark.slow
def test_checkpoints_stay_where_they_are_asked_for(config, tmp_path):
    (own,) = expand(config["base"] | {"save_total_limit": 3}, {"method": "sft"}, "compare.yaml")
    runner.prepare([own], tmp_path, EvaluationSettings(**config["evaluation"]))
    folder = tmp_path / "cells" / own.name
    run_cell(folder)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-8"}
    (folder / "done.json").unlink()  # as if it had been killed after its last step
    run_cell(folder)
    steps = [row["step"] for row in rows_of(own, folder)]
    assert steps == [0, 2, 4, 8] * 3


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "nca_align", "compare", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


def figures(path: Path, name: str) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "minutes"} for row in read(path) if row["cell"] == name]


@pytest.mark.slow
def test_a_grid_killed_half_way_and_resumed(config, tmp_path, capfd):
    """2 × 2 cells with two seeds, and one that must fail: named, while the rest complete with the figures that they
    have when nothing interrupts them."""
    output = tmp_path / "out"
    scorer = (tmp_path / "tiny_scorer.py").read_text()
    waiting = (  # one cell stays in the evaluation after its fourth step, until it is killed
        f"import os, time\nCALLS = []\n{scorer}\n_long = long\n"
        "def long(completions, **kwargs):\n"
        "    CALLS.append(1)\n"
        f"    while os.path.exists({str(tmp_path / 'hold')!r}) and len(CALLS) > 4:\n"
        "        time.sleep(0.05)\n"
        "    return _long(completions)\n"
    )
    (tmp_path / "tiny_scorer.py").write_text(waiting)
    config["grid"] = [
        {"method": ["nca", "dpo"], "beta": [0.1, 0.5], "seed": [1, 2]},
        {"method": "infonca", "num_completions": 9, "seed": 1},
    ]
    arguments = [*write(config, tmp_path), "--parallel", "2"]
    process = start(arguments)
    folders = output / "cells"
    for seed in (1, 2):  # either may be the first; one that is held would keep its slot
        wait_for(folders / f"nca-beta0.1-seed{seed}" / "done.json", process)
    (tmp_path / "hold").touch()
    wait_for(folders / "nca-beta0.5-seed2" / "checkpoint-2", process)
    wait_for(output / "comparison.csv", process)  # of what is finished, while others run
    finished = {path: path.stat().st_mtime_ns for path in folders.glob("*/done.json")}
    assert {row["cell"] for row in read(output / "comparison.csv")} <= {path.parent.name for path in finished}
    cells = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert 2 <= len(finished) < 8
    begun = [path.parent.name for path in folders.glob("*/checkpoint-*") if not (path.parent / "done.json").exists()]
    assert begun
    (tmp_path / "hold").unlink()
    wait_until(lambda: not any(ownership._started(cell.pid) for cell in cells))  # it ends with what started it

    assert compare_command.main(arguments) == 1
    said = capfd.readouterr()
    assert f"9 cells, {len(finished)} of them finished" in said.out
    assert "Failed: infonca-K9-seed1: `strategy` first_9 leaves no row" in said.err
    assert said.err.count("Failed:") == 1
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    rows_ = read(output / "comparison.csv")
    assert len(rows_) == 8 * 3 * 4  # cells, splits, evaluations
    assert {(row["step"]) for row in rows_} == {"0", "2", "4", "8"}
    assert len(read(output / "selected.csv")) == 2
    assert {row["method"] for row in read(output / "endpoints.csv")} <= {"nca", "dpo"}
    for name in begun:
        state = json.loads((folders / name / "trainer_state.json").read_text())
        steps = [line["step"] for line in state["log_history"] if "minutes" in line]
        assert steps == [0, 2, 4, 8]
        minutes = [line["minutes"] for line in state["log_history"] if "minutes" in line]
        assert minutes == sorted(minutes)
    about = json.loads((output / "provenance.json").read_text())
    assert {"command", "date", "versions", "commit", "machine", "config"} <= set(about)
    assert (folders / begun[0] / "model" / "adapter_model.safetensors").exists()
    assert not list((folders / begun[0]).glob("checkpoint-*"))

    # nothing is left to do, but the failed cell is tried again; and uninterrupted cells have the same figures
    alone = config | {"output_dir": str(tmp_path / "alone")}
    process = start([*write(alone, tmp_path), "--only", begun[0]])
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    assert figures(tmp_path / "alone" / "comparison.csv", begun[0]) == figures(output / "comparison.csv", begun[0])
    assert compare_command.main([*arguments, "--only", "nca-*", "--output_dir", str(output)]) == 0
    assert "4 cells, 4 of them finished" in capfd.readouterr().out


@pytest.mark.slow
def test_a_cell_over_its_time_is_stopped_and_the_next_one_runs(config, tmp_path, capfd):
    config["grid"] = [{"method": "nca", "seed": 1}, {"method": "sft", "seed": 1}]
    config["timeout_minutes"] = 0.02
    assert compare_command.main(write(config, tmp_path)) == 1
    said = capfd.readouterr()
    assert said.err.count("it took longer than `timeout_minutes`, 0.02") == 2
    assert not (tmp_path / "out" / "comparison.csv").exists()


def test_what_is_deaf_to_sigterm_is_not_waited_for(monkeypatch):
    """As a cell is in a long evaluation: it goes on from the one before."""
    monkeypatch.setattr(runner, "_GRACE", 0.5)
    deaf = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); sys.stdin.read()"
    hears = "import sys; print(flush=True); sys.stdin.read()"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for code in (deaf, hears)
    ]
    for process in processes:
        process.stdout.readline()
    runner._end(processes)
    assert [process.wait(5) for process in processes] == [-signal.SIGKILL, -signal.SIGTERM]
    for process in processes:
        process.stdin.close()
        process.stdout.close()


@pytest.mark.slow
def test_a_cell_of_labels_takes_single_completions_and_has_no_alpha(config, tmp_path):
    """And a base's α and `completion_mean` stay with the methods that have them."""
    for split in ("train", "validation", "test"):
        rows_ = labelled_rows(8, [1, 2], seed=len(split))
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows_)))
    base = config["base"] | {"alpha": 0.3, "completion_mean": True}
    (own,) = expand(base, {"method": "outcome", "num_completions": 1}, "compare.yaml")
    assert (own.settings["alpha"], own.settings["num_completions"]) == (None, 1)
    assert "alpha" not in own.options
    (other,) = expand(base, {"method": "nca"}, "compare.yaml")
    assert (other.settings["alpha"], "completion_mean" in other.options) == (0.3, False)
    runner.prepare([own], tmp_path, EvaluationSettings(**config["evaluation"] | {"steps": 1}))
    run_cell(tmp_path / "cells" / own.name)
    state = next((tmp_path / "cells" / own.name).glob("**/trainer_state.json"))
    log = json.loads(state.read_text())["log_history"]
    assert all(0 <= line["eval_test_outcome/auc"] <= 1 for line in log if "eval_test_outcome/auc" in line)
    assert any("eval_test_outcome/auc" in line for line in log)
    table = [row for row in rows_of(own, tmp_path / "cells" / own.name) if row["split"] == "test"]
    assert all(0 <= row["auc"] <= 1 for row in table)
