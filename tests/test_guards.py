"""Losses and gradients that aren't finite, from weights that are NaN for one token, and the warning of a collapse."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from conftest import build_model, build_tokenizer, reward_rows
from nca_align import NCAConfig, NCATrainer
from nca_align.batching import attention
from nca_align.errors import UserError
from nca_align.training.guards import MOST_SKIPPED, StepGuard
from test_trainer import logged, trainer

ROOT = Path(__file__).resolve().parents[1]
POISON = "§"  # its token's embedding is NaN


def poisoned_model(tokenizer):
    """A model that gives NaN wherever it reads the sign §, and only there."""
    model = build_model(tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer(POISON, add_special_tokens=False)["input_ids"][-1]] = torch.nan
    return model


def rows_with_poison(n: int, *where: int) -> list[dict]:
    rows = reward_rows(n, [3, 2])
    for i in where:
        rows[i]["completions"][1][0]["content"] += f" {POISON} and more"
    return rows


def poisoned(tmp_path, rows, **own) -> NCATrainer:
    tokenizer = build_tokenizer()
    return trainer(tmp_path, poisoned_model(tokenizer), rows, tokenizer=tokenizer, **own)


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.after: dict[int, torch.Tensor] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.after[state.global_step] = torch.cat([p.detach().flatten() for p in model.parameters()])


OPTIONS = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 2, "max_steps": 4}


@pytest.mark.parametrize("own", [{}, {"layout": "padded"}, {"tokens_per_forward": 40}])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change_and_names_the_rows(own, tmp_path):
    """Two prompts a micro-batch and two of them a step: rows 9 and 11 are in both micro-batches of step 3."""
    weights = Weights()
    nca = poisoned(tmp_path, rows_with_poison(16, 9, 11), callbacks=[weights], **OPTIONS, **own)
    with pytest.raises(
        UserError,
        match=r"Step 3: the log-probabilities of rows 9, 11 of the training split are not finite\. .*`nonfinite: skip`",
    ):
        nca.train()
    assert list(weights.after) == [1, 2]
    now = torch.cat([p.detach().flatten() for p in nca.model.parameters()])
    assert torch.equal(now.nan_to_num(), weights.after[2].nan_to_num())


def test_skip_leaves_out_that_step_alone(tmp_path, caplog):
    """The weights pass it unchanged and go on, and the log counts neither its loss nor its row."""
    weights = Weights()
    nca = poisoned(tmp_path, rows_with_poison(16, 9), callbacks=[weights], nonfinite="skip", **OPTIONS)
    nca.train()
    after = {step: values.nan_to_num() for step, values in weights.after.items()}
    assert torch.equal(after[3], after[2])
    assert not torch.equal(after[2], after[1])
    assert not torch.equal(after[4], after[3])
    lines = [line for line in nca.state.log_history if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 4]
    assert all(torch.tensor(value).isfinite() for line in nca.state.log_history for value in line.values())
    assert nca.state.log_history[-1]["train_loss"] == pytest.approx(sum(line["loss"] for line in lines) / 3)
    assert "row 9 of the training split are not finite: the step is left out" in caplog.text
    assert "Step 3: the log-probabilities of row 9" in caplog.text

    whole = poisoned(tmp_path, rows_with_poison(16, 9), nonfinite="skip", logging_steps=4, **OPTIONS)
    whole.train()
    assert logged(whole) == pytest.approx([sum(line["loss"] for line in lines) / 3])


def test_skip_gives_up_when_nothing_else_comes(tmp_path):
    nca = poisoned(tmp_path, rows_with_poison(24, *range(24)), nonfinite="skip", max_steps=-1, num_train_epochs=9)
    with pytest.raises(UserError, match=f"and so in {MOST_SKIPPED} steps one after another: the weights are no longer"):
        nca.train()
    assert nca.state.global_step == MOST_SKIPPED - 1


def test_a_gradient_alone_stops_too(tmp_path):
    """Finite losses whose gradient overflows, as in a backward of half precision."""
    nca = trainer(tmp_path, rows=reward_rows(8), **OPTIONS)
    nca.model.lm_head.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(UserError, match=r"Step 1: the gradient of rows 0, 1, 2, 3 of the training split is not finite"):
        nca.train()


def test_rows_of_a_stream_are_numbered(tmp_path):
    stream = Dataset.from_list(rows_with_poison(8, 5)).to_iterable_dataset()
    with pytest.raises(UserError, match="Step 2: the log-probabilities of row 5 of the training split are not finite"):
        poisoned(tmp_path, stream, gradient_accumulation_steps=2, max_steps=2).train()


def guard(**own) -> StepGuard:
    return StepGuard(
        Accelerator(cpu=True),
        SimpleNamespace(**({"nonfinite": "stop", "collapse_nats": 50.0, "loss_type": ["nca"]} | own)),
    )


def test_rows_without_numbers_say_so():
    own = guard()
    own.add_rows(None, torch.tensor([True, False]))
    with pytest.raises(UserError, match="Step 7: the loss of rows that carry no `row_number` is not finite"):
        own.check(torch.tensor(1.0), 7, False)


@pytest.mark.parametrize("norm", [None, 0.3, torch.tensor(0.3)])
def test_any_form_of_a_finite_norm_passes(norm):
    own = guard()
    own.add_rows([0], torch.tensor([True]))
    own.add_loss(torch.tensor(0.7), torch.tensor(0.0))
    assert own.check(norm, 1, False) == (False, False)
    assert own.check(norm, 2, True) == (False, True)


def test_an_overflow_under_gradient_scaling_is_the_scalers_business():
    own = guard()
    own.accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, scaler=SimpleNamespace(is_enabled=lambda: True)
    )
    assert own.check(torch.tensor(torch.inf), 1, False) == (False, False)
    own.add_loss(torch.tensor(torch.nan), torch.tensor(0.0))
    with pytest.raises(UserError, match="the loss of rows"):
        own.check(torch.tensor(torch.inf), 1, False)


def test_skip_is_refused_under_deepspeed():
    with pytest.raises(NotImplementedError, match="`nonfinite: skip` can't be used with DeepSpeed"):
        StepGuard(SimpleNamespace(distributed_type=DistributedType.DEEPSPEED), SimpleNamespace(nonfinite="skip"))


class Synchronisations(TorchDispatchMode):
    """Counts what waits for a device: a tensor's value that Python reads, and a shape that depends on values."""

    count = 0
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique2")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        chosen = any(index is not None and index.dtype == torch.bool for index in args[1]) if name == "index" else False
        self.count += name in self.waits or chosen
        return function(*args, **(kwargs or {}))


def _counting(name):
    """A method of tensors that reads memory by itself, counted as one."""
    own = getattr(torch.Tensor, name)

    def read(tensor, *args, **kwargs):
        mode = Counted.mode
        before = mode and mode.count
        try:
            return own(tensor, *args, **kwargs)
        finally:
            if mode:
                mode.count = before + 1

    return read


class Counted:
    """Within it `mode` counts; of `tolist`, `numpy` and `cpu` one each, whatever they read."""

    mode: Synchronisations | None = None

    def __enter__(self) -> Synchronisations:
        self.patch = pytest.MonkeyPatch()
        for name in ("tolist", "numpy", "cpu"):
            self.patch.setattr(torch.Tensor, name, _counting(name))
        Counted.mode = Synchronisations()
        return Counted.mode.__enter__()

    def __exit__(self, *error):
        Counted.mode.__exit__(*error)
        Counted.mode = None
        self.patch.undo()


def test_a_micro_batch_costs_no_synchronisation():
    own = guard()
    with Synchronisations() as mode:
        assert torch.tensor(1.0).item() == 1
        assert mode.count == 1  # it counts
        for _ in range(8):
            own.add_rows([0, 1], torch.tensor([0.1, 0.2]).isfinite())
            own.add_loss(torch.tensor(0.5), torch.tensor(0.0))
        assert mode.count == 1
        own.check(torch.tensor(0.3), 1, False)
        assert mode.count <= 1 + 3  # one copy of three flags
    assert NCAConfig("x", bf16=False).logging_nan_inf_filter is False  # transformers' test of every micro-batch


@pytest.mark.parametrize("own", [{"loss_type": "infonca"}, {"tokens_per_forward": 40}])
def test_a_training_step_reads_no_value(own, tmp_path):
    """The collator has checked the rows on the CPU; each look at them would wait for a GPU."""
    nca = trainer(
        tmp_path, rows=reward_rows(2, [3, 2]), layout="prefix_shared", precompute_ref_log_probs=True,
        startup_checks=False, **own,
    )  # fmt: skip
    batch = nca.data_collator([nca.train_dataset[i] for i in range(2)])
    batches, counts = nca.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    nca.create_optimizer()
    with Synchronisations() as mode:
        nca.training_step(nca.model, *batches, counts)
    assert mode.count == 0


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("own", [{"layout": "padded"}, {}, {"varlen": True}, {"tokens_per_forward": 40}])
def test_a_step_waits_for_the_device_once_and_no_layer_does(own, layers, tmp_path, monkeypatch):
    """From the batches to the update, of two micro-batches; batches are made before, on the CPU.

    Of a padded row transformers asks twice, once a forward, whether its mask is needed at all.
    """
    masks = 2 * 2 if own.get("layout") == "padded" else 0
    own = dict(own)
    if own.pop("varlen", False):
        monkeypatch.setattr(attention, "_varlen_takes", lambda *tensors: True)
        monkeypatch.setattr(attention, "varlen_attn", lambda query, *args, **kwargs: query * 1.0)
    tokenizer = build_tokenizer()
    nca = trainer(
        tmp_path, build_model(tokenizer, num_hidden_layers=layers), reward_rows(4, [3, 2]), tokenizer=tokenizer,
        startup_checks=False, precompute_ref_log_probs=True, **own,
    )  # fmt: skip
    nca.create_optimizer()
    batches = [nca.data_collator([nca.train_dataset[i] for i in (n, n + 1)]) for n in (0, 2)]
    with Counted() as mode:
        assert torch.ones(2)[torch.tensor([True, False])].tolist() == [1]
        assert mode.count == 2  # it counts
        own_batches, counts = nca.get_batch_samples(iter(batches), 2, torch.device("cpu"))
        for batch in own_batches:
            nca.training_step(nca.model, batch, counts)
        norm = torch.nn.utils.clip_grad_norm_(nca.model.parameters(), 1.0)
        nca._guard.check(norm, 1, False)
        assert mode.count <= 2 + 1 + masks


@pytest.mark.parametrize(("value", "expected"), [("halt", "must be one of 'stop', 'skip'"), ("", "is ''")])
def test_nonfinite_takes_two_values(value, expected):
    with pytest.raises(ValueError, match=f"`nonfinite` is .*{expected}|`nonfinite` {expected}"):
        NCAConfig("x", bf16=False, nonfinite=value)


class TestCollapse:
    def test_it_is_told_once_with_advice(self, tmp_path, caplog):
        """A learning rate that ruins the model."""
        nca = trainer(tmp_path, learning_rate=1.0, max_steps=4, loss_type="infonca")
        nca.train()
        best = logged(nca, "logratios/best")
        assert sum(value < -50 for value in best) > 1
        (told,) = [record.message for record in caplog.records if "collapse_nats" in record.message]
        first = next(i for i, value in enumerate(best) if value < -50)
        assert told.startswith(f"Step {first + 1}: the best completion's log-ratio is {best[first]:.1f} nats")
        for advice in ("`learning_rate`", "`beta`", "`negative_weight`", "Look at samples"):
            assert advice in told

    @pytest.mark.parametrize(
        ("loss", "which", "advice"),
        [(["nca"], "best", "`loss_type: [nca, sft]`"), (["outcome"], "right", "`loss_type: [outcome, sft]`")],
    )
    def test_its_advice_is_for_the_loss(self, loss, which, advice, caplog):
        guard(loss_type=loss).watch({f"logratios/{which}": -60.0}, 1)
        (told,) = [record.message for record in caplog.records]
        assert f"hold the {which} completion up with {advice}" in told
        assert ("negative_weight" in told) == (loss == ["nca"])

    @pytest.mark.parametrize("best", [None, -49.9, 3.0, float("nan")])
    def test_it_is_silent_above(self, best, caplog):
        own = guard()
        own.watch({} if best is None else {"logratios/best": best}, 1)
        assert not own.collapse_told
        assert not caplog.records

    def test_inf_turns_it_off(self, caplog):
        guard(collapse_nats=float("inf")).watch({"logratios/best": -1e9}, 1)
        assert not caplog.records

    @pytest.mark.parametrize("value", [0.0, -3.0, float("nan")])
    def test_it_is_above_0(self, value):
        with pytest.raises(ValueError, match=r"`collapse_nats` is .*, but must be above 0; `inf` turns it off"):
            NCAConfig("x", bf16=False, collapse_nats=value)


@pytest.mark.slow
@pytest.mark.parametrize("nonfinite", ["stop", "skip"])
def test_two_processes_decide_alike(nonfinite, tmp_path):
    """Row 15 is the second process's, in the second of its two micro-batches."""
    tokenizer = build_tokenizer()
    poisoned_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows_with_poison(24, 15))))
    options = {
        "model_name_or_path": tmp_path / "model", "dataset_name": data, "output_dir": tmp_path / "run",
        "bf16": "false", "use_cpu": "true", "max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1,
        "gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential", "report_to": "none",
        "gradient_checkpointing": "false", "max_length": 128, "save_strategy": "no", "nonfinite": nonfinite,
        "validation_fraction": 0,
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "scripts/train.py",
         *flags],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    said = run.stderr + run.stdout
    sentence = "Step 2: the log-probabilities of row 15 of the training split are not finite"
    if nonfinite == "stop":
        assert run.returncode == 1
        assert f"train: error: {sentence}" in said
        assert said.count("Traceback") == 1  # torchrun's own
        return
    assert run.returncode == 0, said[-3000:]
    assert said.count(sentence) == 1
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "loss" in line] == [1, 3]
