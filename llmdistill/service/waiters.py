"""Waiting on one event loop until something is so, without a lock: whoever changes it wakes all who wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Waiters:
    """Tasks that wait for a condition."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    async def until(self, ready: Callable[[], bool]) -> None:
        while not ready():
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            finally:
                self._waiting.remove(waiter)

    def wake(self) -> None:
        """Something has changed."""
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
