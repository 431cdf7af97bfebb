"""A guess at which columns of an unknown format hold what, by their names and by what is in them."""

import re
import shlex
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from .columns import paths_of, value_at
from .messages import resembles_message
from .validation import RowError, read_list, read_number

# Words of a column's name, the likeliest first, without a plural's s.
_WORDS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "query", "instruction", "problem", "input", "request", "conversation", "message",
               "context"),
    "answer": ("completion", "response", "answer", "generation", "output", "candidate", "reply", "sample", "solution"),
    "reward": ("reward", "score", "rating", "grade", "preference", "value", "quality", "label", "helpfulness"),
    "chosen": ("chosen", "preferred", "accepted", "winner", "better", "good", "positive"),
    "rejected": ("rejected", "dispreferred", "loser", "worse", "bad", "negative"),
}  # fmt: skip
_NO_CONTENT = {"id", "idx", "index", "uuid", "url", "type", "length", "num", "count"}  # `prompt_id` is no prompt
_NUMBERED = re.compile(r"(.*?[^\W\d_])_?(\d+|(?<=_)[a-h])")


class Guess(NamedTuple):
    """What the columns look like.

    Args:
        flags: of `--columns`, without what has its name already; empty where there is nothing to map or to say.
        prompts_only: no column answers the prompts.
        unscored: there are several completions a prompt, and no column rewards them.
    """

    flags: str = ""
    prompts_only: bool = False
    unscored: bool = False


def guess_columns(rows: Sequence[Mapping[str, Any]]) -> Guess:
    """What these first rows of a data set look like; nothing of what is not clear."""
    kinds: dict[str, str] = {}
    for path in paths_of(rows):
        found = {_kind(value) for row in rows if (value := value_at(row, path)) not in (None, "", [])}
        if len(found) == 1:
            kinds[path] = found.pop()
    prompt = _likeliest(kinds, "prompt", "text", "messages")
    if prompt is None:
        return Guess()
    answers = _likeliest(kinds, "answer", "texts", "conversations")
    if answers is not None:
        rewards = _likeliest(kinds, "reward", "numbers") or _of_equal_lengths(rows, kinds, answers)
        return _guess({"prompt": prompt, "completions": answers, "rewards": rewards}, unscored=rewards is None)
    texts, numbers = (_numbered(kinds, *about) for about in (("answer", "text"), ("reward", "number")))
    if len(texts) > 1:
        scored = texts.keys() == numbers.keys()
        columns: dict[str, str | None] = {"prompt": prompt, "completions": ",".join(texts.values())}
        return _guess(columns | {"rewards": ",".join(numbers.values()) if scored else None}, unscored=not scored)
    pair = {name: _likeliest(kinds, name, "text", "messages") for name in ("chosen", "rejected")}
    if all(pair.values()):
        return _guess({"prompt": prompt, **pair})
    answer, reward = _likeliest(kinds, "answer", "text"), _likeliest(kinds, "reward", "number")
    if answer is not None and reward is not None:
        return _guess({"prompt": prompt, "response": answer, "score": reward})
    alone = answer is None and not any(pair.values()) and not {"texts", "conversations", "numbers"} & {*kinds.values()}
    return _guess({"prompt": prompt}, prompts_only=True) if alone else Guess()


def _guess(columns: dict[str, str | None], **about: bool) -> Guess:
    pairs = [f"{target}={path}" for target, path in columns.items() if path not in (None, target)]
    return Guess(" ".join(map(shlex.quote, pairs)), **about)


def _likeliest(kinds: Mapping[str, str], meaning: str, *wanted: str) -> str | None:
    """The column of a wanted kind whose name says most clearly that it has this meaning."""
    ranked = {path: rank for path, kind in kinds.items() if kind in wanted and (rank := _rank(path, meaning)) < 99}
    return min(ranked, key=lambda path: ranked[path]) if ranked else None


def _rank(path: str, meaning: str) -> float:
    """0 for the likeliest name, 99 for one that says something else; `answers.text` goes by `answers`."""
    own, _, part = path.partition(".")
    if not _NO_CONTENT.isdisjoint(_words(path)):
        return 99
    if not part:
        return _place(own, meaning)
    plain = not {"text", "content", "value"}.isdisjoint(_words(part))
    return min(_place(part, meaning), _place(own, meaning) + (0 if plain else 0.5), 99)


def _place(name: str, meaning: str) -> int:
    words = _words(name)
    return next((i for i, word in enumerate(_WORDS[meaning]) if word in words), 99)


def _words(name: str) -> list[str]:
    split = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    return [
        re.sub(r"(?<!s)s$", "", word.lower().replace("queries", "query").replace("replies", "reply")) for word in split
    ]


def _of_equal_lengths(rows: Sequence[Mapping[str, Any]], kinds: Mapping[str, str], answers: str) -> str | None:
    """The only lists of numbers that are as long as the answers."""

    def lengths(path: str) -> list[int]:
        return [len(read_list(value_at(row, path) or [], path)) for row in rows]

    alike = [path for path, kind in kinds.items() if kind == "numbers" and lengths(path) == lengths(answers)]
    return alike[0] if len(alike) == 1 else None


def _numbered(kinds: Mapping[str, str], meaning: str, wanted: str) -> dict[str, str]:
    """`answer_1, answer_2 …` by their numbers."""
    found = {}
    for path, kind in kinds.items():
        if kind == wanted and (parts := _NUMBERED.fullmatch(path)) and _place(parts[1], meaning) < 99:
            found[parts[2]] = path
    return dict(sorted(found.items()))


def _kind(value: Any) -> str:
    """What a value is, also where it stands as text in a CSV's cell."""
    if isinstance(value, str):
        try:
            if value.lstrip().startswith("["):
                value = read_list(value, "")
            elif read_number(value, "") is not None:
                return "number"
        except RowError:
            return "text"
    if isinstance(value, str):
        return "text"
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        return "number"
    if not isinstance(value, list) or not value:
        return "other"
    if all(map(resembles_message, value)):
        return "messages"
    inner = {_kind(item) for item in value if item is not None}
    plurals = {"text": "texts", "number": "numbers", "messages": "conversations"}
    return plurals.get(inner.pop(), "other") if len(inner) == 1 else "other"
