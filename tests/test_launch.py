"""The same training whatever the launch: one process against two under torchrun, with everything that may interfere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import reward_rows

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SHARED = {
    "bf16": "false", "use_cpu": "true", "logging_steps": 1, "learning_rate": "2e-3", "save_strategy": "no",
    "report_to": "none", "gradient_checkpointing": "false", "max_length": 128, "beta": 0.1, "alpha": 0.5,
    "num_train_epochs": 1, "eval_strategy": "epoch", "validation_fraction": 0.22, "disable_tqdm": "true",
    "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "lr_scheduler_type": "constant",
}  # fmt: skip
RUNS = {
    "full, live reference": {"loss_type": "infonca", "layout": "padded"},
    "full, chunks, cached reference": {"precompute_ref_log_probs": "true", "completions_per_forward": 3},
    "LoRA, listwise chunks": {
        "loss_type": "plackett_luce", "completions_per_forward": 3, "use_peft": "true", "lora_r": 4,
        "lora_target_modules": "all-linear",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, reward_rows(24, [4, 2, 3, 5]))))
    return str(path)


def train(output: Path, processes: int, **options) -> tuple[list[dict], dict[str, torch.Tensor]]:
    arguments = [part for name, value in (SHARED | options).items() for part in (f"--{name}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    run = subprocess.run(
        [*launcher, "scripts/train.py", "--output_dir", str(output), *arguments],
        cwd=ROOT, env=ENVIRONMENT | {"HF_DATASETS_CACHE": str(output / "cache")},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("What moved") == 1, "each process told its own story"
    state = json.loads((output / "trainer_state.json").read_text())
    return state["log_history"], load_file(next(output.glob("*model.safetensors")))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_like_one(name, rows_file, model_dir, tmp_path):
    """19 rows in global batches of 8, and 5 to evaluate: neither last batch divides, and K is ragged."""
    options = {"model_name_or_path": model_dir, "dataset_name": rows_file} | RUNS[name]
    logs = {}
    weights = {}
    for processes, accumulation in [(1, 4), (2, 2)]:
        own = options | {"gradient_accumulation_steps": accumulation}
        logs[processes], weights[processes] = train(tmp_path / str(processes), processes, **own)
    assert len(json.loads((tmp_path / "2" / "validation_indices.json").read_text())) == 5
    for one, two in zip(logs[1], logs[2], strict=True):
        names = [key for key in one if "runtime" not in key and "per_second" not in key]
        for key in set(names) - {"total_flos", "num_tokens", "grad_norm", "epoch"}:
            # log-ratios are differences of sums of about 100 nats in fp32
            tolerance = 1e-5 if "loss" in key else 1e-4
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=tolerance), key
    losses = [line["loss"] for line in logs[1] if "loss" in line]
    assert len(losses) == 3
    assert len(set(losses)) == 3
    assert any("eval_loss" in line for line in logs[1])
    for key, value in weights[1].items():
        torch.testing.assert_close(weights[2][key], value, rtol=1e-4, atol=1e-5)
