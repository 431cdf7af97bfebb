"""A tiny model and tokenizer, built here without any download, and data: this repository's, and real where it is."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import functools
import gc
import importlib.metadata
import json
import logging
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

OWN_DATA = Path(__file__).resolve().parents[1] / "data"
REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL_DATA.exists(), reason=f"real data {REAL_DATA} is not on this machine")
# Where rows come from: every test has its own, and the real ones come on top
SOURCES = ["own", pytest.param("real", marks=needs_real_data)]
SOURCES_REAL_SLOW = ["own", pytest.param("real", marks=[needs_real_data, pytest.mark.slow])]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "What is the best way to learn a language? Practise every day, and speak with other people.",
    "user assistant system Here is the answer to the question that you asked me about the weather.",
    "I think that this is a great idea! Thank you for the help, I am happy with it. 0 1 2 3 4 5 6 7 8 9",
]


# accelerate asks for it dozens of times in a trainer's life, and each time a file is read and parsed
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)


def pytest_collection_finish():
    """Keep what is imported out of every collection: accelerate collects in each `train()`, at half of its seconds."""
    gc.collect()
    gc.freeze()


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """A command shows more of its log than Python does, and less of transformers'; tests and fixtures call commands."""
    own = logging.getLogger("nca_align")
    level = own.level
    show_transformers()
    yield
    own.setLevel(level)
    show_transformers()


def show_transformers():
    """transformers' log and bars as they are by default."""
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """A cache of `datasets` for this run alone: another one may hold what older code made of the same rows."""
    folder = tmp_path_factory.mktemp("datasets-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))  # for processes that tests start
        yield folder


def build_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 tokens: every string round-trips, and common words merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>"
    )
    fast.chat_template = chat_template
    return fast


def build_model(tokenizer, seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A Llama of about 30 thousand parameters, fp32, in eval mode as `from_pretrained` leaves it."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(config | overrides))).eval()


def require_changed(args: Any, *names: str) -> None:
    """That the options of a launched run are other than their defaults."""
    from nca_align.config import changed_options

    assert {*names} <= changed_options(args)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model(tokenizer):
    return build_model(tokenizer)


@pytest.fixture(scope="session")
def model_dir(tokenizer, tmp_path_factory) -> str:
    """The tiny model and tokenizer as a folder that `from_pretrained` reads."""
    folder = tmp_path_factory.mktemp("tiny-model")
    build_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def record_nf4(run: Path, bits: int = 4, **identity) -> None:
    """What a QLoRA run's last checkpoint says of its base, as `run_record` reads it."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(bnb_4bit_quant_type="nf4", **{f"load_in_{bits}bit": True}).to_dict()
    (run / "checkpoint-2").mkdir(parents=True)
    (run / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (run / "checkpoint-2" / "nca_align.json").write_text(
        json.dumps({"complete": True, "identity": {"model.quantization_config": config, **identity}}, default=str)
    )


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def scored_rows(source: str) -> list[dict]:
    """Rows in the layout of openbmb/UltraFeedback, four completions each with a score; `source` is one of SOURCES."""
    if source == "real":
        return read_jsonl(REAL_DATA / "vicuna_k4_scored.jsonl")
    everything = read_jsonl(OWN_DATA / "study" / "words" / "train.jsonl")  # with eight completions each
    return [
        {
            "source": "own",
            "instruction": row["prompt"][0]["content"],
            "models": [f"model-{k}" for k in range(4)],
            "completions": [
                {"model": f"model-{k}", "response": completion[0]["content"], "overall_score": reward}
                for k, (completion, reward) in enumerate(zip(row["completions"], row["rewards"], strict=True))
            ],
        }
        for row in ({**row, **{name: row[name][:4] for name in ("completions", "rewards")}} for row in everything)
    ]


def pair_rows(source: str) -> list[dict]:
    """Rows in the layout of HuggingFaceH4/ultrafeedback_binarized, some with ties; `source` is one of SOURCES."""
    if source == "real":
        return read_jsonl(REAL_DATA / "ultrafeedback_pairs.jsonl")
    rows = []
    for i, row in enumerate(read_jsonl(OWN_DATA / "quickstart" / "train.jsonl")):
        scored = list(zip(row["rewards"], row["completions"], strict=True))
        chosen, rejected = sorted(scored[:2], key=lambda pair: -pair[0])
        rows.append(
            {
                "prompt": row["prompt"][0]["content"],
                "prompt_id": str(i),
                "chosen": row["prompt"] + chosen[1],
                "rejected": row["prompt"] + rejected[1],
                "score_chosen": chosen[0],
                "score_rejected": rejected[0],
            }
        )
    return rows


def reward_rows(n: int, k: int | list[int] = 4, seed: int = 0) -> list[dict]:
    """n conversational rows of K completions with distinct lengths and rewards (K may be a list to cycle)."""
    generator = torch.Generator().manual_seed(seed)
    words = " ".join(CORPUS).split()

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(words[int(i)] for i in torch.randint(len(words), (length,), generator=generator))

    rows = []
    for i in range(n):
        size = k if isinstance(k, int) else k[i % len(k)]
        rows.append(
            {
                "prompt": [{"role": "user", "content": text(3, 12)}],
                "completions": [[{"role": "assistant", "content": text(2, 14)}] for _ in range(size)],
                "rewards": torch.randn(size, generator=generator).round(decimals=3).tolist(),
            }
        )
    return rows


def labelled_rows(n: int, k: int | list[int] = 1, seed: int = 0) -> list[dict]:
    """`reward_rows` whose rewards are labels: 1, 0, and at times 0.75."""
    rows = reward_rows(n, k, seed)
    return [
        row | {"rewards": [1.0 if reward > 0.4 else 0.75 if reward > 0.1 else 0.0 for reward in row["rewards"]]}
        for row in rows
    ]


def slow_but(names: Iterable, *fast: object) -> list:
    """Parameters of which only `fast` are in the fast tests."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def planned(table: list[dict]) -> dict[tuple, set]:
    """Settings of a comparison's rows → the seeds that any of their method has, as if the grid had these."""
    from nca_align.evaluation.comparison_rows import setting_of

    seeds: dict = {}
    for row in table:
        seeds.setdefault(row["method"], set()).add(row["seed"])
    return {setting_of(row): seeds[row["method"]] for row in table}


@pytest.fixture
def own_datasets_cache(tmp_path, monkeypatch):
    """`datasets` without bars, and with a cache of this test alone."""
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
