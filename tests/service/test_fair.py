"""Several clients of one service: whose request is next, who is sent away, and when they come back."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from llmdistill.service import fair
from llmdistill.service.fair import CLIENT, FairQueue, Place
from llmdistill.service.gate import LONGEST_WAIT_S, Gate
from llmdistill.service.lengths import FIRST, Lengths
from llmdistill.service.limits import Limits
from llmdistill.service.problems import Problem
from llmdistill.wire import protocol
from tests.service.inprocess import SEQUENCES, Client, Service, score_body, with_service


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


class Asked:
    """Requests of named clients to a gate, which stay at work until they are let go."""

    def __init__(self, gate: Gate) -> None:
        self.gate, self.order = gate, list[str]()
        self._go: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def ask(self, client: str, name: str, tokens: int = 10) -> None:
        async def work() -> None:
            CLIENT.set(client)
            async with self.gate.admitted(tokens):
                self.order.append(name)
                await self._go[name].wait()

        self._go[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(work())

    async def done(self, name: str) -> None:
        self._go[name].set()
        await self._tasks[name]
        await asyncio.sleep(0)

    async def outcome(self, name: str) -> BaseException | None:
        self._go[name].set()
        return (await asyncio.gather(self._tasks[name], return_exceptions=True))[0]


def test_a_client_with_one_request_does_not_stand_behind_all_of_one_with_many() -> None:
    async def test() -> None:
        asked = Asked(Gate(Limits(), lambda: 10))
        for i in range(4):
            asked.ask("many", f"m{i}")
        await asyncio.sleep(0)
        asked.ask("few", "f0")
        await asyncio.sleep(0)
        for name in ("m0", "f0", "m1", "m2", "m3"):  # the engine holds one at a time
            await asked.done(name)
        assert asked.order == ["m0", "f0", "m1", "m2", "m3"]
        assert asked.gate.requests == asked.gate.tokens == 0

    run(test)


def test_shares_go_by_tokens_and_not_by_requests() -> None:
    """One asks for 30 tokens at a time, the other for 10: three of these for one of those."""
    queue, loop = FairQueue(0), asyncio.new_event_loop()
    for _ in range(12):
        queue.join(Place("large", 30, loop.create_future()))
        queue.join(Place("small", 10, loop.create_future()))
    served = Counter[str]()
    for _ in range(12):
        place = queue.first()
        assert place is not None
        queue.take(place)
        served[place.client] += place.tokens
    assert abs(served["large"] - served["small"]) <= 30
    loop.close()


def test_what_a_request_did_cost_counts() -> None:
    """Two clients expect the same; one of them is answered with a tenth of it, and so goes more often."""
    queue, loop = FairQueue(1000), asyncio.new_event_loop()
    order = []
    for _ in range(11):
        for name in ("long", "short"):
            queue.join(Place(name, 100, loop.create_future()))
    for _ in range(11):
        place = queue.first()
        assert place is not None
        queue.take(place)
        place.used = 100 if place.client == "long" else 10
        queue.settle(place)
        order.append(place.client)
    assert Counter(order) == {"long": 1, "short": 10}
    loop.close()


def test_nobody_saves_up_while_away() -> None:
    queue, loop = FairQueue(15), asyncio.new_event_loop()

    def join(name: str) -> None:
        queue.join(Place(name, 10, loop.create_future()))

    def serve() -> str:
        place = queue.first()
        assert place is not None
        queue.take(place)
        return place.client

    join("away")
    assert serve() == "away"
    for _ in range(20):
        join("here")
        serve()
    for _ in range(6):
        join("away")
        join("here")
    # twenty requests behind, of which one and a half are made up for, and the one that the other has just had
    assert [serve() for _ in range(6)] == ["away", "away", "away", "here", "away", "here"]
    loop.close()


def test_where_the_house_is_full_the_one_that_would_be_last_goes() -> None:
    async def test() -> None:
        gate = Gate(Limits(in_flight=4), lambda: 10)
        asked = Asked(gate)
        for i in range(4):
            asked.ask("many", f"m{i}")
        await asyncio.sleep(0)
        asked.ask("few", "f0")
        await asyncio.sleep(0)
        gone = await asked.outcome("m3")
        assert isinstance(gone, Problem) and gone.status == 429 and gone.retry_after_s
        asked.ask("many", "m4")  # none of its own, nor of one that has as few, makes room
        refused = await asked.outcome("m4")
        assert isinstance(refused, Problem) and refused.status == 429
        for name in ("m0", "f0", "m1", "m2"):
            await asked.done(name)
        assert asked.order == ["m0", "f0", "m1", "m2"]
        assert (gate.requests, gate.tokens, gate.pushed_out) == (0, 0, 1)

    run(test)


def test_one_that_gives_up_while_it_waits_leaves_no_trace() -> None:
    async def test() -> None:
        gate = Gate(Limits(), lambda: 10)
        asked = Asked(gate)
        for name in ("a", "b", "c"):
            asked.ask("one", name)
        await asyncio.sleep(0)
        asked._tasks["b"].cancel()
        asked._tasks["a"].cancel()  # which is at work
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asked.done("c")
        assert asked.order == ["a", "c"] and (gate.requests, gate.tokens, gate.waiting) == (0, 0, 0)

    run(test)


def test_a_large_request_is_not_overtaken_for_ever() -> None:
    async def test() -> None:
        asked = Asked(Gate(Limits(), lambda: 20))
        asked.ask("a", "small1", 10)
        asked.ask("b", "large", 20)
        asked.ask("c", "small2", 10)
        await asyncio.sleep(0)
        assert asked.order == ["small1"]  # there is room for the other small one, and it is not its turn
        await asked.done("small1")
        assert asked.order == ["small1", "large"]
        await asked.done("large")
        await asked.done("small2")

    run(test)


def test_those_who_are_sent_away_are_told_different_times() -> None:
    async def test() -> None:
        gate = Gate(Limits(in_flight=1))
        asked = Asked(gate)
        asked.ask("a", "a0")
        await asyncio.sleep(0)
        times = []
        for i in range(40):
            asked.ask(f"b{i}", f"b{i}")
            problem = await asked.outcome(f"b{i}")
            assert isinstance(problem, Problem) and problem.retry_after_s is not None
            times.append(problem.retry_after_s)
        assert all(0 < t <= LONGEST_WAIT_S for t in times)
        # a second for each, which is all that is known of the rate, and round again at the longest wait
        assert len({round(t) for t in times}) > 20
        await asked.done("a0")

    run(test)


def test_old_clients_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fair, "MOST_CLIENTS", 3)

    async def test() -> None:
        asked = Asked(Gate(Limits()))
        for i in range(10):
            asked.ask(f"c{i}", f"c{i}")
            await asyncio.sleep(0)
            await asked.done(f"c{i}")
        assert len(asked.gate._queue._clients) <= 3

    run(test)


def test_a_completion_counts_with_the_length_that_is_usual() -> None:
    lengths = Lengths()
    assert (lengths.expected(100), lengths.expected(30_000)) == (100, FIRST)
    for _ in range(100):
        lengths.drawn([30, 50])
    assert lengths.expected(30_000) in (40, 41) and lengths.expected(8) == 8
    lengths.drawn([])
    assert lengths.expected(30_000) in (40, 41)


def test_room_for_completions_that_is_not_used_keeps_nobody_out() -> None:
    """Eight prompts with room for 90 tokens each, of which greedy decoding uses few: more than one is at work."""

    async def test(client: Client, service: Service) -> None:
        service.engine.capacity_tokens = 200
        service.lengths.mean = 10.0
        most = [0]
        generate = service.engine.generate

        async def watched(job: Any) -> Any:
            most[0] = max(most[0], service.gate.requests - service.gate.waiting)
            return await generate(job)

        service.engine.generate = watched  # type: ignore[method-assign]
        body = {"prompts": [SEQUENCES[0]], "sampling": {"max_new_tokens": 90, "temperature": 0}}
        answers = await asyncio.gather(*[client.post(protocol.GENERATE, json=body) for _ in range(8)])
        assert {a.status_code for a in answers} == {200} and most[0] > 2
        assert service.gate.requests == service.gate.tokens == service.gate.waiting == 0

    with_service(test)


def test_clients_are_told_apart_by_their_name_and_every_answer_names_the_weights() -> None:
    async def test(client: Client, service: Service) -> None:
        for name in ("one", "two"):
            answer = await client.post(protocol.SCORE, json=score_body(), headers={"X-Client-Id": name})
            assert answer.headers["x-policy-version"] == "0"
            assert answer.headers["x-teacher"] == service.engine.info.fingerprint
        await client.post(protocol.SCORE, json=score_body(), headers={"X-Client-Id": "no name"})
        await client.post(protocol.SCORE, json=score_body())
        assert list(service.gate._queue._clients) == ["one", "two", "127.0.0.1"]
        refused = await client.post(protocol.SCORE, json={})
        assert refused.status_code == 400 and refused.headers["x-teacher"] == service.engine.info.fingerprint

    with_service(test)
