"""Connections of a real server: so many and no more, the idle ones closed first, and probes answered all the while."""

from __future__ import annotations

import asyncio
import json
import resource
import socket

import httpx
import pytest
import uvicorn

from llmdistill.compat.uvicorn import bounded_connections
from llmdistill.errors import UserError
from llmdistill.service import serve
from llmdistill.service.app import Service
from llmdistill.service.hf_engine import HFEngine
from llmdistill.service.limits import Limits
from llmdistill.service.routes import create_app
from llmdistill.wire import protocol
from tests.service.inprocess import score_body, teacher

LIMITS = Limits(sequence_tokens=128, in_flight=2)
FLOOD = 300


def still_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def test_a_flood_of_connections_closes_idle_ones_and_no_work_and_starves_no_probe() -> None:
    """Of 300 connections that send nothing, or half of a head, 80 are left; a request that was being worked on before
    the flood is answered after it; every probe meanwhile is answered too."""

    async def run() -> None:
        service = Service(HFEngine(teacher()), LIMITS)
        await service.engine.start()
        settings = {"log_level": "error", "lifespan": "off", "http": bounded_connections(LIMITS.connections)}
        server = uvicorn.Server(uvicorn.Config(create_app(service), **settings))
        listening = serve.bind("127.0.0.1", 0)
        address = listening.getsockname()
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        flood = list[socket.socket]()
        url = f"http://127.0.0.1:{address[1]}"
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            async with service.gate.alone():  # the request waits for its turn
                headers = {"Content-Type": protocol.JSON_TYPE}
                asked = asyncio.create_task(
                    client.post(protocol.SCORE, content=json.dumps(score_body()), headers=headers)
                )
                while service.gate.requests < 1:
                    await asyncio.sleep(0.001)
                for number in range(FLOOD):
                    flood.append(await asyncio.to_thread(socket.create_connection, address))
                    if number % 2:
                        flood[-1].sendall(b"GET /v1/info HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
                    if number % 50 == 49:  # each over a connection of its own, as a load balancer's
                        for path in (protocol.HEALTH, protocol.READY):
                            async with httpx.AsyncClient(base_url=url, timeout=60) as probe:
                                assert (await probe.get(path)).status_code == 200
                assert not asked.done()
            assert (await asked).status_code == 200
        left = sum(map(still_open, flood))
        assert LIMITS.connections - 10 <= left <= LIMITS.connections, left
        assert not any(map(still_open, flood[: FLOOD - LIMITS.connections]))  # the oldest went
        for connection in flood:
            connection.close()
        server.should_exit = True
        await serving
        await service.engine.close()

    asyncio.run(run())


def test_a_kept_connection_counts_as_idle_from_its_last_answer() -> None:
    """Of two that were opened, the one that was answered later stays."""

    async def app(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b""})  # type: ignore[operator]

    async def run() -> None:
        config = uvicorn.Config(app, log_level="error", lifespan="off", http=bounded_connections(2))  # type: ignore[arg-type]
        server, listening = uvicorn.Server(config), serve.bind("127.0.0.1", 0)
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        opened = [await asyncio.open_connection(*listening.getsockname()) for _ in range(2)]
        reader, writer = opened[0]
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        opened.append(await asyncio.open_connection(*listening.getsockname()))
        with pytest.raises(ConnectionError):  # reset
            assert await opened[1][0].read(1) == b""
            raise ConnectionResetError
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        for _, one in opened:
            one.close()
        server.should_exit = True
        await serving

    asyncio.run(run())


def test_more_connections_than_files_are_refused_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 1024))
    with pytest.raises(UserError, match=r"--in_flight 256 means up to 2112 connections.*1024 files.*--in_flight 88"):
        serve.allow_files(Limits())
    given = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: given.append(limits))
    serve.allow_files(Limits(in_flight=16))
    assert given == [(2 * 4 * 16 + 64 + 256, 1024)]
