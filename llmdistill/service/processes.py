"""``llmdistill serve --api_processes N``: several processes answer for one engine, as vLLM's own API servers do.

Encoding blocks and speaking HTTP keeps one core busy at some hundred thousand positions a second; here N cores do it.
This process starts them and the engine, and does what there has to be one of: it accepts connections, each for the
process that has the fewest, and it has the gate, whose queue, shares and pushes are therefore the same as with one
process. What each has of its own: answers kept for requests that come again, and bodies under way. When one process
ends, the service does.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from llmdistill.compat.vllm_clients import Seat, SharedEngine
from llmdistill.service import member
from llmdistill.service.gate import Gate
from llmdistill.service.line import Line
from llmdistill.service.metrics import FILES
from llmdistill.service.problems import first_line
from llmdistill.service.remote_gate import Holds
from llmdistill.service.serve import ServeConfig, allow_files, announce, bind, limits_of, service_uploads, settings_of
from llmdistill.service.vllm_engine import shared_arguments

END_S = 15.0  # for the processes to end by themselves
UP_S = 120.0  # from the engine being up to the processes being so
AGAIN_S = 0.05  # until a connection is tried to be accepted, or handed over, again


class Shared(Protocol):
    """An engine and the processes that ask it."""

    askers: list[BaseProcess]

    @property
    def cores(self) -> list[BaseProcess]: ...

    def close(self) -> None: ...


def launched(config: ServeConfig, start: Callable[[Seat], BaseProcess]) -> Shared:
    """vLLM's."""
    arguments = shared_arguments(config.model, **settings_of(config))
    return SharedEngine(arguments, config.api_processes, start)


def run(
    config: ServeConfig,
    token: str | None,
    launch: Callable[[ServeConfig, Callable[[Seat], BaseProcess]], Shared] = launched,
) -> int:
    """The service, until it ends. Returns the exit status: 0 after a clean stop, 1 when a process died.

    Args:
        launch: starts the engine, and a process for every seat at it.

    Raises:
        UserError: the address, the model or a setting is refused.
    """
    allow_files(limits_of(config))
    listening = bind(config.host, config.port)
    spawned = multiprocessing.get_context("spawn")
    ends: list[tuple[socket.socket, socket.socket]] = []

    def start(seat: Seat) -> BaseProcess:
        (line, their_line), (hand, their_hand) = socket.socketpair(), socket.socketpair()
        ends.append((line, hand))
        name = f"API process {seat.index}"
        process = spawned.Process(target=member.run, name=name, args=(config, token, seat, their_line, their_hand))
        process.start()
        their_line.close()
        their_hand.close()
        return process

    with listening, tempfile.TemporaryDirectory(prefix="llmdistill-metrics-") as files:
        os.environ[FILES] = files
        service_uploads(config).clear()
        engine = launch(config, start)
        try:
            return asyncio.run(_Parent(config, engine, ends, listening).serve())
        finally:
            engine.close()


class _Member:
    """One of the processes, seen from here."""

    def __init__(self, parent: _Parent, index: int, process: BaseProcess, hand: socket.socket) -> None:
        self.parent, self.index, self.process, self.hand = parent, index, process, hand
        self.line, self.holds = Line(self.answer), Holds(parent.gate, self.changed)
        self.up = asyncio.get_running_loop().create_future()
        self.connections = 0

    async def answer(self, what: str, about: dict[str, Any]) -> Any:
        if what == "enter":
            return await self.holds.enter(**about)
        if what == "leave":
            return await self.holds.leave(**about)
        if what == "metrics":
            return await self.parent.metrics()
        if what == "closed":
            self.connections -= 1
        elif what == "up":
            self.up.set_result(about)
        elif what == "dead":
            self.parent.died("the engine has died")
        return None

    async def changed(self, state: dict[str, Any]) -> None:
        await self.parent.ask_all("adopt", but=self, state=state)


class _Parent:
    def __init__(
        self,
        config: ServeConfig,
        engine: Shared,
        ends: list[tuple[socket.socket, socket.socket]],
        listening: socket.socket,
    ) -> None:
        self.config, self.engine, self.ends, self.listening = config, engine, ends, listening
        self.capacity: int | None = None
        self.gate = Gate(limits_of(config), lambda: self.capacity)
        self.members: list[_Member] = []
        self.ending = False
        self.status = 0

    async def serve(self) -> int:
        loop, self.ended = asyncio.get_running_loop(), asyncio.Event()
        processes = self.engine.askers
        self.members = [_Member(self, i, processes[i], hand) for i, (_, hand) in enumerate(self.ends)]
        self._watch()
        tasks = [loop.create_task(m.line.run(line)) for m, (line, _) in zip(self.members, self.ends, strict=True)]
        stopping: list[asyncio.Task[None]] = []

        def told() -> None:
            if stopping:
                self._end()
            else:
                stopping.append(loop.create_task(self._drain()))

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, told)
        tasks.append(loop.create_task(self._accept()))
        for task in tasks:
            task.add_done_callback(self._failed)
        await self.ended.wait()
        self.listening.close()
        await self._last()
        for task in (*tasks, *stopping):
            task.cancel()
        return self.status

    async def ask_all(self, what: str, but: _Member | None = None, **about: Any) -> list[Any]:
        return await asyncio.gather(*(m.line.ask(what, **about) for m in self.members if m is not but))

    async def metrics(self) -> list[Any]:
        """What each counts; what is counted here is told to the first."""
        counts = [self.gate.pushed_out, *[0] * (len(self.members) - 1)]
        return await asyncio.gather(
            *(m.line.ask("metrics", pushed_out=n) for m, n in zip(self.members, counts, strict=True))
        )

    def died(self, what: str) -> None:
        """The service ends, with one message."""
        if not self.ending:
            self.status = 1
            self._end()
            with suppress(OSError):  # nobody reads it
                print(f"{what}; the service ends", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        """For processes that end before they are told to."""
        loop = asyncio.get_running_loop()
        for process in (*self.engine.askers, *self.engine.cores):
            loop.add_reader(process.sentinel, self._gone, process)

    def _gone(self, process: BaseProcess) -> None:
        asyncio.get_running_loop().remove_reader(process.sentinel)
        if process in self.engine.askers:
            process.join()
            code = process.exitcode or 0
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
            self.died(f"{process.name} (process {process.pid}) has ended ({how})")
        else:
            self.died("the engine has died")

    def _failed(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.died(f"{type(error).__name__} between the service's processes: {first_line(error)}")

    async def _accept(self) -> None:
        """Once all are up."""
        try:
            async with asyncio.timeout(UP_S):
                found = [await one.up for one in self.members]
        except TimeoutError:
            late = ", ".join(one.process.name for one in self.members if not one.up.done())
            return self.died(f"the engine is up, and {late} not, {UP_S:g} s later")
        self.capacity = found[0]["capacity"]
        about = f"vllm, {found[0]['dtype']}, {len(found)} API processes"
        announce(self.config, about, found[0]["most"], self.listening)
        self.listening.setblocking(False)
        while True:
            try:
                connection, _ = await asyncio.get_running_loop().sock_accept(self.listening)
            except OSError:  # too many files are open; or it has gone
                await asyncio.sleep(AGAIN_S)
                continue
            with connection:
                await self._hand_over(connection)

    async def _hand_over(self, connection: socket.socket) -> None:
        while not self.ending:
            least = min(self.members, key=lambda m: m.connections)
            try:
                socket.send_fds(least.hand, [b"c"], [connection.fileno()], socket.MSG_DONTWAIT)
            except OSError:  # it has not taken those before yet
                await asyncio.sleep(AGAIN_S)
                continue
            least.connections += 1
            return

    async def _drain(self) -> None:
        print(f"draining: {self.gate.requests} requests", file=sys.stderr, flush=True)
        await self.ask_all("draining")
        if not await self.gate.drained(self.config.drain_s):
            print(f"{self.gate.requests} requests were not done in {self.config.drain_s:g} s", file=sys.stderr)
        self._end()

    def _end(self) -> None:
        self.ending = True
        self.ended.set()

    async def _last(self) -> None:
        """The processes send what is worked out, and end."""
        for one in self.members:
            one.line.tell("end")
        alive = [one.process for one in self.members]
        end = asyncio.get_running_loop().time() + END_S
        while any(p.is_alive() for p in alive) and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(AGAIN_S)
