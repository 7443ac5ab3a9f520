"""The service in this process, without a socket: what it computes, refuses, remembers, and lets nobody mix up."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save, save_file

from llmdistill.rollouts import Prompt, Sampling, collate
from llmdistill.rollouts.hf import generate
from llmdistill.service import wire
from llmdistill.service.answers import Answer, Answers
from llmdistill.service.app import Service, create_app
from llmdistill.service.blocks import ScoreBlock, decode
from llmdistill.service.hf_engine import HFEngine, ScoreJob, _Waiting, next_batch
from llmdistill.service.limits import Limits
from llmdistill.teachers.fingerprint import weights_fingerprint
from llmdistill.teachers.local import LocalTeacher
from llmdistill.weights import named_weights
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
        async with Client(transport=transport, base_url="http://service") as client:
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
    head, *frames = wire.unpack_frames(response.content)
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


def test_scores_are_those_of_the_embedded_teacher() -> None:
    async def test(client: Client, service: Service) -> None:
        head, found = blocks_of(await client.post(wire.SCORE, json=score_body()))
        assert_same(found, expected(8))
        assert head["teacher"] == weights_fingerprint(tiny.llama(1)) and head["positions"] == sum(
            len(ids) - 2 for ids in SEQUENCES
        )
        _, tokens_only = blocks_of(await client.post(wire.SCORE, json=score_body(top_k=0)))
        assert_same(tokens_only, expected(0))

    with_service(test)


@pytest.mark.parametrize("top_k", [0, 4])
def test_ids_the_caller_chose_are_listed_with_the_full_softmax(top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = sum(len(ids) - 2 for ids in SEQUENCES)
    chosen = torch.stack([torch.randperm(264, generator=generator)[:3] for _ in range(rows)])
    chosen[0, 2] = -1  # a row with fewer
    split = [part.tolist() for part in chosen.split([len(ids) - 2 for ids in SEQUENCES])]

    async def test(client: Client, service: Service) -> None:
        _, found = blocks_of(await client.post(wire.SCORE, json=score_body(top_k=top_k, chosen=split)))
        assert_same(found, expected(top_k, chosen))
        _, full = blocks_of(await client.post(wire.SCORE, json=score_body(top_k=128)))
        for block, wide, ids in zip(found, full, chosen.split([b.token_logprobs.numel() for b in found]), strict=True):
            for j in range(len(ids)):
                listed = dict(zip(block.topk_ids[j].tolist(), block.topk_logprobs[j].tolist(), strict=True))
                assert set(ids[j].tolist()) - {-1} <= set(listed)
                top = dict(zip(wide.topk_ids[j].tolist(), wide.topk_logprobs[j].tolist(), strict=True))
                assert all(abs(top[i] - lp) < 1e-5 for i, lp in listed.items() if i in top)

    with_service(test)


def test_requests_of_different_callers_are_merged_within_the_token_budget() -> None:
    async def test(client: Client, service: Service) -> None:
        engine: Any = service.engine
        calls, run = list[int](), engine._score
        engine._score = lambda jobs: calls.append(len(jobs)) or run(jobs)
        one = [{"sequences": [ids], "positions": [[2, len(ids)]], "top_k": 8, "dtype": "float32"} for ids in SEQUENCES]
        answers = await asyncio.gather(*[client.post(wire.SCORE, json=body) for body in one])
        assert_same([blocks_of(a)[1][0] for a in answers], expected(8))
        assert sum(calls) == len(SEQUENCES) and len(calls) < len(SEQUENCES)

    with_service(test)


def test_a_batch_is_the_oldest_and_its_neighbours_in_length() -> None:
    async def waiting() -> list[list[int]]:
        def made(lengths: list[int], top_k: int = 4) -> list[_Waiting]:
            loop = asyncio.get_running_loop()
            return [_Waiting(ScoreJob([1] * n, 1, n, top_k), loop.create_future()) for n in lengths]

        queue = made([10, 100, 11, 9, 12, 50]) + made([10], top_k=5)
        return [[w.job.stop for w in next_batch(queue, budget)] for budget in (1, 24, 44, 10_000)]

    assert asyncio.run(waiting()) == [[10], [9, 10], [9, 10, 11], [9, 10, 11, 12, 50, 100]]


def test_samples_are_those_of_the_embedded_engine_however_the_call_is_split() -> None:
    sampling = {"max_new_tokens": 6, "temperature": 0.8, "samples_per_prompt": 2, "seed": 5}
    prompts = [ids[:3] for ids in SEQUENCES]
    drawn = generate(tiny.llama(1), [Prompt(p, "") for p in prompts], Sampling(**sampling), eos_ids=[1], pad_id=0)
    wanted = [ids[m].tolist() for ids, m in zip(drawn.input_ids, drawn.completion_mask, strict=True)]

    async def test(client: Client, service: Service) -> None:
        async def ask(part: slice) -> list[dict[str, Any]]:
            rows = list(range(len(prompts)))[part]
            body = {"prompts": prompts[part], "rows": rows, "sampling": sampling}
            answer = (await client.post(wire.GENERATE, json=body)).json()
            assert answer["policy_version"] == 0
            return [sample for samples in answer["completions"] for sample in samples]

        for parts in ([slice(0, 5)], [slice(0, 2), slice(2, 5)]):
            samples = [s for part in parts for s in await ask(part)]
            assert [s["ids"] for s in samples] == wanted
            assert all(len(s["ids"]) == len(s["logprobs"]) for s in samples)
            assert tuple(s["finish"] for s in samples) == drawn.finish

    with_service(test)


def test_text_is_scored_as_the_teacher_splits_it() -> None:
    async def test(client: Client, service: Service) -> None:
        items = [
            {"prompt": "2+2=", "completion": "4 é!"},
            {"prompt": [{"role": "user", "content": "2+2"}], "completion": "four"},
        ]
        head, found = blocks_of(
            await client.post(wire.SCORE_TEXT, json={"items": items, "top_k": 4, "dtype": "float32"})
        )
        tok = tiny.tokenizer()
        assert head["items"][0]["ids"] == tok("4 é!")["input_ids"]
        assert tok.decode(head["items"][1]["prompt_ids"]) == "<user>2+2<assistant>"
        # é is two tokens of one character
        assert head["items"][0]["offsets"] == [[0, 1], [1, 2], [2, 3], [2, 3], [3, 4]]
        sequences = [item["prompt_ids"] + item["ids"] for item in head["items"]]
        positions = [[len(item["prompt_ids"]), len(s)] for item, s in zip(head["items"], sequences, strict=True)]
        body = {"sequences": sequences, "positions": positions, "top_k": 4, "dtype": "float32"}
        assert_same(found, blocks_of(await client.post(wire.SCORE, json=body))[1])

    with_service(test)


SMALL = Limits(top_k=16, sequence_tokens=20, sequences=6, positions=60, new_tokens=8, body_bytes=4000)
SAMPLING = {"max_new_tokens": 4}
BAD: dict[str, tuple[str, dict[str, Any], str, int | None]] = {
    "unknown id": (wire.SCORE, score_body(sequences=[[4, 264, 5]], positions=[[1, 3]]), "sequences[0][1]", 263),
    "negative id": (wire.SCORE, score_body(sequences=[[4, -1, 5]], positions=[[1, 3]]), "sequences[0][1]", 263),
    "giant id": (wire.SCORE, score_body(sequences=[[4, 10**30, 5]], positions=[[1, 3]]), "sequences[0][1]", 263),
    "no integer": (wire.SCORE, score_body(sequences=[[4, 1.5]], positions=[[1, 2]]), "sequences[0][1]", None),
    "over the context": (wire.SCORE, score_body(sequences=[[4] * 21], positions=[[1, 2]]), "sequences[0]", 20),
    "nothing": (wire.SCORE, {"sequences": [], "positions": []}, "sequences", None),
    "an empty sequence": (wire.SCORE, score_body(sequences=[[]], positions=[[0, 0]]), "sequences[0]", None),
    "position 0": (wire.SCORE, score_body(sequences=[[4, 5]], positions=[[0, 2]]), "positions[0]", None),
    "position past the end": (wire.SCORE, score_body(sequences=[[4, 5]], positions=[[1, 3]]), "positions[0]", None),
    "positions missing": (wire.SCORE, score_body(positions=[[1, 2]]), "positions", None),
    "too many sequences": (wire.SCORE, score_body(sequences=[[4, 5]] * 7, positions=[[1, 2]] * 7), "sequences", 6),
    "too many positions": (
        wire.SCORE,
        score_body(sequences=[[4] * 20] * 4, positions=[[1, 20]] * 4),
        "positions",
        60,
    ),
    "top-k over the limit": (wire.SCORE, score_body(top_k=17), "top_k", 16),
    "negative top-k": (wire.SCORE, score_body(top_k=-1), "top_k", None),
    "another temperature": (wire.SCORE, score_body(temperature=2.0), "temperature", None),
    "unknown dtype": (wire.SCORE, score_body(dtype="int8"), "dtype", None),
    "unknown field": (wire.SCORE, score_body(topk=3), "topk", None),
    "no field": (wire.SCORE, {"sequences": [[4, 5]]}, "positions", None),
    "chosen for fewer sequences": (wire.SCORE, score_body(chosen=[[]]), "chosen", None),
    "chosen of another length": (
        wire.SCORE,
        score_body(sequences=[[4, 5]], positions=[[1, 2]], chosen=[[]]),
        "chosen[0]",
        None,
    ),
    "chosen unknown": (
        wire.SCORE,
        score_body(sequences=[[4, 5]], positions=[[1, 2]], chosen=[[[264]]]),
        "chosen[0][0]",
        263,
    ),
    "chosen over the limit": (
        wire.SCORE,
        score_body(sequences=[[4, 5]], positions=[[1, 2]], top_k=8, chosen=[[list(range(9))]]),
        "top_k",
        16,
    ),
    "prompt over the context": (wire.GENERATE, {"prompts": [[4] * 17], "sampling": SAMPLING}, "prompts[0]", 20),
    "too long a completion": (
        wire.GENERATE,
        {"prompts": [[4]], "sampling": {"max_new_tokens": 9}},
        "sampling.max_new_tokens",
        8,
    ),
    "negative temperature": (
        wire.GENERATE,
        {"prompts": [[4]], "sampling": {**SAMPLING, "temperature": -1}},
        "sampling.temperature",
        None,
    ),
    "colder than engines go": (
        wire.GENERATE,
        {"prompts": [[4]], "sampling": {**SAMPLING, "temperature": 1e-40}},
        "sampling.temperature",
        2,
    ),
    "hotter than engines go": (
        wire.GENERATE,
        {"prompts": [[4]], "sampling": {**SAMPLING, "temperature": 3}},
        "sampling.temperature",
        2,
    ),
    "more candidates than tokens": (
        wire.GENERATE,
        {"prompts": [[4]], "sampling": {**SAMPLING, "top_k": 10**30}},
        "sampling.top_k",
        264,
    ),
    "a text that cannot fit": (
        wire.SCORE_TEXT,
        {"items": [{"prompt": "a", "completion": "b" * 1300}]},
        "items[0].completion",
        1280,
    ),
    "a path with a zero": (wire.ADAPTERS, {"name": "a", "path": "a\0b"}, "path", None),
    "a path that is too long": (wire.ADAPTERS, {"name": "a", "path": "a/" * 1500}, "path", None),
    "prompts that are no prompts": ("/v1/completions", {"prompt": [{}, {}]}, "prompt[0]", None),
    "too many prompts": ("/v1/completions", {"prompt": ["a"] * 7}, "prompt", 7),
    "too many samples": (
        wire.GENERATE,
        {"prompts": [[4]], "sampling": {**SAMPLING, "samples_per_prompt": 7}},
        "prompts",
        6,
    ),
    "rows missing": (wire.GENERATE, {"prompts": [[4], [5]], "rows": [0], "sampling": SAMPLING}, "rows", None),
    "unknown eos": (wire.GENERATE, {"prompts": [[4]], "eos_ids": [264], "sampling": SAMPLING}, "eos_ids[0]", 263),
    "empty text": (wire.SCORE_TEXT, {"items": [{"prompt": "", "completion": "a"}]}, "items[0].prompt", None),
    "no text": (wire.SCORE_TEXT, {"items": []}, "items", None),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_with_its_bound_and_the_service_goes_on(name: str) -> None:
    path, body, field, limit = BAD[name]

    async def test(client: Client, service: Service) -> None:
        answer = await client.post(path, json=body)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["field"] == field and error["limit"] == limit, error
        good = {"sequences": [[4, 5, 6]], "positions": [[1, 3]], "top_k": 16}
        assert (await client.post(wire.SCORE, json=good)).status_code == 200

    with_service(test, SMALL)


def test_bodies_that_are_no_json_or_too_large() -> None:
    async def test(client: Client, service: Service) -> None:
        for data in (b"", b"{", b"\xff\x00", b"[" * 2000, b'{"sequences": NaN}'):
            answer = await client.post(wire.SCORE, content=data)
            assert answer.status_code == 400 and answer.json()["error"]["message"]
        answer = await client.post("/v1/completions", content=b'{"prompt": "a", "temperature": 1e999}')
        assert answer.status_code == 400 and answer.json()["error"]["field"] == "temperature"
        answer = await client.post(wire.SCORE, content=b"x" * 4001)
        assert answer.status_code == 413 and answer.json()["error"]["limit"] == 4000

        async def endless():  # type: ignore[no-untyped-def]
            while True:
                yield b" " * 1000

        assert (await client.post(wire.SCORE, content=endless())).status_code == 413
        assert (await client.post("/v2/score")).json()["error"]["type"] == "route"

    with_service(test, SMALL)


def test_expected_weights_that_are_not_there_are_a_conflict() -> None:
    async def test(client: Client, service: Service) -> None:
        for path, body in (
            (wire.SCORE, score_body(teacher="0" * 16)),
            (wire.GENERATE, {"prompts": [[4]], "sampling": SAMPLING, "teacher": "0" * 16}),
        ):
            answer = await client.post(path, json=body)
            assert answer.status_code == 409 and answer.json()["error"]["type"] == "fingerprint"
        body = score_body(teacher=weights_fingerprint(tiny.llama(1)))
        assert (await client.post(wire.SCORE, json=body)).status_code == 200

    with_service(test)


def test_without_the_token_only_health_answers() -> None:
    async def test(client: Client, service: Service) -> None:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for path in (wire.INFO, wire.METRICS, "/v1/models"):
                assert (await client.get(path, headers=headers)).status_code == 401
            answer = await client.post(wire.SCORE, json=score_body(), headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "token"
            assert (await client.get(wire.HEALTH, headers=headers)).status_code == 200
            assert (await client.get(wire.READY, headers=headers)).status_code == 200
        good = {"Authorization": "Bearer secret"}
        assert (await client.post(wire.SCORE, json=score_body(), headers=good)).status_code == 200

    with_service(test, token="secret")


def test_a_request_sent_again_is_not_computed_again() -> None:
    async def test(client: Client, service: Service) -> None:
        headers = {"X-Request-Id": "a"}
        both = await asyncio.gather(*[client.post(wire.SCORE, json=score_body(), headers=headers) for _ in range(2)])
        later = await client.post(wire.SCORE, json=score_body(), headers=headers)
        assert both[0].content == both[1].content == later.content
        positions = sum(len(ids) - 2 for ids in SEQUENCES)
        assert service.metrics.positions._value.get() == positions and service.answers.replayed == 2
        other = await client.post(wire.SCORE, json=score_body(top_k=3), headers=headers)
        assert other.status_code == 409 and other.json()["error"]["type"] == "reused_id"
        odd = await client.post(wire.SCORE, json=score_body(), headers={"X-Request-Id": "a b"})
        assert odd.status_code == 400
        # an error is not kept: the same id may be tried again
        bad = score_body(top_k=999)
        for _ in range(2):
            refused = await client.post(wire.SCORE, json=bad, headers={"X-Request-Id": "b"})
            assert refused.status_code == 400

    with_service(test)


def test_kept_answers_stay_within_their_bound() -> None:
    async def test(client: Client, service: Service) -> None:
        for i in range(20):
            await client.post(wire.SCORE, json=score_body(), headers={"X-Request-Id": f"r{i}"})
            assert service.answers.bytes <= 10_000
        assert 0 < len(service.answers._entries) < 20

    with_service(test, Limits(sequence_tokens=128, answers_bytes=10_000))


def test_a_full_queue_says_when_to_come_back() -> None:
    async def test(client: Client, service: Service) -> None:
        answers = await asyncio.gather(*[client.post(wire.SCORE, json=score_body()) for _ in range(12)])
        status = [a.status_code for a in answers]
        assert set(status) == {200, 429} and status.count(200) >= 3
        busy = next(a for a in answers if a.status_code == 429)
        assert int(busy.headers["retry-after"]) >= 1 and busy.json()["error"]["type"] == "busy"
        assert service.gate.requests == 0 and service.gate.tokens == 0
        assert (await client.post(wire.SCORE, json=score_body())).status_code == 200

    with_service(test, Limits(sequence_tokens=128, in_flight=3))


def test_new_weights_answer_and_the_old_ones_are_gone() -> None:
    new = tiny.llama(2)

    async def test(client: Client, service: Service) -> None:
        headers = {"Content-Type": wire.TENSORS_TYPE}
        before = blocks_of(await client.post(wire.SCORE, json=score_body()))
        data = save(stored(new))
        answer = await client.post(wire.WEIGHTS, params={"policy_version": 7}, content=data, headers=headers)
        assert answer.json() == {"teacher": weights_fingerprint(new), "policy_version": 7}
        head, found = blocks_of(await client.post(wire.SCORE, json=score_body()))
        assert head["policy_version"] == 7 and head["teacher"] != before[0]["teacher"]
        rollout = collate([ids[:2] for ids in SEQUENCES], [ids[2:] for ids in SEQUENCES], pad_id=0)
        assert_same(found, LocalTeacher(new, tiny.tokenizer()).score(rollout, 8))
        greedy = {"prompts": [SEQUENCES[0]], "sampling": {"max_new_tokens": 8, "temperature": 0}}
        drawn = (await client.post(wire.GENERATE, json=greedy)).json()
        wanted = generate(new, [Prompt(SEQUENCES[0], "")], Sampling(8, temperature=0), eos_ids=[1], pad_id=0)
        assert drawn["completions"][0][0]["ids"] == wanted.input_ids[0][wanted.completion_mask[0]].tolist()
        assert drawn["policy_version"] == 7
        # a part of them
        part = {"model.norm.weight": torch.full_like(new.model.norm.weight, 0.5)}
        answer = await client.post(
            wire.WEIGHTS, params={"policy_version": 8, "partial": "true"}, content=save(part), headers=headers
        )
        assert answer.status_code == 200 and answer.json()["teacher"] != head["teacher"]

    with_service(test, accept_weights=True)


def test_weights_that_do_not_fit_leave_the_old_ones_in_place(tmp_path: Path) -> None:
    async def test(client: Client, service: Service) -> None:
        headers, good = {"Content-Type": wire.TENSORS_TYPE}, stored(tiny.llama(2))
        wrong = {**good, "model.norm.weight": torch.zeros(5)}
        for data in (save(wrong), save({"model.norm.weight": good["model.norm.weight"]}), b"junk", b""):
            answer = await client.post(wire.WEIGHTS, params={"policy_version": 1}, content=data, headers=headers)
            assert answer.status_code == 400 and answer.json()["error"]["field"] == "weights", answer.text
        answer = await client.post(wire.WEIGHTS, content=save(good), headers=headers)
        assert answer.status_code == 400 and answer.json()["error"]["field"] == "policy_version"
        assert_same(blocks_of(await client.post(wire.SCORE, json=score_body()))[1], expected(8))

    with_service(test, accept_weights=True)


def test_weights_are_read_from_allowed_folders_only(tmp_path: Path) -> None:
    allowed, secret = tmp_path / "allowed", tmp_path / "secret"
    for folder in (allowed / "v1", secret):
        folder.mkdir(parents=True)
        save_file(stored(tiny.llama(2)), folder / "model.safetensors")
    (allowed / "link").symlink_to(secret)

    async def test(client: Client, service: Service) -> None:
        for path in (secret, allowed / ".." / "secret", allowed / "link", allowed / "nowhere"):
            answer = await client.post(wire.WEIGHTS, json={"path": str(path), "policy_version": 1})
            assert answer.status_code == 400 and answer.json()["error"]["field"] == "path"
        answer = await client.post(wire.WEIGHTS, json={"path": str(allowed / "v1"), "policy_version": 3})
        assert answer.json() == {"teacher": weights_fingerprint(allowed / "v1"), "policy_version": 3}

    with_service(test, accept_weights=True, weight_folders=[allowed])


def test_a_teacher_takes_no_weights_unless_it_was_told_to() -> None:
    async def test(client: Client, service: Service) -> None:
        answer = await client.post(
            wire.WEIGHTS,
            params={"policy_version": 1},
            content=save(stored(tiny.llama(2))),
            headers={"Content-Type": wire.TENSORS_TYPE},
        )
        assert answer.status_code == 403
        assert_same(blocks_of(await client.post(wire.SCORE, json=score_body()))[1], expected(8))

    with_service(test)


def test_no_answer_mixes_two_policies() -> None:
    """Weights are pushed while requests come in: every answer is wholly of the version it names."""
    models = [tiny.llama(1), tiny.llama(2), tiny.llama(3)]
    prompts = [ids[:3] for ids in SEQUENCES]
    greedy = Sampling(6, temperature=0)
    wanted = []
    for model in models:
        drawn = generate(model, [Prompt(p, "") for p in prompts], greedy, eos_ids=[1], pad_id=0)
        wanted.append([ids[m].tolist() for ids, m in zip(drawn.input_ids, drawn.completion_mask, strict=True)])

    async def test(client: Client, service: Service) -> None:
        async def ask() -> int:
            body = {"prompts": prompts, "sampling": {"max_new_tokens": 6, "temperature": 0}}
            answer = (await client.post(wire.GENERATE, json=body)).json()
            assert [s[0]["ids"] for s in answer["completions"]] == wanted[answer["policy_version"]]
            return int(answer["policy_version"])

        async def push(version: int) -> None:
            data = save(stored(models[version]))
            headers = {"Content-Type": wire.TENSORS_TYPE}
            await client.post(wire.WEIGHTS, params={"policy_version": version}, content=data, headers=headers)

        asked = [asyncio.create_task(ask()) for _ in range(4)]
        for version in (1, 2):
            await asyncio.sleep(0.01)
            pushed = asyncio.create_task(push(version))
            asked += [asyncio.create_task(ask()) for _ in range(4)]
            await pushed
        versions = [await task for task in asked]
        assert versions[0] == 0 and versions[-1] in (1, 2) and len(set(versions)) > 1

    with_service(test, accept_weights=True)


def test_the_same_push_again_changes_nothing_and_odd_versions_are_refused() -> None:
    async def test(client: Client, service: Service) -> None:
        headers = {"Content-Type": wire.TENSORS_TYPE}
        part = save({"model.norm.weight": torch.full((32,), 0.5)})
        told = []
        for _ in range(2):
            query = {"policy_version": "4", "partial": "true"}
            answer = await client.post(wire.WEIGHTS, params=query, content=part, headers=headers)
            told.append(answer.json())
        assert told[0] == told[1] and told[0]["policy_version"] == 4
        for version in ("1" * 400, "1" * 5000, "-1", "1.5", str(2**53)):
            answer = await client.post(wire.WEIGHTS, params={"policy_version": version}, content=part, headers=headers)
            assert answer.status_code == 400 and answer.json()["error"]["field"] == "policy_version"
        assert (await client.get(wire.METRICS)).status_code == 200
        long = b"0" * (service.engine.weights_bytes * 5 // 4 + (2 << 20))
        answer = await client.post(wire.WEIGHTS, params={"policy_version": 5}, content=long, headers=headers)
        assert answer.status_code == 413
        assert not list(Path("/dev/shm").glob(f"llmdistill-weights-{os.getpid()}-*"))

    with_service(test, accept_weights=True)


def test_an_adapter_that_goes_while_a_request_waits_is_not_replaced_by_the_base_model() -> None:
    async def test(client: Client, service: Service) -> None:
        service.engine.adapters["one"] = "somewhere"
        async with service.gate.alone():
            body = {"prompts": [SEQUENCES[1]], "sampling": {"max_new_tokens": 4}, "adapter": "one"}
            asked = asyncio.create_task(client.post(wire.GENERATE, json=body))
            while not service.gate.requests:
                await asyncio.sleep(0.001)
            del service.engine.adapters["one"]
        assert (await asked).status_code == 404

    with_service(test)


@pytest.mark.parametrize("wrong", ["shape", "pickle", "bias", "module", "dora", "junk", "nothing"])
def test_an_adapter_that_is_refused_leaves_the_model_as_it_was(wrong: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    targets, folder = ["q_proj", "v_proj"], tmp_path / "one"
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    get_peft_model(tiny.llama(1), config).save_pretrained(folder)
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if wrong == "shape":
        tensors = load_file(file)
        save_file({**tensors, next(iter(tensors)): torch.zeros(4, 5)}, file)
    elif wrong == "pickle":
        torch.save(load_file(file), folder / "adapter_model.bin")
        file.unlink()
    elif wrong == "module":
        save_file({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}, file)
    elif wrong == "junk":
        file.write_bytes(b"junk")
    elif wrong == "nothing":
        settings.unlink()
    else:
        told = json.loads(settings.read_text())
        settings.write_text(json.dumps({**told, **({"bias": "all"} if wrong == "bias" else {"use_dora": True})}))

    async def test(client: Client, service: Service) -> None:
        answer = await client.post(wire.ADAPTERS, json={"name": "one", "path": str(folder)})
        assert answer.status_code == 400 and answer.json()["error"]["field"] == "path", answer.text
        assert_same(blocks_of(await client.post(wire.SCORE, json=score_body()))[1], expected(8))
        assert service.engine.adapters == {}

    with_service(test, weight_folders=[tmp_path])


def test_a_way_to_start_adapters_that_changes_base_weights_changes_nothing(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(tiny.llama(1), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "one")
    settings = tmp_path / "one" / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "init_lora_weights": "pissa"}))

    async def test(client: Client, service: Service) -> None:
        answer = await client.post(wire.ADAPTERS, json={"name": "one", "path": str(tmp_path / "one")})
        assert answer.status_code == 200, answer.text
        assert_same(blocks_of(await client.post(wire.SCORE, json=score_body()))[1], expected(8))

    with_service(test, weight_folders=[tmp_path])


def test_a_wide_row_of_chosen_ids_is_refused_before_it_is_spread_over_all_rows() -> None:
    rows = [[1]] * 199 + [[1] * 20_000]
    body = {"sequences": [[4] * 201], "positions": [[1, 201]], "chosen": [rows]}

    async def test(client: Client, service: Service) -> None:
        tracemalloc.start()
        answer = await client.post(wire.SCORE, json=body)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert answer.status_code == 400 and answer.json()["error"]["field"] == "top_k"
        assert peak < 8 << 20  # spread out it would be 200 x 20,000 numbers

    with_service(test, Limits(sequence_tokens=256))


def test_bodies_of_refused_requests_are_let_go_at_once() -> None:
    """Without the garbage collector's help: back-pressure must not fill the memory."""

    async def test(client: Client, service: Service) -> None:
        padding = " " * (1 << 20)
        data = json.dumps(score_body(top_k=999)).encode() + padding.encode()
        gc.collect()
        gc.disable()
        try:
            tracemalloc.start()
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(20):
                assert (await client.post(wire.SCORE, content=bytes(data))).status_code == 400
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
            gc.enable()
        assert grown < 6 << 20 and service.bodies.bytes == 0

    with_service(test)


def test_bodies_that_are_being_read_have_a_bound_together_and_a_time_to_arrive() -> None:
    async def test(client: Client, service: Service) -> None:
        async def slowly():  # type: ignore[no-untyped-def]
            yield b" " * 30_000
            await asyncio.sleep(0.2)
            yield b" " * 30_000

        answers = await asyncio.gather(*[client.post(wire.SCORE, content=slowly()) for _ in range(4)])
        assert {a.status_code for a in answers} == {400, 429} and service.bodies.bytes == 0

        async def never():  # type: ignore[no-untyped-def]
            yield b" "
            await asyncio.sleep(5)
            yield b" "

        assert (await client.post(wire.SCORE, content=never())).status_code == 408

    with_service(test, Limits(sequence_tokens=128, body_bytes=100_000, bodies_bytes=130_000, body_s=1.0))


def test_an_answer_is_kept_from_when_it_is_there() -> None:
    """However long it took: else the retry of a slow request would compute it again."""

    async def run() -> None:
        answers, computed = Answers(1 << 20, keep_s=0.2), list[int]()

        async def work() -> Answer:
            computed.append(1)
            await asyncio.sleep(0.4)
            return Answer(b"x", "text/plain")

        for _ in range(2):
            await answers.get("a", b"digest", work)
        assert len(computed) == 1
        await asyncio.sleep(0.3)
        await answers.get("b", b"digest", work)
        await answers.get("a", b"digest", work)
        assert len(computed) == 3

    asyncio.run(run())


def test_adapters_come_and_go(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(
        tiny.llama(1), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "one")
    wanted = generate(adapted, [Prompt(SEQUENCES[1], "")], Sampling(8, temperature=0), eos_ids=[1], pad_id=0)

    async def test(client: Client, service: Service) -> None:
        async def ids(adapter: str | None) -> list[int]:
            body = {"prompts": [SEQUENCES[1]], "sampling": {"max_new_tokens": 8, "temperature": 0}, "adapter": adapter}
            answer = await client.post(wire.GENERATE, json=body)
            return answer.json()["completions"][0][0]["ids"] if answer.status_code == 200 else [answer.status_code]

        plain = await ids(None)
        assert await ids("one") == [404]
        answer = await client.post(wire.ADAPTERS, json={"name": "one", "path": str(tmp_path / "one")})
        assert answer.json() == {"adapters": ["one"]}
        again = await client.post(wire.ADAPTERS, json={"name": "one", "path": str(tmp_path / "one")})
        assert again.json() == {"adapters": ["one"]}
        assert await ids("one") == wanted.input_ids[0][wanted.completion_mask[0]].tolist() != plain
        assert await ids(None) == plain
        assert_same(blocks_of(await client.post(wire.SCORE, json=score_body()))[1], expected(8))
        (tmp_path / "empty").mkdir()
        bad = await client.post(wire.ADAPTERS, json={"name": "two", "path": str(tmp_path / "empty")})
        assert bad.status_code == 400
        assert (await client.delete(wire.ADAPTERS + "/one")).status_code == 200
        assert (await client.delete(wire.ADAPTERS + "/one")).status_code == 404
        assert await ids("one") == [404] and await ids(None) == plain

    with_service(test, accept_weights=True, weight_folders=[tmp_path])


def test_any_openai_client_can_generate() -> None:
    async def test(client: Client, service: Service) -> None:
        names = [m["id"] for m in (await client.get("/v1/models")).json()["data"]]
        assert names == [service.engine.info.name]
        tok = service.engine.tokenizer
        body = {"model": names[0], "prompt": ["2+2=", "3"], "n": 2, "max_tokens": 6, "seed": 3, "logprobs": 0}
        answer = (await client.post("/v1/completions", json={**body, "return_token_ids": True})).json()
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
        direct = {
            "prompts": [tok("2+2=")["input_ids"], tok("3")["input_ids"]],
            "sampling": {"max_new_tokens": 6, "samples_per_prompt": 2, "seed": 3},
        }
        wanted = (await client.post(wire.GENERATE, json=direct)).json()["completions"]
        assert [c["token_ids"] for c in answer["choices"]] == [s["ids"] for ss in wanted for s in ss]
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == wanted[0][0]["logprobs"]
        assert answer["usage"]["completion_tokens"] == sum(len(s["ids"]) for ss in wanted for s in ss)
        same = (await client.post("/v1/completions", json={**body, "prompt": direct["prompts"]})).json()
        assert [c["text"] for c in same["choices"]] == [c["text"] for c in answer["choices"]]
        streamed = await client.post("/v1/completions", json={**body, "stream": True})
        events = [line[6:] for line in streamed.text.split("\n\n") if line]
        assert events[-1] == "[DONE]" and [json.loads(e)["choices"][0]["text"] for e in events[:-1]] == [
            c["text"] for c in answer["choices"]
        ]
        text = answer["choices"][0]["text"]
        stopped = (await client.post("/v1/completions", json={**body, "stop": text[2]})).json()["choices"][0]
        assert stopped["text"] == text[: text.find(text[2])] and stopped["finish_reason"] == "stop"
        for field, value in (("presence_penalty", 1.0), ("best_of", 5), ("logprobs", 5), ("model", "other")):
            refused = await client.post("/v1/completions", json={**body, field: value})
            assert refused.status_code in (400, 404) and refused.json()["error"]["field"] == field

    with_service(test)


def test_a_draining_service_answers_what_it_has_and_takes_no_more() -> None:
    async def test(client: Client, service: Service) -> None:
        async with service.gate.alone():  # so that all three are there, and none is done
            asked = [asyncio.create_task(client.post(wire.SCORE, json=score_body())) for _ in range(3)]
            while service.gate.requests < 3:
                await asyncio.sleep(0.001)
            drained = asyncio.create_task(service.gate.drained(30))
            await asyncio.sleep(0)
            refused = await client.post(wire.SCORE, json=score_body())
            assert refused.status_code == 503 and "retry-after" in refused.headers
            assert (await client.get(wire.READY)).status_code == 503
            assert (await client.get(wire.HEALTH)).status_code == 200
            assert not drained.done()
        assert await drained and [(await task).status_code for task in asked] == [200] * 3

    with_service(test)


def test_what_happens_is_counted() -> None:
    async def test(client: Client, service: Service) -> None:
        await client.post(wire.SCORE, json=score_body())
        await client.post(wire.SCORE, json=score_body(top_k=999))
        await client.get("/nowhere/at/all")
        text = (await client.get(wire.METRICS)).text
        assert f"llmdistill_scored_positions_total {float(sum(len(i) - 2 for i in SEQUENCES))}" in text
        assert 'llmdistill_requests_total{endpoint="/v1/score",status="200"} 1.0' in text
        assert 'llmdistill_requests_total{endpoint="/v1/score",status="400"} 1.0' in text
        assert 'endpoint="unknown",status="404"' in text and "nowhere" not in text
        assert "process_resident_memory_bytes" in text

    with_service(test)


def test_an_error_inside_is_a_500_without_its_details_and_the_service_goes_on() -> None:
    async def test(client: Client, service: Service) -> None:
        engine: Any = service.engine
        run, engine._score = engine._score, lambda jobs: 1 / 0
        answer = await client.post(wire.SCORE, json=score_body())
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "internal"
        engine._score = run
        assert (await client.post(wire.SCORE, json=score_body())).status_code == 200
        assert service.gate.requests == 0

    with_service(test)
