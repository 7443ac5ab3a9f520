"""The formula of every divergence, written once, on a pair of log-probability rows.

A core is `core(log_s, log_t, s) -> (value [...], slope [..., V])`: log_s and log_t [..., V] are the
log-probabilities of student S and teacher T, s = exp(log_s), and `slope` is d value / d log_s. A core owns
log_s and log_t and may overwrite them; it leaves s alone. Dense rows (V tokens) and sparse rows (K tokens and
a bucket) share the cores.

- sum(S) = 1, so a multiple of S may be added to a slope freely. Each core picks the multiple that makes the
  slope vanish at S = T: a student that has converged sees a zero gradient, not rounding noise.
- Slopes are written by hand because that halves the passes and temporaries of autograd over rows of 150k
  columns, and because a token of probability zero is then masked in one place instead of returning as 0 * inf
  = NaN from a backward pass. A probability that underflows to zero counts as zero.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Core = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def kl_terms(p: Tensor, log_p: Tensor, log_q: Tensor, out: Tensor | None = None) -> Tensor:
    """p (log p - log q) per token: 0 where p = 0, +inf where only q = 0. `out` may be log_p or log_q."""
    return torch.sub(log_p, log_q, out=out).mul_(p).masked_fill_(p == 0, 0.0)


def log_mixture(log_t: Tensor, log_s: Tensor, teacher_share: float) -> Tensor:
    """log(share T + (1 - share) S) for a share strictly between 0 and 1."""
    return torch.logaddexp(log_t + math.log(teacher_share), log_s + math.log1p(-teacher_share))


def forward_kl(log_s: Tensor, log_t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """KL(T || S)."""
    t = log_t.exp()
    value = kl_terms(t, log_t, log_s, out=log_t).sum(-1)
    return value, torch.sub(s, t, out=t)


def reverse_kl(log_s: Tensor, log_t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """KL(S || T)."""
    terms = kl_terms(s, log_s, log_t, out=log_s)
    return terms.sum(-1), terms


def jsd(log_s: Tensor, log_t: Tensor, s: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S; the plain KLs at both ends."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}; it weighs the teacher in the mixture and must lie in [0, 1]")
    if beta == 0.0:
        return forward_kl(log_s, log_t, s)
    if beta == 1.0:
        return reverse_kl(log_s, log_t, s)
    log_m = log_mixture(log_t, log_s, beta)
    from_teacher = kl_terms(log_t.exp(), log_t, log_m, out=log_t)
    from_student = kl_terms(s, log_s, log_m, out=log_s).mul_(1.0 - beta)
    return from_teacher.sum(-1).mul_(beta).add_(from_student.sum(-1)), from_student


def skew_forward_kl(log_s: Tensor, log_t: Tensor, s: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(T || M), M = alpha T + (1 - alpha) S."""
    _check_alpha(alpha)
    if alpha == 0.0:
        return forward_kl(log_s, log_t, s)
    log_m = log_mixture(log_t, log_s, alpha)
    value = kl_terms(log_t.exp(), log_t, log_m).sum(-1)
    teacher_over_mixture = log_t.sub_(log_m).exp_()
    return value, s.sub(s * teacher_over_mixture).mul_(1.0 - alpha).masked_fill_(s == 0, 0.0)


def skew_reverse_kl(log_s: Tensor, log_t: Tensor, s: Tensor, *, alpha: float) -> tuple[Tensor, Tensor]:
    """KL(S || M), M = (1 - alpha) T + alpha S."""
    _check_alpha(alpha)
    if alpha == 0.0:
        return reverse_kl(log_s, log_t, s)
    log_m = log_mixture(log_t, log_s, 1.0 - alpha)
    terms = kl_terms(s, log_s, log_m, out=log_s)
    teacher_over_mixture = log_t.sub_(log_m).exp_()
    slope = teacher_over_mixture.sub_(1.0).mul_(s).mul_(1.0 - alpha).add_(terms)
    return terms.sum(-1), slope.masked_fill_(s == 0, 0.0)


def total_variation(log_s: Tensor, log_t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """sum |S - T| / 2."""
    gap = s - log_t.exp()
    return gap.abs().sum(-1).mul_(0.5), gap.sign_().mul_(s).mul_(0.5)


def adaptive_kl(log_s: Tensor, log_t: Tensor, s: Tensor, *, head_mass: float) -> tuple[Tensor, Tensor]:
    """g_head FKL + g_tail RKL; g = shares of sum |T - S| on the likeliest tokens and on the rest."""
    if not 0.0 < head_mass < 1.0:
        raise ValueError(f"head_mass is {head_mass}; it is a share of the teacher's probability in (0, 1)")
    t = log_t.exp()
    sorted_t, order = t.sort(dim=-1, descending=True)
    sorted_gap = (t - s).abs_().gather(-1, order)
    in_head = sorted_t.cumsum(-1) <= head_mass
    in_head[..., :1] = True  # the likeliest token belongs to the head even if it alone exceeds head_mass
    head_gap, all_gap = (sorted_gap * in_head).sum(-1), sorted_gap.sum(-1)
    head_share = torch.where(all_gap > 0, head_gap / all_gap, 0.5)
    forward, forward_slope = forward_kl(log_s, log_t.clone(), s)
    reverse, reverse_slope = reverse_kl(log_s, log_t, s)
    value = _weigh(head_share, forward) + _weigh(1.0 - head_share, reverse)
    head_share = head_share.unsqueeze(-1)
    return value, _weigh(head_share, forward_slope) + _weigh(1.0 - head_share, reverse_slope)


def _check_alpha(alpha: float) -> None:
    if not 0.0 <= alpha < 1.0:
        raise ValueError(f"alpha is {alpha}; it mixes one distribution into the other and must lie in [0, 1)")


def _weigh(share: Tensor, x: Tensor) -> Tensor:
    """share * x, where a share of 0 silences even an infinite x."""
    return torch.where(share == 0, 0.0, share * x)
