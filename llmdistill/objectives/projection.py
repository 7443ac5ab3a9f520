"""From final hidden states to logits, the way the model's config wants it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmdistill.objectives.fused import compute_dtype


@dataclass(frozen=True, eq=False)
class Projection:
    """A detached, possibly narrowed and cast view of an lm_head; uses its tensors, never its forward.

    logits = softcap tanh(scale x / softcap) of x = hidden @ weight.T + bias. `logit_scale` multiplies
    (Cohere); for a model that divides (Granite) pass the inverse. Gemma 2 has a softcap. Both are applied in
    float32.
    """

    weight_VH: Tensor
    bias_V: Tensor | None
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(
        cls,
        lm_head: nn.Linear,
        dtype: torch.dtype,
        vocab_size: int | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
    ) -> "Projection":
        weight_VH = lm_head.weight.detach()[:vocab_size].to(dtype)
        bias_V = None if lm_head.bias is None else lm_head.bias.detach()[:vocab_size].to(dtype)
        return cls(weight_VH, bias_V, logit_scale, softcap)

    def matmul(self, hidden_nH: Tensor) -> Tensor:
        """x [n, V] in the dtype of the weight."""
        return F.linear(hidden_nH.to(self.weight_VH.dtype), self.weight_VH, self.bias_V)

    def rescale(self, x_nV: Tensor) -> Tensor:
        """Logits [n, V] from x; differentiable."""
        if self.logit_scale == 1.0 and self.softcap is None:
            return x_nV
        logits_nV = x_nV.to(compute_dtype(x_nV)) * self.logit_scale
        return logits_nV if self.softcap is None else self.softcap * torch.tanh(logits_nV / self.softcap)


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Dtype of the projection: autocast's where it is on (never for float64), else hidden's."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def cast_head(lm_head: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    """lm_head itself if it has that dtype, else a frozen cast copy of its tensors."""
    if lm_head.weight.dtype == dtype:
        return lm_head
    copy = nn.Linear(lm_head.in_features, lm_head.out_features, bias=lm_head.bias is not None, device="meta")
    copy.weight = nn.Parameter(lm_head.weight.detach().to(dtype), requires_grad=False)
    if lm_head.bias is not None:
        copy.bias = nn.Parameter(lm_head.bias.detach().to(dtype), requires_grad=False)
    return copy
