"""The load-balancing loss of a mixture of experts, the same in every layout and however a batch is cut.

It is E · Σ_e f_e · p_e, with f_e the share of the choices that fall on expert e and p_e the mean of its probabilities
(Switch Transformer, arXiv 2101.03961, equations 4 to 6). Both are means over the layers and over the tokens of a
batch's conversations. A token counts as often as it stands in a conversation, also where a layout runs it once. A
conversation's last token is a target only: no layout runs it, so it isn't counted.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def expert_use(router_logits: Sequence[Tensor], top_k: int, counts: Tensor) -> Tensor:
    """(2, E) float32 sums over layers and tokens: how often each expert is chosen, and its probability.

    Args:
        router_logits: of each layer, (rows · T, E) or (rows, T, E). Virtual tokens in front of a row aren't counted.
        top_k: experts that a token goes to.
        counts: (rows, T), in how many conversations each token stands; 0 for padding.
    """
    rows, length = counts.shape
    sums = []
    for logits in router_logits:
        probabilities = logits.view(rows, -1, logits.shape[-1])[:, -length:].float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(top_k).indices, 1.0)
        weights = counts.to(logits.device, torch.float32)
        sums.append(torch.stack([torch.einsum("rt,rte->e", weights, part) for part in (chosen, probabilities)]))
    return torch.stack([part.to(sums[0].device) for part in sums]).sum(0)


def load_balancing_loss(use: Tensor) -> Tensor:
    """The loss of a batch, from the sum of its `expert_use`; 1 times `top_k` where all experts are used alike."""
    chosen, probability = use
    tokens = probability.sum().detach()  # the probabilities of one token in one layer sum to 1
    return len(chosen) * (chosen * probability).sum() / tokens**2
