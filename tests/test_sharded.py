"""A run under configs/accelerate/fsdp2.yaml on two processes: it saves a whole model, is resumed, and is exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from conftest import reward_rows
from nca_align.commands.export.command import ExportOptions, export
from nca_align.errors import UserError
from nca_align.store.weights import read_back
from nca_align.training.sharded import own_class
from test_launch import ROOT, TRAIN, run, torchrun

LORA = {name: value for name, value in TRAIN.items() if name == "use_peft" or name.startswith("lora_")}
FILES = dict.fromkeys(("lora", "continued"), "adapter_model.safetensors") | {"full": "model.safetensors"}


def fsdp_environment() -> dict[str, str]:
    """What `accelerate launch` makes of the file for its processes, in fp32."""
    config = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text())
    values = {"ACCELERATE_USE_FSDP": True, "ACCELERATE_MIXED_PRECISION": "no"}
    values |= {name.upper(): value for name, value in config["fsdp_config"].items()}
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}


def train(output: Path, processes: int, **options) -> str:
    options = (
        {name: value for name, value in TRAIN.items() if name not in LORA}
        | {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        | options
    )
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    script = "scripts/train.py" if processes == 1 else "tests/launched_fsdp.py"
    environment = {"HF_DATASETS_CACHE": str(output.parent / "cache")}
    command = [*torchrun(processes), script, "--output_dir", str(output), *arguments]
    return run(command, environment | (fsdp_environment() if processes > 1 else {}), timeout=240).stdout


@pytest.mark.slow
@pytest.mark.parametrize("weights", FILES)
def test_a_run_as_the_launch_file_says_is_whole(weights, model_dir, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, reward_rows(24, [4, 2, 3, 5]))))
    options = {"model_name_or_path": model_dir, "dataset_name": rows} | (LORA if weights == "lora" else {})
    if weights == "continued":
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(tmp_path / "before")
        options["model_name_or_path"] = tmp_path / "before"
    alone, output, file = tmp_path / "alone", tmp_path / "run", FILES[weights]
    train(alone, 1, gradient_accumulation_steps=4, **options)
    said = train(output, 2, gradient_accumulation_steps=2, **options)

    *earlier, last = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert earlier
    for checkpoint in (*earlier, last):  # it was sharded: each process wrote its part
        shards = [path.stat().st_size for path in (checkpoint / "pytorch_model_fsdp_0").glob("__*.distcp")]
        assert len(shards) == 2
        assert max(shards) < 2 * min(shards)

    # whole, and what one process trains
    assert f"is in {output}, the plot is" in said
    expected, found = load_file(alone / file), load_file(output / file)
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # Adam turns rounding of small gradients into steps
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    if weights == "continued":  # the reference is where it began
        before, kept = (load_file(path / file) for path in (tmp_path / "before", output / "ref"))
        assert kept.keys() == before.keys()
        assert all(torch.equal(kept[name], value) for name, value in before.items())

    # gone on from an earlier checkpoint, after an evaluation, to the same bytes
    resumed = tmp_path / "resumed"
    shutil.copytree(output, resumed, ignore=shutil.ignore_patterns(last.name))
    (resumed / file).unlink()
    said = train(resumed, 2, gradient_accumulation_steps=2, resume_from_checkpoint="true", **options)
    assert f"The run goes on from {resumed / earlier[-1].name}" in said
    assert (resumed / file).read_bytes() == (output / file).read_bytes()

    # exported, also from the shards alone
    for source in (output, last):
        export(ExportOptions(model_name_or_path=str(source), output=str(tmp_path / f"{source.name}-exported")))
    first, second = (
        AutoModelForCausalLM.from_pretrained(tmp_path / f"{source.name}-exported").state_dict()
        for source in (output, last)
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0)


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
