"""`nca-align train` and `scripts/train.py`: options → data → NCATrainer → a run folder, and in words what moved."""

import json
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import disable_progress_bars
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from .arguments import parse
from .config import NCAConfig
from .curves import plot_curves, summary
from .data import DataOptions, RewardData, read_reward_dataset, select_split
from .errors import UserError, command, one_line
from .smollm2 import resolve_model

logger = logging.getLogger("nca_align")


@dataclass
class RunOptions:
    """What `train` does beside training."""

    show_answers: int = field(
        default=0,
        metadata={"help": "Held-out prompts answered before and after training (greedily), and shown at the end."},
    )
    cpu_threads: int | None = field(
        default=None,
        metadata={"help": "Threads of a run on the CPU, 0 for one a core; `accelerate launch` leaves it a single one."},
    )
    answer_tokens: int = field(default=64, metadata={"help": "Most tokens of such an answer."})


@command("train")
def main(argv: list[str] | None = None) -> int:
    """Train as the options say; 0, or 2 after a user's mistake, told in one sentence."""
    script, data_options, run, args, model_args = parse(
        (ScriptArguments, DataOptions, RunOptions, NCAConfig, ModelConfig),
        argv,
        "train",
        "Align a language model on K rewarded completions per prompt.",
    )
    if args.process_index == 0:
        logging.basicConfig(format="%(message)s", stream=sys.stdout)
        logger.setLevel(logging.INFO)
    else:
        disable_progress_bars()
    if run.cpu_threads is not None:
        torch.set_num_threads(run.cpu_threads or os.cpu_count() or 1)
    _require(script.dataset_name, "dataset_name", "a Hub id, a file or a folder with rewarded completions")
    _require(model_args.model_name_or_path, "model_name_or_path", "a Hub id or a folder with a language model")
    checkpoint = _checkpoint(args)
    model = resolve_model(model_args.model_name_or_path)
    tokenizer = _tokenizer(model, model_args.model_revision, args.trust_remote_code)
    with args.main_process_first(desc="reading the data"):
        data = read_reward_dataset(
            script.dataset_name,
            name=script.dataset_config,
            streaming=script.dataset_streaming,
            num_proc=args.dataset_num_proc,
            options=data_options,
        )
    evaluates = args.eval_strategy != "no" or args.eval_on_start
    train_dataset = select_split(data.dataset, script.dataset_train_split)
    eval_dataset = select_split(data.dataset, script.dataset_test_split) if evaluates else None

    from .trainer import NCATrainer  # late: what can be wrong above is said before seconds of imports

    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    model, peft_config, quantization_config = _policy(model, model_args, args)
    trainer = NCATrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        quantization_config=quantization_config,
        peft_config=peft_config,
    )
    prompts = [row["prompt"] for row in eval_dataset.take(run.show_answers)] if eval_dataset is not None else []
    before = _answers(trainer, tokenizer, prompts, run.answer_tokens)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    _save(trainer, result.metrics, data)
    after = _answers(trainer, tokenizer, prompts, run.answer_tokens)
    if trainer.is_world_process_zero():
        print(summary(trainer.state.log_history, list(zip(prompts, before, after, strict=True))))
        where = [f"The {'adapter' if hasattr(trainer.model, 'peft_config') else 'model'} is in {args.output_dir}"]
        if (figure := plot_curves(trainer.state.log_history, Path(args.output_dir) / "curves.png")) is not None:
            where.append(f"the plot is {figure}")
        print(f"{', '.join(where)}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    trainer.accelerator.wait_for_everyone()  # a process that leaves first makes gloo hang in the other's clean-up
    trainer.end()
    return 0


def _require(value: Any, name: str, what: str) -> None:
    if not value:
        raise UserError(f"`{name}` is missing; give {what}, in the YAML file or as --{name}")


def _checkpoint(args: NCAConfig) -> str | None:
    """The checkpoint to go on from, if any; an error where the output folder holds another run's."""
    wanted = args.resume_from_checkpoint
    # `trainer_state.json` is written last: a folder without it is what a kill left of a save
    folders = Path(args.output_dir).glob("checkpoint-*")
    whole = [folder for folder in folders if (folder / "trainer_state.json").exists()]
    last = max(whole, key=lambda folder: int(folder.name.split("-")[1]), default=None)
    if wanted is None or str(wanted).lower() in ("false", "no", ""):
        if last is not None:
            raise UserError(
                f"`output_dir` {args.output_dir} holds checkpoints of an earlier run ({last.name}); set "
                "`resume_from_checkpoint: true` to go on from it, or choose another folder"
            )
        return None
    if str(wanted).lower() in ("true", "yes"):
        if last is None and args.process_index == 0:
            logger.warning(
                "`resume_from_checkpoint` is true, but %s holds no checkpoint: starting anew.", args.output_dir
            )
        return None if last is None else str(last)
    if not Path(wanted).is_dir():
        raise UserError(f"`resume_from_checkpoint` is {wanted}, which is no folder; give a checkpoint, or `true`")
    return wanted


def _tokenizer(model: str, revision: str | None, trust_remote_code: bool):
    """The model's tokenizer, which also shows, before anything is loaded, whether the model can be had."""
    try:
        if not _is_adapter(model):
            AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if Path(model).exists():
            raise UserError(f"`model_name_or_path` {model} can't be read as a model: {one_line(error)}") from error
        raise UserError(
            f"model {model} could not be had: it is no folder here, and the Hub did not give it (no network, no such "
            "model, or no permission); `model_name_or_path` takes a local path"
        ) from error


def _is_adapter(model: str) -> bool:
    return (Path(model) / "adapter_config.json").exists()


def _policy(model: str, model_args: ModelConfig, args: NCAConfig):
    """`model`, `peft_config` and `quantization_config` for the trainer; an adapter is trained on from where it is."""
    quantization_config = get_quantization_config(model_args)
    if not _is_adapter(model):
        return model, _peft_config(model_args), quantization_config
    from peft import PeftConfig, PeftModel

    base = resolve_model(PeftConfig.from_pretrained(model).base_model_name_or_path)
    options = {k: v for k, v in args.model_init_kwargs.items() if k != "revision"}
    args.model_init_kwargs = None  # the trainer is given an instance
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **options), model, is_trainable=True)
    return policy, None, None


def _peft_config(model_args: ModelConfig):
    config = get_peft_config(model_args)
    modules = getattr(config, "target_modules", None)
    if isinstance(modules, str) and modules.isidentifier():  # TRL makes a list of one a pattern for whole names
        config.target_modules = {modules}
    return config


def _answers(trainer, tokenizer, prompts: list, max_new_tokens: int) -> list[str]:
    """Greedy answers of the model as it stands."""
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return ["(not generated under a sharded launch)"] * len(prompts)
    model = trainer.accelerator.unwrap_model(trainer.model)
    was_training = model.training
    model.eval()
    answers = []
    for prompt in prompts:
        if isinstance(prompt, str):
            inputs = tokenizer(prompt, return_tensors="pt")
        else:
            inputs = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        inputs = inputs.to(trainer.accelerator.device)
        with trainer.accelerator.autocast():
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
        answers.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    model.train(was_training)
    return answers


def _save(trainer, metrics: dict[str, float], data: RewardData) -> None:
    """Weights, model card, `trainer_state.json`, metrics as JSON, and which rows were held out."""
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", metrics)
    if trainer.eval_dataset is not None:
        last = next((line for line in reversed(trainer.state.log_history) if "eval_loss" in line), None)
        if last is not None:
            trainer.save_metrics("eval", last)
    if trainer.is_world_process_zero():
        trainer.create_model_card()
        if data.validation_indices is not None:
            path = Path(trainer.args.output_dir) / "validation_indices.json"
            path.write_text(json.dumps(data.validation_indices))


if __name__ == "__main__":
    transformers.logging.set_verbosity_warning()
    sys.exit(main())
