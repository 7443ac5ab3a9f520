"""The OpenAI completions protocol, for clients that know nothing of distillation. Generation only."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field

from llmdistill.service import requests as bodies
from llmdistill.service.answers import Answer
from llmdistill.service.app import Service, Work
from llmdistill.service.engine import GenerateJob, Sample
from llmdistill.service.problems import Problem, invalid
from llmdistill.wire.bodies import Prompts
from llmdistill.wire.protocol import JSON_TYPE

EVENTS_TYPE = "text/event-stream"
PART_BYTES = 1 << 16


class CompletionBody(BaseModel):
    """The fields that are honoured; others are refused when they would change what is sampled, else ignored."""

    model: str | None = None
    prompt: Any  # text, ids, or a list of either: told apart below
    max_tokens: Annotated[int, Field(ge=1)] = 16
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1)] = 1
    seed: int | None = None
    stop: str | list[str] | None = None
    logprobs: int | None = None
    echo: bool = False
    stream: bool = False
    return_token_ids: bool = False
    # whatever of these is set to something would change the distribution
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] | None = None
    best_of: int | None = None
    suffix: str | None = None


def add_routes(app: FastAPI, service: Service) -> None:
    """``/v1/models`` and ``/v1/completions``."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        info = service.engine.info
        names = [info.name, *service.engine.adapters]
        length = min(info.context_length, service.engine.max_model_len)
        entry = {"object": "model", "created": 0, "owned_by": "llmdistill", "max_model_len": length}
        return {"object": "list", "data": [{"id": name, "root": info.name, **entry} for name in names]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        answer = await service.answered(request, "/v1/completions", lambda data, kind: _work(data, service))
        if answer.media_type != EVENTS_TYPE:
            return Response(answer.body, media_type=answer.media_type)
        return StreamingResponse(_parts(answer.body), media_type=EVENTS_TYPE)


def _work(data: bytes, service: Service) -> Work:
    body, job = _job(data, service)

    async def work() -> Answer:
        drawn, _, _ = await service.samples(job)
        return await asyncio.to_thread(_answer, body, job, drawn, service)

    return work


def _answer(body: CompletionBody, job: GenerateJob, drawn: list[list[Sample]], service: Service) -> Answer:
    """The whole answer. It is written choice by choice: one call for all would keep the loop's thread from running."""
    choices = [
        _choice(i * body.n + j, sample, prompt, body, service)
        for i, (prompt, samples) in enumerate(zip(job.prompts, drawn, strict=True))
        for j, sample in enumerate(samples)
    ]
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
    head["model"] = body.model or service.engine.info.name
    if body.stream:  # what comes is what was sampled, a whole choice in each event
        events = [f"data: {json.dumps({**head, 'choices': [choice]})}\n\n" for choice in choices]
        return Answer("".join([*events, "data: [DONE]\n\n"]).encode(), EVENTS_TYPE)
    written = sum(len(s.ids) for samples in drawn for s in samples)
    read = sum(map(len, job.prompts))
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    rest = json.dumps({**head, "usage": usage})[:-1]
    return Answer(f'{rest}, "choices": [{", ".join(map(json.dumps, choices))}]}}'.encode(), JSON_TYPE)


def _job(data: bytes, service: Service) -> tuple[CompletionBody, GenerateJob]:
    body = bodies.read(CompletionBody, data)
    for name in ("presence_penalty", "frequency_penalty", "logit_bias", "suffix"):
        if getattr(body, name):
            raise invalid(name, "is not supported; leave it out")
    if body.best_of not in (None, body.n):
        raise invalid("best_of", f"is {body.best_of}; only n ({body.n}) is supported")
    if body.logprobs is not None and body.logprobs > 1:
        raise invalid("logprobs", f"is {body.logprobs}; only the sampled token's own are kept: 0 or 1", 1)
    engine, adapter = service.engine, None
    if body.model is not None and body.model != engine.info.name:
        if body.model not in engine.adapters:
            raise Problem(404, "model", f"model {body.model!r} is not served; {engine.info.name!r} is", field="model")
        adapter = body.model
    ids = _prompt_ids(body.prompt, service)
    settings = bodies.GenerateSettings(
        sampling=bodies.SamplingBody(
            max_new_tokens=body.max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=max(body.top_k, 0),
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            ignore_eos=body.ignore_eos,
            samples_per_prompt=body.n,
            seed=body.seed if body.seed is not None else uuid.uuid4().int & (2**62 - 1),
        ),
        adapter=adapter,
    )
    asked = Prompts({}, [np.asarray(one, np.int64) for one in ids], np.arange(len(ids)))
    return body, bodies.generate_job(asked, settings, engine, service.limits)


def _prompt_ids(prompt: Any, service: Service) -> list[list[int]]:
    """The prompts as ids, however the request gives them."""
    several = prompt if isinstance(prompt, list) and not (prompt and type(prompt[0]) is int) else [prompt]
    if len(several) > service.limits.sequences:
        raise invalid("prompt", f"has {len(several)} entries; at most {service.limits.sequences}", len(several))
    made = []
    for i, one in enumerate(several):
        field = "prompt" if several is not prompt else f"prompt[{i}]"
        if isinstance(one, str):
            bodies.check_text(field, one, service.limits)
            made.append(list(service.engine.tokenizer(one)["input_ids"]))
        elif isinstance(one, list) and all(type(token) is int for token in one):
            made.append([token if 0 <= token < 1 << 31 else -1 for token in one])
        else:
            raise invalid(field, "must be text or a list of token ids")
    return made


def _choice(index: int, sample: Sample, prompt: list[int], body: CompletionBody, service: Service) -> dict[str, Any]:
    tokenizer = service.engine.tokenizer
    text, finish = str(tokenizer.decode(sample.ids, skip_special_tokens=True)), sample.finish
    stops = [s for s in ([body.stop] if isinstance(body.stop, str) else body.stop or []) if s]
    cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=-1)
    if cut >= 0:
        text, finish = text[:cut], "stop"
    if body.echo:
        text = str(tokenizer.decode(prompt, skip_special_tokens=True)) + text
    choice: dict[str, Any] = {"index": index, "text": text, "finish_reason": finish, "logprobs": None}
    if body.logprobs is not None:
        tokens = [tokenizer.decode([i]) for i in sample.ids]
        choice["logprobs"] = {"tokens": tokens, "token_logprobs": sample.logprobs, "top_logprobs": None}
    if body.return_token_ids:
        choice["token_ids"], choice["prompt_token_ids"] = sample.ids, prompt
    return choice


async def _parts(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), PART_BYTES):
        yield body[start : start + PART_BYTES]
