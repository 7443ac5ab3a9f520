"""The f-divergences D_f(T||S) = sum_v S f(u), u = T/S, as cores (see `cores`), by name.

Their slope is S (f(u) - u f'(u) + f'(1)). Scales differ between libraries; the comments in F_DIVERGENCES give
ours.
"""

import difflib
import math
from functools import partial

import torch
from torch import Tensor

from llmdistill.objectives.cores import Core, forward_kl, jsd, reverse_kl, total_variation


def triangular(log_s: Tensor, log_t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """sum (T - S)^2 / (T + S)."""
    t = log_t.exp()
    relative = (t - s) / (t + s).clamp_min_(torch.finfo(t.dtype).tiny)  # where both are 0, so is the gap
    return ((t - s) * relative).sum(-1), -(s * relative * (relative + 2.0))


def power(log_s: Tensor, log_t: Tensor, s: Tensor, *, alpha: float, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """scale times the alpha-divergence, f = (u^a - 1 - a (u - 1)) / (a (a - 1)).

    Where |log u| > 80 / max(|a|, |1 - a|, 1), f goes on as its tangent: S f(u) = S g(U) + T f'(U), with U the
    clipped u and g = f - u f'. So continued it is still convex, hence still a divergence, and logits of +-1e4
    give a large number instead of an overflow. For 0 < a < 1 the difference is below rounding.
    """
    if alpha in (0.0, 1.0):  # the limits of the formula are the two KLs
        value, slope = (forward_kl if alpha else reverse_kl)(log_s, log_t, s)
        return value * scale, slope * scale
    t, log_u = log_t.exp(), log_t - log_s
    limit = 80.0 / max(abs(alpha), abs(1.0 - alpha), 1.0)
    log_u = torch.where((s == 0) & (t == 0), 0.0, log_u).clamp_(-limit, limit)
    slope = (log_u * alpha).expm1_().mul_(s).mul_(-scale / alpha)
    derivative = log_u.mul_(alpha - 1.0).expm1_().mul_(scale / (alpha - 1.0))
    value = derivative.mul_(t).add_(slope).sum(-1)
    if alpha > 1:  # f'(inf) = inf: the student must cover the teacher
        value = value.masked_fill(((t > 0) & log_s.isneginf()).any(-1), math.inf)
    elif alpha < 0:  # f(0) = inf: the teacher must cover the student
        value = value.masked_fill(((s > 0) & log_t.isneginf()).any(-1), math.inf)
    return value, slope


def jeffreys(log_s: Tensor, log_t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """KL(T || S) + KL(S || T)."""
    forward, forward_slope = forward_kl(log_s, log_t.clone(), s)
    reverse, reverse_slope = reverse_kl(log_s, log_t, s)
    return forward + reverse, forward_slope + reverse_slope


def f_divergence(log_s: Tensor, log_t: Tensor, s: Tensor, *, name: str) -> tuple[Tensor, Tensor]:
    """The f-divergence called `name`: a key of F_DIVERGENCES, or `alpha_<number>`."""
    if name in F_DIVERGENCES:
        return F_DIVERGENCES[name](log_s, log_t, s)
    try:
        alpha = float(name.removeprefix("alpha_")) if name.startswith("alpha_") else math.nan
    except ValueError:
        alpha = math.nan
    if not math.isfinite(alpha):
        known = [*F_DIVERGENCES, "alpha_<number>"]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean '{close[0]}'?)" if close else ""
        raise ValueError(f"f-divergence '{name}' is unknown{hint}; known: {', '.join(known)}")
    return power(log_s, log_t, s, alpha=alpha)


F_DIVERGENCES: dict[str, Core] = {
    "kl_forward": forward_kl,  # u log u
    "kl_reverse": reverse_kl,  # -log u
    "jensen_shannon": partial(jsd, beta=0.5),  # (u log u - (1 + u) log((1 + u) / 2)) / 2, at most log 2
    "jeffreys_sum": jeffreys,  # (u - 1) log u
    "total_variation": total_variation,  # |u - 1| / 2, at most 1
    "pearson_chi2": partial(power, alpha=2.0, scale=2.0),  # (u - 1)^2
    "neyman_chi2": partial(power, alpha=-1.0, scale=2.0),  # (1 - u)^2 / u
    "squared_hellinger": partial(power, alpha=0.5, scale=0.5),  # (sqrt u - 1)^2, at most 2
    "triangular": triangular,  # (u - 1)^2 / (1 + u), at most 2
}
