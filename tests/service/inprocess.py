"""A service over a tiny teacher in this process, without a socket, and what is asked of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import torch

from llmdistill.models.weights import named_weights
from llmdistill.service.app import Service
from llmdistill.service.hf_engine import HFEngine
from llmdistill.service.limits import Limits
from llmdistill.service.routes import create_app
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import collate
from llmdistill.wire import protocol
from llmdistill.wire.blocks import ScoreBlock, decode
from tests import tiny

SEQUENCES = [[40 + i, 60, *range(50, 54 + 2 * i)] for i in range(5)]


Client = httpx.AsyncClient


def teacher(seed: int = 1) -> LocalTeacher:
    return LocalTeacher(tiny.llama(seed), tiny.tokenizer())


def with_service(test: Callable[[Client, Service], Awaitable[None]], limits: Limits | None = None, **kw: Any) -> None:
    """Runs ``test`` against a service over the tiny teacher."""

    async def run() -> None:
        service = Service(HFEngine(teacher()), limits or Limits(sequence_tokens=128), **kw)
        transport = httpx.ASGITransport(create_app(service), raise_app_exceptions=False)
        headers = {"Content-Type": protocol.JSON_TYPE}
        async with Client(transport=transport, base_url="http://127.0.0.1", headers=headers) as client:
            await test(client, service)
        await service.engine.close()

    asyncio.run(run())


def stored(model: Any) -> dict[str, torch.Tensor]:
    """As in a checkpoint of a tied model: the matrix once."""
    return {name: tensor for name, tensor in named_weights(model) if name != "lm_head.weight"}


def score_body(**changes: Any) -> dict[str, Any]:
    positions = [[2, len(ids)] for ids in SEQUENCES]
    return {"sequences": SEQUENCES, "positions": positions, "top_k": 8, "dtype": "float32", **changes}


def blocks_of(response: httpx.Response) -> tuple[dict[str, Any], list[ScoreBlock]]:
    assert response.status_code == 200, response.text
    head, *frames = protocol.unpack_frames(response.content)
    return json.loads(bytes(head)), [decode(bytes(frame)) for frame in frames]


def expected(top_k: int, chosen: torch.Tensor | None = None) -> list[ScoreBlock]:
    rollout = collate([ids[:2] for ids in SEQUENCES], [ids[2:] for ids in SEQUENCES], pad_id=0)
    return teacher().score(rollout, top_k, chosen)


def assert_same(found: list[ScoreBlock], wanted: list[ScoreBlock], tolerance: float = 1e-5) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.positions == b.positions and a.header.teacher == b.header.teacher
        assert (a.header.support, a.header.top_k) == (b.header.support, b.header.top_k)
        torch.testing.assert_close(a.token_logprobs, b.token_logprobs, atol=tolerance, rtol=0)
        torch.testing.assert_close(a.topk_logprobs, b.topk_logprobs, atol=tolerance, rtol=0)
        # ids may trade places where their log-probs are equal up to rounding
        assert not a.topk_ids.numel() or (a.topk_ids == b.topk_ids).float().mean() > 0.98
