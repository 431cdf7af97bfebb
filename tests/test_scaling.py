"""The memory arithmetic of docs/scaling.md: its counts, its tables, and one of its figures against a measured peak."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402


def test_weights_are_those_of_the_real_models():
    assert scaling.SHAPES["7B"].weights == 7_241_732_096  # Mistral 7B
    assert scaling.SHAPES["70B"].weights == 70_553_706_496  # Llama 3 70B
    routers = 32 * 4096 * 8
    assert scaling.SHAPES["8x7B"].weights + routers == 46_702_792_704  # Mixtral 8x7B


def test_weights_and_adapters_are_those_of_a_model_that_is_built():
    from peft import LoraConfig, get_peft_model

    shape = scaling.Shape(layers=3, hidden=64, mlp=96, kv=32, vocabulary=200)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2,
        )
    )  # fmt: skip
    assert shape.weights == model.num_parameters()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    assert shape.adapter(4) == adapted.get_nb_trainable_parameters()[0]


def test_the_page_has_the_tables_that_the_script_prints(capsys):
    scaling.tables()
    page = (ROOT / "docs" / "scaling.md").read_text()
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(printed) == 13
    assert [line for line in printed if line not in page] == []


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_prompts_and_fewer_completions_at_a_time_take_less(checkpointing):
    shape = scaling.SHAPES["7B"]

    def held(layout, **own):
        return scaling.activations(shape, layout, 8, checkpointing=checkpointing, **own)

    assert held("prefix_shared") < held("padded")
    assert held("padded", per_forward=2) < held("padded")
    assert held("padded", per_forward=8) == held("padded")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
def test_a_measured_peak_is_what_was_computed(layout):
    case = ["wide", layout, 4, False]
    done = subprocess.run(
        [sys.executable, scaling.__file__, "--measure", scaling.json.dumps(case)],
        check=True, capture_output=True, text=True, env=scaling.os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    expected = scaling.activations(
        scaling.SMALL["wide"], layout, 4, 256, 256, checkpointing=False, size=4, budget=4 << 30
    )
    assert 0.85 < int(done.stdout) / expected < 1.2
