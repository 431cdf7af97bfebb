"""Every option of TRL and transformers works here, is refused or is named as idle: the table in `every_option.py`."""

import ast
import copy
import importlib.machinery
import logging
import os
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.utils.logging as library_log
from accelerate import ParallelismConfig
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import DPOConfig

from conftest import build_model, build_tokenizer, reward_rows
from every_option import ROWS, RUNS, SLOW, TABLE, Idle, IdleInCommand, ProvenBy, Refused, Run, Works
from nca_align import NCAConfig, NCATrainer
from nca_align.batching.collator import RewardCollator
from nca_align.commands.train.checks import checkpoint_to_go_on_from
from nca_align.errors import UserError, UserTypeError, notify_once
from nca_align.training import arguments
from nca_align.training.streams import stream_loader
from test_routing import build as build_experts
from test_trainer import trainer
from test_unread import told, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:`pad_token` is deprecated:FutureWarning"),
    # what `torch.compile` does with any of them, and with inputs that need gradients for checkpointing
    pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'> should not be instantiated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed"),
]
HERE = Path(__file__).parent
FIELDS = [field.name for field in fields(DPOConfig)]
# Fields that the oldest supported transformers lack
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"}
ROWS_THAT_FIT = 3  # in the memory of the machine, as a run of the table finds
OF_THE_MACHINE = ("use_cpu", "dataloader_pin_memory")  # a CPU needs the first, which decides the second
# What reads all fields, whatever becomes of them
READS_ALL = {
    "to_dict",
    "changed_options",
    "__repr__",
    "__post_init__",
    "settle_types",
    "refuse_unsupported_options",
    "unread",
}


class Recorded(NCAConfig):
    """Notes which of its fields are read, once `reads` is there."""

    reads: Any = None

    def __getattribute__(self, name):
        reads = object.__getattribute__(self, "reads")
        if reads is not None and name in TABLE:
            frame: Any = sys._getframe(1)
            callers = {frame.f_code.co_name, frame.f_back.f_code.co_name}  # a comprehension has a frame of its own
            if not callers & READS_ALL:
                reads[name].add(frame.f_code.co_name)
        return object.__getattribute__(self, name)


class Count(TrainerCallback, ExportableState):
    """Steps, which a checkpoint keeps."""

    def __init__(self, count: int = 0):
        self.count = count

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self) -> dict:
        return {"args": {}, "attributes": {"count": self.count}}


class Note(TrainerCallback):
    """What is to be seen at the start of a training."""

    def __init__(self, run: Run):
        self.run = run

    def on_train_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        generator = torch.Generator().manual_seed(args.seed if args.data_seed is None else args.data_seed)
        self.run.seen |= {
            "weights": [parameter.detach().clone() for parameter in model.parameters()],
            "lr at the start": optimizer.param_groups[0]["lr"], "loader": train_dataloader,
            "torch seed": torch.initial_seed(),
            "order of the data seed": torch.randperm(8, generator=generator).tolist(),
            "deterministic": torch.are_deterministic_algorithms_enabled(), "verbosity": library_log.get_verbosity(),
            "values": {name: getattr(args, name) for name in FIELDS}, "dtypes": set(),
            # each Accelerator changes the others' state
            "accumulation": dict(self.run.trainer.accelerator.gradient_state.plugin_kwargs),
            "compiled by": self.run.trainer.accelerator.state.dynamo_plugin,
            "columns": train_dataloader.dataset.column_names,
        }  # fmt: skip
        seen = self.run.seen["dtypes"]
        model.get_decoder().layers[0].mlp.register_forward_hook(
            lambda module, given, output: seen.add(output.dtype) if module.training and self.training(module) else None
        )

    @staticmethod
    def training(module) -> bool:
        return torch.is_grad_enabled()


class Settings(dict):
    def update(self, values: dict, allow_val_change: bool) -> None:
        super().update(values)


def stub(run: Run, name: str, result: Callable[[], Any] = lambda: None) -> Callable:
    def call(**given):
        run.calls.setdefault(name, []).append(given)
        return result()

    return call


def done() -> Future:
    future: Future = Future()
    future.set_result(None)
    return future


def stub_services(run: Run, patch: pytest.MonkeyPatch) -> None:
    """The Hub and a tracker, which note what they are called with."""
    hub = SimpleNamespace(
        create_repo=stub(run, "create_repo", lambda: SimpleNamespace(repo_id="me/aligned")),
        upload_folder=stub(run, "upload_folder", done),
    )
    create = hub.create_repo
    hub.create_repo = lambda repo_id, **given: create(repo_id=repo_id, **given)
    patch.setattr("transformers.trainer.hf_api", lambda: hub)
    tracker: Any = types.ModuleType("trackio")
    tracker.__spec__, tracker.__version__ = importlib.machinery.ModuleSpec("trackio", None), "0.99"
    tracker.init, tracker.freeze = stub(run, "init"), stub(run, "freeze")
    tracker.log, tracker.finish, tracker.config = lambda *args, **kwargs: None, lambda: None, Settings()
    tracker.context_vars = SimpleNamespace(current_space_id=SimpleNamespace(get=lambda: "me/space"))
    patch.setitem(sys.modules, "trackio", tracker)


def train_with(options: dict[str, Any], folder: Path, run: Run, model: Any) -> None:
    class Watched(NCATrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            run.batches["train"].append(len(inputs["rewards"]))
            if run.batches["train"][-1] > ROWS_THAT_FIT:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            run.row_numbers += inputs["row_numbers"]
            run.widths += [chunk["input_ids"].shape[1] for chunk in inputs["chunks"]]
            return super().training_step(model, inputs, *args, **kwargs)

        def prediction_step(self, model, inputs, *args, **kwargs):
            run.batches["eval"].append(len(inputs["rewards"]))
            return super().prediction_step(model, inputs, *args, **kwargs)

        def compute_ref_log_probs(self, model, inputs):
            run.batches["reference"].append(len(inputs["rewards"]))
            return super().compute_ref_log_probs(model, inputs)

    common = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "gradient_checkpointing": True, "alpha": 0.5, "learning_rate": 1e-3, "per_device_train_batch_size": 2,
        "logging_steps": 1,
    }  # fmt: skip
    args = Recorded(**common | options)
    args.reads = run.seen.setdefault("reads", defaultdict(set))
    tokenizer = build_tokenizer()
    run.trainer = Watched(
        model, args=args, train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(reward_rows(5, seed=3)), processing_class=tokenizer,
        callbacks=[Count(), Note(run)],
    )  # fmt: skip
    run.metrics = run.trainer.train(resume_from_checkpoint=checkpoint_to_go_on_from(args)).metrics
    callbacks = run.trainer.callback_handler.callbacks
    run.seen["callback"] = next(callback for callback in callbacks if isinstance(callback, Count))


def model_of(run: str) -> Any:
    """What a run trains, of its own."""
    tokenizer = build_tokenizer()
    if run == "experts":
        return build_experts("Mixtral", len(tokenizer))
    return build_model(tokenizer, attention_dropout=0.1 if run == "moving" else 0.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_dir):
    """Gives the run of a name, which is trained once."""
    found: dict[str, Run] = {}

    def run_of(name: str) -> Run:
        if name in found:
            return found[name]
        run, folder = Run(trainer=None), tmp_path_factory.mktemp("run")  # type: ignore[arg-type]
        options = RUNS[name] | {field: entry.value for field, entry in in_run(name).items() if field != "output_dir"}
        environment, verbosity = copy.copy(os.environ), library_log.get_verbosity()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.backends.cudnn.deterministic", torch.backends.cudnn.deterministic)
            patch.setattr("torch.backends.cudnn.benchmark", torch.backends.cudnn.benchmark)
            stub_services(run, patch)
            emptied = run.seen.setdefault("emptied", [])
            patch.setattr("transformers.trainer.clear_device_cache", lambda: emptied.append(run.state.global_step))
            try:
                if name == "resumed":
                    checkpoint = folder / options.pop("resume_from_checkpoint")
                    train_with(options, folder, run, model_of(name))
                    run.seen["first rows"], run.row_numbers = run.row_numbers[:4], []
                    options["resume_from_checkpoint"] = str(checkpoint)
                train_with(options, folder, run, model_dir if name == "from a folder" else model_of(name))
            finally:
                torch.use_deterministic_algorithms(False)
                library_log.set_verbosity(verbosity)
                for key in os.environ.keys() - environment.keys():
                    del os.environ[key]
        # workers that persist would go when Python collects the loader, in any order and in a test that isn't theirs
        if name == "workers":
            run.seen["loader"].base_dataloader._iterator._shutdown_workers()
        found[name] = run
        return run

    return run_of


def in_run(name: str) -> dict[str, Works]:
    return {
        field: entry
        for field, entry in TABLE.items()
        if isinstance(entry, Works) and entry.run == name and field in FIELDS
    }


def of_kind(kind: type) -> list:
    marks = {name: [pytest.mark.slow] for name in SLOW}
    return [
        pytest.param(field, entry, marks=marks.get(getattr(entry, "run", ""), []), id=field)
        for field, entry in TABLE.items()
        if isinstance(entry, kind) and field in FIELDS
    ]


def test_the_table_has_every_field():
    """One that a new release adds has to be looked at first: what reads it, in what runs here?"""
    assert set(FIELDS) - TABLE.keys() == set()
    assert TABLE.keys() - set(FIELDS) <= NEWER


@pytest.mark.parametrize(("name", "entry"), of_kind(Works))
def test_it_works(name, entry, runs):
    run = runs(entry.run)
    if name not in OF_THE_MACHINE:
        assert run.seen["values"][name] != getattr(NCAConfig("unset", use_cpu=True, bf16=False), name)
    if entry.shows is None:
        assert run.seen["reads"][name]
    else:
        assert entry.shows(run)


@pytest.mark.parametrize(("name", "entry"), of_kind(Refused))
def test_it_is_refused(name, entry):
    with pytest.raises(UserError) as error:
        NCAConfig("x", **{"use_cpu": True, "bf16": False, name: entry.value} | entry.beside)
    assert str(error.value).startswith(f"`{name}` ")
    assert entry.says in str(error.value)


@pytest.mark.parametrize(("name", "entry"), of_kind(Idle))
def test_it_is_named_as_idle(name, entry, caplog):
    notify_once.cache_clear()
    NCAConfig("x", **{"use_cpu": True, "bf16": False, name: entry.value} | entry.beside)
    assert told(caplog) == [f"Without effect in this run: `{name}` (needs {entry.needs})."]


@pytest.mark.parametrize(("name", "entry"), of_kind(IdleInCommand))
def test_the_command_names_it_as_idle(name, entry, tmp_path, caplog):
    notify_once.cache_clear()
    assert train(tmp_path, f"--{name}", entry.value, "--eval_strategy", "no") == 2  # the model isn't there
    assert told(caplog) == [f"Without effect in this run: `{name}` (needs {entry.needs})."]


@pytest.mark.parametrize(("name", "entry"), of_kind(ProvenBy))
def test_a_launch_proves_that_it_has_another_value(name, entry):
    file, function = entry.where.split("::")
    nodes = list(ast.walk(ast.parse((HERE / file).read_text())))
    assert function in [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    (started,) = (node.module for node in nodes if isinstance(node, ast.ImportFrom) and "launched" in node.module)
    calls = [node for node in ast.walk(ast.parse((HERE / f"{started}.py").read_text())) if isinstance(node, ast.Call)]
    proofs = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "require_changed"]
    proven = [ast.literal_eval(own) for proof in proofs for own in proof.args[1:]]
    assert name in proven


# Tests of the table's own


@pytest.mark.parametrize("own", [{}, {"tokens_per_forward": 40}])
def test_memory_is_given_back_after_each_micro_batch(own, tmp_path, monkeypatch):
    """Of every second step, by transformers' function and by ours of a few completions at a time."""
    emptied = []
    monkeypatch.setattr("transformers.trainer.clear_device_cache", lambda: emptied.append(nca.state.global_step))
    monkeypatch.setattr("torch.accelerator.empty_cache", lambda: emptied.append(nca.state.global_step))
    nca = trainer(
        tmp_path, torch_empty_cache_steps=2, max_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=1,
        **own,
    )  # fmt: skip
    monkeypatch.setattr("nca_align.training.gradients.torch.accelerator.is_available", lambda: True)
    nca.train()
    assert emptied == [0, 0, 2, 2]


@pytest.mark.parametrize("kind", ["tp", "cp", "sp"])
def test_processes_that_share_a_batch_are_refused(kind, model):
    """`parallelism_config`, a launcher's, or that of a model in parts."""
    config = ParallelismConfig()
    setattr(config, f"{kind}_size", 2)
    with pytest.raises(UserError, match=f"`parallelism_config` has `{kind}_size` 2, but processes can't share"):
        arguments.check_model(model, 64, config, [])
    arguments.check_model(model, 64, ParallelismConfig(), [])


@pytest.mark.parametrize(
    ("name", "value"),
    [("split_batches", True), ("dispatch_batches", True), ("even_batches", False), ("use_seedable_sampler", False)],
)
def test_other_ways_to_deal_batches_are_refused(name, value, tmp_path):
    with pytest.raises(UserError, match=f"`accelerator_config.{name}` is {str(value).lower()}, but .*; leave it out"):
        trainer(tmp_path, accelerator_config={name: value})


def test_a_streams_loader_has_the_options_too(tmp_path):
    options = {name: entry.value for name, entry in in_run("workers").items()}
    args = NCAConfig(str(tmp_path), use_cpu=True, bf16=False, **options)
    nca = trainer(tmp_path, max_steps=1)
    loader = stream_loader(Dataset.from_list(ROWS).to_iterable_dataset(), nca.data_collator, 3, args, nca.accelerator)
    run = Run(nca, batches={"train": [3]}, seen={"loader": loader})
    checked = [name for name, entry in in_run("workers").items() if entry.shows is not None and entry.shows(run)]
    assert checked == list(in_run("workers"))
    assert loader.drop_last


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_an_optimizer_that_moves_weights_within_a_backward_is_refused(optim):
    with pytest.raises(UserError, match=f"`optim` is {optim}, which moves the weights within each backward"):
        NCAConfig("x", use_cpu=True, optim=optim)


def test_what_a_collator_that_was_given_decides_is_idle(tmp_path, caplog):
    def make(**own):
        args = NCAConfig(str(tmp_path), use_cpu=True, bf16=False, **own)
        collator = RewardCollator(0, "padded")
        arguments.check_arguments(args, collator, None, Dataset.from_list(ROWS))
        return told(caplog)

    assert make() == []
    (line,) = make(layout="padded", tokens_per_forward=40, pad_to_multiple_of=8)
    names = "`layout`, `tokens_per_forward`, `pad_to_multiple_of`"
    assert line == f"Without effect in this run: {names} (needs `data_collator` left out)."


@pytest.mark.parametrize(
    ("flags", "needs"),
    [
        ({"run_name": "third"}, "`report_to`"), ({"project": "aligned"}, "`report_to: trackio`"),
        ({"trackio_space_id": "me/space"}, "`report_to: trackio`"),
        ({"hub_private_repo": "true"}, "`push_to_hub: true`"),
    ],
)  # fmt: skip
def test_what_a_tracker_reads_is_idle_in_a_command_without_it(flags, needs, tmp_path, caplog):
    notify_once.cache_clear()
    (name,) = flags
    assert train(tmp_path, *(f"--{name}={value}" for name, value in flags.items())) == 2  # the model isn't there
    assert told(caplog) == [f"Without effect in this run: `{name}` (needs {needs})."]


def test_a_reference_is_not_cached_and_moved():
    with pytest.raises(
        UserError, match="`sync_ref_model` is True, but `precompute_ref_log_probs` computes the reference"
    ):
        NCAConfig("x", use_cpu=True, sync_ref_model=True, precompute_ref_log_probs=True)


@pytest.mark.parametrize("several", [{"gradient_accumulation_steps": 2}, {"tokens_per_forward": 40}])
def test_a_static_graph_has_one_backward_a_step(several):
    with pytest.raises(UserError, match="`ddp_static_graph` is True, but PyTorch fails there with several backwards"):
        NCAConfig("x", use_cpu=True, ddp_static_graph=True, **several)


def test_a_backend_without_a_launcher_is_told(monkeypatch):
    """transformers would end in an error of PyTorch's process groups."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="`ddp_backend` is 'gloo', but no launcher started this process"):
        NCAConfig("x", use_cpu=True, ddp_backend="gloo")


def test_numbers_may_be_texts():
    """As YAML 1.1 reads `1e-3`, and shells everything."""
    args = NCAConfig(
        "x", use_cpu=True, bf16=False, learning_rate="1e-3", max_steps="3", num_train_epochs="2", beta="0.5",
        per_device_train_batch_size=2.0, seed="7", max_length="64", logging_steps="5", collapse_nats="inf",
    )  # fmt: skip
    assert (args.learning_rate, args.max_steps, args.num_train_epochs, args.beta) == (1e-3, 3, 2.0, 0.5)
    assert (args.per_device_train_batch_size, args.seed, args.max_length) == (2, 7, 64)
    assert isinstance(args.per_device_train_batch_size, int)
    assert args.collapse_nats == float("inf")


@pytest.mark.parametrize(
    ("name", "value", "must"),
    [
        ("learning_rate", "fast", "a number"), ("learning_rate", None, "a number"), ("beta", [0.1], "a number"),
        ("max_steps", 2.5, "a whole number"), ("max_steps", "2.5", "a whole number"), ("seed", True, "a whole number"),
        ("max_length", "long", "a whole number"), ("bf16", "yes", "true or false"), ("eval_on_start", "no", "true or"),
        ("seed", float("nan"), "a whole number"), ("save_steps", "often", "a number"),
    ],
)  # fmt: skip
def test_values_of_another_type_are_told(name, value, must):
    with pytest.raises(UserTypeError, match=f"`{name}` is .*, but must be {must}"):
        NCAConfig("x", **{"use_cpu": True, name: value})


def test_every_entry_takes_part():
    """So that no run of the table stays empty, and no field of a run without a value."""
    assert {entry.run for entry in TABLE.values() if isinstance(entry, Works)} == RUNS.keys()
    assert logging.getLogger("nca_align").level != logging.ERROR
