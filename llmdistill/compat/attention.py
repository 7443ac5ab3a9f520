"""Variable-length attention where there is no kernel for it: a packed row's sequences one by one, each causal.

For a row of T tokens transformers would make a mask [1, 1, T, T], and its "sdpa" look at all of it, whatever lies
between two sequences. Here the mask is only the list of the sequences' ends, and attention runs on each of them as it
does on a sequence alone, without a mask. It is set into transformers' own interface of attention functions, and does
nothing unless a forward pass is run in :func:`sequence_by_sequence`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

IMPLEMENTATION = "sdpa"  # of transformers, which this stands in front of
_told = threading.local()  # .ends: of the row that this thread's forward pass reads
_own: dict[str, Any] = {}  # what stood there before


@contextmanager
def sequence_by_sequence(lengths: Sequence[int] | None) -> Iterator[None]:
    """Within it, attention "sdpa" over one row of ``sum(lengths)`` tokens keeps these sequences apart. What is computed
    again in the backward pass does so outside of it too. None: as always."""
    if lengths is None:
        yield
        return
    _set_in()
    before, _told.ends = getattr(_told, "ends", None), [0, *accumulate(lengths)]
    try:
        yield
    finally:
        _told.ends = before


def _set_in() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    if not _own:
        _own["attention"] = AttentionInterface()[IMPLEMENTATION]
        _own["mask"] = AttentionMaskInterface()[IMPLEMENTATION]
        AttentionInterface.register(IMPLEMENTATION, _attention)
        AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def _mask(*args: Any, **options: Any) -> Tensor | None:
    """Of a packed row [1, 1, 1, S + 2] int64: the window (0: none), then where sequences begin and the last one ends.
    Masks themselves are bool or float. Layers get it as their argument, by which checkpointing finds it again."""
    ends = getattr(_told, "ends", None)
    lengths = options.get("q_length"), options.get("kv_length")
    if ends is None or lengths != (ends[-1], ends[-1]):
        return _own["mask"](*args, **options)  # type: ignore[no-any-return]
    return torch.tensor([options.get("local_size") or 0, *ends]).view(1, 1, 1, -1)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **options: Any
) -> tuple[Tensor, None]:
    """[1, heads, T, D] each -> [1, T, heads, D]."""
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return _own["attention"](module, query, key, value, attention_mask, *args, **options)  # type: ignore[no-any-return]
    window, *ends = attention_mask.flatten().tolist()
    found = []
    for a, b in pairwise(ends):
        mask = _band(b - a, window, query.device) if 0 < window < b - a else None
        own = (x[:, :, a:b] for x in (query, key, value))
        found.append(_own["attention"](module, *own, mask, *args, **options)[0])
    return torch.cat(found, 1), None


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Who sees whom through a window, [1, 1, T, T] bool."""
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return (ones.tril() & ones.triu(1 - window)).view(1, 1, length, length)
