"""Evaluation mode for a while, and the dtype that a model is tried out in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from llmdistill.compat.patching import random_state_kept
from llmdistill.models.weights import base_model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, put back module by module: a part may be kept in another mode than the whole."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def trying_out(model: nn.Module) -> Iterator[None]:
    """For a few tokens that a model is looked at with: evaluation mode, no gradients, no random state consumed, and
    the precision of :func:`own_precision`."""
    with torch.no_grad(), evaluating(model), random_state_kept(), own_precision(model):
        yield


def own_precision(model: nn.Module) -> torch.autocast:
    """That of its weights, whatever autocast is on around it; where its attention has none but 16 bits, bfloat16's."""
    return torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=attends_in_16_bits(model))


def attends_in_16_bits(model: nn.Module) -> bool:
    """Whether the weights are float32, and the kernels of flash attention, which take 16 bits, read what they give."""
    base = base_model(model)
    return "flash" in str(getattr(base.config, "_attn_implementation", "")) and base.dtype == torch.float32


def computes_in_16_bits(model: nn.Module) -> bool:
    """Whether what it says in :func:`own_precision` is rounded to 16 bits anywhere."""
    return attends_in_16_bits(model) or base_model(model).dtype not in (torch.float32, torch.float64)
