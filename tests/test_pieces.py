"""A batch in pieces is the batch: who sees whom, log-probabilities and gradients, for any tree and any bound."""

import random
from dataclasses import replace

import pytest
import torch

import tiny_models
from nca_align.batching.attention import share_prefixes
from nca_align.batching.collator import RewardCollator
from nca_align.batching.pieces import schedule
from nca_align.batching.recurrent import MIN_TOKENS, recurrent_layers
from nca_align.models.logprobs import add_token_logps, forward_chunk
from nca_align.models.passes import passes
from test_attention import FAMILIES, ROWS, WEIGHTS, alone, assert_same, build, case, together, with_gradients
from test_collator import conversations, random_rows
from test_recurrent import FAST, SLOW

# Of the models whose states can be handed on, those that are padded or refused for another reason
ELSEWHERE = {
    "Inkling2ForCausalLM", "Inkling2ForConditionalGeneration", "Inkling2LoopForCausalLM",
    "Inkling2LoopForConditionalGeneration", "InklingForCausalLM",  # their attention adds a position bias
    "Nemotron3_5TranscribeForConditionalGeneration", "NemotronH_Omni_Reasoning_V3",  # parts beside backbone and head
}  # fmt: skip
HYBRIDS = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW if name not in ELSEWHERE)]


def pieces_of(rows: list[dict], bound: int | None, recurrent: bool = False) -> list[dict]:
    return RewardCollator(0, "prefix_shared", tokens_per_forward=bound, recurrent=recurrent).chunks(rows)


# The cut and its order


@pytest.mark.parametrize("scores_all", [False, True])
@pytest.mark.parametrize("recurrent", [False, True])
def test_every_forward_sees_its_terms_conversations(recurrent, scores_all):
    """The kept tokens are played through, a token in place of its keys."""
    several = 0
    for seed in range(25):
        rows = random_rows(seed)
        expected = conversations(rows)
        total = RewardCollator(0, "prefix_shared")(rows)["num_tokens"]
        for bound in (4, 16, 33, random.Random(seed).randint(4, total + 4)):
            chunks = pieces_of(rows, bound, recurrent)
            several += len(chunks) > 1
            if not recurrent:  # which does not share a single token
                assert sum(chunk["input_ids"].numel() for chunk in chunks) == total
            place: dict[int, int] = {}  # by depth, as `KeptPath`
            trained, scored = [], []
            terms: dict[int, list[tuple[int, int]]] = {}
            for number, trains in schedule([chunk["segments"] for chunk in chunks], scores_all):
                chunk = chunks[number]
                segments, ids = chunk["segments"], chunk["input_ids"].flatten().tolist()
                assert len(ids) <= bound
                if recurrent:
                    rows_are_whole(chunk)
                keys = [place[depth] for depth in range(segments.past)] + ids
                place |= {segments.past + i: token for i, token in enumerate(ids)}
                for index, position, target in zip(
                    *(chunk[name].tolist() for name in ("completion_index", "token_index", "target_ids")), strict=True
                ):
                    (s,) = [s for s, (a, b) in enumerate(segments.queries) if a <= position < b]
                    seen = [i for a, b in segments.paths[s] for i in range(a, b) if i <= segments.past + position]
                    prompt, completion = expected[index]
                    text = [keys[i] for i in seen]
                    assert chunk["position_ids"].flatten()[position] == len(text) - 1
                    assert [*text, target] == (prompt + completion)[: len(text) + 1]
                    if trains:
                        terms.setdefault(index, []).append((len(text), target))
                (trained if trains else scored).append(number)
            assert sorted(trained) == [*range(len(chunks))]
            read = {number for number, chunk in enumerate(chunks) if chunk["segments"].read}
            assert set(scored) == (set(range(len(chunks))) if scores_all else read)
            if not scores_all:
                assert len(scored) == len(read)
            for index, (prompt, completion) in expected.items():  # each term once
                found = sorted(terms[index])
                assert found == [(len(prompt) + i, target) for i, target in enumerate(completion)]
    assert several > 80


def rows_are_whole(chunk: dict) -> None:
    """A recurrent layer reads each row in its order: one path from the past, padded only where nobody reads on."""
    segments, counts = chunk["segments"], chunk["token_counts"]
    rows, length = counts.shape
    assert [end - start for start, end in segments.queries] == [length] * rows
    for row in counts:
        tokens = int((row > 0).sum())
        assert (row[:tokens] > 0).all()
        assert tokens == length or not segments.read
    assert rows == 1 or not segments.read
    if segments.past:
        assert length >= MIN_TOKENS
        assert segments.paths[0] == ((0, segments.past + length),)


def test_a_short_prompt_is_run_once_more_and_its_completions_once():
    rows = [{"prompt_ids": [*range(1, 41)], "completion_ids": [[50 + k] * 30 for k in range(8)], "rewards": [0.0] * 8}]
    chunks = pieces_of(rows, 64)
    assert [chunk["input_ids"].numel() for chunk in chunks] == [39, 60, 60, 60, 60]  # forks at its last token
    assert [chunk["segments"].read for chunk in chunks] == [True, *[False] * 4]
    segments = [chunk["segments"] for chunk in chunks]
    assert [tuple(own) for own in schedule(segments, scores_all=False)] == [
        (0, False), (1, True), (2, True), (3, True), (4, True), (0, True)
    ]  # fmt: skip
    # a listwise loss has the prompt's keys from its first pass
    assert [own.trains for own in schedule(segments, scores_all=True)] == [False] * 5 + [True] * 5


def test_the_last_part_of_a_long_answer_is_the_largest_and_runs_once():
    rows = [{"prompt_ids": [1], "completion_ids": [[2] * 100], "rewards": [0.0]}]
    chunks = pieces_of(rows, 32)
    assert [chunk["input_ids"].numel() for chunk in chunks] == [4, 32, 32, 32]
    order = [tuple(own) for own in schedule([chunk["segments"] for chunk in chunks], scores_all=False)]
    assert order == [(0, False), (1, False), (2, False), (3, True), (2, True), (1, True), (0, True)]


def test_only_the_keys_of_one_path_are_kept():
    """Sixteen long answers take the room of the longest."""
    rows = [{"prompt_ids": [1] * 20, "completion_ids": [[2 + k] * (60 + k) for k in range(16)], "rewards": [0.0] * 16}]
    chunks = pieces_of(rows, 16)
    assert max(chunk["segments"].end for chunk in chunks) == 20 + 75 - 1


# Against each conversation alone


def in_pieces(model, bound: int | None, rows=ROWS, scores_all: bool = False) -> tuple:
    """As `with_gradients` of `together`."""
    recurrent = bool(recurrent_layers(model.config))
    batch = RewardCollator(0, "prefix_shared", tokens_per_forward=bound, recurrent=recurrent)(rows)
    valid = batch["valid"].flatten()
    weights = torch.zeros(len(valid)).masked_scatter(valid, WEIGHTS)
    logps = torch.zeros(len(valid), dtype=torch.float64)
    model.zero_grad(set_to_none=True)
    for one in passes(batch["chunks"], scores_all, trains=True):
        index = one.chunk["completion_index"]
        with torch.set_grad_enabled(one.trains):
            own = forward_chunk(model, one.chunk).token_logps
            if one.first:
                logps.index_add_(0, index, own.detach().double())
            if one.trains:
                one.root((weights[index] * own).sum()).backward()
    gradients = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters() if p.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return logps[valid], gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_equal_each_conversation_alone(family):
    c = case(family)
    for bound, scores_all in ((24, False), (9, True)):
        assert_same(in_pieces(c.model, bound, scores_all=scores_all), c.alone)


@pytest.mark.parametrize("name", HYBRIDS)
def test_models_with_recurrent_layers_equal_each_conversation_alone(name):
    """Completions of one token among them, prompts in several pieces, with checkpointing as well."""
    model = tiny_models.build(name)
    expected = with_gradients(model, alone(model))
    share(model)
    # the gated delta rule rounds to 1e-4 in some sums: in float64 it is exact
    for bound, scores_all in ((None, False), (16, True)):
        assert_same(in_pieces(model, bound, scores_all=scores_all), expected, 1e-4)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert_same(in_pieces(model, 24), expected, 1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Mixtral"])
def test_with_gradient_checkpointing(family, reentrant):
    c = case(family)
    model = build(family)
    whole = together_in_training(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert_same(in_pieces(model, 24), whole)
    assert_same(whole, c.alone)


def share(model) -> None:
    add_token_logps(model)
    share_prefixes(model)


def together_in_training(model) -> tuple:
    share(model)
    model.train()
    return with_gradients(model, together(model, "prefix_shared"))


def test_with_dropout_both_forwards_of_a_piece_draw_the_same():
    """Gradients are those of the very log-probabilities that were found: a numeric derivative says so."""
    model = build("Llama", attention_dropout=0.3).double()
    together_in_training(model)
    parameter = model.model.layers[0].self_attn.k_proj.weight
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)).double()

    def value(step: float) -> tuple:
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
        torch.manual_seed(7)
        found = in_pieces(model, 24)
        with torch.no_grad():
            parameter.add_(direction, alpha=-step)
        return found

    (logps, gradients), (ahead, _), (behind, _) = value(0.0), value(1e-4), value(-1e-4)
    numeric = float((WEIGHTS * (ahead - behind)).sum() / 2e-4)
    found = gradients["model.layers.0.self_attn.k_proj.weight"]
    assert numeric == pytest.approx(float((found * direction).sum()), rel=5e-3)
    model.eval()
    assert (in_pieces(model, 24)[0] - logps).abs().max() > 0.1  # dropout was on


def test_layers_without_a_trained_weight_below_them_leave_no_gradients():
    c = case("Llama")
    model = c.model
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "layers.1.self_attn.q_proj" in name
        found = in_pieces(model, 16)
    finally:
        model.requires_grad_(True)
    expected = {name: own for name, own in c.alone[1].items() if name in found[1]}
    assert len(expected) == 1
    assert_same(found, (c.alone[0], expected))


def test_keys_are_kept_for_as_many_tokens_as_a_path_has():
    (own, *_), model = pieces_of(ROWS, 16), case("Llama").model
    assert own["segments"].kept is None
    sizes = {}
    for one in passes(pieces_of(ROWS, 16), scores_all=True, trains=False):
        kept = one.chunk["segments"].kept
        with torch.no_grad():
            forward_chunk(model, one.chunk)
        sizes = {place.shape[2] for place in kept.places.values()}
        assert len(kept.places) == 2 * model.config.num_hidden_layers
    longest = max(len(row["prompt_ids"]) + len(ids) for row in ROWS for ids in row["completion_ids"])
    assert len(sizes) == 1
    assert sizes.pop() <= longest + 16


def test_one_piece_is_the_packed_row():
    (piece,), (whole,) = pieces_of(ROWS, 10_000), RewardCollator(0, "prefix_shared").chunks(ROWS)
    (one,) = passes([piece], scores_all=False, trains=True)
    assert one.trains
    assert one.chunk["segments"].kept is None
    assert replace(piece["segments"], _cache={}) is not whole["segments"]
    assert (piece["segments"].queries, piece["segments"].paths) == (whole["segments"].queries, whole["segments"].paths)
    assert torch.equal(piece["input_ids"], whole["input_ids"])
