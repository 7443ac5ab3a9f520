"""Several processes that answer for one engine: the gate and the metrics between two ends of a socket, and the command
over vLLM."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client import Counter as Counted
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save

from llmdistill.errors import UserError
from llmdistill.service.fair import CLIENT
from llmdistill.service.gate import Gate
from llmdistill.service.limits import Limits
from llmdistill.service.line import Line
from llmdistill.service.metrics import Metrics, added_up, told
from llmdistill.service.problems import Problem
from llmdistill.service.remote_gate import Holds, RemoteGate
from llmdistill.service.serve import check, parsed
from llmdistill.teachers.fingerprint import weights_fingerprint
from llmdistill.wire import protocol
from tests import tiny
from tests.service.inprocess import blocks_of, stored
from tests.service.process import ServiceProcess
from tests.service.test_serve import TENSORS, body, greedily, greedy


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--api_processes", "0"], "--api_processes is 0; it must be at least 1"),
        (["--api_processes", "2", "--engine", "hf"], "--engine hf; only vLLM's engine"),
        (["--api_processes", "2", "--ray", "true"], "2 and --ray are both given; a replica of a fleet is one process"),
        (["--api_processes", "2", "--max_lora_rank", "8"], "and --max_lora_rank are both given; an adapter"),
        (["--api_processes", "2", "--updatable", "--transfer", "nccl"], "and --transfer are both given; a trainer"),
        (["--api_processes", "2", "--updatable", "--versions", "HERE"], "and --versions are both given; replicas"),
    ],
)
def test_what_several_processes_do_not_go_with(words: list[str], why: str, tmp_path: Path) -> None:
    words = [str(tmp_path) if word == "HERE" else word for word in words]
    with pytest.raises(UserError) as refused:
        check(parsed(["--model", "M", *words]), None)
    assert why in str(refused.value) and "Fix: " in str(refused.value) and "\n" not in str(refused.value)


def with_members(
    test: Callable[[Gate, list[RemoteGate]], Awaitable[None]],
    limits: Limits,
    capacity: int | None = None,
    adopted: list[tuple[int, Any]] | None = None,
) -> None:
    """Runs ``test`` with a gate and two processes' ends of it, over sockets."""

    async def run() -> None:
        gate, lines, tasks, remote = Gate(limits, lambda: capacity), list[Line](), [], list[RemoteGate]()

        def member(i: int) -> None:
            async def answer_here(what: str, about: dict[str, Any]) -> Any:
                return await (holds.enter(**about) if what == "enter" else holds.leave(**about))

            async def answer_there(what: str, about: dict[str, Any]) -> None:
                assert adopted is not None
                await asyncio.sleep(0.01)
                adopted.append((i, about["state"]))

            async def changed(state: dict[str, Any]) -> None:
                for line in lines:
                    if line is not here:
                        await line.ask("adopt", state=state)

            here, there = Line(answer_here), Line(answer_there)
            holds = Holds(gate, changed)
            ends = socket.socketpair()
            lines.append(here)
            tasks.extend(asyncio.create_task(line.run(end)) for line, end in zip((here, there), ends, strict=True))
            remote.append(RemoteGate(there, lambda: {"from": i}))

        for i in range(2):
            member(i)
        await asyncio.sleep(0.01)
        await asyncio.wait_for(test(gate, remote), 30)
        for task in tasks:
            task.cancel()

    asyncio.run(run())


def test_processes_share_the_queue_and_its_order() -> None:
    """One rank with 8 requests at a time in one process, 15 ranks with one each spread over both: each is served as
    much as any other, which gates of their own would not give."""
    served: Counter[str] = Counter()

    async def test(gate: Gate, remote: list[RemoteGate]) -> None:
        async def rank(name: str, at: RemoteGate) -> None:
            CLIENT.set(name)
            while True:
                async with at.admitted(10) as place:
                    await asyncio.sleep(0.001)
                    place.used = 10
                    served[name] += 1

        ranks = [("greedy", remote[0])] * 8 + [(f"r{i}", remote[i % 3 > 0]) for i in range(15)]
        tasks = [asyncio.create_task(rank(name, at)) for name, at in ranks]
        await asyncio.sleep(1.0)
        assert gate.requests == sum(at.requests for at in remote) == len(ranks)
        assert gate.tokens - sum(at.tokens for at in remote) == 0 and max(at.waiting for at in remote) > 0
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0.05)
        assert (gate.requests, gate.tokens, [at.requests for at in remote]) == (0, 0, [0, 0])

    with_members(test, Limits(in_flight=64, queue_tokens=10_000), capacity=30)
    counts = list(served.values())
    assert len(counts) == 16 and sum(counts) > 100
    assert sum(counts) ** 2 / (len(counts) * sum(n * n for n in counts)) > 0.95  # Jain's index


def test_a_push_is_alone_in_all_processes_and_known_to_all_before_the_next_request() -> None:
    adopted: list[tuple[int, Any]] = []

    async def test(gate: Gate, remote: list[RemoteGate]) -> None:
        seen: list[str] = []

        async def request(at: RemoteGate, name: str, s: float = 0.05) -> None:
            async with at.admitted(1):
                seen.append(f"{name} begins, told of {len(adopted)}")
                await asyncio.sleep(s)
                seen.append(f"{name} ends")

        async def push() -> None:
            async with remote[0].alone():
                seen.append("push begins")
                await asyncio.sleep(0.05)
                seen.append("push ends")
            assert len(adopted) == 1

        first = asyncio.create_task(request(remote[1], "old"))
        await asyncio.sleep(0.02)
        pushing = asyncio.create_task(push())
        await asyncio.sleep(0.02)
        await asyncio.gather(first, pushing, request(remote[0], "new"), request(remote[1], "other"))
        assert seen[:4] == ["old begins, told of 0", "old ends", "push begins", "push ends"]
        assert {"new begins, told of 1", "other begins, told of 1"} < set(seen) and adopted == [(1, {"from": 0})]

        # one that gives up while it waits leaves nothing behind
        async with remote[0].alone():
            waiting = asyncio.create_task(request(remote[1], "late"))
            await asyncio.sleep(0.02)
            waiting.cancel()
            with suppress(asyncio.CancelledError):
                await waiting
        await asyncio.sleep(0.02)
        assert gate.requests == 0 and not any("late" in one for one in seen)

    with_members(test, Limits(), adopted=adopted)


def test_a_full_house_is_full_for_all_processes() -> None:
    async def test(gate: Gate, remote: list[RemoteGate]) -> None:
        async with remote[0].admitted(1), remote[1].admitted(1):
            with pytest.raises(Problem) as found:
                async with remote[1].admitted(1):
                    pass
            assert found.value.status == 429 and found.value.retry_after_s and "2 requests" in found.value.message
        gate.draining = True
        with pytest.raises(Problem) as found:
            async with remote[0].admitted(1):
                pass
        assert found.value.status == 503

    with_members(test, Limits(in_flight=2))


def test_metrics_of_several_processes_are_those_of_one() -> None:
    parts = []
    for i in (1, 2):
        metrics = Metrics()
        metrics.requests.labels("/v1/score", 200).inc(i)
        metrics.seconds.labels("/v1/score").observe(0.01 * i)
        metrics.version.set(7)
        metrics.waiting.set(i)
        parts.append(told(metrics.now()))
    found = {
        (s.name, s.labels.get("le")): s.value
        for family in text_string_to_metric_families(added_up(parts).decode())
        for s in family.samples
    }
    assert found["llmdistill_requests_total", None] == 3 and found["llmdistill_requests_waiting", None] == 3
    assert found["llmdistill_policy_version", None] == 7
    assert found["llmdistill_request_seconds_bucket", "0.02"] == 2 == found["llmdistill_request_seconds_count", None]
    other = CollectorRegistry()
    Counted("llmdistill_other", "Of one process only", registry=other).inc(5)
    assert b"llmdistill_other_total 5.0" in added_up([told(other), *parts])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.saved(tmp_path_factory.mktemp("shared"))


OPTIONS = ("--api_processes", "2", "--dtype", "float32", "--max_model_len", "128", "--drain_s", "30")


def connections(server: ServiceProcess) -> dict[int, int]:
    """Of the service's processes, which have how many open to its port."""
    established = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if int(line.split()[1].rpartition(":")[2], 16) == server.port and line.split()[3] == "01"
    }
    found: Counter[int] = Counter()
    for pid in server.children():
        with suppress(OSError):
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    found[pid] += os.readlink(file).removeprefix("socket:[").removesuffix("]") in established
    return {pid: count for pid, count in found.items() if count}


@pytest.fixture
def clients() -> Iterator[Callable[[ServiceProcess, int], list[httpx.Client]]]:
    made: list[httpx.Client] = []

    def of(server: ServiceProcess, count: int) -> list[httpx.Client]:
        made.extend(httpx.Client(base_url=server.url, timeout=60) for _ in range(count))
        return made[-count:]

    yield of
    for client in made:
        client.close()


def at_work(one: httpx.Client) -> int:
    text = one.get("/metrics").text
    return int(float(next(x.split()[1] for x in text.splitlines() if x.startswith("llmdistill_requests_in_house "))))


@pytest.mark.slow
def test_two_processes_answer_for_one_engine(model: str, clients: Callable[..., list[httpx.Client]]) -> None:
    """The same answers from both, also after a push through either; metrics of both; at SIGTERM both end their work."""
    pytest.importorskip("vllm", reason="the vllm extra is not installed")
    first, second = tiny.llama(1, hidden=64, tied=True), tiny.llama(2, hidden=64, tied=True)
    with ServiceProcess(model, *OPTIONS, "--kv_cache_gib", "0.05", "--updatable") as server:
        four = clients(server, 4)
        with ThreadPoolExecutor(4) as threads:
            scored = list(threads.map(lambda one: one.post(protocol.SCORE, json=body()), four))
        assert sorted(connections(server).values()) == [2, 2]  # each process has half of the clients
        assert all(answer.status_code == 200 for answer in scored) and len({answer.content for answer in scored}) == 1
        assert blocks_of(scored[0])[0]["teacher"] == weights_fingerprint(model)
        chosen = [[[7]] * (stop - start) for start, stop in body()["positions"]]
        listed = [one.post(protocol.SCORE, json=body(top_k=0, chosen=chosen)) for one in four]
        assert listed[0].status_code == 200 and len({answer.content for answer in listed}) == 1
        assert [greedy(one) for one in four] == [greedily(first)] * 4
        for step, (pusher, new) in enumerate([(four[0], second), (four[1], first)], 3):
            pushed = pusher.post(
                protocol.WEIGHTS, params={"policy_version": step}, content=save(stored(new)), headers=TENSORS
            )
            assert pushed.status_code == 200, pushed.text
            told = [one.get(protocol.INFO) for one in four]
            assert {(t.json()["teacher"], t.headers["x-policy-version"]) for t in told} == {
                (pushed.json()["teacher"], str(step))
            }
            assert [greedy(one) for one in four] == [greedily(new)] * 4
        counted = four[0].get("/metrics").text
        assert 'llmdistill_requests_total{endpoint="/v1/score",status="200"} 8.0' in counted
        assert "llmdistill_policy_version 4.0" in counted and "vllm:prompt_tokens_total{" in counted

        long = {"prompts": [[40, 60]], "eos_ids": [], "sampling": {"max_new_tokens": 120, "seed": 3}}
        with ThreadPoolExecutor(4) as threads:
            drawing = [threads.submit(one.post, protocol.GENERATE, json=long) for one in four]
            end = time.monotonic() + 30
            while at_work(watcher := clients(server, 1)[0]) < 4 and time.monotonic() < end:
                watcher.close()
            assert server.terminate() == 0
            drawn = [one.result() for one in drawing]
        assert {one.status_code for one in drawn} == {200} and len({one.content for one in drawn}) == 1
        assert sum("draining" in line for line in server.log) == 1


@pytest.mark.slow
def test_a_process_that_dies_ends_the_service_with_one_message(
    model: str, clients: Callable[..., list[httpx.Client]]
) -> None:
    with ServiceProcess(model, *OPTIONS, "--engine", "hf", module="tests.service.members") as server:
        both = clients(server, 2)
        assert len({one.post(protocol.SCORE, json=body()).content for one in both}) == 1
        members = connections(server)
        assert sorted(members.values()) == [1, 1]
        os.kill(min(members), signal.SIGKILL)
        assert server.process is not None and server.process.wait(30) == 1
        time.sleep(0.2)  # until its last words are read
        said = [line for line in server.log if "the service ends" in line]
        assert len(said) == 1 and f"(process {min(members)}) has ended (signal 9)" in said[0], server.log
        end = time.monotonic() + 10
        while Path(f"/proc/{max(members)}").exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert not Path(f"/proc/{max(members)}").exists()
