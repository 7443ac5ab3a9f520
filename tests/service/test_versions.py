"""Replicas that share what is pushed to one of them: later versions, never earlier ones, and none half ready."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save, save_file

from llmdistill.errors import UserError
from llmdistill.service.app import Service
from llmdistill.service.hf_engine import HFEngine
from llmdistill.service.limits import Limits
from llmdistill.service.routes import create_app
from llmdistill.service.versions import BEGUN, KEPT, Version, Versions
from llmdistill.teachers.local import LocalTeacher
from llmdistill.wire import protocol
from tests import tiny
from tests.service.inprocess import Client, score_body, stored, teacher

TENSORS = {"Content-Type": protocol.TENSORS_TYPE}
Fleet = list[tuple[Client, Service]]


def with_fleet(
    folder: Path,
    test: Callable[[Fleet], Awaitable[None]],
    engines: Callable[[], HFEngine] = lambda: HFEngine(teacher()),
) -> None:
    """Two replicas, in which nothing is fetched but when the test says so."""

    async def run() -> None:
        fleet: Fleet = []
        for _ in range(2):
            service = Service(engines(), Limits(sequence_tokens=128), accept_weights=True, versions=folder)
            transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
            client = Client(
                transport=transport, base_url="http://127.0.0.1", headers={"Content-Type": "application/json"}
            )
            fleet.append((client, service))
        await test(fleet)
        for client, service in fleet:
            await client.aclose()
            await service.engine.close()

    asyncio.run(run())


async def push(client: Client, seed: int, version: int) -> dict[str, object]:
    query = {"policy_version": str(version), "digest": f"d{version}"}
    answer = await client.post(protocol.WEIGHTS, params=query, content=save(stored(tiny.llama(seed))), headers=TENSORS)
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = answer.json()
    return found


def test_what_is_pushed_to_one_replica_is_asked_of_the_other_when_it_has_it(tmp_path: Path) -> None:
    async def test(fleet: Fleet) -> None:
        (one, _), (two, service) = fleet
        pushed = await push(one, 2, 7)
        asked = score_body(teacher=pushed["teacher"])
        assert (await one.post(protocol.SCORE, json=asked)).status_code == 200
        assert (await two.get(protocol.READY)).status_code == 200  # it has not looked yet
        refused = await two.post(protocol.SCORE, json=asked)
        assert refused.status_code == 409 and refused.json()["error"]["type"] == "version"
        assert int(refused.headers["retry-after"]) >= 1 and refused.headers["x-policy-version"] == "0"
        assert (await two.get(protocol.READY)).status_code == 503
        await service.weights.fetch()
        assert (await two.get(protocol.READY)).status_code == 200
        same = [await client.post(protocol.SCORE, json=asked) for client, _ in fleet]
        assert same[0].content == same[1].content and same[1].headers["x-policy-version"] == "7"
        # weights that nobody has are no version, whose request is not to wait
        unknown = await two.post(protocol.SCORE, json=score_body(teacher="0123456789abcdef"))
        assert unknown.json()["error"]["type"] == "fingerprint" and "retry-after" not in unknown.headers

    with_fleet(tmp_path, test)


def test_an_offer_of_what_another_replica_has_is_not_needed(tmp_path: Path) -> None:
    async def test(fleet: Fleet) -> None:
        (one, _), (two, _) = fleet
        pushed = await push(one, 2, 3)
        offered = await two.post(protocol.OFFER, json={"digest": "d3", "policy_version": 3})
        assert offered.json() == {"needed": False, **pushed}
        assert (await two.get(protocol.INFO)).json()["teacher"] == pushed["teacher"]

    with_fleet(tmp_path, test)


def test_nothing_is_rolled_back(tmp_path: Path) -> None:
    """The order is that of the pushes, whatever the trainer calls its steps: one that resumes begins lower."""

    async def test(fleet: Fleet) -> None:
        (one, first), (two, second) = fleet
        await push(one, 2, 9)
        newest = await push(two, 3, 4)  # without having had the one before
        for _, service in fleet:
            await service.weights.fetch()
            assert service.engine.info.fingerprint == newest["teacher"]
            assert service.weights.policy_version == 4
        assert [v.name for v in sorted(tmp_path.glob("v*"))] == [f"v{n:012d}" for n in (1, 2)]
        first.gate.draining = True  # one that goes down takes nothing new
        with pytest.raises(Exception, match="shutting down"):
            await push(two, 4, 5)
            await first.weights.fetch()
        assert second.weights.policy_version == 5

    with_fleet(tmp_path, test)


def test_a_replica_of_another_model_says_what_is_wrong(tmp_path: Path) -> None:
    sizes = iter([32, 48])

    def engine() -> HFEngine:
        return HFEngine(LocalTeacher(tiny.llama(1, hidden=next(sizes)), tiny.tokenizer()))

    async def test(fleet: Fleet) -> None:
        (one, _), (_, other) = fleet
        await push(one, 2, 1)
        with pytest.raises(UserError, match=r"--versions .* \(version 1\) that another replica took.*Fix: start all"):
            await other.weights.fetch()
        assert other.weights.behind

    with_fleet(tmp_path, test, engine)


def test_a_part_of_the_weights_is_no_version(tmp_path: Path) -> None:
    async def test(fleet: Fleet) -> None:
        (one, _), _ = fleet
        assert (await one.get(protocol.INFO)).json()["partial_weights"] is False
        part = save({"model.norm.weight": torch.zeros(32)})
        query = {"policy_version": "1", "partial": "true"}
        answer = await one.post(protocol.WEIGHTS, params=query, content=part, headers=TENSORS)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "partial_weights"

    with_fleet(tmp_path, test)


def test_the_newest_versions_are_kept_and_what_was_left_over_goes(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    save_file({"a": torch.zeros(3)}, weights / "model.safetensors")
    folder = tmp_path / "versions"
    folder.mkdir()
    versions = Versions(folder)
    assert versions.latest() is None
    (folder / f"{BEGUN}killed").mkdir()
    for step in range(4):
        made = versions.publish(weights, step, f"d{step}", "fp")
        assert made == versions.latest() == Version(step + 1, step, f"d{step}", "fp")
    assert versions.publish(weights, 3, "d3", "fp") == made  # the same again is no new one
    assert len(list(folder.glob("v*"))) == KEPT and not list(folder.glob(f"{BEGUN}*"))
    (folder / "v999999999999").mkdir()  # by somebody else
    assert versions.latest() == made
