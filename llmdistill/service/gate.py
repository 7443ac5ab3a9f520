"""Who may work when: a bounded number of requests, none while weights change, none new when the service drains."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from llmdistill.service.limits import Limits
from llmdistill.service.problems import Problem

LONGEST_WAIT_S = 30.0
FADING = 0.98  # of the sums behind the rate, with every answer


class Gate:
    """Counts what is in the house. All of it runs on one event loop: counting needs no lock and cannot be cut off."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests, self.tokens = 0, 0
        self.draining = False
        self._working = 0
        self._exclusive = False
        self._waiters: list[asyncio.Future[None]] = []
        self._done, self._busy_s, self._since = 0.0, 0.0, 0.0  # fading sums: tokens answered, and seconds that took

    @asynccontextmanager
    async def admitted(self, tokens: int) -> AsyncIterator[None]:
        """A place for a request of so many tokens, until it is answered.

        Raises:
            Problem: 503 while draining; 429 with the time until there may be room.
        """
        self._refuse_when_draining()
        limits = self.limits
        # One request always fits: its own size is bounded by the limits of a request.
        if self.requests >= limits.in_flight or (self.requests and self.tokens + tokens > limits.queue_tokens):
            raise Problem(
                429,
                "busy",
                f"{self.requests} requests of {self.tokens} tokens are waiting; "
                f"at most {limits.in_flight} and {limits.queue_tokens}",
                retry_after_s=self._wait(),
            )
        if not self.requests:
            self._since = time.monotonic()  # the time before was idle
        self.requests, self.tokens = self.requests + 1, self.tokens + tokens
        try:
            await self._until(lambda: not self._exclusive)
            self._working += 1
            try:
                yield
            finally:
                self._working -= 1
                self._notify()
            now = time.monotonic()
            self._done, self._busy_s = FADING * self._done + tokens, FADING * self._busy_s + now - self._since
            self._since = now
        finally:
            self.requests, self.tokens = self.requests - 1, self.tokens - tokens

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Waits until nothing is at work and keeps everything else waiting: for a change of weights."""
        self._refuse_when_draining()
        await self._until(lambda: not self._exclusive)
        self._exclusive = True
        try:
            await self._until(lambda: self._working == 0)
            yield
        finally:
            self._exclusive = False
            self._notify()

    async def drained(self, timeout_s: float) -> bool:
        """Refuses new work and waits for what is there; whether all of it was answered."""
        self.draining = True
        end = time.monotonic() + timeout_s
        while (self.requests or self._exclusive) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return not (self.requests or self._exclusive)

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise Problem(503, "draining", "the service is shutting down", retry_after_s=5)

    async def _until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            finally:
                self._waiters.remove(waiter)

    def _notify(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _wait(self) -> float:
        """Seconds until about a quarter of the queue has gone."""
        return min(max(0.25 * self.tokens * self._busy_s / self._done if self._done else 1.0, 0.05), LONGEST_WAIT_S)
