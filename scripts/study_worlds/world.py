"""A world: a random reference policy and a random reward, small enough that every completion can be enumerated.

A prompt has 3 tokens of 8, a completion 4: 512 prompts with 4,096 completions each. The policy is a transformer of two
layers. Expected rewards, KL divergences and log-ratios are sums over all completions, without sampling error.
"""

import math
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS, PROMPT, COMPLETION = 8, 3, 4
PROMPTS, COMPLETIONS = TOKENS**PROMPT, TOKENS**COMPLETION
WIDTH, HEADS, LAYERS = 32, 4, 2
HELD_OUT = 32  # prompts
TRAINING = 256  # prompts at most
SAMPLED = 16  # completions of each prompt
ENTROPY = 5.6  # nats, of the reference's completions; uniform ones have 8.3
Past = list[tuple[Tensor, Tensor]]


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x (N, T, width), and keys and values of the tokens before it → the same, with those of `x` added."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        if past is not None:  # `x` is one token then
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x)), (k, v)


class Policy(nn.Module):
    """A causal transformer with random weights; `scale` multiplies its logits."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(TOKENS, WIDTH), nn.Embedding(PROMPT + COMPLETION, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, TOKENS)
        for module in self.modules():
            if isinstance(module, nn.Linear):  # with a gain of 1.5: completions depend on their prompt
                nn.init.normal_(module.weight, std=1.5 * module.in_features**-0.5, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, generator=generator)
        self.scale = 1.0

    def forward(self, tokens: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
        """tokens (N, T) after those of `past` → next tokens' log-probabilities (N, T, 8), and the new past."""
        begin = past[0][0].shape[2] if past else 0
        x = self.tokens(tokens) + self.places.weight[begin : begin + tokens.shape[1]]
        now = []
        for i, block in enumerate(self.blocks):
            x, kept = block(x, past[i] if past else None)
            now.append(kept)
        return (self.scale * self.head(self.norm(x))).log_softmax(-1), now

    def logps(self, prompts: Tensor, completions: Tensor) -> Tensor:
        """log π(y|x), nats, of prompts and completions by their numbers: (B,), (B, K) → (B, K)."""
        prompts = digits(prompts, PROMPT)[:, None].expand(-1, completions.shape[1], -1)
        rows = torch.cat([prompts, digits(completions, COMPLETION)], 2).flatten(0, 1)  # (B K, 7)
        steps = self(rows[:, :-1])[0][:, PROMPT - 1 :]
        return steps.gather(2, rows[:, PROMPT:, None]).sum((1, 2)).view(completions.shape)

    @torch.no_grad()
    def all_logps(self, prompts: Tensor) -> Tensor:
        """log π(y|x) of every completion, by its number: (B,) → (B, 4096) in float64.

        Each prefix is run once: a level of the tree is one token after the level above it.
        """
        steps, past = self(digits(prompts, PROMPT))
        found = steps[:, -1].double()
        for _ in range(COMPLETION - 1):
            tokens = torch.arange(TOKENS).repeat(found.numel() // TOKENS)
            past = [(k.repeat_interleave(TOKENS, 0), v.repeat_interleave(TOKENS, 0)) for k, v in past]
            steps, past = self(tokens[:, None], past)
            found = (found.reshape(-1, 1) + steps[:, -1].double()).view(len(prompts), -1)
        return found


def digits(numbers: Tensor, count: int) -> Tensor:
    """Numbers → their `count` digits to the base 8, the highest first, in a last dimension."""
    return numbers[..., None] // TOKENS ** torch.arange(count - 1, -1, -1) % TOKENS


def random_policy(generator: torch.Generator) -> Policy:
    """A policy whose completions have `ENTROPY` nats, by the scale of its logits."""
    policy, prompts = Policy(generator), torch.randperm(PROMPTS, generator=generator)[:16]
    low, high = 0.01, 30.0
    for _ in range(12):
        policy.scale = math.sqrt(low * high)
        logps = policy.all_logps(prompts)
        entropy = -(logps.exp() * logps).sum(1).mean()
        low, high = (policy.scale, high) if entropy > ENTROPY else (low, policy.scale)
    return policy


def random_reward(generator: torch.Generator) -> Tensor:
    """(512, 4096): equal parts of random weights of single tokens, of neighbours, and of prompt and completion token.

    Each part has a variance of 1 over all completions.
    """
    x, y = digits(torch.arange(PROMPTS), PROMPT), digits(torch.arange(COMPLETIONS), COMPLETION)
    single = torch.randn(COMPLETION, TOKENS, generator=generator)
    pair = torch.randn(COMPLETION - 1, TOKENS, TOKENS, generator=generator)
    cross = torch.randn(PROMPT, COMPLETION, TOKENS, TOKENS, generator=generator)
    parts = (
        [single[i, y[:, i]] for i in range(COMPLETION)],
        [pair[i, y[:, i], y[:, i + 1]] for i in range(COMPLETION - 1)],
        [cross[i, j][x[:, i]][:, y[:, j]] for i in range(PROMPT) for j in range(COMPLETION)],
    )
    found = torch.zeros(PROMPTS, COMPLETIONS, dtype=torch.float64)
    for terms in parts:
        part = torch.stack(terms).sum(0).double()
        found += part / part.std()
    return found


class World:
    """The reference, rewards, prompts and sampled completions of a seed.

    Rewards have a mean of 0 at each prompt and a standard deviation of 1 within prompts, under the reference.
    Completions are numbers from 0 to 4095, the best one's being the highest reward of those that were sampled.

    Args:
        seed: of the world.
        sampler: "reference", or "other": training completions come from another world's reference.
    """

    def __init__(self, seed: int, sampler: str = "reference") -> None:
        own = torch.Generator().manual_seed(seed)
        self.reference = random_policy(own)
        table = random_reward(own)
        order = torch.randperm(PROMPTS, generator=own)
        self.prompts = {"test": order[:HELD_OUT], "train": order[HELD_OUT:][:TRAINING]}
        self.logps = {split: self.reference.all_logps(prompts) for split, prompts in self.prompts.items()}
        shares = {split: logps.exp() for split, logps in self.logps.items()}
        self.rewards = {
            split: table[prompts] - (shares[split] * table[prompts]).sum(1, keepdim=True)
            for split, prompts in self.prompts.items()
        }
        spread = (shares["train"] * self.rewards["train"] ** 2).sum(1).mean().sqrt()
        self.rewards = {split: rewards / spread for split, rewards in self.rewards.items()}
        if sampler == "other":
            other = random_policy(torch.Generator().manual_seed(seed + 1_000_000))
            shares = {split: other.all_logps(prompts).exp() for split, prompts in self.prompts.items()}
        self.sampled = {
            split: torch.multinomial(share, SAMPLED, replacement=True, generator=own) for split, share in shares.items()
        }
        self._noise = torch.randn(TRAINING, SAMPLED, generator=own, dtype=torch.float64)

    def seen(self, kind: str) -> Tensor:
        """(256, 16), the training completions' rewards as the losses see them, at a spread of about 1.

        Args:
            kind: "true"; "noise", as much as there is reward; "hack", which pays as much for repeated tokens;
                "ties", rounded to steps of 1.5.
        """
        true = self.rewards["train"].gather(1, self.sampled["train"])
        if kind == "noise":
            return (true + self._noise) / math.sqrt(2)
        if kind == "hack":
            return (true + self._repeats.gather(1, self.sampled["train"])) / math.sqrt(2)
        return (true / 1.5).round() * 1.5 if kind == "ties" else true

    @cached_property
    def _repeats(self) -> Tensor:
        """(256, 4096): how many tokens repeat the one before, at a spread of 1 under the reference."""
        y, share = digits(torch.arange(COMPLETIONS), COMPLETION), self.logps["train"].exp()
        count = (y[:, 1:] == y[:, :-1]).sum(1).double().expand_as(share)
        count = count - (share * count).sum(1, keepdim=True)
        return count / (share * count**2).sum(1).mean().sqrt()

    def limit(self, kl: float) -> float:
        """The most reward that a policy can have on held-out prompts at a mean KL of `kl` nats.

        The policies π_ref · exp(t · reward) / Z have it. A grid of t is straight in √KL between its points.
        """
        kls, rewards = self._limits
        return float(np.interp(math.sqrt(kl), kls, rewards))

    @cached_property
    def _limits(self) -> tuple[list[float], list[float]]:
        """√KL and expected reward at each t."""
        points = [self.tilted(t) for t in [0.0, *torch.logspace(-2, 2, 200).tolist()]]
        return [math.sqrt(kl) for kl, _ in points], [reward for _, reward in points]

    def tilted(self, t: float) -> tuple[float, float]:
        """KL (nats) and expected reward of π_ref · exp(t · reward) / Z on held-out prompts.

        That is InfoNCA's optimum at t = 1/(αβ).
        """
        logps, rewards = self.logps["test"], self.rewards["test"]
        tilted = (logps + t * rewards).log_softmax(1)
        kl = (tilted.exp() * (tilted - logps)).sum(1).mean().clamp(min=0)
        return kl.item(), (tilted.exp() * rewards).sum(1).mean().item()
