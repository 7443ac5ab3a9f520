"""Answers that go out while they are being written: in order, whole or noticed, and not worked out twice."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmdistill.service.answers import Answers, Writing
from llmdistill.service.parts import CutOff, Parts, Reading
from llmdistill.service.problems import Problem
from llmdistill.service.routes import create_app
from llmdistill.wire import protocol
from llmdistill.wire.blocks import decode
from llmdistill.wire.protocol import FrameError, FrameReader, pack_frames
from tests.service.inprocess import SEQUENCES, Client, Service, expected, score_body, with_service


def wide_blocks() -> list[Any]:
    """Of the positions that ``score_body`` asks for, each more than what is held back."""
    rows, made = 40_000, []
    for block in expected(8):
        listed = torch.arange(8, dtype=torch.int32).repeat(rows, 1)
        columns = {"topk_ids": listed, "topk_logprobs": torch.full((rows, 8), -2.0)}
        made.append(replace(block, positions=slice(1, rows + 1), token_logprobs=torch.zeros(rows), **columns))
    return made


def test_blocks_go_out_in_their_order_before_the_last_one_is_there() -> None:
    """The engine has the second one first, and the rest when somebody has read the first two."""

    async def test(_: Client, service: Service) -> None:
        engine: Any = service.engine
        two_read, blocks = asyncio.Event(), wide_blocks()

        async def scored(jobs: Any, done: Any) -> Any:
            for i in (1, 0):
                done(i, blocks[i])
            await two_read.wait()
            for i in (4, 2, 3):
                done(i, blocks[i])
            return blocks

        engine.score = scored

        def look(frames: list[bytes]) -> None:
            if len(frames) == 3:  # the head is one
                two_read.set()

        sent, frames = await scores(service, look)
        assert sent[0]["status"] == 200 and not [h for h in sent[0]["headers"] if h[0] == b"content-length"]
        assert len(sent) > 3 and sent[-1]["more_body"] is False
        positions = [decode(frame).topk_ids.shape for frame in frames[1:]]
        assert len(positions) == len(SEQUENCES) and service.gate.requests == 0

    with_service(test)


async def scores(
    service: Service, look: Callable[[list[bytes]], None], **headers: str
) -> tuple[list[dict[str, Any]], list[bytes]]:
    """What goes over the wire for ``score_body``, and the frames in it; ``look`` sees those after every part."""
    body = json.dumps(score_body()).encode()
    asked: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
    sent, reader, frames = list[dict[str, Any]](), FrameReader(1 << 30), list[bytes]()

    async def receive() -> dict[str, Any]:
        return asked.pop() if asked else await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if sent[0]["status"] == 200:
            frames.extend(map(bytes, reader.feed(message.get("body", b""))))
        look(frames)

    named = {"host": "127.0.0.1", "content-type": "application/json", **headers}
    scope = {
        "type": "http",
        "method": "POST",
        "headers": [(name.encode(), value.encode()) for name, value in named.items()],
        "http_version": "1.1",
        "scheme": "http",
        "path": protocol.SCORE,
        "raw_path": protocol.SCORE.encode(),
        "query_string": b"",
        "root_path": "",
    }
    await asyncio.wait_for(create_app(service)(scope, receive, send), 60)  # type: ignore[arg-type]
    return sent, frames


def test_an_engine_that_dies_behind_the_first_part_cuts_the_answer_off_and_is_noticed() -> None:
    async def test(_: Client, service: Service) -> None:
        from llmdistill.service.engine import EngineDead

        engine: Any = service.engine
        blocks = wide_blocks()

        async def scored(jobs: Any, done: Any) -> Any:
            done(0, blocks[0])
            while not service.answers._entries["one"].parts.started:  # type: ignore[union-attr]
                await asyncio.sleep(0)
            raise EngineDead("it is gone")

        engine.score = scored
        sent, frames = await scores(service, lambda _: None, **{"x-request-id": "one"})
        assert service.dead
        await settled()
        # whoever reads fast has a part of it, but never its end
        assert sent[0]["status"] == 503 or (sent[-1]["more_body"] and len(frames) < 1 + len(SEQUENCES))
        assert not service.answers._entries  # nothing of it is kept: the next one is worked out anew

    with_service(test)


async def settled() -> None:
    """What is to follow the end of a task has followed."""
    for _ in range(5):
        await asyncio.sleep(0)


def run(test: Any) -> None:
    asyncio.run(test)


def test_a_retry_gets_all_of_what_is_still_being_written_and_later_what_is_kept() -> None:
    async def test() -> None:
        answers, go, computed = Answers(1 << 20, 600.0), asyncio.Event(), list[int]()

        async def write(parts: Parts) -> None:
            computed.append(1)
            parts.write(b"a" * 10)
            await go.wait()
            parts.write(b"b" * 10)

        work = Writing("text/plain", write, 1)
        first = await answers.get("one", b"digest", work)
        assert isinstance(first.body, Reading) and await anext(first.body) == b"a" * 10
        first.body.close()  # its caller has hung up
        again = await answers.get("one", b"digest", work)
        assert isinstance(again.body, Reading)
        go.set()
        assert b"".join([part async for part in again.body]) == b"a" * 10 + b"b" * 10
        again.body.close()
        await settled()
        kept = await answers.get("one", b"digest", work)
        assert kept.body == b"a" * 10 + b"b" * 10 and len(computed) == 1 and answers.bytes > 20
        with pytest.raises(Problem, match="another request"):
            await answers.get("one", b"other", work)

    run(test())


@pytest.mark.parametrize("name", [None, "one"])
def test_nothing_is_written_on_for_callers_that_have_gone(name: str | None) -> None:
    """Without a name nobody can come back; with one there is a while for it."""

    async def test() -> None:
        answers, ended = Answers(1 << 20, 600.0, abandoned_s=0.0), asyncio.Event()

        async def write(parts: Parts) -> None:
            try:
                parts.write(b"a")
                await asyncio.Event().wait()
            finally:
                ended.set()

        answer = await answers.get(name, b"digest", Writing("text/plain", write, 1))
        assert isinstance(answer.body, Reading) and not ended.is_set()
        answer.body.close()
        answer.body.close()  # twice is once
        await asyncio.wait_for(ended.wait(), 30)
        assert answers.cancelled == 1 and not answers._entries

    run(test())


def test_what_fails_before_anything_went_out_is_an_error_and_behind_that_the_body_is_cut_off() -> None:
    async def test() -> None:
        answers = Answers(1 << 20, 600.0)

        async def write(parts: Parts) -> None:
            parts.write(b"a" * 10)
            await asyncio.sleep(0.01)
            raise Problem(400, "invalid", "no")

        with pytest.raises(Problem, match="no"):
            await answers.get("held back", b"digest", Writing("text/plain", write, 1000))
        answer = await answers.get("out", b"digest", Writing("text/plain", write, 1))
        assert isinstance(answer.body, Reading)
        with pytest.raises(CutOff):
            async for _ in answer.body:
                pass
        answer.body.close()
        await settled()
        assert not answers._entries

    run(test())


def test_frames_come_out_of_any_parts() -> None:
    frames = [b"", b"one", bytes(range(256)) * 3]
    data = pack_frames(frames)
    for size in (1, 2, 5, 300, len(data)):
        reader = FrameReader(1 << 10)
        found = [bytes(f) for at in range(0, len(data), size) for f in reader.feed(data[at : at + size])]
        reader.end()
        assert found == frames
    reader = FrameReader(1 << 10)
    assert len(list(reader.feed(data[:-1]))) == 2
    with pytest.raises(FrameError, match="cut off"):
        reader.end()
    with pytest.raises(FrameError, match="at most 100"):
        list(FrameReader(100).feed(data))
