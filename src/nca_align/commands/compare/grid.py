"""The cells of a comparison: from `base` and `grid` of its YAML to a name and training options for each."""

import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig, ScriptArguments

from ...config import NCAConfig
from ...data import DataOptions
from ...data.strategies import check_strategy
from ...errors import UserError, nearest
from ...evaluation.comparison_rows import SETTINGS
from ...losses import LABELS, labels_alone, reads_alpha
from ...rewards.scorers import check_weights
from ...training.run_identity import FREE, loss_sources
from ..train.checks import name_unread
from ..train.options import TRAIN_OPTIONS, RunOptions, parse_train
from .methods import check_method

KEYS = (*SETTINGS, "seed")
_NOT_OF_TRAIN = ("method", "strategy", "num_completions")  # keys of the grid that are no options of `train`
_OPTIONAL = ("prompts", "reference_completions", "validation_steps")  # of `evaluation`: None has a meaning
_SHORT = {"method": "", "strategy": "", "learning_rate": "lr", "num_completions": "K", "reward_weights": "w"}
# Options of `train` that a comparison decides itself: for all cells alike, or by another of its keys
_SET_BY_COMPARE = {
    "output_dir", "loss_type", "loss_weights", "eval_strategy", "eval_steps", "eval_on_start", "eval_delay", "do_eval",
    "per_device_eval_batch_size", "save_strategy", "save_steps", "save_only_model", "load_best_model_at_end",
    "metric_for_best_model", "resume_from_checkpoint", "resume_changed", "push_to_hub", "disable_tqdm",
    "dataset_test_split", "dataset_streaming", *(own.name for own in fields(RunOptions) if own.name != "cpu_threads"),
}  # fmt: skip
# Options that change no figure: a finished cell stays finished when they do
_NOT_IN_IDENTITY = (FREE - {"per_device_train_batch_size", "gradient_accumulation_steps"}) | {"cpu_threads"}


@dataclass(frozen=True)
class EvaluationSettings:
    """How the cells are evaluated, the key `evaluation` of a comparison.

    Args:
        scorer: what rewards answers, as in `nca-align score`.
        scorer_weights: one a scorer, 1 by default.
        validation: the split that selection sees.
        test: the split that is reported.
        prompts: most prompts of each that are taken, its first; None for all.
        num_completions: answers a prompt.
        reference_completions: of the untrained model, by which wins are counted; None for as many.
        ranked: which of the data's completions log-ratios and ranking accuracy are of, as a strategy.
        max_new_tokens: tokens at which an answer is cut.
        steps: evaluations of a run, the last at its end and each of the others half-way to the next, from the start;
            there is one before the first step beside.
        validation_steps: how many of these evaluations, the last ones, answer the validation prompts too; None for
            all, 0 where nothing is to be chosen.
        batch_size: answers at a time.
        seed: of the answers, with a cell's own seed added: alike for all methods, and new with each seed.
    """

    scorer: list[str] = field(default_factory=list)
    scorer_weights: list[float] = field(default_factory=list)
    validation: str = "validation"
    test: str = "test"
    prompts: int | None = None
    num_completions: int = 4
    reference_completions: int | None = None
    ranked: str = "rewards"
    max_new_tokens: int = 128
    steps: int = 4
    validation_steps: int | None = None
    batch_size: int = 64
    seed: int = 42

    def __post_init__(self):
        if isinstance(self.scorer, str):
            object.__setattr__(self, "scorer", [self.scorer])
        if not self.scorer or not (isinstance(self.scorer, list) and all(isinstance(own, str) for own in self.scorer)):
            raise UserError("`scorer` is missing from `evaluation`; give what rewards answers, as `nca-align score`")
        if isinstance(self.scorer_weights, (int, float)):
            object.__setattr__(self, "scorer_weights", [self.scorer_weights])
        check_weights(self.scorer_weights, len(self.scorer))
        if not _is_whole(self.seed):
            raise UserError(f"`seed` of `evaluation` is {self.seed!r}; it must be a whole number")
        check_strategy(self.ranked)
        numbers = (
            "prompts", "num_completions", "reference_completions", "max_new_tokens", "steps", "validation_steps",
            "batch_size",
        )  # fmt: skip
        for name in numbers:
            value, least = getattr(self, name), 0 if name == "validation_steps" else 1
            if not (_is_whole(value) and value >= least) and not (value is None and name in _OPTIONAL):
                raise UserError(f"`{name}` of `evaluation` is {value!r}; it must be a whole number, at least {least}")


@dataclass(frozen=True)
class Cell:
    """One training run.

    Args:
        name: of its folder; made of the grid's values, so that it stays when others join the grid.
        settings: a value for each of `KEYS`, None where its method doesn't read it (or for all completions).
        options: of `nca-align train`.
    """

    name: str
    settings: dict[str, Any]
    options: dict[str, Any]

    def folder(self, output: Path) -> Path:
        """Where it is run, of a comparison in `output`."""
        return output / "cells" / self.name

    def identity(self) -> dict[str, Any]:
        """What decides its figures, as far as the options say, and the source of a loss of one's own."""
        kept = {key: value for key, value in self.options.items() if key not in _NOT_IN_IDENTITY}
        settings = {key: value for key, value in self.settings.items() if value is not None}
        return kept | settings | loss_sources([self.settings["method"]])


def from_mapping(kind: type, name: str, values: Any) -> Any:
    """The dataclass `kind` out of the mapping under the key `name`.

    Raises:
        UserError: no mapping, or a key that `kind` doesn't have.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"`{name}` is {values!r}; it must be a mapping in the YAML file")
    known = [own.name for own in fields(kind)]
    for key in values:
        if key not in known:
            raise UserError(f"unknown key `{key}` in `{name}`{nearest(str(key), known)}")
    return kind(**values)


def expand(base: Any, grid: Any, source: str) -> list[Cell]:
    """All cells, each once, in the order of the grid.

    A grid maps some of `KEYS` to values and stands for their product, and a list of grids for all of theirs. A key
    that a method doesn't read (α of DPO) makes no further cells of it.

    Args:
        base: options of `nca-align train` that all cells share.
        grid: a mapping, or a list of mappings.
        source: the file's name, for messages.

    Raises:
        UserError: an unknown key, a value that an option or method doesn't take.
    """
    _check_base(base)
    cells: dict[str, Cell] = {}
    with tempfile.TemporaryDirectory() as folder:
        for given in _combinations(grid):
            cell = _cell(base, given, Path(folder) / "config.yaml", source)
            cells.setdefault(repr(cell.settings), cell)
    of_labels = [cell for cell in cells.values() if labels_alone([cell.settings["method"]])]
    if len(of_labels) < len(cells):  # all cells see the same rows, also those that could learn from one completion
        for cell in of_labels:
            cell.options.setdefault("min_completions", 2)
    if of_labels and base.get("on_invalid") == "drop":  # rows that are dropped as no labels
        for cell in cells.values():
            cell.options["labels"] = True
    return list(cells.values())


def cell_options(path: Path) -> tuple[ScriptArguments, DataOptions, RunOptions, NCAConfig, ModelConfig]:
    """The options of `train` in a cell's YAML file."""
    return parse_train(["--config", str(path)], "nca-align compare")  # type: ignore[return-value]


def _check_base(base: Any) -> None:
    if not isinstance(base, Mapping):
        raise UserError(f"`base` is {base!r}; it must map options of `nca-align train` to values")
    known = {own.name for kind in TRAIN_OPTIONS for own in fields(kind)}
    for key in base:
        if key in _SET_BY_COMPARE or key in _NOT_OF_TRAIN:
            raise UserError(
                f"`base` holds `{key}`, which a comparison sets itself; leave it out (`grid`, `evaluation` and "
                "`output_dir` are its own keys)"
            )
        if key not in known:
            raise UserError(f"unknown key `{key}` in `base`{nearest(str(key), known - _SET_BY_COMPARE)}")
    for name in ("model_name_or_path", "dataset_name"):
        if not base.get(name):
            raise UserError(f"`{name}` is missing from `base`; give it as for `nca-align train`")


def _combinations(grid: Any) -> Iterable[dict[str, Any]]:
    for one in grid if isinstance(grid, list) and grid else [grid]:
        if not isinstance(one, Mapping) or not one:
            raise UserError(
                f"`grid` is {grid!r}; it must map {', '.join(KEYS)} to values, or be a list of such mappings"
            )
        for key in one:
            if key not in KEYS:
                raise UserError(f"unknown key `{key}` in `grid`{nearest(str(key), KEYS)}; it varies {', '.join(KEYS)}")
        values = [value if isinstance(value, list) else [value] for value in one.values()]
        for combination in product(*values):
            yield dict(zip(one, combination, strict=True))


def _cell(base: Mapping[str, Any], given: dict[str, Any], path: Path, source: str) -> Cell:
    if "method" not in given:
        raise UserError("`method` is missing from `grid`; give one or several, such as `method: [nca, dpo]`")
    try:
        method, strategy = check_method(given["method"], given.get("strategy"))
    except (TypeError, ValueError) as error:
        raise UserError(f"`grid` can't be run: {error}") from error
    unread = {name for name, reads in (("alpha", reads_alpha(method)), ("beta", method != "sft")) if not reads}
    count = given.get("num_completions")
    least = 1 if method in LABELS else 2
    if count is not None and not (_is_whole(count) and count >= least):
        raise UserError(f"`num_completions` in `grid` is {count!r}; it must be a whole number, at least {least}")
    if not _is_whole(given.get("seed", 0)):
        raise UserError(f"`seed` in `grid` is {given['seed']!r}; it must be a whole number")
    own = {key: value for key, value in given.items() if key not in _NOT_OF_TRAIN and key not in unread}
    options = {**base, **own}
    if labels_alone([method]):  # it decides which rows are read, and has no α
        options = {key: value for key, value in options.items() if key != "alpha"} | {"loss_type": method}
    else:
        options.pop("completion_mean", None)
    path.write_text(yaml.safe_dump(options))
    try:
        parsed = cell_options(path)
        name_unread(set(options), *parsed)
        args = parsed[3]
    except UserError as error:
        raise UserError(str(error).replace(str(path), source)) from error
    settings = {"method": method, "strategy": strategy, "num_completions": count, "seed": args.seed} | {
        key: None if key in unread else float(getattr(args, key)) for key in ("alpha", "beta", "learning_rate")
    }
    settings["reward_weights"] = _show_weights(parsed[1].reward_weights)
    settings = {key: settings[key] for key in KEYS}
    named = [f"{_SHORT.get(key, key)}{settings[key]}" for key in KEYS if key in given and settings[key] is not None]
    return Cell(re.sub(r"[^\w.+-]", "_", "-".join(named).replace(":", ".")), settings, options)


def _show_weights(weights: Any) -> str | None:
    """`helpfulness 0.7 verbosity -0.1`, as tables have it; None where the data has one reward a completion."""
    if weights is None:
        return None
    pairs = weights.items() if isinstance(weights, dict) else (("", weight) for weight in weights)
    return " ".join(f"{name} {weight:g}".strip() for name, weight in pairs)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
