"""How many masked tokens are revealed in a step: quotas fixed beforehand, or as many as the model is sure of.

All but ``ancestral`` reveal at least one token of every sequence that has masked ones, so a block ends after at most as
many steps as it has tokens; ``ancestral`` has a number of steps, the last of which reveals what is left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmdistill.diffusion.schedules import Schedule

__all__ = ["ancestral", "entropy_bound", "factor", "first_hitting", "quota", "threshold"]


@dataclass(frozen=True)
class Candidates:
    """What is known of the positions of a block, [B, n]; nothing outside ``masked`` may be revealed."""

    masked: Tensor  # bool
    score: Tensor  # of the order
    certainty: Tensor  # probability of the token that would be revealed, or of the likeliest: see the order
    entropies: Tensor  # nats
    quota: Tensor  # [B] how many this step
    share: float  # of what is masked, ancestral's chance
    u: Tensor  # uniform


def quota(c: Candidates, settings: Any) -> Tensor:
    """The step's quota of those with the highest scores."""
    return top(c.score, c.masked, c.quota)


def threshold(c: Candidates, settings: Any) -> Tensor:
    """All with probability at least ``settings.threshold``, and always the best (Fast-dLLM, arXiv 2505.22618)."""
    return ((c.certainty >= settings.threshold) & c.masked) | _best(c)


def factor(c: Candidates, settings: Any) -> Tensor:
    """The n likeliest for the largest n with (n + 1)(1 - p_(n)) <= ``settings.factor``, at least the best.

    Fast-dLLM (arXiv 2505.22618, theorem 1): with a factor of 1 what is revealed together is the mode of the joint.
    """
    p = c.certainty.masked_fill(~c.masked, -torch.inf).sort(-1, descending=True).values
    ranks = torch.arange(1, p.shape[-1] + 1, device=p.device)
    count = (p >= 1 - settings.factor / (ranks + 1)).sum(-1)
    return top(c.certainty, c.masked, count) | _best(c)


def entropy_bound(c: Candidates, settings: Any) -> Tensor:
    """The most certain ones whose entropies, all but the largest, sum to at most ``settings.entropy_bound`` nats: a
    bound on what sampling them independently can be wrong by (EB-Sampler, arXiv 2505.24857)."""
    ordered, order = c.entropies.masked_fill(~c.masked, torch.inf).sort(-1)
    finite = ordered.masked_fill(ordered == torch.inf, 0.0)
    accepted = (finite.cumsum(-1) - finite <= settings.entropy_bound) & (ordered < torch.inf)
    return torch.zeros_like(c.masked).scatter(-1, order, accepted)


def ancestral(c: Candidates, settings: Any) -> Tensor:
    """Each with probability (alpha_s - alpha_t) / (1 - alpha_t), independently (MDLM, arXiv 2406.07524)."""
    return (c.u < c.share) & c.masked


def first_hitting(c: Candidates, settings: Any) -> Tensor:
    """One, uniformly: the next jump of the continuous-time process, of which a time-free denoiser needs no time
    (Zheng et al., arXiv 2409.02908)."""
    return top(c.u, c.masked, torch.ones_like(c.quota))


def top(score: Tensor, masked: Tensor, count: Tensor) -> Tensor:
    """The ``count`` [B] masked positions with the highest score, all where there are fewer; the first of equals."""
    order = score.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (order < count.unsqueeze(-1)) & masked


def even_quotas(num_masked: Tensor, steps: int) -> Tensor:
    """[B] masked tokens over ``steps``: m // S each, the first m % S one more (LLaDA). [B, steps]."""
    base, more = num_masked.unsqueeze(-1) // steps, num_masked.unsqueeze(-1) % steps
    return base + (torch.arange(steps, device=num_masked.device) < more).long()


def scheduled_quotas(num_masked: Tensor, steps: int, schedule: Schedule) -> Tensor:
    """What a schedule reveals from t to s in its expectation, rounded, steps of zero dropped (dllm); [B, steps].

    In float64, where dllm's float32 breaks ties: 4 tokens in 3 steps are 1, 2, 1 or 1, 1, 2 by its rounding error.
    """
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    alpha = schedule.alpha(times).tolist()
    quotas = torch.zeros(len(num_masked), steps, dtype=torch.long, device=num_masked.device)
    for row, left in enumerate(num_masked.tolist()):
        at = 0
        for t in range(steps):
            share = 1 - (1 - alpha[t + 1]) / (1 - alpha[t]) if t < steps - 1 else 1.0
            revealed = min(left, _round(left * share))
            if revealed:
                quotas[row, at], at, left = revealed, at + 1, left - revealed
    return quotas


def ancestral_share(step: int, steps: int, schedule: Schedule) -> float:
    """Chance of a masked token to be revealed in step ``step`` of ``steps``; 1 in the last."""
    if step >= steps - 1:
        return 1.0
    t, s = (torch.tensor(1 - k / steps) for k in (step, step + 1))
    alpha_t, alpha_s = float(schedule.alpha(t)), float(schedule.alpha(s))
    return (alpha_s - alpha_t) / (1 - alpha_t)


def _best(c: Candidates) -> Tensor:
    return top(c.score, c.masked, torch.ones_like(c.quota))


def _round(x: float) -> int:
    """Half to even, as torch rounds; what is a tie but for rounding errors is one."""
    nearest = round(x * 2) / 2
    return round(nearest if math.isclose(x, nearest, rel_tol=0, abs_tol=1e-9) else x)
