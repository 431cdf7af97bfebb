"""The recipes: every key is known, every value is the paper's, every line is commented."""

from pathlib import Path

import pytest
import yaml
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from nca_align import NCAConfig
from nca_align.commands.train.options import RunOptions
from nca_align.data import DataOptions
from nca_align.options import parse

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MISTRAL = sorted(CONFIGS.glob("*_mistral7b.yaml"))
PAPERS = [path for path in MISTRAL if path.stem != "your_rows_mistral7b"]


def parsed(path: Path, *flags: str):
    # bf16 and the optimizer are for a GPU, which this machine need not have
    return parse(
        (ScriptArguments, DataOptions, RunOptions, NCAConfig, ModelConfig), ["--config", str(path), *flags], "x"
    )


@pytest.mark.parametrize(
    "path", [*MISTRAL, CONFIGS / "quickstart.yaml", CONFIGS / "calculator.yaml"], ids=lambda path: path.stem
)
def test_every_key_is_known_and_commented_and_can_be_overridden(path):
    _, _, _, args, _ = parsed(path, "--use_cpu", "true", "--beta", "0.5", "--output_dir", "elsewhere")
    assert (args.beta, args.output_dir) == (0.5, "elsewhere")
    keys = yaml.safe_load(path.read_text())
    lines = path.read_text().splitlines()
    assert f"configs/{path.name}" in "\n".join(lines[:12]), "its launch command stands in its head"
    assert sum("#" in line for line in lines) > len(keys) / 2


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_the_papers_values(path):
    script, data, _, args, model = parsed(path, "--use_cpu", "true")
    expected = {
        "alpha": 0.01, "beta": 0.01, "learning_rate": 5e-6, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
        "num_train_epochs": 1, "max_length": 1024, "max_prompt_length": 512, "seed": 42, "bf16": True,
        "gradient_checkpointing": True, "optim": "paged_adamw_32bit", "disable_dropout": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32
    lora = get_peft_config(model)
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (16, 16, 0.05)
    assert lora.target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    quantization = get_quantization_config(model)
    assert (quantization.load_in_4bit, quantization.bnb_4bit_quant_type) == (True, "nf4")
    assert str(quantization.bnb_4bit_compute_dtype) == "torch.bfloat16"
    assert model.model_name_or_path == "HuggingFaceH4/mistral-7b-sft-beta"
    assert (script.dataset_train_split, script.dataset_test_split) == ("train_prefs", "test_prefs")
    assert args.loss_type == [
        {"nca": "nca", "infonca": "infonca", "nca_pair": "nca", "dpo": "infonca"}[path.stem[:-10]]
    ]
    hard = path.stem in ("nca_pair_mistral7b", "dpo_mistral7b")
    assert data.preference == ("hard" if hard else "scores")


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_configs(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert str(config.distributed_type).split(".")[-1] == {
        "one_gpu": "NO", "multi_gpu": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"
    }[path.stem]  # fmt: skip
    assert config.mixed_precision == "bf16"


def test_config_refuses_what_no_loss_reads(tmp_path):
    own = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    for name, value in {
        "f_divergence_type": "js_divergence", "f_alpha_divergence_coef": 0.7, "ld_alpha": 0.5, "label_smoothing": 0.1,
        "use_weighting": True, "discopop_tau": 0.1, "truncation_mode": "keep_end",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"`{name}` is .*, but .*Leave it out"):
            NCAConfig(**own, **{name: value})
    for name, value in [("alpha", 0), ("alpha", float("nan")), ("beta", -0.1), ("beta", float("inf"))]:
        with pytest.raises(ValueError, match=rf"`{name}` is .* must be a finite number above 0"):
            NCAConfig(**own, **{name: value})
    with pytest.raises(ValueError, match="`negative_weight` is -1"):
        NCAConfig(**own, negative_weight=-1)
    with pytest.raises(ValueError, match="`layout` is 'dense'"):
        NCAConfig(**own, layout="dense")
    with pytest.raises(ValueError, match="`tokens_per_forward` is 0"):
        NCAConfig(**own, tokens_per_forward=0)
    with pytest.raises(ValueError, match="`max_prompt_length` is 0"):
        NCAConfig(**own, max_prompt_length=0)
    with pytest.raises(ValueError, match="leaves no room for completions"):
        NCAConfig(**own, max_prompt_length=64, max_length=64)


def test_config_defaults(tmp_path):
    args = NCAConfig(str(tmp_path), bf16=False, use_cpu=True)
    assert (args.alpha, args.beta, args.loss_type, args.layout) == (0.01, 0.01, ["nca"], "auto")
    assert (args.max_length, args.max_prompt_length) == (1024, 512)
    assert NCAConfig(str(tmp_path), bf16=False, use_cpu=True, max_length=None).max_prompt_length is None
    assert NCAConfig(str(tmp_path), bf16=False, use_cpu=True, loss_type="InfoNCA").loss_type == ["infonca"]
