"""The OpenAI chat protocol: messages in the model's own template, answers as messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import Field

from llmdistill.service import requests as bodies
from llmdistill.service.answers import Answer, Work
from llmdistill.service.app import Service
from llmdistill.service.engine import GenerateJob, Sample
from llmdistill.service.openai import (
    SampledBody,
    adapter_of,
    check_listed,
    each,
    head_of,
    read_body,
    sampled_job,
    streamed,
    text_of,
    usage_of,
    whole,
    work_of,
)
from llmdistill.service.openai_stream import Piece, Row, finite, own_of, rows_of
from llmdistill.service.problems import invalid
from llmdistill.service.responses import response
from llmdistill.service.text import rendered, template_of
from llmdistill.texts.seam import text_ids
from llmdistill.wire.blocks import ScoreBlock

PATH = "/v1/chat/completions"


class ChatBody(SampledBody):
    """Tools are what the template says of them; calls of them stand in the answer's text as the model writes them."""

    messages: list[dict[str, Any]]
    max_tokens: Annotated[int, Field(ge=1)] | None = None  # the older name of the next
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None


def add_routes(app: FastAPI, service: Service) -> None:
    @app.post(PATH)
    async def chat(request: Request) -> Response:
        answer = await service.answered(request, PATH, lambda data, kind: _work(data, service))
        return response(request, answer, service.limits)


def _work(data: bytes, service: Service) -> Work:
    body = read_body(ChatBody, data)
    if (body.response_format or {"type": "text"}).get("type") != "text":
        raise invalid("response_format", "is not supported but for text; leave it out")
    adapter, listed = adapter_of(body, service), body.top_logprobs or 0
    if listed and not body.logprobs:
        raise invalid("top_logprobs", f"is {listed}; it needs logprobs: true")
    check_listed("top_logprobs", listed, adapter, service)
    ids = _ids(body, service)
    job = sampled_job(body, [ids], _new_tokens(body, len(ids), service), adapter, service)
    if body.stream:
        head = head_of(body, "chatcmpl", "chat.completion.chunk", service)
        return streamed(body, job, service, head, partial(_pieces, body, job, service), listed)
    return work_of(service, job, listed, partial(_answer, body, job, service))


def _ids(body: ChatBody, service: Service) -> list[int]:
    bodies.check_text("messages", str(body.messages), service.limits)
    bodies.check_text("tools", str(body.tools or ""), service.limits)
    bodies.check_template_kwargs(body.chat_template_kwargs or {}, service.limits)
    template = template_of(service.engine.tokenizer, body.chat_template_kwargs)
    tools = None if body.tool_choice == "none" else body.tools
    return text_ids(template.tokenizer, rendered(template, body.messages, tools, "messages", "tools"), special=False)


def _new_tokens(body: ChatBody, prompt_tokens: int, service: Service) -> int:
    """What is asked for, or as many as fit."""
    asked = body.max_completion_tokens or body.max_tokens
    room = min(service.limits.sequence_tokens, service.engine.max_model_len) - prompt_tokens
    return asked or max(min(room, service.limits.new_tokens), 1)


def _answer(
    body: ChatBody, job: GenerateJob, service: Service, drawn: list[list[Sample]], blocks: list[ScoreBlock]
) -> Answer:
    choices = []
    for index, (prompt, sample) in enumerate(each(job, drawn)):
        text, finish = text_of(sample, body.stops, service)
        message = {"role": "assistant", "content": text, "refusal": None}
        choice: dict[str, Any] = {"index": index, "message": message, "finish_reason": finish, "logprobs": None}
        if body.logprobs:
            block = blocks[index] if blocks else None
            own, rows = (sample.logprobs, None) if block is None else (own_of(block), rows_of(block))
            choice["logprobs"] = {"content": _logprobs(sample.ids, own, rows, service)}
        if body.return_token_ids:
            choice["token_ids"], choice["prompt_token_ids"] = sample.ids, prompt
        choices.append(choice)
    return whole(head_of(body, "chatcmpl", "chat.completion", service), choices, usage_of(job, drawn))


def _pieces(body: ChatBody, job: GenerateJob, service: Service, piece: Piece) -> Iterator[dict[str, Any]]:
    """A piece in events: who speaks, what is said, why it ends."""
    if piece.first:
        yield {"index": piece.index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    if piece.text or piece.ids:
        choice: dict[str, Any] = {"index": piece.index, "delta": {"content": piece.text}, "finish_reason": None}
        if body.logprobs:
            choice["logprobs"] = {"content": _logprobs(piece.ids, piece.logprobs, piece.rows, service)}
        if body.return_token_ids:
            choice["token_ids"] = piece.ids
            choice |= {"prompt_token_ids": job.prompts[0]} if piece.first else {}
        yield choice
    if piece.finish is not None:
        yield {"index": piece.index, "delta": {}, "finish_reason": piece.finish}


def _logprobs(
    ids: Sequence[int], own: Sequence[float], rows: Sequence[Row] | None, service: Service
) -> list[dict[str, Any]]:
    """As drawn; with lists of others, as the model says at temperature 1."""

    def told(token: int, logprob: float) -> dict[str, Any]:
        text = str(service.engine.tokenizer.decode([token]))
        part = "\ufffd" in text  # of a character: which bytes it is the text does not say
        return {"token": text, "logprob": finite(logprob), "bytes": None if part else list(text.encode())}

    listed: Sequence[Row] = [[] for _ in ids] if rows is None else rows
    return [
        {**told(token, logprob), "top_logprobs": [told(*other) for other in others]}
        for token, logprob, others in zip(ids, own, listed, strict=True)
    ]
