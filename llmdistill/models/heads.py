"""The output head: where it is, how its logits are formed, and how to stand in its place.

Full logits [B, T, V] are never wanted here: teachers keep hidden rows, the trainer computes its loss chunk by chunk.
Both run *inside* the head's ``forward``, so that whatever wraps the module (autocast, DDP, ZeRO-3's parameter
gathering) sees the head used where the model's author put it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.errors import UserError
from llmdistill.texts import Rollout, position_ids

_one_at_a_time = threading.RLock()  # standing in a head's place


@dataclass(frozen=True)
class Head:
    """A model's output layer and the transforms its config applies to the logits."""

    linear: nn.Linear
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """Logit columns (often more than the tokenizer has ids)."""
        return self.linear.out_features


def head_of(model: nn.Module) -> Head:
    """Finds the head of a causal language model (PEFT-wrapped or not).

    Raises:
        UserError: the head is not a plain linear layer (adapted by LoRA, quantised, or absent).
    """
    linear = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(linear, nn.Linear):
        raise UserError(
            f"the output head of {type(model).__name__} is a {type(linear).__name__}; distillation needs a plain "
            "linear head. Fix: leave lm_head out of student.lora_target_modules and do not quantise it."
        )
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    # Cohere multiplies its logits, Granite divides them; Gemma-2 and -3 cap them softly.
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(linear, scale, getattr(config, "final_logit_softcapping", None))


@contextmanager
def in_place_of(linear: nn.Linear, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context the head computes ``compute(hidden_BTH)`` and hands a [B, T, 1] zero on to the model.

    What the model does with its logits afterwards (scaling, capping) then costs nothing and changes nothing. Setting
    the instance attribute, and not swapping the module, keeps every hook registered on it working.

    The zeros depend on a scalar that ``compute`` returns, with derivative 0. A loss computed here that is trained on
    adds ``0 * logits.sum()`` of the model's output: ZeRO-3 prepares a module for backward, and DDP finds the
    parameters in use, only on a graph that passes through the modules' outputs.
    """

    owner = threading.get_ident()

    def forward(hidden_BTH: Tensor) -> Tensor:
        if threading.get_ident() != owner:  # the same model, run elsewhere meanwhile: it has its head
            return type(linear).forward(linear, hidden_BTH)
        value = compute(hidden_BTH)
        return hidden_BTH.new_zeros(*hidden_BTH.shape[:-1], 1) + 0 * value

    with _one_at_a_time:
        linear.forward = forward  # type: ignore[method-assign,assignment]
        try:
            yield
        finally:
            del linear.forward


def forward_to_head(model: nn.Module, linear: nn.Linear, rollout: Rollout, compute: Callable[[Tensor], Tensor]) -> Any:
    """The model's output on ``rollout`` with ``compute(hidden_BTH)`` in place of its head; see :func:`in_place_of`."""
    with in_place_of(linear, compute):
        return model(
            input_ids=rollout.input_ids,
            attention_mask=rollout.attention_mask,
            position_ids=position_ids(rollout.attention_mask),
            use_cache=False,
        )


@torch.no_grad()
def hidden_states(model: nn.Module, rollout: Rollout) -> Tensor:
    """What the head receives, [B, T, H], without computing a logit."""
    seen: list[Tensor] = []

    def keep(hidden_BTH: Tensor) -> Tensor:
        seen.append(hidden_BTH)
        return hidden_BTH.new_zeros(())

    forward_to_head(model, head_of(model).linear, rollout, keep)
    return seen[0]
