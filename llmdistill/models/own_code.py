"""Models with code of their own are called with what they take: LLaDA has no ``position_ids``, Dream adds a 4-D mask.

A hook before the model's forward does it, so that sampling, training and whatever else runs the model need not know.
It is not saved: a model that is loaded again gets it again.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.models.weights import base_model

ADDS_ITS_MASK = ("DreamModel",)  # classes whose attention adds whatever mask they are given
MARK = "_called_as_it_takes"
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
    if (lacks or adds) and not getattr(model, MARK, False):
        setattr(model, MARK, True)
        model.register_forward_pre_hook(partial(_adapt, lacks, adds), with_kwargs=True)


def is_adapted(model: nn.Module) -> bool:
    """Whether the hook is below ``model``."""
    return any(getattr(module, MARK, False) for module in (model, base_model(model)))


def _adapt(
    lacks: tuple[str, ...], adds: bool, model: nn.Module, args: Any, given: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    kept = {name: value for name, value in given.items() if name not in lacks}
    mask = kept.get("attention_mask")
    if adds and isinstance(mask, Tensor) and mask.dim() == 2:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        hidden_BT = (1 - mask.to(dtype)) * torch.finfo(dtype).min
        kept["attention_mask"] = hidden_BT[:, None, None].expand(-1, -1, mask.shape[1], -1)
    return args, kept
