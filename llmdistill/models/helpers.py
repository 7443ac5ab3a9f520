"""Modules that a method trains beside the student: projectors, critics, second heads.

They hang below the student while it is trained, so that DDP and DeepSpeed wrap, gather and step them with it, and are
taken out of whatever is saved as the student or pushed to an engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from llmdistill.errors import UserError

NAME = "distillation_helpers"  # of the submodule
Factory = Callable[[int, int], nn.Module]  # (student's hidden size, judge's) -> module


def attach(model: nn.Module, factories: Mapping[str, Factory], sizes: tuple[int, int], seed: int) -> nn.ModuleDict:
    """Makes the helpers and hangs them below ``model``; their start depends on ``seed`` alone.

    Raises:
        UserError: one of them has nothing to train, or a parameter that is a scalar.
    """
    if factories:
        from transformers import set_seed

        set_seed(seed)
    helpers = nn.ModuleDict({name: make(*sizes) for name, make in factories.items()})
    for name, helper in helpers.items():
        if not any(p.requires_grad for p in helper.parameters()):
            raise UserError(f"helper {name!r} has no parameters to train. Fix: leave it out, or make it a function.")
        if bare := next((key for key, p in helper.named_parameters() if p.dim() == 0), None):
            raise UserError(
                f"helper {name!r} has the parameter {bare!r} without a dimension, which DeepSpeed cannot share. "
                "Fix: torch.zeros(1) in place of torch.zeros(())."
            )
    if factories:
        device = next(model.parameters()).device
        model.add_module(NAME, helpers.to(device))
    return helpers


def without(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the helpers."""
    return {name: tensor for name, tensor in state.items() if f"{NAME}." not in name}


def own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The helpers' part of a state dict, by their own names."""
    return {name.split(f"{NAME}.", 1)[1]: tensor for name, tensor in state.items() if f"{NAME}." in name}


def with_learning_rate(optimizer: Any, helpers: nn.Module, rate: float | None) -> None:
    """Gives the helpers groups of their own in a new optimizer, with ``rate``."""
    mine = {id(p) for p in helpers.parameters()}
    if rate is None or not mine:
        return
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in mine]
        if moved:
            group["params"] = [p for p in group["params"] if id(p) not in mine]
            optimizer.add_param_group(
                {**{k: v for k, v in group.items() if k != "params"}, "params": moved, "lr": rate}
            )
