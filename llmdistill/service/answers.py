"""Requests that are sent again get the answer of the first: nothing is computed twice."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

from llmdistill.service.problems import Problem

ENTRY_BYTES = 1024  # what an answer takes beside its body, about


@dataclass
class Answer:
    """A body and its content type."""

    body: bytes
    media_type: str


@dataclass
class _Entry:
    digest: bytes
    task: asyncio.Task[Answer]
    born: float = field(default_factory=time.monotonic)
    size: int = 0  # when it is done


class Answers:
    """Answers by request id, in flight or kept: the newest ``max_bytes`` of them, for ``keep_s`` seconds.

    The work is a task of its own: a caller that is cut off does not stop it, and finds the answer when it comes back.
    Errors are not kept.
    """

    def __init__(self, max_bytes: int, keep_s: float) -> None:
        self.max_bytes, self.keep_s = max_bytes, keep_s
        self.replayed = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = 0

    async def get(self, request_id: str | None, digest: bytes, work: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer to the request of that ``digest``, worked out unless it is at hand.

        Raises:
            Problem: 409, the id was used for another request.
        """
        if request_id is None:
            return await work()
        self._forget_old()
        entry = self._entries.get(request_id)
        if entry is None:
            entry = _Entry(digest, asyncio.ensure_future(work()))  # type: ignore[arg-type]
            self._entries[request_id] = entry
            entry.task.add_done_callback(partial(self._done, request_id, entry))
        elif entry.digest != digest:
            raise Problem(
                409, "reused_id", f"request id {request_id!r} was used for another request", field="X-Request-Id"
            )
        else:
            self.replayed += 1
        task = asyncio.shield(entry.task)
        del entry  # an error would hold it, and it the error, until the collector comes by
        return await task

    @property
    def bytes(self) -> int:
        """Held for answers that may be asked for again."""
        return self._bytes

    def _done(self, request_id: str, entry: _Entry, task: asyncio.Task[Answer]) -> None:
        if self._entries.get(request_id) is not entry:
            return
        if task.cancelled() or task.exception() is not None:
            del self._entries[request_id]
            return
        entry.size, entry.born = len(task.result().body) + ENTRY_BYTES, time.monotonic()
        self._entries.move_to_end(request_id)
        self._bytes += entry.size
        self._forget_old()

    def _forget_old(self) -> None:
        oldest = time.monotonic() - self.keep_s
        for request_id, entry in list(self._entries.items()):
            if self._bytes <= self.max_bytes and entry.born >= oldest:
                break
            if entry.size:  # else it is in flight
                self._bytes -= entry.size
                del self._entries[request_id]
