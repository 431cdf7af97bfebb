"""The model card of a run and of what is exported from it: base model, losses, options, data and versions."""

import json
import os
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from ..losses import LABELS, labels_alone
from ..models.policy import base_model
from ..store.provenance import versions
from ..user_functions import short_name

# options of the run that the card shows, where the run kept them
_OPTIONS = (
    "loss_type", "loss_weights", "reward_weights", "scale_rewards", "multi_objective_aggregation", "on_missing",
    "alpha", "beta", "negative_weight", "completion_mean", "learning_rate",
    "lr_scheduler_type", "num_train_epochs", "max_steps", "global_batch_size", "max_length",
    "max_prompt_length", "seed",
)  # fmt: skip
_OF_LABELS = """ Its loss on labels is that of
[Free Process Rewards without Process Labels](https://arxiv.org/abs/2412.01981)."""
_CITATION_OF_LABELS = """

@article{yuan2024free,
  title     = {Free Process Rewards without Process Labels},
  author    = {Yuan, Lifan and Li, Wendi and Chen, Huayu and Cui, Ganqu and Ding, Ning and Zhang, Kaiyan and Zhou, Bowen and Liu, Zhiyuan and Peng, Hao},
  journal   = {arXiv preprint arXiv:2412.01981},
  year      = {2024}
}"""  # noqa: E501
_CHAT_PROMPT = 'prompt = [{"role": "user", "content": "What makes a good day?"}]'
_TEXT_PROMPT = 'prompt = "What makes a good day is"'


def model_card(
    name: str,
    base: str | None,
    record: dict[str, Any],
    chat: bool,
    library: str = "transformers",
    tags: Iterable[str] = (),
    dataset: str | None = None,
    data: str = "",
    merge: str = "",
) -> str:
    """The README.md of a model.

    Args:
        name: of its folder or repository, as `pipeline` takes it.
        base: the model that training began with; a name of the Hub, a folder, or None where it has none.
        record: of the run, see `run_identity`; empty where nothing is known of it.
        chat: whether its tokenizer has a chat template, so that messages can be given.
        library: that loads it.
        tags: beside the library's and the losses'.
        dataset: its name on the Hub.
        data: how many prompts and completions, as a sentence.
        merge: how an adapter was merged, as a paragraph.
    """
    losses = record.get("loss_type", [])
    if "nca" not in losses:  # whose second term it weighs
        record = {name: value for name, value in record.items() if name != "negative_weight"}
    every = dict.fromkeys(["nca-align", *map(short_name, losses), *tags])
    metadata: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": list(every)}
    if base and not Path(base).exists():  # an id of the Hub, and no place on this machine
        metadata["base_model"] = base
    if dataset and not Path(dataset).exists():
        metadata["datasets"] = [dataset]
    lines = [f"{key}: {json.dumps(value)}" for key, value in metadata.items()]
    options = [f"| `{key}` | {_plain(record[key])} |" for key in _OPTIONS if record.get(key) not in (None, False, -1)]
    table = "| option | value |\n| --- | --- |\n" + "\n".join(options) + "\n" if options else ""
    sections = [part for part in (data, table) if part]
    training = "\n## Training\n\n" + "\n\n".join(sections) if sections else ""
    template = files(__package__).joinpath("card_template.md").read_text(encoding="utf-8")
    return template.format(
        metadata="\n".join(["---", *lines, "---"]), title=Path(name).name, name=name, training=training, merge=merge,
        prompt=_CHAT_PROMPT if chat else _TEXT_PROMPT,
        base=f"`{Path(base).name}`" if base else "A language model",
        made=_made(losses) if record else "exported",
        loss=_OF_LABELS if LABELS & {*losses} else "", citation=_CITATION_OF_LABELS if LABELS & {*losses} else "",
        versions=", ".join(
            f"{package} {version}" for package, version in versions("trl", "transformers", "peft", "torch").items()
        ),
    )  # fmt: skip


def _made(losses: Iterable[str]) -> str:
    if labels_alone(losses):
        return "trained on right and wrong completions"
    return "trained on prompts with several rewarded completions each"


def write_model_card(
    trainer,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: Sequence[str] | str | None = None,
) -> None:
    """README.md in `output_dir`, by the main process: base model, losses, options, data, versions.

    Args:
        trainer: an `NCATrainer`.
        model_name, dataset_name: on the Hub, where they are there.
        tags: beside the trainer's own.
    """
    if not trainer.is_world_process_zero():
        return
    output = Path(trainer.args.output_dir)
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    card = model_card(
        trainer.hub_model_id or model_name or output.name,
        base_model(model).config.name_or_path or None,
        trainer._resume.run_identity(),
        chat=bool(getattr(tokenizer, "chat_template", None)),
        library="peft" if hasattr(model, "peft_config") else "transformers",
        tags=[*trainer._tag_names, *([tags] if isinstance(tags, str) else tags or ()), "trl", "generated_from_trainer"],
        dataset=dataset_name,
        data=_describe(trainer.train_dataset),
    )
    os.makedirs(output, exist_ok=True)
    (output / "README.md").write_text(card, encoding="utf-8")


def _describe(dataset: Any) -> str:
    if not isinstance(dataset, Dataset):
        return "A stream of prompts."
    rewards = dataset.select_columns("rewards").with_format("arrow")[:]["rewards"]  # no list of all rows, at each save
    least, most = pc.min_max(pc.list_value_length(rewards)).as_py().values()
    completions = f"{least}" if least == most else f"{least} to {most}"
    return f"{len(dataset)} prompts with {completions} completion{'s' if most > 1 else ''} each."


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {own}" for name, own in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
