"""What the checks before the first step cost: less than two training steps, counted in tokens that layers run over."""

import peft
import pytest
from datasets import Dataset

from conftest import build_model, build_tokenizer
from nca_align import NCAConfig, NCATrainer
from nca_align.training.startup_checks import StartupChecks
from test_startup_checks import tokens

LORA = peft.LoraConfig(r=4, target_modules="all-linear")


@pytest.fixture
def work(monkeypatch):
    """Tokens times passes of a model's last layer, of the checks and of all else; a backward counts twice."""
    counted, phase = {"checks": 0, "steps": 0}, ["steps"]

    def within(own):
        def check(*args, **kwargs):
            phase.append("checks")
            try:
                return own(*args, **kwargs)
            finally:
                phase.pop()

        return check

    for name in ("check_model", "check_reference"):
        monkeypatch.setattr(StartupChecks, name, within(getattr(StartupChecks, name)))

    def of(passes: int):
        def count(module, given, output) -> None:
            states = output[0] if isinstance(output, tuple) else output
            counted[phase[-1]] += passes * states.shape[0] * states.shape[1]

        return count

    def watch(model):
        layer = model.model.layers[-1]
        layer.register_forward_hook(of(1))
        layer.register_full_backward_hook(of(2))
        return model

    return counted, watch


def rows(prompt: int, completion: int, k: int) -> list[dict]:
    """Of one length, and no two alike."""
    return [
        {
            "prompt_ids": tokens(prompt, seed=b),
            "completion_ids": [tokens(completion, seed=100 + 10 * b + i) for i in range(k)],
            "rewards": [float(i) for i in range(k)],
        }
        for b in range(8)
    ]


@pytest.mark.parametrize(
    ("prompt", "completion", "k", "layout", "how"),
    [
        (300, 200, 2, "prefix_shared", "full"), (64, 2, 2, "prefix_shared", "full"),
        # where they cost most: their rows are cut hardly, and their conversations share nothing
        (64, 2, 3, "prefix_shared", "full"), (64, 2, 3, "prefix_shared", "lora"), (64, 2, 3, "prefix_shared", "cached"),
        (64, 2, 3, "padded", "full"),
    ],
)  # fmt: skip
def test_both_cost_less_than_two_steps(prompt, completion, k, layout, how, work, tmp_path):
    """Of a batch as TRL's default has it, and without the default's recomputation, which makes a step dearer."""
    counted, watch = work
    args = NCAConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no", max_steps=1,
        layout=layout, gradient_checkpointing=False, precompute_ref_log_probs=how == "cached",
    )  # fmt: skip
    assert args.startup_checks
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 1)
    tokenizer = build_tokenizer()
    nca = NCATrainer(
        watch(build_model(tokenizer)), args=args, train_dataset=Dataset.from_list(rows(prompt, completion, k)),
        processing_class=tokenizer, peft_config=LORA if how == "lora" else None,
    )  # fmt: skip
    counted["steps"] = 0  # what computed the cached reference is no part of a step
    nca.train()
    passes = 3 if how == "cached" else 4  # forward, backward and the reference
    batch = 8 * (prompt + k * completion if layout == "prefix_shared" else k * (prompt + completion))
    assert counted["steps"] == pytest.approx(passes * batch, rel=0.1)  # some last tokens predict nothing
    print(f"{counted['checks'] / counted['steps']:.2f} of a step")
    assert 0.1 * counted["steps"] < counted["checks"] < 2 * counted["steps"]
