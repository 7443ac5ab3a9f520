"""Requests that are sent again get the answer of the first: nothing is computed twice."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from llmdistill.service.problems import Problem


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
    size: int = 0


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

    async def get(self, request_id: str | None, request: bytes, work: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer to ``request``, worked out unless it is at hand.

        Raises:
            Problem: 409, the id was used for another request.
        """
        if request_id is None:
            return await work()
        self._forget_old()
        digest = hashlib.blake2b(request, digest_size=16).digest()
        entry = self._entries.get(request_id)
        if entry is None:
            entry = _Entry(digest, asyncio.ensure_future(work()))  # type: ignore[arg-type]
            self._entries[request_id] = entry
            entry.task.add_done_callback(lambda task: self._done(request_id, task))
        elif entry.digest != digest:
            raise Problem(
                409, "reused_id", f"request id {request_id!r} was used for another request", field="X-Request-Id"
            )
        else:
            self.replayed += 1
        return await asyncio.shield(entry.task)

    @property
    def bytes(self) -> int:
        """Held for answers that may be asked for again."""
        return self._bytes

    def _done(self, request_id: str, task: asyncio.Task[Answer]) -> None:
        entry = self._entries[request_id]
        if task.cancelled() or task.exception() is not None:
            del self._entries[request_id]
            return
        entry.size = len(task.result().body)
        self._bytes += entry.size
        self._forget_old()

    def _forget_old(self) -> None:
        oldest = time.monotonic() - self.keep_s
        for request_id, entry in list(self._entries.items()):
            if self._bytes <= self.max_bytes and entry.born >= oldest:
                break
            if entry.task.done():
                self._bytes -= entry.size
                del self._entries[request_id]
