"""A sequence of a few tokens that mean nothing special, on which models are tried out."""

from __future__ import annotations

import torch
from torch import nn

from llmdistill.models.weights import base_model
from llmdistill.texts import Rollout


def few_tokens(model: nn.Module, count: int) -> Rollout:
    """One sequence [1, count] of ids that the model's config gives no meaning (image placeholders, pad, eos)."""
    inner = base_model(model)
    configs = (inner.config, inner.config.get_text_config())
    named = [getattr(c, key) for c in configs for key in vars(c) if key.endswith(("_id", "_ids", "_index"))]
    special = {i for value in named for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)}
    width = inner.config.get_text_config().vocab_size
    plain = [i for i in range(width) if i not in special] or [0]
    at = torch.arange(1, count + 1) * 7 % len(plain)
    input_ids = torch.tensor(plain)[at][None].to(next(inner.parameters()).device)
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    return Rollout(input_ids, mask, mask)
