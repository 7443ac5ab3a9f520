"""The balance loss of a mixture of experts: what a model adds to its own loss, and would drop without labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def coefficient(model: nn.Module) -> float:
    """The weight that the model's config gives its router's balance loss; 0 where it has no router."""
    config = getattr(model, "config", None)
    if config is None:  # an engine or a wrapper: what it wraps has one
        config = getattr(getattr(model, "module", None), "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        return 0.0
    return float(getattr(config.get_text_config(), "router_aux_loss_coef", None) or 0.0)


def router_inputs(model: nn.Module) -> dict[str, Any]:
    """What the forward must be told for the balance loss to be computed."""
    return {"output_router_logits": True} if model.training and coefficient(model) else {}


def balance_loss(model: nn.Module, output: Any) -> Tensor | None:
    """coefficient * the router's balance loss of a training forward, with gradient; None where there is none."""
    balance = getattr(output, "aux_loss", None)
    if balance is None or not isinstance(balance, Tensor) or not model.training:
        return None
    return coefficient(model) * balance
