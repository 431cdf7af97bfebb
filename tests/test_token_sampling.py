"""Answers are drawn from the policy's own distribution, in every family of models, and each of them alone."""

import math

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from conftest import build_model, slow_but
from nca_align.batching.attention import prefix_sharing_obstacle
from nca_align.errors import UserError
from nca_align.models import sampling
from nca_align.models.logprobs import add_token_logps
from nca_align.models.sampling import sample_answers, sample_with_logps
from test_attention import FAMILIES, VOCABULARY, build, share_prefixes

ENDS = [2, 3]
PROMPTS = [[7, 9, 11], [5], [8, 6, 4, 12, 40, 41, 42, 43, 44, 50, 51, 52]]


def sum_to(model, prompt: list[int], ids: list[int]) -> tuple[list[float], list[float]]:
    """The probabilities' sums before and with each token, by a plain forward of this answer alone."""
    logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    sums = logits.double().softmax(-1).cumsum(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
    own = logits.double().softmax(-1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
    return (sums - own).tolist(), sums.tolist()


@pytest.mark.parametrize("family", slow_but(FAMILIES, "Llama", "Gemma3Text", "Qwen3Moe"))
@torch.no_grad()
def test_each_token_is_the_inverse_transform_of_its_own_number(family):
    """Left padding, the cache, windows, letting go of answers that have ended: none of it may be seen in an answer."""
    model = build(family)
    plain = build(family)
    add_token_logps(model)
    share_prefixes(model)
    answers, logps = sample_with_logps(model, PROMPTS, 4, 24, ENDS, seed=5)
    assert list(map(len, answers)) == list(map(len, logps)) == [4, 4, 4]
    uniform = torch.rand(24, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    lengths = set()
    for n, (prompt, ids, logp) in enumerate(
        (prompt, *one) for prompt, *own in zip(PROMPTS, answers, logps, strict=True) for one in zip(*own, strict=True)
    ):
        low, high = sum_to(plain, prompt, ids)
        assert logp == pytest.approx(sum(math.log(b - a) for a, b in zip(low, high, strict=True)), abs=1e-3)
        assert all(
            a - 1e-4 <= u <= b + 1e-4 for a, u, b in zip(low, uniform[: len(ids), n].tolist(), high, strict=True)
        )
        assert not {*ids[:-1]} & {*ENDS}
        assert ids[-1] in ENDS or len(ids) == 24
        lengths.add(len(ids))
    assert len(lengths) > 1  # some are let go before others


def test_the_same_seed_gives_the_same_answers_and_the_random_state_stays():
    model, before = build("Llama"), torch.get_rng_state()
    first = sample_answers(model, PROMPTS, 3, 8, ENDS, 1)
    assert sample_answers(model, PROMPTS, 3, 8, ENDS, 1) == first
    assert sample_answers(model, PROMPTS, 3, 8, ENDS, 2) != first
    assert torch.equal(torch.get_rng_state(), before)


def test_shares_are_the_models_probabilities():
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 2.0, -torch.inf]]).expand(20_000, 5)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = torch.bincount(sampling._inverse_transform(logits, uniform), minlength=5) / 20_000
    expected = logits[0].softmax(0)
    assert (shares - expected).abs().max() < 4 * 0.5 / 20_000**0.5
    assert shares[1] == shares[4] == 0
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sampling._inverse_transform(torch.tensor([[-torch.inf, 0.0, 0.0]] * 2), edges).tolist() == [1, 2]


@pytest.mark.parametrize("family", ["Llama", "Mamba"])  # by the loop, and by `generate`
@torch.no_grad()
def test_a_model_that_diverged_is_told(family):
    model = build(family)
    model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(UserError, match="the model's probabilities aren't finite numbers, so no answer can be drawn"):
        sample_answers(model, PROMPTS, 2, 4, ENDS, 0)


def test_an_adapter_draws_as_it_answers_alone(tokenizer):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    policy = get_peft_model(build_model(tokenizer), lora).eval()
    (answers,) = sample_answers(policy, [PROMPTS[0]], 5, 6, ENDS, 0)
    assert len(answers) == 5
    assert len({*map(tuple, answers)}) > 1
    assert all(ids[-1] in ENDS or len(ids) == 6 for ids in answers)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused(kind, tokenizer):
    policy = get_peft_model(build_model(tokenizer), kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    own = policy.peft_config["default"].peft_type.value
    with pytest.raises(UserError, match=f"the adapter is of the kind {own}, with which `generate` draws from another"):
        sample_answers(policy, [PROMPTS[0]], 5, 6, ENDS, 0)


@torch.no_grad()
def test_models_that_the_loop_does_not_cover_draw_by_generate_from_their_own_distribution():
    model = build("Mamba", num_hidden_layers=1, state_size=4)
    assert prefix_sharing_obstacle(model) is not None
    model.generation_config.top_k, model.generation_config.repetition_penalty = 1, 9.0
    (answers,) = sample_answers(model, [PROMPTS[0]], 4000, 1, ENDS, 0)
    shares = torch.bincount(torch.tensor([ids[0] for ids in answers]), minlength=VOCABULARY) / 4000
    expected = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    assert (shares - expected).abs().max() < 5 * float((expected * (1 - expected)).max() / 4000) ** 0.5
    assert model.generation_config.top_k == 1
