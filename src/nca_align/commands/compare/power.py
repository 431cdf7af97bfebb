"""How large a difference between methods a comparison can show, before it is run and while it is."""

import math
import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean, variance

import yaml

from ...errors import UserError
from ...evaluation.comparison_rows import Row, final_values, runs_of
from ...evaluation.endpoints import endpoint_ladders, ladder_names, method_of
from ...evaluation.intervals import detectable_difference
from ...evaluation.ladder import common_kls, compare_at_kl, paired_differences
from .grid import Cell, EvaluationSettings, cell_options
from .splits import read_splits
from .tables import Endpoints, finished_rows

_KLS = 2  # that `common_kls` chooses


def power_lines(cells: Sequence[Cell], output: Path, endpoints: Endpoints, evaluation: EvaluationSettings) -> list[str]:
    """What difference in reward the seeds can show at equal KL, and what that is from and leaves out."""
    names = ladder_names(cell.settings for cell in cells)
    if len(names) < 2:
        return ["Power: fewer than two methods have two β, so that nothing is compared at equal KL."]
    seeds = min(len({own.settings["seed"] for own in cells if method_of(own.settings) == method}) for method in names)
    if seeds < 2:
        return ["Power: one seed shows no difference between methods; give each at least two."]
    kls = len(endpoints.at_kl) or _KLS
    comparisons = (len(names) - 1) * kls
    try:
        spread, source = _finished(finished_rows(cells, output), endpoints) or _sampling(cells[0], evaluation)
    except UserError as error:
        return [f"Power: not known before a cell is finished. {error}"]
    least = detectable_difference(spread, seeds, comparisons)
    return [
        f"Power: {seeds} seeds show a difference in reward of {least:.2g} at equal KL with a chance of 80% (t-test "
        f"paired by seed, two-sided 5% / {comparisons}; methods beside the reference: {len(names) - 1}, KLs: {kls}).",
        f"It is from {source}.",
    ]


def _finished(rows: Sequence[Row], endpoints: Endpoints) -> tuple[float, str] | None:
    """Pooled standard deviation of paired differences in reward, and in words of which."""
    found: list[tuple[int, float]] = []  # pairs, and the variance of their differences
    if ladders := endpoint_ladders(rows):
        reference = endpoints.reference if endpoints.reference in ladders else next(iter(ladders))
        kls = endpoints.at_kl or common_kls(ladders, reference)
        known = compare_at_kl(ladders, reference, ["reward"], kls, partial=True)
        found = [(one.n, one.n * one.error**2) for one in known if one.n > 1]
    what = "differences at equal KL, seed by seed, in the ladders that are finished"
    if not found:
        ends = [{seed: end for seed, (_, end) in final_values(own, "reward").items()} for own in runs_of(rows).values()]
        gaps = [paired_differences(a, b) for a, b in combinations(ends, 2)]
        found = [(len(own), variance(own)) for own in gaps if len(own) > 1]
        what = "differences between ends of runs, seed by seed and not yet at equal KL, of the cells that are finished"
    if not found:
        return None
    degrees = sum(n - 1 for n, _ in found)
    return math.sqrt(sum((n - 1) * own for n, own in found) / degrees), (
        f"the spread of {what}, and leaves out what other prompts or another model would give"
    )


def _sampling(cell: Cell, evaluation: EvaluationSettings) -> tuple[float, str]:
    """Standard deviation of a difference of two mean rewards by the sampling of answers, √2 · s / √(prompts · answers).

    s is that of the data's own rewards within a prompt of the test split.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(cell.options))
        script, data_options, _, args, _ = cell_options(path)
        rewards = read_splits(script, data_options, args, evaluation)[1]["test"]["rewards"][:]
    if not (variances := [variance(own) for own in rewards if len(own) > 1]):
        raise UserError(
            "no prompt of the test split has two rewards, so the spread of the rewards is unknown; run a cell first"
        )
    within, answers = math.sqrt(fmean(variances)), evaluation.num_completions
    return math.sqrt(2 / (len(rewards) * answers)) * within, (
        f"the sampling of answers alone: the data's rewards have a standard deviation of {within:.2g} within a prompt, "
        f"and {len(rewards)} test prompts get {answers} answers each. It leaves out how far training differs from seed "
        "to seed, so that what shows is likely to be larger, and any scorer whose rewards spread otherwise"
    )
