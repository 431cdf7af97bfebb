"""Rows that hold token ids, under the names that TRL and verl have for them: as `prompt`, `completions` and a mask.

A row is a prompt with K completions and `rewards`, or one completion with its score, as other flat rows are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset, LargeList, List, Value

from .columns import code_revision
from .messages import content_kind
from .validation import RowError

MASK = "completion_mask"
# Ours first. TRL: what a rollout function returns, and `GRPOTrainer`'s batches. verl: `AgentLoopOutput` and `DataProto`
_PROMPTS = ("prompt_ids", "prompts")
_COMPLETIONS = ("completion_ids", "response_ids", "responses")
_MASKS = (MASK, "env_mask", "tool_mask", "response_mask")
_SCORES = ("reward_score",)
_SCORES_BY_TOKEN = ("rm_scores", "token_level_scores")
_PADDING = "attention_mask"


def with_plain_ids(
    dataset: Dataset | IterableDataset, name: str, num_proc: int | None = None
) -> Dataset | IterableDataset:
    """`dataset` with its token ids as `prompt` and `completions` or `completion`; itself where there are none.

    Text beside them gives way: the ids are what the model read and wrote. verl's padding goes by its `attention_mask`,
    and its scores by token are summed.

    Args:
        dataset: one split, or a stream.
        name: of the split, for the progress bar.
        num_proc: processes to map with.
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
    if mask := _first(_MASKS, row):
        names[mask] = MASK
    if score := _first(_SCORES, row):
        names[score] = "reward"
    by_token = None if score or {"reward", "rewards"} & row.keys() else _first(_SCORES_BY_TOKEN, row)
    if by_token:
        names[by_token] = "reward"
    dataset = dataset.remove_columns([new for old, new in names.items() if new in row and new != old])
    dataset = dataset.rename_columns({old: new for old, new in names.items() if old != new})
    padded = _PADDING in row and names[completion] == "completion"
    if not padded and not by_token:
        return dataset
    features = dataset.features
    if features is not None and by_token:
        features = Features({**features, "reward": Value("float64")})
    arguments: dict[str, Any] = {"num_proc": num_proc, "desc": f"Reading the token ids of {name}"}
    return dataset.map(
        _plain,
        features=features,
        fn_kwargs={"padded": padded, "by_token": bool(by_token), "revision": code_revision()},
        **(arguments if isinstance(dataset, Dataset) else {}),
    )


def _of_ids(feature: Any) -> bool:
    return isinstance(feature, (List, LargeList)) and "int" in getattr(feature.feature, "dtype", "")


def _first(names: Sequence[str], row: Mapping[str, Any]) -> str | None:
    return next((name for name in names if name in row), None)


def _plain(row: dict[str, Any], padded: bool, by_token: bool, revision: str) -> dict[str, Any]:
    found: dict[str, Any] = {"reward": float(sum(row["reward"]))} if by_token else {}
    prompt, completion, seen = row["prompt"], row["completion"], row.get(_PADDING) or []
    if padded and len(seen) == len(prompt) + len(completion):
        places = {"prompt": seen[: len(prompt)], "completion": seen[len(prompt) :]}
        if row.get(MASK) is not None:
            places[MASK] = places["completion"]
        found |= {
            key: [value for value, own in zip(row[key], real, strict=False) if own] for key, real in places.items()
        }
    return found


def check_masks(masks: Any, prompt: Any, completions: Sequence[Any]) -> None:
    """Refuse a `completion_mask` that isn't K lists of 0 and 1, as long as the token ids that it stands beside.

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
        here = f"{MASK}[{k}]"
        if not isinstance(mask, list) or any(value not in (0, 1) for value in mask):
            raise RowError(here, "wrong type", "must be a list of 0 and 1, with 1 for each token that the model wrote")
        if len(mask) != len(completion):
            raise RowError(
                here, "unequal lengths", f"has {len(mask)} values for {len(completion)} tokens of the completion; "
                "give one each",
            )  # fmt: skip
        if not any(mask):
            raise RowError(
                here, "nothing to train on", "has no 1, so that nothing is trained on; leave the completion out"
            )
