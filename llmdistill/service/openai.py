"""The OpenAI completions protocol, for clients that know nothing of distillation; ``openai_chat.py`` has chat's."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field

from llmdistill.service import requests as bodies
from llmdistill.service.answers import Answer, Work, Writing
from llmdistill.service.app import Service
from llmdistill.service.engine import GenerateJob, Sample, ScoreJob
from llmdistill.service.openai_stream import Listing, Piece, Row, TokenEvents, own_of, rows_of
from llmdistill.service.parts import Parts
from llmdistill.service.problems import Problem, invalid
from llmdistill.service.responses import response
from llmdistill.wire.blocks import ScoreBlock
from llmdistill.wire.bodies import Prompts
from llmdistill.wire.protocol import JSON_TYPE

EVENTS_TYPE = "text/event-stream"
Asked = TypeVar("Asked", bound="SampledBody")


class StreamOptions(BaseModel):
    include_usage: bool = False


class SampledBody(BaseModel):
    """The fields of both protocols that are honoured; others are refused when they would change what is sampled, else
    ignored."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: int = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1)] = 1
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    # whatever of these is set to something would change the distribution
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[str, float] | None = None

    @property
    def stops(self) -> list[str]:
        return [s for s in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if s]


class CompletionBody(SampledBody):
    prompt: Any  # text, ids, or a list of either: told apart below
    max_tokens: Annotated[int, Field(ge=0)] = 16
    logprobs: int | None = None
    echo: bool = False
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
        return response(request, answer, service.limits)


def _work(data: bytes, service: Service) -> Work:
    body = read_body(CompletionBody, data, ("suffix",))
    if body.best_of not in (None, body.n):
        raise invalid("best_of", f"is {body.best_of}; only n ({body.n}) is supported")
    adapter, listed = adapter_of(body, service), body.logprobs or 0
    check_listed("logprobs", listed, adapter, service)
    echoed = body.echo and body.logprobs is not None  # the prompt's tokens have log-probs too
    if echoed and adapter:
        raise invalid("logprobs", "of a prompt are the model's own; with an adapter leave it out, or echo")
    if not (body.max_tokens or body.echo):
        raise invalid("max_tokens", "is 0, which needs echo: true")
    job = sampled_job(body, _prompt_ids(body.prompt, service), max(body.max_tokens, 1), adapter, service)
    if body.stream and body.max_tokens and not echoed:
        head = head_of(body, "cmpl", "text_completion", service)
        return streamed(body, job, service, head, partial(_chunks, body, job, service), listed)
    ways = {"echoed": echoed, "draws": body.max_tokens > 0}
    return work_of(service, job, listed, partial(_answer, body, job, service), **ways)


def _chunks(body: CompletionBody, job: GenerateJob, service: Service, piece: Piece) -> Iterator[dict[str, Any]]:
    """A piece as an event."""
    text, prompt = piece.text, job.prompts[piece.index // body.n]
    if body.echo and piece.first:
        text = str(service.engine.tokenizer.decode(prompt, skip_special_tokens=True)) + text
    choice: dict[str, Any] = {"index": piece.index, "text": text, "finish_reason": piece.finish, "logprobs": None}
    if body.logprobs is not None:
        choice["logprobs"] = _logprobs(piece.ids, piece.logprobs, piece.rows, service)
    if body.return_token_ids:
        choice["token_ids"] = piece.ids
        choice |= {"prompt_token_ids": prompt} if piece.first else {}
    yield choice


def _answer(
    body: CompletionBody, job: GenerateJob, service: Service, drawn: list[list[Sample]], blocks: list[ScoreBlock]
) -> Answer:
    """The whole answer. It is written choice by choice: one call for all would keep the loop's thread from running."""
    choices = []
    for index, (prompt, sample) in enumerate(each(job, drawn)):
        text, finish = text_of(sample, body.stops, service)
        if body.echo:
            text = str(service.engine.tokenizer.decode(prompt, skip_special_tokens=True)) + text
        choice: dict[str, Any] = {"index": index, "text": text, "finish_reason": finish, "logprobs": None}
        if body.logprobs is not None:
            choice["logprobs"] = _listed(body.echo, prompt, sample, blocks[index] if blocks else None, service)
        if body.return_token_ids:
            choice["token_ids"], choice["prompt_token_ids"] = sample.ids, prompt
        choices.append(choice)
    head = head_of(body, "cmpl", "text_completion", service)
    if body.stream:  # what comes is what was sampled, a whole choice in each event
        return events(body, job, drawn, ({**head, "choices": [choice]} for choice in choices), head)
    return whole(head, choices, usage_of(job, drawn))


def _listed(
    echoed: bool, prompt: list[int], sample: Sample, block: ScoreBlock | None, service: Service
) -> dict[str, Any]:
    """As drawn; with lists of others, as the model says at temperature 1, and so of a prompt that is given back."""
    if block is None:
        return _logprobs(sample.ids, sample.logprobs, None, service)
    rows = rows_of(block) if block.header.top_k else None
    if not echoed:
        return _logprobs(sample.ids, own_of(block), rows, service)
    own: list[float | None] = [None, *own_of(block)]  # nothing says how likely the first token was
    return _logprobs(prompt + sample.ids, own, None if rows is None else [None, *rows], service)


def _logprobs(
    ids: Sequence[int], own: Sequence[float | None], rows: Sequence[Row | None] | None, service: Service
) -> dict[str, Any]:
    decode = service.engine.tokenizer.decode
    tokens = [str(decode([i])) for i in ids]
    found: dict[str, Any] = {"tokens": tokens, "token_logprobs": list(own), "top_logprobs": None}
    found["text_offset"] = list(itertools.accumulate(map(len, tokens[:-1]), initial=0)) if tokens else []
    if rows is not None:
        found["top_logprobs"] = [None if row is None else {decode([i]): p for i, p in row} for row in rows]
    return found


# ---------------------------------------------------------------- of both protocols


def read_body(kind: type[Asked], data: bytes, unsupported: Iterable[str] = ()) -> Asked:
    """The body, without what would change what is sampled and is not here.

    Raises:
        Problem: 400.
    """
    body = bodies.read(kind, data)
    for name in ("presence_penalty", "frequency_penalty", "logit_bias", *unsupported):
        if getattr(body, name):
            raise invalid(name, "is not supported; leave it out")
    return body


def adapter_of(body: SampledBody, service: Service) -> str | None:
    """The adapter that ``model`` names; None for the model itself.

    Raises:
        Problem: 404, it names neither.
    """
    name, info = body.model, service.engine.info
    if name is None or name == info.name:
        return None
    if name not in service.engine.adapters:
        raise Problem(404, "model", f"model {name!r} is not served; {info.name!r} is", field="model")
    return name


def check_listed(field: str, count: int, adapter: str | None, service: Service) -> None:
    """That so many likeliest tokens can be listed at every position.

    Raises:
        Problem: 400.
    """
    most = min(service.limits.top_k, service.engine.max_top_k)
    if not 0 <= count <= most:
        raise invalid(field, f"is {count}; 0 to {most}", most)
    if count and adapter:
        raise invalid(field, "lists tokens of the model itself; with an adapter leave it out, or 0", 0)


def sampled_job(
    body: SampledBody, ids: list[list[int]], new_tokens: int, adapter: str | None, service: Service
) -> GenerateJob:
    """What the engine is asked.

    Raises:
        Problem: 400.
    """
    sampling = bodies.checked(
        bodies.SamplingBody,
        {
            "max_new_tokens": new_tokens,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": max(body.top_k, 0),
            "min_p": body.min_p,
            "repetition_penalty": body.repetition_penalty,
            "ignore_eos": body.ignore_eos,
            "stop": body.stops,
            "samples_per_prompt": body.n,
            "seed": body.seed if body.seed is not None else uuid.uuid4().int & (2**62 - 1),
        },
    )
    settings = bodies.GenerateSettings(sampling=sampling, adapter=adapter)
    asked = Prompts({}, [np.asarray(one, np.int64) for one in ids], np.arange(len(ids)))
    return bodies.generate_job(asked, settings, service.engine, service.limits)


def work_of(
    service: Service,
    job: GenerateJob,
    listed: int,
    answer: Callable[[list[list[Sample]], list[ScoreBlock]], Answer],
    *,
    echoed: bool = False,
    draws: bool = True,
) -> Work:
    """Draws the samples of every prompt, and asks for the ``listed`` likeliest tokens of every sample in turn (none for
    0); ``answer`` writes both down, on a thread. Raises Problem 409 when other weights came between the two.

    Args:
        echoed: the prompt's tokens are asked about too.
        draws: False: there is the prompt alone.
    """

    async def work() -> Answer:
        fingerprint = service.engine.info.fingerprint
        drawn = [[Sample([], [], "length")] * job.sampling.samples_per_prompt for _ in job.prompts]
        if draws:
            drawn, fingerprint, _ = await service.samples(job)
        behind = each(job, drawn) if listed or echoed else []
        starts = [min(1, len(prompt)) if echoed else len(prompt) for prompt, _ in behind]
        texts = [(start, prompt + s.ids) for start, (prompt, s) in zip(starts, behind, strict=True)]
        jobs = [ScoreJob(ids, start, len(ids), listed) for start, ids in texts]
        blocks = await service.scored(jobs, fingerprint) if jobs else []
        return await asyncio.to_thread(answer, drawn, blocks)

    return work


def streamed(
    body: SampledBody,
    job: GenerateJob,
    service: Service,
    head: dict[str, Any],
    chunks: Callable[[Piece], Iterable[dict[str, Any]]],
    listed: int = 0,
) -> Work:
    """Events as tokens are sampled, each with the ``listed`` likeliest at its position."""

    async def write(parts: Parts) -> None:
        count, tokenizer = len(job.prompts) * body.n, service.engine.tokenizer
        whole_text = partial(text_of, stops=body.stops, service=service)
        events = TokenEvents(tokenizer, body.stops, count, parts, head, chunks, whole_text)
        if listed:
            listing = Listing(service.engine, job, listed, events)
            drawn, _, _ = await service.samples(job, told=listing.sampled, beside=listing.beside)
        else:
            drawn, _, _ = await service.samples(job, told=events.sampled)
            events.finished([sample for of in drawn for sample in of])
        asked = body.stream_options is not None and body.stream_options.include_usage
        events.last(usage_of(job, drawn) if asked else None)

    return Writing(EVENTS_TYPE, write, at_once=1)


def each(job: GenerateJob, drawn: list[list[Sample]]) -> list[tuple[list[int], Sample]]:
    """Every sample behind its prompt."""
    return [(prompt, sample) for prompt, of in zip(job.prompts, drawn, strict=True) for sample in of]


def text_of(sample: Sample, stops: Sequence[str], service: Service) -> tuple[str, str]:
    """What a sample says, up to the first stop string, and why it ends."""
    text = str(service.engine.tokenizer.decode(sample.ids, skip_special_tokens=True))
    cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=-1)
    return (text, sample.finish) if cut < 0 else (text[:cut], "stop")


def head_of(body: SampledBody, prefix: str, kind: str, service: Service) -> dict[str, Any]:
    head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time())}
    return {**head, "model": body.model or service.engine.info.name}


def usage_of(job: GenerateJob, drawn: list[list[Sample]]) -> dict[str, int]:
    written = sum(len(s.ids) for of in drawn for s in of)
    read = sum(map(len, job.prompts))
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def whole(head: dict[str, Any], choices: Sequence[dict[str, Any]], usage: dict[str, int]) -> Answer:
    """One body."""
    rest = json.dumps({**head, "usage": usage})[:-1]
    return Answer(f'{rest}, "choices": [{", ".join(map(json.dumps, choices))}]}}'.encode(), JSON_TYPE)


def events(
    body: SampledBody,
    job: GenerateJob,
    drawn: list[list[Sample]],
    chunks: Iterable[dict[str, Any]],
    head: dict[str, Any],
) -> Answer:
    """Server-sent events, the usage last where it is asked for."""
    lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    if body.stream_options and body.stream_options.include_usage:
        lines.append(f"data: {json.dumps({**head, 'choices': [], 'usage': usage_of(job, drawn)})}\n\n")
    return Answer("".join([*lines, "data: [DONE]\n\n"]).encode(), EVENTS_TYPE)


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
