"""Weights and adapters that come to a running service: offered, refused, stalled, too many."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from llmdistill.service.app import Service
from llmdistill.service.engine import EngineDead
from llmdistill.service.hf_engine import HFEngine
from llmdistill.service.limits import Limits
from llmdistill.service.routes import create_app
from llmdistill.service.uploads import BEGUN, PREFIX, Uploads
from llmdistill.wire import protocol
from tests import tiny
from tests.service.inprocess import (
    Client,
    stored,
    teacher,
    with_service,
)

TENSORS = {"Content-Type": protocol.TENSORS_TYPE}


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
        assert answer.status_code == 507 and "--upload_folder" in answer.json()["error"]["message"] and not read

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
        assert answer.status_code == 400 and answer.json()["error"]["limit"] == 2 and "--max_adapters" in answer.text
        again = await client.post(protocol.ADAPTERS, json={"name": "a1", "path": str(folder)})
        assert again.status_code == 200 and len(list(uploads.iterdir())) == 2
        assert (await client.delete(f"{protocol.ADAPTERS}/a0")).status_code == 200
        assert len(list(uploads.iterdir())) == 1
        service.adapters.close()
        assert not list(uploads.iterdir())

    limits = Limits(sequence_tokens=128, adapters=2)
    with_service(test, limits, weight_folders=[tmp_path / "given"], upload_folder=uploads)


def test_adapters_come_and_go_while_requests_are_at_work(tmp_path: Path) -> None:
    """One that is in use goes when its last request is answered; those of the model itself keep nothing waiting."""

    async def test(client: Client, service: Service) -> None:
        first = lora(tmp_path / "a", 1)
        assert (await client.post(protocol.ADAPTERS, json={"name": "a", "path": str(first)})).status_code == 200
        async with service.gate.admitted(10):  # a request that is at work meanwhile
            added = await client.post(protocol.ADAPTERS, json={"name": "b", "path": str(lora(tmp_path / "b", 2))})
            assert added.json() == {"adapters": ["a", "b"]}
            uses = service.engine._uses  # type: ignore[attr-defined]
            with uses.of("a"):
                going = asyncio.create_task(client.delete(f"{protocol.ADAPTERS}/a"))
                while "a" in service.engine.adapters:
                    await asyncio.sleep(0)
                asked = {"prompts": [[3, 4]], "sampling": {"max_new_tokens": 2}, "adapter": "a"}
                assert (await client.post(protocol.GENERATE, json=asked)).status_code == 404
                assert not going.done()
            assert (await going).json() == {"adapters": ["b"]}

    with_service(test, weight_folders=[tmp_path])
