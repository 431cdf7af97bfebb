"""Rows that hold token ids, under the names that TRL and verl have for them: as `prompt`, `completions` and a mask.

A row is a prompt with K completions and `rewards`, or one completion with its score, as other flat rows are.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset, LargeList, List, Value

from ..errors import UserError, notify
from .columns import code_revision
from .messages import content_kind
from .validation import RowError

MASK = "completion_mask"
_LIST = List(Value("int8"))
_FIRST_ROWS = 64  # that are looked at
_RUN = 3  # tokens alike that look like padding
# Ours first. TRL 1.16: what a rollout function returns, and `GRPOTrainer`'s batches. verl: `AgentLoopOutput` of
# verl/experimental/agent_loop/agent_loop.py, and the `DataProto` that it becomes
_PROMPTS = ("prompt_ids", "prompts")
_COMPLETIONS = ("completion_ids", "response_ids", "responses")
_MASKS = (MASK, "env_mask", "tool_mask", "response_mask")
_SCORES = ("reward_score",)
_SCORES_BY_TOKEN = ("rm_scores", "token_level_scores")
# verl's, of prompt and completion; and TRL's of the prompt, whose batches have a `completion_mask` for the completion's
_PADDING, _PROMPT_PADDING = "attention_mask", "prompt_mask"
ID_COLUMNS = {"prompt", "completion", "completions", *_PROMPTS, *_COMPLETIONS, *_MASKS, _PADDING, _PROMPT_PADDING}


def with_plain_ids(
    dataset: Dataset | IterableDataset, name: str, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """`dataset` with its token ids as `prompt` and `completions` or `completion`; itself where there are none.

    Text beside them gives way: the ids are what the model read and wrote. Where a row has several masks, as TRL's
    batches do (padding in `completion_mask`, tools in `tool_mask`), the model wrote what has 1 in each. Padding goes by
    verl's `attention_mask` or TRL's `prompt_mask` and `completion_mask`. verl's scores by token are summed.

    Args:
        dataset: one split, or a stream.
        name: of the split, for the progress bar.
        num_proc: processes to map with.

    Raises:
        UserError: a mask of padding has another length than the ids that it is of; or no mask is there by a known name,
            but a column with `mask` in its name looks like one.
    """
    features = dataset.features
    row: Mapping[str, Any] = next(iter(dataset), {}) if features is None else features
    prompt = _first(_PROMPTS, row)
    completion = _first(_COMPLETIONS, row)
    if prompt is None or completion is None:
        return dataset
    if not (content_kind(row[prompt]) == "token ids" if features is None else _of_ids(features[prompt])):
        return dataset
    names = {prompt: "prompt", completion: "completions" if "rewards" in row else "completion"}
    masks = [own for own in _MASKS if own in row]
    if not masks:
        _refuse_other_masks(dataset, name, prompt, completion)
    others = masks[1:]
    if masks:
        names[masks[0]] = MASK
    if score := _first(_SCORES, row):
        names[score] = "reward"
    by_token = None if score or {"reward", "rewards"} & row.keys() else _first(_SCORES_BY_TOKEN, row)
    if by_token:
        names[by_token] = "reward"
    dataset = dataset.remove_columns([new for old, new in names.items() if new in row and new != old])
    dataset = dataset.rename_columns({old: new for old, new in names.items() if old != new})
    paddings = [own for own in (_PADDING, _PROMPT_PADDING) if own in row]
    if not paddings and "rewards" not in row:
        _tell_of_padding(dataset, name, prompt, 1)
        if not masks:
            _tell_of_padding(dataset, name, completion, -1)
    if not paddings and not others and not by_token:
        return dataset
    features = dataset.features
    if features is not None and by_token:
        features = Features({**features, "reward": Value("float64")})
    if features is not None and others:
        features = Features({**features, MASK: _LIST if names[completion] == "completion" else List(_LIST)})
    if features is not None:
        features = Features({own: features[own] for own in features if own not in (*others, *paddings)})
    arguments: dict[str, Any] = {"num_proc": num_proc, "desc": f"Reading the token ids of {name}"}
    return dataset.map(
        _plain,
        with_indices=True,
        features=features,
        remove_columns=[*others, *paddings],
        fn_kwargs={"others": others, "name": name, "by_token": bool(by_token), "revision": code_revision()},
        **(arguments if isinstance(dataset, Dataset) else {}),
    )


def _refuse_other_masks(dataset: Dataset | IterableDataset, name: str, prompt: str, completion: str) -> None:
    """Refuse a mask by another name, without which all tokens would be trained on, and tell of what resembles one.

    What most rows have decides, so that a broken row hides no mask.
    """
    rows = [row for row in itertools.islice(dataset, _FIRST_ROWS) if row.get(prompt) and row.get(completion)]
    known = {prompt, completion, _PADDING, _PROMPT_PADDING, *_SCORES_BY_TOKEN, "special_tokens_mask"}
    for own in dict.fromkeys(column for row in rows for column in row if column not in known):
        given = [(row[own], _masked(row[own], row[prompt], row[completion])) for row in rows if row.get(own)]
        for part, count in Counter(of for _, of in given).most_common(1):
            present = {value for values, of in given if of == part for value in _values(values)}
            if part is None or 2 * count <= len(given) or not any(present):
                continue
            if "mask" in own:
                fix = f"map it by `--columns {MASK}={own}`"
                if part != "the completion":
                    fix = f"give the completion's part of it as `{MASK}`"
                raise UserError(
                    f"`{name}`: `{own}` looks like a mask of the tokens of {part}, but no mask has this name. All "
                    f"tokens would be trained on, so {fix}, or take the column out."
                )
            if len(present) == 2 and float not in map(type, present):
                notify(
                    f"`{name}`: `{own}` has 0 or 1 for each token of {part}, and is not read: all tokens are trained "
                    f"on. If it says which ones the model wrote, give the completion's as `{MASK}`."
                )


def _masked(values: Any, prompt: Any, completion: Any) -> str | None:
    """What 0 and 1 in `values` might mask of a row, or of each of its K completions."""
    if completion and isinstance(completion[0], list):
        if not isinstance(values, list) or len(values) != len(completion):
            return None
        parts = {_masked(own, prompt, ids) for own, ids in zip(values, completion, strict=True)}
        return parts.pop() if len(parts) == 1 else None
    if not isinstance(values, list):
        return None
    if not all(isinstance(value, (bool, int, float)) and value in (0, 1) for value in values):
        return None
    lengths = {len(prompt) + len(completion): "prompt and completion", len(completion): "the completion"}
    return lengths.get(len(values))


def _values(values: Any) -> list[Any]:
    return list(itertools.chain.from_iterable(map(_values, values))) if isinstance(values, list) else [values]


def _tell_of_padding(dataset: Dataset | IterableDataset, name: str, field: str, step: int) -> None:
    """Notify where ids look padded at their beginning (`step` 1) or end (-1), of which no column tells."""
    key = "prompt" if step == 1 else "completion"
    rows = [own[key][::step] for own in itertools.islice(dataset, _FIRST_ROWS) if isinstance(own[key], list)]
    runs = [ids[0] for ids in rows if len(ids) >= _RUN and len({*ids[:_RUN]}) == 1]
    if len({*map(len, rows)}) == 1 and 0 < len(runs) < len(rows) and len({*runs}) == 1:
        notify(
            f"`{name}`: `{field}` looks padded by the id {runs[0]}: all rows are of one length. Nothing tells padding "
            "from text here, so it is read as text; take it out, or give an `attention_mask` of prompt and completion."
        )


def _of_ids(feature: Any) -> bool:
    return isinstance(feature, (List, LargeList)) and "int" in getattr(feature.feature, "dtype", "")


def _first(names: Sequence[str], row: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in row), None)


def _plain(
    row: dict[str, Any], index: int, others: list[str], name: str, by_token: bool, revision: str
) -> dict[str, Any]:
    key = "completion" if "completion" in row else "completions"
    columns = {own: row.get(own) for own in (key, MASK, *others, _PADDING)}
    if key == "completion":  # as K = 1
        columns = {own: None if value is None else [value] for own, value in columns.items()}
    prompt, completions, seen = row["prompt"], columns[key] or [], columns[_PADDING]
    masks: list[Any] = [columns[own] for own in (MASK, *others) if columns[own] is not None]
    found: dict[str, Any] = {"reward": float(sum(row["reward"]))} if by_token else {}
    if not all(isinstance(ids, list) for ids in (prompt, *completions)):
        return found  # refused as other rows are, and so is what stands here
    for own in masks:
        if not isinstance(own, list) or len(own) != len(completions):
            return found | {MASK: own}
    real, ends = row.get(_PROMPT_PADDING), bool(others) or _PROMPT_PADDING in row
    where = f"`{name}`, row {index}"
    own_prompt = (
        prompt if real is None else list(itertools.compress(prompt, _checked(real, prompt, _PROMPT_PADDING, where)))
    )
    read = []
    for k, ids in enumerate(completions):
        own_masks, own_ids = [mask[k] for mask in masks], ids
        if seen is not None:
            whole = _checked(seen[k] if k < len(seen) else None, prompt + ids, _PADDING, where)
            if real is None and k == 0:
                own_prompt = list(itertools.compress(prompt, whole))
            kept = whole[len(prompt) :]
            own_ids = list(itertools.compress(ids, kept))
            own_masks = [
                list(itertools.compress(mask, kept)) if len(mask or ()) == len(ids) else mask for mask in own_masks
            ]
        read.append(_written(own_ids, own_masks, ends))
    found |= {"prompt": own_prompt, key: [ids for ids, _ in read]}
    if masks:
        found[MASK] = [mask for _, mask in read]
    if key == "completion":
        found |= {own: found[own][0] for own in (key, MASK) if own in found}
    return found


def _checked(seen: Any, ids: list[int], field: str, where: str) -> list[int]:
    """`seen`, a mask of padding.

    Raises:
        UserError: it isn't one value for each of `ids`.
    """
    if not isinstance(seen, list) or len(seen) != len(ids):
        count = len(seen) if isinstance(seen, list) else 0
        parts = "prompt" if field == _PROMPT_PADDING else "prompt and completion"
        raise UserError(f"{where}: `{field}` has {count} values for {len(ids)} tokens of {parts}; give one each")
    return seen


def _written(ids: list[int], masks: list[Any], ends: bool) -> tuple[list[int], Any]:
    """A completion's ids and where its masks are all 1; with `ends` up to the first one's last 1, behind which is
    padding."""
    masks = [[1] * len(ids) if mask is None else mask for mask in masks]
    for mask in masks:
        if not isinstance(mask, list) or len(mask) != len(ids) or any(value not in (0, 1) for value in mask):
            return ids, mask  # `check_masks` refuses it
    if not masks:
        return ids, None
    end = max((i + 1 for i, value in enumerate(masks[0]) if value), default=len(ids)) if ends else len(ids)
    return ids[:end], [int(all(values)) for values in zip(*masks, strict=True)][:end]


def check_masks(masks: Any, prompt: Any, completions: Sequence[Any]) -> None:
    """Refuse a `completion_mask` that isn't K lists of 0 and 1, as long as the token ids that it stands beside.

    None in the place of one, or of all, is a completion that the model wrote all of.

    Raises:
        RowError: for the first thing that is wrong.
    """
    if masks is None:
        return
    if content_kind(prompt) != "token ids":
        raise RowError(MASK, "mask without token ids", "stands beside text; it needs `prompt_ids` and `completion_ids`")
    if not isinstance(masks, list) or len(masks) != len(completions):
        count = len(masks) if isinstance(masks, list) else 0
        raise RowError(MASK, "unequal lengths", f"has {count} values for {len(completions)} completions; give one each")
    for k, (mask, completion) in enumerate(zip(masks, completions, strict=True)):
        if mask is None:
            continue
        here = f"{MASK}[{k}]"
        if not isinstance(mask, list) or any(value not in (0, 1) for value in mask):
            raise RowError(here, "wrong type", "must be a list of 0 and 1, with 1 for each token that the model wrote")
        if len(mask) != len(completion):
            raise RowError(
                here, "unequal lengths", f"has {len(mask)} values for {len(completion)} tokens of the completion; "
                "give one each",
            )  # fmt: skip
        if not any(mask):
            raise RowError(here, "nothing to train on", "has no 1, so nothing is trained on; leave the completion out")
