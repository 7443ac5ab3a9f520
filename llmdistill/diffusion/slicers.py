"""Estimators of a written text's log-probs, by name and with one signature: how slices are made of what was written.

``trace`` asks about every token in the state it was drawn in (TraceRL); ``random`` and ``coupled`` in states that are
drawn anew; ``full`` with all of the completion masked (diffu-GRPO).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmdistill.diffusion.slicing import Slices, coupled_slices, full_slices, random_slices, trace_slices

__all__ = ["coupled", "full", "random", "trace"]


@dataclass(frozen=True)
class Written:
    """Sequences as they were written. B of L tokens."""

    step_map: Tensor  # [B, L] int64: the step that revealed a token; slicing.NEVER where none did
    valid: Tensor  # [B, L] bool: tokens that count
    prompt: Tensor  # [B, L] bool
    blocks: Tensor | None  # [B, L] int64, of block attention


@dataclass(frozen=True)
class SliceSettings:
    """What the slicers read."""

    shrink: int = 1  # trace: steps that become one slice
    prompt_share: float = 0.0  # full: share of the prompt that is masked too


Slicer = Callable[[Written, SliceSettings, torch.Generator], Slices]


def trace(written: Written, settings: SliceSettings, generator: torch.Generator) -> Slices:
    """See :func:`~llmdistill.diffusion.slicing.trace_slices`; nothing is drawn."""
    return trace_slices(written.step_map, written.valid, shrink_by=settings.shrink, blocks=written.blocks)


def random(written: Written, settings: SliceSettings, generator: torch.Generator) -> Slices:
    """See :func:`~llmdistill.diffusion.slicing.random_slices`."""
    return random_slices(written.valid, *_uniforms(written, generator))


def coupled(written: Written, settings: SliceSettings, generator: torch.Generator) -> Slices:
    """See :func:`~llmdistill.diffusion.slicing.coupled_slices`."""
    return coupled_slices(written.valid, *_uniforms(written, generator))


def full(written: Written, settings: SliceSettings, generator: torch.Generator) -> Slices:
    """See :func:`~llmdistill.diffusion.slicing.full_slices`."""
    u, _ = _uniforms(written, generator)
    return full_slices(written.valid, written.prompt, u, settings.prompt_share)


def _uniforms(written: Written, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    shape = written.valid.shape
    u = torch.rand(shape, dtype=torch.float64, generator=generator)
    return u, torch.rand(shape[0], dtype=torch.float64, generator=generator)
