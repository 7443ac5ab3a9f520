"""The OpenAI surface, by the official client where it is installed (it comes with vLLM), and by hand."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import torch

from llmdistill.service.app import Service
from llmdistill.service.limits import Limits
from llmdistill.service.openai import _work as service_work
from llmdistill.service.openai_stream import IMPOSSIBLE, TextSoFar
from llmdistill.wire import protocol
from tests import tiny
from tests.service.inprocess import Client, with_service

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2=?"}]


def templated(service: Service, **kwargs: Any) -> list[int]:
    tok = service.engine.tokenizer
    text = tok.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, **kwargs)
    return list(tok(text, add_special_tokens=False)["input_ids"])


def test_a_chat_is_the_completion_of_its_template() -> None:
    async def test(client: Client, service: Service) -> None:
        sampling = {"n": 2, "max_tokens": 6, "seed": 3, "return_token_ids": True}
        chat = (await client.post(CHAT, json={"messages": MESSAGES, **sampling})).json()
        ids = templated(service)
        same = (await client.post("/v1/completions", json={"prompt": ids, **sampling})).json()
        assert [c["prompt_token_ids"] for c in chat["choices"]] == [ids, ids]
        assert [c["token_ids"] for c in chat["choices"]] == [c["token_ids"] for c in same["choices"]]
        assert [c["message"]["content"] for c in chat["choices"]] == [c["text"] for c in same["choices"]]
        assert chat["usage"] == same["usage"] and chat["object"] == "chat.completion"
        assert {c["message"]["role"] for c in chat["choices"]} == {"assistant"}

    with_service(test)


def test_without_a_limit_an_answer_may_fill_the_context() -> None:
    async def test(client: Client, service: Service) -> None:
        body = {"messages": MESSAGES, "ignore_eos": True, "seed": 1}
        whole = (await client.post(CHAT, json=body)).json()
        assert whole["usage"]["total_tokens"] == 128 and whole["choices"][0]["finish_reason"] == "length"
        few = (await client.post(CHAT, json={**body, "max_completion_tokens": 3})).json()
        assert few["usage"]["completion_tokens"] == 3

    with_service(test, Limits(sequence_tokens=128))


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_lists_of_likeliest_tokens_are_what_the_model_says(path: str) -> None:
    """Against a forward pass by hand, at temperature 1 whatever was sampled at."""

    async def test(client: Client, service: Service) -> None:
        asked = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3}
        if path != CHAT:
            asked = {"prompt": templated(service), "logprobs": 3}
        body = {**asked, "max_tokens": 5, "temperature": 0.5, "seed": 2, "return_token_ids": True}
        (choice,) = (await client.post(path, json=body)).json()["choices"]
        prompt, ids = choice["prompt_token_ids"], choice["token_ids"]
        model: Any = service.engine.teacher.model  # type: ignore[attr-defined]
        with torch.no_grad():
            expected = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        own = expected.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
        decode = service.engine.tokenizer.decode
        top = expected.topk(3)
        lists = [
            [(decode([i]), p) for i, p in zip(*row, strict=True)]
            for row in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]
        if path == CHAT:
            content = choice["logprobs"]["content"]
            assert [one["logprob"] for one in content] == pytest.approx(own, abs=1e-4)
            found = [[(other["token"], other["logprob"]) for other in one["top_logprobs"]] for one in content]
            spelt = [None if "\ufffd" in decode([i]) else list(decode([i]).encode()) for i in ids]
            assert [one["bytes"] for one in content] == spelt
        else:
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(own, abs=1e-4)
            found = [list(row.items()) for row in choice["logprobs"]["top_logprobs"]]
        for theirs, ours in zip(found, lists, strict=True):
            assert dict(theirs) == pytest.approx(dict(ours), abs=1e-4)  # two tokens may have one text

    with_service(test)


def test_an_answer_ends_at_a_stop_string_and_is_not_written_on() -> None:
    async def test(client: Client, service: Service) -> None:
        body = {"messages": MESSAGES, "max_tokens": 40, "seed": 5, "ignore_eos": True, "return_token_ids": True}
        (free,) = (await client.post(CHAT, json=body)).json()["choices"]
        text = free["message"]["content"]
        stop = text[6:8]
        (held,) = (await client.post(CHAT, json={**body, "stop": ["never", stop]})).json()["choices"]
        assert held["message"]["content"] == text[: text.find(stop)] and held["finish_reason"] == "stop"
        assert len(held["token_ids"]) < len(free["token_ids"]) == 40

    with_service(test)


def test_a_stream_says_the_same_in_events() -> None:
    async def test(client: Client, service: Service) -> None:
        body = {"messages": MESSAGES, "n": 2, "max_tokens": 6, "seed": 3}
        whole = (await client.post(CHAT, json=body)).json()
        streamed = await client.post(CHAT, json={**body, "stream": True, "stream_options": {"include_usage": True}})
        *lines, last = [line.removeprefix("data: ") for line in streamed.text.split("\n\n") if line]
        chunks = [json.loads(line) for line in lines]
        assert last == "[DONE]" and chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
        for choice in whole["choices"]:
            deltas = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
            assert deltas[0]["delta"]["role"] == "assistant"
            assert "".join(c["delta"].get("content", "") for c in deltas) == choice["message"]["content"]
            *before, last = [c["finish_reason"] for c in deltas]
            assert last == choice["finish_reason"] and set(before) == {None}

    with_service(test)


@pytest.mark.parametrize("listed", [0, 3])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_stream_comes_token_by_token(path: str, listed: int) -> None:
    """The same text, ids, log-probs and lists as in one body, while the samples still grow; two prompts' worth of
    choices."""

    async def test(client: Client, service: Service) -> None:
        chat = {"messages": MESSAGES, "logprobs": True, "top_logprobs": listed}
        asked: dict[str, Any] = chat if path == CHAT else {"prompt": [[5, 6, 7], [50, 51]], "logprobs": listed}
        body = {**asked, "n": 2, "max_tokens": 12, "seed": 3, "return_token_ids": True, "ignore_eos": True}
        whole = (await client.post(path, json=body)).json()["choices"]
        streamed = await client.post(path, json={**body, "stream": True})
        chunks = [json.loads(line.removeprefix("data: ")) for line in streamed.text.split("\n\n")[:-2]]
        for choice in whole:
            mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
            assert [i for c in mine for i in c.get("token_ids", [])] == choice["token_ids"]
            assert len([c for c in mine if c.get("token_ids")]) > 3
            said = "".join((c["delta"].get("content") or "") if path == CHAT else c["text"] for c in mine)
            assert said == (choice["message"]["content"] if path == CHAT else choice["text"])
            found, expected = flat([c["logprobs"] for c in mine if c.get("logprobs")]), flat([choice["logprobs"]])
            assert [one[0] for one in found] == [one[0] for one in expected]
            for streamed_one, one in zip(found, expected, strict=True):
                assert streamed_one[1] == pytest.approx(one[1], abs=1e-5)
                assert streamed_one[2] == pytest.approx(one[2], abs=1e-5)
                assert listed == 0 or 0 < len(one[2]) <= listed  # two tokens may have one text
        first = [c["index"] for chunk in chunks for c in chunk["choices"]]
        assert first.index(len(whole) - 1) < len(first) - first[::-1].index(0) - 1  # they grow beside each other

    with_service(test)


def flat(logprobs: list[dict[str, Any]]) -> list[tuple[str, float, dict[str, float]]]:
    """Token, log-prob and list of every position, of either protocol."""
    if "content" in logprobs[0]:
        content = [one for part in logprobs for one in part["content"]]
        return [(c["token"], c["logprob"], {o["token"]: o["logprob"] for o in c["top_logprobs"]}) for c in content]
    found = list[tuple[str, float, dict[str, float]]]()
    for part in logprobs:
        lists = part["top_logprobs"] or [{}] * len(part["tokens"])
        found += zip(part["tokens"], part["token_logprobs"], lists, strict=True)
    return found


@pytest.mark.parametrize("new_tokens", [0, 1, 4])
def test_a_prompt_that_is_given_back_has_log_probs(new_tokens: int) -> None:
    """What evaluation harnesses score answers by: against a forward pass by hand."""

    async def test(client: Client, service: Service) -> None:
        prompts = [[5, 6, 7, 60], [50, 51], [9]]
        asked = {"prompt": prompts, "max_tokens": new_tokens, "echo": True, "logprobs": 1, "temperature": 0, "seed": 1}
        answer = (await client.post("/v1/completions", json={**asked, "return_token_ids": True})).json()
        decode, model = service.engine.tokenizer.decode, service.engine.teacher.model  # type: ignore[attr-defined]
        for prompt, choice in zip(prompts, answer["choices"], strict=True):
            ids, told = prompt + choice["token_ids"], choice["logprobs"]
            assert len(choice["token_ids"]) <= new_tokens and choice["text"] == decode(ids, skip_special_tokens=True)
            assert told["tokens"] == [decode([i]) for i in ids]
            assert told["text_offset"] == [len("".join(told["tokens"][:i])) for i in range(len(ids))]
            assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
            with torch.no_grad():
                rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            own = rows[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()
            assert told["token_logprobs"][1:] == pytest.approx(own, abs=1e-4)
            # a harness takes an answer for the greedy one where these two are equal, to the last bit
            pairs = zip(told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True)
            greedy = [own == max(top.values()) for own, top in pairs]
            assert greedy == [i == int(row.argmax()) for i, row in zip(ids[1:], rows, strict=False)]
            assert all(greedy[len(prompt) - 1 :])  # what was drawn at temperature 0
        none = {**asked, "max_tokens": 0, "echo": False}
        assert (await client.post("/v1/completions", json=none)).json()["error"]["field"] == "max_tokens"

    with_service(test)


def test_no_part_of_a_stop_string_or_of_a_character_is_streamed() -> None:
    tok = tiny.tokenizer()
    text = "a wörd, 猫 and END of it"
    ids = tok(text, add_special_tokens=False)["input_ids"]
    growing = TextSoFar(tok, ["END"])
    given, seen = "", list[str]()
    for token in ids:
        given += growing.new([token])
        seen.append(given)
    before = text[: text.index("END")]
    assert given == before and all(before.startswith(part) for part in seen) and len(set(seen)) > 5
    assert not any("\ufffd" in part for part in seen)
    assert growing.rest(before) == ""
    # what only looked like one comes when it is not
    growing = TextSoFar(tok, ["END"])
    given = "".join(growing.new([token]) for token in tok("an ENtry", add_special_tokens=False)["input_ids"])
    assert given + growing.rest("an ENtry") == "an ENtry"


def test_a_stream_whose_caller_hangs_up_stops_sampling() -> None:
    async def test(_: Client, service: Service) -> None:
        engine: Any = service.engine
        ended, rows = asyncio.Event(), list[int]()
        generate = engine.generate

        async def counted(job: Any, told: Any) -> Any:
            try:
                return await generate(job, lambda *all_of_it: (rows.append(1), told(*all_of_it)))
            finally:
                ended.set()

        engine.generate = counted
        job_body = {"prompt": [5, 6], "max_tokens": 100, "seed": 1, "ignore_eos": True, "stream": True}
        work: Any = service_work(json.dumps(job_body).encode(), service)
        answer: Any = await service.answers.get(None, b"", work)
        await anext(answer.body)
        answer.body.close()
        await asyncio.wait_for(ended.wait(), 30)
        await service.engine.score([])  # the model's thread is free again
        assert 0 < len(rows) < 100 and service.gate.requests == 0

    with_service(test)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "messages"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    "lists without logprobs": ({"top_logprobs": 2}, "top_logprobs"),
    "longer lists than there are": ({"logprobs": True, "top_logprobs": 9999}, "top_logprobs"),
    "JSON": ({"response_format": {"type": "json_object"}}, "response_format"),
    "a forced tool": ({"tool_choice": "required"}, "tool_choice"),
    "a bias": ({"logit_bias": {"5": 1.0}}, "logit_bias"),
    "a model that is not here": ({"model": "gpt-4"}, "model"),
    "our own template words": ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
    "too long": ({"messages": [{"role": "user", "content": "a" * 200}], "max_tokens": 5}, "prompts[0]"),
    "no room": ({"messages": [{"role": "user", "content": "a" * 200}]}, "prompts[0]"),
    "too many stops": ({"stop": [str(i) for i in range(20)]}, "stop"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_understood_is_refused_naming_the_field(name: str) -> None:
    changes, field = REFUSED[name]

    async def test(client: Client, service: Service) -> None:
        answer = await client.post(CHAT, json={"messages": MESSAGES, "max_tokens": 4, **changes})
        if name == "no room":
            answer = await client.post(CHAT, json={"messages": changes["messages"]})
        assert answer.status_code in (400, 404), answer.text
        assert answer.json()["error"]["field"] == field

    with_service(test, Limits(sequence_tokens=128))


def test_the_same_request_is_answered_once_and_a_token_is_asked_for() -> None:
    async def test(client: Client, service: Service) -> None:
        body = {"messages": MESSAGES, "max_tokens": 4}  # without a seed: another draw each time it is worked out
        assert (await client.post(CHAT, json=body)).status_code == 401
        headers = {"Authorization": "Bearer secret", "X-Request-Id": "chat-1"}
        one, two = [(await client.post(CHAT, json=body, headers=headers)).json() for _ in range(2)]
        assert one == two and service.answers.replayed == 1

    with_service(test, token="secret")


def test_the_official_client() -> None:
    openai = pytest.importorskip("openai", reason="comes with vLLM")

    async def test(client: Client, service: Service) -> None:
        client.base_url = "http://127.0.0.1/v1/"
        api = openai.AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key="none", http_client=client)
        name = (await api.models.list()).data[0].id
        asked: dict[str, Any] = {"model": name, "messages": MESSAGES, "max_completion_tokens": 6, "seed": 3}
        chat = await api.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        assert chat.choices[0].finish_reason in ("stop", "length") and chat.usage.completion_tokens <= 6
        assert all(len(one.top_logprobs) == 2 for one in chat.choices[0].logprobs.content)
        stream = await api.chat.completions.create(**asked, stream=True)
        said = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert said == chat.choices[0].message.content
        stream = await api.chat.completions.create(**asked, stream=True, logprobs=True, top_logprobs=2)
        told = [chunk.choices[0].logprobs async for chunk in stream]
        content = [one for part in told if part is not None for one in part.content]
        assert [one.token for one in content] == [one.token for one in chat.choices[0].logprobs.content]
        assert all(len(one.top_logprobs) == 2 for one in content)
        text = await api.completions.create(model=name, prompt="2+2=", max_tokens=4, logprobs=2, seed=1)
        assert len(text.choices[0].logprobs.top_logprobs) == text.usage.completion_tokens
        with pytest.raises(openai.NotFoundError):
            await api.chat.completions.create(**{**asked, "model": "gpt-4"})
        with pytest.raises(openai.BadRequestError, match="logit_bias"):
            await api.chat.completions.create(**asked, logit_bias={"5": 1})

    with_service(test)


def test_what_cannot_be_is_a_number_that_json_has() -> None:
    assert IMPOSSIBLE < -1000 and json.loads(json.dumps(IMPOSSIBLE)) == IMPOSSIBLE
    assert protocol.JSON_TYPE == "application/json"
