"""An adapter's weights added to its base's, and how far the result is from the adapter on real text."""

from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ...batching.tokenization import tokenize_rows
from ...data import read_reward_dataset
from ...errors import UserError, one_line
from ...models.loading import adapter_config, add_adapter
from ...models.vocabulary import embeddings, resize_as_saved

# Public-domain prose in three languages, a table of numbers, and code: a first sentence, and what follows it.
TEXTS = files(__package__).joinpath("merge_check_texts.txt").read_text(encoding="utf-8").strip().split("\n%\n")


class Difference(NamedTuple):
    """How far two models' log-probabilities of the same sequences are apart, nats per sequence."""

    mean: float
    largest: float


def merge(model: Any, adapter: str) -> Any:
    """`model`, just loaded, with the weights of the adapter added to its own, in float32; from 4 bits dequantised.

    Where the adapter changes one of tied embeddings alone, they are tied no longer.

    Args:
        model: the adapter's base, on which no forward has run.
        adapter: its folder.

    Raises:
        UserError: the adapter doesn't fit, or holds what is no number.
    """
    if getattr(model, "is_quantized", False):
        model = model.dequantize(dtype=torch.float32)
    model = model.float()
    resize_as_saved(model, adapter)  # while they are tied
    config = model.config.get_text_config()
    if config.tie_word_embeddings and _changes_embeddings(model, adapter):
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
        config.tie_word_embeddings = model.config.tie_word_embeddings = False
    try:
        return add_adapter(model, adapter).merge_and_unload(safe_merge=True).eval()
    except (ValueError, RuntimeError) as error:  # PEFT's, where there is nothing to add to
        if isinstance(error, UserError):
            raise
        reason = one_line(error)[:300]
        raise UserError(f"the adapter in {adapter} can't be merged ({reason}); use it unmerged") from error


def _changes_embeddings(model: Any, adapter: str) -> bool:
    """Whether the adapter has weights for the input or output embeddings, and leaves tying them to nobody."""
    from safetensors import safe_open

    config = adapter_config(adapter)
    if getattr(config, "ensure_weight_tying", False) or getattr(config, "trainable_token_indices", None):
        return False
    ends = list(embeddings(model))
    replaced = set(ends).intersection(getattr(config, "modules_to_save", None) or [])
    with safe_open(Path(adapter) / "adapter_model.safetensors", "pt") as file:
        keys = [key.split(".") for key in file.keys()]  # noqa: SIM118 (no mapping)
    # the base's own weights are there, too, where its run had added tokens
    base = [[end, *owner, "weight"] for end in ends for owner in ([], ["base_layer"], ["original_module"])]
    own = [key for key in keys if not any(key[-len(ending) :] == ending for ending in base)]
    return bool(replaced) or any(end in key for key in own for end in ends)


def merge_check_rows(tokenizer, dataset_name: str | None = None) -> list[dict[str, Any]]:
    """Tokenised rows to compare two models on: 16 of a data set, or the texts that come with this package.

    A text is one completion: what follows its first sentence, which is the prompt.
    """
    if dataset_name is not None:
        data = next(
            iter(read_reward_dataset(dataset_name, validation_fraction=0.0, min_completions=1).dataset.values())
        )
        batch = data.select(range(min(16, len(data))))[:]
    else:
        pairs = [text.split("\n", 1) for text in TEXTS]
        if tokenizer.chat_template is None:
            batch = {"prompt": [a + " " for a, _ in pairs], "completions": [[b] for _, b in pairs]}
        else:
            batch = {
                "prompt": [[{"role": "user", "content": a}] for a, _ in pairs],
                "completions": [[[{"role": "assistant", "content": b}]] for _, b in pairs],
            }
        batch["rewards"] = [[0.0]] * len(pairs)
    table = tokenize_rows(batch, list(range(len(batch["prompt"]))), tokenizer, 256, 512)
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def logp_difference(logps: list[list[float]], expected: list[list[float]]) -> Difference:
    """Mean and largest |Δ log-probability| over all sequences, nats."""
    pairs = zip((v for row in logps for v in row), (v for row in expected for v in row), strict=True)
    differences = torch.tensor([abs(a - b) for a, b in pairs], dtype=torch.float64)
    return Difference(float(differences.mean()), float(differences.max()))


class Export(NamedTuple):
    """What was measured against the adapter on its base: the merge in float32, and what was saved, read back."""

    merged: Difference
    saved: Difference
    sequences: int
    tokens: int
