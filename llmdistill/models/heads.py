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
from llmdistill.texts import Rollout
from llmdistill.texts.views import View, plain

Compute = Callable[[Tensor], Tensor]  # of hidden [B, T, H], a scalar: what stands in a head's place

# By id of the head, for the moment in which a stand-in is set or taken away: never held while anything is computed. Not
# on the head itself: a lock can be neither copied nor pickled with the model. One of a head that is gone is used again.
_locks: dict[int, threading.Lock] = {}


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


class _ByThread:
    """A head's ``forward`` while somebody stands in its place: for every thread what it put there last."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.own = vars(linear).get("forward")  # of the instance, such as one with accelerate's hooks around it
        self.computes: dict[int, list[Compute]] = {}  # by thread, the innermost last

    def __call__(self, hidden_BTH: Tensor) -> Tensor:
        stack = self.computes.get(threading.get_ident())
        if not stack:  # the same model, run elsewhere meanwhile: it has its head
            return self.own(hidden_BTH) if self.own else type(self.linear).forward(self.linear, hidden_BTH)
        return hidden_BTH.new_zeros(*hidden_BTH.shape[:-1], 1) + 0 * stack[-1](hidden_BTH)

    def restore(self) -> None:
        if self.own:
            self.linear.forward = self.own  # type: ignore[method-assign]
        else:
            del self.linear.forward


@contextmanager
def in_place_of(linear: nn.Linear, compute: Compute) -> Iterator[None]:
    """Within the context the head computes ``compute(hidden_BTH)`` and hands a [B, T, 1] zero on to the model.

    What the model does with its logits afterwards (scaling, capping) then costs nothing and changes nothing. Setting
    the instance attribute, and not swapping the module, keeps every hook registered on it working.

    This is so in the thread that entered: others may run the same model meanwhile, as it is or with a ``compute`` of
    their own, and none waits for another. Inside the context another one may be entered, and holds until it is left.

    The zeros depend on a scalar that ``compute`` returns, with derivative 0. A loss computed here that is trained on
    adds ``0 * logits.sum()`` of the model's output: ZeRO-3 prepares a module for backward, and DDP finds the
    parameters in use, only on a graph that passes through the modules' outputs.
    """
    thread, lock = threading.get_ident(), _locks.setdefault(id(linear), threading.Lock())
    with lock:
        stand_in = vars(linear).get("forward")
        if not isinstance(stand_in, _ByThread):
            stand_in = linear.forward = _ByThread(linear)  # type: ignore[method-assign,assignment]
        stand_in.computes.setdefault(thread, []).append(compute)
    try:
        yield
    finally:
        with lock:
            stand_in.computes[thread].pop()
            if not stand_in.computes[thread]:
                del stand_in.computes[thread]
            if not stand_in.computes:
                stand_in.restore()


def forward_to_head(model: nn.Module, linear: nn.Linear, view: View, compute: Compute, **inputs: Any) -> Any:
    """The model's output on ``view`` with ``compute(hidden_BTH)`` in place of its head; see :func:`in_place_of`."""
    with in_place_of(linear, compute):
        return model(**view.inputs(), **inputs, use_cache=False)


@torch.no_grad()
def hidden_states(model: nn.Module, rollout: Rollout) -> Tensor:
    """What the head receives, [B, T, H], without computing a logit."""
    seen: list[Tensor] = []

    def keep(hidden_BTH: Tensor) -> Tensor:
        seen.append(hidden_BTH)
        return hidden_BTH.new_zeros(())

    forward_to_head(model, head_of(model).linear, plain(rollout), keep)
    return seen[0]
