"""Requests that are sent again get the answer of the first: nothing is computed twice, and nothing for nobody."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from llmdistill.service.parts import Parts, Reading
from llmdistill.service.problems import Problem

ENTRY_BYTES = 1024  # what an answer takes beside its body, about


@dataclass
class Answer:
    """A body, whole or still being written, and its content type."""

    body: bytes | Reading
    media_type: str


@dataclass(frozen=True)
class Writing:
    """Work that writes its answer as it goes on: what is written goes out before the rest is there."""

    media_type: str
    write: Callable[[Parts], Awaitable[None]]
    at_once: int | None = None  # bytes that are held back, as of :class:`Parts`


Work = Callable[[], Awaitable[Answer]] | Writing


@dataclass
class _Entry:
    digest: bytes
    task: asyncio.Task[Answer]
    born: float
    parts: Parts | None = None  # of an answer that goes out while it is being written
    media_type: str = ""
    kept: bool = True
    size: int = 0  # when it is done
    callers: int = 0  # that wait for it
    ending: asyncio.TimerHandle | None = None  # when nobody has come back by then


class Answers:
    """Answers by request id, in flight or kept: the newest ``max_bytes`` of them, for ``keep_s`` seconds.

    The work is a task of its own: a caller that is cut off does not stop it, and finds the answer when it comes back.
    When nobody comes back for ``abandoned_s`` seconds it is cancelled, and at once when the caller says so: an answer
    that has arrived, or is not wanted any more, is let go by :meth:`release`. So what is kept is what may be asked for
    again, and the bound in bytes is no window of a few seconds at full rate. Errors are not kept.

    Args:
        clock: seconds, for how long answers are kept.
    """

    def __init__(
        self,
        max_bytes: int,
        keep_s: float,
        abandoned_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_bytes, self.keep_s, self.abandoned_s, self.clock = max_bytes, keep_s, abandoned_s, clock
        self.replayed = self.cancelled = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = 0

    async def get(self, request_id: str | None, digest: bytes, work: Work) -> Answer:
        """The answer to the request of that ``digest``, worked out unless it is at hand.

        That of a :class:`Writing` comes when it begins to go out; its body then has to be read or closed.

        Raises:
            Problem: 409, the id was used for another request; 503, it was given up while this caller waited.
        """
        if request_id is None:
            if not isinstance(work, Writing):
                return await work()
            entry = _begun(digest, work, self.clock())
            entry.kept = False
            return await self._wait("", entry)
        self._forget_old()
        found = self._entries.get(request_id)
        if (entry := found or _begun(digest, work, self.clock())) is not found:
            self._entries[request_id] = entry
            entry.task.add_done_callback(partial(self._done, request_id, entry))
        elif entry.digest != digest:
            raise Problem(
                409, "reused_id", f"request id {request_id!r} was used for another request", field="X-Request-Id"
            )
        else:
            self.replayed += 1
        return await self._wait(request_id, entry)

    def release(self, request_ids: list[str]) -> None:
        """Their callers have the answers, or do not want them any more."""
        for request_id in request_ids:
            entry = self._entries.pop(request_id, None)
            if entry is None:
                continue
            self._bytes -= entry.size
            self._cancel(entry)

    @property
    def bytes(self) -> int:
        """Held for answers that may be asked for again."""
        return self._bytes

    async def _wait(self, request_id: str, entry: _Entry) -> Answer:
        if entry.ending is not None:
            entry.ending.cancel()
        entry.callers += 1
        task, going_out = entry.task, False
        try:
            if entry.parts is not None:
                await entry.parts.wait_started()
                if not task.done() and not entry.parts.ended:
                    going_out = True  # with a reader that counts as a caller
                    return Answer(Reading(entry.parts, partial(self._left, request_id, entry)), entry.media_type)
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled() and not asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise Problem(503, "given_up", "the request was given up", retry_after_s=1) from None
            raise
        finally:
            if not going_out:
                self._left(request_id, entry)
            del entry  # an error would hold it, and it the error, until the collector comes by

    def _left(self, request_id: str, entry: _Entry) -> None:
        """A caller waits no more."""
        entry.callers -= 1
        if entry.callers or entry.task.done():
            return
        if entry.kept:
            wait = asyncio.get_running_loop().call_later
            entry.ending = wait(self.abandoned_s, self._abandoned, request_id, entry)
        else:
            self._cancel(entry)

    def _abandoned(self, request_id: str, entry: _Entry) -> None:
        if not entry.callers and self._entries.get(request_id) is entry:
            self.release([request_id])

    def _cancel(self, entry: _Entry) -> None:
        if entry.ending is not None:
            entry.ending.cancel()
        if not entry.task.done():
            self.cancelled += 1
            entry.task.cancel()

    def _done(self, request_id: str, entry: _Entry, task: asyncio.Task[Answer]) -> None:
        if entry.ending is not None:
            entry.ending.cancel()
        failed = task.cancelled() or task.exception() is not None
        if self._entries.get(request_id) is not entry:
            return
        if failed:
            del self._entries[request_id]
            return
        body = task.result().body
        assert isinstance(body, bytes)
        entry.size, entry.born = len(body) + ENTRY_BYTES, self.clock()
        self._entries.move_to_end(request_id)
        self._bytes += entry.size
        self._forget_old()

    def _forget_old(self) -> None:
        oldest = self.clock() - self.keep_s
        for request_id, entry in list(self._entries.items()):
            if self._bytes <= self.max_bytes and entry.born >= oldest:
                break
            if entry.size:  # else it is in flight
                self._bytes -= entry.size
                del self._entries[request_id]


def _begun(digest: bytes, work: Work, now: float) -> _Entry:
    if not isinstance(work, Writing):
        return _Entry(digest, asyncio.ensure_future(work()), now)  # type: ignore[arg-type]
    parts = Parts() if work.at_once is None else Parts(work.at_once)
    task = asyncio.ensure_future(_written(work, parts))
    task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be there to see it
    return _Entry(digest, task, now, parts, work.media_type)


async def _written(work: Writing, parts: Parts) -> Answer:
    """The whole answer, for those who ask again."""
    try:
        await work.write(parts)
        parts.end()
    except BaseException as error:
        parts.end(error)
        raise
    return Answer(parts.whole(), work.media_type)
