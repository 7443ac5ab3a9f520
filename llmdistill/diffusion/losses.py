"""Losses on masked tokens. Logits, masks and weights at index t speak of the token *at* t (shifts end in the backbone).

B sequences, L tokens, V columns. Losses in float32, or float64 where that comes in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmdistill.errors import UserError
from llmdistill.objectives.fused import compute_dtype


def shift_right(logits: Tensor) -> Tensor:
    """Logits [B, L, V] of a next-token head as predictions of the token at their own index: [l0, l0, l1, …].

    Nothing predicts the first token, so it is never masked; its row is a stand-in (DiffuLLaMA, arXiv 2410.17891).
    """
    return torch.cat([logits[:, :1], logits[:, :-1]], 1)


def without_mask_token(logits: Tensor, mask_id: int) -> Tensor:
    """The mask token's column at minus infinity: it is never a prediction."""
    column = torch.arange(logits.shape[-1], device=logits.device) == mask_id
    return logits.masked_fill(column, -torch.inf)


def subs_log_probs(logits: Tensor, noisy: Tensor, mask_id: int) -> Tensor:
    """Log-probs [B, L, V] of MDLM's SUBS parameterisation (arXiv 2406.07524, section 3.2.3): no mass on the mask token,
    and a token that is there stays itself."""
    log_probs = without_mask_token(logits, mask_id).log_softmax(-1, dtype=compute_dtype(logits))
    own = F.one_hot(noisy, logits.shape[-1]).bool()
    unchanged = torch.zeros_like(log_probs).masked_fill(~own, -torch.inf)
    return torch.where((noisy == mask_id).unsqueeze(-1), log_probs, unchanged)


def token_ce(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of every token, [B, L]."""
    log_probs = logits.log_softmax(-1, dtype=compute_dtype(logits))
    return -log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def weighted_nll(ce: Tensor, weight: Tensor, masked: Tensor, maskable: Tensor, norm: str = "token") -> Tensor:
    """Sum of weight * ce over masked tokens, over what ``norm`` counts; a scalar.

    Args:
        ce, masked, maskable: [B, L]. weight: [B, 1] or [B, L]: w(t), or 1.
        norm: ``token``: maskable tokens of the batch (MDLM, LLaDA's pretraining). ``sequence``: maskable tokens of each
            sequence, then the mean (LLaDA's SFT). ``batch``: sequences: the bound in nats per sequence. ``masked``:
            masked tokens (DiffuLLaMA): another objective, since the count is drawn with the loss.

    Raises:
        UserError: an unknown norm.
    """
    weighted = (ce * weight).masked_fill(~masked, 0.0)
    sequences = ce.shape[0]
    if norm == "token":
        return weighted.sum() / maskable.sum().clamp_min(1)
    if norm == "sequence":
        return (weighted.sum(-1) / maskable.sum(-1).clamp_min(1)).sum() / sequences
    if norm == "batch":
        return weighted.sum() / sequences
    if norm == "masked":
        return weighted.sum() / masked.sum().clamp_min(1)
    raise UserError(
        f"diffusion.norm is {norm!r}; there are token, sequence, batch, masked. Fix: --diffusion.norm token."
    )


def cart_weight(masked: Tensor, p: float = 0.3) -> Tensor:
    """Dream's context-adaptive weight (CART, arXiv 2508.15487): of a masked token i the sum over unmasked j of
    p (1 - p)^(|i - j| - 1) / 2; 0 on the others. [B, L] -> [B, L]."""
    positions = torch.arange(masked.shape[-1], device=masked.device)
    distance = (positions[:, None] - positions[None, :]).abs()
    closeness = 0.5 * p * (1 - p) ** (distance - 1).clamp_min(0).float()
    closeness = closeness.masked_fill(distance == 0, 0.0)
    return ((~masked).float() @ closeness).masked_fill(~masked, 0.0)
