"""The balance loss of a mixture of experts: what a model adds to its own loss, and would drop without labels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from llmdistill.compat.patching import patched

FUNCTION = "load_balancing_loss_func"  # of the modelling files of transformers


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


@contextmanager
def counting_tokens(model: nn.Module, attention_mask: Tensor | None, there: Tensor | None = None) -> Iterator[None]:
    """Inside, balance losses are over the tokens that are ``there`` [B, T] bool, or where that is not said, also where
    the mask [B, 1, Q, K] says who sees whom, which transformers reads as one of tokens [B, T]: a token is there that
    sees itself."""
    biased = attention_mask is not None and attention_mask.dim() == 4
    if (there is None and not biased) or not router_inputs(model):
        yield
        return
    if there is None:
        assert attention_mask is not None
        there = attention_mask.diagonal(dim1=-2, dim2=-1)[:, 0] == 0
    there_BT = there.long()
    modules = {sys.modules[type(module).__module__] for module in model.modules()}
    with ExitStack() as stack:
        for modelling in modules:
            if (own := vars(modelling).get(FUNCTION)) is not None:
                stack.enter_context(patched(modelling, FUNCTION, _over(own, there_BT)))
        yield


def _over(own: Any, there_BT: Tensor) -> Any:
    def balance(gate_logits: Any, num_experts: Any = None, top_k: Any = 2, attention_mask: Any = None) -> Any:
        return own(gate_logits, num_experts, top_k, there_BT)

    return balance
