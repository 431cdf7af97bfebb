"""What each judge asks and reads: its questions at the Hub, its temperatures, and the records of its file of answers.

The tools and their formats: AlpacaEval 2 (https://github.com/tatsu-lab/alpaca_eval), MT-bench
(https://github.com/lm-sys/FastChat, fastchat/llm_judge) and Arena-Hard v2 (https://github.com/lmarena/arena-hard-auto).
"""

import functools
import hashlib
import json
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# FastChat's `temperature_config` (fastchat/llm_judge/common.py); what isn't there is answered at 0.7, as it does.
MT_BENCH_TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip


class Judge(NamedTuple):
    """What one judge asks, and what it reads.

    Args:
        hub: repository of the Hub, its type, and the file in it with the questions.
        columns: that a row of questions needs, the question itself last.
        suffix: ending of the file of answers.
        max_new_tokens: tokens an answer, as most of the judge's own runs have it.
        temperature: of a row of questions.
        record: (row, answers in the order of the turns, model's name) to what goes into the file.
    """

    hub: tuple[str, str, str]
    columns: tuple[str, ...]
    suffix: str
    max_new_tokens: int
    temperature: Callable[[dict], float]
    record: Callable[[dict, list[str], str], dict]

    def turns(self, row: dict) -> list[str]:
        """What a row asks, turn by turn."""
        question = row[self.columns[-1]]
        return (question or []) if self.columns[-1] == "turns" else [question]


def _alpaca_eval(row: dict, answers: list[str], name: str) -> dict:
    return {"instruction": row["instruction"], "output": answers[0], "generator": name}


def _mt_bench(row: dict, answers: list[str], name: str) -> dict:
    return {
        "question_id": row["question_id"], "answer_id": _answer_id(name, row["question_id"]), "model_id": name,
        "choices": [{"index": 0, "turns": answers}], "tstamp": time.time(),
    }  # fmt: skip


def _arena_hard(row: dict, answers: list[str], name: str) -> dict:
    (answer,) = answers
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": {"answer": answer}}]
    return {
        "uid": row["uid"], "ans_id": _answer_id(name, row["uid"]), "model": name, "messages": messages,
        "tstamp": time.time(), "metadata": style(answer),
    }  # fmt: skip


def _answer_id(*of: Any) -> str:
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:22]


def style(answer: str) -> dict[str, Any]:
    """What Arena-Hard's style control looks at: length in tokens, and headers, lists and bold outside code blocks.

    Source: utils/add_markdown_info.py of arena-hard-auto.

    Returns:
        `token_len` (only where tiktoken can count it), `header_count`, `list_count`, `bold_count`.
    """
    text = answer
    for block in re.findall(r"```([^`]*)```", answer):
        text = text.replace(block, "")

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text, re.MULTILINE))

    encoding = gpt4o_encoding()
    tokens = {"token_len": len(encoding.encode(answer, disallowed_special=()))} if encoding else {}
    return tokens | {
        "header_count": {f"h{n}": count(rf"^#{{{n}}}\s") for n in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


@functools.cache
def gpt4o_encoding():
    """tiktoken's encoding of gpt-4o, or None where it isn't installed or can't be downloaded."""
    try:
        import tiktoken

        return tiktoken.encoding_for_model("gpt-4o")
    except (ImportError, OSError):
        return None


JUDGES = {
    "alpaca_eval": Judge(
        ("tatsu-lab/alpaca_eval", "dataset", "alpaca_eval_gpt4_baseline.json"),
        ("instruction",), ".json", 2048, lambda row: 0.7, _alpaca_eval,
    ),
    "mt_bench": Judge(
        ("lmsys/mt-bench", "space", "data/mt_bench/question.jsonl"),
        ("question_id", "category", "turns"), ".jsonl", 1024,
        lambda row: MT_BENCH_TEMPERATURES.get(row["category"], 0.7), _mt_bench,
    ),
    "arena_hard": Judge(
        ("lmarena-ai/arena-hard-auto", "dataset", "data/arena-hard-v2.0/question.jsonl"),
        ("uid", "prompt"), ".jsonl", 4096, lambda row: 0.0, _arena_hard,
    ),
}  # fmt: skip
