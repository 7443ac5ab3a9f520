"""The service in this process: what it computes and what it refuses."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from typing import Any

import pytest
import torch

from llmdistill.models.generation import generate
from llmdistill.service.app import Service
from llmdistill.service.hf_engine import ScoreJob, _Waiting, next_batch
from llmdistill.service.limits import Limits
from llmdistill.teachers.fingerprint import weights_fingerprint
from llmdistill.texts import Prompt, Sampling
from llmdistill.wire import protocol
from tests import tiny
from tests.service.inprocess import (
    SEQUENCES,
    Client,
    assert_same,
    blocks_of,
    expected,
    score_body,
    with_service,
)


def test_scores_are_those_of_the_embedded_teacher() -> None:
    async def test(client: Client, service: Service) -> None:
        head, found = blocks_of(await client.post(protocol.SCORE, json=score_body()))
        assert_same(found, expected(8))
        assert head["teacher"] == weights_fingerprint(tiny.llama(1)) and head["positions"] == sum(
            len(ids) - 2 for ids in SEQUENCES
        )
        _, tokens_only = blocks_of(await client.post(protocol.SCORE, json=score_body(top_k=0)))
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
        _, found = blocks_of(await client.post(protocol.SCORE, json=score_body(top_k=top_k, chosen=split)))
        assert_same(found, expected(top_k, chosen))
        _, full = blocks_of(await client.post(protocol.SCORE, json=score_body(top_k=128)))
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

        def score(jobs: list[ScoreJob]) -> Any:
            if not calls:  # long enough for the others to be waiting, however busy the machine
                time.sleep(1.0)
            calls.append(len(jobs))
            return run(jobs)

        engine._score = score
        one = [{"sequences": [ids], "positions": [[2, len(ids)]], "top_k": 8, "dtype": "float32"} for ids in SEQUENCES]
        answers = await asyncio.gather(*[client.post(protocol.SCORE, json=body) for body in one])
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
            answer = (await client.post(protocol.GENERATE, json=body)).json()
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
            await client.post(protocol.SCORE_TEXT, json={"items": items, "top_k": 4, "dtype": "float32"})
        )
        tok = tiny.tokenizer()
        assert head["items"][0]["ids"] == tok("4 é!")["input_ids"]
        assert tok.decode(head["items"][1]["prompt_ids"]) == "<user>2+2<assistant>"
        # é is two tokens of one character
        assert head["items"][0]["offsets"] == [[0, 1], [1, 2], [2, 3], [2, 3], [3, 4]]
        sequences = [item["prompt_ids"] + item["ids"] for item in head["items"]]
        positions = [[len(item["prompt_ids"]), len(s)] for item, s in zip(head["items"], sequences, strict=True)]
        body = {"sequences": sequences, "positions": positions, "top_k": 4, "dtype": "float32"}
        assert_same(found, blocks_of(await client.post(protocol.SCORE, json=body))[1])

    with_service(test)


SMALL = Limits(top_k=16, sequence_tokens=20, sequences=6, positions=60, new_tokens=8, body_bytes=4000)


SAMPLING = {"max_new_tokens": 4}


BAD: dict[str, tuple[str, dict[str, Any], str, int | None]] = {
    "unknown id": (protocol.SCORE, score_body(sequences=[[4, 264, 5]], positions=[[1, 3]]), "sequences[0][1]", 263),
    "negative id": (protocol.SCORE, score_body(sequences=[[4, -1, 5]], positions=[[1, 3]]), "sequences[0][1]", 263),
    "giant id": (protocol.SCORE, score_body(sequences=[[4, 10**30, 5]], positions=[[1, 3]]), "sequences[0][1]", 263),
    "no integer": (protocol.SCORE, score_body(sequences=[[4, 1.5]], positions=[[1, 2]]), "sequences[0][1]", None),
    "over the context": (protocol.SCORE, score_body(sequences=[[4] * 21], positions=[[1, 2]]), "sequences[0]", 20),
    "nothing": (protocol.SCORE, {"sequences": [], "positions": []}, "sequences", None),
    "an empty sequence": (protocol.SCORE, score_body(sequences=[[]], positions=[[0, 0]]), "sequences[0]", None),
    "position 0": (protocol.SCORE, score_body(sequences=[[4, 5]], positions=[[0, 2]]), "positions[0]", None),
    "position past the end": (protocol.SCORE, score_body(sequences=[[4, 5]], positions=[[1, 3]]), "positions[0]", None),
    "positions missing": (protocol.SCORE, score_body(positions=[[1, 2]]), "positions", None),
    "too many sequences": (protocol.SCORE, score_body(sequences=[[4, 5]] * 7, positions=[[1, 2]] * 7), "sequences", 6),
    "too many positions": (
        protocol.SCORE,
        score_body(sequences=[[4] * 20] * 4, positions=[[1, 20]] * 4),
        "positions",
        60,
    ),
    "top-k over the limit": (protocol.SCORE, score_body(top_k=17), "top_k", 16),
    "negative top-k": (protocol.SCORE, score_body(top_k=-1), "top_k", None),
    "another temperature": (protocol.SCORE, score_body(temperature=2.0), "temperature", None),
    "unknown dtype": (protocol.SCORE, score_body(dtype="int8"), "dtype", None),
    "unknown field": (protocol.SCORE, score_body(topk=3), "topk", None),
    "no field": (protocol.SCORE, {"sequences": [[4, 5]]}, "positions", None),
    "chosen for fewer sequences": (protocol.SCORE, score_body(chosen=[[]]), "chosen", None),
    "chosen of another length": (
        protocol.SCORE,
        score_body(sequences=[[4, 5]], positions=[[1, 2]], chosen=[[]]),
        "chosen[0]",
        None,
    ),
    "chosen unknown": (
        protocol.SCORE,
        score_body(sequences=[[4, 5]], positions=[[1, 2]], chosen=[[[264]]]),
        "chosen[0][0]",
        263,
    ),
    "chosen over the limit": (
        protocol.SCORE,
        score_body(sequences=[[4, 5]], positions=[[1, 2]], top_k=8, chosen=[[list(range(9))]]),
        "top_k",
        16,
    ),
    "prompt over the context": (protocol.GENERATE, {"prompts": [[4] * 17], "sampling": SAMPLING}, "prompts[0]", 20),
    "too long a completion": (
        protocol.GENERATE,
        {"prompts": [[4]], "sampling": {"max_new_tokens": 9}},
        "sampling.max_new_tokens",
        8,
    ),
    "negative temperature": (
        protocol.GENERATE,
        {"prompts": [[4]], "sampling": {**SAMPLING, "temperature": -1}},
        "sampling.temperature",
        None,
    ),
    "colder than engines go": (
        protocol.GENERATE,
        {"prompts": [[4]], "sampling": {**SAMPLING, "temperature": 1e-40}},
        "sampling.temperature",
        2,
    ),
    "hotter than engines go": (
        protocol.GENERATE,
        {"prompts": [[4]], "sampling": {**SAMPLING, "temperature": 3}},
        "sampling.temperature",
        2,
    ),
    "more candidates than tokens": (
        protocol.GENERATE,
        {"prompts": [[4]], "sampling": {**SAMPLING, "top_k": 10**30}},
        "sampling.top_k",
        264,
    ),
    "a text that cannot fit": (
        protocol.SCORE_TEXT,
        {"items": [{"prompt": "a", "completion": "b" * 1300}]},
        "items[0].completion",
        1280,
    ),
    "a path with a zero": (protocol.ADAPTERS, {"name": "a", "path": "a\0b"}, "path", None),
    "a path that is too long": (protocol.ADAPTERS, {"name": "a", "path": "a/" * 1500}, "path", None),
    "prompts that are no prompts": ("/v1/completions", {"prompt": [{}, {}]}, "prompt[0]", None),
    "too many prompts": ("/v1/completions", {"prompt": ["a"] * 7}, "prompt", 7),
    "too many samples": (
        protocol.GENERATE,
        {"prompts": [[4]], "sampling": {**SAMPLING, "samples_per_prompt": 7}},
        "prompts",
        6,
    ),
    "rows missing": (protocol.GENERATE, {"prompts": [[4], [5]], "rows": [0], "sampling": SAMPLING}, "rows", None),
    "unknown eos": (protocol.GENERATE, {"prompts": [[4]], "eos_ids": [264], "sampling": SAMPLING}, "eos_ids[0]", 263),
    "empty text": (protocol.SCORE_TEXT, {"items": [{"prompt": "", "completion": "a"}]}, "items[0].prompt", None),
    "no text": (protocol.SCORE_TEXT, {"items": []}, "items", None),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_with_its_bound_and_the_service_goes_on(name: str) -> None:
    path, body, field, limit = BAD[name]

    async def test(client: Client, service: Service) -> None:
        answer = await client.post(path, json=body)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["field"] == field and error["limit"] == limit, error
        good = {"sequences": [[4, 5, 6]], "positions": [[1, 3]], "top_k": 16}
        assert (await client.post(protocol.SCORE, json=good)).status_code == 200

    with_service(test, SMALL)


def test_bodies_that_are_no_json_or_too_large() -> None:
    async def test(client: Client, service: Service) -> None:
        for data in (b"", b"{", b"\xff\x00", b"[" * 2000, b'{"sequences": NaN}'):
            answer = await client.post(protocol.SCORE, content=data)
            assert answer.status_code == 400 and answer.json()["error"]["message"]
        answer = await client.post("/v1/completions", content=b'{"prompt": "a", "temperature": 1e999}')
        assert answer.status_code == 400 and answer.json()["error"]["field"] == "temperature"
        answer = await client.post(protocol.SCORE, content=b"x" * 4001)
        assert answer.status_code == 413 and answer.json()["error"]["limit"] == 4000

        async def endless():  # type: ignore[no-untyped-def]
            while True:
                yield b" " * 1000

        assert (await client.post(protocol.SCORE, content=endless())).status_code == 413
        assert (await client.post("/v2/score")).json()["error"]["type"] == "route"

    with_service(test, SMALL)


def test_expected_weights_that_are_not_there_are_a_conflict() -> None:
    async def test(client: Client, service: Service) -> None:
        for path, body in (
            (protocol.SCORE, score_body(teacher="0" * 16)),
            (protocol.GENERATE, {"prompts": [[4]], "sampling": SAMPLING, "teacher": "0" * 16}),
        ):
            answer = await client.post(path, json=body)
            assert answer.status_code == 409 and answer.json()["error"]["type"] == "fingerprint"
        body = score_body(teacher=weights_fingerprint(tiny.llama(1)))
        assert (await client.post(protocol.SCORE, json=body)).status_code == 200

    with_service(test)


def test_without_the_token_only_health_answers() -> None:
    async def test(client: Client, service: Service) -> None:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for path in (protocol.INFO, protocol.METRICS, "/v1/models"):
                assert (await client.get(path, headers=headers)).status_code == 401
            answer = await client.post(protocol.SCORE, json=score_body(), headers=headers)
            assert answer.status_code == 401 and answer.json()["error"]["type"] == "token"
            assert (await client.get(protocol.HEALTH, headers=headers)).status_code == 200
            assert (await client.get(protocol.READY, headers=headers)).status_code == 200
        good = {"Authorization": "Bearer secret"}
        assert (await client.post(protocol.SCORE, json=score_body(), headers=good)).status_code == 200

    with_service(test, token="secret")


def test_a_wide_row_of_chosen_ids_is_refused_before_it_is_spread_over_all_rows() -> None:
    rows = [[1]] * 199 + [[1] * 20_000]
    body = {"sequences": [[4] * 201], "positions": [[1, 201]], "chosen": [rows]}

    async def test(client: Client, service: Service) -> None:
        tracemalloc.start()
        answer = await client.post(protocol.SCORE, json=body)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert answer.status_code == 400 and answer.json()["error"]["field"] == "top_k"
        assert peak < 8 << 20  # spread out it would be 200 x 20,000 numbers

    with_service(test, Limits(sequence_tokens=256))


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
        wanted = (await client.post(protocol.GENERATE, json=direct)).json()["completions"]
        assert [c["token_ids"] for c in answer["choices"]] == [s["ids"] for ss in wanted for s in ss]
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == wanted[0][0]["logprobs"]
        assert answer["usage"]["completion_tokens"] == sum(len(s["ids"]) for ss in wanted for s in ss)
        same = (await client.post("/v1/completions", json={**body, "prompt": direct["prompts"]})).json()
        assert [c["text"] for c in same["choices"]] == [c["text"] for c in answer["choices"]]
        streamed = await client.post("/v1/completions", json={**body, "stream": True})
        events = [line[6:] for line in streamed.text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        pieces = [json.loads(event)["choices"][0] for event in events[:-1]]
        for choice in answer["choices"]:
            assert "".join(p["text"] for p in pieces if p["index"] == choice["index"]) == choice["text"]
        text = answer["choices"][0]["text"]
        stopped = (await client.post("/v1/completions", json={**body, "stop": text[2]})).json()["choices"][0]
        assert stopped["text"] == text[: text.find(text[2])] and stopped["finish_reason"] == "stop"
        for field, value in (("presence_penalty", 1.0), ("best_of", 5), ("logprobs", 9999), ("model", "other")):
            refused = await client.post("/v1/completions", json={**body, field: value})
            assert refused.status_code in (400, 404) and refused.json()["error"]["field"] == field

    with_service(test)


def test_what_happens_is_counted() -> None:
    async def test(client: Client, service: Service) -> None:
        await client.post(protocol.SCORE, json=score_body())
        await client.post(protocol.SCORE, json=score_body(top_k=999))
        await client.get("/nowhere/at/all")
        text = (await client.get(protocol.METRICS)).text
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
        answer = await client.post(protocol.SCORE, json=score_body())
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "internal"
        engine._score = run
        assert (await client.post(protocol.SCORE, json=score_body())).status_code == 200
        assert service.gate.requests == 0

    with_service(test)
