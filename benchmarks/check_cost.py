"""What the checks before the first step take, in training steps: both by turns in one process, medians of three rounds.

Beside other work the seconds mean little, and their ratio is still one.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # not necessarily installed
from nca_align import NCAConfig, NCATrainer
from shapes import Example, build_model
from steps import build_tokenizer

ROUNDS = 3
# Prompts of a step, tokens of each, and those of each one's completions
EXAMPLES = {"8 prompts with K = 4": (8, 80, (40, 60, 80, 100)), "4 pairs": (4, 80, (60, 90))}


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(prompts: int, prompt: int, completions: tuple[int, ...], model_name: str = "mistral-60m") -> list[float]:
    """Median seconds of both checks, and of a training step with a live reference, without the optimizer's update."""
    model = build_model(model_name, seed=0)
    rows = Example((prompt,) * prompts, (completions,) * prompts).rows(model.config.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        args = NCAConfig(
            folder, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, gradient_checkpointing=False
        )
        trainer = NCATrainer(
            model, args=args, train_dataset=Dataset.from_list(rows), processing_class=build_tokenizer()
        )

        def check() -> None:
            trainer._checks._model_checked = trainer._checks._reference_checked = False
            trainer._checks.check_model(trainer.model, gradients=True)
            trainer._checks.check_reference(trainer.model)

        def step() -> None:
            batches, counts = trainer.get_batch_samples(
                iter([trainer.data_collator(list(trainer.train_dataset))]), 1, trainer.accelerator.device
            )
            trainer.training_step(trainer.model, batches[0], counts)
            trainer.model.zero_grad()

        check()  # a warm-up
        step()
        rounds = [(seconds(check), seconds(step)) for _ in range(ROUNDS)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def main() -> None:
    for name, example in EXAMPLES.items():
        checks, step = measure(*example)
        print(f"{name}: checks {checks:.1f} s, a step {step:.1f} s, {checks / step:.2f} of a step", flush=True)


if __name__ == "__main__":
    main()
