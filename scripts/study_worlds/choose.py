"""Learning rates and ladders out of docs/study/pilots.csv, by the rules of docs/study/plan.md.

python scripts/study_worlds/choose.py
"""

from collections.abc import Sequence
from operator import itemgetter
from statistics import fmean

import numpy as np
from plan import DPO, FAST, KLS, PILOT_RATES, PILOTS, RATES, pilots
from runs import PILOTS_CSV, run_all

from nca_align.evaluation.ladder import ladder_values, ladders_of

AIMS = (0.3, 0.6, 1.1, 2.0, 3.0)  # nats


def rates(rows: Sequence[dict], loss: str, weight: float) -> dict[float, tuple[int, float]]:
    """Learning rate → how many of the KLs all worlds reach, and the mean reward there."""
    own = [row for row in rows if (row["loss"], row["negative_weight"]) == (loss, weight)]
    start = {"test_reward": 0.0}
    ladders = ladders_of(own, [*start], method=itemgetter("learning_rate"), key="world", kl="test_kl", start=start)
    found = {}
    for rate, ladder in ladders.items():
        values = [at for kl in KLS if len(at := ladder_values(ladder, "test_reward", kl)) == len(PILOTS)]
        found[rate] = len(values), fmean([value for at in values for value in at.values()] or [0.0])
    return found


def ladder_for(rows: Sequence[dict], loss: str, weight: float, rate: float) -> tuple[float, ...]:
    """The β at which the pilots' mean KLs come to `AIMS`, between two β straight in the logarithms, each once.

    A KL that no pilot reaches has the lowest β, one that all are beyond the highest.
    """
    kls: dict[float, list[float]] = {}
    for row in rows:
        if (row["loss"], row["negative_weight"], row["learning_rate"]) == (loss, weight, rate):
            kls.setdefault(row["beta"], []).append(row["test_kl"])
    betas = sorted(kls, reverse=True)
    means = np.maximum.accumulate([fmean(kls[beta]) for beta in betas])
    found = np.exp(np.interp(np.log(AIMS), np.log(means), np.log(betas)))
    return tuple(dict.fromkeys(float(f"{beta:.2g}") for beta in found))


if __name__ == "__main__":
    rows = run_all(pilots(), PILOTS_CSV)
    for (loss, weight), tried in PILOT_RATES.items():
        found = rates(rows, loss, weight)
        print(loss, weight, *(f"{rate:g}: {found[rate][0]} KLs, {found[rate][1]:.4f}" for rate in tried))
        best = max(found, key=lambda rate: found[rate])
        for rate in {best, FAST}:
            print("   ", rate, ladder_for(rows, loss, weight, rate))
    for loss in DPO[1:]:
        print(loss, ladder_for(rows, loss, 1.0, RATES[loss, 1.0]))
