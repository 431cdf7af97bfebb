"""A run as each of configs/accelerate says, on CPU processes: trained as by one, whole, resumed, exported."""

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM, NemotronConfig, NemotronForCausalLM

from conftest import reward_rows
from nca_align import NCAConfig, NCATrainer
from nca_align.commands.export.command import ExportOptions, export
from nca_align.errors import UnsupportedError, UserError
from nca_align.store.checkpoints import MANIFEST
from nca_align.store.weights import read_back
from nca_align.training.sharded import own_class
from test_launch import ROOT, TRAIN, run, same, torchrun

LORA = {name: value for name, value in TRAIN.items() if name == "use_peft" or name.startswith("lora_")}
CACHED = {"precompute_ref_log_probs": "true"}
BEST = CACHED | {"load_best_model_at_end": "true"}
WORST = BEST | {"greater_is_better": "true"}  # loads the checkpoint before the last, whose loss is higher
# Weights to their options and the file that holds what was trained
WEIGHTS = {
    "full": ({}, "model.safetensors"),
    "full, cached": (BEST, "model.safetensors"),
    "lora": (LORA | WORST, "adapter_model.safetensors"),
    "continued": (CACHED, "adapter_model.safetensors"),
    "qlora": (LORA | CACHED | {"load_in_4bit": "true"}, "adapter_model.safetensors"),
}
# Launches to accelerate's file and what is changed of it
LAUNCHES: dict[str, tuple[str, dict[str, str]]] = {
    "one": ("one_gpu", {}),
    "ddp": ("multi_gpu", {}),
    "fsdp2": ("fsdp2", {}),
    "zero2": ("zero3", {"zero_stage": "2"}),
    "zero3": ("zero3", {}),
}
# (launch, weights) that are tried in CI, and with DeepSpeed
IN_CI = [
    *((launch, weights) for launch in ("one", "ddp") for weights in ("full", "lora", "qlora")),
    *(("fsdp2", weights) for weights in WEIGHTS),
]
WITH_DEEPSPEED = [(launch, weights) for launch in ("zero2", "zero3") for weights in WEIGHTS]
# Of them what is refused, and the reason
REFUSED = {("zero3", "continued"): "this adapter's reference is another adapter, which ZeRO-3 would not save"}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs deepspeed, in an environment of its own: make test-deepspeed",
)


def environment(launch: str, processes: int) -> dict[str, str]:
    """What `accelerate launch` makes of its file for its processes, in fp32."""
    file, changed = LAUNCHES[launch]
    given = {"num_processes": str(processes), "mixed_precision": "no", "main_process_port": "0"} | changed
    flags = [part for name, value in given.items() for part in (f"--{name}", value)]
    arguments = ["--config_file", str(ROOT / "configs" / "accelerate" / f"{file}.yaml"), *flags, "train.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        made = prepare_deepspeed_cmd_env(args)[1]
    else:
        made = prepare_multi_gpu_env(args)
    return {name: value for name, value in made.items() if os.environ.get(name) != value}


def test_several_machines_have_a_launcher_each():
    """No pdsh from the first one, with a file of hosts, which is accelerate's default with DeepSpeed."""
    file = ROOT / "configs" / "accelerate" / "zero3.yaml"
    several = "--num_machines 2 --num_processes 16 --machine_rank 1 --main_process_ip first --main_process_port 29500"
    args, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(file), *several.split(), "train.py"])
    )
    args.deepspeed_fields_from_accelerate_config = ""
    command, _ = prepare_deepspeed_cmd_env(args)
    assert command is None  # none of DeepSpeed's own: torchrun's arguments
    assert (args.nnodes, args.node_rank, args.nproc_per_node, args.rdzv_endpoint) == ("2", 1, "8", "first:29500")


def train(output: Path, launch: str, **options) -> str:
    processes = 1 if launch == "one" else 2
    options = (
        {name: value for name, value in TRAIN.items() if name not in LORA}
        | {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        | {"gradient_accumulation_steps": 4 // processes}
        | options
    )
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [*torchrun(processes), "tests/launched_as_on_cards.py", "--output_dir", str(output), *arguments]
    cache = {"HF_DATASETS_CACHE": str(output.parent / f"cache-{launch}")}
    return run(command, environment(launch, processes) | cache, timeout=600).stdout


def of_each_process(checkpoint: Path, launch: str) -> list[Path]:
    """What each process has written for itself: the proof of how it was launched."""
    pattern = {
        "fsdp2": "pytorch_model_fsdp_0/__*.distcp", "zero2": "global_step*/*_optim_states.pt",
        "zero3": "global_step*/*_optim_states.pt",
    }.get(launch, "rng_state*.pth")  # fmt: skip
    return list(checkpoint.glob(pattern))


@pytest.fixture(scope="module")
def alone(model_dir, tmp_path_factory) -> Callable[[str], tuple[Path, dict, str]]:
    """Weights to the folder of one process's run, the options and what it said; run once for all launches."""

    @cache
    def trained(weights: str) -> tuple[Path, dict, str]:
        folder = tmp_path_factory.mktemp("alone")
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, reward_rows(24, [4, 2, 3, 5]))))
        options = {"model_name_or_path": model_dir, "dataset_name": folder / "rows.jsonl"} | WEIGHTS[weights][0]
        if weights == "continued":
            torch.manual_seed(0)
            config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
            get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(folder / "before")
            options["model_name_or_path"] = folder / "before"
        return folder / "run", options, train(folder / "run", "one", **options)

    return trained


def check(launch: str, weights: str, alone: Callable[[str], tuple[Path, dict, str]], tmp_path: Path) -> None:
    own, file = WEIGHTS[weights]
    one, options, said = alone(weights)
    output = one if launch == "one" else tmp_path / "run"
    if (launch, weights) in REFUSED:
        with pytest.raises(AssertionError, match=REFUSED[launch, weights]):
            train(output, launch, **options)
        return
    if launch != "one":
        said = train(output, launch, **options)

    *earlier, last = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert earlier
    for checkpoint in (*earlier, last):
        parts = [path.stat().st_size for path in of_each_process(checkpoint, launch)]
        assert len(parts) == (1 if launch == "one" else 2)
        assert max(parts) < 2 * min(parts)

    # whole, and what one process trains
    assert f"is in {output}, the plot is" in said
    expected, found = load_file(one / file), load_file(output / file)
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # Adam turns rounding of small gradients into steps
        if weights == "qlora":  # whose adapter is bfloat16
            assert (found[name] - value).abs().mean() < 0.02 * value.abs().mean()
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    if weights == "continued":  # the reference is where it began
        before, kept = (load_file(path / file) for path in (options["model_name_or_path"], output / "ref"))
        assert kept.keys() == before.keys()
        assert all(torch.equal(kept[name], value) for name, value in before.items())

    # known as the same run, also where the weights were split before its start
    own_run, other = (json.loads((path / last.name / MANIFEST).read_text()) for path in (output, one))
    assert own_run["identity"] == other["identity"]

    # gone on from an earlier checkpoint, after an evaluation, to the same bytes
    resumed = tmp_path / "resumed"
    shutil.copytree(output, resumed, ignore=shutil.ignore_patterns(last.name))
    (resumed / file).unlink()
    said = train(resumed, launch, resume_from_checkpoint="true", **options)
    assert f"The run goes on from {resumed / earlier[-1].name}" in said
    assert (resumed / file).read_bytes() == (output / file).read_bytes()

    # exported, also from the checkpoint alone
    ended_with = last
    if "load_best_model_at_end" in own:
        ended_with = Path(json.loads((output / "trainer_state.json").read_text())["best_model_checkpoint"])
        assert ended_with == earlier[-1]
    for source in (output, ended_with):
        export(ExportOptions(model_name_or_path=str(source), output=str(tmp_path / f"{source.name}-exported")))
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / f"{source.name}-exported").state_dict()
        for source in (output, ended_with)
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "weights"), IN_CI)
def test_a_run_as_the_launch_file_says_is_whole(launch, weights, alone, tmp_path):
    check(launch, weights, alone, tmp_path)


@pytest.mark.slow
def test_a_packed_row_that_is_refused_within_a_forward_is_padded(tokenizer, tmp_path):
    """Nemotron's attention refuses it below modules that FSDP2 has gathered, on both processes; they train on."""
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    NemotronForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, reward_rows(12, [3, 2]))))
    options = {
        "model_name_or_path": tmp_path / "model", "dataset_name": rows, "eval_strategy": "no", "max_steps": 2,
        "validation_fraction": 0, "save_strategy": "no",
    }  # fmt: skip
    logs = []
    for launch in ("one", "fsdp2"):
        said = train(tmp_path / launch, launch, **options)
        assert "Layout: padded, the model's layers don't pass the arguments of its forward on to Nemotron" in said
        log = json.loads((tmp_path / launch / "trainer_state.json").read_text())["log_history"]
        logs.append([line for line in log if "loss" in line])
    assert [len(log) for log in logs] == [2, 2]
    for line, other in zip(*logs, strict=True):
        same(line, other)


@pytest.mark.long
@needs_deepspeed
@pytest.mark.parametrize(("launch", "weights"), WITH_DEEPSPEED)
def test_a_run_under_deepspeed_is_whole(launch, weights, alone, tmp_path):
    check(launch, weights, alone, tmp_path)


def test_the_page_has_a_row_for_each_launch():
    lines = [f"| | {' | '.join(WEIGHTS)} |", f"| {' | '.join(['---'] * (1 + len(WEIGHTS)))} |"]
    for launch in LAUNCHES:
        cells = []
        for weights in WEIGHTS:
            tried = (launch, weights) in (*IN_CI, *WITH_DEEPSPEED)
            cells.append("refused" if (launch, weights) in REFUSED else "whole" if tried else "not tried")
        lines.append(f"| {launch} | {' | '.join(cells)} |")
    page = (ROOT / "docs" / "guide" / "scaling.md").read_text()
    assert "\n".join(lines) in page
    assert all(reason.split(",")[0] in page.replace("\n", " ") for reason in REFUSED.values())


def test_a_save_that_left_no_weights_or_broken_ones_is_told(tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match=r"no weights were written to .*zero3_save_16bit_model"), read_back(tmp_path):
        (tmp_path / "config.json").write_text("{}")
    file.write_bytes(b"of an earlier run")
    with pytest.raises(UserError, match="no weights were written"), read_back(tmp_path):
        pass
    with pytest.raises(UserError, match=r"model.safetensors can't be read after it was written"), read_back(tmp_path):
        file.write_bytes(b"cut off")


def test_a_sharded_models_class_is_its_authors():
    class Sharded(FSDPModule, nn.Linear):
        def __new__(cls, *args, **kwargs):
            return nn.Linear.__new__(cls)

    assert own_class(Sharded(2, 2)) is nn.Linear
    assert own_class(nn.Linear(2, 2)) is nn.Linear


@pytest.mark.parametrize("options", [{}, {"fsdp": True, "fsdp_config": {"version": 1}}])
def test_fsdp_1_is_refused_before_anything_is_loaded(options, monkeypatch, tmp_path):
    if not options:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")  # accelerate's files have version 1 where they say nothing
    args = NCAConfig(str(tmp_path), bf16=False, use_cpu=True, report_to=[], **options)
    with pytest.raises(UnsupportedError, match=r"the launch says FSDP 1.*`fsdp_version: 2`"):
        NCATrainer("nowhere", args=args, train_dataset=Dataset.from_list(reward_rows(2, 2)))
