"""What the README tells of the quickstart is what the quickstart logged."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import quickstart_results  # noqa: E402
from nca_align.store.files import read_csv  # noqa: E402


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


def test_the_readmes_table_is_that_of_the_committed_figures():
    table = quickstart_results.table(read_csv(ROOT / "docs/quickstart.csv"))
    page = (ROOT / "README.md").read_text()
    assert quickstart_results.with_block(page, "quickstart", table) == page


def test_a_table_has_each_figure_with_its_interval():
    keys = [key for row in quickstart_results.TOLD.values() for key in row]
    rows = [
        {"label": label, "figure": figure, "mean": "-0.125", "high": "" if label == "training" else "0.375"}
        for label, figure in keys
    ]
    text = quickstart_results.table(rows)
    assert text.count("−0.12") == len(keys)
    assert text.count("−0.12 ± 0.50") == sum(label != "training" for label, _ in keys)
