"""The prompts of an evaluation as records: what their hash covers, and what a reader of the page gets to see."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from llmdistill.evals.engines.base import Asked
from llmdistill.evals.records import Prompt


def prompts_hash(asked: Sequence[Asked]) -> str:
    """Of what the model reads, sample 0 of each problem for all. How long it may answer is :func:`room`."""
    digest = hashlib.sha256()
    for one in _once(asked):
        said = [one.problem, list(one.ids), list(one.messages) if not one.ids else [], one.prefill]
        digest.update(json.dumps(said).encode())
    return digest.hexdigest()[:16]


def room(asked: Sequence[Asked], max_new_tokens: int) -> dict[str, Any]:
    """For how many problems the context leaves less than ``max_new_tokens``, and a hash of how much."""
    shorter = [[one.problem, one.room] for one in _once(asked) if one.room < max_new_tokens]
    digest = hashlib.sha256(json.dumps(shorter).encode()).hexdigest()[:16] if shorter else None
    return {"shorter": len(shorter), "hash": digest}


def as_read(asked: Sequence[Asked], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[Prompt]:
    """The prompt of each problem, with the token that the tokenizer puts before plain text by itself."""
    bos = "" if tokenizer is None else str(tokenizer.bos_token or "")
    for one in _once(asked):
        if tokenizer is None:
            begun = [{"role": "assistant", "content": one.prefill}] if one.prefill else []
            yield Prompt(one.problem, "", [*one.messages, *begun])
        else:
            added = bos and one.ids[:1] == (tokenizer.bos_token_id,) and not one.text.startswith(bos)
            yield Prompt(one.problem, (bos if added else "") + one.text, tokens=len(one.ids))


def _once(asked: Sequence[Asked]) -> Iterator[Asked]:
    return (one for one in asked if one.index == 0)
