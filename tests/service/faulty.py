"""A teacher service that misbehaves on request: a small one of its own, or a reverse proxy before a real one.

    with Faulty(teacher) as service:                  # over a LocalTeacher
        service.next("500", "reset", None, "half")    # what happens to the next four POSTs
    with Faulty(upstream=url, plan=randomly({"reset": 0.1}, seed=0)) as proxy:

Sockets and bytes are handled by hand, because what is tested is how they break. It knows nothing of the service's code
but the protocol. Faults that come before the work ("500", "429", "503", "reset", "slow") and after it ("reset_after",
"stall", "half", "wrong_type", "corrupt", "other_weights") differ in whether an answer is kept for the next try.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx

from llmdistill.teachers.local import LocalTeacher
from llmdistill.wire import protocol
from tests.service.small import Answer, Seen, Small, error

FAULTS = ("500", "429", "503", "reset", "reset_after", "stall", "half", "wrong_type", "corrupt", "slow")
OTHER = "f" * 16  # a fingerprint that no weights have
Plan = Callable[[Seen], str | None]


def randomly(rates: Mapping[str, float], seed: int) -> Plan:
    """Every POST draws its fault."""
    drawn, names, weights = random.Random(seed), [None, *rates], [1 - sum(rates.values()), *rates.values()]
    return lambda seen: drawn.choices(names, weights)[0]


class Faulty:
    """The server. Starts with the block it is the context of; ``stop`` and ``start`` keep its port.

    Args:
        teacher: what answers, through a :class:`~tests.service.small.Small` with these ``settings``.
        small: or another object with a method ``answer``.
        upstream: or the url of a real service to pass requests on to.
        plan: decides the fault of each POST that :meth:`next` has nothing for.
        stall_s: how long a stalled answer is held back; a slow one takes a tenth of it.
    """

    def __init__(
        self,
        teacher: LocalTeacher | None = None,
        *,
        small: Any = None,
        upstream: str | None = None,
        plan: Plan = lambda seen: None,
        retry_after: str = "0.05",
        stall_s: float = 5.0,
        host: str = "127.0.0.1",
        **settings: Any,
    ) -> None:
        assert sum(given is not None for given in (teacher, small, upstream)) == 1
        self.small = Small(teacher, **settings) if teacher is not None else small
        self.upstream, self.plan = upstream, plan
        self.retry_after, self.stall_s = retry_after, stall_s
        self.keeps = True  # answers, for requests that come again
        self.seen: list[Seen] = []
        self.computed: Counter[str] = Counter()  # request id -> how often the work was done (for upstream: asked for)
        self.most_at_once = 0
        self._queue: deque[str | None] = deque()
        self._kept: dict[str, asyncio.Task[Answer]] = {}
        self._at_once = 0
        self._worker = ThreadPoolExecutor(1)  # one model, one thread
        self._proxy: httpx.AsyncClient | None = None
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.host = host
        with socket.create_server((host, 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://{host}:{self.port}"
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def __enter__(self) -> Faulty:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._worker.shutdown(wait=False)

    def next(self, *faults: str | None) -> None:
        """The faults of the next POSTs; None lets one through."""
        self._queue.extend(faults)

    def start(self) -> None:
        self._call(self._open())

    def stop(self, *, forget: bool = True) -> None:
        """As ``kill -9`` would: connections are reset; what was kept is gone."""
        self._call(self._shut(forget))

    def posts(self, path: str = protocol.SCORE) -> list[Seen]:
        return [s for s in self.seen if s.method == "POST" and s.path == path]

    def _call(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._connection, self.host, self.port)
        if self.upstream is not None:
            self._proxy = httpx.AsyncClient(base_url=self.upstream, timeout=None, trust_env=False)

    async def _shut(self, forget: bool) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            _reset(writer)
        if forget:
            self._kept.clear()
        if self._proxy is not None:
            await self._proxy.aclose()

    async def _end(self) -> None:
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while (seen := await _read(reader)) is not None:
                self.seen.append(seen)
                self._at_once += seen.method == "POST"
                self.most_at_once = max(self.most_at_once, self._at_once)
                try:
                    if not await self._respond(seen, writer):
                        break
                finally:
                    self._at_once -= seen.method == "POST"
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _respond(self, seen: Seen, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection lives on."""
        if seen.method == "POST":
            seen.fault = self._queue.popleft() if self._queue else self.plan(seen)
        fault = seen.fault
        if fault == "reset":
            _reset(writer)
            return False
        if fault in ("500", "429", "503"):
            refusal = error(int(fault), f"injected {fault}")
            refusal.headers = {} if fault == "500" else {"Retry-After": self.retry_after}
            await _write(writer, refusal)
            return True
        if fault == "slow":
            await asyncio.sleep(self.stall_s / 10)
        answer = await self._answer(seen)
        if fault == "reset_after":
            _reset(writer)
            return False
        if fault == "stall":
            await asyncio.sleep(self.stall_s)
            return False
        if fault == "half":
            writer.write(_head(answer) + answer.body[: len(answer.body) // 2])
            await writer.drain()
            return False
        if fault == "wrong_type":
            answer = Answer(200, b"<html>log in to the network</html>", "text/html")
        elif fault == "corrupt":
            answer = _corrupted(answer)
        elif fault == "other_weights":
            answer = _of_others(answer)
        await _write(writer, answer)
        return True

    async def _answer(self, seen: Seen) -> Answer:
        """Computed once for every request id, whoever asks again and however often; upstream does that itself."""
        if seen.method != "POST" or seen.id is None or self.upstream is not None or not self.keeps:
            return await self._compute(seen)
        if seen.id not in self._kept:
            self._kept[seen.id] = self._loop.create_task(self._compute(seen))
        answer = await asyncio.shield(self._kept[seen.id])
        if answer.status != 200:
            self._kept.pop(seen.id, None)
        return answer

    async def _compute(self, seen: Seen) -> Answer:
        if seen.id is not None and seen.method == "POST":
            self.computed[seen.id] += 1
        if self._proxy is not None:
            keep = ("authorization", "content-type", "x-request-id")
            headers = {k: v for k, v in seen.headers.items() if k in keep}
            try:
                got = await self._proxy.request(
                    seen.method, seen.path, params=seen.query, headers=headers, content=seen.body
                )
            except httpx.HTTPError as failure:
                return error(502, f"upstream: {failure!r}")
            back = {k: v for k, v in got.headers.items() if k.lower() == "retry-after"}
            return Answer(got.status_code, got.content, got.headers.get("content-type", ""), back)
        return await self._loop.run_in_executor(self._worker, self.small.answer, seen)


def _corrupted(answer: Answer) -> Answer:
    """One bit of the last block is wrong; JSON, which has no checksum, is no longer UTF-8."""
    body = bytearray(answer.body)
    if answer.kind == protocol.COMPLETIONS_TYPE:
        return Answer(answer.status, bytes(body[:-3]), answer.kind)  # there is no checksum: a piece is missing
    if answer.kind == protocol.BLOCKS_TYPE:
        body[-len(list(protocol.unpack_frames(answer.body))[-1]) // 2] ^= 0x10
    else:
        body[len(body) // 2] = 0xFF
    return Answer(answer.status, bytes(body), answer.kind)


def _of_others(answer: Answer) -> Answer:
    """The answer as a service with other weights would head it."""
    if answer.kind == protocol.JSON_TYPE:
        return Answer(200, json.dumps({**json.loads(answer.body), "teacher": OTHER}).encode())
    head, *blocks = protocol.unpack_frames(answer.body)
    changed = json.dumps({**json.loads(bytes(head)), "teacher": OTHER}).encode()
    return Answer(200, protocol.pack_frames([changed, *map(bytes, blocks)]), answer.kind)


# -------------------------------------------------------------------- HTTP/1.1, as little as is needed


async def _read(reader: asyncio.StreamReader) -> Seen | None:
    try:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    except asyncio.IncompleteReadError:
        return None
    method, target, _ = lines[0].split(" ")
    headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    url = urlsplit(target)
    return Seen(method, url.path, dict(parse_qsl(url.query)), headers, body)


def _head(answer: Answer) -> bytes:
    headers = {"Content-Type": answer.kind, "Content-Length": str(len(answer.body)), **answer.headers}
    lines = [f"HTTP/1.1 {answer.status} X", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


async def _write(writer: asyncio.StreamWriter, answer: Answer) -> None:
    writer.write(_head(answer) + answer.body)
    await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
