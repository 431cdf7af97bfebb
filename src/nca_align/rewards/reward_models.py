"""Scorers that are models with a classification head: reward models, and text classifiers."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, pipeline

from ..batching.rendering import adds_special_tokens, conversation_text
from ..data.cleaning import clean_prompt, text_of
from ..errors import UserError
from ..models.loading import ModelSource, default_device, is_adapter, silence_transformers, torch_dtype

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
    if is_adapter(name):  # its base says what it is
        return
    config = ModelSource(name, "scorer", trust_remote_code=trust_remote_code).load_config()
    if any("ForSequenceClassification" in own for own in config.architectures or []):  # else opening it says why not
        scored_label(name, label, classifier, config)


def scored_label(name: str, label: str | None, classifier: bool, config: Any) -> str:
    """The label of the output that is the score: `label`, or the only one that there is.

    Raises:
        UserError: no such label, none given where there are several, or a reward model with several.
    """
    labels = list(config.id2label.values())
    if not classifier and len(labels) != 1:
        raise UserError(
            f"`scorer` {name} has {len(labels)} outputs, where a reward model has one; for a classifier write "
            f"pipeline:{name}:LABEL with one of {', '.join(labels)}"
        )
    if classifier and label not in labels and (label is not None or len(labels) > 1):
        raise UserError(
            f"`scorer` pipeline:{name} has the labels {', '.join(labels)}, and "
            f"{'none was given' if label is None else f'not {label!r}'}; write pipeline:{name}:LABEL"
        )
    return label or labels[0]


def model_scorer(
    name: str,
    label: str | None,
    classifier: bool,
    batch_size: int,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Scorer:
    """A sequence-classification model as a scorer.

    A reward model reads the conversation in its own chat template, and its only output is the score. A classifier reads
    the completion's text, and the probability of `label` is the score.

    Args:
        name: a folder or a Hub id.
        label: of a classifier; None where it has one alone.
        classifier: whether it is one, or else a reward model.
        batch_size: completions a batch; they are sorted by length.
        dtype: `auto` for bfloat16 on a GPU and float32 on a CPU, or the name of one.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: no classification head, other outputs; when it is called, messages and no chat template.
    """
    silence_transformers()
    source = ModelSource(name, "scorer", trust_remote_code=trust_remote_code)
    tokenizer = source.load_tokenizer()
    model, report = source.load(AutoModelForSequenceClassification, dtype=torch_dtype(dtype), output_loading_info=True)
    if report["missing_keys"]:  # transformers would fill a missing head with random numbers and go on
        raise UserError(
            f"`scorer` {'pipeline:' if classifier else ''}{name} has no classification head "
            f"({', '.join(sorted(report['missing_keys'])[:3])} missing in its weights); give "
            f"{'a model that was trained to classify' if classifier else 'a reward model that was trained with one'}"
        )
    label = scored_label(name, label, classifier, model.config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.to(default_device()).eval()
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = min(int(tokenizer.model_max_length), positions or 1 << 30, 1 << 30)
    if classifier:
        return _classifier(model, tokenizer, label, batch_size, room)
    return _reward_model(name, model, tokenizer, batch_size, room)


def _reward_model(name: str, model: Any, tokenizer: Any, batch_size: int, room: int) -> Scorer:
    def ids(row: dict[str, Any], completion: Any) -> list[int]:
        prompt = clean_prompt(row)
        if isinstance(prompt.content, str):
            text = prompt.content + text_of(completion)
            tokens = tokenizer(text, add_special_tokens=adds_special_tokens(tokenizer, text))["input_ids"]
        elif tokenizer.chat_template is None:
            raise UserError(
                f"`scorer` {name} has no chat template, but the rows hold messages; use a reward model that has one, "
                f"or pipeline:{name} to score the completion's text alone"
            )
        else:
            text = conversation_text(tokenizer, prompt, completion)
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(tokens) > room:
            logger.warning("scorer %s: a conversation of %d tokens was cut to its last %d", name, len(tokens), room)
        return tokens[-room:]

    @torch.inference_mode()
    def score_ids(tokens: list[list[int]]) -> list[float]:
        scores = []
        for start in range(0, len(tokens), batch_size):
            inputs = tokenizer.pad({"input_ids": tokens[start : start + batch_size]}, return_tensors="pt")
            scores += model(**inputs.to(model.device)).logits[:, 0].float().tolist()
        return scores

    return lambda rows, completions: _by_length(list(map(ids, rows, completions)), score_ids)


def _classifier(model: Any, tokenizer: Any, label: str, batch_size: int, room: int) -> Scorer:
    tokenizer.truncation_side = "left"  # the end of a long completion counts
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device=model.device)

    def score_texts(texts: list[str]) -> list[float]:
        found: Any = classify(texts, top_k=None, batch_size=batch_size, truncation=True, max_length=room)
        return [next(entry["score"] for entry in ranked if entry["label"] == label) for ranked in found]

    return lambda rows, completions: _by_length(list(map(text_of, completions)), score_texts)


def _by_length(inputs: list, score: Callable[[list], list[float]]) -> list[float]:
    """`score` of all, in their order; it is called on them from the shortest to the longest."""
    order = sorted(range(len(inputs)), key=lambda i: len(inputs[i]))
    scores = score([inputs[i] for i in order])
    return [value for _, value in sorted(zip(order, scores, strict=True))]
