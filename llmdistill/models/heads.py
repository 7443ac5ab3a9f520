"""The output head: where it is, and how to stand in its place. How logits come of it: :mod:`.transforms`.

Full logits [B, T, V] are never wanted here: teachers keep hidden rows, the trainer computes its loss chunk by chunk.
Both run *inside* the head's ``forward``, so that whatever wraps the module (autocast, DDP, ZeRO-3's parameter
gathering) sees the head used where the model's author put it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmdistill.compat import zero3
from llmdistill.compat.attention import sequence_by_sequence
from llmdistill.errors import UserError
from llmdistill.models.few_tokens import few_tokens
from llmdistill.models.modes import trying_out
from llmdistill.models.parted import parting
from llmdistill.models.transforms import Transform, known_logits, transform_of
from llmdistill.models.weights import base_model
from llmdistill.texts import Rollout
from llmdistill.texts.views import View, plain

Compute = Callable[[Tensor], Tensor]  # of hidden [B, T, H]: what stands in a head's place

# By id of the head, for the moment in which a stand-in is set or taken away: never held while anything is computed. Not
# on the head itself: a lock can be neither copied nor pickled with the model. One of a head that is gone is used again.
_locks: dict[int, threading.Lock] = {}


# (scale, cap) of the heads that were tried out; a copy of a model is tried out anew.
_transforms: weakref.WeakKeyDictionary[nn.Linear, Transform] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Head:
    """A model's output layer, and what the model does to its output: see :class:`.transforms.Transform`."""

    linear: nn.Linear
    logit_scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        """Logit columns (often more than the tokenizer has ids)."""
        return self.linear.out_features


def head_of(model: nn.Module) -> Head:
    """Finds the head of a causal language model (PEFT-wrapped or not), and by a forward pass on a few tokens, the first
    time, how the model forms logits from it.

    Of a model whose weights ZeRO-3 holds in shards, which cannot run yet, the latter is what the config's usual names
    say; :func:`check_head` tries it out when it can run.

    Raises:
        UserError: the head is not a plain linear layer, or the model does more to its output than scale and cap it.
    """
    linear = plain_head(model)
    found = _transforms.get(linear)
    if found is None:
        if any(zero3.is_sharded(p) for p in model.parameters()):
            found = named_transform(model.config.get_text_config())  # type: ignore[operator,union-attr]
        else:
            found = _transforms[linear] = tried_transform(model, linear, model.config)
    return Head(linear, found.logit_scale, found.softcap)


def check_head(model: nn.Module, forward_model: nn.Module) -> None:
    """Tries out a head that :func:`head_of` could not: the model's, run as ``forward_model``. On every rank at once.

    Raises:
        UserError: as :func:`head_of`.
    """
    linear = plain_head(model)
    if linear not in _transforms:
        _transforms[linear] = tried_transform(forward_model, linear, model.config)


def tried_transform(model: nn.Module, linear: nn.Linear, config: Any) -> Transform:
    """What the model makes of the output of its head, by a forward pass on a few tokens with known numbers there.

    Raises:
        UserError: it is no scale and no soft cap; the output is not that of this head; or the model cannot run on text.
    """
    name, seen = type(base_model(model)).__name__, list[tuple[Tensor, ...]]()

    def known(hidden_BTH: Tensor) -> Tensor:
        own_BTV = type(linear).forward(linear, hidden_BTH)
        plain_BTV = nn.functional.linear(hidden_BTH, linear.weight, linear.bias)
        seen.append((own_BTV, plain_BTV, known_logits(hidden_BTH, own_BTV.shape[-1])))
        return seen[-1][2]

    view = plain(few_tokens(model, 4))
    try:
        with trying_out(model), with_logits(linear, known):
            logits_BTV = model(**view.inputs(), use_cache=False).logits
    except UserError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UserError(
            f"{name} cannot be run on a few tokens of text: {type(error).__name__} {reason}. "
            "Fix: a causal language model whose forward takes input_ids, attention_mask and position_ids."
        ) from error
    fix = "Fix: a model whose logits are those of a linear head, scaled or softly capped at most"
    if not seen:
        raise UserError(f"the forward of {name} does not use its output head, {type(linear).__name__}. {fix}.")
    own_BTV, plain_BTV, put_in = seen[-1]
    found = transform_of(put_in, logits_BTV, config)
    rounding = 1e-3 if own_BTV.dtype in (torch.float32, torch.float64) else 4e-2
    away = float((own_BTV - plain_BTV).nan_to_num().abs().max())  # damaged weights are another matter
    if found is None or not away <= rounding * max(float(plain_BTV.nan_to_num().abs().max()), 1e-6):
        raise UserError(
            f"the forward of {name} does more to the logits of its head than scale and cap them: of {_shown(put_in)} "
            f"it made {_shown(logits_BTV)}. What is trained would be another distribution. {fix}."
        )
    return found


def _shown(x_BTV: Tensor) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in x_BTV.flatten()[:6].tolist()) + ", …]"


def named_transform(config: Any) -> Transform:
    """By the usual names: Cohere multiplies its logits, Granite divides them; Gemma-2 and -3 cap them softly."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Transform(scale, getattr(config, "final_logit_softcapping", None))


def plain_head(model: nn.Module) -> nn.Linear:
    """The output layer of a causal language model (PEFT-wrapped or not).

    Raises:
        UserError: it is not a plain linear layer (adapted by LoRA, quantised, or absent).
    """
    linear = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(linear, nn.Linear):
        raise UserError(
            f"the output head of {type(model).__name__} is a {type(linear).__name__}; distillation needs a plain "
            "linear head. Fix: leave lm_head out of student.lora_target_modules (and of peft's modules_to_save), and "
            "do not quantise it."
        )
    return linear


class _ByThread:
    """A head's ``forward`` while somebody stands in its place: for every thread what it put there last."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.own = vars(linear).get("forward")  # of the instance, such as one with accelerate's hooks around it
        self.logits: dict[int, list[Compute]] = {}  # by thread, the innermost last

    def __call__(self, hidden_BTH: Tensor) -> Tensor:
        stack = self.logits.get(threading.get_ident())
        if not stack:  # the same model, run elsewhere meanwhile: it has its head
            return self.plain(hidden_BTH)
        return stack[-1](hidden_BTH)

    def plain(self, hidden_BTH: Tensor) -> Tensor:
        return self.own(hidden_BTH) if self.own else type(self.linear).forward(self.linear, hidden_BTH)

    def restore(self) -> None:
        if self.own:
            self.linear.forward = self.own  # type: ignore[method-assign]
        else:
            del self.linear.forward


@contextmanager
def with_logits(linear: nn.Linear, logits: Compute) -> Iterator[None]:
    """Within the context the head's output is ``logits(hidden_BTH)``, in the thread that entered; others may run the
    same model meanwhile, as it is or with a function of their own."""
    thread, lock = threading.get_ident(), _locks.setdefault(id(linear), threading.Lock())
    with lock:
        stand_in = vars(linear).get("forward")
        if not isinstance(stand_in, _ByThread):
            stand_in = linear.forward = _ByThread(linear)  # type: ignore[method-assign,assignment]
        stand_in.logits.setdefault(thread, []).append(logits)
    try:
        yield
    finally:
        with lock:
            stand_in.logits[thread].pop()
            if not stand_in.logits[thread]:
                del stand_in.logits[thread]
            if not stand_in.logits:
                stand_in.restore()


def in_place_of(linear: nn.Linear, compute: Compute) -> AbstractContextManager[None]:
    """Within the context the head computes ``compute(hidden_BTH)`` and hands a [B, T, 1] zero on to the model.

    What the model does with its logits afterwards (scaling, capping) then costs nothing and changes nothing. Setting
    the instance attribute, and not swapping the module, keeps every hook registered on it working.

    This is so in the thread that entered: others may run the same model meanwhile, as it is or with a ``compute`` of
    their own, and none waits for another. Inside the context another one may be entered, and holds until it is left.

    The zeros depend on a scalar that ``compute`` returns, with derivative 0. A loss computed here that is trained on
    adds ``0 * logits.sum()`` of the model's output: ZeRO-3 prepares a module for backward, and DDP finds the
    parameters in use, only on a graph that passes through the modules' outputs.
    """

    def zeros(hidden_BTH: Tensor) -> Tensor:
        return hidden_BTH.new_zeros(*hidden_BTH.shape[:-1], 1) + 0 * compute(hidden_BTH)

    return with_logits(linear, zeros)


def forward_to_head(model: nn.Module, linear: nn.Linear, view: View, compute: Compute, **inputs: Any) -> Any:
    """The model's output on ``view`` with ``compute(hidden_BTH)`` in place of its head; see :func:`in_place_of`."""
    given = view.inputs()
    if (ranks := parting()) is not None:
        given, compute = ranks.inputs(view), ranks.gathering(compute, view.input_ids.shape[1])
    with in_place_of(linear, compute), sequence_by_sequence(view.lengths):
        return model(**given, **inputs, use_cache=False)


@torch.no_grad()
def hidden_states(model: nn.Module, rollout: Rollout) -> Tensor:
    """What the head receives, [B, T, H], without computing a logit."""
    seen: list[Tensor] = []

    def keep(hidden_BTH: Tensor) -> Tensor:
        seen.append(hidden_BTH)
        return hidden_BTH.new_zeros(())

    forward_to_head(model, plain_head(model), plain(rollout), keep)
    return seen[0]
