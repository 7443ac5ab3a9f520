"""The event loop of a service: nothing large is read, hashed or copied on its thread."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmdistill.service import bodies, uploads
from llmdistill.service.app import Service
from llmdistill.service.limits import Limits
from llmdistill.wire import protocol
from llmdistill.wire.bodies import BodyError, pack_prompts, pack_sequences, unpack_completions, unpack_sequences
from tests.service.inprocess import (
    SEQUENCES,
    Client,
    assert_same,
    blocks_of,
    expected,
    score_body,
    with_service,
)

IDS = {"Content-Type": protocol.IDS_TYPE}
TENSORS = {"Content-Type": protocol.TENSORS_TYPE}
BUSY_S = 0.004  # to join, hash or parse 16 MiB takes 5 ms and more; a part of 64 KiB some 50 us


@contextmanager
def loop_thread_times() -> Iterator[list[tuple[float, str]]]:
    """CPU seconds of the loop's own thread in each callback it ran, whatever else the machine was doing."""
    run, seen = asyncio.Handle._run, list[tuple[float, str]]()

    def timed(self: Any) -> None:
        began = time.thread_time()
        run(self)
        seen.append((time.thread_time() - began, repr(self)[:200]))

    asyncio.Handle._run = timed  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        asyncio.Handle._run = run  # type: ignore[method-assign]


@contextmanager
def threads_at_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """The thread, and how many bytes it was given, each time a body or a part of an upload is joined, hashed and read.
    A body of a megabyte costs the loop too little to be told by its time, and is one of many."""
    seen = list[tuple[int, int]]()

    def noted(module: Any, name: str) -> None:
        work = getattr(module, name)

        def noting(parts: list[bytes], *rest: Any) -> Any:
            seen.append((threading.get_ident(), sum(map(len, parts))))
            return work(parts, *rest)

        monkeypatch.setattr(module, name, noting)

    noted(bodies, "_joined")
    noted(uploads, "_keep")
    yield seen


def in_parts(data: bytes) -> Any:
    """As a socket gives it: 64 KiB, and the loop has its turn. Cut beforehand, or the cutting would be measured too."""
    parts = [data[start : start + (1 << 16)] for start in range(0, len(data), 1 << 16)]

    async def stream() -> Any:
        for part in parts:
            yield part
            await asyncio.sleep(0)

    return stream()


WIDE = np.zeros((131071, 100), np.int32)
LONG = [np.zeros(1 << 22, np.int32)]
LARGE = {
    "ids": (protocol.SCORE, IDS, lambda: pack_sequences({"top_k": 9999}, LONG, [(1, 2)], None, 264)),
    "chosen": (protocol.SCORE, IDS, lambda: pack_sequences({}, [WIDE[0]], [(1, 131072)], [WIDE], 264)),
    "prompts": (protocol.GENERATE, IDS, lambda: pack_prompts({"sampling": {"max_new_tokens": 4}}, LONG, [0])),
    "json": (protocol.SCORE, {}, lambda: json.dumps(score_body(sequences=[[7] * 250_000])).encode()),
    "text": (protocol.SCORE_TEXT, {}, lambda: as_json(items=[{"prompt": "a", "completion": "b" * 900_000}])),
    "completions": ("/v1/completions", {}, lambda: as_json(prompt=[5] * 300_000)),
    "adapter": (protocol.ADAPTERS, {}, lambda: as_json(name="a", path="x" * 900_000)),
    "weights": (f"{protocol.WEIGHTS}?policy_version=1", TENSORS, lambda: bytes(16 << 20)),
}


def as_json(**body: Any) -> bytes:
    return json.dumps(body).encode()


@pytest.mark.parametrize("what", LARGE)
def test_no_body_is_parsed_hashed_or_copied_on_the_loops_thread(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bodies of 0.9 to 16 MiB, all of them refused in the end: no callback of the loop has much to do."""
    path, headers, made = LARGE[what]
    data = made()
    assert len(data) > 1 << 16

    async def test(client: Client, service: Service) -> None:
        service.engine.weights_bytes = 64 << 20  # as if the model were large enough for such an upload
        await client.post(protocol.SCORE, json=score_body())  # what is imported and built once
        parts = in_parts(data)
        # in a task of its own: a step that has begun is not measured
        with threads_at_work(monkeypatch) as threads, loop_thread_times() as seen:
            answer = await asyncio.create_task(client.post(path, content=parts, headers=headers))
        assert 400 <= answer.status_code < 500, answer.text
        assert len(seen) > 3 and max(seen)[0] < BUSY_S, max(seen)
        large = [thread for thread, size in threads if size > 1 << 16]
        assert large and threading.get_ident() not in large
        assert sum(size for _, size in threads) >= len(data)  # all of it went that way

    with_service(test, Limits(sequence_tokens=128), accept_weights=True, upload_folder=tmp_path)


def test_answers_of_megabytes_are_not_made_on_the_loops_thread() -> None:
    """40,000 scored positions and 30,000 sampled tokens, as bytes and as JSON."""

    async def test(client: Client, service: Service) -> None:
        engine: Any = service.engine
        block = expected(8)[0]
        rows = 40_000
        wide = type(block)(
            slice(1, rows + 1),
            torch.zeros(rows),
            torch.arange(8, dtype=torch.int32).repeat(rows, 1),
            torch.full((rows, 8), -2.0),
            block.header,
        )
        from llmdistill.service.engine import Sample

        samples = [[Sample([5] * 15_000, [-0.5] * 15_000, "length")] * 2]

        async def scored(jobs: Any, done: Any) -> Any:
            for i in range(len(jobs)):
                done(i, wide)
            return [wide] * len(jobs)

        async def drawn(job: Any) -> Any:
            return samples

        engine.score, engine.generate = scored, drawn
        generate = {"prompts": [[5]], "sampling": {"max_new_tokens": 4, "samples_per_prompt": 2}}
        packed = pack_prompts({"sampling": generate["sampling"]}, [np.array([5], np.int32)], [0])
        await client.post(protocol.SCORE, json=score_body())
        with loop_thread_times() as seen:
            asked = [
                await asyncio.create_task(client.post(protocol.SCORE, json=score_body())),
                await asyncio.create_task(client.post(protocol.GENERATE, json=generate)),
                await asyncio.create_task(client.post(protocol.GENERATE, content=packed, headers=IDS)),
            ]
        sizes = [len(answer.content) for answer in asked]
        assert sizes[0] > 1 << 20 and sizes[1] > 200_000 and len(unpack_completions(asked[2].content).ids) == 2
        assert len(seen) > 3 and max(seen)[0] < BUSY_S, max(seen)

    with_service(test)


def test_bytes_and_json_ask_the_same() -> None:
    chosen = [np.array([[3, -1], [260, 4]], np.int32), np.array([[1, 2], [263, 0], [5, 6]], np.int32)]
    ids = [np.asarray(SEQUENCES[0][:4], np.int32), np.asarray(SEQUENCES[1][:5], np.int32)]
    spans = [(2, 4), (2, 5)]
    packed = pack_sequences({"top_k": 3, "dtype": "float32"}, ids, spans, chosen, 264)
    plain = {
        "sequences": [one.tolist() for one in ids], "positions": spans, "top_k": 3, "dtype": "float32",
        "chosen": [[[i for i in row if i >= 0] for row in table.tolist()] for table in chosen],
    }  # fmt: skip

    async def test(client: Client, service: Service) -> None:
        one = blocks_of(await client.post(protocol.SCORE, content=packed, headers=IDS))[1]
        assert_same(one, blocks_of(await client.post(protocol.SCORE, json=plain))[1])

    with_service(test)


def test_bodies_in_bytes_that_are_none() -> None:
    good = pack_sequences({"top_k": 1}, [np.array([5, 6], np.int32)], [(1, 2)], [np.array([[7]], np.int32)], 264)
    for cut in range(len(good)):
        with pytest.raises(BodyError):
            unpack_sequences(good[:cut], max_cells=10)
    with pytest.raises(BodyError, match="more than 0 ids"):
        unpack_sequences(good, max_cells=0)
    with pytest.raises(BodyError, match="settings have"):
        unpack_sequences(pack_sequences({"a": "x" * 70_000}, [], [], None, 264), max_cells=1)

    async def test(client: Client, service: Service) -> None:
        for data in (b"", good[:-1], good + b"x", b"\xff" * 100):
            for path in (protocol.SCORE, protocol.GENERATE):
                answer = await client.post(path, content=data, headers=IDS)
                assert answer.status_code == 400 and answer.json()["error"]["field"] == "body"
        other = pack_sequences({"top_k": 1}, [np.array([5, 6], np.int32)], [(1, 2)], [np.array([[270]], np.int32)], 300)
        answer = await client.post(protocol.SCORE, content=other, headers=IDS)
        assert answer.status_code == 400 and answer.json()["error"]["field"] == "chosen[0][0]"

    with_service(test)
