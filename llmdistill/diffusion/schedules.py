"""Masking schedules: the share alpha(t) of tokens that are still there at time t, from 1 at t = 0 to 0 at t = 1.

The weight of a time in the evidence bound is w(t) = -alpha'(t) / (1 - alpha(t)); for ``linear`` and ``log_linear`` that
is 1/t (MDLM, arXiv 2406.07524, section 3.5; LLaDA, arXiv 2502.09992, equation 3). All in float64: near t = 0 the weight
is a quotient of two small numbers.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmdistill.diffusion.names import named
from llmdistill.errors import UserError

__all__ = ["cosine", "cosine_mdlm", "cosine_squared", "linear", "log", "log_linear", "sqrt", "square"]

EPS = 1e-3  # the least time that is drawn, and what MDLM's schedules leave at t = 1
_HALF_PI = math.pi / 2


@dataclass(frozen=True)
class Schedule:
    """alpha and its derivative, as functions of t [...] in float64."""

    alpha_of: Callable[[Tensor], Tensor]
    slope_of: Callable[[Tensor], Tensor]

    def alpha(self, t: Tensor) -> Tensor:
        """Share of tokens kept at t."""
        return self.alpha_of(t.double())

    def weight(self, t: Tensor) -> Tensor:
        """w(t) = -alpha' / (1 - alpha), of t > 0."""
        return -self.slope_of(t.double()) / (1 - self.alpha(t))

    def time_of(self, alpha: Tensor) -> Tensor:
        """The t at which alpha(t) is ``alpha``, by bisection: every schedule falls strictly."""
        low, high = torch.zeros_like(alpha.double()), torch.ones_like(alpha.double())
        for _ in range(60):
            middle = (low + high) / 2
            later = self.alpha(middle) > alpha
            low, high = torch.where(later, middle, low), torch.where(later, high, middle)
        return (low + high) / 2


linear = Schedule(lambda t: 1 - t, lambda t: -torch.ones_like(t))
log_linear = Schedule(lambda t: 1 - (1 - EPS) * t, lambda t: -(1 - EPS) * torch.ones_like(t))
cosine = Schedule(  # dllm: 1 - cos(pi/2 (1 - t))
    lambda t: 1 - torch.cos(_HALF_PI * (1 - t)), lambda t: -_HALF_PI * torch.sin(_HALF_PI * (1 - t))
)
cosine_mdlm = Schedule(  # exp(-sigma) of MDLM's CosineNoise
    lambda t: EPS + (1 - EPS) * torch.cos(_HALF_PI * t), lambda t: -(1 - EPS) * _HALF_PI * torch.sin(_HALF_PI * t)
)
cosine_squared = Schedule(
    lambda t: EPS + (1 - EPS) * torch.cos(_HALF_PI * t) ** 2, lambda t: -(1 - EPS) * _HALF_PI * torch.sin(math.pi * t)
)
square = Schedule(lambda t: 1 - t**2, lambda t: -2 * t)
sqrt = Schedule(lambda t: 1 - t.sqrt(), lambda t: -0.5 / t.sqrt())
log = Schedule(lambda t: 1 - torch.log1p(t) / math.log(2), lambda t: -1 / ((1 + t) * math.log(2)))


def schedule(name: str) -> Schedule:
    """The schedule called ``name``."""
    found: Schedule = named(sys.modules[__name__], name, "diffusion.schedule")
    return found


def sample_times(
    shape: tuple[int, ...],
    *,
    low: float = EPS,
    high: float = 1.0,
    antithetic: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Times [*shape] in float64, uniform on [low, high).

    ``antithetic``: the i-th of n lies in the i-th stretch of length 1/n, shifted by a draw of its own and wrapped, so
    that a batch covers the interval (MDLM; BD3-LM draws so over batch times blocks, arXiv 2503.09573, section 4).
    ``low`` and ``high`` other than the default are BD3-LM's clipped schedule: it trains with less variance, and what it
    reports as a bound must be measured on the whole interval.

    Raises:
        UserError: not 0 < low < high <= 1.
    """
    if not 0 < low < high <= 1:
        raise UserError(f"diffusion.clip is [{low:g}, {high:g}]; it must be 0 < low < high <= 1. Fix: [{EPS:g}, 1].")
    n = math.prod(shape)
    u = torch.rand(n, dtype=torch.float64, generator=generator, device=device)
    if antithetic:
        u = (u / n + torch.arange(n, dtype=torch.float64, device=device) / n) % 1
    return (low + (high - low) * u).view(shape)
