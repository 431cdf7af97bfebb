"""Tokens that the model didn't write are context: they have no term, and all that follows them reads them."""

import copy
import itertools
import random

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import build_model, build_tokenizer
from nca_align import NCAConfig, NCATrainer
from nca_align.batching.attention import share_prefixes
from nca_align.batching.collator import RewardCollator
from nca_align.errors import UserError
from nca_align.losses import reward_loss
from nca_align.models.logprobs import add_token_logps, token_logps
from nca_align.store.fingerprints import columns_fingerprint
from nca_align.training.reference_cache import TOKENS
from test_collator import random_rows

LAYOUTS = ["padded", "prefix_shared"]
BETA, ALPHA = 0.5, 0.5


def ids(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(4, 380) for _ in range(length)]


def rows() -> list[dict]:
    """Trajectories that share a call and its result; one writes itself what another is given."""
    call, result = ids(1, 20), ids(2, 18)
    first = {
        "prompt_ids": ids(0, 25),
        "completion_ids": [call + result + ids(3, 7), call + result + ids(4, 5), call[:9] + ids(5, 6)],
        "completion_mask": [[1] * 20 + [0] * 18 + [1] * 7, [1] * 43, [1] * 9 + [0, 0] + [1] * 4],
        "rewards": [1.0, 0.0, 0.3],
    }
    second = {"prompt_ids": ids(6, 4), "completion_ids": [ids(7, 5), ids(8, 9)], "rewards": [0.2, 0.9]}
    return [first, second | {"completion_mask": None}]


def masks(row: dict) -> list[list[int]]:
    return row["completion_mask"] or [[1] * len(own) for own in row["completion_ids"]]


def gpt2() -> GPT2LMHeadModel:
    """Of a family that computes everything in the dtype of its weights: no float32 norms."""
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=384, **sizes, **dropout, bos_token_id=1, eos_token_id=3)).eval()


def prepared(dtype: torch.dtype = torch.float32):
    model = build_model(build_tokenizer()).to(dtype)
    add_token_logps(model)
    share_prefixes(model)
    return model


def plain_logps(model, given: list[dict]) -> torch.Tensor:
    """(B, K) float64 sums over the written tokens, of each conversation by itself."""
    table = torch.zeros(len(given), max(len(row["rewards"]) for row in given), dtype=torch.float64)
    for b, row in enumerate(given):
        for k, (own, mask) in enumerate(zip(row["completion_ids"], masks(row), strict=True)):
            whole = torch.tensor([row["prompt_ids"] + own])
            logps = model(whole).logits[0].log_softmax(-1)[len(row["prompt_ids"]) - 1 : -1]
            table[b, k] = (logps.gather(1, torch.tensor(own)[:, None])[:, 0] * torch.tensor(mask)).sum()
    return table


@pytest.mark.parametrize("size", [None, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_takes_terms_away_and_changes_nothing_else(layout, size):
    rng = random.Random(0)
    for seed in range(30):
        given = random_rows(seed)
        for row in given:
            row["completion_mask"] = [[*(rng.randint(0, 1) for _ in own[1:]), 1] for own in row["completion_ids"]]
        whole = RewardCollator(0, layout, size)([row | {"completion_mask": None} for row in given])
        found = RewardCollator(0, layout, size)(given)
        columns = found["rewards"].shape[1]
        seen = dict.fromkeys(range(whole["valid"].numel()), 0)
        for chunk, before in zip(found["chunks"], whole["chunks"], strict=True):
            written = []
            for index in before["completion_index"].tolist():
                b, k = divmod(index, columns)
                written.append(bool(given[b]["completion_mask"][k][seen[index]]))
                seen[index] += 1
            for name in ("token_index", "target_ids", "completion_index"):
                assert chunk[name].tolist() == list(itertools.compress(before[name].tolist(), written))
            for name in ("input_ids", "attention_mask", "token_counts"):
                assert torch.equal(chunk[name], before[name])
        expected = [[sum(mask) for mask in row["completion_mask"]] for row in given]
        assert [
            row[row_valid].tolist() for row, row_valid in zip(found["lengths"], found["valid"], strict=True)
        ] == expected


def test_a_shared_token_is_a_term_for_one_completion_and_context_for_another():
    (chunk,) = RewardCollator(0, "prefix_shared")(rows())["chunks"]
    assert chunk["input_ids"].numel() < 25 + 45 + 10 + 15 + 20  # the call and its result stand once
    where = [set(chunk["token_index"][chunk["completion_index"] == k].tolist()) for k in (0, 1)]
    assert len(where[0]) == 27
    assert len(where[1]) == 43
    assert len(where[0] & where[1]) >= 19
    assert len(where[1] - where[0]) >= 18


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_masked_target_counts_for_nothing_and_a_masked_token_for_what_follows(layout):
    model, given = prepared(), rows()
    collator = RewardCollator(0, layout)

    def logps(changed: list[dict]) -> list[list[torch.Tensor]]:
        return token_logps(model, changed, 8)

    before = logps(given)
    changed = copy.deepcopy(given)
    changed[0]["completion_ids"][0][30] += 1  # a token of the result
    after = logps(changed)
    assert torch.equal(before[0][0][:20], after[0][0][:20])
    assert (before[0][0][20:] - after[0][0][20:]).abs().min() > 1e-5
    for k in (1, 2):
        torch.testing.assert_close(before[0][k], after[0][k])
    # its own target alone: the last token is read by nobody
    given[0]["completion_mask"][0][-1] = 0
    changed = copy.deepcopy(given)
    changed[0]["completion_ids"][0][-1] += 1
    one, other = (collator(own)["chunks"][0] for own in (given, changed))
    for name in ("input_ids", "token_index", "target_ids", "completion_index"):
        assert torch.equal(one[name], other[name])


def config(tmp_path, **own) -> NCAConfig:
    return NCAConfig(
        **{
            "output_dir": str(tmp_path), "bf16": False, "use_cpu": True, "max_steps": 2, "logging_steps": 1,
            "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "beta": BETA, "alpha": ALPHA, "gradient_checkpointing": False, "max_length": 256,
        } | own
    )  # fmt: skip


def trainer(tmp_path, model=None, **own) -> NCATrainer:
    tokenizer = build_tokenizer()
    return NCATrainer(
        model or build_model(tokenizer), args=config(tmp_path, **own), train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer,
    )  # fmt: skip


@pytest.mark.parametrize("loss", ["nca", "sft"])
def test_gradients_are_those_of_finite_differences_in_float64(loss, tmp_path):
    """Of the loss written out over each conversation by itself; both layouts, and chunk by chunk."""
    given = rows()
    reference = plain_logps(gpt2().double(), given).detach() - 0.3
    rewards = torch.tensor([[1.0, 0.0, 0.3], [0.2, 0.9, 0.0]])
    valid = torch.tensor([[True] * 3, [True, True, False]])

    def by_hand(model) -> torch.Tensor:
        logps = plain_logps(model, given)
        if loss == "sft":
            return -(logps[0, 0] + logps[1, 1]) / (27 + 9)  # the tokens of the best that the model wrote
        return reward_loss(logps, reference, rewards.double(), ALPHA, BETA, "nca", valid).mean()

    found = {}
    for layout, size in [("padded", None), ("prefix_shared", None), ("prefix_shared", 20)]:
        nca = trainer(tmp_path, gpt2(), loss_type=loss, layout=layout, tokens_per_forward=size)
        batch = nca.data_collator(list(nca.train_dataset)) | {"ref_logps": reference.float(), "weights": torch.ones(2)}
        counts = torch.tensor([2.0, 36.0], dtype=torch.float64)
        nca.model.zero_grad()
        nca._step_by_chunk(nca.model, batch, counts) if size else nca.compute_loss(
            nca.model, batch, num_items_in_batch=counts
        ).backward()
        found[layout, size] = {name: value.grad.double() for name, value in nca.model.named_parameters()}
    model, step = gpt2().double(), 1e-6
    own = dict(model.named_parameters())
    rng = torch.Generator().manual_seed(0)
    for name in ("transformer.wte.weight", "transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_fc.weight"):
        direction = torch.randn(own[name].shape, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                own[name].add_(direction, alpha=sign * step)
                values.append(by_hand(model))
                own[name].add_(direction, alpha=-sign * step)
        expected = (values[0] - values[1]) / (2 * step)
        assert abs(expected) > 1e-3
        for gradients in found.values():
            torch.testing.assert_close((gradients[name] * direction).sum(), expected, rtol=2e-5, atol=1e-5)


def test_masked_rows_train_alike_in_every_layout_and_from_a_cached_reference(tmp_path):
    runs = []
    for own in (
        {"layout": "padded"},
        {"layout": "prefix_shared", "precompute_ref_log_probs": True},
        {"layout": "prefix_shared", "tokens_per_forward": 40},
    ):
        nca = trainer(tmp_path, **own)
        batch = next(iter(nca.get_train_dataloader()))
        assert sorted(batch["lengths"].flatten().tolist()) == [0, 5, 9, 13, 27, 43]
        nca.train()
        runs.append([line["loss"] for line in nca.state.log_history if "loss" in line])
    assert runs[0][0] != runs[0][1]
    for other in runs[1:]:
        assert other == pytest.approx(runs[0], rel=1e-4)


def test_caches_and_resumed_runs_know_data_by_its_masks():
    """And data without masks by the key that it had before there were any."""
    plain = Dataset.from_list([{"prompt_ids": [1], "completion_ids": [[2, 3], [4]]}])
    assert columns_fingerprint(plain, TOKENS) == columns_fingerprint(plain, TOKENS[:2])
    streamed = Dataset.from_list([{**plain[0], "completion_mask": None}])  # a stream's first rows
    assert columns_fingerprint(streamed, TOKENS) == columns_fingerprint(plain, TOKENS)
    keys = {columns_fingerprint(plain, TOKENS)}
    for mask in ([[1, 1], [1]], [[1, 0], [1]], [[0, 1], [1]], None):
        masked = [{**plain[0], "completion_mask": mask}, {**plain[0], "completion_mask": [[1, 1], [1]]}]
        keys.add(columns_fingerprint(Dataset.from_list(masked), TOKENS))
    assert len(keys) == 5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("mask", "said"), [
    ([[1, 0]], r"completion_mask` has 1 values for 2 completions; give one each"),
    ([[1, 0], [1, 1]], r"completion_mask\[1\]` has 2 values for 3 tokens of the completion; give one each"),
    ([[1, 1, 1], [1, 1, 1]], r"completion_mask\[0\]` has 3 values for 2 tokens of the completion; give one each"),
    ([[1, 1], [0, 0, 0]], r"completion_mask\[1\]` has no 1, so nothing is trained on"),
    ([[2, 1], [1, 1, 1]], r"completion_mask\[0\]` must be a list of 0 and 1"),
])  # fmt: skip
def test_a_batch_takes_no_mask_of_other_tokens(layout, mask, said):
    row = {"prompt_ids": [5, 6], "completion_ids": [[7, 8], [7, 9, 10]], "rewards": [1.0, 0.0], "row_number": 40}
    collator = RewardCollator(0, layout)
    assert collator([row | {"completion_mask": [[1, 0], [0, 1, 1]]}])["lengths"].tolist() == [[1, 2]]
    for call in (collator, collator.chunks):
        with pytest.raises(UserError, match=f"row 40: `{said}"):
            call([row, row | {"completion_mask": mask}])
