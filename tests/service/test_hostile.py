"""Requests that would stall, kill or fool a service: everybody else is answered as if they were not there."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from llmdistill.errors import UserError
from llmdistill.service.answers import Answer, Answers
from llmdistill.service.app import Service
from llmdistill.service.engine import EngineDead
from llmdistill.service.hf_engine import HFEngine
from llmdistill.service.limits import Limits
from llmdistill.service.problems import Problem
from llmdistill.service.routes import create_app
from llmdistill.service.serve import ServeConfig, check, watch
from llmdistill.service.uploads import BEGUN, PREFIX, Uploads
from llmdistill.wire import protocol
from llmdistill.wire.bodies import BodyError, pack_prompts, pack_sequences, unpack_completions, unpack_sequences
from tests import tiny
from tests.service.inprocess import (
    SEQUENCES,
    Client,
    assert_same,
    blocks_of,
    expected,
    score_body,
    stored,
    teacher,
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
def test_no_body_is_parsed_hashed_or_copied_on_the_loops_thread(what: str, tmp_path: Path) -> None:
    """Bodies of 0.9 to 16 MiB, all of them refused in the end: no callback of the loop has much to do."""
    path, headers, made = LARGE[what]
    data = made()
    assert len(data) > 1 << 16

    async def test(client: Client, service: Service) -> None:
        service.engine.weights_bytes = 64 << 20  # as if the model were large enough for such an upload
        await client.post(protocol.SCORE, json=score_body())  # what is imported and built once
        parts = in_parts(data)
        with loop_thread_times() as seen:  # in a task of its own: a step that has begun is not measured
            answer = await asyncio.create_task(client.post(path, content=parts, headers=headers))
        assert 400 <= answer.status_code < 500, answer.text
        assert len(seen) > 3 and max(seen)[0] < BUSY_S, max(seen)

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

        async def scored(jobs: Any) -> Any:
            return [wide]

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


# -------------------------------------------------------------------- callers who go


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

        async def never(_: Any) -> Any:
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

        async def never(_: Any) -> Any:
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


# -------------------------------------------------------------------- weights


def test_an_engine_that_takes_no_part_of_the_weights_says_so_and_refuses_one() -> None:
    """What vLLM on a GPU is like: a push that it cannot take would end it."""

    class Whole(HFEngine):
        partial_weights = False

        async def load_weights(self, folder: Path, partial: bool) -> None:
            if partial:
                raise EngineDead("half of a layer is uninitialised memory")
            await super().load_weights(folder, partial)

    async def run() -> None:
        import httpx

        service = Service(Whole(teacher()), Limits(sequence_tokens=128), accept_weights=True)
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
        async with Client(transport=transport, base_url="http://127.0.0.1") as client:
            assert (await client.get(protocol.INFO)).json()["partial_weights"] is False
            part = save({"model.norm.weight": torch.full((32,), 0.5)})
            query = {"policy_version": "1", "partial": "true"}
            answer = await client.post(protocol.WEIGHTS, params=query, content=part, headers=TENSORS)
            assert answer.status_code == 400 and answer.json()["error"]["type"] == "partial_weights"
            assert not service.dead
            whole = save(stored(tiny.llama(2)))
            answer = await client.post(protocol.WEIGHTS, params={"policy_version": "1"}, content=whole, headers=TENSORS)
            assert answer.status_code == 200
        await service.engine.close()

    asyncio.run(run())


def test_of_many_who_offer_the_same_weights_one_pushes() -> None:
    async def test(client: Client, service: Service) -> None:
        offer = {"digest": "abc", "policy_version": 3}
        waiting = [asyncio.create_task(client.post(protocol.OFFER, json=offer)) for _ in range(5)]
        done, others = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result().json() for task in done] == [{"needed": True}] and len(others) == 4
        query = {"policy_version": "3", "digest": "abc"}
        # the first push fails, and one of the others is told to try
        bad = await client.post(protocol.WEIGHTS, params=query, content=b"junk", headers=TENSORS)
        assert bad.status_code == 400
        done, others = await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
        assert [task.result().json() for task in done] == [{"needed": True}]
        data = save(stored(tiny.llama(2)))
        pushed = (await client.post(protocol.WEIGHTS, params=query, content=data, headers=TENSORS)).json()
        assert [(await task).json() for task in others] == [{"needed": False, **pushed}] * 3
        # and whoever asks later: not for another version, nor for other weights
        assert (await client.post(protocol.OFFER, json=offer)).json()["needed"] is False
        for other in ({"digest": "abc", "policy_version": 4}, {"digest": "xyz", "policy_version": 3}):
            assert (await client.post(protocol.OFFER, json=other)).json() == {"needed": True}

    with_service(test, accept_weights=True)


def test_an_offer_that_nothing_comes_of_keeps_nobody_waiting() -> None:
    async def test(client: Client, service: Service) -> None:
        offer = {"digest": "abc", "policy_version": 3}
        for _ in range(2):
            assert (await asyncio.wait_for(client.post(protocol.OFFER, json=offer), 20)).json() == {"needed": True}

    with_service(test, Limits(sequence_tokens=128, silence_s=0.05), accept_weights=True)


def test_an_upload_that_falls_silent_is_given_up_and_the_next_one_goes_through(tmp_path: Path) -> None:
    async def test(client: Client, service: Service) -> None:
        async def stalled() -> Any:
            yield b"x" * 1000
            await asyncio.Event().wait()

        query = {"policy_version": "1"}
        answer = await client.post(protocol.WEIGHTS, params=query, content=stalled(), headers=TENSORS)
        assert answer.status_code == 408 and not list(tmp_path.iterdir())
        data = save(stored(tiny.llama(2)))
        answer = await client.post(protocol.WEIGHTS, params=query, content=data, headers=TENSORS)
        assert answer.status_code == 200 and not list(tmp_path.iterdir())

    limits = Limits(sequence_tokens=128, silence_s=0.2)
    with_service(test, limits, accept_weights=True, upload_folder=tmp_path)


def test_an_upload_for_which_there_is_no_room_is_refused_before_it_is_read(tmp_path: Path) -> None:
    async def test(client: Client, service: Service) -> None:
        service.engine.weights_bytes = 1 << 60
        read: list[int] = []

        async def body() -> Any:
            read.append(1)
            yield b"x"

        headers = {**TENSORS, "Content-Length": str(1 << 59)}
        answer = await client.post(protocol.WEIGHTS, params={"policy_version": "1"}, content=body(), headers=headers)
        assert answer.status_code == 507 and "--upload-folder" in answer.json()["error"]["message"] and not read

    with_service(test, accept_weights=True, upload_folder=tmp_path)


HOLD = """
import os, sys
from pathlib import Path
from llmdistill.service.uploads import Uploads
held = Uploads(Path(sys.argv[1])).held_folder()
(held.path / "model.safetensors").write_bytes(b"half")
print("held", flush=True)
sys.stdin.readline()
os._exit(0)  # as a kill: nothing is tidied up
"""


def test_what_another_service_is_uploading_is_left_alone_and_what_a_dead_one_left_is_removed(tmp_path: Path) -> None:
    """By a lock, not by the number of a process: another container has numbers of its own."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    Uploads(tmp_path).clear()
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(PREFIX) and (folder / "model.safetensors").exists()
    other.communicate("\n", timeout=60)
    Uploads(tmp_path).clear()
    assert not list(tmp_path.iterdir())
    (tmp_path / f"{BEGUN}x").mkdir()  # being made by somebody, or left by one killed at that moment
    Uploads(tmp_path).clear()
    assert list(tmp_path.iterdir())
    Uploads(tmp_path).clear(now=time.time() + 7200)
    assert not list(tmp_path.iterdir())


def lora(folder: Path, seed: int = 0) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    get_peft_model(tiny.llama(1), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).save_pretrained(
        folder
    )
    return folder


def test_an_adapter_is_copied_and_there_are_so_many_and_no_more(tmp_path: Path) -> None:
    """Engines read it again when it comes back into use: its folder may have gone by then."""
    uploads = tmp_path / "uploads"
    uploads.mkdir()

    async def test(client: Client, service: Service) -> None:
        for i in range(2):
            folder = lora(tmp_path / "given" / f"l{i}", i)
            answer = await client.post(protocol.ADAPTERS, json={"name": f"a{i}", "path": str(folder)})
            assert answer.status_code == 200, answer.text
            shutil.rmtree(folder)
        for path in service.engine.adapters.values():
            assert sorted(p.name for p in Path(path).iterdir() if p.name != "lock") == [
                "adapter_config.json",
                "adapter_model.safetensors",
            ]
        folder = lora(tmp_path / "given" / "l2", 2)
        answer = await client.post(protocol.ADAPTERS, json={"name": "a2", "path": str(folder)})
        assert answer.status_code == 400 and answer.json()["error"]["limit"] == 2 and "--max-adapters" in answer.text
        again = await client.post(protocol.ADAPTERS, json={"name": "a1", "path": str(folder)})
        assert again.status_code == 200 and len(list(uploads.iterdir())) == 2
        assert (await client.delete(f"{protocol.ADAPTERS}/a0")).status_code == 200
        assert len(list(uploads.iterdir())) == 1
        service.adapters.close()
        assert not list(uploads.iterdir())

    limits = Limits(sequence_tokens=128, adapters=2)
    with_service(test, limits, weight_folders=[tmp_path / "given"], upload_folder=uploads)


# -------------------------------------------------------------------- an engine that is no more


def until_dead(break_it: Callable[[Any], None]) -> None:
    async def test(client: Client, service: Service) -> None:
        told: list[bool] = []
        service.on_dead = lambda: told.append(True)
        break_it(service.engine)
        answer = await client.post(protocol.SCORE, json=score_body())
        assert answer.status_code in (500, 503)
        with pytest.raises(EngineDead):
            await service.engine.check()
        await asyncio.wait_for(watch(service, every_s=0.001), 20)
        assert told and service.dead
        assert (await client.get(protocol.HEALTH)).status_code == 503
        assert (await client.post(protocol.SCORE, json=score_body())).status_code == 503

    with_service(test)


def test_an_error_of_the_device_that_sticks_ends_the_service() -> None:
    """A failed assertion on a GPU fails every call after it too; a 500 for ever with /health 200 helps nobody."""

    def stick(engine: Any) -> None:
        def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("CUDA error: device-side assert triggered")

        engine.teacher.score = broken

    until_dead(stick)


def test_a_scoring_task_that_ends_ends_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(engine: Any) -> None:
        monkeypatch.setattr("llmdistill.service.hf_engine.next_batch", lambda *args: 1 / 0)

    until_dead(end)


def test_one_bad_request_does_not_end_it() -> None:
    async def test(client: Client, service: Service) -> None:
        engine: Any = service.engine
        run, engine._score = engine._score, lambda jobs: 1 / 0
        assert (await client.post(protocol.SCORE, json=score_body())).status_code == 500
        engine._score = run
        await engine.check()
        assert (await client.post(protocol.SCORE, json=score_body())).status_code == 200

    with_service(test)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"upload_folder": "/no/such"}, "--upload-folder /no/such: no such folder"),
        ({"max_adapters": 0}, "--max-adapters is 0; it must be at least 1"),
        ({"tls_cert": "/a.pem"}, "--tls-key is missing"),
        ({"tls_cert": "/a.pem", "tls_key": "/b.pem"}, "--tls-cert /a.pem: no such file"),
    ],
)
def test_what_cannot_be_served(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(ServeConfig(model="m", **settings), None)


def test_a_problem_without_room_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="--upload-folder"):
        Uploads(tmp_path / "gone").held_folder()
