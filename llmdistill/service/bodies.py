"""Bodies on their way in: bounded one by one and together, and put together on a thread.

The event loop only ever holds the parts that the socket gives it, up to 64 KiB each. To join, hash or parse a body of
megabytes there would keep every other caller waiting, and the probes too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.requests import Request

from llmdistill.service.limits import Limits
from llmdistill.service.problems import Problem
from llmdistill.wire.protocol import JSON_TYPE

T = TypeVar("T")
READERS = 2  # bodies that are worked on at one time
SMALL_BYTES = 1 << 15  # of a body that costs less than handing it to a thread


class Bodies:
    """Bodies that are being read: together they stay within a bound."""

    def __init__(self, limits: Limits) -> None:
        self.limits, self.bytes = limits, 0
        self._readers = asyncio.Semaphore(READERS)

    async def read(self, request: Request, work: Callable[[bytes], T], *, waits: bool = False) -> T:
        """``work(body)``, which runs on a thread where the body is not small; the body is let go of then.

        Args:
            waits: whether ``work`` reads files, so that a small body is for a thread too.

        Raises:
            Problem: 413 as soon as it is known to be too long, 408 when it does not arrive, 429 when too much is held,
                or whatever ``work`` raises.
        """
        async with self._parts(request) as parts:
            if not waits and sum(map(len, parts)) <= SMALL_BYTES:
                return _joined(parts, work)
            async with self._readers:
                return await asyncio.to_thread(_joined, parts, work)

    @asynccontextmanager
    async def _parts(self, request: Request) -> AsyncIterator[list[bytes]]:
        limits = self.limits
        limit = min(limits.json_bytes, limits.body_bytes) if content_type(request) == JSON_TYPE else limits.body_bytes
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise too_large(limit, limits)
        parts, size = list[bytes](), 0
        try:
            try:
                async with asyncio.timeout(limits.body_s):
                    async for chunk in request.stream():
                        size, self.bytes = size + len(chunk), self.bytes + len(chunk)
                        if size > limit:
                            raise too_large(limit, limits)
                        if self.bytes > max(limits.bodies_bytes, limit):
                            raise Problem(429, "busy", "too many large bodies at one time", retry_after_s=1)
                        parts.append(chunk)
            except TimeoutError:
                raise Problem(408, "limit", f"the body did not arrive in {limits.body_s:g} s") from None
            yield parts
        finally:
            parts.clear()
            self.bytes -= size


def _joined(parts: list[bytes], work: Callable[[bytes], T]) -> T:
    data = b"".join(parts)
    parts.clear()
    return work(data)


def content_type(request: Request) -> str:
    """Without its parameters; JSON where none is given."""
    return request.headers.get("content-type", JSON_TYPE).split(";")[0].strip().lower()


def too_large(limit: int, limits: Limits | None = None) -> Problem:
    hint = ""
    if limits is not None and limit == limits.json_bytes < limits.body_bytes:
        hint = f" of JSON; ids may come as bytes, up to {limits.body_bytes}"
    return Problem(413, "limit", f"the body is larger than {limit} bytes{hint}", field="body", limit=limit)
