"""Adapters, a given reference and streams on two processes: as on one, with numbers of rows that don't divide."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import reward_rows
from launched_options import DDP, ROWS
from test_launch import run, same, torchrun

ALIKE = ("modules_to_save", "dora", "pissa", "p_tuning", "reference", "stream", "masks", "hybrid", "hybrid lora")
LABELLED = ("outcome", "outcome stream")
CASES = (*ALIKE, *LABELLED, "shards", "ddp")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(model_dir, tmp_path_factory) -> dict[int, Path]:
    """All cases, trained by one process and by two."""
    folder = tmp_path_factory.mktemp("launched")
    for processes, launcher in ((1, [sys.executable]), (2, torchrun(2))):
        command = [*launcher, "tests/launched_options.py", model_dir, str(folder / str(processes)), *CASES]
        run(command, {"HF_DATASETS_CACHE": str(folder / f"cache{processes}")}, timeout=600)
    return {processes: folder / str(processes) for processes in (1, 2)}


def read(folder: Path, case: str) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads((folder / case / "result.json").read_text()), load_file(folder / case / "weights.safetensors")


@pytest.mark.parametrize("case", [*ALIKE, *LABELLED])
def test_two_processes_train_as_one(case, folders):
    (one, weights), (two, other_weights) = (read(folders[processes], case) for processes in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert len({line["loss"] for line in one["log"]}) == 6
    for line, other in zip(one["log"], two["log"], strict=True):
        same(line, other)
    same(one["evaluation"], two["evaluation"])
    assert weights.keys() == other_weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(other_weights[name], value, rtol=1e-5, atol=2e-6)
    assert one["rows"] == two["rows"]
    if case in LABELLED:  # rows of one completion have all the same rewards less the best
        figures = {name.removeprefix("eval_outcome/") for name in two["evaluation"] if "outcome" in name}
        assert figures == {"accuracy", "auc", "brier", "ece"}
        assert len({len(row) for row in two["rows"]}) > 1
        return
    times = Counter(map(sum, two["rows"]))  # by the sum of its rewards
    assert set(times.values()) == {2}
    assert len(times) == len(ROWS)


def test_what_is_said_of_ddp_reaches_it(folders):
    """And with other buckets and a static graph the same is trained."""
    (one, weights), (two, other_weights) = (read(folders[processes], "ddp") for processes in (1, 2))
    assert one["ddp"] == {}
    assert two["ddp"] == DDP
    unsaid = read(folders[2], "dora")[0]["ddp"]
    assert [name for name in DDP if unsaid[name] == DDP[name]] == ["ddp_backend"]  # a CPU's own
    assert [line["loss"] for line in two["log"]] == pytest.approx([line["loss"] for line in one["log"]], rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(other_weights[name], value, rtol=1e-5, atol=2e-6)


def test_what_an_adapter_trains_beside_its_matrices_moves(folders, model_dir):
    _, saved = read(folders[2], "modules_to_save")
    head = next(value for name, value in saved.items() if "lm_head.modules_to_save" in name)
    assert not torch.equal(head, load_file(Path(model_dir, "model.safetensors"))["lm_head.weight"])
    _, dora = read(folders[2], "dora")
    assert any("lora_magnitude_vector" in name for name in dora)
    started = read(folders[2], "reference")[0]["log"][0]["logratios/best"]
    assert abs(started) > 0.1  # the reference that was given isn't the model


def test_an_adapter_that_edits_the_base_is_saved_for_the_base_as_it_is(folders):
    """Once, by the main process."""
    one, two = (load_file(folders[n] / "pissa" / "model" / "adapter_model.safetensors") for n in (1, 2))
    trained = load_file(Path(folders[2], "pissa", "weights.safetensors"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=2e-6)
        if "lora_A" in name:
            own = trained[name.replace(".weight", ".default.weight")]
            assert value.shape[0] == 2 * own.shape[0] == 8
            torch.testing.assert_close(two[name][:4], own)
    assert not (folders[2] / "pissa" / "model" / "ref").exists()
    assert (folders[2] / "p_tuning" / "model" / "ref").exists()


def test_shards_of_unequal_rows_are_read_once_a_pass(folders):
    """11 and 7 rows in steps of two a process: six steps, of which the second process has rows for four."""
    result, _ = read(folders[2], "shards")
    rows = [row["rewards"] for row in reward_rows(18, 3, seed=3)]
    expected = sorted([reward - max(rewards) for reward in rewards] for rewards in rows)  # as a batch has them
    assert len(result["log"]) == 6
    for found, row in zip(result["rows"], expected, strict=True):
        assert found == pytest.approx(row)


@pytest.mark.parametrize("case", ["reference", "stream", "shards"])
def test_an_evaluation_is_that_of_its_rows(case, folders):
    """Of five rows in batches of two, of which the shards have 3 and 2."""
    one, two = (read(folders[processes], case)[0]["before"] for processes in (1, 2))
    assert one["eval_loss"] > 0
    same(one, two)
