"""Stopped anywhere and resumed: the same log and weights bit for bit; half checkpoints, full disks, SIGTERM, changes"""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, skip_first_batches
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.trainer_pt_utils import BatchRebalanceSampler
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOTrainer

import tiny_models
from conftest import build_model, build_tokenizer, labelled_rows, reward_rows, slow_but
from nca_align import NCAConfig, NCATrainer
from nca_align.commands.train.command import main
from nca_align.errors import UserError
from nca_align.store.checkpoints import MANIFEST, is_whole, read_manifest, whole_checkpoints
from nca_align.training.row_weights import begin_epoch
from nca_align.training.run_identity import FIXED, FREE
from nca_align.training.stopping import PREEMPTED
from signalled import NEVER, start_training
from test_trainer import trainer

# 11 prompts in steps of 2: six steps an epoch, of which the last has one prompt; dropout, and log lines across saves
RUN = {
    "save_strategy": "steps", "save_steps": 1, "logging_steps": 4, "max_steps": -1, "num_train_epochs": 2,
    "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "lr_scheduler_type": "cosine",
    "disable_dropout": False,
}  # fmt: skip


class At(TrainerCallback):
    """Does something at an event of a step."""

    def __init__(self, event: str, step: int, what):
        setattr(self, event, lambda args, state, control, **kwargs: what() if state.global_step == step else None)


def interrupt():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def make(folder, *callbacks, rows=None, eval_rows=None, **own) -> NCATrainer:
    adapter = LoraConfig(r=4, lora_dropout=0.2, target_modules="all-linear")
    options = {"peft_config": adapter, "callbacks": list(callbacks)} | RUN | own
    rows, eval_rows = rows or reward_rows(11, [4, 2, 3]), eval_rows or reward_rows(4, seed=5)
    return trainer(folder, rows=rows, eval_rows=eval_rows, **options)


def untimed(log: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if "runtime" not in k and "per_second" not in k} for line in log]


def result(nca: NCATrainer) -> tuple[list[dict], dict[str, torch.Tensor]]:
    return untimed(nca.state.log_history), {n: p.detach().clone() for n, p in nca.model.named_parameters()}


def assert_same(nca: NCATrainer, expected) -> None:
    log, weights = result(nca)
    assert log == expected[0]
    for name, value in expected[1].items():
        assert torch.equal(weights[name], value), name


def whole_run(folder, **own):
    nca = make(folder, **own)
    nca.train()
    return result(nca)


EXACT = {
    "steps": {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True, "max_steps": 11},
    "epochs": {"eval_strategy": "epoch", "logging_strategy": "epoch", "tokens_per_forward": 40},
    "by length": {"train_sampling_strategy": "group_by_length", "save_total_limit": 1},
    "rebalanced": {"train_sampling_strategy": "batch_rebalance", "peft_config": None, "precompute_ref_log_probs": True},
}


@pytest.mark.parametrize("name", slow_but(EXACT, "steps"))
def test_stopped_again_and_again_it_ends_as_if_it_had_not(name, tmp_path):
    """In the middle of both epochs, at the end of the first one, and after the last step, before the end."""
    expected = whole_run(tmp_path / "whole", **EXACT[name])
    assert len({line["loss"] for line in expected[0] if "loss" in line}) >= 2
    resume = None
    for step in (3, 6, 8, EXACT[name].get("max_steps", 12)):
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "cut", At("on_save", step, interrupt), **EXACT[name]).train(resume_from_checkpoint=resume)
        assert max(whole_checkpoints(tmp_path / "cut")) == step
        resume = True
    nca = make(tmp_path / "cut", **EXACT[name])
    nca.train(resume_from_checkpoint=True)
    assert_same(nca, expected)


MOVING = {
    "peft_config": None, "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5,
    "max_steps": 7, "num_train_epochs": 3,
}  # fmt: skip


def masked_rows(n: int, k: list[int], seed: int = 0) -> list[dict]:
    """Token ids with what the model wrote among them: its first tokens and others, and in between a tool's result."""
    chance, rows = random.Random(seed), []
    for row in reward_rows(n, k, seed):
        masks = [[1, *chance.choices((0, 1), k=chance.randint(4, 12)), 0, 1] for _ in row["completions"]]
        ids = [chance.choices(range(5, 300), k=len(mask)) for mask in masks]
        prompt = chance.choices(range(5, 300), k=chance.randint(3, 9))
        rows.append({"prompt_ids": prompt, "completion_ids": ids, "completion_mask": masks, "rewards": row["rewards"]})
    return rows


def unmasked(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "completion_mask"} for row in rows]


LABELS = {"loss_type": "outcome", "alpha": None}
SINGLE = {"rows": labelled_rows(11, 1), "eval_rows": labelled_rows(4, 1, seed=5), **LABELS}
MASKED = {"rows": masked_rows(11, [4, 2, 3]), "eval_rows": masked_rows(4, [2], seed=5)}
# a run, and one whose checkpoint it doesn't go on from
KINDS = {
    "single completions": (SINGLE | {"completion_mean": True, "precompute_ref_log_probs": True}, SINGLE),
    "masks": (MASKED | {"tokens_per_forward": 16}, MASKED | {"rows": unmasked(MASKED["rows"])}),
    "labels with masks": (
        {"rows": [row | {"rewards": [float(r > 0) for r in row["rewards"]]} for row in masked_rows(11, [1, 3])],
         "eval_rows": labelled_rows(4, [1, 2], seed=5), "precompute_ref_log_probs": True, **LABELS},
        LABELS | {"rows": labelled_rows(11, [1, 3]), "eval_rows": labelled_rows(4, [1, 2], seed=5)},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_single_completions_and_masks_go_on_exactly_and_not_with_others(kind, tmp_path):
    options, other = KINDS[kind]
    steps = {"eval_strategy": "steps", "eval_steps": 3, "num_train_epochs": 1}
    expected = whole_run(tmp_path / "whole", **options, **steps)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", At("on_save", 2, interrupt), **options, **steps).train()
    with pytest.raises(UserError, match=r"checkpoint-2 belongs to another run"):
        make(tmp_path / "cut", **other, **steps).train(resume_from_checkpoint=True)
    nca = make(tmp_path / "cut", **options, **steps)
    masks = nca.train_dataset[:].get("completion_mask")
    assert ("mask" in kind) == any(0 in own for row in masks or [] if row for own in row)
    assert any(len(row) == 1 for row in nca.train_dataset["rewards"]) == (kind != "masks")
    nca.train(resume_from_checkpoint=True)
    assert_same(nca, expected)


def test_an_adapter_in_bfloat16_goes_on_in_it(tmp_path):
    """As TRL holds it under QLoRA. PEFT would read it as float32, and the rest of the run would be another."""

    def half() -> NCATrainer:
        nca = make(tmp_path, max_steps=4, save_steps=2)
        for parameter in nca.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        return nca

    whole, rest = half(), half()
    whole.train()
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert {parameter.dtype for parameter in rest.model.parameters() if parameter.requires_grad} == {torch.bfloat16}
    assert_same(rest, result(whole))


def test_a_reference_that_moves_goes_on_from_where_it_was(tmp_path):
    """After it has moved twice: the initial one gives other losses."""
    whole = make(tmp_path / "whole", **MOVING)
    before = [p.detach().clone() for p in whole.ref_model.parameters()]
    whole.train()
    assert not any(map(torch.equal, before, whole.ref_model.parameters()))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", At("on_save", 5, interrupt), **MOVING).train()
    nca = make(tmp_path / "cut", **MOVING)
    nca.train(resume_from_checkpoint=True)
    assert_same(nca, result(whole))
    assert all(map(torch.equal, nca.ref_model.parameters(), whole.ref_model.parameters()))


def test_a_checkpoint_without_the_reference_that_moved_is_refused(tmp_path):
    make(tmp_path, **MOVING | {"max_steps": 1}).train()
    assert "reference/model.safetensors" in read_manifest(tmp_path / "checkpoint-1")["files"]
    nca = make(tmp_path, **MOVING)
    nca.is_deepspeed_enabled = True  # whose processes hold parts of it
    with pytest.raises(UserError, match="checkpoint-1 can't be resumed: FSDP and DeepSpeed save no moved reference"):
        nca.train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-1" / "nca_align.json").unlink()  # as of a version that wrote none
    shutil.rmtree(tmp_path / "checkpoint-1" / "reference")
    with pytest.raises(UserError, match="holds no moved reference, which `sync_ref_model: true` needs"):
        make(tmp_path, **MOVING).train(resume_from_checkpoint=True)


def test_a_rebalanced_epoch_is_known_on_several_processes():
    sampler = BatchRebalanceSampler(lengths=list(range(1, 17)), effective_batch_size=4, dp_size=2, grad_accum=1)
    loader = DataLoaderShard(list(range(16)), batch_sampler=BatchSamplerShard(sampler, 2))
    begin_epoch(loader, 7, 3)
    rest = skip_first_batches(loader, 1)
    rest.set_epoch(3)  # as transformers does, which does not reach the sampler
    next(iter(rest))
    assert (sampler.seed, sampler.epoch) == (7, 3)


def test_there_is_dropout(tmp_path):
    """What follows and what came before would prove less without."""
    assert {module.p for module in make(tmp_path).model.modules() if isinstance(module, torch.nn.Dropout)} == {0.2}


@pytest.mark.slow
def test_evaluating_changes_nothing(tmp_path):
    """With dropout: an evaluation that drew random numbers would give the steps after it others."""
    with_evaluation = whole_run(tmp_path / "a", eval_strategy="steps", eval_steps=1, eval_on_start=True)
    without = whole_run(tmp_path / "b", eval_strategy="no")
    assert [line for line in with_evaluation[0] if "eval_loss" not in line] == without[0]
    for name, value in without[1].items():
        assert torch.equal(with_evaluation[1][name], value)


def test_what_is_sent_to_the_hub_is_whole(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(
        DPOTrainer, "_push_from_checkpoint",
        lambda self, folder: sent.append((Path(folder).name, is_whole(Path(folder)))), raising=False,
    )  # fmt: skip
    nca = make(tmp_path, max_steps=2, save_total_limit=1)
    nca.args.push_to_hub = True
    nca.train()
    assert sent == [("checkpoint-1", True), ("checkpoint-2", True)]
    sent.clear()  # an adapter that took its start out of the base goes to the Hub at the end, for the base as it is
    pissa = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    nca = make(tmp_path / "pissa", max_steps=2, peft_config=pissa)
    nca.args.push_to_hub = True
    nca.train()
    assert list(whole_checkpoints(tmp_path / "pissa")) == [1, 2]
    assert sent == []


def test_intervals_of_the_resumed_run_count(tmp_path):
    """transformers would keep the checkpoint's."""
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, At("on_save", 2, interrupt)).train()
    nca = make(tmp_path, logging_steps=1, save_steps=5)
    nca.train(resume_from_checkpoint=True)
    assert [line["step"] for line in nca.state.log_history if "loss" in line] == list(range(3, 13))
    assert list(whole_checkpoints(tmp_path)) == [1, 2, 5, 10, 12]


DAMAGE = {
    "cut off at the start": lambda folder: [f.unlink() for f in folder.iterdir() if f.name != MANIFEST],
    "no state": lambda folder: (folder / "trainer_state.json").unlink(),
    "no random state": lambda folder: (folder / "rng_state.pth").unlink(),
    "a shorter file": lambda folder: os.truncate(folder / "optimizer.pt", 100),
    "marked as being written": lambda folder: (folder / MANIFEST).write_text('{"complete": false}'),
    "a mark that is a list": lambda folder: (folder / MANIFEST).write_text("[1]"),
    "an unreadable mark": lambda folder: (folder / MANIFEST).write_text("{"),
}


class TestHalfWritten:
    @pytest.fixture(scope="class")
    @classmethod
    def finished(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("finished")
        make(folder, save_steps=4).train()
        return folder

    @pytest.fixture
    def run(self, finished, tmp_path):
        shutil.copytree(finished, tmp_path / "run")
        return tmp_path / "run"

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_it_is_seen_and_the_one_before_it_used(self, damage, run):
        assert list(whole_checkpoints(run)) == [4, 8, 12]
        DAMAGE[damage](run / "checkpoint-12")
        assert list(whole_checkpoints(run)) == [4, 8]
        assert get_last_checkpoint(run) == str(run / "checkpoint-12")  # what transformers takes
        nca = make(run, save_steps=4)
        seen = []
        nca.add_callback(At("on_step_begin", 8, lambda: seen.append(8)))
        nca.train(resume_from_checkpoint=True)
        assert seen == [8]
        assert list(whole_checkpoints(run)) == [4, 8, 12]

    def test_what_a_kill_left_is_removed_and_nothing_else(self, run):
        (run / "checkpoint-12" / MANIFEST).write_text('{"complete": false}')
        (run / "checkpoint-7").mkdir()  # the user's own
        (run / "checkpoint-7" / "adapter_model.safetensors").touch()
        nca = make(run, At("on_train_begin", 8, interrupt), save_steps=4)
        with pytest.raises(KeyboardInterrupt):
            nca.train(resume_from_checkpoint=True)
        assert sorted(path.name for path in run.glob("checkpoint-*")) == [
            "checkpoint-4",
            "checkpoint-7",
            "checkpoint-8",
        ]

    def test_named_it_is_refused_with_the_one_that_is_whole(self, run):
        (run / "checkpoint-12" / "optimizer.pt").unlink()
        with pytest.raises(UserError, match=r"checkpoint-12 is not a whole checkpoint.*the last whole one is \S+-8$"):
            make(run, save_steps=4).train(resume_from_checkpoint=str(run / "checkpoint-12"))

    def test_none_is_whole(self, tmp_path):
        with pytest.raises(UserError, match=r"`resume_from_checkpoint` is true, but `output_dir` .* holds no whole"):
            make(tmp_path).train(resume_from_checkpoint=True)
        with pytest.raises(UserError, match=r"is not a whole checkpoint.*holds no whole one"):
            make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))

    @pytest.mark.parametrize(
        "file", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
    )
    def test_what_was_damaged_later_is_told_with_the_one_before_it(self, file, run, monkeypatch):
        damaged = run / "checkpoint-12" / file
        damaged.write_bytes(b"\0" * damaged.stat().st_size)
        assert is_whole(run / "checkpoint-12")  # by the sizes
        own = {"save_steps": 4, "num_train_epochs": 3, "resume_changed": ["num_train_epochs"]}
        with pytest.raises(UserError) as error:
            make(run, **own).train(resume_from_checkpoint=True)
        said = str(error.value)
        assert said.startswith(f"`resume_from_checkpoint` {run / 'checkpoint-12'} can't be loaded (")
        assert f"the last other one is {run / 'checkpoint-8'}: give it as `resume_from_checkpoint`" in said
        assert "\n" not in said
        assert "weights_only" not in said
        monkeypatch.setenv("NCA_ALIGN_TRACEBACK", "1")
        with pytest.raises(Exception, match=r"^(?!`resume_from_checkpoint`)"):
            make(run, **own).train(resume_from_checkpoint=True)

    @pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json"])
    def test_a_cut_file_of_another_trainer_is_told(self, file, run):
        for folder in run.glob("checkpoint-*"):
            (folder / MANIFEST).unlink()
            if folder.name != "checkpoint-12":
                shutil.rmtree(folder)
        os.truncate(run / "checkpoint-12" / file, 60)
        with pytest.raises(UserError, match=r"checkpoint-12 can't be loaded \(.*holds no other one: leave"):
            make(run, save_steps=4).train(resume_from_checkpoint=True)

    def test_an_error_in_training_keeps_its_traceback(self, run):
        with pytest.raises(KeyError):
            make(run, At("on_train_begin", 12, lambda: {}["missing"]), save_steps=4).train(resume_from_checkpoint=True)

    @pytest.mark.slow
    def test_a_model_alone_is_refused_and_sigterm_saves_all(self, tmp_path):
        """Without optimizer and random state transformers would go on otherwise, and not say so."""
        own = {"save_only_model": True}
        expected = whole_run(tmp_path / "whole", **own)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "cut", At("on_save", 5, interrupt), **own).train()
        alone = r"checkpoint-5 holds the model alone, as `save_only_model` asked, and no state to go on from; "
        for now in (own, {}):
            with pytest.raises(UserError, match=alone + r"\S+ holds no other one"):
                make(tmp_path / "cut", **now).train(resume_from_checkpoint=True)
        shutil.rmtree(tmp_path / "cut")
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit):
                make(tmp_path / "cut", At("on_step_begin", 4, terminate), **own).train()
        finally:
            signal.signal(signal.SIGTERM, handler)
        nca = make(tmp_path / "cut", At("on_save", 7, interrupt), **own)
        with pytest.raises(KeyboardInterrupt):
            nca.train(resume_from_checkpoint=True)
        assert nca.args.save_only_model
        with pytest.raises(UserError, match=r"checkpoint-7 holds the model alone.*the last other one is \S+-5: give"):
            make(tmp_path / "cut", **own).train(resume_from_checkpoint=True)
        nca = make(tmp_path / "cut", **own)
        nca.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-5"))
        assert_same(nca, expected)

    def test_another_trainers_checkpoint_is_taken_and_said_to_be_unknown(self, run, caplog):
        for folder in run.glob("checkpoint-*"):
            (folder / MANIFEST).unlink()
        make(run, save_steps=4).train(resume_from_checkpoint=True)
        assert f"checkpoint-12 has no {MANIFEST}" in caplog.text

    def test_one_limit_keeps_the_old_one_until_the_new_one_is_whole(self, tmp_path, monkeypatch):
        """The limit of one, and a kill between the last file and the mark: the old one is still there."""
        nca = make(tmp_path, save_total_limit=1)
        monkeypatch.setattr(
            "nca_align.training.resume.sync", lambda path: interrupt() if "checkpoint-3" in str(path) else None
        )
        with pytest.raises(KeyboardInterrupt):
            nca.train()
        assert (tmp_path / "checkpoint-3" / "trainer_state.json").exists()
        assert list(whole_checkpoints(tmp_path)) == [2]
        assert nca.args.save_total_limit == 1


class TestChanges:
    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("changes")
        with pytest.raises(KeyboardInterrupt):
            make(folder, At("on_save", 1, interrupt)).train()
        return folder

    def resume(self, run, rows=None, **own) -> NCATrainer:
        nca = make(run, At("on_train_begin", 1, interrupt), rows=rows, **own)
        with pytest.raises(KeyboardInterrupt):
            nca.train(resume_from_checkpoint=True)
        return nca

    def refused(self, run, rows=None, **own) -> str:
        with pytest.raises(UserError) as error:
            make(run, rows=rows, **own).train(resume_from_checkpoint=True)
        return str(error.value)

    def test_options_are_refused_by_old_and_new_value_and_allowed_by_name(self, run):
        assert self.refused(run, alpha=0.7, loss_type="infonca") == (
            'checkpoint-1 belongs to another run: `alpha` 0.5 → 0.7, `loss_type` ["nca"] → ["infonca"]; go back to '
            "what it was, choose another `output_dir`, or allow it by name: `--resume_changed alpha loss_type`"
        )
        assert "`loss_type`" in self.refused(run, alpha=0.7, loss_type="infonca", resume_changed=["alpha"])
        self.resume(run, alpha=0.7, loss_type="infonca", resume_changed=["alpha", "loss_type"])

    def test_data_are_compared_by_content(self, run):
        rows = reward_rows(11, [4, 2, 3])
        assert self.resume(run, rows=rows)
        for change in (lambda: rows[3]["rewards"].__setitem__(0, 9.0), lambda: rows.append(rows[0])):
            change()
            said = self.refused(run, rows=rows)
            assert re.search(rf"`data` 11 rows, [0-9a-f]{{16}} → {len(rows)} rows, [0-9a-f]{{16}};", said)
        self.resume(run, rows=rows, resume_changed=["data"])

    def test_a_stream_is_known_by_its_beginning(self, tmp_path):
        stream = Dataset.from_list(reward_rows(11)).to_iterable_dataset()
        options = {"max_steps": 4, "num_train_epochs": 1}
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, At("on_save", 1, interrupt), rows=stream, **options).train()
        other = Dataset.from_list(reward_rows(11, seed=1)).to_iterable_dataset()
        assert re.search(r"`data` stream, \w+ → stream, \w+;", self.refused(tmp_path, rows=other, **options))
        self.resume(tmp_path, rows=stream, **options)

    def test_the_adapter_and_the_model_belong_to_it(self, run):
        adapter = LoraConfig(r=8, lora_dropout=0.2, target_modules="all-linear")
        assert "`adapter.default.r` 4 → 8" in self.refused(run, peft_config=adapter)
        assert "`adapter.default.r` 4 → null" in self.refused(run, peft_config=None)
        built = build_model(build_tokenizer(), seed=1)  # in memory: no folder says whose weights these are
        assert re.search(r"`model` \w{16} → \w{16};", self.refused(run, model=built))

    def test_a_reference_that_was_given_belongs_to_it(self, tmp_path):
        def reference(scale: float):
            model = build_model(build_tokenizer())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(scale)
            return model

        own = {"peft_config": None}
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, At("on_save", 1, interrupt), ref_model=reference(1.0), **own).train()
        self.resume(tmp_path, ref_model=reference(1.0), **own)
        self.resume(tmp_path, ref_model=reference(1.0), precompute_ref_log_probs=True, **own)
        said = self.refused(tmp_path, ref_model=reference(1.5), **own)
        assert re.search(r"another run: `ref_model` [0-9a-f]{16} → [0-9a-f]{16};", said)
        assert re.search(r"another run: `ref_model` [0-9a-f]{16} → null;", self.refused(tmp_path, **own))
        self.resume(tmp_path, ref_model=reference(1.5), resume_changed=["ref_model"], **own)

    @pytest.mark.parametrize(("name", "value"), [("learning_rate", 5e-4), ("weight_decay", 0.1), ("adam_beta2", 0.9)])
    def test_what_the_optimizers_state_keeps_can_not_change(self, name, value, run):
        for allowed in ([], [name]):
            said = self.refused(run, **{name: value, "resume_changed": allowed})
            assert said.startswith(f"checkpoint-1 belongs to a run with other options: `{name}` ")
            assert f"→ {value}; the optimizer's state in the checkpoint keeps the old values" in said

    def test_an_unknown_name_is_refused(self, run):
        assert "'alfa', which is not a part of a run's identity (did you mean `alpha`?)" in self.refused(
            run, resume_changed=["alfa"]
        )

    def test_what_is_free_may_change(self, run):
        """Logging, saving, evaluation, memory, and how the prompts of a step are dealt out."""
        self.resume(
            run, logging_steps=3, save_total_limit=2, eval_strategy="steps", eval_steps=2, layout="padded",
            tokens_per_forward=40, gradient_checkpointing=True, per_device_train_batch_size=2, run_name="other",
            gradient_accumulation_steps=1, precompute_ref_log_probs=True, collapse_nats=9.0, nonfinite="skip",
        )  # fmt: skip
        assert "`global_batch_size` 2 → 4" in self.refused(run, gradient_accumulation_steps=4)

    def test_every_option_is_compared_unless_it_is_listed(self, run):
        """The lists name options that there are, and what TRL adds is compared."""
        identity = read_manifest(run / "checkpoint-1")["identity"]
        options = set(make(run).args.to_dict())
        newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # than the oldest transformers
        assert options >= (FREE | FIXED) - newer
        assert not FREE & FIXED
        assert options - FREE <= identity.keys()
        assert identity.keys() - options >= {"data", "model", "global_batch_size", "model.hidden_size"}
        assert "hf_secret" not in json.dumps(make(run, hub_token="hf_secret")._resume.run_identity())


class TestSigterm:
    @pytest.mark.slow
    @pytest.mark.parametrize("step", [2, 5])
    def test_it_saves_at_the_end_of_the_step_and_goes_on_exactly(self, step, tmp_path, caplog, capsys):
        """In the middle of an epoch and in its last step; nothing else would have saved."""
        own = {"save_strategy": "no", "eval_strategy": "epoch"}
        expected = whole_run(tmp_path / "whole", **own)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as left:
                make(tmp_path / "cut", At("on_step_begin", step, terminate), **own).train()
            assert signal.getsignal(signal.SIGTERM) == handler
        finally:
            signal.signal(signal.SIGTERM, handler)
        assert left.value.code == PREEMPTED == 75
        assert f"SIGTERM: checkpoint-{step + 1} is written" in caplog.text
        assert list(whole_checkpoints(tmp_path / "cut")) == [step + 1]
        nca = make(tmp_path / "cut", **own)
        capsys.readouterr()
        nca.train(resume_from_checkpoint=True)
        assert_same(nca, expected)
        assert signal.getsignal(signal.SIGTERM) == handler
        assert f"The run goes on from {tmp_path / 'cut'}/checkpoint-{step + 1}." in caplog.text
        steps = nca.state.global_step
        done = rf"^{steps - step - 1} steps in \S+, mean loss \S+ over all {steps} steps of the run$"
        assert re.search(done, capsys.readouterr().out, re.MULTILINE)

    @pytest.mark.slow
    def test_an_evaluation_is_cut_and_done_after_it_is_resumed(self, tmp_path):
        step = 4
        own = {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1}
        expected = whole_run(tmp_path / "whole", **own)
        seen = []

        def in_the_first_batch():
            seen.append(step)
            if len(seen) == 1:
                terminate()

        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit):
                make(tmp_path / "cut", At("on_prediction_step", step, in_the_first_batch), **own).train()
        finally:
            signal.signal(signal.SIGTERM, handler)
        assert len(seen) == 1  # of four
        nca = make(tmp_path / "cut", **own)
        nca.train(resume_from_checkpoint=True)
        assert_same(nca, expected)

    @pytest.mark.slow
    def test_an_evaluation_that_is_cut_again_leaves_its_checkpoint_as_it_is(self, tmp_path, monkeypatch):
        """It may be the only one: a kill or a full disk in a second save of the same would leave none."""
        own = {"save_steps": 4, "save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 4,
               "per_device_eval_batch_size": 1}  # fmt: skip
        expected = whole_run(tmp_path / "whole", **own)
        handler = signal.getsignal(signal.SIGTERM)
        try:
            for resume in (None, True):
                with pytest.raises(SystemExit) as left:
                    make(tmp_path / "cut", At("on_prediction_step", 4, terminate), **own).train(
                        resume_from_checkpoint=resume
                    )
                assert left.value.code == PREEMPTED
                assert read_manifest(tmp_path / "cut" / "checkpoint-4")["run"]["owes_evaluation"]
                signal.signal(signal.SIGTERM, handler)
                monkeypatch.setattr("nca_align.training.resume.sync", lambda path: pytest.fail("it is written anew"))
        finally:
            signal.signal(signal.SIGTERM, handler)
        monkeypatch.undo()
        nca = make(tmp_path / "cut", **own)
        nca.train(resume_from_checkpoint=True)
        assert_same(nca, expected)

    def test_before_the_first_step_there_is_nothing_to_save(self, tmp_path, caplog):
        handler = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit):
                make(tmp_path, At("on_train_begin", 0, terminate), eval_on_start=True, eval_strategy="epoch").train()
        finally:
            signal.signal(signal.SIGTERM, handler)
        assert "no step was done yet" in caplog.text
        assert not list(tmp_path.glob("checkpoint-*"))

    def test_transformers_own_way_is_refused(self):
        """It saves between a step's gradients and its update, and each process by itself."""
        with pytest.raises(ValueError, match="`enable_jit_checkpoint` is True, but NCATrainer saves on SIGTERM by its"):
            NCAConfig("x", bf16=False, enable_jit_checkpoint=True)

    def test_training_in_a_thread_leaves_signals_alone(self, tmp_path):
        nca = make(tmp_path, max_steps=1, save_strategy="no")
        thread = threading.Thread(target=nca.train)
        thread.start()
        thread.join()
        assert nca.state.global_step == 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class TestFullDisk:
    FULL = {"save_total_limit": 1, "peft_config": None, "max_steps": 3}  # noqa: RUF012

    @pytest.fixture(scope="class")
    @classmethod
    def expected(cls, tmp_path_factory):
        return whole_run(tmp_path_factory.mktemp("whole"), **cls.FULL)

    @pytest.mark.parametrize("room", [0, 40, 90, 150])  # KiB, so that each of the files is the one that fails
    def test_it_is_one_sentence_and_the_last_good_one_stays(self, room, small_disk, expected):

        def fill():
            free = shutil.disk_usage(small_disk).free
            (small_disk / "ballast").write_bytes(b"x" * max(0, free - room * 1024))

        nca = make(small_disk, At("on_step_begin", 1, fill), **self.FULL)
        with pytest.raises(UserError, match=r"^checkpoint-2 can't be written: .*checkpoint-1 is whole: make room") as e:
            nca.train()
        assert str(small_disk) in str(e.value)
        assert "\n" not in str(e.value)
        assert [path.name for path in small_disk.glob("checkpoint-*")] == ["checkpoint-1"]
        (small_disk / "ballast").unlink()
        again = make(small_disk, **self.FULL)
        again.train(resume_from_checkpoint=True)
        assert_same(again, expected)

    @pytest.mark.parametrize(
        ("error", "said"),
        [
            (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded"),
            (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), "unexpected pos 64"),
        ],
    )
    def test_other_ways_to_fail_and_no_earlier_one(self, error, said, tmp_path, monkeypatch):
        def fail(*args, **kwargs):
            raise error

        monkeypatch.setattr("torch.save", fail)
        with pytest.raises(UserError, match=rf"^checkpoint-1 can't be written: .*{said}.*there is no earlier one"):
            make(tmp_path).train()

    def test_the_trained_model_at_the_end_of_the_command(self, model_dir, tmp_path, monkeypatch, capsys):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, reward_rows(8))))

        def fail(*args, **kwargs):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(NCATrainer, "save_model", fail)
        options = {
            "model_name_or_path": model_dir, "dataset_name": tmp_path / "rows.jsonl", "output_dir": tmp_path / "run",
            "bf16": "false", "use_cpu": "true", "max_steps": 1, "save_strategy": "no", "report_to": "none",
        }  # fmt: skip
        assert main([part for name, value in options.items() for part in (f"--{name}", str(value))]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("nca-align train: error: the trained model can't be written: No space left on device (")
        assert said.endswith("make room, and run the same command with `resume_from_checkpoint: true`")

    def test_a_bug_in_saving_keeps_its_traceback(self, tmp_path, monkeypatch):
        monkeypatch.setattr("torch.save", lambda *args, **kwargs: {}["missing"])
        with pytest.raises(KeyError):
            make(tmp_path).train()


@pytest.fixture
def launch(model_dir, tmp_path):
    """Start a run by its folder's name; with `processes`, under torchrun."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, reward_rows(25, [4, 2, 3]))))
    options = {
        "model_name_or_path": model_dir, "dataset_name": tmp_path / "rows.jsonl", "bf16": "false", "use_cpu": "true",
        "num_train_epochs": 2, "logging_steps": 2, "per_device_train_batch_size": 1, "learning_rate": "1e-3",
        "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "report_to": "none", "beta": 0.1,
        "gradient_checkpointing": "false", "max_length": 128, "use_peft": "true", "lora_r": 4, "lora_dropout": 0.2,
        "disable_dropout": "false",
        "lora_target_modules": "all-linear", "resume_from_checkpoint": "true", "validation_fraction": 0.24,
        "eval_strategy": "epoch", "precompute_ref_log_probs": "true", "disable_tqdm": "true",
    }  # fmt: skip

    def start(name: str, processes: int = 0, cache: str | None = None, terminate: str = NEVER, **own):
        cached = {"HF_DATASETS_CACHE": str(tmp_path / "cache" / (cache or name))}
        flags = options | own | {"output_dir": tmp_path / name}
        return start_training(flags, processes, signal.SIGTERM, terminate, **cached)

    return tmp_path, start


def finish(process: subprocess.Popen, code: int = 0) -> str:
    said = process.communicate(timeout=600)[0]
    assert process.returncode == code, said[-4000:]
    return said


def outcome(folder: Path) -> tuple[list[dict], dict[str, bytes]]:
    """The log, and the final adapter's bytes."""
    state = json.loads((folder / "trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "loss" in line][-1] > 30
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors
    return untimed(state["log_history"]), {name: value.numpy().tobytes() for name, value in sorted(tensors.items())}


def kill_while(process: subprocess.Popen, ready, delay: float) -> bool:
    """SIGKILL once `ready()`, and False where it ended before."""
    while process.poll() is None and not ready():
        time.sleep(0.001)
    time.sleep(delay)
    running = process.poll() is None
    process.kill()
    process.communicate()
    return running


def killed_and_resumed(launch, kills: int, seed: int) -> None:
    folder, start = launch
    finish(start("whole"))
    expected = outcome(folder / "whole")
    rng = random.Random(seed)
    run, cache = folder / "killed", folder / "cache" / "killed" / "nca_align_reference"
    kept: dict[Path, int] = {}
    done = halves = 0
    for kill in range(kills):
        before = set(whole_checkpoints(run))
        newest = max(before, default=0)
        moments = {
            # the reference's cache: some shards are there, and stay; the next is being computed
            "cache": lambda kept=kept: len(list(cache.glob("*/*.parquet"))) > len(kept) + 1,
            # a save: its folder is there, and not yet whole
            "save": lambda: any(read_manifest(half).get("complete") is False for half in run.glob("checkpoint-*")),
            # anywhere later in training
            "step": lambda newest=newest: max(whole_checkpoints(run), default=0) > newest,
        }
        moment = "cache" if kill == 0 else ("save", "step")[kill % 2]
        delay = rng.uniform(0, {"cache": 0.01, "save": 0.01, "step": 0.4}[moment])
        done += kill_while(start("killed"), moments[moment], delay)
        halves += moments["save"]()
        shards = {shard: shard.stat().st_mtime_ns for shard in cache.glob("*/*.parquet")}
        assert kept.items() <= shards.items()  # none is computed twice
        kept = shards
        if (run / "trainer_state.json").exists():  # it came to its end: from the start again, with the cache
            shutil.rmtree(run)
    print(f"{done} of {kills} kills came in time, {halves} of them left half a checkpoint")
    assert done >= min(kills, 3)
    assert halves
    finish(start("killed"))
    assert outcome(run) == expected


@pytest.mark.slow
def test_killed_three_times_it_ends_bit_for_bit_the_same(launch):
    """Once in the reference's cache, once in a save, and once anywhere."""
    killed_and_resumed(launch, kills=3, seed=0)


@pytest.mark.long
def test_killed_twenty_times_it_ends_bit_for_bit_the_same(launch):
    killed_and_resumed(launch, kills=20, seed=1)


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_ends_both_and_both_go_on_exactly(launch):
    """In the second epoch, whose last batch does not divide: accelerate repeats rows in it, which weigh nothing."""
    folder, start = launch
    finish(start("whole", processes=2, save_steps=100, num_train_epochs=4))
    said = finish(start("cut", 2, cache="whole", terminate="1 13 1", save_steps=100, num_train_epochs=4), code=1)
    assert said.count("SIGTERM: checkpoint-14 is written") == 1
    assert re.search(rf"exitcode\s*: {PREEMPTED}", said)
    assert is_whole(folder / "cut" / "checkpoint-14")
    finish(start("cut", 2, cache="whole", save_steps=100, num_train_epochs=4))
    assert outcome(folder / "cut") == outcome(folder / "whole")


@pytest.mark.slow
def test_the_command_exits_with_its_code_and_another_number_of_processes_goes_on(launch):
    """From one process to two, with the same global batch: the same losses up to rounding, without dropout."""
    folder, start = launch
    own = {"lora_dropout": 0.0, "save_steps": 100, "logging_steps": 4}
    finish(start("whole", **own, gradient_accumulation_steps=2, num_train_epochs=4))
    own |= {"cache": "whole", "num_train_epochs": 4}
    said = finish(start("cut", terminate="0 13 1", gradient_accumulation_steps=2, **own), code=PREEMPTED)
    assert "SIGTERM: checkpoint-14 is written" in said
    assert "Traceback" not in said
    refused = finish(start("cut", gradient_accumulation_steps=2, alpha=0.5, **own), code=2)
    assert "train: error: checkpoint-14 belongs to another run: `alpha` 0.01 → 0.5;" in refused
    finish(start("cut", 2, gradient_accumulation_steps=1, **own))
    whole, cut = outcome(folder / "whole")[0], outcome(folder / "cut")[0]
    for one, two in zip(whole, cut, strict=True):
        for key in set(one) - {"grad_norm", "total_flos", "num_tokens", "epoch"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-4), key


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("name", [pytest.param("MixtralForCausalLM", marks=pytest.mark.slow), "Qwen3MoeForCausalLM"])
def test_weights_that_are_saved_under_other_names_are_read(name, best, tmp_path):
    """A mixture's experts, which are saved one by one: transformers' trainer goes on with those that it has."""
    options = {
        "peft_config": None, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 4,
        "learning_rate": 1e-2, "precompute_ref_log_probs": True, "load_best_model_at_end": best,
        "metric_for_best_model": "loss", "greater_is_better": True,
    }  # fmt: skip
    whole = make(tmp_path, model=tiny_models.build(name), **options)
    whole.train()
    step = Path(whole.state.best_model_checkpoint) if best else tmp_path / "checkpoint-4"
    assert step.name == ("checkpoint-2" if best else "checkpoint-4")
    on_disk = load_file(step / "model.safetensors")
    assert not whole.model.state_dict().keys() >= on_disk.keys()
    expected = type(whole.model).from_pretrained(step).state_dict()
    assert all(torch.equal(value, expected[n]) for n, value in whole.model.state_dict().items())
    if not best:
        rest = make(tmp_path, model=tiny_models.build(name), **options)
        rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert_same(rest, result(whole))
