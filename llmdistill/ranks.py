"""One rank works, the others wait for its word.

What the first rank does for all may take as long as an outage of a service, or the grading of an evaluation. In a
collective the others would be timed out (torch: 30 minutes), and where the first rank fails they would wait for what
never comes. Here they look into the launch's key-value store, for as long as it takes, and an error reaches them all.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from llmdistill.compat.ranks import launch_store
from llmdistill.errors import UserError

T = TypeVar("T")
LONGEST_NAP_S = 0.2
_numbers = itertools.count()


class RankFailed(RuntimeError):
    """On the other ranks, when one failed for another reason than the user's input."""


def is_first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def from_first_rank(work: Callable[[], T]) -> T:
    """What ``work()`` returns on the first rank, which alone calls it, on every rank; something that JSON can hold.

    Every rank calls this, in the same order as its other calls of it.

    Raises:
        UserError: that ``work`` raised, on every rank.
        RankFailed: on the other ranks, when ``work`` raised anything else.
    """
    store = launch_store()
    if store is None:
        return work()
    key = f"llmdistill/first/{next(_numbers)}"
    if not is_first():
        return _awaited(store, key)  # type: ignore[no-any-return]
    return _told(store, key, work)


def on_every_rank(work: Callable[[], None]) -> None:
    """``work()`` on every rank, and back on all of them when all are done, however long one takes.

    Raises:
        UserError: that one of them raised, on every rank.
        RankFailed: on the other ranks, when one raised anything else.
    """
    store = launch_store()
    if store is None:
        work()
        return
    key = f"llmdistill/every/{next(_numbers)}"
    _told(store, f"{key}/{torch.distributed.get_rank()}", lambda: work())
    for rank in range(torch.distributed.get_world_size()):
        _awaited(store, f"{key}/{rank}")


def _told(store: Any, key: str, work: Callable[[], T]) -> T:
    """What ``work()`` returns; that, or what it raised, is told under ``key``."""
    try:
        value = work()
        content = json.dumps({"value": value})
    except BaseException as error:
        kind = "user" if isinstance(error, UserError) else "other"
        store.set(key, json.dumps({"error": str(error) or type(error).__name__, "kind": kind}))
        raise
    store.set(key, content)
    return value


def _awaited(store: Any, key: str) -> Any:
    nap = 0.001
    while not store.check([key]):
        time.sleep(nap)
        nap = min(nap * 1.5, LONGEST_NAP_S)
    told = json.loads(store.get(key))
    if "value" in told:
        return told["value"]
    if told["kind"] == "user":
        raise UserError(told["error"])
    raise RankFailed(f"another rank failed: {told['error']}")
