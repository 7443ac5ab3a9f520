"""In what order masked tokens are revealed: the position with the highest score is next.

A score reads log-probs [B, n, V] of a block, the tokens [B, n] that were sampled for it, and u [B, n] uniform.

``entropy``, ``margin``, ``random`` and ``sequential`` do not look at what was sampled, so that one token a step at
temperature 1 draws exactly from the model's distribution. ``confidence`` (LLaDA's low_confidence) does: it prefers
positions at which a likely token happened to be drawn, and at temperature 1 loses half of the entropy of an exact toy
(total variation 0.54). Greedy, where nothing is drawn, that is no objection.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["confidence", "entropy", "margin", "random", "sequential"]


def entropies(log_probs: Tensor) -> Tensor:
    """Nats per position, [B, n]."""
    return torch.special.entr(log_probs.exp()).sum(-1)


def entropy(log_probs: Tensor, tokens: Tensor, u: Tensor) -> Tensor:
    """The least uncertain first: minus the entropy. (A peer has the sign the other way, and begins with the most.)"""
    return -entropies(log_probs)


def margin(log_probs: Tensor, tokens: Tensor, u: Tensor) -> Tensor:
    """The largest gap between the two likeliest tokens first (Kim et al., arXiv 2502.06768)."""
    top = log_probs.topk(2, dim=-1).values.exp()
    return top[..., 0] - top[..., 1]


def confidence(log_probs: Tensor, tokens: Tensor, u: Tensor) -> Tensor:
    """The likeliest sampled token first, by its probability before temperature. Biased where tokens are sampled."""
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).exp()


def random(log_probs: Tensor, tokens: Tensor, u: Tensor) -> Tensor:
    """Uniformly."""
    return u


def sequential(log_probs: Tensor, tokens: Tensor, u: Tensor) -> Tensor:
    """From left to right."""
    return -torch.arange(tokens.shape[-1], device=tokens.device, dtype=u.dtype).expand_as(u)
