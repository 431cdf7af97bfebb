"""Which runs the exact worlds have. docs/study/plan.md says why."""

import itertools
from collections.abc import Iterator
from typing import Any

from training import Run

KLS = (0.5, 1.0, 2.0)  # nats, at which methods are compared
WORLDS, FEWER = range(1, 21), range(1, 11)
DPO = ("dpo_best_worst", "dpo_all_pairs", "dpo_random_pair")
PILOTS = range(101, 105)
PILOT_BETAS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
# loss and weight of NCA's second term → learning rates that were tried, and the one taken
PILOT_RATES = {
    ("nca", 1.0): (2.5e-4, 5e-4, 1e-3, 2e-3),
    ("nca", 0.5): (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    ("nca", 0.0): (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    ("infonca", 1.0): (2.5e-4, 5e-4, 1e-3, 2e-3),
    ("dpo_best_worst", 1.0): (2.5e-4, 5e-4, 1e-3, 2e-3),
}
RATES = {
    ("nca", 1.0): 5e-4,
    ("nca", 0.5): 4e-3,
    ("nca", 0.0): 4e-3,
    ("infonca", 1.0): 1e-3,
    ("dpo_best_worst", 1.0): 5e-4,
}
RATES |= {(loss, 1.0): RATES[DPO[0], 1.0] for loss in DPO[1:]}
FAST = 2e-3  # a second learning rate for all, as a check
# the same, with the learning rate → β for KLs of about 0.3, 0.6, 1.1, 2 and 3 in the pilots
LADDERS = {
    ("nca", 1.0, 5e-4): (0.59, 0.33, 0.14, 0.044, 0.014),
    ("nca", 0.5, 4e-3): (0.98, 0.48, 0.22, 0.041, 0.01),
    ("nca", 0.0, 4e-3): (2.7, 0.83, 0.12, 0.01),
    ("infonca", 1.0, 1e-3): (0.94, 0.61, 0.41, 0.27, 0.17),
    ("dpo_best_worst", 1.0, 5e-4): (4.0, 1.8, 0.93, 0.41, 0.19),
    ("dpo_all_pairs", 1.0, 5e-4): (2.5, 1.2, 0.62, 0.29, 0.14),
    ("dpo_random_pair", 1.0, 5e-4): (1.5, 0.75, 0.39, 0.17, 0.073),
    ("nca", 1.0, FAST): (0.81, 0.45, 0.26, 0.11, 0.039),
    ("infonca", 1.0, FAST): (1.1, 0.68, 0.46, 0.31, 0.2),
    ("dpo_best_worst", 1.0, FAST): (10.0, 1.5, 0.67),
}
MAIN = (("nca", 1.0), ("infonca", 1.0), ("dpo_best_worst", 1.0))
ANNOTATIONS = 512  # of 128 prompts with four completions each


def ladder(
    world: int, loss: str, weight: float = 1.0, every: bool = True, scale: float = 1.0, rate: float = 0.0, **more: Any
) -> Iterator[Run]:
    """A run a β; without `every`, those of the second lowest KL left out. `rate` in place of the loss's own."""
    rate = rate or RATES[loss, weight]
    for i, beta in enumerate(LADDERS[loss, weight, rate]):
        if every or i != 1:
            yield Run(world, loss, beta * scale, rate, negative_weight=weight, **more)


def likelihood() -> Iterator[Run]:
    """a. Five methods, completions of the reference and of another policy; twice the steps; a higher learning rate."""
    for world, sampler in itertools.product(WORLDS, ("reference", "other")):
        for loss, weight in (*MAIN, ("nca", 0.5), ("nca", 0.0)):
            yield from ladder(world, loss, weight, sampler=sampler)
    for world, (loss, weight) in itertools.product(FEWER, MAIN):
        yield from ladder(world, loss, weight, steps=256)
        yield from ladder(world, loss, weight, rate=FAST)


def completions() -> Iterator[Run]:
    """b. K completions of 128 prompts, and K completions of as many prompts as 512 annotations are enough for."""
    for world, K, loss in itertools.product(FEWER, (2, 4, 8, 16), ("infonca", "nca", *DPO)):
        for prompts in {128, ANNOTATIONS // K}:
            if K > 2 or loss not in DPO[1:]:  # of two completions there is one pair
                yield from ladder(world, loss, every=False, completions=K, prompts=prompts)


def temperatures() -> Iterator[Run]:
    """c. α of 0.3 and 3 beside 1, at the same α · β."""
    for world, alpha, loss in itertools.product(FEWER, (0.3, 3.0), ("nca", "infonca")):
        yield from ladder(world, loss, scale=1 / alpha, alpha=alpha)


def wrong_rewards() -> Iterator[Run]:
    """d. Noise, a term that can be hacked, false ties."""
    for world, kind, (loss, weight) in itertools.product(FEWER, ("noise", "hack", "ties"), MAIN):
        yield from ladder(world, loss, weight, every=False, rewards=kind)


def pilots() -> Iterator[Run]:
    """Learning rates and β; for two more of DPO's kinds β alone."""
    for (loss, weight), rates in (PILOT_RATES | {(loss, 1.0): (RATES[loss, 1.0],) for loss in DPO[1:]}).items():
        for world, beta, rate in itertools.product(PILOTS, PILOT_BETAS, rates):
            yield Run(world, loss, beta, rate, negative_weight=weight)


PARTS = {
    "likelihood": likelihood,
    "completions": completions,
    "temperatures": temperatures,
    "wrong_rewards": wrong_rewards,
}
