"""One rank works, or all of them, and no one waits in a collective for another's work.

What a rank does alone may take as long as an outage of a service, or the grading of an evaluation. In a collective the
others would be timed out (torch: 30 minutes), and where that rank fails they would wait for what never comes. Here they
look into the launch's key-value store, for as long as it takes, and an error reaches them all.

Calls are matched by their order. A thread beside the main one has an order of its own: it works inside :func:`channel`.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from llmdistill.compat.ranks import launch_store
from llmdistill.errors import UserError

T = TypeVar("T")
SHORTEST_NAP_S, LONGEST_NAP_S = 0.001, 0.2
NAP_SHARE = 0.02  # of the time waited so far: no step becomes longer by more


class _Channel:
    """The calls of one thread of every rank, in their order."""

    def __init__(self, name: str, stop: threading.Event | None = None) -> None:
        self.stop = stop  # set: who waits on it is not waited for any more
        self.prefix = f"llmdistill/{name}/" if name else "llmdistill/"
        self.numbers = itertools.count()
        self.own_keys = list[str]()  # that this rank has set, and that somebody may still read


_main = _Channel("")
_current: ContextVar[_Channel] = ContextVar("llmdistill_channel", default=_main)


class RankFailed(RuntimeError):
    """On the other ranks, when one failed for another reason than the user's input."""


@contextmanager
def channel(name: str, stop: threading.Event) -> Iterator[None]:
    """Inside, calls are matched with those of the other ranks' threads on the channel of this name, and no others.

    Args:
        name: used once in a launch.
        stop: once it is set, waiting for others ends with a RankFailed. A thread that looks into the store while the
            process ends takes it down with an abort.
    """
    token = _current.set(_Channel(name, stop))
    try:
        yield
    finally:
        _current.reset(token)


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
    key = _next_key("first")
    if not is_first():
        _wait(store, key, [key])
        return json.loads(store.get(key))  # type: ignore[no-any-return]
    with _failure_told(store, key):
        value = work()
        content = json.dumps(value)
    _tell(store, key, content)
    return value


def on_every_rank(work: Callable[[], T]) -> T:
    """What ``work()`` returns here, once it has returned on every rank, however long one takes.

    Every rank calls this, in the same order as its other calls of it.

    Raises:
        UserError: that one of them raised, on every rank.
        RankFailed: on the other ranks, when one raised anything else.
    """
    store = launch_store()
    if store is None:
        return work()
    key, own_keys = _next_key("every"), _current.get().own_keys
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with _failure_told(store, key):
        value = work()
    read = list(own_keys)
    _tell(store, f"{key}/{rank}", "")
    _wait(store, key, [f"{key}/{other}" for other in range(world)])
    for old in read:  # by all: they have come here
        store.delete_key(old)
        own_keys.remove(old)
    return value


@contextmanager
def _failure_told(store: Any, key: str) -> Iterator[None]:
    """What the body raises is raised here, and by those who wait for ``key``."""
    try:
        yield
    except BaseException as error:
        kind = "user" if isinstance(error, UserError) else "other"
        store.set(f"{key}/failed", json.dumps({"error": str(error) or type(error).__name__, "kind": kind}))
        raise


def _tell(store: Any, key: str, content: str) -> None:
    store.set(key, content)
    _current.get().own_keys.append(key)


def _next_key(what: str) -> str:
    current = _current.get()
    return f"{current.prefix}{what}/{next(current.numbers)}"


def _wait(store: Any, key: str, told: list[str]) -> None:
    """Until all of ``told`` are there.

    Raises:
        UserError, RankFailed: a rank failed at ``key``.
    """
    began, stop = time.monotonic(), _current.get().stop
    while not store.check(told):
        if stop is not None and stop.is_set():
            raise RankFailed("this rank has ended")
        if store.check([f"{key}/failed"]):
            failure = json.loads(store.get(f"{key}/failed"))
            if failure["kind"] == "user":
                raise UserError(failure["error"])
            raise RankFailed(f"another rank failed: {failure['error']}")
        time.sleep(min(max(NAP_SHARE * (time.monotonic() - began), SHORTEST_NAP_S), LONGEST_NAP_S))
