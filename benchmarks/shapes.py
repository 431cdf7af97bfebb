"""What is measured: models with random weights, and examples of given lengths.

Speed and memory don't depend on the weights, so none are loaded. Everything is seeded: two processes build the same
model and the same tokens.
"""

from dataclasses import dataclass, replace

import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteMoeHybridConfig,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3_5TextConfig,
)

from lengths import read_lengths

# 60.0M parameters, untied, of which the LM head and the embeddings are 16.4M each: the head is a third of a step's work
_MISTRAL_60M = {
    "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 4096,
    "sliding_window": None,
}  # fmt: skip
# SmolLM2-135M-Instruct's own shape: 134.5M parameters, the head tied to the embeddings
_SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
    "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}  # fmt: skip
# Hybrids of the same width and depth, about 60M parameters each, with their families' shares of recurrent layers
_HYBRID_60M = {name: value for name, value in _MISTRAL_60M.items() if name not in ("sliding_window", "head_dim")}
_QWEN3_5_60M = _HYBRID_60M | {
    "head_dim": 64, "tie_word_embeddings": False,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "linear_num_key_heads": 8, "linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
}  # fmt: skip
_LFM2_60M = _HYBRID_60M | {
    "block_auto_adjust_ff_dim": False, "tie_word_embeddings": False,
    "layer_types": ["conv", "conv", "full_attention", "conv", "conv", "full_attention", "conv", "full_attention"],
}  # fmt: skip
_GRANITE_60M = _HYBRID_60M | {
    "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 1792, "tie_word_embeddings": False,
    "layer_types": ["linear_attention"] * 7 + ["full_attention"],
    "mamba_n_heads": 16, "mamba_d_head": 64, "mamba_n_groups": 1, "mamba_d_state": 128, "mamba_expand": 2,
}  # fmt: skip
_TINY = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "sliding_window": None,
}  # fmt: skip
CONFIGS = {
    "mistral-60m": lambda: MistralConfig(**_MISTRAL_60M),
    "smollm2-135m": lambda: LlamaConfig(**_SMOLLM2),
    "qwen3.5-60m": lambda: Qwen3_5TextConfig(**_QWEN3_5_60M),
    "lfm2-60m": lambda: Lfm2Config(**_LFM2_60M),
    "granite-60m": lambda: GraniteMoeHybridConfig(**_GRANITE_60M),
    "tiny": lambda: MistralConfig(**_TINY),
}


def build_model(name: str, seed: int) -> PreTrainedModel:
    """A model of one of the shapes, fp32, random weights, with SDPA attention."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


@dataclass(frozen=True)
class Example:
    """The lengths of one batch.

    Args:
        prompts: tokens of each of the B prompts.
        completions: tokens of each prompt's K completions.
    """

    prompts: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]

    @property
    def unique_tokens(self) -> int:
        """Tokens of the prompts and completions, each once."""
        return sum(self.prompts) + sum(map(sum, self.completions))

    @property
    def padded_tokens(self) -> int:
        """Tokens of a row per completion, its prompt repeated, all as long as the longest."""
        rows = [p + c for p, completions in zip(self.prompts, self.completions, strict=True) for c in completions]
        return len(rows) * max(rows)

    def part(self) -> "Example":
        """A quarter of its first prompt's completions (two at least), all lengths halved: the warm-up's batch."""
        completions = self.completions[0]
        kept = max(2, len(completions) // 4)
        chosen = sorted(completions)[:: -(len(completions) // kept)][:kept]
        return replace(self, prompts=(self.prompts[0] // 2,), completions=(tuple(n // 2 for n in chosen),))

    def rows(self, vocab_size: int) -> list[dict]:
        """Random tokens of these lengths, with rewards; two completions of a prompt share no more than chance gives."""
        generator = torch.Generator().manual_seed(0)

        def ids(length: int) -> list[int]:
            return torch.randint(3, vocab_size, (length,), generator=generator).tolist()

        return [
            {
                "prompt_ids": ids(prompt),
                "completion_ids": [ids(length) for length in completions],
                "rewards": torch.rand(len(completions), generator=generator).tolist(),
            }
            for prompt, completions in zip(self.prompts, self.completions, strict=True)
        ]


def spread_example(k: int) -> Example:
    """One prompt of 200 tokens; completions of 120, 260, 300 and 400 at K = 4, else spread evenly over 59…576."""
    if k == 4:
        return Example((200,), ((120, 260, 300, 400),))
    return Example((200,), (tuple(round(59 + (576 - 59) * i / (k - 1)) for i in range(k)),))


def real_example(source: str, prompts: int) -> Example:
    """Rows of the length table, at the middle of as many equal parts as there are to be prompts, by unique tokens.

    Cut as training cuts them by default: prompts to 512 tokens, completions where the whole reaches 1024.
    """
    rows = []
    for prompt, completions in read_lengths(source):
        kept = min(prompt, 512)
        rows.append((kept, tuple(min(length, 1024 - kept) for length in completions)))
    rows.sort(key=lambda row: row[0] + sum(row[1]))
    chosen = [rows[(2 * i + 1) * len(rows) // (2 * prompts)] for i in range(prompts)]
    return Example(tuple(row[0] for row in chosen), tuple(row[1] for row in chosen))


def tiny_example(k: int) -> Example:
    return Example((12,), (tuple(4 + 2 * i for i in range(k)),))
