"""The ends of a comparison's runs: its methods at equal KL between them, and what there is to say of their ladders."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .comparison_rows import Row, Setting, labels, metric_of, runs_of, setting_name, setting_of, step_of
from .intervals import mean_and_interval
from .ladder import Ladder, common_kls, compare_at_kl, doubled_back, ladder_values, ladders_of, out_of_order

FIGURES = {"reward": "reward", "logratio_best": "best’s log-ratio", "logratio_worst": "worst’s log-ratio"}
FIELDS = (
    "method", "reference", "kl", "column", "mean", "mean_low", "mean_high", "spanned", "seeds", "difference", "low",
    "high", "p", "p_holm", "n", "doubled_back",
)  # fmt: skip


@dataclass(frozen=True)
class Doubling:
    """A run whose KL at its end is clearly below that of an earlier evaluation."""

    name: str
    method: Setting
    step: int
    highest_kl: float
    last_kl: float

    def text(self) -> str:
        """A sentence that names the run."""
        return (
            f"{self.name} doubled back: it ended at a KL of {self.last_kl:.3g} nats, below the {self.highest_kl:.3g} "
            f"of its step {self.step}."
        )


def method_of(row: Row) -> Setting:
    """The row's settings but β: what runs of one ladder share."""
    return tuple((name, value) for name, value in setting_of(row) if name != "beta")


def ladder_names(rows: Iterable[Row]) -> dict[Setting, str]:
    """`method_of` → a name, of those that have at least two β.

    Args:
        rows: of a comparison, or the settings of its cells.
    """
    betas: dict[Setting, set[str]] = {}
    for row in rows:
        betas.setdefault(method_of(row), set()).add(dict(setting_of(row)).get("beta", ""))
    return labels([method for method, own in betas.items() if len(own - {""}) > 1])


def endpoint_ladders(rows: Sequence[Row]) -> dict[str, Ladder]:
    """Name of a method → seed → the ladder of its runs' last evaluations on the test split."""
    ends = [own[-1] for runs in runs_of(rows).values() for own in runs.values()]
    found = ladders_of(ends, [*FIGURES], method=method_of)
    return {name: found[method] for method, name in ladder_names(ends).items()}


def endpoint_rows(rows: Sequence[Row], at_kl: Sequence[float] = (), reference: str | None = None) -> list[Row]:
    """The rows of `endpoints.csv`: a method, figure and KL each, with `FIELDS`.

    `mean` is over the `seeds`, and empty unless all of them span the KL (`spanned` do); its ends are those of its 95 %
    t-interval. The rest is of `compare_at_kl`, where the comparisons of one figure are a family.

    Args:
        rows: of `comparison.csv`.
        at_kl: KLs in nats; by default those of `common_kls`.
        reference: the name of the method that the others are compared with; by default the first.

    Returns:
        None at all where no method has a ladder, or the reference has none yet.
    """
    ladders = endpoint_ladders(rows)
    reference = reference or next(iter(ladders), "")
    if reference not in ladders:
        return []
    kls = at_kl or common_kls(ladders, reference)
    found = {(one.method, one.kl, one.column): one for one in compare_at_kl(ladders, reference, [*FIGURES], kls)}
    names, back = ladder_names(rows), doublings(rows)
    table: list[Row] = []
    for kl, column in ((kl, column) for kl in kls for column in FIGURES):
        for method, ladder in ladders.items():
            values, one = ladder_values(ladder, column, kl), found.get((method, kl, column))
            line: dict[str, Any] = {"method": method, "reference": reference, "kl": kl, "column": column}
            line |= {"spanned": len(values), "seeds": len(ladder), "n": one.n if one else None}
            if values and len(values) == len(ladder):
                line |= zip(("mean", "mean_low", "mean_high"), mean_and_interval([*values.values()])[:3], strict=True)
            if one:
                line |= {name: getattr(one, name) for name in ("difference", "low", "high", "p", "p_holm")}
            line["doubled_back"] = " ".join(own.name for own in back if names.get(own.method) == method)
            table.append({name: _known(line.get(name)) for name in FIELDS})
    return table


def doublings(rows: Iterable[Row]) -> list[Doubling]:
    """The runs that came back in KL, from their evaluations on the test split."""
    found = []
    for runs in runs_of(rows).values():
        for seed, own in runs.items():
            kls, errors = ([metric_of(row, name) for row in own] for name in ("kl", "kl_error"))
            if (top := doubled_back(kls, errors)) is not None:
                name = own[-1].get("cell") or f"{setting_name(own[-1])} seed {seed}"
                last = next(kl for kl in reversed(kls) if math.isfinite(kl))
                found.append(Doubling(name, method_of(own[-1]), step_of(own[top]), kls[top], last))
    return found


def ladder_notes(rows: Sequence[Row]) -> list[str]:
    """Sentences on what bears on the comparison: runs that came back, ladders out of order and with β missing."""
    notes = [own.text() for own in doublings(rows)]
    for name, ladder in endpoint_ladders(rows).items():
        betas = {seed: {rung.beta for rung in rungs} for seed, rungs in ladder.items()}
        every = set().union(*betas.values())
        for seed, rungs in ladder.items():
            if lacking := sorted(f"{beta:g}" for beta in every - betas[seed] if beta is not None):
                notes.append(f"Of {name}, seed {seed} has no end at β {', '.join(lacking)}.")
            if out_of_order(rungs):
                kls = ", ".join(f"β {rung.beta:g} at {rung.kl:.3g}" for rung in rungs)
                notes.append(
                    f"The ladder of {name}, seed {seed}, isn't in the order of β: in the order of KL it has {kls} nats."
                )
    return notes


def _known(value: Any) -> Any:
    """None for a figure that isn't known, as a CSV file has it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
