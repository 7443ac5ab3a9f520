"""Whether a model reads from left to right: what stands behind a token must not change what is predicted before it.

Some classes that are called causal language models look both ways at a text that they are only given (PaliGemma's
prefix, encoders' heads, models turned bidirectional for embeddings): every token would be scored by a model that has
seen it, and sampling, which cannot, would be another distribution.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from llmdistill.errors import UserError
from llmdistill.models.few_tokens import few_tokens
from llmdistill.models.modes import computes_in_16_bits, trying_out
from llmdistill.models.weights import base_model
from llmdistill.texts.views import plain

_TOKENS = 8
# Over the spread of the logits: kernels sum other rows together with one's own, which rounds otherwise.
_ALLOWED, _ALLOWED_16 = 1e-4, 5e-2


def check_causal(model: nn.Module, forward_model: nn.Module) -> None:
    """Every process calls it.

    Args:
        forward_model: the model as it is run in training.

    Raises:
        UserError: a token changes the logits in front of it.
    """
    text = few_tokens(model, _TOKENS)
    ids = text.input_ids.clone()
    ids[0, -1] = ids[0, 0]  # another one: the few tokens differ
    logits, others = (_logits(model, forward_model, each) for each in (text, replace(text, input_ids=ids)))
    away = float((logits - others)[:-1].abs().max()) / max(float(logits[:-1].std()), 1e-12)
    if away > (_ALLOWED_16 if computes_in_16_bits(model) else _ALLOWED):
        raise UserError(
            f"{type(base_model(model)).__name__} looks ahead: another last token changes its logits before that by "
            f"{away:.2g} of their spread, so it would be scored on what it has seen. Fix: a model that reads from left "
            "to right; llmdistill.diffusion trains those that read both ways."
        )


def _logits(model: nn.Module, forward_model: nn.Module, text: Any) -> Tensor:
    """[T, V] float32."""
    view = plain(text)
    with trying_out(model):
        return forward_model(**view.inputs(), use_cache=False).logits[0].float()  # type: ignore[no-any-return]
