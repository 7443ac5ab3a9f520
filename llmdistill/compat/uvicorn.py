"""uvicorn's connections: it keeps any number of them open, and those that never send anything for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast


def bounded_connections(most: int) -> Callable[..., asyncio.Protocol]:
    """uvicorn's own protocol (its setting ``http``) with at most so many connections at one time.

    One more closes the one that has been idle for longest: that waits for a request, or has sent part of one's head, or
    leaves an answer unread. One whose request is being worked on is not closed for another, so that ``most`` has to be
    above the number of those.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    held: dict[Any, None] = {}  # the longest idle first, as far as they are idle

    class Bounded(cast(Any, AutoHTTPProtocol)):  # type: ignore[misc]
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            held[self] = None
            if len(held) > most:
                _close_longest_idle(held)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if held.pop(self, held) is None:  # idle from now on
                held[self] = None

        def connection_lost(self, error: Exception | None) -> None:
            held.pop(self, None)
            super().connection_lost(error)

    return Bounded


def _close_longest_idle(held: dict[Any, None]) -> None:
    idle = [c for c in held if c.cycle is None or c.cycle.response_complete or c.transport.is_closing()]
    waiting = (c for c in idle if not c.transport.get_write_buffer_size())
    if closed := next(waiting, idle[0] if idle else None):  # of those that only leave an answer unread, one at last
        del held[closed]
        closed.transport.abort()
