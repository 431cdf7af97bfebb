"""A mixture of experts' load-balancing loss: TRL's, over the tokens that are run, whatever the layout and the cut."""

import math

import pytest
import torch
import transformers
from datasets import Dataset

from conftest import build_tokenizer, reward_rows
from nca_align import NCAConfig, NCATrainer
from nca_align.batching.attention import share_prefixes
from nca_align.batching.collator import RewardCollator
from nca_align.models.logprobs import add_token_logps, forward_chunk
from nca_align.models.passes import passes
from nca_align.models.routing import load_balancing_loss

TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "Mixtral": {"num_local_experts": 4, "sliding_window": None},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "GraniteMoe": {"num_local_experts": 4},
}
# Three prompts, one of them long, with 3, 3 and 2 completions of unequal lengths
ROWS = [
    {
        "prompt_ids": [5 + (7 * b + i) % 50 for i in range(20 + 9 * b)],
        "completion_ids": [[5 + (3 * k + 5 * i + b) % 50 for i in range(4 + 3 * k)] for k in range(3 - b // 2)],
        "rewards": [float(k) for k in range(3 - b // 2)],
    }
    for b in range(3)
]
CUTS = [("padded", None), ("prefix_shared", None), ("padded", 80), ("prefix_shared", 30), ("prefix_shared", 16)]


def build(family: str, vocabulary: int = 64, **own):
    config = getattr(transformers, f"{family}Config")(**TINY | FAMILIES[family] | {"vocab_size": vocabulary} | own)
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")._from_config(config)


def prepare(model):
    add_token_logps(model)
    share_prefixes(model)


def use_of(model, layout: str, size: int | None):
    chunks = RewardCollator(0, layout, tokens_per_forward=size)(ROWS)["chunks"]
    forwards = passes(chunks, scores_all=True, trains=False)
    return sum(forward_chunk(model, one.chunk, with_experts=True).expert_use for one in forwards)


def by_hand(model, top_k: int = 2) -> float:
    """experts · Σ over experts of its share of the choices times its mean probability (Switch Transformer, eq. 4)."""
    tokens = []
    for row in ROWS:
        for completion in row["completion_ids"]:
            ids = torch.tensor([(row["prompt_ids"] + completion)[:-1]])
            layers = model.base_model(input_ids=ids, use_cache=False, output_router_logits=True).router_logits
            tokens += [logits for layer in layers for logits in layer.double().tolist()]
    experts = len(tokens[0])
    chosen, probability = [0.0] * experts, [0.0] * experts
    for logits in tokens:
        weights = [math.exp(x - max(logits)) for x in logits]
        for e in sorted(range(experts), key=lambda e: -logits[e])[:top_k]:
            chosen[e] += 1 / len(tokens)
        for e in range(experts):
            probability[e] += weights[e] / sum(weights) / len(tokens)
    return experts * sum(c * p for c, p in zip(chosen, probability, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_over_each_conversations_tokens_in_every_layout_and_cut(family):
    model = build(family)
    expected = by_hand(model)
    prepare(model)
    assert [use_of(model, *cut).shape for cut in CUTS] == [(2, 4)] * len(CUTS)
    for cut in CUTS:
        assert load_balancing_loss(use_of(model, *cut)).item() == pytest.approx(expected, rel=1e-5), cut


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_models_own(family):
    model = build(family)
    (chunk,) = RewardCollator(0, "padded")(ROWS)["chunks"]
    own = model(input_ids=chunk["input_ids"], attention_mask=chunk["attention_mask"], output_router_logits=True)
    prepare(model)
    torch.testing.assert_close(load_balancing_loss(use_of(model, "padded", None)), own.aux_loss)
    assert forward_chunk(model, chunk).expert_use is None


def test_virtual_tokens_are_not_counted():
    model = build("Mixtral")
    prepare(model)
    (chunk,) = RewardCollator(0, "padded")(ROWS)["chunks"]
    inputs = {name: chunk[name] for name in ("token_index", "target_ids", "token_counts")}
    rows, length = chunk["input_ids"].shape
    embeds = model.get_input_embeddings()(chunk["input_ids"])
    mask = torch.cat([torch.ones(rows, 5, dtype=torch.long), chunk["attention_mask"]], 1)
    virtual = torch.randn(1, 5, embeds.shape[-1]).expand(rows, -1, -1)
    use = model(
        inputs_embeds=torch.cat([virtual, embeds], 1), attention_mask=mask, row_length=length, **inputs
    ).expert_use
    tokens = 2 * int(chunk["attention_mask"].sum())  # of two layers
    assert use.sum(1).tolist() == pytest.approx([2 * tokens, tokens], rel=1e-5)


def weights_after_a_step(tmp_path, loss_type: str, layout: str, size: int | None, coefficient: float = 0.5):
    """The weights that a step of plain gradient descent leaves, and what it logged."""
    tokenizer = build_tokenizer()
    model = build("Mixtral", len(tokenizer))
    args = NCAConfig(
        str(tmp_path), bf16=False, use_cpu=True, max_steps=1, logging_steps=1, per_device_train_batch_size=4,
        learning_rate=0.1, optim="sgd", max_grad_norm=1e6, save_strategy="no", report_to="none", disable_tqdm=True,
        gradient_checkpointing=False, loss_type=loss_type, layout=layout, tokens_per_forward=size, beta=0.1,
        alpha=0.5, max_length=256, lr_scheduler_type="constant", router_aux_loss_coef=coefficient,
    )  # fmt: skip
    nca = NCATrainer(model, args=args, train_dataset=Dataset.from_list(reward_rows(4)), processing_class=tokenizer)
    nca.train()
    (line,) = [line for line in nca.state.log_history if "loss" in line]
    return line, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("loss_type", ["nca", "infonca"])
def test_training_is_the_same_in_every_layout_and_cut(loss_type, tmp_path):
    (expected, weights), *others = [weights_after_a_step(tmp_path, loss_type, *cut) for cut in CUTS]
    plain, without = weights_after_a_step(tmp_path, loss_type, "padded", None, coefficient=0.0)
    moved = (weights - without).norm()
    assert moved > 1e-3
    assert expected["loss"] == pytest.approx(plain["loss"] + 0.5 * expected["aux_loss"], abs=1e-4)
    for line, found in others:
        assert line["aux_loss"] == pytest.approx(expected["aux_loss"], rel=1e-5)
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert (found - weights).norm() < 1e-3 * moved


def test_one_without_a_gradient_is_refused():
    """Reentrant checkpointing hides the router logits from autograd; transformers would train on without a word."""
    model = build("Mixtral")
    prepare(model)
    expected = use_of(model, "prefix_shared", None)
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = use_of(model, "prefix_shared", None)
    assert found.requires_grad
    torch.testing.assert_close(found, expected)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(NotImplementedError, match="`router_aux_loss_coef` is not 0, but the load-balancing loss has"):
        use_of(model, "prefix_shared", None)
    with torch.no_grad():
        assert not use_of(model, "prefix_shared", None).requires_grad
