"""Forwards over a canvas, of which only a block is needed: all anew, or with keys and values kept.

``block`` is exact for block-causal attention. With full attention every key depends on every token, so ``prefix`` (all
but what lies before the block is computed anew) and ``dual`` (only the block is) are approximations, right at the first
step of every block (Fast-dLLM, arXiv 2505.22618, section 3.2).

Logits that are shifted need the state of the token before the block: it is computed with the block, except under
block-causal attention, where it belongs to the clean text and is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from llmdistill.diffusion.attention import additive, block_causal, block_ids
from llmdistill.diffusion.losses import without_mask_token


class SpanLayer(DynamicLayer):
    """Keys and values of a layer; with ``span`` set, new ones take the place of those columns instead of following.

    The old tensors are left as they were: whoever holds them sees no change.
    """

    span: tuple[int, int] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.span is None:
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        assert self.keys is not None and self.values is not None
        start, end = self.span
        self.keys = torch.cat([self.keys[..., :start, :], key_states, self.keys[..., end:, :]], -2)
        self.values = torch.cat([self.values[..., :start, :], value_states, self.values[..., end:, :]], -2)
        return self.keys, self.values


class SpanCache(Cache):
    """Of all layers."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=SpanLayer)

    def overwrite(self, span: tuple[int, int] | None) -> None:
        """The columns that the next forward replaces; None: it appends."""
        for layer in self.layers:
            layer.span = span  # type: ignore[union-attr]

    def keep(self, length: int) -> None:
        """Forgets all columns from ``length`` on."""
        self.crop(length - self.get_seq_length())


class Canvas:
    """The sequences that are being written: B of L tokens, of which the last ``new`` are the completion.

    Args:
        model: a :class:`~llmdistill.diffusion.backbone.MaskedDiffusionLM`, or what is called like one.
        ids: [B, L]. attention_mask: [B, L]. prompt: number of columns of the prompt.
    """

    def __init__(self, model: Any, ids: Tensor, attention_mask: Tensor, prompt: int) -> None:
        self.model, self.ids, self.prompt = model, ids, prompt
        self.attention_mask = attention_mask.long()
        self.position_ids = (self.attention_mask.cumsum(-1) - 1).clamp_min(0)
        self.block_size: int | None = getattr(model, "block_size", None)
        self.shift: bool = getattr(model, "shift", False)
        lengths = self.attention_mask[:, :prompt].sum(-1)
        self.blocks = (
            None if self.block_size is None else block_ids(self.attention_mask, self.block_size, prompt_lengths=lengths)
        )

    def bias(self, end: int) -> Tensor | None:
        """Of a forward over the first ``end`` columns; None where the model makes its own."""
        return None if self.blocks is None else additive(block_causal(self.blocks[:, :end]))

    def whole(self, ids: Tensor, end: int) -> Tensor:
        """Logits [B, end, V] of the first ``end`` columns of ``ids``: no keys are kept."""
        options = {"position_ids": self.position_ids[:, :end], "bias": self.bias(end)}
        logits: Tensor = self.model(ids[:, :end], attention_mask=self.attention_mask[:, :end], **options)
        return without_mask_token(logits, self.model.mask_token_id)


class NoCache:
    """Every forward over all columns (under block-causal attention: all up to the block's end)."""

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas

    def logits(self, start: int, end: int, fresh: bool) -> Tensor:
        """[B, end - start, V] of a block; ``fresh``: the first time for this block."""
        c = self.canvas
        return c.whole(c.ids, c.ids.shape[1] if c.blocks is None else end)[:, start:end]


class PrefixCache:
    """Keys of what lies before the block are kept while the block is written."""

    dual = False

    def __init__(self, canvas: Canvas) -> None:
        self.canvas, self.cache = canvas, SpanCache()

    def logits(self, start: int, end: int, fresh: bool) -> Tensor:
        """As :meth:`NoCache.logits`."""
        c, first = self.canvas, max(start - int(self.canvas.shift), 0)
        if fresh:
            self.cache = SpanCache()
            begin, stop, offset = 0, c.ids.shape[1], start
        else:
            begin, stop, offset = first, end if self.dual else c.ids.shape[1], start - first
        if not fresh and self.dual:
            self.cache.overwrite((begin, stop))
        keys = c.attention_mask.bool().unsqueeze(1).expand(-1, stop - begin, -1)
        logits = c.model(
            c.ids[:, begin:stop],
            attention_mask=c.attention_mask[:, begin:stop],
            position_ids=c.position_ids[:, begin:stop],
            bias=additive(keys),
            past_key_values=self.cache,
        )
        if not self.dual:
            self.cache.keep(first)
        return logits[:, offset : offset + end - start]  # type: ignore[no-any-return]


class DualCache(PrefixCache):
    """Keys of everything are kept while the block is written; the block's own are replaced by every forward."""

    dual = True


class BlockCache:
    """Keys of the finished blocks, which under block-causal attention never change."""

    def __init__(self, canvas: Canvas) -> None:
        self.canvas, self.cache = canvas, SpanCache()
        self.before: Tensor | None = None  # unshifted logits of the last finished token

    def logits(self, start: int, end: int, fresh: bool) -> Tensor:
        """As :meth:`NoCache.logits`."""
        c = self.canvas
        assert c.blocks is not None
        finished = self.cache.get_seq_length()
        if fresh and start > finished:
            self.before = self._forward(finished, start)[:, -1:]
        logits = self._forward(start, end)
        self.cache.keep(start)
        if c.shift:
            first = logits[:, :1] if self.before is None else self.before
            logits = torch.cat([first, logits[:, :-1]], 1)
        return without_mask_token(logits.float(), c.model.mask_token_id)

    def _forward(self, begin: int, stop: int) -> Tensor:
        c = self.canvas
        assert c.blocks is not None
        logits: Tensor = c.model.unshifted(
            c.ids[:, begin:stop],
            c.attention_mask[:, begin:stop],
            c.position_ids[:, begin:stop],
            additive(block_causal(c.blocks[:, begin:stop], c.blocks[:, :stop])),
            self.cache,
        )
        return logits


CACHES: dict[str, type[NoCache | PrefixCache | BlockCache]] = {
    "none": NoCache,
    "prefix": PrefixCache,
    "dual": DualCache,
    "block": BlockCache,
}
