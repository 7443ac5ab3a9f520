"""How a masked diffusion student reads a text: with masks in it, and attention as its blocks want it.

Where the row of a token stands is said here: at the token itself, or before it where the head predicts the next one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmdistill.diffusion import attention
from llmdistill.diffusion.backbone import MaskedDiffusionLM
from llmdistill.texts.rollout import Rollout, position_ids
from llmdistill.texts.views import View


@dataclass(frozen=True)
class Denoiser:
    """What of a masked diffusion model decides how it reads.

    Called with a noised rollout it is the model's view of it. Full attention: one sequence with masks. In blocks: the
    clean sequence and behind it the noised one, whose blocks read the clean text of those before them.
    """

    mask_token_id: int
    shift: bool = False
    block_size: int | None = None

    def around(self, model: Any) -> MaskedDiffusionLM:
        """The model with logits as this reads it: to write with, or to measure."""
        shape: dict[str, Any] = {"shift": self.shift, "block_size": self.block_size}
        return MaskedDiffusionLM(model, self.mask_token_id, **shape, probe=False)

    def __call__(self, rollout: Rollout) -> View:
        return self._full(rollout) if self.block_size is None else self._in_blocks(rollout)

    def _full(self, rollout: Rollout) -> View:
        noise = rollout.noise
        assert noise is not None
        rows_BT = rollout.completion_mask.clone()
        rows_BT[:, 0] = False  # of the first token there is none, shifted or not
        at_BT = torch.cat([rows_BT[:, 1:], rows_BT[:, :1]], 1) if self.shift else rows_BT
        whole = bool((noise.ahead >= 1).all())
        mask = rollout.attention_mask if whole else attention.additive(annealed(rollout))
        noisy = rollout.input_ids.masked_fill(noise.masked, self.mask_token_id)
        return View(noisy, mask, position_ids(rollout.attention_mask), at_BT, rollout.token_rows())

    def _in_blocks(self, rollout: Rollout) -> View:
        noise, length = rollout.noise, rollout.input_ids.shape[1]
        assert noise is not None
        noisy = rollout.input_ids.masked_fill(noise.masked, self.mask_token_id)
        positions = position_ids(rollout.attention_mask).repeat(1, 2)
        bias = attention.additive(attention.noisy_and_clean(noise.blocks))
        rows_BT = rollout.completion_mask.clone()
        rows_BT[:, 0] = False
        sequence_N, token_N = rows_BT.nonzero(as_tuple=True)
        state_N = token_N + length
        if self.shift:  # what precedes a block is clean, so the first token of a block is predicted there
            begins_N = noise.blocks[sequence_N, token_N] != noise.blocks[sequence_N, token_N - 1]
            state_N = torch.where(begins_N, token_N - 1, state_N - 1)
        at = torch.zeros(len(rollout), 2 * length, dtype=torch.bool, device=rollout.input_ids.device)
        at[sequence_N, state_N] = True
        order_N = (sequence_N * 2 * length + state_N).argsort().argsort()
        both = torch.cat([rollout.input_ids, noisy], 1)
        return View(both, bias, positions, at, rollout.token_rows(), order=order_N)


def annealed(rollout: Rollout) -> Tensor:
    """Who sees whom on the way from causal to full attention, [B, T, T] bool: a draw for every sequence, which is the
    same whatever it is batched with (DiffuLLaMA, arXiv 2410.17891, section 3.2, shares one in a batch)."""
    noise = rollout.noise
    assert noise is not None
    allowed = attention.full(rollout.attention_mask).clone()
    for b, length in enumerate(rollout.attention_mask.sum(1).tolist()):
        u = torch.rand(length, length, generator=torch.Generator().manual_seed(int(noise.seeds[b])))
        seen = attention.annealed(length, float(noise.ahead[b]), u).to(allowed.device)
        allowed[b, :length, :length] &= seen
    return allowed
