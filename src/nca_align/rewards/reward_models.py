"""Scorers that are models with a classification head: reward models, and text classifiers."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..batching.rendering import conversation_text
from ..data.cleaning import clean_prompt, text_of
from ..errors import UserError
from .classifier_loading import find_model, refuse_token_rewards
from .sequence_classifiers import Inputs, SequenceClassifier

logger = logging.getLogger("nca_align")

# Scores of completions: (the row of each, completions) -> one float a completion, or None where it skips one.
Scorer = Callable[[Sequence[dict[str, Any]], Sequence[Any]], Sequence[float | None]]


def check_config(name: str, label: str | None, classifier: bool, trust_remote_code: bool = False) -> None:
    """Look at a scorer's configuration alone, where much is to be computed before the scorer is opened.

    Args:
        name, label, classifier, trust_remote_code: as of `model_scorer`.

    Raises:
        UserError: there is none, or it says that the model has other outputs.
    """
    source, own = find_model(name, trust_remote_code)
    config = source.load_config()
    classes = config.architectures or []
    if own:
        config.num_labels = own["num_labels"]
    elif any("ForTokenClassification" in found or "ProcessReward" in found for found in classes):
        refuse_token_rewards(name)
    elif not any("ForSequenceClassification" in found for found in classes):
        return  # opening it says why not
    scored_output(name, label, classifier, list(config.id2label.values()))


def scored_output(name: str, label: str | None, classifier: bool, labels: list[str]) -> int:
    """The place of the output that is the score among `labels`: the one called `label`, or the only one that there is.

    Raises:
        UserError: no such label, or none given where there are several.
    """
    if label is None and len(labels) > 1 and not classifier:
        raise UserError(
            f"`scorer` {name} has {len(labels)} outputs, but a reward model has one. Write pipeline:{name}:LABEL for a "
            f"classifier's probability of a label. Write reward:{name}:LABEL for one output of a reward model. LABEL "
            f"is one of {', '.join(labels)}."
        )
    if label not in labels and (label is not None or len(labels) > 1):
        kind = "pipeline" if classifier else "reward"
        raise UserError(
            f"`scorer` {kind}:{name} has the labels {', '.join(labels)}, and "
            f"{'none was given' if label is None else f'not {label!r}'}; write {kind}:{name}:LABEL"
        )
    return 0 if label is None else labels.index(label)


def model_scorer(
    name: str,
    label: str | None,
    classifier: bool,
    batch_size: int,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Scorer:
    """A sequence-classification model as a scorer.

    A reward model reads the conversation in its own chat template, and its only output, or the one called `label`, is
    the score. A classifier reads the completion's text, and the probability of `label` is the score.

    Args:
        name: a folder or a Hub id, of a model or an adapter.
        label: of an output; None where there is one alone.
        classifier: whether it is one, or else a reward model.
        batch_size: completions a batch; they are sorted by length.
        dtype: `auto` for bfloat16 on a GPU and float32 on a CPU, or the name of one.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: no classification head, other outputs; when it is called, messages and no chat template, or scores
            that aren't the model's own.
    """
    check_config(name, label, classifier, trust_remote_code)
    model = SequenceClassifier(name, batch_size, dtype, trust_remote_code)
    output = scored_output(name, label, classifier, model.labels)

    def run(rows: Sequence[dict[str, Any]], completions: Sequence[Any]) -> list[float]:
        if classifier:
            inputs = [model.inputs(text_of(completion), special=True) for completion in completions]
        else:
            inputs = [_conversation(model, row, completion) for row, completion in zip(rows, completions, strict=True)]
        if not inputs:
            return []
        _say_cut(model, inputs)
        logits = model.outputs([given for given, _ in inputs])
        return (_probabilities(logits, model.config) if classifier else logits)[:, output].tolist()

    return run


def _conversation(model: SequenceClassifier, row: dict[str, Any], completion: Any) -> tuple[Inputs, int]:
    prompt = clean_prompt(row)
    if isinstance(prompt.content, str):
        return model.inputs(prompt.content + text_of(completion), special=True)
    if model.tokenizer.chat_template is None:
        raise UserError(
            f"`scorer` {model.name} has no chat template, but the rows hold messages. Use a reward model that has one, "
            f"or pipeline:{model.name} to score the completion's text alone."
        )
    return model.inputs(conversation_text(model.tokenizer, prompt, completion), special=False)


def _say_cut(model: SequenceClassifier, inputs: list[tuple[Inputs, int]]) -> None:
    cut = [length for _, length in inputs if length > model.window]
    if cut:
        logger.warning(
            "scorer %s: %d of %d texts, of up to %d tokens, were cut to their last %d, its window.",
            model.name, len(cut), len(inputs), max(cut), model.window,
        )  # fmt: skip


def _probabilities(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """What transformers' text-classification pipeline makes of logits, (B, n)."""
    if config.problem_type == "regression":
        return logits
    if config.problem_type == "multi_label_classification" or logits.shape[1] == 1:
        return logits.sigmoid()
    return logits.softmax(-1)
