"""Scorers that are models: a reward model with a classification head, and a text-classification pipeline."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, pipeline

from ..batching.rendering import adds_special_tokens
from ..data.conversation import clean_prompt, conversation
from ..data.prompts import text_of
from ..errors import UserError
from ..models.loading import ModelSource, default_device, is_adapter, silence_transformers, torch_dtype

logger = logging.getLogger("nca_align")

# Scores of completions: (prompts, completions, columns) -> one float a completion, or None where it skips one.
Scorer = Callable[[list, list, dict[str, list]], Sequence[float | None]]


def check_config(name: str, label: str | None, classifier: bool, trust_remote_code: bool = False) -> None:
    """Look at a scorer's configuration alone, where much is to be computed before the scorer is opened.

    Args:
        name, label, trust_remote_code: as of `pipeline_scorer`.
        classifier: whether it is to be a classifier, or else a reward model.

    Raises:
        UserError: there is none, or it says that the model has other outputs.
    """
    if is_adapter(name):  # its base says what it is
        return
    config = ModelSource(name, "scorer", trust_remote_code=trust_remote_code).load_config()
    if any("ForSequenceClassification" in own for own in config.architectures or []):  # else opening it says why not
        if classifier:
            require_label(name, label, config)
        else:
            require_one_output(name, config)


def require_one_output(name: str, config: Any) -> None:
    """Raise a UserError where the model has several outputs."""
    if config.num_labels != 1:
        raise UserError(
            f"`scorer` {name} has {config.num_labels} outputs, where a reward model has one; for a classifier write "
            f"pipeline:{name}:LABEL with one of {', '.join(config.label2id)}"
        )


def require_label(name: str, label: str | None, config: Any) -> str:
    """`label`, or the only one that there is.

    Raises:
        UserError: no such label, or none given where there are several.
    """
    labels = list(config.id2label.values())
    if label is None and len(labels) == 1:
        return labels[0]
    if label is None or label not in labels:
        raise UserError(
            f"`scorer` pipeline:{name} has the labels {', '.join(labels)}, and "
            f"{'none was given' if label is None else f'not {label!r}'}; write pipeline:{name}:LABEL"
        )
    return label


def _open(name: str, spec: str, wanted: str, dtype: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """The tokenizer and the sequence-classification model.

    Raises:
        UserError: it has no head; names the scorer by `spec`, and what to give in its place.
    """
    silence_transformers()
    source = ModelSource(name, "scorer", trust_remote_code=trust_remote_code)
    tokenizer = source.load_tokenizer()
    model, report = source.load(AutoModelForSequenceClassification, dtype=torch_dtype(dtype), output_loading_info=True)
    if report["missing_keys"]:  # transformers would fill a missing head with random numbers and go on
        raise UserError(
            f"`scorer` {spec} has no classification head ({_some(report['missing_keys'])} missing in its weights); "
            f"give {wanted}"
        )
    return tokenizer, model


def reward_model(name: str, batch_size: int, dtype: str = "auto", trust_remote_code: bool = False) -> Scorer:
    """A sequence-classification model with one output, given the conversation in its own chat template.

    Args:
        name: a folder or a Hub id.
        batch_size: completions a batch; they are sorted by length.
        dtype: `auto` for bfloat16 on a GPU and float32 on a CPU, or the name of one.
        trust_remote_code: run code that comes with the model.

    Raises:
        UserError: no classification head, more than one output, or no chat template for messages.
    """
    device = default_device()
    tokenizer, model = _open(name, name, "a reward model that was trained with one", dtype, trust_remote_code)
    require_one_output(name, model.config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    model.to(device).eval()
    room = _room(tokenizer, model.config)

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
            tokens = tokenizer.apply_chat_template(
                conversation(prompt, completion), tools=prompt.tools, return_dict=False, **prompt.arguments
            )
        if len(tokens) > room:
            logger.warning("scorer %s: a conversation of %d tokens was cut to its last %d", name, len(tokens), room)
        return tokens[-room:]

    @torch.inference_mode()
    def score(prompts: list, completions: list, columns: dict[str, list]) -> list[float]:
        tokens = [
            ids({name: values[i] for name, values in columns.items()} | {"prompt": prompt}, completion)
            for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        scores = [0.0] * len(tokens)
        for start in range(0, len(order), batch_size):
            picked = order[start : start + batch_size]
            inputs = tokenizer.pad({"input_ids": [tokens[i] for i in picked]}, return_tensors="pt").to(device)
            for i, value in zip(picked, model(**inputs).logits[:, 0].float().tolist(), strict=True):
                scores[i] = value
        return scores

    return score


def pipeline_scorer(
    name: str, label: str | None, batch_size: int, dtype: str = "auto", trust_remote_code: bool = False
) -> Scorer:
    """A text-classification pipeline over the completion's text: the probability of `label`.

    Args:
        name: a folder or a Hub id.
        label: the label to score; None where the model has one alone.
        batch_size: completions a batch; they are sorted by length.
        dtype, trust_remote_code: as of `reward_model`.

    Raises:
        UserError: no such label, or none given where there are several.
    """
    wanted = "a model that was trained to classify"
    tokenizer, model = _open(name, f"pipeline:{name}", wanted, dtype, trust_remote_code)
    label = require_label(name, label, model.config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.truncation_side = "left"  # the end of a long completion counts
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device=default_device())
    room = _room(tokenizer, model.config)

    def score(prompts: list, completions: list, columns: dict[str, list]) -> list[float]:
        texts = [text_of(completion) for completion in completions]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        ordered = [texts[i] for i in order]
        found: Any = classify(ordered, top_k=None, batch_size=batch_size, truncation=True, max_length=room)
        scores = [0.0] * len(texts)
        for i, ranked in zip(order, found, strict=True):
            scores[i] = next(entry["score"] for entry in ranked if entry["label"] == label)
        return scores

    return score


def _room(tokenizer, config) -> int:
    """Tokens that the model takes: what tokenizer and configuration allow."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return min(int(tokenizer.model_max_length), positions or 1 << 30, 1 << 30)


def _some(names) -> str:
    return ", ".join(sorted(names)[:3])
