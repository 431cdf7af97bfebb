"""Losses that users write: refused by what is wrong; sound ones in training, resume, a comparison and the docs."""

import copy
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from datasets import Dataset

from conftest import reward_rows
from nca_align import NCAConfig
from nca_align.commands.compare.command import main as compare
from nca_align.commands.compare.grid import expand
from nca_align.commands.compare.methods import build_trainer, check_method
from nca_align.commands.train.command import main as train
from nca_align.errors import UserError
from nca_align.evaluation.comparison_rows import labels, setting_of
from nca_align.losses import LOSSES, READS_ALPHA, SEPARABLE, is_separable, loss_name, nca_loss, reads_alpha, reward_loss
from nca_align.own_losses import OwnLoss
from nca_align.store.fingerprints import source_text
from nca_align.training.objective import Objective
from test_losses import draw
from test_resume import At, interrupt
from test_trainer import Forwards, config, logged, trainer, weights_after

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "guide" / "your-own-loss.md").read_text()
CODE, YAML = (re.findall(rf"^```{kind}\n(.+?)^```", PAGE, re.M | re.S) for kind in ("python", "yaml"))
# what a file is that holds both of the page's functions
MODULE = "\n\n".join(CODE)
HALVES = """
SCALE = 0.5
UNUSED = 1


class Scaled:
    def __call__(self, x):
        return SCALE * x


def _gaps(pi_logps, ref_logps, beta):
    return beta * (pi_logps - ref_logps)


def half(pi_logps, ref_logps, rewards, alpha, beta, mask):
    scaled = Scaled()
    return scaled((_gaps(pi_logps, ref_logps, beta) * -rewards * mask).sum(1))
"""


def plain_nca(pi_logps, ref_logps, rewards, alpha, beta, mask):
    return inspect.unwrap(nca_loss)(pi_logps, ref_logps, rewards, alpha, beta, mask)


def separable_nca(*arguments):
    return plain_nca(*arguments)


separable_nca.separable = True  # type: ignore[attr-defined]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a module of the current folder, which the next import reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def written(text: str, name: str = "my_losses") -> None:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)

    yield written
    sys.modules.pop("my_losses", None)


UNNAMED = {"loss_type": lambda *arguments: plain_nca(*arguments)}


# What is found out about a function


@pytest.mark.parametrize("name", LOSSES)
def test_of_our_own_losses_all_is_found_to_be_as_the_tables_say(name):
    function = partial(inspect.unwrap(LOSSES[name]))
    own = loss_name(function)
    assert isinstance(own, OwnLoss)
    assert (reads_alpha(own), own.breaks_ties) == (name in READS_ALPHA, False)
    function.separable = True  # type: ignore[attr-defined]
    if name in SEPARABLE:
        assert is_separable(loss_name(function))
    else:
        with pytest.raises(UserError, match="says that it is separable, but a completion's gradient changes with"):
            loss_name(function)


def two_arguments(pi_logps, ref_logps):
    return (pi_logps - ref_logps).sum(1)


def scalar(*arguments):
    return plain_nca(*arguments).mean()


def one_each(pi_logps, ref_logps, rewards, alpha, beta, mask):
    return beta * (ref_logps - pi_logps) * mask


def whole_numbers(pi_logps, *_):
    return (pi_logps > 0).sum(1)


def no_tensor(pi_logps, *_):
    return [0.0] * len(pi_logps)


def squeezed(*arguments):
    return plain_nca(*arguments).squeeze()


def raising(pi_logps, ref_logps, rewards, alpha, beta, mask):
    return (pi_logps @ rewards).sum(1)


def broken_loss(pi_logps, ref_logps, rewards, alpha, beta, mask):
    return -(pi_logps * rewards / mask).sum(1)


def broken_gradient(pi_logps, ref_logps, rewards, alpha, beta, mask):
    return torch.where(mask, (pi_logps - ref_logps).abs().sqrt(), 0).sum(1)


def divided_by_the_spread(pi_logps, ref_logps, rewards, alpha, beta, mask):
    count = mask.sum(1, keepdim=True)
    centred = torch.where(mask, rewards - rewards.sum(1, keepdim=True) / count, 0)
    return -(centred / (centred.square().sum(1, keepdim=True) / count).sqrt() * (pi_logps - ref_logps)).sum(1)


def detached(pi_logps, *others):
    return plain_nca(pi_logps.detach(), *others)


def of_numbers(pi_logps, *_):
    return torch.tensor([sum(row) for row in pi_logps.tolist()])


def unmasked(pi_logps, ref_logps, rewards, alpha, beta, mask):
    return -((rewards / alpha).softmax(1) * F.logsigmoid(beta * (pi_logps - ref_logps))).sum(1)


def mean_over_all(pi_logps, ref_logps, rewards, alpha, beta, mask):
    return (rewards * (ref_logps - pi_logps)).mean(1)


def rewards_in_place(pi_logps, ref_logps, rewards, *others):
    rewards /= 2
    return plain_nca(pi_logps, ref_logps, rewards, *others)


def policy_in_place(pi_logps, ref_logps, rewards, alpha, beta, mask):
    pi_logps -= ref_logps
    return -(pi_logps * rewards).sum(1)


def mask_in_place(pi_logps, ref_logps, rewards, alpha, beta, mask):
    loss = plain_nca(pi_logps, ref_logps, rewards, alpha, beta, mask)
    mask[:, 0] = False
    return loss


def first_against_second(pi_logps, ref_logps, rewards, alpha, beta, mask):
    r = beta * (pi_logps - ref_logps)
    return -F.logsigmoid(r[:, 0] - r[:, 1])


def order_in_the_gradient(pi_logps, ref_logps, rewards, alpha, beta, mask):
    """The first completion's value and the second one's gradient."""
    r = torch.where(mask, pi_logps - ref_logps, 0)
    return (r + torch.arange(r.shape[1]) * (r - r.detach())).sum(1)


def of_the_batch(*arguments):
    loss = plain_nca(*arguments)
    return loss / loss.mean().detach()


def random(*arguments):
    loss = plain_nca(*arguments)
    return loss * torch.rand(len(loss))


WRONG = {
    two_arguments: r"takes \(pi_logps, ref_logps\); it must take the six arguments \(pi_logps, .*mask\), in this order",
    scalar: r"returns a torch.float32 tensor of shape \(\) for 6 × 5 .*must return one loss a prompt, .*shape \(6,\)",
    one_each: r"returns a torch.float32 tensor of shape \(6, 5\) for 6 × 5 \(prompts × completions\)",
    whole_numbers: r"returns a torch.int64 tensor of shape \(6,\)",
    no_tensor: "returns a list for 6 × 5",
    squeezed: r"returns a torch.float32 tensor of shape \(\) for 1 × 5",
    raising: r"fails on random tensors of 6 × 5 .*: RuntimeError: mat1 .*, \S+test_own_losses.py line \d+; it must ",
    broken_loss: r"has a loss that isn't finite for a prompt with the rewards \[-?\d.*\] and [123] masked positions.",
    broken_gradient: r"has a gradient that isn't finite for a prompt .* and [123] masked positions.",
    divided_by_the_spread: r"has a loss that isn't finite for a prompt with the rewards \[1.0, 1.0, 1.0, 1.0\] and 1 m",
    detached: "has no gradient in `pi_logps`; it must depend on them without `detach`",
    of_numbers: "has no gradient in `pi_logps`",
    unmasked: "has a gradient at masked positions, where no completion is;",
    mean_over_all: "gives a prompt another loss when masked positions are added.",
    rewards_in_place: "changes its `rewards` in place.",
    policy_in_place: "changes its `pi_logps` in place.",
    mask_in_place: "changes its `mask` in place.",
    first_against_second: "gives another loss or gradient when a prompt's completions change places.",
    order_in_the_gradient: "gives another loss or gradient when a prompt's completions change places.",
    of_the_batch: "gives a prompt another loss when other prompts are in the batch.",
    random: "gives two losses for the same tensors; it must draw no random numbers",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_each_mistake_is_one_sentence(wrong):
    with pytest.raises(UserError, match=WRONG[wrong]) as error:
        NCAConfig("out", loss_type=wrong, bf16=False, use_cpu=True)
    said = str(error.value)
    assert said.startswith(f"`loss_type` test_own_losses:{wrong.__name__} ")
    assert "\n" not in said


def test_trying_moves_no_random_numbers_and_needs_no_gradients_to_be_on():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.no_grad():
        loss_name(plain_nca)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            "no_such_losses:f",
            r"`loss_type` no_such_losses:f: module no_such_losses can't be imported \(No module named",
        ),
        (
            "my_losses:offsets",
            r"`loss_type` my_losses:offsets: my_losses has no function `offsets` \(did you mean `off",
        ),
        ("my_losses:torch", r"`loss_type` my_losses:torch is a module; it must be a function"),
        ("my_losses:offset:x", r"must be one of nca, .*\(any case\), or `module:function`$"),
        ("broken:f", r"module broken can't be imported \(ZeroDivisionError: division by zero, \S+broken.py line 2\)"),
    ],
)
def test_a_name_that_finds_nothing(spec, said, write, capsys):
    write(MODULE)
    write("\n1 / 0\n", "broken")
    arguments = [
        "--dataset_name",
        "x",
        "--model_name_or_path",
        "x",
        "--output_dir",
        "x",
        "--use_cpu",
        "--bf16",
        "false",
    ]
    assert train([*arguments, "--loss_type", spec]) == 2
    assert re.search(said, capsys.readouterr().err)


# A name that holds a function


def test_it_is_text_to_files_and_processes(tmp_path, write):
    write(MODULE)
    args = config(tmp_path, loss_type=["nca", "my_losses:offset"], loss_weights=[1.0, 0.5])
    assert args.loss_type == ["nca", "my_losses:offset"]
    for read in (args.to_dict(), json.loads(args.to_json_string())):
        assert [type(name) for name in read["loss_type"]] == [str, str]
        assert yaml.safe_load(yaml.safe_dump(read["loss_type"])) == args.loss_type
    assert "my_losses:offset" in str(args.to_sanitized_dict()["loss_type"])
    assert "my_losses:offset" in repr(args)
    for other in (pickle.loads(pickle.dumps(args)), copy.deepcopy(args)):
        assert other.loss_type[1].function is args.loss_type[1].function
    torch.save(args, tmp_path / "training_args.bin")
    sys.modules.pop("my_losses")
    read = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert read.loss_type == args.loss_type
    assert "my_losses" not in sys.modules  # nothing is run before it is called
    assert read.loss_type[1].check()


def test_a_lambda_is_text_as_well_and_is_missed_only_when_called(tmp_path):
    args = config(tmp_path, **UNNAMED)
    assert copy.deepcopy(args).loss_type[0].check()
    read = pickle.loads(pickle.dumps(args))
    assert read.loss_type == ["test_own_losses:<lambda>"]
    with pytest.raises(UserError, match="`loss_type` test_own_losses:<lambda>: test_own_losses has no function"):
        read.loss_type[0].check()


@pytest.mark.slow
def test_another_process_has_the_same_loss(tmp_path, write):
    write(MODULE)
    with open(tmp_path / "args.pickle", "wb") as file:
        pickle.dump(config(tmp_path, loss_type="my_losses:offset"), file)
    code = "import pickle; print(pickle.load(open('args.pickle', 'rb')).loss_type[0].check().function.__module__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "my_losses", done.stderr


def test_names_of_what_isnt_a_plain_function():
    class Loss:
        def __call__(self, *arguments):
            return plain_nca(*arguments)

    instance = OwnLoss(Loss()).check()
    assert instance.startswith("test_own_losses:")
    part = OwnLoss(partial(plain_nca)).check()
    assert part == "test_own_losses:plain_nca"
    assert [OwnLoss(f).is_found_by_name for f in (plain_nca, partial(plain_nca), Loss())] == [True, False, False]


# reward_loss


def test_reward_loss_takes_a_function():
    pi_logps, ref_logps, rewards, mask = draw()
    arguments = (pi_logps, ref_logps, rewards, 0.5, 0.1)
    expected = reward_loss(*arguments, "nca", mask)
    for own in (plain_nca, "test_own_losses:plain_nca", OwnLoss(plain_nca)):
        assert torch.equal(reward_loss(*arguments, own, mask), expected)
        assert torch.equal(reward_loss(*arguments, own, mask, check=False), expected)
    nan = [torch.where(mask, tensor, torch.nan) for tensor in arguments[:3]]
    nan[0].requires_grad_()
    loss = reward_loss(*nan, 0.5, 0.1, plain_nca, mask)
    loss.sum().backward()
    assert torch.equal(loss, expected)
    assert (nan[0].grad[~mask] == 0).all()
    with pytest.raises(ValueError, match="`alpha` is 0; it must be"):
        reward_loss(*arguments[:3], 0, 0.1, plain_nca, mask)
    with pytest.raises(UserError, match="one loss a prompt"):
        reward_loss(*arguments, scalar, mask)
    with pytest.raises(
        NotImplementedError, match=r"`negative_weight` is 0.5 with `loss_type` 'test_own_losses:plain_n"
    ):
        reward_loss(*arguments, plain_nca, mask, negative_weight=0.5)


def test_whole_rows_need_no_mask_and_bfloat16_is_subtracted_in_float32():
    pi_logps, ref_logps, rewards, _ = draw(dtype=torch.bfloat16, ragged=False)
    loss = reward_loss(pi_logps, ref_logps, rewards, 0.5, 0.1, plain_nca)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, reward_loss(pi_logps, ref_logps, rewards, 0.5, 0.1, "nca"))


def test_a_batch_of_which_it_takes_nothing_has_a_gradient_of_zero():
    def better_than_the_worst(pi_logps, ref_logps, rewards, alpha, beta, mask):
        losses = [torch.zeros(())]
        for pi, own, here in zip(pi_logps, rewards, mask, strict=True):
            better = [-pi[k] for k in range(len(own)) if here[k] and own[k] > own[here].min()]
            losses.append(sum(better) if better else torch.zeros(()))
        return torch.stack(losses[1:])

    pi_logps = torch.zeros(1, 3, requires_grad=True)
    loss = reward_loss(pi_logps, pi_logps.detach(), torch.ones(1, 3), 0.5, 0.1, better_than_the_worst)
    loss.sum().backward()
    assert pi_logps.grad.tolist() == [[0.0, 0.0, 0.0]]


# Training


@pytest.mark.parametrize(("own", "passes", "layout"), [(plain_nca, 2, "prefix_shared"), (separable_nca, 1, "padded")])
def test_a_copy_of_nca_trains_as_nca_does(own, passes, layout, tmp_path):
    """Ragged, with accumulation, all at once and a few completions at a time."""
    rows, options = reward_rows(8, [5, 3, 4]), {"layout": layout, "gradient_accumulation_steps": 2, "optim": "sgd"}
    options["startup_checks"] = False  # their forwards would be counted
    expected = weights_after(nca := trainer(tmp_path, rows=rows, loss_type="nca", **options))
    whole = trainer(tmp_path, rows=rows, loss_type=own, **options)
    assert torch.equal(weights_after(whole), expected)
    assert [line.get("loss") for line in whole.state.log_history] == [x.get("loss") for x in nca.state.log_history]
    chunked = trainer(tmp_path, rows=rows, loss_type=own, tokens_per_forward=40, **options)
    assert chunked._objective.separable == (passes == 1)
    counted = Forwards().attach(chunked)
    torch.testing.assert_close(weights_after(chunked), expected, rtol=1e-5, atol=1e-6)
    again = counted.without_grad - counted.with_grad * passes  # one for the reference
    assert again == 0 if layout == "padded" else 0 < again < counted.with_grad  # of what later pieces read
    assert logged(chunked) == pytest.approx(logged(nca), abs=1e-5)


def test_in_a_list_it_is_weighed_and_logged_by_its_name(tmp_path):
    rows, options = reward_rows(6, [3, 4]), {"eval_rows": reward_rows(4), "eval_strategy": "steps", "eval_steps": 1}
    twice = trainer(tmp_path, rows=rows, loss_type=["nca", plain_nca], loss_weights=[0.75, 0.25], **options)
    once = trainer(tmp_path, rows=rows, loss_type="nca", **options)
    torch.testing.assert_close(weights_after(twice), weights_after(once), rtol=1e-5, atol=1e-6)
    assert logged(twice, "eval_loss") == pytest.approx(logged(once, "eval_loss"), rel=1e-5)
    assert not Objective(["nca", OwnLoss(plain_nca)], [1, 1], 0.5, 0.1).separable
    assert Objective(["nca", "sft", OwnLoss(separable_nca)], [1, 1, 1], 0.5, 0.1).separable
    assert twice.model.model_tags == ["nca-align", "nca", "plain_nca"]
    with pytest.raises(UserError, match="must name at least one loss, and each once"):
        config(tmp_path, loss_type=[plain_nca, plain_nca])


def test_the_first_lines_say_what_is_to_be_known(tmp_path, caplog):
    def best_alone(pi_logps, ref_logps, rewards, alpha, beta, mask):
        best = rewards.masked_fill(~mask, -torch.inf).argmax(1, keepdim=True)
        return -F.logsigmoid(beta * (pi_logps - ref_logps)).gather(1, best)[:, 0]

    trainer(tmp_path, loss_type=best_alone)
    said = [text for text in caplog.messages if text.startswith("`loss_type`")]
    assert len(said) == 2
    assert "best_alone is not found by its name: it trains, but its checkpoints can't be resumed" in said[0]
    assert "gives another loss when completions with equal rewards change places" in said[1]
    caplog.clear()
    nca = trainer(tmp_path, loss_type=plain_nca)
    assert not [text for text in caplog.messages if text.startswith("`loss_type`")]
    nca.create_model_card()
    tags = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])["tags"]
    assert {"nca-align", "plain_nca"} <= {*tags}
    assert "nca" not in tags


@pytest.mark.slow
def test_two_processes_train_with_it_as_with_ours(tmp_path, write, model_dir):
    """DDP, a cached reference, ragged K and a few completions at a time, and rows that don't divide."""
    write("import inspect\nfrom nca_align.losses import plackett_luce_loss as ours\n\n\n"
          "def copied(*arguments):\n    return inspect.unwrap(ours)(*arguments)\n")  # fmt: skip
    case = {"weights": "lora", "reference": "cached", "layout": "padded", "per_forward": 40, "k": "ragged", "rows": 17}
    cases = {name: case | {"loss": loss} for name, loss in (("ours", "plackett_luce"), ("own", "my_losses:copied"))}
    Path("cases.json").write_text(json.dumps({"model": model_dir, "launch": "ddp", "cases": cases}))
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "tests" / "launched.py")]
    done = subprocess.run(
        [sys.executable, *command, "cases.json", "out"], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ours, own = (json.loads(Path("out", name, "result.json").read_text()) for name in cases)
    assert len(own["log"]) > 3
    assert [line["loss"] for line in own["log"]] == [line["loss"] for line in ours["log"]]
    assert [line["eval_loss"] for line in own["evaluations"]] == [line["eval_loss"] for line in ours["evaluations"]]


# Going on


def go_on(folder, *callbacks, **own):
    nca = trainer(folder, rows=reward_rows(8), save_strategy="steps", save_steps=1, callbacks=list(callbacks), **own)
    nca.train(resume_from_checkpoint=own.get("resume_changed") is not None or bool(list(folder.glob("checkpoint-*"))))
    return nca


def test_another_source_is_refused_with_its_lines_and_allowed_by_name(tmp_path, write):
    write(HALVES)
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        go_on(run, At("on_save", 1, interrupt), loss_type="my_losses:half")
    write("# another place in the file\n" + HALVES.replace("UNUSED = 1", "UNUSED = 2"))
    with pytest.raises(KeyboardInterrupt):
        go_on(run, At("on_save", 2, interrupt), loss_type="my_losses:half")
    for old, new in (
        ("SCALE = 0.5", "SCALE = 0.25"),
        ("return SCALE * x", "return SCALE * x * x"),
        ("return beta * (pi_logps - ref_logps)", "return beta * (pi_logps - 2 * ref_logps)"),
        ("scaled = Scaled()", "scaled = Scaled()  # once"),
    ):
        write(HALVES.replace(old, new))
        shown = f"`loss_type.my_losses:half` {old} → {new}; go back to what it was"
        with pytest.raises(UserError, match=f"checkpoint-2 belongs to another run: {re.escape(shown)}"):
            go_on(run, loss_type="my_losses:half")
    assert go_on(run, loss_type="my_losses:half", resume_changed=["loss_type.my_losses:half"]).state.global_step == 3


def test_a_lambda_trains_and_cant_be_resumed_unless_it_is_allowed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go_on(tmp_path, At("on_save", 1, interrupt), **UNNAMED)
    with pytest.raises(UserError, match="can't be resumed with `loss_type` test_own_losses:<lambda>"):
        go_on(tmp_path, **UNNAMED)
    allowed = ["loss_type.test_own_losses:<lambda>"]
    assert go_on(tmp_path, **UNNAMED, resume_changed=allowed).state.global_step == 3


def test_the_source_of_a_function_is_that_of_what_it_uses(write):
    write(HALVES)
    source = source_text(OwnLoss("my_losses:half").function)
    assert all(text in source for text in ("def half", "class Scaled", "def _gaps", "SCALE = 0.5"))
    assert "UNUSED" not in source
    assert source_text(len) is None


STATES = {
    "closure": ("made = make(0.5)", "made = make(0.25)"),
    "partial": ("made = functools.partial(loss, margin=0.5)", "made = functools.partial(loss, margin=0.25)"),
    "default": ("MARGIN = 0.5\nmade = loss", "MARGIN = 0.25\nmade = loss"),
    "object": ("made = Loss(0.5)", "made = Loss(0.25)"),
    "method": ("made = Loss(0.5).__call__", "made = Loss(0.25).__call__"),
    "decorator": ("made = twice(loss)", "SCALE = 3\nmade = twice(loss)"),
    "dict": ("TABLE = {'scale': 1}\nmade = loss", "TABLE = {'scale': 4}\nmade = loss"),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_changed_value_changes_the_source(kind, write):
    """Of whatever a name in a module can be; the same text in another process or place is the same."""
    code = """
import functools

MARGIN = 0.75
SCALE = 2
TABLE = {}

{0}

def loss(pi_logps, ref_logps, rewards, alpha, beta, mask, margin=MARGIN):
    return (margin * TABLE.get("scale", 1) * rewards * (ref_logps - pi_logps) * mask).sum(1)

def make(margin):
    return lambda *arguments: loss(*arguments, margin=margin)

def twice(function):
    @functools.wraps(function)
    def wrapper(*arguments):
        return SCALE * function(*arguments)
    return wrapper

class Loss:
    def __init__(self, margin):
        self.margin = margin

    def __call__(self, *arguments):
        return loss(*arguments, margin=self.margin)

{1}
"""
    sources = []
    for text in STATES[kind]:
        before, _, made = text.rpartition("\n")
        for comment in ("", "# moved\n"):
            write(comment + code.replace("{0}", before).replace("{1}", made))
            loss = loss_name("my_losses:made")
            assert loss.is_found_by_name
            sources.append(source_text(loss.function))
    assert None not in sources
    assert sources[0] == sources[1] != sources[2] == sources[3]


SETS = """
import re

import numpy as np
import torch

WORDS = {"good", "bad", "fine", "poor", "true", "false"}
NESTED = {"a": [({"x", "y", "z", "w"}, frozenset("pqrs"))]}
NESTED["itself"] = NESTED
FAR = torch.arange(5000.0)
ARRAY = np.arange(5000)
PATTERN = re.compile("a" * 300)

def loss(pi_logps, ref_logps, rewards, alpha, beta, mask):
    return len(WORDS) * len(NESTED) * FAR[0] * ARRAY[0] * len(PATTERN.pattern) * pi_logps.sum(1)
"""


@pytest.mark.slow
def test_the_source_is_the_same_in_every_process(write):
    """A set of strings has another order in each, by `PYTHONHASHSEED`; a run could be resumed only by chance."""
    write(SETS)
    code = (
        "from nca_align.store.fingerprints import source_text; import my_losses; "
        "print(repr(source_text(my_losses.loss)), list(my_losses.WORDS), sep='\\n')"
    )
    sources, orders = zip(
        *(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True,
                env=os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONPATH": os.getcwd()},
            ).stdout.splitlines()
            for seed in (1, 2)
        ),
        strict=True,
    )  # fmt: skip
    assert orders[0] != orders[1]
    assert sources[0] == sources[1]
    assert "WORDS = {'bad', 'false', 'fine', 'good', 'poor', 'true'}" in sources[0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"poor"', '"worse"'),
        ('"z", "w"', '"z", "v"'),
        ("torch.arange(5000.0)", "torch.arange(5000.0) + (torch.arange(5000) == 2500)"),
        ("np.arange(5000)", "np.arange(5000) + (np.arange(5000) == 2500)"),
        ('"a" * 300', '"a" * 299 + "b"'),
    ],
)
def test_what_repr_abbreviates_changes_the_source(old, new, write):
    sources = []
    for text in (SETS, SETS.replace(old, new)):
        write(text)
        sources.append(source_text(loss_name("my_losses:loss", check=False).function))
    assert sources[0] != sources[1]


# Beside NCA


def base(tmp_path, model_dir) -> dict:
    for seed, (split, n) in enumerate([("train", 8), ("validation", 3), ("test", 4)]):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, reward_rows(n, seed=seed))))
    return {
        "model_name_or_path": model_dir, "dataset_name": str(tmp_path / "data"), "use_peft": True, "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj"], "bf16": False, "use_cpu": True, "report_to": "none",
        "gradient_checkpointing": False, "max_length": 128, "max_steps": 4, "per_device_train_batch_size": 2,
        "logging_steps": 2, "learning_rate": 1e-2,
    }  # fmt: skip


def test_cells_of_the_pages_grid(tmp_path, model_dir, write):
    write(MODULE + "\n\ndef order(pi_logps, ref_logps, rewards, alpha, beta, mask):\n"
          "    return -(rewards * (pi_logps - ref_logps) * mask).sum(1)\n")  # fmt: skip
    grid = yaml.safe_load(YAML[2])["grid"]
    cells = expand(base(tmp_path, model_dir), grid, "the file")
    assert [cell.name for cell in cells if cell.settings["method"] != "nca"] == [
        f"my_losses.offset-alpha{alpha}-seed{seed}" for alpha in (0.3, 1.0) for seed in (1, 2)
    ]
    unread = expand(base(tmp_path, model_dir), {**grid, "method": "my_losses:order"}, "the file")
    assert [cell.settings["alpha"] for cell in unread] == [None, None]
    before = cells[-1].identity()
    write(MODULE.replace("clamp(min=1)", "clamp(min=2)"))
    after = expand(base(tmp_path, model_dir), grid, "the file")[-1].identity()
    assert {name for name in before if before[name] != after[name]} == {"loss_type.my_losses:offset"}
    with pytest.raises(UserError, match="`grid` can't be run: `loss_type` my_losses:nothing"):
        expand(base(tmp_path, model_dir), {"method": "my_losses:nothing"}, "the file")


def test_legends_have_the_functions_name_unless_it_is_anothers():
    def names(*methods):
        return [*labels([setting_of({"method": method, "strategy": "rewards"}) for method in methods]).values()]

    assert names("nca", "my_losses:offset") == ["nca", "offset"]
    assert names("nca", "my_losses:nca") == ["nca", "my_losses:nca"]
    assert names("a:offset", "b:offset") == ["a:offset", "b:offset"]


def test_a_comparisons_trainer_has_the_loss(tokenizer, tmp_path):
    from conftest import build_model

    assert check_method(plain_nca, None) == ("test_own_losses:plain_nca", "rewards")
    rows, logs = Dataset.from_list(reward_rows(6)), []
    for method in ("nca", "test_own_losses:plain_nca"):
        nca = build_trainer(method, build_model(tokenizer), config(tmp_path), rows, tokenizer)
        nca.train()
        logs.append(logged(nca))
    assert logs[0] == logs[1]


# The page


@pytest.mark.parametrize("own", range(2))
def test_the_pages_configurations_train(own, tmp_path, model_dir, write):
    """With the page's code and options, on tiny data, ragged; the log has the page's own loss of its tensors."""
    write(MODULE)
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, reward_rows(8, [4, 2, 3]))))
    options = yaml.safe_load(YAML[0]) | (yaml.safe_load(YAML[own]))
    options |= {
        "model_name_or_path": model_dir, "dataset_name": str(tmp_path / "data.jsonl"), "output_dir": "run",
        "bf16": False, "use_cpu": True, "report_to": "none", "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3,
        "per_device_train_batch_size": 4, "validation_fraction": 0, "disable_tqdm": True, "save_steps": 3,
        "gradient_checkpointing": False, "tokens_per_forward": 40,
    }  # fmt: skip
    Path("train.yaml").write_text(yaml.safe_dump(options))
    assert train(["--config", "train.yaml"]) == 0
    log = json.loads(Path("run/trainer_state.json").read_text())["log_history"]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert torch.load("run/training_args.bin", weights_only=False).loss_type[-1] == "my_losses:offset"


@pytest.mark.parametrize(("name", "separable", "alpha"), [("offset", False, True), ("regression", True, True)])
def test_the_pages_losses_are_as_it_says(name, separable, alpha, write):
    write(MODULE)
    loss = loss_name(f"my_losses:{name}")
    assert (is_separable(loss), reads_alpha(loss), loss.breaks_ties) == (separable, alpha, False)
    pi_logps, ref_logps, rewards, mask = draw()
    values = reward_loss(pi_logps, ref_logps, rewards, 0.5, 0.1, loss, mask)
    for b in range(len(rewards)):  # as the formulas are written on paper
        rows = zip(*(x[b][mask[b]].tolist() for x in (pi_logps, ref_logps, rewards)), strict=True)
        found = [(0.1 * (pi - ref), reward / 0.5) for pi, ref, reward in rows]
        if name == "regression":
            terms = [(r - w) ** 2 for r, w in found]
        else:
            terms = [
                torch.tensor(1 + torch.tensor(v - w - (r - s)).exp().item()).log().item()
                for r, v in found for s, w in found if v > w
            ]  # fmt: skip
        assert values[b].item() == pytest.approx(sum(terms) / max(len(terms), 1), rel=1e-5)


@pytest.mark.slow
def test_the_pages_comparison_runs_and_is_reported(tmp_path, model_dir, write, monkeypatch, capsys):
    write(MODULE)
    write("def long(completions, **kwargs):\n    return [len(c[0]['content']) / 60 for c in completions]\n", "tiny")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    grid = yaml.safe_load(YAML[2])["grid"] | {"alpha": [1.0], "seed": [1]}
    evaluation = {"scorer": ["tiny:long"], "num_completions": 2, "max_new_tokens": 8, "steps": 2, "batch_size": 8}
    given = {"output_dir": "out", "base": base(tmp_path, model_dir), "grid": grid, "evaluation": evaluation}
    Path("compare.yaml").write_text(yaml.safe_dump(given))
    assert compare(["--config", "compare.yaml", "--report"]) == 0
    table = (tmp_path / "out" / "comparison.csv").read_text()
    assert "my_losses:offset" in table
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.search(r"[> ]offset[<,:]", page)
    write(MODULE.replace("clamp(min=1)", "clamp(min=2)"))
    capsys.readouterr()
    assert compare(["--config", "compare.yaml"]) == 2
    said = r"was trained with other settings: `loss_type.my_losses:offset` .*min=1.* → .*min=2"
    assert re.search(said, capsys.readouterr().err)
