"""Columns under other names: `columns` puts them where a format looks for them, before formats are matched."""

import glob
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, Json, LargeList, List, Value

from ..errors import UserError, nearest
from ..store.fingerprints import files_fingerprint
from .messages import resembles_message
from .validation import is_absent

PEEKED = 64  # rows looked at before the others are converted
# What formats read, but for A0, A1 …, score_A0 … and the columns that the option `score` names.
_TARGETS = (
    "prompt", "completions", "rewards", "response", "completion", "reward", "score", "chosen", "rejected",
    "score_chosen", "score_rejected", "instruction", "trajectory", "all_generated_responses", "all_rm_scores", "steps",
    "correctness", "label", "problem", "tools", "chat_template_kwargs", "source", "prompt_ids",
    "completion_ids", "completion_mask",
)  # fmt: skip
_RANKED = re.compile(r"(score_)?A\d+")
Way = tuple[str, ...]  # a column, and the names and numbers that lead into it


COLUMNS_HELP = (
    "Columns by other names, such as `prompt=question completions=answers.text rewards=answers.score`: what a format "
    "reads, and where it is. A dot leads into objects and lists, and commas make a list of columns "
    "(`completions=answer_a,answer_b`). In YAML a mapping."
)


def parse_columns(given: Any) -> list[str]:
    """The option `columns` as `target=source` texts, from those, a mapping, or a list with a mapping in it (YAML).

    Raises:
        UserError: another form, a target that no format has, or one target or source twice.
    """
    items = [given] if isinstance(given, (str, Mapping)) else given or []
    pairs: list[tuple[str, str]] = []
    for item in items if isinstance(items, Iterable) else [items]:
        if isinstance(item, str):
            target, _, source = item.partition("=")
            pairs.append((target.strip(), source.strip()))
        elif isinstance(item, Mapping):
            for target, source in item.items():
                pairs.append((str(target), ",".join(map(str, source)) if isinstance(source, list) else str(source)))
        else:
            pairs.append(("", ""))
    for target, source in pairs:
        if not target or not source or source == "None":
            raise UserError(
                f"`columns` is {given!r}; it must name a column for each target, as in `prompt=question rewards=scores`"
            )
        if target not in _TARGETS and not _RANKED.fullmatch(target):
            raise UserError(
                f"`columns` fills `{target}`, which no format reads{nearest(target, _TARGETS)}; it must be one of "
                f"{', '.join(_TARGETS)}"
            )
    for names in zip(*pairs, strict=True):
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"`columns` names `{twice}` twice; it must name each column once")
    return ["=".join(pair) for pair in pairs]


def map_columns(
    dataset: Dataset | IterableDataset, columns: Sequence[str], name: str, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """`dataset` with the columns that `columns` names, in place of their sources and of others of their names.

    An object that a part is taken from stays beside it.

    Args:
        dataset: one split, or a stream.
        columns: what `parse_columns` returns.
        name: of the split, for messages.
        num_proc: processes to map with.

    Raises:
        UserError: a source that isn't there.
    """
    if not columns:
        return dataset
    if isinstance(dataset, IterableDataset) or dataset.format["type"] is not None:
        dataset = dataset.with_format(None)
    rows = list(islice(dataset, PEEKED))
    if not rows:
        return dataset  # which is refused as empty
    sources = {
        target: _ways(target, source, rows, name) for target, _, source in (pair.partition("=") for pair in columns)
    }
    whole = {paths[0][0]: target for target, paths in sources.items() if len(paths) == 1 and len(paths[0]) == 1}
    gone = {path[0] for paths in sources.values() for path in paths if len(path) == 1} | sources.keys()
    gone &= set(rows[0])
    if isinstance(dataset, Dataset) and len(whole) == len(sources):
        return dataset.remove_columns(list(gone - whole.keys())).rename_columns(whole)
    features = None
    if dataset.features is not None:
        kept = {column: feature for column, feature in dataset.features.items() if column not in gone}
        features = Features(kept | {target: _type(dataset.features, paths) for target, paths in sources.items()})
    arguments: dict[str, Any] = {"num_proc": num_proc, "desc": f"Taking the columns of {name}"}
    return dataset.map(
        _take,
        batched=True,
        remove_columns=list(gone),
        features=features,
        fn_kwargs={"sources": sources, "revision": code_revision()},
        **(arguments if isinstance(dataset, Dataset) else {}),
    )


def _ways(target: str, source: str, rows: Sequence[Mapping[str, Any]], name: str) -> list[Way]:
    """The ways to `source`: one, or one to each of several that commas part.

    Raises:
        UserError: there is none.
    """
    if (whole := _find(source, rows)) is not None:  # a name may hold commas
        return [whole]
    ways = []
    for part in map(str.strip, source.split(",")):
        way = _find(part, rows)
        if way is None:
            known = paths_of(rows)
            raise UserError(
                f"`columns` takes `{target}` from `{part}`, which `{name}` doesn't have{nearest(part, known)}; it has "
                f"{', '.join(known)}"
            )
        ways.append(way)
    return ways


@cache
def code_revision() -> str:
    """Changes with the code of this package, so that what older code left in the cache isn't taken."""
    return files_fingerprint(f"{glob.escape(str(Path(__file__).parent))}/**/*.py")


def paths_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of some rows, and the fields of those that are objects or lists of them."""
    found: dict[str, None] = {}
    for column in dict.fromkeys(column for row in rows for column in row):
        found[column] = None
        for row in rows:
            value = read_cell(row.get(column))
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, dict) and not resembles_message(item):  # which is no table
                    found |= dict.fromkeys(f"{column}.{key}" for key in item)
    return list(found)


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """What `columns` would take from `path`, one of `paths_of`."""
    found = _find(path, [row])
    return None if found is None else _follow(row, found)


def _find(source: str, rows: Sequence[Mapping[str, Any]]) -> Way | None:
    """The way to `source`, a column or a part of one, which some row must have; None where none has it."""
    known = {column for row in rows for column in row}
    names = source.split(".")
    for length in range(len(names), 0, -1):  # a column's own name may hold dots
        path = (".".join(names[:length]), *names[length:])
        if path[0] in known and any(_reaches(row.get(path[0]), path[1:]) for row in rows):
            return path
    return None


def read_cell(value: Any) -> Any:
    """`value`, or what stands in it as JSON: a CSV's cell."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        with suppress(json.JSONDecodeError):
            return json.loads(value)
    return value


def _reaches(value: Any, path: Way) -> bool:
    if not path:
        return True
    value = read_cell(value)
    if isinstance(value, list):
        if path[0].isdigit():
            return int(path[0]) < len(value) and _reaches(value[int(path[0])], path[1:])
        return any(_reaches(item, path) for item in value)
    return (
        isinstance(value, dict) and path[0] in value and (value[path[0]] is None or _reaches(value[path[0]], path[1:]))
    )


def _follow(value: Any, path: Way) -> Any:
    if not path:
        return value
    if isinstance(value, str):  # text stays text: what is taken from JSON is JSON
        taken = _follow(read, path) if (read := read_cell(value)) is not value else None
        return taken if isinstance(taken, (str, type(None))) else json.dumps(taken)
    if isinstance(value, list):
        if path[0].isdigit():
            return _follow(value[int(path[0])], path[1:]) if int(path[0]) < len(value) else None
        return [_follow(item, path) for item in value]
    return _follow(value.get(path[0]), path[1:]) if isinstance(value, dict) else None


def _type(features: Features, paths: list[Way]) -> Any:
    """Of what is taken: one column's or part's own type, or a list of several."""
    kinds = [_type_at(features, path) for path in paths]
    if len(kinds) == 1:
        return kinds[0]
    if all(kind == kinds[0] for kind in kinds):
        return List(kinds[0])
    numbers = all(
        isinstance(kind, Value) and kind.dtype.startswith(("int", "uint", "float", "decimal")) for kind in kinds
    )
    return List(Value("float64") if numbers else Json())


def _type_at(feature: Any, path: Way) -> Any:
    if not path:
        return feature
    if isinstance(feature, dict):
        return _type_at(feature[path[0]], path[1:])
    if isinstance(feature, (List, LargeList)):
        inner = feature.feature
        return _type_at(inner, path[1:]) if path[0].isdigit() else List(_type_at(inner, path))
    return feature  # JSON, or text that holds it


def _take(batch: dict[str, list], sources: dict[str, list[Way]], revision: str) -> dict[str, list]:
    count = len(next(iter(batch.values())))
    rows = [{column: values[i] for column, values in batch.items()} for i in range(count)]
    taken = {}
    for target, paths in sources.items():
        values = [[_follow(row, path) for path in paths] for row in rows]
        taken[target] = [value[0] for value in values] if len(paths) == 1 else values
    several = [target for target in ("completions", "rewards") if len(sources.get(target, ())) > 1]
    if several == ["completions"] and "rewards" not in {*taken, *batch}:
        taken["completions"] = [[text for text in row if not is_absent(text, 0)[0]] for row in taken["completions"]]
    elif len(several) == 2:
        for i, (texts, numbers) in enumerate(zip(taken["completions"], taken["rewards"], strict=True)):
            taken["completions"][i], taken["rewards"][i] = _there(texts, numbers)
    return taken


def _there(texts: list, numbers: list) -> tuple[list, list]:
    """The answers and scores of a row's columns without the pairs of which neither is there.

    All stay where a pair is half there: the row is invalid, and its error counts from the first column.
    """
    absent = [is_absent(*pair) for pair in zip(texts, numbers, strict=False)]
    if len(texts) != len(numbers) or any(text != number for text, number in absent):
        return texts, numbers
    there = [k for k, pair in enumerate(absent) if not all(pair)]
    return [texts[k] for k in there], [numbers[k] for k in there]
