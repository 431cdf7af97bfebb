"""Trains what one process and two must train alike, in every process of one launch; for test_two_processes.py.

    torchrun --nproc_per_node 2 tests/launched_options.py MODEL OUTPUT CASE …

A stream of shards is read in another order by two processes: of it the rows that counted and the evaluation are kept.
"""

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PromptEncoderConfig
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_models
from conftest import labelled_rows, require_changed, reward_rows
from nca_align import NCAConfig, NCATrainer
from nca_align.processes import leave_launch

LORA = {"r": 4, "target_modules": "all-linear"}
ROWS = reward_rows(9, [4, 2, 3])
# Each another than its default
DDP = {
    "ddp_find_unused_parameters": False, "ddp_bucket_cap_mb": 7, "ddp_broadcast_buffers": False,
    "ddp_static_graph": True, "ddp_backend": "gloo",
}  # fmt: skip


def shards(*sizes: int, seed: int) -> IterableDataset:
    """A stream of as many shards as `sizes`, which hold so many rows."""
    rows = iter(reward_rows(sum(sizes), 3, seed=seed))
    parts = [[next(rows) for _ in range(size)] for size in sizes]
    return IterableDataset.from_generator(
        lambda parts: (row for part in parts for row in part), gen_kwargs={"parts": parts}
    )


def masked(rows: list[dict], seed: int) -> Dataset:
    """Token ids with masks, and the rewards of `rows`; each completion has a token that the model wrote."""
    rng = random.Random(seed)
    found = []
    for row in rows:
        completions = [[rng.randrange(4, 384) for _ in range(rng.randint(2, 20))] for _ in row["rewards"]]
        masks = [[1, *(rng.randint(0, 1) for _ in own[1:])] for own in completions]
        prompt = [rng.randrange(4, 384) for _ in range(rng.randint(1, 20))]
        ids = {"prompt_ids": prompt, "completion_ids": completions, "completion_mask": masks}
        found.append(ids | {"rewards": row["rewards"]})
    return Dataset.from_list(found)


def case(name: str, model: str) -> tuple[Any, Any, dict[str, Any]]:
    """The training and evaluation rows, and what else the trainer is given."""
    train, held_out = Dataset.from_list(ROWS), Dataset.from_list(reward_rows(5, [2, 4], seed=2))
    if name == "modules_to_save":
        return train, held_out, {"peft_config": LoraConfig(**LORA, modules_to_save=["lm_head"])}
    if name == "dora":
        return train, held_out, {"peft_config": LoraConfig(**LORA, use_dora=True)}
    if name == "ddp":
        if "WORLD_SIZE" not in os.environ:  # no DDP, so nothing that could be said of it
            return train, held_out, {"options": {"gradient_accumulation_steps": 2}}
        return train, held_out, {"options": DDP | {"gradient_accumulation_steps": 1}}
    if name == "pissa":
        return train, held_out, {"peft_config": LoraConfig(**LORA, init_lora_weights="pissa_niter_4")}
    if name == "p_tuning":
        return train, held_out, {"peft_config": PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
    if name == "reference":
        reference = AutoModelForCausalLM.from_pretrained(model)
        with torch.no_grad():
            reference.lm_head.weight.mul_(1.1)
        return train, held_out, {"ref_model": reference}
    if name == "masks":
        options = {"loss_type": ["infonca", "sft"], "precompute_ref_log_probs": True, "tokens_per_forward": 40}
        return masked(ROWS, 0), masked(reward_rows(5, [2, 4], seed=2), 1), {"options": options}
    if name == "hybrid":
        return (
            train,
            held_out,
            {"model": tiny_models.build("Lfm2ForCausalLM"), "options": {"tokens_per_forward": 40}},
        )
    if name == "hybrid lora":
        given = {"model": tiny_models.build("Lfm2ForCausalLM"), "peft_config": LoraConfig(**LORA)}
        return train, held_out, given | {"options": {"loss_type": "infonca", "precompute_ref_log_probs": True}}
    if name == "stream":
        return train.to_iterable_dataset(), held_out.to_iterable_dataset(), {}
    if name.startswith("outcome"):
        train, held_out = (Dataset.from_list(labelled_rows(n, [1, 3, 1, 2], seed=n)) for n in (9, 5))
        if name == "outcome stream":
            train, held_out = train.to_iterable_dataset(), held_out.to_iterable_dataset()
        return train, held_out, {"options": {"loss_type": "outcome", "alpha": None, "completion_mean": True}}
    assert name == "shards"
    return shards(11, 7, seed=3), shards(3, 2, seed=4), {}


def ddp_options(trainer: NCATrainer) -> dict[str, Any]:
    """What DDP itself was made with, by the names of the options; nothing of one process."""
    ddp: Any = trainer.model_wrapped
    if not isinstance(ddp, DistributedDataParallel):
        return {}
    return {
        "ddp_find_unused_parameters": ddp.find_unused_parameters, "ddp_bucket_cap_mb": ddp.bucket_bytes_cap >> 20,
        "ddp_broadcast_buffers": ddp.broadcast_buffers, "ddp_static_graph": ddp.static_graph,
        "ddp_backend": torch.distributed.get_backend(ddp.process_group),
    }  # fmt: skip


def main(model: str, output: str, *names: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", 1))  # accelerate's state is what the config's `use_cpu` makes it
    for name in names:
        train, held_out, given = case(name, model)
        options = given.pop("options", {})
        torch.manual_seed(0)
        trainer = NCATrainer(
            model=given.pop("model", model),
            args=NCAConfig(
                f"{output}/{name}", bf16=False, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
                logging_steps=1, beta=0.1, max_length=128, max_steps=6, gradient_checkpointing=False,
                # 9 rows in steps of four: the last step of a pass has one row, and one process none
                **{"gradient_accumulation_steps": 4 // processes, "alpha": 0.5} | options,
                per_device_train_batch_size=1, per_device_eval_batch_size=2, optim="sgd", learning_rate=0.02,
                lr_scheduler_type="constant", max_grad_norm=1e6,
            ),
            train_dataset=train, eval_dataset=held_out, processing_class=AutoTokenizer.from_pretrained(model), **given,
        )  # fmt: skip
        if name.startswith("hybrid"):  # a prompt's pieces, of which the two processes have unequal numbers
            pieces = [len(trainer.data_collator([row])["chunks"]) for row in trainer.train_dataset]
            assert trainer.data_collator.layout == "prefix_shared"
            assert min(pieces) > 1
            assert name == "hybrid lora" or len(set(pieces)) > 1
        if name == "ddp" and processes > 1:
            require_changed(
                trainer.args, "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
                "ddp_static_graph", "ddp_backend",
            )  # fmt: skip
        counted: list[list[float]] = []
        own = trainer.get_batch_samples

        def note(*args, own=own, counted=counted):
            batches, counts = own(*args)
            for batch in batches:
                rows = zip(batch["rewards"].tolist(), batch["weights"].tolist(), strict=True)
                counted += [row for row, weight in rows if weight]
            return batches, counts

        trainer.get_batch_samples = note
        before = trainer.evaluate()
        trainer.train()
        evaluation = trainer.evaluate()
        rows = gather_object(counted)
        trainer.save_model(f"{output}/{name}/model")
        if PartialState().is_main_process:
            folder = Path(output, name)
            folder.mkdir(parents=True, exist_ok=True)
            weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
            save_file(weights, folder / "weights.safetensors")
            log = [line for line in trainer.state.log_history if "loss" in line]
            about = {"processes": PartialState().num_processes, "log": log, "rows": sorted(rows)}
            about |= {"before": before, "evaluation": evaluation, "ddp": ddp_options(trainer)}
            (folder / "result.json").write_text(json.dumps(about))
    if processes > 1:
        leave_launch()


if __name__ == "__main__":
    main(*sys.argv[1:])
