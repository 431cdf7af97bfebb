"""One step of each way to train on K rewarded completions, on one model and one batch.

A step is forward and backward, from token ids to gradients, batch building included, without an optimizer's update:
fp32, no gradient checkpointing. Every way is a `Step`, called with `part=True` for a smaller warm-up batch.

    baseline               what the authors' code does: padded rows, full fp32 logits, log-softmax over all positions,
                           a reference forward at each step
    trl, trl_cached        TRL's DPOTrainer.training_step on pairs, the best completion with each other one
    padded, …_cached       NCATrainer.training_step, a row per completion
    prefix_shared, …       NCATrainer.training_step, the prompt once
    …_pieces               the same with the reference cached, `tokens_per_forward: 1280`
    limit                  language modelling on the same unique tokens: packed, each piece (prompt, completion) its own
                           causal sequence, LM head at the completions' tokens only
"""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AttentionInterface, PreTrainedModel, PreTrainedTokenizerFast
from transformers.masking_utils import AttentionMaskInterface
from trl import DPOConfig, DPOTrainer

from nca_align import NCAConfig, NCATrainer
from nca_align.models.logprobs import head_logps
from shapes import Example

ALPHA, BETA = 0.3, 0.1
ROWS = (
    "baseline", "trl", "trl_cached", "padded", "padded_cached", "prefix_shared", "prefix_shared_cached",
    "prefix_shared_pieces", "limit",
)  # fmt: skip
# whose losses, and gradients, must be equal
EQUAL = ("baseline", "padded", "padded_cached", "prefix_shared", "prefix_shared_cached", "prefix_shared_pieces")
LIVE_REFERENCE = ("baseline", "trl", "trl_cached", "padded", "prefix_shared")  # trl_cached computes its cache from it
TOKENS_PER_FORWARD = 1280

Step = Callable[[bool], torch.Tensor]


def build_steps(
    names: list[str], policy: PreTrainedModel, reference: PreTrainedModel | None, example: Example, part: Example
) -> dict[str, Step]:
    """The steps of these names, which share the policy's parameters and their gradients.

    Args:
        reference: None for ways outside LIVE_REFERENCE alone, which then get made-up reference log-probabilities, and
            hold no reference model: for memory figures.
        part: the warm-up's example.
    """
    batches = {True: part.rows(policy.config.vocab_size), False: example.rows(policy.config.vocab_size)}
    if reference is None:
        for row in batches[True] + batches[False]:
            row["ref_logps"] = [-10.0 * len(ids) for ids in row["completion_ids"]]
    steps: dict[str, Step] = {}
    if "limit" in names:
        steps["limit"] = limit(_same_weights(policy), batches)
    if "baseline" in names:
        steps["baseline"] = baseline(_same_weights(policy), _same_weights(reference), batches)
    if {"trl", "trl_cached"} & {*names}:
        steps |= trl(_same_weights(policy), _same_weights(reference), batches)
    for layout in ("prefix_shared", "padded"):
        if any(name.startswith(layout) for name in names):
            own_policy, own_reference = _same_weights(policy), _same_weights(reference)
            steps |= ours(layout, own_policy, own_reference, batches)
            if f"{layout}_pieces" in names:
                steps |= ours(layout, own_policy, own_reference, batches, TOKENS_PER_FORWARD)
    return {name: steps[name] for name in names}


def _same_weights(model: PreTrainedModel | None) -> PreTrainedModel | None:
    """A model of its own on the same parameters: what one way patches into it, no other sees."""
    return None if model is None else copy.deepcopy(model, {id(p): p for p in model.parameters()})


def baseline(policy: PreTrainedModel, reference: PreTrainedModel, batches: dict[bool, list[dict]]) -> Step:
    def logps(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits.float()
        logits, labels = logits[:, :-1], batch["labels"][:, 1:].clone()
        counts = labels != -100
        labels[~counts] = 0
        token_logps = torch.gather(logits.log_softmax(-1), 2, labels.unsqueeze(2)).squeeze(2)
        return (token_logps * counts).sum(-1)  # (B·K,)

    def step(part: bool) -> torch.Tensor:
        rows = batches[part]
        conversations = [(row["prompt_ids"], ids) for row in rows for ids in row["completion_ids"]]
        length = max(len(prompt) + len(ids) for prompt, ids in conversations)

        def padded(sequences: list[list[int]], value: int) -> torch.Tensor:
            return torch.tensor([ids + [value] * (length - len(ids)) for ids in sequences])

        batch = {
            "input_ids": padded([prompt + ids for prompt, ids in conversations], policy.config.pad_token_id),
            "attention_mask": padded([[1] * len(prompt + ids) for prompt, ids in conversations], 0),
            "labels": padded([[-100] * len(prompt) + ids for prompt, ids in conversations], -100),
        }
        policy.train()
        policy_logps = logps(policy, batch).view(len(rows), -1)
        with torch.no_grad():
            reference_logps = logps(reference, batch).view(len(rows), -1)
        targets = (torch.tensor([row["rewards"] for row in rows]) / ALPHA).softmax(-1)
        implicit = BETA * (policy_logps - reference_logps)
        loss = -(targets * F.logsigmoid(implicit)).sum(-1) - F.logsigmoid(-implicit).mean(-1)
        loss.mean().backward()
        return loss.mean().detach()

    return step


def trl(policy: PreTrainedModel, reference: PreTrainedModel, batches: dict[bool, list[dict]]) -> dict[str, Step]:
    pairs = {part: [pair for row in rows for pair in _pairs(row)] for part, rows in batches.items()}
    options = _options(DPOConfig, loss_type="nca_pair")
    everything = Dataset.from_list(pairs[True] + pairs[False])
    trainer = _PairTrainer(policy, reference, options, train_dataset=everything, processing_class=build_tokenizer())
    trainer.current_gradient_accumulation_steps = 1  # its training loop sets it
    rows = list(trainer.train_dataset)
    cached = {True: rows[: len(pairs[True])], False: rows[len(pairs[True]) :]}

    def step(part: bool, precomputed: bool) -> torch.Tensor:
        trainer.precompute_ref_logps = precomputed
        return trainer.training_step(trainer.model, trainer.data_collator((cached if precomputed else pairs)[part]))

    return {"trl": lambda part: step(part, False), "trl_cached": lambda part: step(part, True)}


class _PairTrainer(DPOTrainer):
    """DPOTrainer on token ids of given lengths; its collator, loss and step are its own."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def _pairs(row: dict[str, Any]) -> list[dict[str, Any]]:
    best = max(range(len(row["rewards"])), key=row["rewards"].__getitem__)
    return [
        {"prompt_ids": row["prompt_ids"], "chosen_ids": row["completion_ids"][best], "rejected_ids": ids}
        for k, ids in enumerate(row["completion_ids"])
        if k != best
    ]


def ours(
    layout: str,
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    batches: dict[bool, list[dict]],
    tokens_per_forward: int | None = None,
) -> dict[str, Step]:
    # the stored reference is not that of these weights, which the check at the start would find
    args = _options(NCAConfig, loss_type="nca", alpha=ALPHA, layout=layout, startup_checks=False)
    args.tokens_per_forward = tokens_per_forward
    trainer = NCATrainer(
        policy, reference, args, train_dataset=Dataset.from_list(batches[True] + batches[False]),
        processing_class=build_tokenizer(),
    )  # fmt: skip
    rows = list(trainer.train_dataset)
    cached = {True: rows[: len(batches[True])], False: rows[len(batches[True]) :]}
    for part, own in batches.items():  # for the next layout: computed once
        for row, with_reference in zip(own, cached[part], strict=True):
            row["ref_logps"] = with_reference["ref_logps"]

    def step(part: bool, with_cache: bool) -> torch.Tensor:
        columns = ["prompt_ids", "completion_ids", "rewards"] + (["ref_logps"] if with_cache else [])
        collated = trainer.data_collator([{name: row[name] for name in columns} for row in cached[part]])
        (batch,), counts = trainer.get_batch_samples(iter([collated]), 1, trainer.accelerator.device)
        return trainer.training_step(trainer.model, batch, counts)

    if tokens_per_forward is not None:
        return {f"{layout}_pieces": lambda part: step(part, True)}
    return {layout: lambda part: step(part, False), f"{layout}_cached": lambda part: step(part, True)}


def limit(policy: PreTrainedModel, batches: dict[bool, list[dict]]) -> Step:
    AttentionInterface.register("benchmark_pieces", _attend_pieces)
    AttentionMaskInterface.register("benchmark_pieces", AttentionMaskInterface._global_mapping["sdpa"])
    policy.set_attn_implementation("benchmark_pieces")

    def step(part: bool) -> torch.Tensor:
        sequences, labelled, targets, start = [], [], [], 0
        for row in batches[part]:
            sequences.append(row["prompt_ids"])
            start += len(row["prompt_ids"])
            for ids in row["completion_ids"]:
                sequences.append(ids)
                labelled.extend(range(start, start + len(ids)))
                targets.extend([*ids[1:], policy.config.eos_token_id])
                start += len(ids)
        ends = torch.tensor([len(ids) for ids in sequences]).cumsum(0).tolist()
        policy.train()
        hidden = policy.base_model(
            input_ids=torch.tensor([[token for ids in sequences for token in ids]]),
            position_ids=torch.tensor([[i for ids in sequences for i in range(len(ids))]]),
            attention_mask=torch.ones(1, 1, 1, 1),  # transformers takes a 4-D mask as it stands, and builds none
            pieces=list(zip([0, *ends], ends, strict=False)),
            use_cache=False,
        ).last_hidden_state
        # as ours, so that what `limit` bounds is all else: F.cross_entropy's copies cost more at many tokens
        logps = head_logps(
            policy.get_output_embeddings(), hidden[0].index_select(0, torch.tensor(labelled)), torch.tensor(targets),
            policy.config.vocab_size,
        )  # fmt: skip
        loss = -logps.mean()
        loss.backward()
        return loss.detach()

    return step


def _attend_pieces(module, query, key, value, attention_mask, *, pieces, scaling=None, **kwargs):
    outputs = [
        F.scaled_dot_product_attention(
            query[:, :, start:end], key[:, :, start:end], value[:, :, start:end],
            is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
        )
        for start, end in pieces
    ]  # fmt: skip
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def _options(kind: type[DPOConfig], **options) -> DPOConfig:
    """fp32 on CPU, no checkpointing, nothing cut or written."""
    return kind(
        output_dir=tempfile.gettempdir(), use_cpu=True, bf16=False, gradient_checkpointing=False, beta=BETA,
        max_length=None, precompute_ref_log_probs=True, precompute_ref_batch_size=1, report_to=[], disable_tqdm=True,
        **options,
    )  # fmt: skip


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Its ids are never used: the batches are token ids already."""
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
