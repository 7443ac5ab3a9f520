"""Per-token losses that compute their gradient in the forward pass.

`per_token(logits, compute)` returns the values of `compute(logits) -> (value [...], grad_logits [..., V])` as
a differentiable tensor. The streaming engine needs value and gradient of a chunk at once anyway, and one
saved [..., V] tensor replaces the half dozen that autograd would keep. First derivatives only.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Compute = Callable[[Tensor], tuple[Tensor, Tensor]]


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, compute: Compute) -> Tensor:
        value, grad_logits = compute(logits)
        ctx.save_for_backward(grad_logits)
        ctx.logits_dtype = logits.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None]:
        (grad_logits,) = ctx.saved_tensors
        return (grad_value.unsqueeze(-1) * grad_logits).to(ctx.logits_dtype), None


def per_token(logits: Tensor, compute: Compute) -> Tensor:
    """Values [...] of `compute` at logits [..., V], its gradient attached; it runs without autograd."""
    if torch.is_grad_enabled() and logits.requires_grad:
        result: Tensor = _PerToken.apply(logits, compute)
        return result
    with torch.no_grad():
        return compute(logits)[0]


def through_softmax(slope: Tensor, s: Tensor) -> Tensor:
    """d value / d logits from the slope d value / d log_s and s = softmax(logits); overwrites both."""
    return slope.sub_(s.mul_(slope.sum(-1, keepdim=True)))


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Losses are formed in float32 whatever the model's dtype; float64 stays (reference computations)."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; logits are divided by it, so it must be > 0")
