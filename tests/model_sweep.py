"""What the trainer does with each model class of transformers, proved on a tiny random one.

`python tests/model_sweep.py` sweeps all of them and writes `docs/reference/models.md`. Names of classes or model types
sweep these alone, and write their rows. With `--window` they have sliding windows, and nothing is written.
"""

import copy
import logging
import math
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from datasets import Dataset
from transformers.models.auto import modeling_auto

from conftest import build_tokenizer
from nca_align import NCAConfig, NCATrainer
from nca_align.errors import UserError
from nca_align.models.logprobs import forward_chunk
from nca_align.models.routing import load_balancing_loss
from tiny_models import NotBuilt, build

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "models.md"
# Their routers draw noise in training mode, for which no two forwards are alike: their step is run in eval mode
NOISY = {"PhimoeForCausalLM"}
CPU = torch.device("cpu")


def classes() -> dict[str, list[str]]:
    """Each class that trains on text → its model types: causal language models, then multimodal ones."""
    found: dict[str, list[str]] = {}
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        for model_type, name in mapping.items():
            types = found.setdefault(name, [])
            types.extend({model_type} - set(types))
    return found


@dataclass(frozen=True)
class Row:
    """What is said of a class: `shared`, `padded`, `refused` or `not swept`, and why."""

    name: str
    layout: str
    reason: str = ""


class WrongNumber(AssertionError):
    """The trainer took a model, and its numbers are others than the model's own."""


def rows() -> list[dict[str, Any]]:
    """Two prompts of 3 and 2 completions, longer than every window, of unequal lengths."""
    generator = torch.Generator().manual_seed(0)

    def text(n: int) -> list[int]:
        return torch.randint(5, 380, (n,), generator=generator).tolist()

    return [
        {"prompt_ids": text(20), "completion_ids": [text(9), text(16), text(3)], "rewards": [0.0, 2.0, 1.0]},
        {"prompt_ids": text(17), "completion_ids": [text(5), text(12)], "rewards": [1.0, 0.0]},
    ]


def alone(model) -> torch.Tensor:
    """(2, 3) log-probabilities of each conversation by the model's own logits, nats."""
    logps = torch.zeros(2, 3, dtype=torch.float64)
    for b, row in enumerate(rows()):
        for k, completion in enumerate(row["completion_ids"]):
            ids = torch.tensor([row["prompt_ids"] + completion])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(row["prompt_ids"]) - 1 : -1]
            own = logits.double().log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()
            logps = logps.index_put((torch.tensor(b), torch.tensor(k)), own)
    return logps


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], where: str) -> None:
    """Each parameter's, relative to the norm of all."""
    zero = torch.zeros(())
    whole = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    if not whole > 0:
        raise WrongNumber(f"{where}: no gradients")
    names = expected.keys() | found.keys()
    off = {n: float((found.get(n, zero) - expected.get(n, zero)).norm()) / whole for n in names}
    worst = max(off, key=lambda n: off[n])
    if not off[worst] < 1e-3:
        raise WrongNumber(f"{where}: the gradient of {worst} is {off[worst]:.1e} off, relative to the norm of all")


def assert_balance(model, own, batch: dict) -> None:
    """A mixture's load-balancing loss over the padded batch is the one that its own forward computes, if it does."""
    (chunk,) = batch["chunks"]
    inputs = {name: chunk[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        use = forward_chunk(model, chunk, with_experts=True).expert_use
        if use is None:  # a dense one, of a family that has mixtures
            return
        expected = getattr(own(**inputs, output_router_logits=True, use_cache=False), "aux_loss", None)
        found = load_balancing_loss(use)
    if expected is not None and not abs(float(found) - float(expected)) < 1e-4 * float(expected):
        raise WrongNumber(f"the load-balancing loss is {float(found):.5g}, its own {float(expected):.5g}")


def make_trainer(model, folder: str) -> NCATrainer:
    args = NCAConfig(
        output_dir=folder, bf16=False, use_cpu=True, max_steps=1, report_to="none", disable_tqdm=True,
        save_strategy="no", per_device_train_batch_size=2, gradient_checkpointing=False, beta=0.1, alpha=0.5,
        max_length=None,
    )  # fmt: skip
    return NCATrainer(
        model, args=args, train_dataset=Dataset.from_list(rows()), processing_class=build_tokenizer()
    )  # fmt: skip


def assert_steps(trainer: NCATrainer, own) -> None:
    """One step in the layout that it has, and a padded one: log-probabilities and gradients of the model alone."""
    layout, logps = trainer.data_collator.layout, alone(own)
    own_gradients: dict = {}
    for where in dict.fromkeys([layout, "padded"]):
        trainer.data_collator.layout = where
        (batch,), counts = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, CPU)
        with torch.no_grad():
            found = trainer._batch_logps(trainer.model, batch, with_aux_loss=False)[0]
        off = float((found - logps)[batch["valid"]].abs().max())
        if not off < 2e-4 * max(1.0, float(logps.abs().max()) / 50):
            raise WrongNumber(f"{where}: log-probabilities are {off:.2g} nats off")
        trainer.aux_loss_enabled = False  # a mixture's is compared below
        trainer.training_step(trainer.model, batch, counts)
        if not own_gradients:
            reference = logps.detach().float()
            trainer._objective.loss_share(logps.float(), None, reference, batch, counts).backward()
            own_gradients = gradients(own)
        assert_gradients(gradients(trainer.model), own_gradients, where)
    if getattr(own.config.get_text_config(), "output_router_logits", None) is not None:
        assert_balance(trainer.model, own, batch)


def sweep(name: str, window: bool = False) -> Row:
    """One class: the trainer's choice, and one step of it in each layout that it allows, against the model alone.

    Args:
        name: of the class.
        window: with a sliding window also where the default config has it off.

    Raises:
        WrongNumber: it takes the model, and gives other numbers than the model alone.
    """
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        try:
            model = build(name, window)
        except NotBuilt as reason:
            return Row(name, "not swept", str(reason))
        own = copy.deepcopy(model)
        try:
            trainer = make_trainer(model, folder)
        except UserError as refusal:
            return Row(name, "refused", reason_of(name, str(refusal)))
        if name in NOISY:
            trainer.model.train = lambda mode=True: model
        layout, reason = trainer.data_collator.layout, trainer._checks._reason
        assert_steps(trainer, own)
    return Row(name, "shared") if layout == "prefix_shared" else Row(name, "padded", reason_of(name, reason))


def reason_of(name: str, message: str) -> str:
    """The reason in a message of the trainer, without the model's name, its figures and its advice."""
    text = message.removeprefix(f"`model` is a {name}, ").removeprefix(f"{name} ")
    text = re.sub(r" by [\d.e+-]+ nats| \(a .*?\)| \(a linear.*?\)|\.?(?=\); use)", "", text)
    text = re.split(r", which a packed row|, so that |; use another|\. (?=[A-Z])", text)[0]
    return text.removeprefix("which ")


def page(found: dict[str, Row]) -> str:
    counts = {kind: sum(row.layout == kind for row in found.values()) for kind in MEANING}
    lines = [
        "# Models",
        "",
        "Look up whether a model trains here, and which layout `layout: auto` gives it. The table has each class of "
        f"transformers {transformers.__version__} that trains on text. This prints the class of a model:",
        "",
        "```bash",
        'python -c "from transformers import AutoConfig; '
        """print(AutoConfig.from_pretrained('your/model').architectures)\"""",
        "```",
        "",
        "| layout | classes | meaning |",
        "| --- | --- | --- |",
        *(f"| {kind} | {counts[kind]} | {meaning} |" for kind, meaning in MEANING.items()),
        "",
        "Each model is [checked before the first step](../guide/memory.md#what-is-checked-before-the-first-step), also "
        "one that is not here.",
        "",
        "`python tests/model_sweep.py` writes this page. It builds each class small, with random weights, and trains "
        "it for one step. The unpatched model runs each conversation alone. Its log-probabilities and gradients must "
        "be the same. `make long` compares the page with what the trainer does.",
        "",
        "| class | model types | layout | why |",
        "| --- | --- | --- | --- |",
    ]
    for name, types in sorted(classes().items(), key=lambda item: item[0].lower()):
        row = found[name]
        lines.append(f"| {name} | {', '.join(types)} | {row.layout} | {row.reason.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


MEANING = {
    "shared": "Each token that conversations share is run once. Padded gives the same numbers.",
    "padded": "A row for each conversation, for the reason that is given.",
    "refused": "The trainer stops before the first step, with the reason.",
    "not swept": "No tiny one could be built, for the reason that is given.",
}


def rows_of_page() -> dict[str, Row]:
    found = re.findall(r"^\| (\w+) \| ([^|]+) \| ([a-z ]+) \| (.*) \|$", PAGE.read_text(), re.M)
    return {name: Row(name, layout, reason.strip()) for name, _, layout, reason in found if name != "class"}


def main(names: list[str]) -> None:
    logging.getLogger("nca_align").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    window = "--window" in names
    found, failed = {}, []
    for name, types in classes().items():
        if set(names) - {"--window"} and not {name, *types} & set(names):
            continue
        start = time.perf_counter()
        try:
            row = found[name] = sweep(name, window)
        except Exception:  # what this is there to find; the others are still wanted
            failed.append(name)
            traceback.print_exc()
            row = Row(name, "FAILED")
        print(f"{row.layout:10} {name} [{time.perf_counter() - start:.1f} s] {row.reason}", flush=True)
    if failed:
        sys.exit(f"{len(failed)} failed: {', '.join(failed)}")
    if not window:
        PAGE.write_text(page((rows_of_page() if names else {}) | found))


if __name__ == "__main__":
    main(sys.argv[1:])
