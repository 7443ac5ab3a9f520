"""MaskedDiffusionLM: a causal or masked language model of transformers as a denoiser, without a modelling file of ours.

``config.is_causal = False`` makes a causal model of transformers bidirectional and is saved with it; block attention
and annealing are 4-D float biases, which pass through untouched. Whether that worked for the model at hand is tried
out on a few tokens when it is loaded. What is saved is the plain checkpoint; its config names the mask token, the shift
and the block size.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmdistill.compat.models import auto_class
from llmdistill.compat.patching import random_state_kept
from llmdistill.diffusion.attention import additive, block_causal, block_ids
from llmdistill.diffusion.losses import shift_right, without_mask_token
from llmdistill.diffusion.mask_token import mask_token_of
from llmdistill.errors import UserError
from llmdistill.models.missing import why_not_loaded
from llmdistill.models.modes import evaluating
from llmdistill.models.own_code import called_as_it_takes
from llmdistill.models.weights import base_model

ATTENDING = ("full_attention", "sliding_attention", "chunked_attention", "attention")  # types that can look both ways


class MaskedDiffusionLM(nn.Module):
    """Logits of clean tokens for masked ones.

    Args:
        model: any causal or masked language model of transformers.
        mask_token_id: what stands for a token that is not known.
        shift: the head was trained on the next token, and its logits at t - 1 are read as those of the token at t.
        block_size: None: everything sees everything; else a token sees its own block and those before it.
        probe: try out on a few tokens that the attention is as wanted.

    Raises:
        UserError: a layer that cannot look ahead (recurrent; in block mode also one with a window), by its number and
            type; or a model in which the last token does not reach the first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mask_token_id: int,
        *,
        shift: bool = False,
        block_size: int | None = None,
        probe: bool = True,
    ) -> None:
        super().__init__()
        check_layers(model.config, block_size)
        if block_size is not None and block_size < 1:
            raise UserError(f"diffusion.block_size is {block_size}; it must be at least 1. Fix: leave it out, or 4.")
        columns = embedded_ids(model)
        if not 0 <= mask_token_id < columns:
            raise UserError(
                f"diffusion.mask_token_id is {mask_token_id}, the model embeds {columns} ids. Fix: an id below that."
            )
        self.model, self.mask_token_id, self.shift, self.block_size = model, mask_token_id, shift, block_size
        model.config.is_causal = False
        model.config.mask_token_id = mask_token_id
        model.config.diffusion_shift, model.config.diffusion_block_size = shift, block_size
        self._accepts = set(inspect.signature(base_model(model).forward).parameters)
        called_as_it_takes(base_model(model))
        if probe:
            self.probe()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        mask_token: str | None = None,
        shift: bool | None = None,
        block_size: int | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> tuple[MaskedDiffusionLM, PreTrainedTokenizerBase]:
        """A denoiser and its tokenizer, of a checkpoint that is one already or of any that can become one.

        ``mask_token`` None: the tokenizer's own, or that of the config, or a new ``<|mask|>``. ``shift`` and
        ``block_size`` None: what the checkpoint was saved with; else shifted where the head is a causal one.

        Raises:
            UserError: nothing loadable, a mask token that is a real word, and as the class does.
        """
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            model = auto_class(config).from_pretrained(name, trust_remote_code=trust_remote_code, **options)
        except (OSError, ValueError) as error:
            raise UserError(f"student.model {str(name)!r} cannot be loaded: {why_not_loaded(name, error)}") from error
        return cls.of(model, tokenizer, mask_token=mask_token, shift=shift, block_size=block_size), tokenizer

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        mask_token: str | None = None,
        shift: bool | None = None,
        block_size: int | None = None,
        probe: bool = True,
    ) -> MaskedDiffusionLM:
        """A denoiser of a model that is loaded, which it changes; arguments as of :meth:`from_pretrained`.

        Raises:
            UserError: a mask token that is a real word, and as the class does.
        """
        config = model.config
        check_layers(config, block_size)  # before the model is given a row for a new mask token
        mask_id = mask_token_of(model, tokenizer, mask_token)
        if shift is None:
            shift = getattr(config, "diffusion_shift", None)
        if shift is None:
            shift = predicts_next(config)
        if block_size is None:
            block_size = getattr(config, "diffusion_block_size", None)
        return cls(model, mask_id, shift=shift, block_size=block_size, probe=probe)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        bias: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        """Float32 logits [B, L, V] of the token at every index, the mask token's column at minus infinity.

        Args:
            input_ids: [B, L]. attention_mask: [B, L], 0 on padding, left or right.
            position_ids: [B, L]; by default counted from the first token that is not padding.
            bias: [B or 1, 1, L, K] float, in place of what the class would build.
            past_key_values: a cache that the new keys go into; then ``bias`` and ``position_ids`` are needed.
        """
        logits = self.unshifted(input_ids, attention_mask, position_ids, bias, past_key_values)
        logits = logits.double() if logits.dtype == torch.float64 else logits.float()
        return without_mask_token(shift_right(logits) if self.shift else logits, self.mask_token_id)

    def unshifted(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        bias: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        """What the model itself answers, at its own indices."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        if bias is not None and not bias.is_floating_point():
            raise UserError(
                f"an attention bias is {bias.dtype}; eager attention would add it. Fix: attention.additive(allowed)."
            )
        if bias is None and self.block_size is not None:
            bias = additive(block_causal(block_ids(attention_mask, self.block_size)))
        mask = attention_mask if bias is None else bias.to(self.model.dtype)
        given = {"attention_mask": mask, "position_ids": position_ids, "use_cache": past_key_values is not None}
        given["past_key_values"] = past_key_values
        accepted = {key: value for key, value in given.items() if key in self._accepts}
        return self.model(input_ids=input_ids, **accepted).logits

    @torch.no_grad()
    def probe(self) -> None:
        """Changes the last token of a few, and looks at who sees that.

        Raises:
            UserError: the first token does not (full attention); or one of an earlier block does, or the first of the
                same block does not (block attention).
        """
        block = self.block_size or 8
        weight: Any = self.model.get_input_embeddings().weight  # type: ignore[union-attr]
        # Spread over the vocabulary, whose first ids are often special and never trained; and the last becomes the
        # one that is least like it, so that what sees it cannot answer the same.
        ids = (torch.arange(2 * block, device=self.device) * max(len(weight) // (2 * block), 1)) % len(weight)
        ids, changed = ids.unsqueeze(0), ids.unsqueeze(0).clone()
        changed[0, -1] = (weight - weight[ids[0, -1]]).norm(dim=-1).argmax()
        with evaluating(self.model), random_state_kept():
            logits = self.unshifted(ids)
            difference = (logits - self.unshifted(changed)).abs().amax(-1)[0]
        # Experts compute together the tokens that were routed to them, so another one moves the others by rounding.
        eps = torch.finfo(logits.dtype).eps
        seen = difference > (32 * eps * float(logits.abs().max()) if eps < 1e-6 else 0.0)
        leaks = difference > eps**0.5 * float(difference.max())
        kind, name = f"attention {self.model.config._attn_implementation!r}", type(self.model).__name__
        if self.block_size is None and not bool(seen.all()):
            blind = int((~seen).nonzero()[0, 0])
            raise UserError(
                f"{name} with {kind} is not bidirectional: token {blind} does not see token {2 * block - 1}. "
                "Fix: a model whose attention follows config.is_causal, or --diffusion.block_size."
            )
        if self.block_size is not None and (bool(leaks[:block].any()) or not bool(seen[block:].all())):
            raise UserError(
                f"{name} with {kind} does not follow a 4-D attention mask: the last token of a block is seen by "
                "earlier blocks, or not by its own. Fix: attn_implementation sdpa or eager."
            )

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """A plain checkpoint of transformers; the tokenizer is saved by its own method."""
        self.model.save_pretrained(folder, **options)


def embedded_ids(model: Any) -> int:
    """Rows of a model's input embedding."""
    return int(model.get_input_embeddings().weight.shape[0])


def check_layers(config: Any, block_size: int | None) -> None:
    """Raises:
    UserError: a layer that cannot do what is asked, by number and type.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(text, "layer_types", None) or getattr(text, "block_types", None) or ()  # (Griffin's name for them)
    if not kinds and getattr(text, "sliding_window", None):  # of Mistral and others: one window for all layers
        kinds = ["sliding_attention"] * text.num_hidden_layers
    for number, kind in enumerate(kinds):
        if kind not in ATTENDING:
            raise UserError(
                f"student.model: layer {number} of {config.model_type} is {kind}, which reads in one direction only. "
                "Fix: a model with attention in all layers."
            )
        if block_size is not None and kind not in ("full_attention", "attention"):
            raise UserError(
                f"diffusion.block_size is {block_size}, and layer {number} of {config.model_type} is {kind}: a 4-D "
                "mask would override its window, and its cache forgets. Fix: leave block_size out, or another model."
            )


def predicts_next(config: Any) -> bool:
    """Whether the head of a checkpoint was trained on the next token: of causal models, and of Dream, which kept it."""
    names = " ".join(getattr(config, "architectures", None) or ())
    return "Dream" in names or ("MaskedLM" not in names and "LLaDA" not in names and "SDAR" not in names)
