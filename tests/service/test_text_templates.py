"""Texts are scored as the teacher's own template writes them, in the tokens that the joined text has."""

from __future__ import annotations

from typing import Any

import pytest

from llmdistill.service.app import Service
from llmdistill.service.problems import Problem
from llmdistill.service.requests import TextBody, TextItem
from llmdistill.service.text import template_of, tokenized
from llmdistill.teachers.local import LocalTeacher
from llmdistill.teachers.remote import RemoteTeacher
from llmdistill.wire import protocol
from tests import tiny
from tests.service.faulty import Faulty
from tests.service.inprocess import Client, blocks_of, with_service
from tests.texts import quirks
from tests.texts.test_conversations import SHAREGPT, TOOLS
from tests.texts.test_templates import ASK, CHATML_PROMPT, SYSTEM


def item(prompt: Any, completion: str = "4", **more: Any) -> TextItem:
    return TextItem(prompt=prompt, completion=completion, **more)


@pytest.mark.parametrize("prompt", ["2+2=", "2+2= "])
def test_pieces_that_only_a_first_word_has_are_not_scored(prompt: str) -> None:
    tokenizer = quirks.sentence_piece(None)
    found = tokenized(template_of(tokenizer), 0, item(prompt, "4 is"))
    assert tokenizer.convert_ids_to_tokens(found.ids) == ["4", "▁is"]
    assert ["4 is"[a:b] for a, b in found.offsets] == ["4", " is"]
    assert found.prompt_ids == tokenizer(prompt)["input_ids"]


def test_what_the_tokenizer_puts_around_a_text_is_in_front_only() -> None:
    tokenizer = quirks.byte_level(None, around="<bos> $A <eos>")
    found = tokenized(template_of(tokenizer), 0, item("2+2=", "é4"))
    assert tokenizer.decode(found.prompt_ids) == "<bos>2+2=" and tokenizer.decode(found.ids) == "é4"
    assert found.offsets == [(0, 1), (0, 1), (1, 2)]


def test_messages_tools_and_arguments_of_the_template() -> None:
    def prompt(template: str, *given: Any, **more: Any) -> str:
        tokenizer = quirks.byte_level(template)
        return str(tokenizer.decode(tokenized(template_of(tokenizer), 0, item(*given, **more)).prompt_ids))

    assert prompt(quirks.NO_SYSTEM, [SYSTEM, ASK]) == "<bos><turn>user\nBe brief.\n\n2+2?<end>\n<turn>model\n"
    assert prompt(quirks.CHATML, SHAREGPT[1:2]) == CHATML_PROMPT
    assert prompt(quirks.WITH_TOOLS, [ASK], tools=TOOLS).startswith("<|im_start|>tools\n[{")
    tokenizer = quirks.byte_level(quirks.THINKING)
    quiet = tokenized(template_of(tokenizer, {"enable_thinking": False}), 0, item([ASK]))
    assert tokenizer.decode(quiet.prompt_ids) == CHATML_PROMPT + "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("given", "kwargs", "line"),
    [
        (item([ASK, ASK]), {}, "prompt is refused by the chat template: the chat template refuses messages"),
        (item([{"text": "x"}]), {}, "prompt is refused by the chat template: items[0].prompt[0] has the keys 'text'"),
        (
            item([ASK]),
            {"enable_thinking": False},
            "has 'enable_thinking', which the tokenizer's chat template does not read",
        ),
        (item([]), {}, "prompt is empty"),
        (item("2+2=", tools=TOOLS), {}, "tools are for a prompt of messages"),
    ],
)
def test_what_is_refused(given: TextItem, kwargs: dict[str, Any], line: str) -> None:
    with pytest.raises(Problem) as error:
        tokenized(template_of(quirks.byte_level(quirks.ALTERNATING), kwargs), 0, given)
    assert line in str(error.value)


def test_the_client_hands_on_what_the_template_reads() -> None:
    with Faulty(LocalTeacher(tiny.llama(2, vocab=288), quirks.byte_level(quirks.THINKING))) as service:
        teacher = RemoteTeacher(service.url, timeout_s=20, max_outage_s=5)
        off = {"enable_thinking": False}
        teacher.score_text([([ASK], "4"), ([ASK], "5")], 4, tools=[TOOLS, None], chat_template_kwargs=off)
        posts = service.posts(protocol.SCORE_TEXT)
        teacher.close()
    bodies = [TextBody.model_validate_json(post.body) for post in posts]  # as the service reads them
    assert all(body.chat_template_kwargs == off for body in bodies)
    tools = {item.completion: item.tools for body in bodies for item in body.items}
    assert tools == {"4": TOOLS, "5": None}


def test_the_service_gives_them_to_the_template() -> None:
    async def test(client: Client, service: Service) -> None:
        service.engine.tokenizer.chat_template = "{{ greeting }} {{ messages[0]['content'] }}="
        body: dict[str, Any] = {"items": [{"prompt": [ASK], "completion": "4"}], "top_k": 4}
        head, _ = blocks_of(
            await client.post(protocol.SCORE_TEXT, json={**body, "chat_template_kwargs": {"greeting": "Hi"}})
        )
        assert service.engine.tokenizer.decode(head["items"][0]["prompt_ids"]) == "Hi 2+2?="
        for kwargs, line in (({"tools": []}, "has 'tools'; it takes names that only"), ({"x": 1}, "does not read")):
            refused = await client.post(protocol.SCORE_TEXT, json={**body, "chat_template_kwargs": kwargs})
            assert refused.status_code == 400 and line in refused.json()["error"]["message"]

    with_service(test)
