"""uvicorn's connections: it keeps any number of them open, and those that never send anything for ever."""

from __future__ import annotations

import asyncio
import socket
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


class Handed:
    """Connections that another process has accepted, given to a running server.

    Args:
        closed: called when one of them is gone.
    """

    def __init__(self, server: Any, closed: Callable[[], None]) -> None:
        self._server, self._closed = server, closed
        self._tasks: set[asyncio.Task[None]] = set()
        kind: Any = server.config.http_protocol_class

        class Counted(kind):  # type: ignore[misc]
            def connection_lost(self, error: Exception | None) -> None:
                closed()
                super().connection_lost(error)

        self._kind = Counted

    def take(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        task = asyncio.get_running_loop().create_task(self._connect(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, connection: socket.socket) -> None:
        server, config = self._server, self._server.config

        def protocol() -> asyncio.Protocol:
            made = self._kind(config=config, server_state=server.server_state, app_state=server.lifespan.state)
            return cast(asyncio.Protocol, made)

        begin = asyncio.get_running_loop().connect_accepted_socket
        try:
            await begin(protocol, connection, ssl=config.ssl)
        except OSError:  # it hung up, or speaks no TLS
            connection.close()
            self._closed()
