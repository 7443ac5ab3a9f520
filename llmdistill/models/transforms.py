"""What a model does to the output of its head: found by trying it out, not by the names of its config's attributes.

Architectures call their factors ``logit_scale``, ``logits_scaling``, ``lm_head_multiplier``, multiply or divide by
them, behind the head or before it. So the head is made to put out known numbers, and what the model makes of them says
what it does: :func:`transform_of` reads a scale and a soft cap from that, or refuses. A config's numbers are only used
to round what was found to what was meant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Small ones show the scale, large ones the cap, those between that it is tanh.
_VALUES = (0.0, 1e-4, -1e-2, 0.5, -3.0, 11.0, -40.0, 150.0, -1e3, 3e4)
_TOLERANCE = 1e-4  # relative: float32 rounds at 1e-7, tanh and its argument a few times


@dataclass(frozen=True)
class Transform:
    """logits = softcap tanh(scale x / softcap) of x, what the head puts out; without a cap, scale x."""

    logit_scale: float = 1.0
    softcap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        scaled = x * self.logit_scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def known_logits(hidden_BTH: Tensor, vocab_size: int) -> Tensor:
    """Numbers to put in the place of a head's output, [B, T, V] float32: every value at every position, somewhere."""
    values = torch.tensor(_VALUES, device=hidden_BTH.device)
    shape = (*hidden_BTH.shape[:-1], vocab_size)
    index = torch.arange(math.prod(shape), device=hidden_BTH.device).reshape(shape)
    return values[(index * 7 + index // vocab_size) % len(_VALUES)]


def transform_of(put_in: Tensor, came_out: Tensor, config: Any) -> Transform | None:
    """The transform that turns ``put_in`` into ``came_out``; None where it is no scale and no soft cap.

    Args:
        put_in, came_out: [..., V], of :func:`known_logits` and of the model's forward.
        config: of the model; its numbers are what a scale or cap is rounded to.
    """
    if put_in.shape != came_out.shape or torch.equal(put_in, came_out):
        return Transform() if put_in.shape == came_out.shape else None
    x, y = put_in.double().flatten(), came_out.double().flatten()
    small, large = x == x.new_tensor(_VALUES[1], dtype=put_in.dtype).double(), x == _VALUES[-1]
    if not bool(small.any() and large.any()):
        return None
    scale = float(y[small][0] / x[small][0])
    at_most = float(y[large][0])
    if not (math.isfinite(scale) and math.isfinite(at_most)) or scale == 0:
        return None
    cap = None if abs(at_most - scale * _VALUES[-1]) <= 1e-3 * abs(at_most) else abs(at_most)
    numbers = list(_numbers(config))
    found = Transform(_nearest(scale, numbers), None if cap is None else _nearest(cap, numbers))
    expected = found(x)
    return found if bool(((expected - y).abs() <= _TOLERANCE * y.abs().clamp(min=1e-2)).all()) else None


def _numbers(config: Any) -> Iterator[float]:
    """Whatever a config says that may be a scale, and its inverse."""
    yield 1.0
    for name in vars(config):
        value = getattr(config, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool) and value and math.isfinite(value):
            yield float(value)
            yield 1.0 / float(value)


def _nearest(found: float, numbers: list[float]) -> float:
    """The config's number that rounding turned into what was found, or what was found."""
    nearest = min(numbers, key=lambda number: abs(number - found))
    return nearest if abs(nearest - found) <= _TOLERANCE * abs(found) else found
