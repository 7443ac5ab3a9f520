"""One of several processes that answer for one engine. The one that started it (:mod:`llmdistill.service.processes`)
accepts connections and hands them over, and has the gate."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from typing import Any

from llmdistill.compat.uvicorn import Handed
from llmdistill.compat.vllm_clients import Seat
from llmdistill.errors import UserError
from llmdistill.quiet import quiet
from llmdistill.service.line import Line
from llmdistill.service.metrics import added_up, told
from llmdistill.service.orphan import die_with_parent
from llmdistill.service.remote_gate import RemoteGate
from llmdistill.service.serve import ServeConfig, http_server, load, measure_lag, service_of, watch


def run(config: ServeConfig, token: str | None, seat: Seat, line: socket.socket, handed: socket.socket) -> None:
    """The process.

    Args:
        line: to the one that started it.
        handed: where connections come from.
    """
    die_with_parent()
    # the other one is told by whoever tells; a terminal and a supervisor tell all processes
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    quiet()
    try:
        asyncio.run(_serve(config, token, seat, line, handed))
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


async def _serve(config: ServeConfig, token: str | None, seat: Seat, end: socket.socket, handed: socket.socket) -> None:
    engine: Any = load(config, seat)
    await engine.start()

    async def answer(what: str, about: dict[str, Any]) -> Any:
        if what == "metrics":
            gate.pushed_out = about["pushed_out"]
            return told(service.counted())
        if what == "adopt":
            service.weights.adopt(about["state"])
            engine.renamed(about["state"]["teacher"])
        elif what == "draining":
            gate.draining = True
        elif what == "end":
            server.should_exit = True
        return None

    line = Line(answer)
    gate = RemoteGate(line, lambda: service.weights.state())
    service = service_of(config, token, engine, lambda: line.tell("dead"), gate)

    async def of_all() -> bytes:
        return await asyncio.to_thread(added_up, await line.ask("metrics"))

    service.all_metrics = of_all
    server = http_server(service, config)
    there = asyncio.get_running_loop().create_future()
    talking = asyncio.create_task(line.run(end, lambda: there.set_result(None)))
    await asyncio.wait((there, talking), return_when=asyncio.FIRST_COMPLETED)
    serving = asyncio.create_task(server.serve(sockets=[]))
    while not server.started:
        if serving.done():
            return serving.result()
        await asyncio.sleep(0.01)
    taking = Handed(server, lambda: line.tell("closed"))
    handed.setblocking(False)
    asyncio.get_running_loop().add_reader(handed, _take, handed, taking)
    about = {"capacity": engine.capacity_tokens, "dtype": engine.dtype}
    await line.ask("up", most=min(service.limits.top_k, engine.max_top_k), **about)
    watching = [asyncio.create_task(work) for work in (watch(service), measure_lag(service))]
    await asyncio.wait((serving, talking), return_when=asyncio.FIRST_COMPLETED)
    if talking.done():  # nobody will say what to do
        os._exit(1)
    for task in watching:
        task.cancel()
    await engine.close()


def _take(handed: socket.socket, taking: Handed) -> None:
    """Whatever connection has come."""
    try:
        data, descriptors, _, _ = socket.recv_fds(handed, 1, 1)
    except BlockingIOError:
        return
    if not data:  # no more will come
        asyncio.get_running_loop().remove_reader(handed)
    for descriptor in descriptors:
        taking.take(socket.socket(fileno=descriptor))
