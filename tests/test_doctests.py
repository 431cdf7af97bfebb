"""The example in the docstring of each public name runs, with a tiny model and a few rows."""

import copy
import doctest
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import nca_align
from conftest import build_model, reward_rows
from nca_align import NCAConfig, NCATrainer

NAMES = sorted({*nca_align.__all__} - {"LOSSES"})  # a dictionary, which has no docstring


@pytest.fixture(scope="module")
def namespace(tokenizer, tmp_path_factory) -> dict:
    """What the examples take as given, beside the public names."""
    model, run = build_model(tokenizer), tmp_path_factory.mktemp("run")
    rows = Dataset.from_list(reward_rows(2))
    args = NCAConfig(str(run), max_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    trainer = NCATrainer(copy.deepcopy(model), args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_state()
    return {name: getattr(nca_align, name) for name in nca_align.__all__} | {
        "torch": torch, "Dataset": Dataset, "Path": Path, "tokenizer": tokenizer, "rows": rows, "model": model,
        "reference": build_model(tokenizer, seed=1), "trainer": trainer, "run": run,
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_runs(name, namespace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, reward_rows(2))))
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(nca_align, name), name, globs=dict(namespace))
    assert example.examples
    said: list[str] = []
    doctest.DocTestRunner().run(example, out=said.append)
    assert not said, "".join(said)
