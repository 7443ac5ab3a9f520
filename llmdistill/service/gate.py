"""Who may work when: as much as the engine holds, none while weights change, none new when the service drains.

What the engine holds is tokens, its key-value cache, and a request counts with those it is *expected* to take: the room
that a caller leaves for a completion is mostly not used. What is beyond waits here, in the order of
:class:`~llmdistill.service.fair.FairQueue`, and what is beyond the queue is told when to come back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from llmdistill.service.fair import CLIENT, FairQueue, Place
from llmdistill.service.limits import Limits
from llmdistill.service.problems import Problem
from llmdistill.service.waiters import Waiters

LONGEST_WAIT_S = 30.0
FADING = 0.98  # of the sums behind the rate, with every answer
CREDIT = 8  # a client may be behind the others by that part of the queue, and catch up


def shutting_down() -> Problem:
    return Problem(503, "draining", "the service is shutting down", retry_after_s=5)


class Gate:
    """Counts what is in the house. All of it runs on one event loop: counting needs no lock and cannot be cut off.

    Args:
        capacity: tokens that may be at work at one time; None: no bound but those of ``limits``.
    """

    def __init__(self, limits: Limits, capacity: Callable[[], int | None] = lambda: None) -> None:
        self.limits, self._capacity = limits, capacity
        self.requests, self.tokens = 0, 0
        self.draining = False
        self.pushed_out = 0
        self._working, self._held, self._beside = (
            0,
            0,
            0,
        )  # requests in the engine, their tokens, and what is no request
        self._exclusive = False
        self._queue = FairQueue(limits.queue_tokens / CREDIT)
        self._waiters = Waiters()
        # fading sums: tokens and requests answered, and seconds that took
        self._done, self._answered, self._busy_s, self._since = 0.0, 0.0, 0.0, 0.0
        self._appointed = 0.0  # when the last one that was sent away is to come back

    @asynccontextmanager
    async def admitted(self, tokens: int) -> AsyncIterator[Place]:
        """A place for a request of about so many tokens, until it is answered. What it did take may be written to it.

        Raises:
            Problem: 503 while draining; 429 with the time until there may be room.
        """
        self._refuse_when_draining()
        client = CLIENT.get()
        while not self._fits(tokens):
            last = self._queue.last()
            if last is None or not self._queue.comes_before(client, last):
                raise self._full()
            self._push_out(last)
        if not self.requests:
            self._since = time.monotonic()  # the time before was idle
        place = Place(client, tokens, asyncio.get_running_loop().create_future())
        self.requests, self.tokens = self.requests + 1, self.tokens + tokens
        self._queue.join(place)
        try:
            self._next()
            await place.ready
            yield place
            now = time.monotonic()
            self._done, self._busy_s = FADING * self._done + tokens, FADING * self._busy_s + now - self._since
            self._answered, self._since = FADING * self._answered + 1, now
        finally:
            self._leave(place)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Waits until nothing is at work and keeps everything else waiting: for a change of weights."""
        self._refuse_when_draining()
        await self._waiters.until(lambda: not self._exclusive)
        self._exclusive = True
        try:
            await self._waiters.until(lambda: not (self._working or self._beside))
            yield
        finally:
            self._exclusive = False
            self._notify()

    @asynccontextmanager
    async def beside(self) -> AsyncIterator[None]:
        """Not while weights change, and beside everything else: for what the engine takes in between."""
        self._refuse_when_draining()
        await self._waiters.until(lambda: not self._exclusive)
        self._beside += 1
        try:
            yield
        finally:
            self._beside -= 1
            self._notify()

    async def drained(self, timeout_s: float) -> bool:
        """Refuses new work and waits for what is there; whether all of it was answered."""
        self.draining = True
        end = time.monotonic() + timeout_s
        while (busy := self.requests or self._beside or self._exclusive) and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return not busy

    @property
    def waiting(self) -> int:
        """Requests that the engine has not got yet."""
        return self.requests - self._working

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise shutting_down()

    def _fits(self, tokens: int) -> bool:
        """One request always fits: its own size is bounded by the limits of a request."""
        limits = self.limits
        return not self.requests or (self.requests < limits.in_flight and self.tokens + tokens <= limits.queue_tokens)

    def _next(self) -> None:
        """Those whose turn it is, as many as the engine holds."""
        most = self._capacity()
        while not self._exclusive and (place := self._queue.first()) is not None:
            if most is not None and self._held and self._held + place.tokens > most:
                return  # it is next; a smaller one that came later would keep it waiting for ever
            self._queue.take(place)
            self._working, self._held = self._working + 1, self._held + place.tokens
            if not place.ready.done():
                place.ready.set_result(None)

    def _leave(self, place: Place) -> None:
        if place.out:
            return
        if place.taken:
            self._working, self._held = self._working - 1, self._held - place.tokens
            self._queue.settle(place)
        else:
            self._queue.leave(place)
        self.requests, self.tokens = self.requests - 1, self.tokens - place.tokens
        self._notify()

    def _push_out(self, place: Place) -> None:
        problem = self._full()
        self._leave(place)
        place.out = True
        self.pushed_out += 1
        if not place.ready.done():
            place.ready.set_exception(problem)

    def _notify(self) -> None:
        self._next()
        self._waiters.wake()

    def _full(self) -> Problem:
        limits = self.limits
        return Problem(
            429,
            "busy",
            f"{self.requests} requests of {self.tokens} tokens are waiting; "
            f"at most {limits.in_flight} and {limits.queue_tokens}",
            retry_after_s=self._wait(),
        )

    def _wait(self) -> float:
        """Seconds until there may be room: about a quarter of the queue has gone, and those who were sent away before
        have come back. All told the same time would come back as one herd."""
        now = time.monotonic()
        quarter = 0.25 * self.tokens * self._busy_s / self._done if self._done else 1.0
        each = self._busy_s / self._answered if self._answered else 1.0 / self.limits.in_flight
        soonest = now + min(max(quarter, 0.05), LONGEST_WAIT_S)
        self._appointed = max(self._appointed + each, soonest)
        if self._appointed > now + LONGEST_WAIT_S:
            self._appointed = soonest  # and round again
        return self._appointed - now
