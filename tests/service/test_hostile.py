"""Callers who go, who may ask, and probes: everybody else is answered as if the others were not there."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from llmdistill.service.answers import Answer, Answers
from llmdistill.service.app import Service
from llmdistill.service.limits import Limits
from llmdistill.service.routes import create_app
from llmdistill.wire import protocol
from tests.service.inprocess import (
    Client,
    score_body,
    with_service,
)


async def hang_up(app: Any, path: str, body: bytes, when: asyncio.Event, headers: dict[str, str] | None = None) -> None:
    """A request whose caller goes when ``when`` says so, straight into the application."""
    told = {"host": "127.0.0.1", "content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
        "scheme": "http", "http_version": "1.1", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        "root_path": "",
        "headers": [(k.encode(), v.encode()) for k, v in told.items()],
    }  # fmt: skip
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await when.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pass

    await app(scope, receive, send)


@pytest.mark.parametrize("path", [protocol.SCORE, protocol.GENERATE, "/v1/completions"])
@pytest.mark.parametrize("named", [False, True])
def test_work_of_a_caller_who_has_gone_is_cancelled(path: str, named: bool) -> None:
    """At once where the request has no id; else when nobody has come back for it."""

    async def test(client: Client, service: Service) -> None:
        engine: Any = service.engine
        began, gone, cancelled = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def never(*_: Any) -> Any:
            began.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        engine.score = engine.generate = never
        body = {
            protocol.SCORE: score_body(),
            protocol.GENERATE: {"prompts": [[5]], "sampling": {"max_new_tokens": 4}},
            "/v1/completions": {"prompt": "a"},
        }[path]
        app = create_app(service)
        headers = {"x-request-id": "one"} if named else {}
        asked = asyncio.create_task(hang_up(app, path, json.dumps(body).encode(), gone, headers))
        await began.wait()
        assert service.gate.requests == 1
        gone.set()
        await asyncio.wait_for(asyncio.gather(asked, cancelled.wait()), 20)
        await asyncio.sleep(0)
        assert service.gate.requests == 0 and service.gate.tokens == 0

    with_service(test, Limits(sequence_tokens=128, abandoned_s=0.01))


def test_a_caller_who_comes_back_finds_its_work_going_on() -> None:
    async def run() -> None:
        answers, computed, ready = Answers(1 << 20, 600.0, abandoned_s=60.0), list[int](), asyncio.Event()

        async def work() -> Answer:
            computed.append(1)
            await ready.wait()
            return Answer(b"x", "text/plain")

        for _ in range(3):
            caller = asyncio.create_task(answers.get("a", b"digest", work))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            caller.cancel()
            await asyncio.gather(caller, return_exceptions=True)
        caller = asyncio.create_task(answers.get("a", b"digest", work))
        await asyncio.sleep(0)
        ready.set()
        assert (await caller).body == b"x" and len(computed) == 1 and answers.cancelled == 0

    asyncio.run(run())


def test_an_answer_that_has_arrived_is_not_kept() -> None:
    """So what is kept at full rate is what is on its way, whatever the window is."""

    async def test(client: Client, service: Service) -> None:
        for i in range(20):
            headers = {"X-Request-Id": f"r{i}", **({"X-Request-Done": f"r{i - 1}"} if i else {})}
            assert (await client.post(protocol.SCORE, json=score_body(), headers=headers)).status_code == 200
            assert len(service.answers._entries) == 1
        assert service.answers.bytes < 10_000
        # what is called off while somebody waits for it is told to that one, and nothing is left
        engine: Any = service.engine
        began = asyncio.Event()

        async def never(*_: Any) -> Any:
            began.set()
            await asyncio.Event().wait()

        engine.score = never
        waiting = asyncio.create_task(client.post(protocol.SCORE, json=score_body(), headers={"X-Request-Id": "slow"}))
        await began.wait()
        generate = {"prompts": [[5]], "sampling": {"max_new_tokens": 2}}
        await client.post(protocol.GENERATE, json=generate, headers={"X-Request-Done": "slow,never-heard-of"})
        assert (await waiting).status_code == 503 and service.answers.cancelled == 1

    with_service(test)


def test_completions_of_the_openai_protocol_honour_request_ids() -> None:
    async def test(client: Client, service: Service) -> None:
        body = {"prompt": "2+2=", "max_tokens": 6}  # without a seed: drawn again it would be another
        headers = {"X-Request-Id": "c"}
        one, two = [await client.post("/v1/completions", json=body, headers=headers) for _ in range(2)]
        assert one.content == two.content and service.answers.replayed == 1
        streamed = [
            await client.post("/v1/completions", json={**body, "stream": True}, headers={"X-Request-Id": "s"})
            for _ in range(2)
        ]
        assert streamed[0].text == streamed[1].text and streamed[0].text.endswith("data: [DONE]\n\n")
        other = await client.post("/v1/completions", json={**body, "max_tokens": 5}, headers=headers)
        assert other.status_code == 409

    with_service(test)


# -------------------------------------------------------------------- who may ask


def test_a_page_in_a_browser_cannot_use_a_service_without_a_token() -> None:
    """It can send text and forms anywhere, and a name of its own DNS may lead here; JSON it may not without asking."""

    async def test(client: Client, service: Service) -> None:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            headers = {"Content-Type": kind}
            for path in (protocol.SCORE, protocol.GENERATE, "/v1/completions", protocol.WEIGHTS, protocol.ADAPTERS):
                answer = await client.post(path, content=json.dumps(score_body()).encode(), headers=headers)
                assert answer.status_code == 415 and answer.json()["error"]["type"] == "type", path
        for host in ("rebound.example", "rebound.example:8100", "127.0.0.1.example", "", "[::2]:1"):
            answer = await client.get(protocol.INFO, headers={"Host": host})
            assert answer.status_code == 421 and answer.json()["error"]["field"] == "Host", host
            assert (await client.post(protocol.SCORE, json=score_body(), headers={"Host": host})).status_code == 421
        for host in ("localhost:8100", "127.0.0.1", "127.8.8.8:1", "[::1]:8100", "a.localhost"):
            assert (await client.get(protocol.INFO, headers={"Host": host})).status_code == 200, host

    with_service(test)


def test_any_of_several_tokens_is_taken_and_names_of_hosts_are_no_part_of_them() -> None:
    async def test(client: Client, service: Service) -> None:
        for token, status in (("old", 200), ("new", 200), ("new@teacher.example", 401), ("other", 401), ("", 401)):
            answer = await client.get(
                protocol.INFO, headers={"Authorization": f"Bearer {token}", "Host": "any.example"}
            )
            assert answer.status_code == status, token

    with_service(test, token="old new@teacher.example")


def test_probes_are_answered_at_any_load() -> None:
    """Idle connections are not counted, and more callers than a service tells to wait do not reach its probes."""

    async def test(client: Client, service: Service) -> None:
        async with service.gate.alone():  # nothing is done meanwhile
            asked = [asyncio.create_task(client.post(protocol.SCORE, json=score_body())) for _ in range(2)]
            while service.gate.requests < 2:
                await asyncio.sleep(0.001)
            slow = [asyncio.create_task(client.post(protocol.SCORE, content=dripping())) for _ in range(12)]
            while service.bodies.bytes < 6:
                await asyncio.sleep(0.001)
            for path in (protocol.HEALTH, protocol.READY):
                assert (await client.get(path)).status_code == 200
            refused = await client.post(protocol.SCORE, json=score_body())
            assert refused.status_code in (429, 503) and "retry-after" in refused.headers
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)
        assert [(await task).status_code for task in asked] == [200, 200]

    async def dripping() -> Any:
        yield b" "
        await asyncio.Event().wait()

    with_service(test, Limits(sequence_tokens=128, in_flight=2))
