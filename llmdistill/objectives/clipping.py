"""Bounds on the ratio of two policies: where samples come from an engine slightly off, or from older weights."""

import torch
from torch import Tensor


def truncated_importance_weights(train_lp: Tensor, behavior_lp: Tensor, cap: float) -> Tensor:
    """min(pi_train(y) / pi_behavior(y), cap) -> [...], detached: corrects for an engine that samples slightly
    off.

    Raises ValueError for cap <= 0.
    """
    if not cap > 0:
        raise ValueError(f"cap is {cap}; it bounds a probability ratio from above and must be > 0")
    return (train_lp.detach() - behavior_lp.detach()).exp().clamp(max=cap)


def clipped_policy_loss(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, *, clip: float = 0.2, dual_clip: float = 3.0
) -> Tensor:
    """PPO's clipped loss per token -> [...] with the dual clip for negative advantages (arXiv 1707.06347,
    1912.09729).

    ratio = exp(logp - old_logp); max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)), and where A < 0 at most
    -A dual_clip. For several updates on one rollout. Raises ValueError for clip outside (0, 1) or dual_clip
    <= 1.
    """
    if not 0.0 < clip < 1.0:
        raise ValueError(f"clip is {clip}; it bounds the ratio to [1 - clip, 1 + clip] and must lie in (0, 1)")
    if not dual_clip > 1.0:
        raise ValueError(f"dual_clip is {dual_clip}; it bounds the ratio where the advantage is < 0 and must be > 1")
    advantage = advantage.detach()
    # Far outside any clip range already; without the bound exp overflows and its masked gradient is 0 * inf.
    ratio = (logp - old_logp.detach()).clamp(-20.0, 20.0).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1.0 - clip, 1.0 + clip))
    return torch.where(advantage < 0, torch.minimum(loss, -advantage * dual_clip), loss)
