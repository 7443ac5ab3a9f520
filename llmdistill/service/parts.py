"""Bodies that go out while they are being written."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PART_BYTES = 1 << 18  # written before anything goes out: a small answer is one body, with its length and its status


class CutOff(Exception):
    """A body that has begun to go out, and that will not be written to its end."""


class Parts:
    """What has been written of a body so far. Any number of readers; each gets all of it.

    Args:
        at_once: bytes that are held back until there are so many, or no more to come.
    """

    def __init__(self, at_once: int = PART_BYTES) -> None:
        self.at_once, self.bytes, self.started, self.ended = at_once, 0, False, False
        self._parts: list[bytes] = []
        self._held: list[bytes] = []
        self._waiters: list[asyncio.Future[None]] = []
        self.error: BaseException | None = None

    def write(self, data: bytes) -> None:
        self.bytes += len(data)
        self._held.append(data)
        if sum(map(len, self._held)) >= self.at_once:
            self._flush()

    def end(self, error: BaseException | None = None) -> None:
        """All of it is there, or ``error`` is why it will not be."""
        self.ended, self.error = True, error
        self._flush()

    def whole(self) -> bytes:
        """All of a body that has ended."""
        assert self.ended
        return b"".join(self._parts)

    async def wait_started(self) -> None:
        while not (self.started or self.ended):
            await self._change()

    async def after(self, count: int) -> list[bytes]:
        """The parts behind the first ``count``, as soon as there are some; none where it has ended.

        Raises:
            CutOff: it was ended with an error.
        """
        while count >= len(self._parts):
            if self.error is not None:
                raise CutOff from self.error
            if self.ended:
                return []
            await self._change()
        return self._parts[count:]

    async def _change(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            self._waiters.remove(waiter)

    def _flush(self) -> None:
        if self._held:
            self._parts.append(b"".join(self._held))
            self._held.clear()
            self.started = True
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


class Reading:
    """One reader of a body in parts; ``left`` is called once when it needs no more."""

    def __init__(self, parts: Parts, left: Callable[[], None]) -> None:
        self._parts, self._left, self._count = parts, left, 0

    def __aiter__(self) -> Reading:
        return self

    async def __anext__(self) -> bytes:
        found = await self._parts.after(self._count)
        if not found:
            raise StopAsyncIteration
        self._count += len(found)
        return b"".join(found)

    def close(self) -> None:
        left, self._left = self._left, lambda: None
        left()
