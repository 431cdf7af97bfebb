"""`metric_for_best_model`: refused before a run where no evaluation of its rows can give it."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset

from ..batching.collator import RewardCollator
from ..config import NCAConfig
from ..errors import UserError, first_few, nearest
from .metrics import MetricLog
from .objective import Objective

# The first parts of what an evaluation logs of the completions; callbacks may add others
FAMILIES = frozenset({"rewards", "logratios", "logps", "target", "kl", "calibration", "outcome", "objectives"})


def check_best_metric(args: NCAConfig, eval_dataset: Any) -> None:
    """Refuse a metric of the completions that no evaluation gives, of single ones such as `rewards/accuracies`.

    Of several data sets, each metric has its data set's name before it.

    Args:
        args: of which `metric_for_best_model` is read, and the losses.
        eval_dataset: rows with `rewards`, a dict of such data sets, or None; of a stream nothing is known.

    Raises:
        UserError: it names what there is.
    """
    if args.metric_for_best_model is None or (args.eval_strategy == "no" and not args.is_unsaid("eval_strategy")):
        return
    metric = args.metric_for_best_model.removeprefix("eval_")
    if isinstance(eval_dataset, Mapping) and metric.split("/")[0] in FAMILIES | {"loss"}:
        raise UserError(
            f"`metric_for_best_model` is {args.metric_for_best_model}, but each evaluation set has its own. Give the "
            f"one of {first_few([f'{key}_{metric}' for key in eval_dataset])} that decides."
        )
    parts = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
    for key, dataset in parts.items():
        name = metric.removeprefix(f"{key}_") if key else metric
        if not isinstance(dataset, Dataset) or name.split("/")[0] not in FAMILIES or (key and name == metric):
            continue
        found = evaluated_names(args, dataset, name)
        if name not in found:
            raise UserError(
                f"`metric_for_best_model` is {args.metric_for_best_model}, which no evaluation of these rows "
                f"gives{_why(dataset) or nearest(name, found)}; use loss, or one of {first_few(sorted(found), 12)}"
            )


def evaluated_names(args: NCAConfig, dataset: Dataset, wanted: str) -> set[str]:
    """The metrics that an evaluation of these rows has, or the one that is `wanted` alone if the first rows have it."""
    weights = args.loss_weights or [1.0] * len(args.loss_type)
    objective = Objective(args.loss_type, weights, args.alpha, args.beta, args.negative_weight)
    log, collator = MetricLog(), RewardCollator(0, min_completions=1)
    columns = [name for name in dataset.column_names if name == "rewards" or name.startswith("score_")]
    for values in dataset.select_columns(columns).iter(256):
        rows = [dict(zip(columns, own, strict=True)) for own in zip(*(values[name] for name in columns), strict=True)]
        for row in rows:  # their tokens don't matter, but for lengths that differ
            row |= {"prompt_ids": [0], "completion_ids": [[0] * (k + 1) for k in range(len(row["rewards"]))]}
        batch = collator(rows)
        logps = torch.arange(batch["valid"].numel()).view(batch["valid"].shape).float()
        log.add(False, objective, logps, None, torch.zeros_like(logps), batch)
        if log.evaluation.state().get(wanted, (0, 0))[1]:
            return {wanted}
    return {name for name in log.evaluation.gather() if name.split("/")[0] in FAMILIES}


def _why(dataset: Dataset) -> str:
    single = all(
        len(own) == 1 for values in dataset.select_columns("rewards").iter(10_000) for own in values["rewards"]
    )
    return ", each of a single completion" if single else ""
