"""The mask token of a checkpoint: its own, or a new one that means as little as possible."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmdistill.errors import UserError

NEW_TOKEN = "<|mask|>"


def mask_token_of(model: Any, tokenizer: PreTrainedTokenizerBase, token: str | None = None) -> int:
    """The id of the mask token, added to tokenizer and model where there is none.

    A new one's embedding is the mean of all: the point that is nearest to none in particular.

    Raises:
        UserError: ``token`` is a real word of the vocabulary.
    """
    if token is None:
        saved = getattr(model.config, "mask_token_id", None)
        own = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else saved
        if own is not None:
            if int(own) == model.get_input_embeddings().weight.shape[0]:  # the tokenizer got it for another model
                _make_room(model, int(own))
            return int(own)
        token = NEW_TOKEN
    known = tokenizer.get_vocab().get(token)
    if known is not None:
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        if known not in special:
            raise UserError(
                f"diffusion.mask_token {token!r} is id {known}, an ordinary word of the vocabulary: texts that have it "
                f"would be read as masked. Fix: leave it out for {NEW_TOKEN!r}, or name a special token."
            )
        tokenizer.mask_token = token
        return known
    tokenizer.add_special_tokens({"mask_token": token})
    new_id = int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]
    _make_room(model, new_id)
    return new_id


@torch.no_grad()
def _make_room(model: Any, new_id: int) -> None:
    """A row for ``new_id`` in both embeddings: the mean of the rows before it."""
    if model.get_input_embeddings().weight.shape[0] <= new_id:
        model.resize_token_embeddings(new_id + 1, mean_resizing=False)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        if embedding is not None:
            embedding.weight[new_id] = embedding.weight[:new_id].mean(0)


def check_no_mask(ids: Tensor, mask_id: int, attention_mask: Tensor | None = None) -> None:
    """Raises:
    UserError: clean text [B, L] that has the mask token in it: it would be a word that can never be predicted.
    """
    found = ids == mask_id
    if attention_mask is not None:
        found = found & attention_mask.bool()
    rows = found.any(-1).nonzero().flatten().tolist()
    if rows:
        raise UserError(
            f"sequence {rows[0]} of the batch has the mask token (id {mask_id}) in its clean text ({len(rows)} such "
            "sequences). Fix: remove it from the data, or another diffusion.mask_token."
        )
