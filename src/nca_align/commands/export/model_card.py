"""The model card that `nca-align export` writes beside the weights."""

from pathlib import Path

from ...models.loading import run_record
from ...training import model_card as cards
from .merge import Export


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
    merge = ""
    if measured is not None:
        start = f"the base in {bits} bits, dequantised," if bits else "its base"
        merge = (
            f"\nThe adapter was merged into {start} in float32, {measured.merged.largest:.4f} nats per sequence at "
            f"most from the unmerged adapter on {measured.sequences} sequences of {measured.tokens} tokens in all, and "
            f"saved in {dtype} ({measured.saved.largest:.4f} nats).\n"
        )
    return cards.model_card(Path(output).name, base or record.get("model._name_or_path"), record, chat, merge=merge)
