"""Reward models as others save them: a score is what the model gives alone, or one sentence says why there is none."""

import json
import math
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

from conftest import build_model, build_tokenizer, reward_rows
from nca_align.commands.score import main
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
    load,
    save,
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


def check(set_up: SetUp, folder: Path, kept: Path, texts: list[str], may_differ: bool | None = None) -> str:
    """That a set-up is scored as its model scores alone, or refused in one sentence.

    Args:
        set_up, folder, kept: as of `build_set_up`.
        texts: completions.
        may_differ: whether a batch of it may be refused; by default where the set-up says so.

    Returns:
        The sentence; nothing where it was scored.
    """
    silence()
    may_differ = set_up.may_differ if may_differ is None else may_differ
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
        # A probability has the rounding of its logits, and an output that of the largest
        scale = max(scale, 0.1 if set_up.label != "pipeline" and set_up.outputs == 1 else 1)
        within = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}[set_up.dtype] * scale
        found = iter(shard.rows)
        for i, scores in enumerate(expected):
            if scores is None:
                assert " raised " in shard.failed[i]
            else:
                assert i not in shard.failed, shard.failed
                assert next(found)["rewards"] == pytest.approx(scores, rel=0, abs=within)
        return ""
    fitting = [set_up.refusal] if set_up.refusal else ["--batch_size 1"] * may_differ
    fitting += ["can't score a text alone"] * (expected is not None and None in expected)
    assert any(words in said for words in fitting), said
    assert "\n" not in said
    return said


def any_set_up(choose: random.Random) -> SetUp:
    family = choose.choice([*DECODERS, *ENCODERS, *READ_EOS, *DIFFER, *OWN_FORWARD])
    decoder = family in DECODERS
    # A leak of padding that is as small as rounding can't be told from it
    dtypes = ["float32"] if family in (*DIFFER, "mean") else ["float32", "bfloat16", "float16"]
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
        dtype=choose.choice(dtypes),
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


# Of which no tiny one can be built, or that read pictures or the places of words beside the text
NOT_SWEPT = {"Esm", "LayoutLMv2", "LayoutLMv3", "Lilt", "Perceiver"}


@pytest.mark.long
def test_every_class_of_transformers(tmp_path):
    """Each is scored as it scores alone, those that the docs list with a batch size of 1 alone."""
    names = {name for own in CLASSES.values() for name in ([own] if isinstance(own, str) else own)}
    families = {name.removesuffix("ForSequenceClassification") for name in names} - NOT_SWEPT
    differ = set()
    for family in sorted(families):
        for batch_size in (4, 1):
            (tmp_path / "made").mkdir()
            set_up = SetUp(family, batch_size=batch_size)
            said = check(set_up, tmp_path / "made", tmp_path, TEXTS, may_differ=batch_size > 1)
            differ |= {family} if said else set()
            shutil.rmtree(tmp_path / "made")
    page = (Path(__file__).resolve().parents[1] / "docs" / "guide" / "reward-models.md").read_text()
    listed = re.search(r"read their padding: (.*?)\.\n", page, re.S)
    assert listed is not None
    assert set(re.findall(r"\w+", listed[1])) == differ
    assert f"{len(families)} classes" in page


# What a pad token does to it: one that is none, or that ends the conversation, on either side
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
        SetUp("unsaid"),
        SetUp("last", batch_size=1),
    ],
    ids=str,
)
def test_a_score_is_what_the_model_gives_one_conversation_alone(set_up, tmp_path, kept):
    assert check(set_up, tmp_path, kept, [*TEXTS, *TYPED]) == ""


# What can't be scored, and the words that say so, before any row is
REFUSED = {
    "a head that reads the last position": (SetUp("last"), "--batch_size 1"),
    "a mean over positions and padding": (SetUp("mean"), "--batch_size 1"),
    "an encoder that shifts its tokens": (SetUp("MobileBert"), "--batch_size 1"),
    "several outputs": (SetUp("Llama", outputs=3), "has 3 outputs, but a reward model has one"),
    "a reward a token": (SetUp("token"), "gives a reward for each token or step"),
    "logits (B,)": (SetUp("flat"), r"gives logits of shape \(1,\) for 1 texts"),
    "a tuple": (SetUp("tuple"), "gives a tuple without `logits` for 1 texts"),
    "nothing": (SetUp("nothing"), "gives a NoneType without `logits`"),
    "logits (B, T)": (SetUp("tokens"), "gives a reward for each token or step"),
    "more outputs than it says": (SetUp("two"), "has 2 outputs, .* LABEL is one of LABEL_0, LABEL_1"),
    "a forward that raises": (SetUp("raises"), r"can't score a text alone \(KeyError: 'pixel_values'\)"),
}


@pytest.mark.parametrize(("set_up", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(set_up, words, tmp_path, kept):
    assert re.search(words, check(set_up, tmp_path, kept, TEXTS))


def test_it_is_refused_as_soon_as_it_is_opened(tmp_path, kept):
    """As of `eval_scorer`, which scores nothing before the model has been trained for a while."""
    model = build_set_up(SetUp("last"), tmp_path, kept)
    with pytest.raises(UserError, match="--batch_size 1"):
        open_scorers([str(model)], trust_remote_code=True)


@pytest.mark.parametrize(("family", "dtype"), [
    ("last", "float32"), ("last", "float16"), ("last", "bfloat16"), ("mean", "float32"), ("mean", "float16"),
])  # fmt: skip
def test_scores_far_from_0_hide_no_leak(family, dtype, tmp_path, kept):
    """Where scores are such as 15.4 and 15.6, a leak changes their order, and a hundredth of their size."""
    model = build_set_up(SetUp(family), tmp_path, kept)
    state = load(model / "model.safetensors")
    save(state | {"value.bias": torch.full((1,), 15.0)}, model / "model.safetensors")
    rows, own = rows_of(SetUp(family), TEXTS), {"dtype": dtype, "trust_remote_code": True}
    with pytest.raises(UserError, match="--batch_size 1"):
        open_scorers([str(model)], **own).score_rows(rows)
    assert not open_scorers([str(model)], batch_size=1, **own).score_rows(rows).failed


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def process_reward_model(model: Path) -> None:
    """As TRL's PRM trainer saves it: a token classifier, of which the head has the name that a reward model's has."""
    edit(model / "config.json", architectures=["LlamaForTokenClassification"])


def head_of_another_size(model: Path) -> None:
    edit(model / "config.json", id2label=None, num_labels=1)
    save(load(model / "model.safetensors") | {"score.weight": torch.ones(2, 32)}, model / "model.safetensors")


def too_many_tokens(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["Why"])
    tokenizer.save_pretrained(model)


def adapter_of_a_language_model(model: Path) -> None:
    edit(model / "adapter_config.json", task_type=None, modules_to_save=None)
    without_its_head(model)


def without_its_head(model: Path) -> None:
    weights = {key: tensor for key, tensor in load(model / "adapter_model.safetensors").items() if "score" not in key}
    save(weights, model / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("set_up", "change", "words"),
    [
        (SetUp("Llama"), process_reward_model, "gives a reward for each token or step"),
        (SetUp("Llama"), head_of_another_size, r"no classification head of the size .* \(score.weight has another in"),
        (SetUp("Llama"), too_many_tokens, r"its tokenizer gives the token 384 \('Why'\), but the model has 384 rows"),
        (SetUp("Llama"), lambda model: edit(model / "config.json", pad_token_id=384), "Padding_idx must be within"),
        (SetUp("Llama", adapter="score"), adapter_of_a_language_model, r"no classification head \(score.weight m"),
        (SetUp("Llama", adapter="score"), without_its_head, "the adapter in .* could not be put on .*score.weight"),
        (
            SetUp("Llama", adapter="score"), lambda model: edit(model / "adapter_config.json", task_type="TOKEN_CLS"),
            "gives a reward for each token or step",
        ),
        (
            SetUp("Llama", adapter="whole"), lambda model: edit(model / "adapter_config.json", r=3),
            "the adapter in .* could not be put on",
        ),
    ],
)  # fmt: skip
def test_what_is_refused_of_its_files(set_up, change, words, tmp_path, kept):
    model, rows = build_set_up(set_up, tmp_path, kept), rows_of(set_up, TEXTS)
    assert not open_scorers([str(model)]).score_rows(rows).failed  # as it was
    change(model)
    with pytest.raises(UserError, match=words):
        open_scorers([str(model)]).score_rows(rows)


def test_conversations_longer_than_the_window(tmp_path, kept, caplog):
    """They keep their BOS, from which an encoder's score is read, and their end; RoBERTa's window is its own."""
    set_up = SetUp("Roberta", template=None, adds="<s> $A <|im_end|>")
    model = build_set_up(set_up, tmp_path, kept)
    edit(model / "tokenizer_config.json", model_max_length=None)
    row = {"prompt": "Why? " * 300, "completions": ["Yes.", "No, never at all."]}
    found = open_scorers([str(model)], batch_size=2).score_rows([row, row | {"prompt": "a"}])
    assert not found.failed
    assert "2 of 4 texts, of up to" in caplog.text
    assert "were cut to their last 511, its window" in caplog.text  # 512 positions, from the pad token's 0 on
    tokenizer, own = AutoTokenizer.from_pretrained(model), AutoModelForSequenceClassification.from_pretrained(model)
    for completion, score in zip(row["completions"], found.rows[0]["rewards"], strict=True):
        ids = tokenizer(row["prompt"] + completion, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            expected = own.eval()(input_ids=torch.tensor([[1, *ids[-509:], 3]])).logits.item()
        assert score == pytest.approx(expected, abs=1e-4)


def test_scores_that_are_not_finite_are_called_so(tmp_path, kept):
    model = build_set_up(SetUp("Llama"), tmp_path, kept)
    weights = load(model / "model.safetensors")
    save(weights | {"score.weight": weights["score.weight"] * math.nan}, model / "model.safetensors")
    failed = open_scorers([str(model)]).score_rows(rows_of(SetUp("Llama"), TEXTS)).failed
    assert all("gave nan for completion 0; a score must be a finite number" in why for why in failed.values())
    assert len(failed) == 2


def test_one_that_is_not_finite_leaves_the_others_compared(tmp_path, kept):
    model = build_set_up(SetUp("Llama"), tmp_path, kept)
    weights = load(model / "model.safetensors")
    weights["model.embed_tokens.weight"][AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("Z")] = math.nan
    save(weights, model / "model.safetensors")
    rows = [*rows_of(SetUp("Llama"), TEXTS), *rows_of(SetUp("Llama"), ["A", "ZZ", "B, and more"])]
    shard = open_scorers([str(model)]).score_rows(rows)
    assert len(shard.failed) == 1
    assert len(shard.rows) == len(rows) - 1


def test_an_adapter_of_the_hub(tmp_path, kept, monkeypatch):
    """From the cache that a download leaves, without a network."""
    set_up = SetUp("Llama", adapter="score")
    model, rows = build_set_up(set_up, tmp_path, kept), rows_of(set_up, TEXTS)
    cached = tmp_path / "hub" / "models--someone--reward"
    shutil.copytree(model, cached / "snapshots" / ("a" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    for constant in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.TRANSFORMERS_CACHE"):
        monkeypatch.setattr(constant, str(tmp_path / "hub"), raising=False)
    own, hub = (open_scorers([name]).score_rows(rows) for name in (str(model), "someone/reward"))
    assert [row["rewards"] for row in hub.rows] == [row["rewards"] for row in own.rows]
    assert "score_reward" in hub.rows[0]


@pytest.mark.slow
@pytest.mark.parametrize("pad_token", [None, "<pad>"])
@pytest.mark.parametrize("peft", [False, True])
def test_what_trls_reward_trainer_saves(peft, pad_token, tmp_path):
    """Trained, saved and scored here, against the trainer's own model on one conversation; EOS ends the template."""
    from peft import LoraConfig
    from trl import RewardConfig, RewardTrainer

    tokenizer = build_tokenizer("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    tokenizer.pad_token = pad_token
    language_model = build_model(tokenizer)
    language_model.config.pad_token_id = None
    language_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    data = reward_rows(8, k=2)
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completions"][0], "rejected": row["completions"][1]} for row in data
    ]
    config = RewardConfig(
        output_dir=str(tmp_path / "run"), max_steps=2, learning_rate=0.05, report_to="none", bf16=False, use_cpu=True,
        per_device_train_batch_size=4, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], r=2) if peft else None
    trainer = RewardTrainer(
        model=str(tmp_path / "base"), args=config, train_dataset=Dataset.from_list(pairs), peft_config=lora
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "reward"))
    assert (tmp_path / "reward" / "adapter_config.json").exists() == peft
    shard = open_scorers([str(tmp_path / "reward")]).score_rows(data)
    model = trainer.model.eval()
    for row, scored in zip(data, shard.rows, strict=True):
        for completion, score in zip(row["completions"], scored["rewards"], strict=True):
            ids = tokenizer.apply_chat_template(row["prompt"] + completion, return_tensors="pt", return_dict=False)
            with torch.inference_mode():
                assert score == pytest.approx(model(input_ids=ids).logits.item(), abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ties_by_rounding_are_counted_and_said(dtype, tmp_path, kept, capsys):
    """Of 80 answers that differ in a letter: bfloat16 has too few numbers for their scores."""
    model = build_set_up(SetUp("Llama"), tmp_path, kept)
    answers = [[{"role": "assistant", "content": f"The answer {chr(c)}"}] for c in range(40, 120)]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": turns("Why?"), "completions": answers}) + "\n")
    flags = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main([*flags, "--scorer", str(model), "--dtype", dtype]) == 0
    said = capsys.readouterr().err
    scores = json.loads((tmp_path / "out.jsonl").read_text())["rewards"]
    ties = sum(a == b for i, a in enumerate(scores) for b in scores[:i])
    assert (ties > 0) == (dtype == "bfloat16")
    assert f"ties: {ties} of {math.comb(80, 2):,} pairs" in said
    assert ("models ran in bfloat16, which rounds scores: `--dtype float32`" in said) == (ties > 0)
