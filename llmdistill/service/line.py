"""Two processes of one service talk: lines of JSON over a socket, questions and answers from both ends."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from llmdistill.service.problems import Problem

LONGEST = 1 << 24  # line


class Line:
    """One end.

    Args:
        answer: what is asked here, by name; what it returns goes back, and so does a :class:`Problem` that it raises.
    """

    def __init__(self, answer: Callable[[str, dict[str, Any]], Awaitable[Any]]) -> None:
        self._answer = answer
        self._numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._writer: asyncio.StreamWriter | None = None

    async def run(self, end: socket.socket, begun: Callable[[], None] = lambda: None) -> None:
        """Talks until the other end is gone."""
        reader, self._writer = await asyncio.open_unix_connection(sock=end, limit=LONGEST)
        begun()
        while line := await reader.readline():
            said = json.loads(line)
            if "re" in said:
                if (waiting := self._asked.pop(said["re"], None)) is not None and not waiting.done():
                    if said["problem"] is not None:
                        waiting.set_exception(Problem(**said["problem"]))
                    else:
                        waiting.set_result(said["result"])
            else:  # in the order they came, as far as their first wait
                task = asyncio.get_running_loop().create_task(self._reply(**said))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def ask(self, what: str, **about: Any) -> Any:
        """The answer of the other end.

        Raises:
            Problem: its.
        """
        number = next(self._numbers)
        waiting = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._send({"number": number, "what": what, "about": about})
            return await waiting
        finally:
            self._asked.pop(number, None)

    def tell(self, what: str, **about: Any) -> None:
        """Nothing comes back."""
        self._send({"number": None, "what": what, "about": about})

    async def _reply(self, number: int | None, what: str, about: dict[str, Any]) -> None:
        problem = result = None
        try:
            result = await self._answer(what, about)
        except Problem as found:
            names = ("status", "kind", "message", "field", "limit", "retry_after_s")
            problem = {name: getattr(found, name) for name in names}
        except Exception as error:  # whoever asked is not to wait for ever
            traceback.print_exc()
            problem = {"status": 500, "kind": "internal", "message": f"{type(error).__name__} in another process"}
        if number is not None:
            self._send({"re": number, "result": result, "problem": problem})

    def _send(self, said: dict[str, Any]) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(json.dumps(said).encode() + b"\n")
