"""The options of reading data, as keywords of `load_reward_dataset` and as command-line flags."""

import json
import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from ..errors import UserError
from ..options import option
from .columns import COLUMNS_HELP, parse_columns

DEFAULT_SCORE = "overall_score"


@dataclass
class DataOptions:
    """How a data set becomes rewarded completions; every field is also a flag of `scripts/train.py`.

    Raises:
        ValueError: a value outside what the field takes.
    """

    score: str = option(
        "Which score is the reward. Raw UltraFeedback: `overall_score`, `mean_aspects` (mean of the aspect "
        "ratings), an aspect such as `honesty`, or another field of the completion. `rewards` with names: one of them. "
        "Flat scored rows: a column name; by default the first there is of `reward`, `score`, `overall_score`, "
        "`helpfulness`, `label`.",
        DEFAULT_SCORE,
    )
    reward_weights: dict[str, float] | str | list[float] | None = option(
        "Weights of several rewards, instead of `score`: the weighted sum is the reward. A JSON object by name such as "
        """'{"helpfulness": 0.7, "verbosity": -0.1}', or a list in the data's order.""",
        None,
    )
    scale_rewards: Literal["none", "group", "batch"] = option(
        "Subtract the prompt's mean from its rewards, and divide by their standard deviation, as in GRPO. That is the "
        "deviation within the prompt (`group`) or over the split (`batch`). α is then in this unit.",
        "none",
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = option(
        "Scale the weighted sum by `scale_rewards`, as in GRPO. Or scale each reward within its prompt, and then the "
        "sum over the split, as in GDPO.",
        "sum_then_normalize",
    )
    on_missing: Literal["raise", "leave_out"] = option(
        "A completion may lack one of the rewards of `reward_weights`. Its row is then invalid (`raise`), or goes "
        "without this reward and is counted (`leave_out`).",
        "raise",
    )
    preference: Literal["scores", "hard"] = option(
        "Rewards of a chosen/rejected pair: its scores where it has them (`scores`), or 1 and 0 (`hard`).", "scores"
    )
    on_invalid: Literal["raise", "drop"] = option(
        "An invalid row stops the run (`raise`), or is dropped and counted by cause (`drop`).", "raise"
    )
    score_bug: Literal["repair", "drop"] = option(
        "Raw UltraFeedback turned some overall scores of 1 into 10. A mean aspect rating of 2 or less shows it. Set "
        "them back to 1 (`repair`), or leave the completion out (`drop`). Counted either way.",
        "repair",
    )
    exclude_sources: list[str] = option(
        "Values of the column `source` whose rows are left out and counted, such as `truthful_qa`, which "
        "contaminates raw UltraFeedback.",
        [],
    )
    chat_template_kwargs: dict[str, Any] | str | None = option(
        "Arguments of the chat template for every row, a JSON object such as "
        """'{"enable_thinking": false}'. A row's own column `chat_template_kwargs` comes first.""",
        None,
    )
    min_completions: int | None = option(
        "Fewest completions of a row; by default two to compare, or one with `loss_type: outcome`.", None
    )
    labels: bool = option(
        "Rewards are labels from 0 (wrong) to 1 (right), and others are invalid; so with `loss_type: outcome`.", False
    )
    validation_fraction: float = option(
        "Share of the prompts held out as the split `validation` where the data has a training split alone. It is "
        "rounded down to whole prompts, and 0 holds out none. Streams are never cut.",
        0.05,
    )
    validation_seed: int = option("Which prompts are held out; another seed holds out others.", 0)
    columns: list[str] = option(COLUMNS_HELP, [], action="extend")

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise UserError(f"`{name}` is {getattr(self, name)!r}; it must be one of {', '.join(get_args(kind))}")
        self.columns = parse_columns(self.columns)
        if not isinstance(self.exclude_sources, (list, tuple)):
            raise UserError(f"`exclude_sources` is {self.exclude_sources!r}; it must be a list of names")
        if isinstance(self.chat_template_kwargs, str):
            with suppress(json.JSONDecodeError):  # refused below
                self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
        if not isinstance(self.chat_template_kwargs, (dict, type(None))):
            raise UserError(
                f"`chat_template_kwargs` is {self.chat_template_kwargs!r}; it must be a JSON object such as "
                """{"enable_thinking": false}"""
            )
        self._check_weights()
        if self.labels and (name := self.rescales) is not None:
            raise UserError(
                f"`{name}` is {getattr(self, name)}, but the rewards are labels from 0 to 1 (`loss_type: outcome` or "
                "`labels`). It would change them, so right completions could count as wrong. Leave it out."
            )
        if self.min_completions is not None and self.min_completions < 1:
            raise UserError(f"`min_completions` is {self.min_completions}; it must be at least 1")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(
                f"`validation_fraction` is {self.validation_fraction}; it must be at least 0 and less than 1"
            )

    def _check_weights(self) -> None:
        weights = self.reward_weights
        if isinstance(weights, str):
            with suppress(json.JSONDecodeError):  # refused below
                weights = self.reward_weights = json.loads(weights)
        if weights is None:
            if self.multi_objective_aggregation != "sum_then_normalize":
                raise UserError("`multi_objective_aggregation` is normalize_then_sum, which needs `reward_weights`")
            return
        values = list(weights.values()) if isinstance(weights, dict) else weights
        if not isinstance(values, list) or not all(_is_weight(value) for value in values) or not any(values):
            raise UserError(
                f"`reward_weights` is {weights!r}; it must be finite numbers, not all 0: a JSON object by name such as "
                """{"helpfulness": 0.7, "verbosity": -0.1}, or a list in the data's order"""
            )
        if isinstance(weights, dict):
            self.reward_weights = {str(name): float(weight) for name, weight in weights.items()}
        if self.score != DEFAULT_SCORE:
            raise UserError(
                f"`score` is {self.score!r} and `reward_weights` is {json.dumps(weights)}; give one of them"
            )
        if self.multi_objective_aggregation == "normalize_then_sum" and self.scale_rewards != "none":
            raise UserError(
                f"`scale_rewards` is {self.scale_rewards}, which has no effect where `multi_objective_aggregation` is "
                "normalize_then_sum; leave one of them out"
            )

    def for_losses(self, names: Iterable[str]) -> Self:
        """These options for a training by losses of these names, which may read rewards as labels, of one completion.

        Raises:
            UserError: they would change the labels.
        """
        from ..losses import LABELS  # late: loads torch

        names = {str(name).lower() for name in names}
        least = 1 if names <= LABELS and self.min_completions is None else self.min_completions
        return replace(self, labels=self.labels or not LABELS.isdisjoint(names), min_completions=least)

    @property
    def rescales(self) -> str | None:
        """The option by which rewards are no longer the data's own or their weighted sum; None without one."""
        return next((name for name in self.combination if name != "reward_weights"), None)

    @property
    def combination(self) -> dict[str, Any]:
        """The options that make a completion's reward of several or of a scaled one, where they differ from none."""
        names = ("reward_weights", "scale_rewards", "multi_objective_aggregation", "on_missing")
        usual = {own.name: own.default for own in fields(DataOptions) if own.name in names}
        return {name: value for name in names if (value := getattr(self, name)) != usual[name]}

    @property
    def weights(self) -> dict[str, float]:
        """`reward_weights` by name; none for one reward a completion, nor for a list until the data is read."""
        return self.reward_weights if isinstance(self.reward_weights, dict) else {}

    def of_data(self) -> "DataOptions":
        """These fields alone, where a command's options have more: no others may be in the key of what is cached."""
        return DataOptions(**{own.name: getattr(self, own.name) for own in fields(DataOptions)})


def _is_weight(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
