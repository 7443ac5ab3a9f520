"""Special tokens and limits, read the way generation reads them."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a generation: the generation config's, else the tokenizer's, ascending."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if configured is not None else tokenizer.eos_token_id
    return tuple(sorted({ids} if isinstance(ids, int) else set(ids or ())))


def also_end_at(model: Any, tokenizer: PreTrainedTokenizerBase, ids: Collection[int]) -> tuple[int, ...]:
    """Every id that ends a generation, once the model's generation config (which is saved with it) has ``ids`` too.

    A base model's ends at the end of a document only: taught a template's end of turn, the student would write it and
    go on.
    """
    known = eos_ids(model, tokenizer)
    config, new = getattr(model, "generation_config", None), sorted(set(ids) - set(known))
    if config is None or not new:
        return known
    config.eos_token_id = sorted({*known, *new})
    logger.warning(
        "the template ends a turn with %s, where the student's generation config goes on; it now ends there too",
        ", ".join(map(repr, tokenizer.convert_ids_to_tokens(new))),
    )
    return eos_ids(model, tokenizer)


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id; any id does, since padding is masked everywhere, so the eos serves where none is set."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def context_length(config: Any) -> int:
    """Positions a model was built for."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 1 << 30)
