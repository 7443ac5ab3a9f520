"""The diffusion value model: a denoiser's last hidden state, and a linear head that begins at zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.diffusion.attention import additive, block_causal, block_ids
from llmdistill.diffusion.backbone import MaskedDiffusionLM


class DiffusionValue(nn.Module):
    """V of every token [B, L] on a noised copy: what the whole text will be worth (TraceRL, arXiv 2509.06949, 3.3)."""

    def __init__(self, denoiser: MaskedDiffusionLM) -> None:
        super().__init__()
        self.denoiser = denoiser
        hidden: int = denoiser.config.get_text_config().hidden_size
        self.head = nn.Linear(hidden, 1, bias=False).to(denoiser.device)
        nn.init.zeros_(self.head.weight)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Float32 values at the tokens' own indices: no shift, since nothing is predicted."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        positions = (mask.long().cumsum(-1) - 1).clamp_min(0)
        given: Any = mask
        if self.denoiser.block_size is not None:
            given = additive(block_causal(block_ids(mask, self.denoiser.block_size)), self.denoiser.model.dtype)
        base = self.denoiser.model.base_model
        states = base(input_ids=input_ids, attention_mask=given, position_ids=positions).last_hidden_state
        values: Tensor = self.head(states.float()).squeeze(-1)
        return values


class ValueHead(nn.Module):
    """V of states [N, H] -> [N] of a student that is trained beside it: normalised, then a linear map from zero."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.head = nn.Linear(hidden, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, states: Tensor) -> Tensor:
        normalised = nn.functional.layer_norm(states.float(), states.shape[-1:])
        values: Tensor = self.head(normalised).squeeze(-1)
        return values
