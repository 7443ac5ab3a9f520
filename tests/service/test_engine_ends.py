"""An engine that is no more ends its service; what cannot be served is said at the start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmdistill.compat import vllm_weights
from llmdistill.errors import UserError
from llmdistill.service import vllm_engine
from llmdistill.service.app import Service
from llmdistill.service.engine import EngineDead
from llmdistill.service.problems import Problem
from llmdistill.service.serve import ServeConfig, check, watch
from llmdistill.service.uploads import Uploads
from llmdistill.wire import protocol
from tests import tiny
from tests.service.inprocess import Client, score_body, teacher, with_service


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
        ({"upload_folder": "/no/such"}, "--upload_folder /no/such: no such folder"),
        ({"max_adapters": 0}, "--max_adapters is 0; it must be at least 1"),
        ({"tls_cert": "/a.pem"}, "--tls_key is missing"),
        ({"tls_cert": "/a.pem", "tls_key": "/b.pem"}, "--tls_cert /a.pem: no such file"),
    ],
)
def test_what_cannot_be_served(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(ServeConfig(model="m", **settings), None)


def test_a_problem_without_room_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(Problem, match="--upload_folder"):
        Uploads(tmp_path / "gone").held_folder()


class Clinging:
    """What vLLM's engines do while a block of their prefix cache is in use: they say no, so many times."""

    llm_engine = SimpleNamespace(vllm_config=None)

    def __init__(self, times: int) -> None:
        self.times, self.asked, self.loaded = times, 0, 0

    def reset_prefix_cache(self) -> bool:
        self.asked += 1
        return self.asked > self.times

    def collective_rpc(self, *call: Any, **arguments: Any) -> list[None]:
        self.loaded += 1
        return [None]


class ClingingAsync(Clinging):
    async def reset_prefix_cache(self) -> bool:  # type: ignore[override]
        return super().reset_prefix_cache()

    async def collective_rpc(self, *call: Any, **arguments: Any) -> list[None]:  # type: ignore[override]
        return super().collective_rpc(*call, **arguments)


def test_new_weights_never_meet_old_prefixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both wrappers ask vLLM again while it says no, and stop where it keeps saying so."""
    monkeypatch.setattr(vllm_weights, "RESET_S", 0.0)
    monkeypatch.setattr(vllm_engine, "RESET_S", 0.0)
    llm = Clinging(2)
    vllm_weights.push_weights(llm, [])
    assert (llm.loaded, llm.asked) == (1, 3)
    with pytest.raises(RuntimeError, match="does not let go of its prefix cache"):
        vllm_weights.push_weights(Clinging(10**9), [])

    tiny.llama(5).save_pretrained(tmp_path)

    def engine(times: int) -> Any:
        made = object.__new__(vllm_engine.AsyncVLLMEngine)  # without a vLLM to load
        made._info, made._shapes, made._tied, made.partial_weights = teacher().info(), {}, True, False
        made.engine = ClingingAsync(times)
        return made

    async def run() -> None:
        kind, sticks = engine(2), engine(10**9)
        before = kind.info.fingerprint
        await kind.load_weights(tmp_path, False)
        assert (kind.engine.loaded, kind.engine.asked) == (1, 3) and kind.info.fingerprint != before
        with pytest.raises(EngineDead, match="does not let go of the prefix cache"):
            await sticks.load_weights(tmp_path, False)
        assert sticks.info.fingerprint == before

    asyncio.run(run())
