"""Special tokens and limits, read the way generation reads them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase


def eos_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a generation: the generation config's, else the tokenizer's, ascending."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if configured is not None else tokenizer.eos_token_id
    return tuple(sorted({ids} if isinstance(ids, int) else set(ids or ())))


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding id; any id does, since padding is masked everywhere, so the eos serves where none is set."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def context_length(config: Any) -> int:
    """Positions a model was built for."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 1 << 30)
