"""Both layouts hold every conversation, token by token, and the packed row each shared token once."""

import random
import re
from itertools import pairwise

import pytest
import torch

from nca_align.batching import prefix_tree
from nca_align.batching.collator import RewardCollator, pack, split_by_length
from nca_align.batching.prefix_tree import MIN_SHARED_TOKENS
from nca_align.batching.segments import Segments
from nca_align.errors import UserError
from nca_align.losses import LABELS, LOSSES
from nca_align.own_losses import OwnLoss
from nca_align.training.metrics import row_metrics
from nca_align.training.objective import Objective

PAD = 0
LAYOUTS = ["padded", "prefix_shared"]


def row(prompt, *completions, **columns):
    return {
        "prompt_ids": prompt,
        "completion_ids": list(completions),
        "rewards": [float(k) for k in range(len(completions))],
        **columns,
    }


def random_rows(seed: int) -> list[dict]:
    """Ragged rows of a few token ids, so that beginnings agree by design and by accident."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> list[int]:
        return [rng.choice((1, 2, 3)) for _ in range(rng.randint(low, high))]

    turns = text(1, 40)  # shared by several rows, as in a multi-turn tree
    rows = []
    for _ in range(rng.randint(1, 4)):
        prompt = rng.choice([text(1, 1), text(2, 60), turns, turns + text(1, 30), turns[: rng.randint(1, len(turns))]])
        completions = []
        while len(completions) < rng.randint(2, 6):
            base = rng.choice(completions) if completions else []
            completions.append(
                rng.choice(
                    [
                        text(1, 50),
                        text(1, 1),
                        base[: rng.randint(0, len(base))] + text(1, 40),  # begins like another
                        base + text(1, 5),  # another is its beginning
                        base[: rng.randint(1, max(1, len(base)))] or [1],  # is the beginning of another
                        list(base) or [2],  # the same
                    ]
                )
            )
        rows.append(row(prompt, *completions))
    return rows


def conversations(rows: list[dict]) -> dict[int, tuple[list[int], list[int]]]:
    """completion index → (prompt, completion)."""
    columns = max(len(r["completion_ids"]) for r in rows)
    return {
        b * columns + k: (r["prompt_ids"], completion)
        for b, r in enumerate(rows)
        for k, completion in enumerate(r["completion_ids"])
    }


def seen_by(chunk: dict, position: int) -> tuple[list[int], list[int]]:
    """The tokens that a flat position attends to, itself last, and their position ids."""
    ids = chunk["input_ids"]
    if "segments" not in chunk:
        i, t = divmod(position, ids.shape[1])
        assert chunk["attention_mask"][i, : t + 1].all()
        return ids[i, : t + 1].tolist(), list(range(t + 1))
    segments: Segments = chunk["segments"]
    (s,) = [s for s, (start, end) in enumerate(segments.queries) if start <= position < end]
    visible = [i for start, end in segments.paths[s] for i in range(start, end) if i <= position]
    return ids[0, visible].tolist(), chunk["position_ids"][0, visible].tolist()


def assert_reconstructs(batch: dict, rows: list[dict]) -> None:
    """Each term sees its own conversation up to its target; each completion is scored once, from first to last."""
    expected = conversations(rows)
    found = []
    for chunk in batch["chunks"]:
        terms = zip(*(chunk[name].tolist() for name in ("completion_index", "token_index", "target_ids")), strict=True)
        scored: dict[int, int] = {}
        for index, position, target in terms:
            prompt, completion = expected[index]
            k = scored.get(index, 0)
            scored[index] = k + 1
            ids, depths = seen_by(chunk, position)
            assert ids == prompt + completion[:k]
            assert depths == list(range(len(ids)))
            assert target == completion[k]
        assert scored == {index: len(expected[index][1]) for index in scored}
        found.extend(scored)
    assert sorted(found) == sorted(expected)


def trie_tokens(items: list[tuple[list[int], list[int]]]) -> int:
    """Nodes of a plain trie below its roots: a position for each pair of a beginning and its next token."""
    ids = [prompt + completion for prompt, completion in items]
    return len({tuple(x[:n]) for x in ids for n in range(2, len(x) + 1)})


def trie_forks(items: list[tuple[list[int], list[int]]]) -> int:
    nexts: dict[tuple, set] = {}
    for ids in (prompt + completion for prompt, completion in items):
        for n in range(1, len(ids) + 1):
            nexts.setdefault(tuple(ids[:n]), set()).add(ids[n] if n < len(ids) else None)
    return sum(len(x) > 1 for x in nexts.values())


@pytest.mark.parametrize(("layout", "size"), [("padded", None), ("padded", 60), ("prefix_shared", None)])
def test_every_term_sees_its_own_conversation(layout, size):
    for seed in range(100):
        rows = random_rows(seed)
        batch = RewardCollator(PAD, layout, size)(rows)
        assert_reconstructs(batch, rows)
        for chunk in batch["chunks"]:
            assert ("segments" in chunk) == (layout == "prefix_shared")


def test_segments_fill_the_row_and_paths_lead_from_a_root_to_the_segments_end():
    for seed in range(100):
        (chunk,) = RewardCollator(PAD, "prefix_shared")(random_rows(seed))["chunks"]
        segments, total = chunk["segments"], chunk["input_ids"].shape[1]
        assert segments.queries[0][0] == 0
        assert segments.queries[-1][1] == total
        assert all(a[1] == b[0] for a, b in pairwise(segments.queries))
        assert all(start < end for start, end in segments.queries)
        for (start, end), path in zip(segments.queries, segments.paths, strict=True):
            assert path[-1][0] <= start < end == path[-1][1]
            assert all(a[1] < b[0] for a, b in pairwise(path))  # neighbours are one stretch
            depths = [d for a, b in path for d in chunk["position_ids"][0, a:b].tolist()]
            assert depths == list(range(len(depths)))


def test_an_unlimited_trie_holds_each_token_once(monkeypatch):
    monkeypatch.setattr(prefix_tree, "MIN_SHARED_TOKENS", 1)
    for seed in range(80):
        rows = random_rows(seed)
        batch = RewardCollator(PAD, "prefix_shared")(rows)
        unique = trie_tokens(list(conversations(rows).values()))
        assert batch["num_tokens"] == batch["chunks"][0]["input_ids"].numel() == unique
        assert_reconstructs(batch, rows)


def test_a_fork_left_out_costs_fewer_tokens_than_it_must_save():
    left_out = 0
    for seed in range(80):
        rows = random_rows(seed)
        items = list(conversations(rows).values())
        (chunk,) = RewardCollator(PAD, "prefix_shared")(rows)["chunks"]
        extra = chunk["input_ids"].numel() - trie_tokens(items)
        assert 0 <= extra <= (MIN_SHARED_TOKENS - 1) * trie_forks(items)
        left_out += extra > 0
    assert left_out > 8


@pytest.mark.parametrize("n", [2, 3, 9])
def test_a_common_beginning_is_shared_once_it_saves_enough_tokens(n):
    pays = -(-MIN_SHARED_TOKENS // (n - 1))
    for shared in (pays - 1, pays):
        # the beginning's last token opens the branches, so it shares a position less than it has tokens; another
        # completion keeps it apart from the prompt
        beginning = list(range(100, 100 + shared + 1))
        rows = [row([7] * 30, [5] * 9, *(beginning[1:] + [i] * 9 for i in range(n)))]
        (chunk,) = RewardCollator(PAD, "prefix_shared")(rows)["chunks"]
        copies = 1 if shared == pays else n
        assert chunk["input_ids"].numel() == 29 + 9 + n * 9 + copies * shared
        assert len(chunk["segments"].queries) == 1 + 1 + n + (shared == pays)


def test_what_some_completions_share_is_shared_where_what_all_share_is_too_short():
    a, b = [8, 1] * 10, [8, 2] * 10
    rows = [row([7] * 30, a + [1] * 5, b + [1] * 5, a + [2] * 5, b + [2] * 5)]
    (chunk,) = RewardCollator(PAD, "prefix_shared")(rows)["chunks"]
    assert chunk["input_ids"].numel() == 30 + 2 * 19 + 4 * 5  # the last token of a and of b opens two branches


def test_the_prompt_stands_once_and_a_branch_costs_one_token_more():
    for k in (2, 4, 16):
        completions = [[10 + i] * (5 + i) for i in range(k)]
        batch = RewardCollator(PAD, "prefix_shared")([row(list(range(100, 150)), *completions)])
        (chunk,) = batch["chunks"]
        # 49 prompt tokens; its last one opens every branch, and a completion's last token is a target only
        assert batch["num_tokens"] == 49 + sum(map(len, completions))
        assert len(chunk["segments"].queries) == 1 + k
        assert chunk["segments"].paths[0] == ((0, 49),)
        padded = RewardCollator(PAD)([row(list(range(100, 150)), *completions)])
        assert padded["num_tokens"] == 49 * k + sum(map(len, completions))


def test_short_beginnings_that_prompts_share_make_no_segment():
    rows = [row([1, 2, 3, 4] + [10 + b] * 40, [5] * 9, [6] * 9) for b in range(3)]
    (chunk,) = RewardCollator(PAD, "prefix_shared")(rows)["chunks"]
    assert len(chunk["segments"].queries) == 3 * (1 + 2)
    prompts = [path for path in chunk["segments"].paths if len(path) == 1]
    assert len(prompts) == 2 * 3  # a prompt and, without a gap behind it, its first branch


def test_a_token_that_completions_share_counts_for_each():
    rows = [row([1, 2, 3], [4, 5], [4, 5], [4, 5, 6], [4])]
    (chunk,) = RewardCollator(PAD, "prefix_shared")(rows)["chunks"]
    assert chunk["completion_index"].tolist() == [0, 0, 1, 1, 2, 2, 2, 3]
    assert chunk["target_ids"].tolist() == [4, 5, 4, 5, 4, 5, 6, 4]
    assert_reconstructs({"chunks": [chunk]}, rows)
    for layout in LAYOUTS:
        assert_reconstructs(RewardCollator(PAD, layout)(rows), rows)


def test_one_token_prompts_and_completions():
    rows = [row([9], [1], [2]), row([9], [1, 1], [1])]
    for layout in LAYOUTS:
        batch = RewardCollator(PAD, layout)(rows)
        assert_reconstructs(batch, rows)
        assert batch["lengths"].tolist() == [[1, 1], [2, 1]]


def test_nothing_grows_with_the_square_of_the_row():
    def largest(length: int) -> int:
        (chunk,) = RewardCollator(PAD, "prefix_shared")([row([1] * length, [2] * length, [3] * length)])["chunks"]
        return max(x.numel() for x in chunk.values() if isinstance(x, torch.Tensor))

    assert largest(2000) <= 3 * 2000
    assert largest(4000) <= 3 * 4000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ragged_rows(layout):
    rows = [
        row([1, 2], [3], [4, 4], [5, 5, 5], ref_logps=[-1.5, -2.0, -3.25]),
        row([6], [7] * 4, [8], ref_logps=[-4.0, -5.0]),
    ]
    batch = RewardCollator(PAD, layout)(rows)
    assert batch["rewards"].tolist() == [[-2, -1, 0], [-1, 0, 0]]
    assert batch["given_rewards"].tolist() == [[0, 1, 2], [0, 1, 0]]
    assert {batch[name].dtype for name in ("rewards", "given_rewards")} == {torch.float32}
    assert batch["valid"].tolist() == [[True] * 3, [True, True, False]]
    assert batch["lengths"].tolist() == [[1, 2, 3], [4, 1, 0]]
    assert batch["ref_logps"].tolist() == [[-1.5, -2.0, -3.25], [-4.0, -5.0, 0.0]]
    assert set(batch["chunks"][0]["completion_index"].tolist()) == {0, 1, 2, 3, 4}
    # so short a prompt isn't worth a fork
    assert batch["num_tokens"] == 2 + 3 + 4 + 4 + 1


@pytest.mark.parametrize("missing", [{}, {"ref_logps": None}])
def test_reference_log_probabilities_need_all_rows(missing):
    batch = RewardCollator(PAD)([row([1], [2], [3], ref_logps=[-1.0, -2.0]), row([1], [2], [3], **missing)])
    assert "ref_logps" not in batch


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eos_that_is_also_pad_is_read_and_scored_as_any_token(layout):
    rows = [row([1, PAD, 2, PAD], [3, PAD, 4, PAD], [5, PAD]), row([PAD], [PAD], [PAD, PAD, 6])]
    batch = RewardCollator(PAD, layout)(rows)
    assert_reconstructs(batch, rows)
    assert batch["num_tokens"] == 7 + 5 + 1 + 3


def test_padded_rows_are_filled_on_the_right_to_the_multiple_asked_for():
    rows = [row([1, 2, 3], [4] * 9, [5] * 2)]
    (chunk,) = RewardCollator(99, pad_to_multiple_of=8)(rows)["chunks"]
    assert chunk["input_ids"].tolist() == [[1, 2, 3] + [4] * 8 + [99] * 5, [1, 2, 3, 5] + [99] * 12]
    assert chunk["attention_mask"].tolist() == [[1] * 11 + [0] * 5, [1] * 4 + [0] * 12]
    assert_reconstructs({"chunks": [chunk]}, rows)
    assert RewardCollator(99)(rows)["chunks"][0]["input_ids"].shape == (2, 11)


# Chunks


def items(rng: random.Random, prompts: int) -> list[tuple]:
    """(b, index, prompt, completion) of a ragged batch."""
    found = []
    for b in range(prompts):
        prompt = [b] * rng.randint(1, 300)
        found += [(b, 100 * b + k, prompt, [k] * rng.randint(1, 500)) for k in range(rng.randint(2, 9))]
    return found


def padded_tokens(chunk: list[tuple]) -> int:
    return len(chunk) * max(len(prompt) + len(completion) - 1 for _, prompt, completion in chunk)


def test_padded_chunks_hold_each_completion_once_within_the_bound():
    rng = random.Random(0)
    for _ in range(200):
        batch = [own[1:] for own in items(rng, rng.randint(1, 6))]
        bound = rng.randint(1, 4000)
        chunks = split_by_length(batch, bound)
        assert sorted(c[0] for chunk in chunks for c in chunk) == sorted(c[0] for c in batch)
        assert all(len(chunk) == 1 or padded_tokens(chunk) <= bound for chunk in chunks)
        loads = [padded_tokens(chunk) for chunk in chunks]
        assert loads[0] == max(loads)
    assert split_by_length(batch, None) == [batch]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_of_a_batch_hold_its_terms(layout):
    rows = random_rows(3)
    whole = RewardCollator(PAD, layout)(rows)
    for bound in (*range(4, 40), 100, 1000):
        batch = RewardCollator(PAD, layout, bound)(rows)
        assert batch["num_tokens"] == whole["num_tokens"]
        if layout == "padded":
            assert_reconstructs(batch, rows)
        else:  # `test_pieces` runs them one after the other
            assert max(chunk["input_ids"].numel() for chunk in batch["chunks"]) <= bound
        for name in ("rewards", "valid", "lengths"):
            assert batch[name].tolist() == whole[name].tolist()


def test_a_tree_as_deep_as_it_has_leaves():
    # each completion goes on from where the one before it ended
    completions = [[1] * (20 * n) + [2] for n in range(1, 41)]
    rows = [row([9], *completions)]
    (chunk,) = RewardCollator(PAD, "prefix_shared")(rows)["chunks"]
    assert chunk["input_ids"].numel() == trie_tokens(list(conversations(rows).values()))
    assert len(chunk["segments"].queries) == 2 * 40 - 1
    assert seen_by(chunk, chunk["token_index"][-1])[0] == [9] + [1] * 800


def test_token_ids_of_any_vocabulary_stay_apart():
    # a position's key holds two ids
    big = 2**31 - 1
    (chunk,) = pack([(0, [big, 0], [big], [1]), (1, [big, 0], [0], [1])])
    assert_reconstructs({"chunks": [chunk]}, [row([big, 0], [big], [0])])


@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([1.0, float("nan")], "`rewards` of row 1 is [1.0, nan]; each must be finite"),
        ([1.0, 1e39], "`rewards` of row 1 is [1.0, inf]; each must be finite"),  # more than float32 holds
        ([1.0], "`rewards` of row 1 has 1 valid completion(s); it must have at least 2"),
    ],
)
def test_rows_that_no_loss_can_take_are_refused(rewards, said, layout):
    """Here on the CPU, since no loss of the trainer looks at them again."""
    good = row([1, 2], [3], [4])
    bad = {"prompt_ids": [1, 2], "completion_ids": [[3]] * len(rewards), "rewards": rewards}
    with pytest.raises(UserError, match=re.escape(said)):
        RewardCollator(PAD, layout)([good, bad])


@pytest.mark.parametrize("loss", [name for name in (*LOSSES, "sft") if name not in LABELS])
def test_an_offset_of_the_rewards_changes_no_loss_and_no_metric(loss):
    """Bit for bit: 1e8 has room for quarters in float64, and float32 would make ties of them."""
    rng = random.Random(1)
    rows = [entry for seed in range(4) for entry in random_rows(seed)]
    for entry in rows:
        entry["rewards"] = [rng.randint(-8, 8) / 4 for _ in entry["rewards"]]
    moved = [entry | {"rewards": [reward + 1e8 for reward in entry["rewards"]]} for entry in rows]
    batch, offset = RewardCollator(PAD)(rows), RewardCollator(PAD)(moved)
    assert not torch.equal(batch["given_rewards"], offset["given_rewards"])
    torch.manual_seed(0)
    logps, ref_logps = torch.randn(2, *batch["valid"].shape) * batch["valid"]
    objective = Objective([loss], [1.0], 0.5, 0.1)
    ((*_, own, _),), ((*_, other, _),) = (objective.terms(logps, ref_logps, some) for some in (batch, offset))
    assert torch.equal(own, other)
    ours, others = (row_metrics(logps, ref_logps, some["rewards"], some["valid"], 0.5, 0.1) for some in (batch, offset))
    assert all(torch.equal(ours[name][i], others[name][i]) for name in ours for i in (0, 1))


def test_a_loss_of_ones_own_sees_the_rewards_of_the_data():
    seen = []

    def own(pi_logps, ref_logps, rewards, alpha, beta, mask):
        seen.append(rewards)
        return pi_logps.sum(1)

    batch = RewardCollator(PAD)([row([1, 2], [3], [4, 4], [5])])
    list(Objective([OwnLoss(own)], [1.0], 0.5, 0.1).terms(-torch.ones(1, 3), -torch.ones(1, 3), batch))
    assert seen[0].tolist() == [[0, 1, 2]]


def test_chunks_alone_need_neither_rewards_nor_a_second_completion():
    rows = [{"prompt_ids": [1, 2], "completion_ids": [[3, 4]]}]
    (chunk,) = RewardCollator(PAD).chunks(rows)
    assert chunk["target_ids"].tolist() == [3, 4]
