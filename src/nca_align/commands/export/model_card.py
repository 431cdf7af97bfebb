"""The model card that `nca-align export` writes beside the weights."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...models.loading import run_record
from ...store.provenance import versions
from ...user_functions import short_name
from .merge import Export

# options of the run that the card shows, where the run kept them
_CARD_OPTIONS = (
    "loss_type", "alpha", "beta", "learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps",
    "global_batch_size", "max_length", "max_prompt_length", "seed",
)  # fmt: skip
_CHAT_PROMPT = 'prompt = [{"role": "user", "content": "What makes a good day?"}]'
_TEXT_PROMPT = 'prompt = "What makes a good day is"'


def model_card(
    output: str,
    source: str,
    base: str | None,
    chat: bool,
    bits: int | None = None,
    dtype: str | None = None,
    measured: Export | None = None,
) -> str:
    """The README.md of an exported model.

    Args:
        output: the folder that it is for.
        source: the run's folder.
        base: the model that an adapter was merged into; None for a whole model.
        chat: whether its tokenizer has a chat template, so that messages can be given.
        bits: of the base that the adapter was trained on, if quantised.
        dtype: of the merged weights.
        measured: the merge against the adapter.
    """
    record = run_record(source)
    base_name = base or record.get("model._name_or_path")
    tags = ["nca-align", *map(short_name, record.get("loss_type", []))]
    metadata = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if base_name and not Path(base_name).exists():  # an id of the Hub, and no place on this machine
        metadata["base_model"] = base_name
    lines = [f"{key}: {json.dumps(value)}" for key, value in metadata.items()]
    options = [f"| `{key}` | {_plain(record[key])} |" for key in _CARD_OPTIONS if record.get(key) not in (None, -1)]
    training = "\n## Training\n\n| option | value |\n| --- | --- |\n" + "\n".join(options) + "\n" if options else ""
    merge = ""
    if measured is not None:
        start = f"the base in {bits} bits, dequantised," if bits else "its base"
        merge = (
            f"\nThe adapter was merged into {start} in float32, {measured.merged.largest:.4f} nats a sequence at most "
            f"from the unmerged adapter on {measured.sequences} sequences of {measured.tokens} tokens in all, and "
            f"saved in {dtype} ({measured.saved.largest:.4f} nats).\n"
        )
    made_with = versions("trl", "transformers", "peft", "torch")
    template = files(__package__).joinpath("card_template.md").read_text(encoding="utf-8")
    return template.format(
        metadata="\n".join(["---", *lines, "---"]), name=Path(output).name, training=training, merge=merge,
        prompt=_CHAT_PROMPT if chat else _TEXT_PROMPT,
        base=f"`{Path(base_name).name}`" if base_name else "A language model",
        made="trained on prompts with several rewarded completions each" if record else "exported",
        versions=", ".join(f"{package} {version}" for package, version in made_with.items()),
    )  # fmt: skip


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
