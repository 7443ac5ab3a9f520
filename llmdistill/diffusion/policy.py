"""Losses and advantages of reinforcement on slices, for outcomes and for processes (TraceRL, arXiv 2509.06949).

The pieces are plain functions of log-probs at targets; which inputs those come from is :mod:`.slicing`'s matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmdistill.diffusion.slicing import NEVER
from llmdistill.errors import UserError


def clipped_surrogate(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, eps: float = 0.2, bound: float | None = 10.0
) -> Tensor:
    """min(r A, clip(r, 1 - eps, 1 + eps) A) with r = exp(logps - old), [...]; to be maximised.

    ``bound`` limits the log-ratio, beyond which only the clip would have been read anyway.
    """
    log_ratio = logps - old_logps
    ratio = (log_ratio if bound is None else log_ratio.clamp(-bound, bound)).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages)


def kl_estimate(logps: Tensor, other_logps: Tensor, kind: str = "k3") -> Tensor:
    """Of KL(now || other) at sampled tokens, [...]: ``k1`` d, or ``k3`` exp(-d) - 1 + d, with d = logps - other.

    TraceRL's "other" is the policy that wrote the text, not a reference model.
    """
    difference = logps - other_logps
    if kind == "k1":
        return difference
    if kind == "k3":
        return torch.exp(-difference) - 1 + difference
    raise UserError(f"diffusion.kl is {kind!r}; there are k1 and k3. Fix: --diffusion.kl k3.")


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    target: Tensor,
    *,
    norm: str,
    eps: float = 0.2,
    beta: float = 0.0,
    kl: str = "k3",
    reference_logps: Tensor | None = None,
) -> Tensor:
    """The loss of slices [S, L], a scalar.

    Args:
        advantages: [S, 1] of sequences, or [S, L] of tokens. target: [S, L] bool.
        norm: ``length``: sums over targets by L, then the mean over slices, as TraceRL does with block attention.
            ``targets``: by the slice's own targets, as it does with full attention, where its KL term stays a sum.
            ``tokens``: the mean over all targets of the batch, as diffu-GRPO does (arXiv 2504.12216, equation 3).
        beta: weight of the KL to the policy that wrote the text, or to a reference model.
        reference_logps: [S, L] of a reference model, where the KL is to that.
    """
    surrogate = clipped_surrogate(logps, old_logps, advantages, eps=eps, bound=10.0 if norm == "length" else None)
    gain = torch.where(target, surrogate, 0.0).sum(-1)
    other = old_logps if reference_logps is None else reference_logps
    penalty = torch.where(target, kl_estimate(logps, other, kl), 0.0).sum(-1)
    if norm == "length":
        return (beta * penalty - gain).mean() / target.shape[-1]
    if norm == "targets":
        return (beta * penalty - gain / target.sum(-1).clamp_min(1)).mean()
    if norm == "tokens":
        return (beta * penalty - gain).sum() / target.sum().clamp_min(1)
    raise UserError(f"diffusion.policy_norm is {norm!r}; there are length, targets, tokens. Fix: length.")


def group_advantages(
    rewards: Tensor, finished: Tensor, low: float = 0.2, high: float = 0.8, *, scale: bool = True
) -> tuple[Tensor, Tensor]:
    """Of groups [P, G] of samples of one prompt: z-scores with the population's deviation (0 where all are equal), and
    which groups are kept: those with a mean reward in [low, high]. A completion that was cut off counts as wrong.

    ``scale`` False: only the mean is subtracted (diffu-GRPO).
    """
    rewards = torch.where(finished, rewards, 0.0)
    mean, deviation = rewards.mean(-1, keepdim=True), rewards.std(-1, keepdim=True, unbiased=False)
    apart = rewards - mean
    advantages = torch.where(deviation > 0, apart / deviation.clamp_min(1e-12) if scale else apart, 0.0)
    share = mean.squeeze(-1)
    return advantages, (share >= low) & (share <= high)


def step_gae(
    step_map: Tensor, rewards: Tensor, values: Tensor, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Returns and advantages of every token, with steps for time: all tokens of a step are one action (TraceRL, 3.3).

    Step means r*, V* give R*_t = r*_t + gamma R*_{t+1} and A*_t = r*_t - V*_t + gamma V*_{t+1} + gamma lam A*_{t+1}; a
    token has its own r and V in place of its step's. At gamma = lam = 1: R is the reward to come, A = R - V.

    Args:
        step_map: [B, L], :data:`~llmdistill.diffusion.slicing.NEVER` where nothing was revealed.
        rewards, values: [B, L] of tokens. An outcome is a reward on the tokens of the last step.
    """
    returns, advantages = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for row in range(len(step_map)):
        zero = rewards.new_zeros(())
        next_return, next_value, next_advantage = zero, zero, zero
        for step in step_map[row][step_map[row] != NEVER].unique().flip(0).tolist():
            here = step_map[row] == step
            r, v = rewards[row, here], values[row, here]
            ahead = gamma * next_value + gamma * lam * next_advantage
            returns[row, here] = r + gamma * next_return
            advantages[row, here] = r - v + ahead
            next_return = r.mean() + gamma * next_return
            next_advantage = r.mean() - v.mean() + ahead
            next_value = v.mean()
    return returns, advantages


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, eps: float = 0.2) -> Tensor:
    """max((V - R)^2, (V_old + clip(V - V_old, +-eps) - R)^2) / 2, [...]."""
    near = old_values + (values - old_values).clamp(-eps, eps)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def last_step_rewards(step_map: Tensor, valid: Tensor, outcome: Tensor) -> Tensor:
    """An outcome [B] as rewards of tokens [B, L]: on those of the last step that has a valid token."""
    steps = step_map.masked_fill(~valid, NEVER)
    last = steps.max(-1, keepdim=True).values
    return torch.where((steps == last) & (last != NEVER), outcome.unsqueeze(-1), 0.0)
