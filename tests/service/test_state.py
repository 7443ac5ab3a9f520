"""What the service remembers, holds and changes: answers, bodies, weights, adapters. Nobody can mix them up."""

from __future__ import annotations

import asyncio
import gc
import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from llmdistill.models.generation import generate
from llmdistill.service.answers import Answer, Answers
from llmdistill.service.app import Service
from llmdistill.service.limits import Limits
from llmdistill.teachers.fingerprint import weights_fingerprint
from llmdistill.teachers.local import LocalTeacher
from llmdistill.texts import Prompt, Sampling, collate
from llmdistill.wire import protocol
from tests import tiny
from tests.service.inprocess import (
    SEQUENCES,
    Client,
    assert_same,
    blocks_of,
    expected,
    score_body,
    stored,
    with_service,
)


def test_a_request_sent_again_is_not_computed_again() -> None:
    async def test(client: Client, service: Service) -> None:
        headers = {"X-Request-Id": "a"}
        both = await asyncio.gather(
            *[client.post(protocol.SCORE, json=score_body(), headers=headers) for _ in range(2)]
        )
        later = await client.post(protocol.SCORE, json=score_body(), headers=headers)
        assert both[0].content == both[1].content == later.content
        positions = sum(len(ids) - 2 for ids in SEQUENCES)
        assert service.metrics.positions._value.get() == positions and service.answers.replayed == 2
        other = await client.post(protocol.SCORE, json=score_body(top_k=3), headers=headers)
        assert other.status_code == 409 and other.json()["error"]["type"] == "reused_id"
        odd = await client.post(protocol.SCORE, json=score_body(), headers={"X-Request-Id": "a b"})
        assert odd.status_code == 400
        # an error is not kept: the same id may be tried again
        bad = score_body(top_k=999)
        for _ in range(2):
            refused = await client.post(protocol.SCORE, json=bad, headers={"X-Request-Id": "b"})
            assert refused.status_code == 400

    with_service(test)


def test_kept_answers_stay_within_their_bound() -> None:
    async def test(client: Client, service: Service) -> None:
        for i in range(20):
            await client.post(protocol.SCORE, json=score_body(), headers={"X-Request-Id": f"r{i}"})
            assert service.answers.bytes <= 10_000
        assert 0 < len(service.answers._entries) < 20

    with_service(test, Limits(sequence_tokens=128, answers_bytes=10_000))


def test_a_full_queue_says_when_to_come_back() -> None:
    async def test(client: Client, service: Service) -> None:
        answers = await asyncio.gather(*[client.post(protocol.SCORE, json=score_body()) for _ in range(12)])
        status = [a.status_code for a in answers]
        assert set(status) == {200, 429} and status.count(200) >= 3
        busy = next(a for a in answers if a.status_code == 429)
        assert int(busy.headers["retry-after"]) >= 1 and busy.json()["error"]["type"] == "busy"
        assert service.gate.requests == 0 and service.gate.tokens == 0
        assert (await client.post(protocol.SCORE, json=score_body())).status_code == 200

    with_service(test, Limits(sequence_tokens=128, in_flight=3))


def test_new_weights_answer_and_the_old_ones_are_gone() -> None:
    new = tiny.llama(2)

    async def test(client: Client, service: Service) -> None:
        headers = {"Content-Type": protocol.TENSORS_TYPE}
        before = blocks_of(await client.post(protocol.SCORE, json=score_body()))
        data = save(stored(new))
        answer = await client.post(protocol.WEIGHTS, params={"policy_version": 7}, content=data, headers=headers)
        assert answer.json() == {"teacher": weights_fingerprint(new), "policy_version": 7}
        head, found = blocks_of(await client.post(protocol.SCORE, json=score_body()))
        assert head["policy_version"] == 7 and head["teacher"] != before[0]["teacher"]
        rollout = collate([ids[:2] for ids in SEQUENCES], [ids[2:] for ids in SEQUENCES], pad_id=0)
        assert_same(found, LocalTeacher(new, tiny.tokenizer()).score(rollout, 8))
        greedy = {"prompts": [SEQUENCES[0]], "sampling": {"max_new_tokens": 8, "temperature": 0}}
        drawn = (await client.post(protocol.GENERATE, json=greedy)).json()
        wanted = generate(new, [Prompt(SEQUENCES[0], "")], Sampling(8, temperature=0), eos_ids=[1], pad_id=0)
        assert drawn["completions"][0][0]["ids"] == wanted.input_ids[0][wanted.completion_mask[0]].tolist()
        assert drawn["policy_version"] == 7
        # a part of them
        part = {"model.norm.weight": torch.full_like(new.model.norm.weight, 0.5)}
        answer = await client.post(
            protocol.WEIGHTS, params={"policy_version": 8, "partial": "true"}, content=save(part), headers=headers
        )
        assert answer.status_code == 200 and answer.json()["teacher"] != head["teacher"]

    with_service(test, accept_weights=True)


def test_weights_that_do_not_fit_leave_the_old_ones_in_place(tmp_path: Path) -> None:
    async def test(client: Client, service: Service) -> None:
        headers, good = {"Content-Type": protocol.TENSORS_TYPE}, stored(tiny.llama(2))
        wrong = {**good, "model.norm.weight": torch.zeros(5)}
        for data in (save(wrong), save({"model.norm.weight": good["model.norm.weight"]}), b"junk", b""):
            answer = await client.post(protocol.WEIGHTS, params={"policy_version": 1}, content=data, headers=headers)
            assert answer.status_code == 400 and answer.json()["error"]["field"] == "weights", answer.text
        answer = await client.post(protocol.WEIGHTS, content=save(good), headers=headers)
        assert answer.status_code == 400 and answer.json()["error"]["field"] == "policy_version"
        assert_same(blocks_of(await client.post(protocol.SCORE, json=score_body()))[1], expected(8))

    with_service(test, accept_weights=True)


def test_weights_are_read_from_allowed_folders_only(tmp_path: Path) -> None:
    allowed, secret = tmp_path / "allowed", tmp_path / "secret"
    for folder in (allowed / "v1", secret):
        folder.mkdir(parents=True)
        save_file(stored(tiny.llama(2)), folder / "model.safetensors")
    (allowed / "link").symlink_to(secret)

    async def test(client: Client, service: Service) -> None:
        for path in (secret, allowed / ".." / "secret", allowed / "link", allowed / "nowhere"):
            answer = await client.post(protocol.WEIGHTS, json={"path": str(path), "policy_version": 1})
            assert answer.status_code == 400 and answer.json()["error"]["field"] == "path"
        answer = await client.post(protocol.WEIGHTS, json={"path": str(allowed / "v1"), "policy_version": 3})
        assert answer.json() == {"teacher": weights_fingerprint(allowed / "v1"), "policy_version": 3}

    with_service(test, accept_weights=True, weight_folders=[allowed])


def test_a_teacher_takes_no_weights_unless_it_was_told_to() -> None:
    async def test(client: Client, service: Service) -> None:
        answer = await client.post(
            protocol.WEIGHTS,
            params={"policy_version": 1},
            content=save(stored(tiny.llama(2))),
            headers={"Content-Type": protocol.TENSORS_TYPE},
        )
        assert answer.status_code == 403
        assert_same(blocks_of(await client.post(protocol.SCORE, json=score_body()))[1], expected(8))

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
            answer = (await client.post(protocol.GENERATE, json=body)).json()
            assert [s[0]["ids"] for s in answer["completions"]] == wanted[answer["policy_version"]]
            return int(answer["policy_version"])

        async def push(version: int) -> None:
            data = save(stored(models[version]))
            headers = {"Content-Type": protocol.TENSORS_TYPE}
            await client.post(protocol.WEIGHTS, params={"policy_version": version}, content=data, headers=headers)

        asked = [asyncio.create_task(ask()) for _ in range(4)]
        for version in (1, 2):
            await asyncio.sleep(0.01)
            pushed = asyncio.create_task(push(version))
            asked += [asyncio.create_task(ask()) for _ in range(4)]
            await pushed
        versions = [await task for task in asked]
        assert versions[0] == 0 and versions[-1] in (1, 2) and len(set(versions)) > 1

    with_service(test, accept_weights=True)


def test_the_same_push_again_changes_nothing_and_odd_versions_are_refused(tmp_path: Path) -> None:
    async def test(client: Client, service: Service) -> None:
        headers = {"Content-Type": protocol.TENSORS_TYPE}
        part = save({"model.norm.weight": torch.full((32,), 0.5)})
        told = []
        for _ in range(2):
            query = {"policy_version": "4", "partial": "true"}
            answer = await client.post(protocol.WEIGHTS, params=query, content=part, headers=headers)
            told.append(answer.json())
        assert told[0] == told[1] and told[0]["policy_version"] == 4
        for version in ("1" * 400, "1" * 5000, "-1", "1.5", str(2**53)):
            answer = await client.post(
                protocol.WEIGHTS, params={"policy_version": version}, content=part, headers=headers
            )
            assert answer.status_code == 400 and answer.json()["error"]["field"] == "policy_version"
        assert (await client.get(protocol.METRICS)).status_code == 200
        long = b"0" * (service.engine.weights_bytes * 5 // 4 + (2 << 20))
        answer = await client.post(protocol.WEIGHTS, params={"policy_version": 5}, content=long, headers=headers)
        assert answer.status_code == 413
        assert not list(tmp_path.iterdir())

    with_service(test, accept_weights=True, upload_folder=tmp_path)


def test_an_adapter_that_goes_while_a_request_waits_is_not_replaced_by_the_base_model() -> None:
    async def test(client: Client, service: Service) -> None:
        service.engine.adapters["one"] = "somewhere"
        async with service.gate.alone():
            body = {"prompts": [SEQUENCES[1]], "sampling": {"max_new_tokens": 4}, "adapter": "one"}
            asked = asyncio.create_task(client.post(protocol.GENERATE, json=body))
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
        answer = await client.post(protocol.ADAPTERS, json={"name": "one", "path": str(folder)})
        assert answer.status_code == 400 and answer.json()["error"]["field"] == "path", answer.text
        assert_same(blocks_of(await client.post(protocol.SCORE, json=score_body()))[1], expected(8))
        assert service.engine.adapters == {}

    with_service(test, weight_folders=[tmp_path])


def test_a_way_to_start_adapters_that_changes_base_weights_changes_nothing(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(tiny.llama(1), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "one")
    settings = tmp_path / "one" / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "init_lora_weights": "pissa"}))

    async def test(client: Client, service: Service) -> None:
        answer = await client.post(protocol.ADAPTERS, json={"name": "one", "path": str(tmp_path / "one")})
        assert answer.status_code == 200, answer.text
        assert_same(blocks_of(await client.post(protocol.SCORE, json=score_body()))[1], expected(8))

    with_service(test, weight_folders=[tmp_path])


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
                assert (await client.post(protocol.SCORE, content=bytes(data))).status_code == 400
            grown = tracemalloc.get_traced_memory()[0] - before
        finally:
            tracemalloc.stop()
            gc.enable()
        assert grown < 6 << 20 and service.bodies.bytes == 0

    with_service(test, Limits(sequence_tokens=128, json_bytes=4 << 20))


def test_bodies_that_are_being_read_have_a_bound_together_and_a_time_to_arrive() -> None:
    async def test(client: Client, service: Service) -> None:
        async def slowly():  # type: ignore[no-untyped-def]
            yield b" " * 30_000
            await asyncio.sleep(0.2)
            yield b" " * 30_000

        answers = await asyncio.gather(*[client.post(protocol.SCORE, content=slowly()) for _ in range(4)])
        assert {a.status_code for a in answers} == {400, 429} and service.bodies.bytes == 0

        async def never():  # type: ignore[no-untyped-def]
            yield b" "
            await asyncio.sleep(5)
            yield b" "

        assert (await client.post(protocol.SCORE, content=never())).status_code == 408

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
            answer = await client.post(protocol.GENERATE, json=body)
            return answer.json()["completions"][0][0]["ids"] if answer.status_code == 200 else [answer.status_code]

        plain = await ids(None)
        assert await ids("one") == [404]
        answer = await client.post(protocol.ADAPTERS, json={"name": "one", "path": str(tmp_path / "one")})
        assert answer.json() == {"adapters": ["one"]}
        again = await client.post(protocol.ADAPTERS, json={"name": "one", "path": str(tmp_path / "one")})
        assert again.json() == {"adapters": ["one"]}
        assert await ids("one") == wanted.input_ids[0][wanted.completion_mask[0]].tolist() != plain
        assert await ids(None) == plain
        assert_same(blocks_of(await client.post(protocol.SCORE, json=score_body()))[1], expected(8))
        (tmp_path / "empty").mkdir()
        bad = await client.post(protocol.ADAPTERS, json={"name": "two", "path": str(tmp_path / "empty")})
        assert bad.status_code == 400
        assert (await client.delete(protocol.ADAPTERS + "/one")).status_code == 200
        assert (await client.delete(protocol.ADAPTERS + "/one")).status_code == 404
        assert await ids("one") == [404] and await ids(None) == plain

    with_service(test, accept_weights=True, weight_folders=[tmp_path])


def test_a_draining_service_answers_what_it_has_and_takes_no_more() -> None:
    async def test(client: Client, service: Service) -> None:
        async with service.gate.alone():  # so that all three are there, and none is done
            asked = [asyncio.create_task(client.post(protocol.SCORE, json=score_body())) for _ in range(3)]
            while service.gate.requests < 3:
                await asyncio.sleep(0.001)
            drained = asyncio.create_task(service.gate.drained(30))
            await asyncio.sleep(0)
            refused = await client.post(protocol.SCORE, json=score_body())
            assert refused.status_code == 503 and "retry-after" in refused.headers
            assert (await client.get(protocol.READY)).status_code == 503
            assert (await client.get(protocol.HEALTH)).status_code == 200
            assert not drained.done()
        assert await drained and [(await task).status_code for task in asked] == [200] * 3

    with_service(test)
