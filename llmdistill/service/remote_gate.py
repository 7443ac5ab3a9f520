"""The gate of a service that is several processes: it stands in the one that started them, and is asked from here.

So there is one queue and one order in it, one bound for what is at work, and weights change while nothing is, in any of
the processes.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from llmdistill.service.fair import CLIENT, Place
from llmdistill.service.gate import Gate, shutting_down
from llmdistill.service.line import Line


class RemoteGate:
    """As :class:`~llmdistill.service.gate.Gate`, which drains where it stands; its counts are those of this process.

    Args:
        state: what the other processes have to know after the weights have changed.
    """

    def __init__(self, line: Line, state: Callable[[], dict[str, Any]] = dict) -> None:
        self.line, self.state = line, state
        self.requests = self.tokens = self.waiting = 0
        self.pushed_out = 0  # of all processes, told to one of them
        self.draining = False
        self._numbers = itertools.count(1)

    @asynccontextmanager
    async def admitted(self, tokens: int) -> AsyncIterator[Place]:
        self._refuse_when_draining()
        place = Place(CLIENT.get(), tokens, asyncio.get_running_loop().create_future())
        self.requests, self.tokens, self.waiting = self.requests + 1, self.tokens + tokens, self.waiting + 1
        number = next(self._numbers)
        try:
            try:
                await self.line.ask("enter", hold=number, kind="admitted", client=place.client, tokens=tokens)
            finally:
                self.waiting -= 1
            yield place
        finally:
            self.requests, self.tokens = self.requests - 1, self.tokens - tokens
            self.line.tell("leave", hold=number, used=place.used)

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        async with self._held("alone"):
            yield

    @asynccontextmanager
    async def beside(self) -> AsyncIterator[None]:
        async with self._held("beside"):
            yield

    @asynccontextmanager
    async def _held(self, kind: str) -> AsyncIterator[None]:
        self._refuse_when_draining()
        number = next(self._numbers)
        try:
            await self.line.ask("enter", hold=number, kind=kind, client="", tokens=0)
            yield
        finally:
            # the others know before anybody is answered
            await asyncio.shield(self.line.ask("leave", hold=number, state=self.state() if kind == "alone" else None))

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise shutting_down()


class Holds:
    """The other end: what one process holds of the gate.

    Args:
        changed: told the state of weights that have changed, while nothing is at work.
    """

    def __init__(self, gate: Gate, changed: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        self.gate, self.changed = gate, changed
        self._held: dict[int, _Hold] = {}

    async def enter(self, hold: int, kind: str, client: str, tokens: int) -> None:
        """Returns when it may.

        Raises:
            Problem: it may not.
        """
        loop = asyncio.get_running_loop()
        held = self._held[hold] = _Hold(loop.create_future(), loop.create_future())
        held.task = loop.create_task(self._hold(held, kind, client, tokens))
        await asyncio.wait((held.task, held.entered), return_when=asyncio.FIRST_COMPLETED)
        if held.task.done() and not held.task.cancelled():
            held.task.result()

    async def leave(self, hold: int, used: int | None = None, state: dict[str, Any] | None = None) -> None:
        held = self._held.pop(hold, None)
        if held is None or held.task is None:
            return
        if held.entered.done():
            held.left.set_result((used, state))
        else:
            held.task.cancel()
        await asyncio.wait((held.task,))

    async def _hold(self, held: _Hold, kind: str, client: str, tokens: int) -> None:
        CLIENT.set(client)  # of this task
        if kind == "admitted":
            async with self.gate.admitted(tokens) as place:
                held.entered.set_result(None)
                place.used, _ = await held.left
        else:
            async with self.gate.alone() if kind == "alone" else self.gate.beside():
                held.entered.set_result(None)
                _, state = await held.left
                if state is not None:
                    await self.changed(state)


class _Hold:
    def __init__(self, entered: asyncio.Future[None], left: asyncio.Future[Any]) -> None:
        self.entered, self.left = entered, left
        self.task: asyncio.Task[None] | None = None
