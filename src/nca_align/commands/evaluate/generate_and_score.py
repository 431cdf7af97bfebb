"""`nca-align evaluate --scorer`: base and aligned models answer held-out prompts; their mean reward, KL and length."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ...data.columns import COLUMNS_HELP, parse_columns
from ...data.prompts import held_out_split_name, load_raw
from ...evaluation.evaluator import over_common_prompts, rewards_by_prompt
from ...models.loading import ModelSource
from ...options import Dtype, dtype_option, option
from ...rewards.scorers import ScorerSpec, check_weights
from ...store.files import can_be_written
from ..sample.command import sample
from ..sample.options import SampleOptions
from ..score import ScoreOptions, score
from .references import check_vocabulary
from .reward_and_kl import EvaluateOptions, PolicyMetrics, evaluate, print_policies


@dataclass(kw_only=True)
class GenerationOptions:
    """Options of `nca-align evaluate --scorer`."""

    scorer: list[str] = option("what rewards the answers, as in `nca-align score`; may repeat", action="extend")
    scorer_weights: list[float] = option("one a scorer, 1 by default", [], action="extend")
    dataset_name: str = option(
        "held-out prompts: a text file (one a line), or any file, folder or Hub id that training reads"
    )
    dataset_config: str | None = option("configuration of a data set of the Hub", None)
    split: str | None = option("split of a data set that has several; the held-out one by default", None)
    model_name_or_path: list[str] = option("the aligned model, or an adapter's folder; may repeat", action="extend")
    reference: str = option("the model before training: the table's first line, and the KL's origin")
    output: str = option("a folder for the answers, their rewards and the table; a rerun goes on there")
    num_completions: int = option("answers a prompt", 4)
    max_new_tokens: int = option("tokens at which an answer is cut", 512)
    seed: int = option("of the answers", 42)
    dtype: Dtype = dtype_option()
    trust_remote_code: bool = option("run code that comes with a model", False)
    batch_size: int = option("prompts a batch of sampling, completions one of the rest", 8)
    columns: list[str] = option(COLUMNS_HELP, [], action="extend")

    def __post_init__(self):
        self.columns = parse_columns(self.columns)
        check_weights(self.scorer_weights, len(self.scorer))


def evaluate_generations(options: GenerationOptions) -> list[PolicyMetrics]:
    """Answer, score, compare: `nca-align sample` at temperature 1 and top-p 1, `score`, and the table of `evaluate`.

    Killed and started again with the same options it goes on.

    Returns:
        The table's lines, the reference's first.

    Raises:
        UserError: whatever the user can mend, in one sentence.
    """
    folder = Path(options.output)
    with can_be_written(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for scorer in options.scorer:  # before any model answers
        ScorerSpec.parse(scorer).check(options.trust_remote_code)
    reference = ModelSource.of(options.reference, key="reference", trust_remote_code=options.trust_remote_code)
    for policy in options.model_name_or_path:
        check_vocabulary(ModelSource.of(policy, trust_remote_code=options.trust_remote_code), reference)
    models = [options.reference, *options.model_name_or_path]
    split = options.split or held_out_split_name(options.dataset_name, options.dataset_config)
    print(f"Prompts of {options.dataset_name}, split {split}", file=sys.stderr)
    shared: dict[str, Any] = {name: getattr(options, name) for name in ("dtype", "trust_remote_code", "batch_size")}
    files = []
    for i, model in enumerate(models):
        samples, scored = (str(folder / f"{i}-{Path(model).name}.{suffix}") for suffix in ("parquet", "jsonl"))
        sample(
            SampleOptions(
                dataset_name=options.dataset_name, dataset_config=options.dataset_config, split=split, output=samples,
                model_name_or_path=model, num_completions=options.num_completions,
                max_new_tokens=options.max_new_tokens, seed=options.seed, columns=options.columns, **shared,
            )
        )  # fmt: skip
        score(ScoreOptions(samples, scored, options.scorer, options.scorer_weights, **shared))
        files.append(scored)
    lines = evaluate(EvaluateOptions(files, models, options.reference, str(folder / "table.json"), **shared))
    print_policies(lines)
    rewards = [rewards_by_prompt(load_raw(file)) for file in files]
    for line, own in zip(lines[1:], rewards[1:], strict=True):
        difference, prompts = over_common_prompts(difference_of_means, own, rewards[0])
        print(
            f"reward of {line.policy} less {lines[0].policy}: {difference.text('+.3f')}, on the same {prompts} prompts"
        )
    return lines


def difference_of_means(own: Sequence[float], reference: Sequence[float]) -> float:
    """How far the mean reward of `own` is above that of `reference`."""
    return fmean(own) - fmean(reference)
