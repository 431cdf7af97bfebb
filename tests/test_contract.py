"""The parts of TRL and transformers that the trainer overrides, calls and reads are there under the names it uses.

When TRL moves one, a test here says which; without it an override would be dead code, and its training another.
"""

import ast
import dataclasses
import inspect
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import datasets
import pytest
from datasets import Dataset
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer

import nca_align
from conftest import build_model, build_tokenizer, reward_rows
from nca_align import NCAConfig, NCATrainer

SOURCE = Path(nca_align.__file__).parent

# Every method that stands in for one of TRL's or transformers'.
OVERRIDES = {
    "__init__", "_evaluate", "_get_grad_norm", "_get_train_sampler", "_init_training_state", "_precompute_ref_logps",
    "_prepare_dataset", "_save_checkpoint", "_set_signature_columns_if_needed", "compute_loss", "compute_ref_log_probs",
    "evaluate", "evaluation_loop", "floating_point_ops", "get_batch_samples", "get_train_dataloader", "log",
    "prediction_step", "train", "training_step",
}  # fmt: skip
# Every option that DPOConfig has beside transformers' own.
DPO_OPTIONS = {
    "activation_offloading", "beta", "dataset_num_proc", "disable_dropout", "discopop_tau", "f_alpha_divergence_coef",
    "f_divergence_type", "label_smoothing", "ld_alpha", "loss_type", "loss_weights", "max_length", "model_init_kwargs",
    "pad_to_multiple_of", "pad_token", "padding_free", "precompute_ref_batch_size", "precompute_ref_log_probs",
    "ref_model_mixup_alpha", "ref_model_sync_steps", "router_aux_loss_coef", "sync_ref_model", "truncation_mode",
    "trust_remote_code", "use_weighting",
}  # fmt: skip


def methods(cls: type) -> dict[str, object]:
    return {name: value for name, value in vars(cls).items() if inspect.isfunction(value)}


def test_what_is_written_as_an_override_is_one():
    """Fails by name where the parent no longer has a method, and where a method of ours came to hide one of theirs."""
    assert {name for name in methods(NCATrainer) if hasattr(DPOTrainer, name)} == OVERRIDES


@pytest.mark.parametrize("name", sorted(OVERRIDES - {"__init__"}))
def test_an_override_takes_what_the_parent_is_called_with(name):
    ours = inspect.signature(getattr(NCATrainer, name)).parameters.values()
    theirs = inspect.signature(getattr(DPOTrainer, name)).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in (*ours, *theirs)):
        return  # handed through as it comes
    assert len(ours) >= len(theirs)
    if not name.startswith("_"):  # those are called by place
        assert [parameter.name for parameter in ours][: len(theirs)] == [parameter.name for parameter in theirs]


class Recorded(NCATrainer):
    """Counts the calls of each override."""

    calls: ClassVar[Counter] = Counter()


def _recording(name):
    def call(self, *args, **kwargs):
        Recorded.calls[name] += 1
        return getattr(NCATrainer, name)(self, *args, **kwargs)

    return call


for _name in OVERRIDES:
    setattr(Recorded, _name, _recording(_name))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> NCATrainer:
    """One step with a reference that is computed beforehand, an evaluation and a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("no-reference-yet"))
        return train(tmp_path_factory)


def train(tmp_path_factory) -> NCATrainer:
    Recorded.calls.clear()
    tokenizer = build_tokenizer()
    args = NCAConfig(
        str(tmp_path_factory.mktemp("run")), max_steps=1, logging_steps=1, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, precompute_ref_log_probs=True, report_to="none", use_cpu=True,
        per_device_train_batch_size=2, loss_type="infonca",
    )  # fmt: skip
    trainer = Recorded(
        build_model(tokenizer), args=args, train_dataset=Dataset.from_list(reward_rows(4)),
        eval_dataset=Dataset.from_list(reward_rows(2, seed=1)), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return trainer


def test_every_override_is_called(trained):
    assert set(trained.calls) == OVERRIDES


def test_compute_loss_alone_gives_the_loss(trained, monkeypatch):
    """TRL's own loss, which would take chosen and rejected, isn't reached beside it."""
    monkeypatch.setattr(DPOTrainer, "_compute_loss", None)
    monkeypatch.setattr(DPOTrainer, "compute_loss", None)
    before = Recorded.calls["compute_loss"]
    assert trained.evaluate()["eval_loss"] > 0
    assert Recorded.calls["compute_loss"] > before


def names_read(file: str, holders: set[str]) -> set[str]:
    """The attributes that a module reads of `self` or another name in `holders`."""
    tree = ast.parse((SOURCE / file).read_text())
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (
            (isinstance(node.value, ast.Name) and node.value.id in holders)
            or (isinstance(node.value, ast.Attribute) and node.value.attr in holders)
        )
    }


@pytest.mark.parametrize(("file", "holders"), [("trainer.py", {"self"}), ("training/resume.py", {"trainer"})])
def test_what_is_read_of_the_trainer_is_there(trained, file, holders):
    names = names_read(file, holders)
    assert len(names) > 5
    assert {name for name in names if not hasattr(trained, name)} <= {"ref_model"}  # set and taken away again


def test_every_parents_method_that_is_called_is_there():
    tree = ast.parse((SOURCE / "trainer.py").read_text())
    called = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Call)
        and getattr(node.value.func, "id", "") == "super"
    }
    assert called <= OVERRIDES
    assert len(called) > 5


def test_every_name_that_is_imported_from_the_libraries_is_there():
    """Those inside functions too, which fail only when they are reached."""
    imported = {
        (node.module, alias.name)
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and not node.level
        for alias in node.names
        if node.module.split(".")[0] in ("trl", "transformers", "accelerate", "peft", "datasets")
    }
    assert ("trl.trainer.utils", "use_adapter") in imported
    gone = [f"{module}.{name}" for module, name in sorted(imported) if not hasattr(import_module(module), name)]
    assert gone == []


def test_every_option_of_dpo_config_was_looked_at():
    """An option that is new in TRL is either read by NCATrainer or refused by NCAConfig; until then this fails."""
    own = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert {field.name for field in dataclasses.fields(DPOConfig)} - own <= DPO_OPTIONS
