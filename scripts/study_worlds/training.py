"""One run: a policy trained in a world from its reference, and what its end is worth."""

import copy
import math
import time
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from world import HELD_OUT, Policy, World

from nca_align.losses import reward_loss

BATCH = 16  # prompts a step


@dataclass(frozen=True)
class Run:
    """What a run is; all else is alike for the runs of a world.

    Args:
        loss: nca, infonca; dpo_best_worst, dpo_all_pairs, or dpo_random_pair, drawn anew at each visit of a prompt.
        rewards: what the loss sees of them, see `World.seen`.
        completions: K, the first ones of each prompt's 16.
        prompts: the first ones of the 256.
    """

    world: int
    loss: str
    beta: float
    learning_rate: float
    alpha: float = 1.0
    negative_weight: float = 1.0
    sampler: str = "reference"
    rewards: str = "true"
    completions: int = 4
    prompts: int = 128
    steps: int = 128


@lru_cache(maxsize=2)
def world_of(seed: int, sampler: str) -> World:
    """The world, kept for the next run."""
    return World(seed, sampler)


def train(run: Run) -> dict[str, float]:
    """Train to the end → figures of 32 held-out prompts (`test`) and of 32 training prompts, and seconds of CPU.

    `reward` and `kl` (nats) are exact. `best` and `worst` are mean log-ratios log π/π_ref of the best and the worst of
    K sampled completions, nats. Rewards are the true ones. `limit` is the most reward at the test's KL, `optimum_kl`
    the KL of π_ref · exp(reward/(αβ)) / Z, both on the held-out prompts.
    """
    began, world = time.process_time(), world_of(run.world, run.sampler)
    policy = copy.deepcopy(world.reference)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=run.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / (0.1 * run.steps)) * (1 + math.cos(math.pi * t / run.steps)) / 2
    )
    kept = (slice(run.prompts), slice(run.completions))
    completions, rewards = world.sampled["train"][kept], world.seen(run.rewards)[kept]
    reference = world.logps["train"][: run.prompts].gather(1, completions)
    generator, order = torch.Generator().manual_seed(run.world), torch.empty(0, dtype=torch.long)
    for _ in range(run.steps):
        if len(order) < BATCH:
            order = torch.randperm(run.prompts, generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        chosen = _chosen(run.loss, rewards[rows], generator)
        y, ref, seen = (table[rows].gather(1, chosen) for table in (completions, reference, rewards))
        logps = policy.logps(world.prompts["train"][rows], y)
        name = "all_pairs" if run.loss.startswith("dpo") else run.loss  # of two completions: DPO
        loss = reward_loss(
            logps, ref.float(), seen, run.alpha, run.beta, name, negative_weight=run.negative_weight, check=False
        )
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        schedule.step()
    figures = {f"{split}_{name}": value for split in world.prompts for name, value in _end(world, policy, split, run)}
    figures["limit"] = world.limit(figures["test_kl"])
    figures["optimum_kl"] = world.tilted(1 / (run.alpha * run.beta))[0]
    return figures | {"seconds": time.process_time() - began}


def _chosen(loss: str, rewards: Tensor, generator: torch.Generator) -> Tensor:
    """Rewards (B, K) → which completions take part, (B, K) or (B, 2)."""
    if loss == "dpo_best_worst":
        return torch.stack([rewards.argmax(1), rewards.argmin(1)], 1)
    every = torch.rand(rewards.shape, generator=generator).argsort(1)
    return every[:, :2] if loss == "dpo_random_pair" else every


def _end(world: World, policy: Policy, split: str, run: Run) -> list[tuple[str, float]]:
    rows = slice(HELD_OUT)
    logps, ref, rewards = (
        policy.all_logps(world.prompts[split][rows]),
        world.logps[split][rows],
        world.rewards[split][rows],
    )
    share, ratios = logps.exp(), logps - ref
    sampled = world.sampled[split][rows, : run.completions]
    own = rewards.gather(1, sampled)
    found = {"reward": (share * rewards).sum(1).mean().item(), "kl": (share * ratios).sum(1).mean().item()}
    for name, which in (("best", own.argmax(1)), ("worst", own.argmin(1))):
        found[name] = ratios.gather(1, sampled.gather(1, which[:, None])).mean().item()
    return [*found.items()]
