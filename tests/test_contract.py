"""Every private name of TRL, transformers and accelerate that we use: it is listed here, it exists, and it is called.

Private is a name with an underscore in front, and what stands in a module that is not in `PUBLIC`. When a library moves
one, a test here says which; without it an override would be dead code, and its training another.
"""

import ast
import inspect
import re
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import datasets
import pytest
from datasets import Dataset
from datasets.packaged_modules.parquet.parquet import Parquet
from transformers import PreTrainedModel
from trl import DPOTrainer
from trl.trainer.base_trainer import _BaseTrainer

import nca_align
from conftest import build_model, build_tokenizer, reward_rows
from nca_align import NCAConfig, NCATrainer

SOURCE = Path(nca_align.__file__).parent
LIBRARIES = ("trl", "transformers", "accelerate", "peft")
PRIVATE = re.compile(r"_[a-zA-Z]\w*")

# Every method that stands in for one of TRL's or transformers'.
OVERRIDES = {
    "__init__", "_evaluate", "_get_dataloader", "_get_grad_norm", "_init_training_state", "_load_best_model",
    "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state", "_load_scaler",
    "_precompute_ref_logps", "_prepare_dataset", "_prepare_for_training", "_push_from_checkpoint",
    "_save_checkpoint", "compute_loss", "compute_ref_log_probs", "create_model_card", "evaluate", "evaluation_loop",
    "floating_point_ops", "get_batch_samples", "log", "predict", "prediction_step", "save_model", "train",
    "training_step",
}  # fmt: skip
# Methods of TRL's and transformers' objects that are called.
CALLED = {
    "_can_set_attn_implementation": PreTrainedModel, "_get_output_dir": DPOTrainer,
    "_maybe_log_save_evaluate": DPOTrainer, "_prepare_inputs": DPOTrainer, "_save": DPOTrainer,
}  # fmt: skip
# Values of theirs that are read or set: what holds each after a run, and a text of theirs that uses it.
VALUES = {
    "_can_checkpoint_with_cache": (lambda nca: nca.model.model.layers[0], "modeling_layers"),
    "_gradient_checkpointing_func": (lambda nca: nca.model.model.layers[0], "modeling_layers"),
    "_attn_implementation": (lambda nca: nca.model.config, "modeling_utils"),
    "_globalstep_last_logged": (lambda nca: nca, "trainer"),
    "_is_stateful": (lambda nca: nca.model, "modeling_utils"),
    "_is_accelerate_prepared": (lambda nca: nca.model, "accelerator"),
    "_models": (lambda nca: nca.accelerator, "accelerator"),
    "_n_gpu": (lambda nca: nca.args, "training_args"),
    "_name": (lambda nca: nca, "trl"),
    "_name_or_path": (lambda nca: nca.model.config, "configuration_utils"),
    "_signature_columns": (lambda nca: nca, "trainer"),
    "_supports_attention_backend": (lambda nca: nca.model, "modeling_utils"),
    "_tag_names": (lambda nca: nca, "trl"),
    "_tokenizer": (lambda nca: nca, "trl"),
    "_total_loss_scalar": (lambda nca: nca, "trainer"),
    "_tr_loss": (lambda nca: nca, "trainer"),
}
# What is imported from private modules, and what of it runs.
IMPORTED = {
    "accelerate.data_loader.SkipBatchSampler": "__iter__",
    "accelerate.data_loader.prepare_data_loader": None,
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS": "__getitem__",
    "transformers.trainer.DEFAULT_PROGRESS_CALLBACK": "__init__",
    "transformers.trainer_pt_utils.BatchRebalanceSampler": "__iter__",
    "transformers.trainer_pt_utils.LengthGroupedSampler": "__iter__",
    "transformers.trainer_utils.rotate_checkpoints": None,
    "trl.models.prepare_deepspeed": None,
}
# Modules that are imported whole, what in them is replaced, and how often it is used there.
REPLACED = {"trl.trainer.dpo_trainer": {"BaseTunerLayer": 1, "create_model_from_path": 2, "prepare_fsdp": 1}}
NEEDS_DEEPSPEED = {"trl.models.prepare_deepspeed"}  # called by `make test-deepspeed`
# Where private names may stand.
ALLOWED = ("trainer.py", "training/", "batching/attention.py", "batching/recurrent.py")
# Modules that the libraries document; a model's own module is one.
PUBLIC = (
    r"(accelerate|transformers|trl|peft)(\.utils)?", r"trl\.data_utils", r"transformers\.models\..*",
    r"peft\.tuners\.tuners_utils", r"transformers\.integrations",
)  # fmt: skip
# Private names of other libraries, which are no part of this contract.
OTHERS = {
    "_ExtendAction", "_actions",  # argparse
    "_create_connection",  # http.client
    "_send_signal",  # multiprocessing
    "_asdict", "_exit", "_fields", "_replace",  # Python
    "_cast_table", "_fingerprint", "_generate_tables",  # datasets
    "_buffers", "_cdata", "_grouped_mm", "_parameters", "_to_copy",  # PyTorch; tests/test_memory_plan.py counts by them
}  # fmt: skip


def methods(cls: type) -> dict[str, object]:
    return {name: value for name, value in vars(cls).items() if inspect.isfunction(value)}


def test_what_is_written_as_an_override_is_one():
    """Fails by name where the parent no longer has a method, and where a method of ours came to hide one of theirs."""
    assert {name for name in methods(NCATrainer) if hasattr(DPOTrainer, name)} == OVERRIDES


@pytest.mark.parametrize("name", sorted(OVERRIDES - {"__init__"}))
def test_an_override_takes_what_the_parent_is_called_with(name):
    ours = inspect.signature(getattr(NCATrainer, name))
    signatures = (inspect.signature(vars(cls)[name]) for cls in DPOTrainer.__mro__ if name in vars(cls))
    # TRL hands some through as they come
    theirs = next(own for own in signatures if all(p.kind is not p.VAR_POSITIONAL for p in own.parameters.values()))
    names = list(theirs.parameters)
    by_place = ours.bind(*names).arguments
    if not name.startswith("_"):  # those are called by place alone
        by_place.pop("args", None)
        assert list(by_place) == list(by_place.values())
        ours.bind("self", **dict.fromkeys(names[1:]))
    assert all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) or p.name in by_place
               for p in ours.parameters.values())  # fmt: skip


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
    """Two steps with what is used now and then, the second one resumed; all code that ran is in `ran`.

    A reference that is computed beforehand, chunks, both samplers, an evaluation and checkpoints.
    """
    codes = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("no-reference-yet"))
        sys.setprofile(lambda frame, event, _: codes.add(frame.f_code))
        try:
            Recorded.calls.clear()
            train(tmp_path_factory, train_sampling_strategy="group_by_length", max_steps=1)
            trained = train(tmp_path_factory, train_sampling_strategy="batch_rebalance", resume=True)
        finally:
            sys.setprofile(None)
    trained.ran = codes
    return trained


def train(tmp_path_factory, resume: bool = False, **own) -> NCATrainer:
    tokenizer = build_tokenizer()
    args = {
        "output_dir": str(tmp_path_factory.mktemp("run")), "max_steps": 2, "logging_steps": 1, "eval_strategy": "steps",
        "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "precompute_ref_log_probs": True,
        "report_to": "none", "use_cpu": True, "per_device_train_batch_size": 2, "loss_type": "infonca",
        "tokens_per_forward": 40, "save_total_limit": 2, "bf16": False,
    } | own  # fmt: skip
    for checkpoint in (None, f"{args['output_dir']}/checkpoint-1")[: 1 + resume]:
        trainer = Recorded(
            build_model(tokenizer), args=NCAConfig(**args), train_dataset=Dataset.from_list(reward_rows(6)),
            eval_dataset=Dataset.from_list(reward_rows(2, seed=1)), processing_class=tokenizer,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
    return trainer


def test_every_override_is_called(trained):
    where_asked_for = {"predict", "_push_from_checkpoint", "_load_best_model"}
    assert trained.calls.keys() | where_asked_for == OVERRIDES


def test_every_method_that_is_called_is_there_and_runs(trained):
    for name, holder in CALLED.items():
        assert inspect.unwrap(getattr(holder, name)).__code__ in trained.ran, name


def test_every_import_from_a_private_module_runs(trained):
    for path, method in IMPORTED.items():
        module, _, name = path.rpartition(".")
        found = getattr(import_module(module), name)
        function = getattr(found, method) if method else found
        if path not in NEEDS_DEEPSPEED:
            assert inspect.unwrap(function).__code__ in trained.ran, path


def test_what_is_replaced_is_there_for_nothing_else():
    for module, names in REPLACED.items():
        text = inspect.getsource(import_module(module))
        assert {name: len(re.findall(rf"\b{name}\b", text)) - 1 for name in names} == names  # and its import


def test_every_value_that_is_read_is_there_and_the_librarys_own(trained):
    texts = {
        "trl": inspect.getsource(import_module("trl.trainer.dpo_trainer")) + inspect.getsource(_BaseTrainer),
        "accelerator": inspect.getsource(import_module("accelerate.accelerator")),
    } | {
        name: inspect.getsource(import_module(f"transformers.{name}"))
        for name in ("trainer", "training_args", "modeling_utils", "modeling_layers", "configuration_utils")
    }
    for name, (holder, text) in VALUES.items():
        assert hasattr(holder(trained), name), name
        assert re.search(rf"\b{name}\b", texts[text]), name


def defined_in(tree: ast.Module) -> set[str]:
    """Functions, classes, variables, and attributes of `self`."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for inner in (inner for target in targets if target is not None for inner in ast.walk(target)):
            if isinstance(inner, ast.Name):
                names.add(inner.id)
            elif isinstance(inner, ast.Attribute) and ast.unparse(inner.value) == "self":
                names.add(inner.attr)
    return names


def private_uses() -> dict[str, set[str]]:
    """Private name → the modules that use it; an import by its whole path."""
    theirs = {name for name in (*dir(DPOTrainer), *dir(PreTrainedModel), *VALUES) if PRIVATE.fullmatch(name)}
    trees = {str(path.relative_to(SOURCE)): ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    ours = {file: defined_in(tree) for file, tree in trees.items()}
    known = set.union(*ours.values()) - theirs  # else ours only where another class than the trainer defines it
    ours["trainer.py"] = set()
    found: dict[str, set[str]] = {}
    for file, node in nodes:
        names = []
        if isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr):
            names = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in theirs:
            names = [node.value]  # of getattr and its like
        elif isinstance(node, (ast.FunctionDef, ast.Name)) and file == "trainer.py":  # overrides and class attributes
            name = getattr(node, "name", None) or node.id
            names = [name] if name in theirs else []
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in LIBRARIES:
            if not re.fullmatch("|".join(PUBLIC), node.module):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                names = [alias.name for alias in node.names if PRIVATE.fullmatch(alias.name)]
        for name in names:
            if name not in known | ours[file]:
                found.setdefault(name, set()).add(file)
    return found


def test_the_lists_are_complete_and_private_names_stand_where_they_may():
    found = private_uses()
    listed = {name for name in OVERRIDES if name.startswith("_") and name != "__init__"} | {*CALLED, *VALUES, *IMPORTED}
    listed |= REPLACED.keys()
    assert found.keys() - OTHERS == listed
    elsewhere = {
        name: wrong
        for name, files in found.items()
        if name not in OTHERS and (wrong := {file for file in files if not file.startswith(ALLOWED)})
    }
    assert elsewhere == {}


def test_compute_loss_alone_gives_the_loss(trained, monkeypatch):
    """TRL's own loss, which would take chosen and rejected, isn't reached beside it."""
    monkeypatch.setattr(DPOTrainer, "_compute_loss", None)
    monkeypatch.setattr(DPOTrainer, "compute_loss", "create_model_card", None)
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
    assert ("transformers.trainer_utils", "rotate_checkpoints") in imported
    gone = [f"{module}.{name}" for module, name in sorted(imported) if not hasattr(import_module(module), name)]
    assert gone == []


def test_the_private_names_of_datasets_are_there():
    """`tests/test_scale.py` proves by the memory of a run that the reader is the one that is called."""
    assert {"_generate_tables", "_cast_table"} <= set(vars(Parquet))
    assert Dataset.from_dict({"a": [1]})._fingerprint
