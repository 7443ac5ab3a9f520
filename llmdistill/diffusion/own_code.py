"""Models with code of their own are called with what they take: LLaDA has no ``position_ids``, Dream adds a 4-D mask.

A hook before the model's forward does it, so that sampling, training and whatever else runs the model need not know.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.diffusion.attention import additive, full

ADDS_ITS_MASK = ("DreamModel",)  # classes whose attention adds whatever mask they are given
OPTIONAL = ("position_ids", "use_cache")  # arguments that a model may not have


def called_as_it_takes(model: nn.Module) -> None:
    """Hangs the hook below ``model`` where it is needed, once."""
    takes = inspect.signature(model.forward).parameters
    lacks = (
        ()
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
        else tuple(name for name in OPTIONAL if name not in takes)
    )
    adds = type(model).__name__ in ADDS_ITS_MASK
    if (lacks or adds) and not getattr(model, "_called_as_it_takes", False):
        model._called_as_it_takes = True  # type: ignore[assignment]
        model.register_forward_pre_hook(partial(_adapt, lacks, adds), with_kwargs=True)


def _adapt(
    lacks: tuple[str, ...], adds: bool, model: nn.Module, args: Any, given: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    kept = {name: value for name, value in given.items() if name not in lacks}
    mask = kept.get("attention_mask")
    if adds and isinstance(mask, Tensor) and mask.dim() == 2:
        parameter = next(model.parameters())
        kept["attention_mask"] = additive(
            full(mask), parameter.dtype if parameter.is_floating_point() else torch.float32
        )
    return args, kept
