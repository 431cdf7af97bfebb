"""Reward models as others save them: a score is what the model gives alone, or one sentence says why there is none."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from nca_align.errors import UserError
from nca_align.rewards.scorers import open_scorers
from reward_set_ups import (
    DECODERS,
    DIFFER,
    ENCODERS,
    OWN_FORWARD,
    READ_EOS,
    TEMPLATES,
    SetUp,
    alone,
    build_set_up,
    silence,
)
from test_fuzz import SEED

pytestmark = pytest.mark.filterwarnings("ignore")


def turns(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def rows_of(set_up: SetUp, texts: list[str]) -> list[dict]:
    """Two rows, with the texts as completions."""
    half = len(texts) // 2
    if set_up.template is None:
        return [{"prompt": "<s>Why? ", "completions": texts[:half]}, {"prompt": "So", "completions": texts[half:]}]
    answers = [[{"role": "assistant", "content": text}] for text in texts]
    return [
        {"prompt": turns("Why?"), "completions": answers[:half], "chat_template_kwargs": {"mode": None}},
        {
            "prompt": turns("a", "b", "And now?"),
            "completions": answers[half:],
            "chat_template_kwargs": {"mode": "slow"},
        },
    ]


TEXTS = [
    "Yes.",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "No, never at all.",
    "It is",
]
# The pad token, BOS or EOS within a text and at its end, as users and models write them
TYPED = ["a <pad> b", "c <pad>", "<pad><pad>", "d <|im_end|> e", "f<|im_end|>", "<s>g", "<s>"]


def check(set_up: SetUp, folder: Path, kept: Path, texts: list[str]) -> str:
    """That a set-up is scored as its model scores alone, or refused in one sentence.

    Returns:
        The sentence; nothing where it was scored.
    """
    silence()
    model, rows = build_set_up(set_up, folder, kept), rows_of(set_up, texts)
    label = f":LABEL_{set_up.outputs - 1}" if set_up.label else ""
    name = f"{set_up.label}:{model}{label}" if set_up.label else str(model)
    own = {"batch_size": set_up.batch_size, "dtype": set_up.dtype, "trust_remote_code": set_up.family in OWN_FORWARD}
    expected = None if set_up.refusal else alone(set_up, model, rows)
    try:
        shard = open_scorers([name], **own).score_rows(rows)
    except UserError as refused:
        said = str(refused)
    else:
        assert expected is not None, f"not refused: {set_up.refusal}"
        scale = max((abs(score) for scores in expected for score in scores or []), default=0)
        within = {"float32": 1e-4, "bfloat16": 0.1}[set_up.dtype] * max(scale, 0.1)
        found = iter(shard.rows)
        for i, scores in enumerate(expected):
            if scores is None:
                assert " raised " in shard.failed[i]
            else:
                assert i not in shard.failed, shard.failed
                assert next(found)["rewards"] == pytest.approx(scores, rel=0, abs=within)
        return ""
    fitting = [set_up.refusal] if set_up.refusal else ["--batch_size 1"] * set_up.may_differ
    fitting += ["can't score a text alone"] * (expected is not None and None in expected)
    assert any(words in said for words in fitting), said
    assert "\n" not in said
    return said


def any_set_up(choose: random.Random) -> SetUp:
    family = choose.choice([*DECODERS, *ENCODERS, *READ_EOS, *DIFFER, *OWN_FORWARD])
    decoder = family in DECODERS
    config_pads = ["own", "eos", "none", "negative"] if decoder else ["own"]
    return SetUp(
        family,
        pad=choose.choice(["own", "eos", "none"]),
        config_pad=choose.choices(config_pads, [3, 3, 3, 1][: len(config_pads)])[0],
        padding_side=choose.choice(["right", "left"]),
        adds=choose.choice(["", "<s> $A", "<s> $A <|im_end|>"]),
        template=choose.choice([None, *TEMPLATES]),
        outputs=1 if family in OWN_FORWARD else choose.choice([1, 1, 3]),
        label=choose.choice(["", "reward", "pipeline"]),
        adapter=choose.choice([None, None, "score", "whole"]) if decoder else None,
        dtype=choose.choice(["float32", "bfloat16"]),
        batch_size=choose.randint(1, 9),
    )


@pytest.mark.parametrize(
    ("count", "seed"),
    [pytest.param(300, 0, marks=pytest.mark.slow), pytest.param(10_000, SEED, marks=pytest.mark.long)],
    ids=["300", "10000"],
)
def test_any_set_up_is_scored_as_alone_or_refused(count, seed, tmp_path):
    """Architectures, heads, adapters, pad tokens, padding sides, templates, dtypes, batch sizes, and texts."""
    print(f"FUZZ_SEED={seed}")
    choose, wrong, refused = random.Random(seed), [], Counter()
    for _ in range(count):
        set_up = any_set_up(choose)
        texts = choose.choices([*TEXTS, *TYPED], k=choose.randint(1, 8))
        texts += ["".join(chr(choose.randrange(32, 0x3000)) for _ in range(choose.randint(1, 30)))]
        (tmp_path / "made").mkdir()
        try:
            refused[check(set_up, tmp_path / "made", tmp_path, texts) != ""] += 1
        except Exception as error:
            wrong.append((set_up, texts, f"{type(error).__name__}: {error}"[:1000]))
        shutil.rmtree(tmp_path / "made")
    assert not wrong, "\n".join(map(str, wrong[:20]))
    assert min(refused.values()) > 0.05 * count


# What the issue of the kind is: a pad token that is none, or that ends the conversation, on either side
@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.mark.parametrize(
    "set_up",
    [
        SetUp("Llama", pad="none", config_pad="none"),
        SetUp("Llama", pad="none", config_pad="eos"),
        SetUp("Llama", pad="eos", config_pad="eos", padding_side="left"),
        SetUp("Llama", pad="eos", config_pad="own", template="two EOS at the end"),
        SetUp("GPT2", pad="own", config_pad="own", padding_side="left"),
        SetUp("Llama", pad="own", config_pad="negative"),
        SetUp("Llama", template="argument", dtype="bfloat16"),
        SetUp("Llama", template=None, adds="<s> $A"),
        SetUp("Bert", template=None, adds="<s> $A <|im_end|>"),
        SetUp("Roberta", config_pad="own", label="pipeline", outputs=3, adds="<s> $A <|im_end|>"),
        SetUp("Qwen3", outputs=3, label="reward"),
        SetUp("Llama", pad="eos", config_pad="none", adapter="score"),
        SetUp("Qwen3", pad="own", config_pad="own", adapter="whole", dtype="bfloat16"),
        SetUp("mask"),
        SetUp("last", batch_size=1),
    ],
    ids=str,
)
def test_a_score_is_what_the_model_gives_one_conversation_alone(set_up, tmp_path, kept):
    assert check(set_up, tmp_path, kept, [*TEXTS, *TYPED]) == ""
