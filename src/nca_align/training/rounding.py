"""How far rounding alone may move log-probabilities, by the precision that a model computes in."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# What configs call the number of experts among which tokens are routed
_ROUTED = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Rounding:
    """Bounds in nats, as multiples of the relative error ε of one rounding.

    Measured on SmolLM2 135M on a CPU, packed and padded, on 48 completions of 48 and of 150 tokens. A token is off by
    70 ε at most in bfloat16 and 48 ε in float16. A completion's sum, divided by √tokens, has a standard deviation of
    7 ε and 8 ε, and 21 ε and 24 ε at most. float32 has 2.4e-5 nats and 1.2e-5.

    Args:
        epsilon: of the coarsest precision; 1e-5 at least, since not all errors in float32 are of its last bit.
        half: whether it is coarser than float32.
        routed: whether the model routes tokens to experts, and after a rounding to others.
    """

    epsilon: float
    half: bool
    routed: bool = False

    @property
    def token(self) -> float:
        """Most nats that one token may be off: 0.004 in float32, 0.4 in float16, 3.1 in bfloat16."""
        return 400 * self.epsilon

    @property
    def completion(self) -> float:
        """Most nats that a completion's sum may be off, divided by √tokens: 0.0004, 0.04 and 0.31; thrice if routed."""
        return (120 if self.routed else 40) * self.epsilon

    @property
    def same(self) -> float:
        """As `completion`, for two runs of the same computation on the same batch: 0.00001, 0.001 and 0.008."""
        return self.epsilon

    @property
    def gradient(self) -> float:
        """Most that gradients may be off, relative to their norm."""
        return 1e-1 if self.half else 1e-3


def rounding(policy: nn.Module, base: Any, mixed_precision: str) -> Rounding:
    """The bounds of a model's log-probabilities.

    Args:
        policy: with its adapter.
        base: the language model in it.
        mixed_precision: accelerate's.
    """
    quantization = getattr(base.config, "quantization_config", None)
    dtypes: set[Any] = {
        base.dtype,
        {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision),
        getattr(quantization, "bnb_4bit_compute_dtype", None),  # NF4 computes in its own
        torch.bfloat16 if getattr(quantization, "load_in_8bit", False) else None,  # 8 bits, by the outliers of a batch
        *(parameter.dtype for parameter in policy.parameters() if parameter.requires_grad),  # TRL's QLoRA: bfloat16
    }
    # float32 products may be rounded by a setting: TF32 has as many digits as float16
    by_setting = {"tf32": torch.float16, "bf16": torch.bfloat16}
    products = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    dtypes |= {by_setting.get(own.fp32_precision) for own in products}
    epsilon = max(
        torch.finfo(dtype).eps for dtype in dtypes if isinstance(dtype, torch.dtype) and dtype.is_floating_point
    )
    config = base.config.get_text_config()
    routed = any((getattr(config, name, None) or 0) > 1 for name in _ROUTED)
    return Rounding(max(epsilon, 1e-5), epsilon > torch.finfo(torch.float32).eps, routed)
