"""docs/guide/scaling.md: its tables are the script's, and one of its figures is a measured peak."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402

PAGE = (ROOT / "docs" / "guide" / "scaling.md").read_text()


def test_weights_are_those_of_the_real_models():
    counts = {
        name: scaling.planner(name).model(scaling.setup(), scaling.torch.bfloat16).num_parameters()
        for name in scaling.MODELS
    }
    assert counts == {
        "7B": 7_241_732_096,  # Mistral 7B
        "8x7B": 46_702_792_704,  # Mixtral 8x7B
        "70B": 70_553_706_496,  # Llama 3 70B
    }


@pytest.mark.slow
@pytest.mark.parametrize("table", ["held_table", "batch_table", "machine_table"])
def test_the_page_has_the_tables_that_the_script_prints(table):
    lines = list(getattr(scaling, table)())
    assert len(lines) > 4
    assert "\n".join(lines) in PAGE


def test_the_example_is_the_recipes_model_and_adapter():
    recipe = yaml.safe_load((ROOT / "configs" / "nca_mistral7b.yaml").read_text())
    assert scaling.LORA.r == recipe["lora_r"]
    assert scaling.LORA.target_modules == set(recipe["lora_target_modules"])
    assert scaling.QLORA["optim"] == recipe["optim"]
    assert scaling.NF4.nested is recipe["use_bnb_nested_quant"]


def test_the_page_has_every_case_of_the_check():
    assert len(re.findall(r"^\| (?:wide|deep), ", PAGE, re.M)) == len(scaling.CASES)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
def test_a_measured_peak_is_what_was_computed(layout):
    case = ["wide", layout, 4, False]
    done = subprocess.run(
        [sys.executable, scaling.__file__, "--measure", json.dumps(case)],
        check=True, capture_output=True, text=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert 0.85 < int(done.stdout.splitlines()[-1]) / scaling.computed(*case) < 1.2
