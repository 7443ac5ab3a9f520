"""Who may attend to whom, as additive float biases [B or 1, 1, Q, K].

Always float: transformers passes a 4-D mask through untouched, and a boolean one is silently wrong under eager
attention, which adds it: +1 where attention is allowed, +0 where it is not.
"""

from __future__ import annotations

import torch
from torch import Tensor


def additive(allowed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """0 where ``allowed`` [B, Q, K] or [Q, K] bool, the lowest finite number elsewhere; [B or 1, 1, Q, K].

    Finite, so that a padded query that may attend to nothing does not become NaN and spread.
    """
    allowed = allowed if allowed.dim() == 3 else allowed.unsqueeze(0)
    bias = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return bias.masked_fill(~allowed, torch.finfo(dtype).min).unsqueeze(1)


def full(attention_mask: Tensor) -> Tensor:
    """Everybody to everything that is not padding: [B, K] bool -> [B, K, K] bool."""
    return attention_mask.bool().unsqueeze(1).expand(-1, attention_mask.shape[1], -1)


def block_ids(attention_mask: Tensor, block_size: int, prompt_lengths: Tensor | None = None) -> Tensor:
    """The block of every token [B, L], padding -1.

    Blocks begin where the text does, whatever padding stands to its left. With ``prompt_lengths`` [B] the prompt is a
    block of its own (0) and the completion's blocks follow, so that they do not depend on the prompt's length.
    """
    mask = attention_mask.bool()
    positions = mask.long().cumsum(-1) - 1
    if prompt_lengths is None:
        blocks = positions.div(block_size, rounding_mode="floor")
    else:
        after = positions - prompt_lengths.unsqueeze(-1)
        blocks = torch.where(after < 0, 0, after.div(block_size, rounding_mode="floor") + 1)
    return blocks.masked_fill(~mask, -1)


def block_causal(query_blocks: Tensor, key_blocks: Tensor | None = None) -> Tensor:
    """To every block up to one's own: block ids [B, Q] and [B, K] (the queries' own) -> [B, Q, K] bool."""
    key_blocks = query_blocks if key_blocks is None else key_blocks
    keys = key_blocks.unsqueeze(-2)
    return (query_blocks.unsqueeze(-1) >= keys) & (keys >= 0)


def noisy_and_clean(blocks: Tensor, noisy: Tensor | None = None) -> Tensor:
    """Of a row [clean copy of all | noisy copy of ``noisy``]: noisy tokens see their own block's noisy copy and the
    clean copy of earlier blocks; clean tokens the clean copy of blocks up to their own (BD3-LM, arXiv 2503.09573,
    section 3.1).

    Args:
        blocks: [B, L]. noisy: indices into L of the noisy copy; all.

    Returns:
        [B, L + N, L + N] bool.
    """
    noisy_blocks = blocks if noisy is None else blocks[:, noisy]
    clean_to_clean = block_causal(blocks)
    clean_to_noisy = torch.zeros(*blocks.shape, noisy_blocks.shape[1], dtype=torch.bool, device=blocks.device)
    keys = blocks.unsqueeze(1)
    noisy_to_clean = (noisy_blocks.unsqueeze(-1) > keys) & (keys >= 0)
    noisy_keys = noisy_blocks.unsqueeze(1)
    noisy_to_noisy = (noisy_blocks.unsqueeze(-1) == noisy_keys) & (noisy_keys >= 0)
    above = torch.cat([clean_to_clean, clean_to_noisy], -1)
    return torch.cat([above, torch.cat([noisy_to_clean, noisy_to_noisy], -1)], 1)


def annealed(length: int, ratio: float, u: Tensor) -> Tensor:
    """Causal, and of what lies ahead the share ``ratio``: causal OR u < ratio, u [L, L] -> [L, L] bool.

    One draw is shared by a batch (DiffuLLaMA, arXiv 2410.17891, section 3.2); ``ratio`` goes from 0 to 1 over training.
    """
    causal = torch.ones(length, length, dtype=torch.bool, device=u.device).tril()
    return causal | (u < ratio)
