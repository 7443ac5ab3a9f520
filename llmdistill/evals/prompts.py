"""The prompts of an evaluation as records: what their hash covers, and what a reader of the page gets to see."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from llmdistill.evals.engines.base import Asked


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


def _once(asked: Sequence[Asked]) -> Iterator[Asked]:
    return (one for one in asked if one.index == 0)
