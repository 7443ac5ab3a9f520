"""The service's HTTP side: from a body to the engine and back. The protocol is in :mod:`llmdistill.service.wire`."""

from __future__ import annotations

import asyncio
import json
import math
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from safetensors import SafetensorError, safe_open
from starlette.exceptions import HTTPException

from llmdistill.service import requests as bodies
from llmdistill.service import wire
from llmdistill.service.answers import Answer, Answers
from llmdistill.service.blocks import ScoreBlock, encode
from llmdistill.service.engine import Engine, EngineDead, ScoreJob
from llmdistill.service.gate import Gate
from llmdistill.service.limits import Limits
from llmdistill.service.metrics import Metrics
from llmdistill.service.problems import Problem, invalid
from llmdistill.service.text import tokenized

REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
OPEN = (wire.HEALTH, wire.READY)  # without a token: load balancers ask
Compute = Callable[[bytes], Awaitable[Answer]]


class Service:
    """One engine, its queue, and what it remembers.

    Args:
        token: what callers have to show; None: nothing.
        weight_folders: where weights and adapters may be read from.
        accept_weights: whether weights may be uploaded.
        on_dead: called once when the engine will not answer any more.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits | None = None,
        *,
        token: str | None = None,
        weight_folders: Sequence[Path] = (),
        accept_weights: bool = False,
        on_dead: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine, self.limits, self.token = engine, limits or Limits(), token
        self.weight_folders, self.accept_weights, self.on_dead = list(weight_folders), accept_weights, on_dead
        self.gate = Gate(self.limits)
        self.answers = Answers(self.limits.answers_bytes, self.limits.answers_s)
        self.metrics = Metrics()
        self.policy_version = 0
        self.dead = False

    # ---------------------------------------------------------------- what is computed

    async def score(self, data: bytes) -> Answer:
        body = bodies.read(bodies.ScoreBody, data)
        jobs = bodies.score_jobs(body, self.engine, self.limits)
        return await self._blocks(jobs, body.dtype, body.teacher, {})

    async def score_text(self, data: bytes) -> Answer:
        body = bodies.read(bodies.TextBody, data)
        items = [tokenized(self.engine.tokenizer, i, item) for i, item in enumerate(body.items)]
        score = bodies.ScoreBody(
            sequences=[item.prompt_ids + item.ids for item in items],
            positions=[(len(item.prompt_ids), len(item.prompt_ids) + len(item.ids)) for item in items],
            top_k=body.top_k,
        )
        jobs = bodies.score_jobs(score, self.engine, self.limits)
        return await self._blocks(jobs, body.dtype, body.teacher, {"items": [asdict(item) for item in items]})

    async def _blocks(self, jobs: list[ScoreJob], dtype: str, expected: str | None, extra: dict[str, Any]) -> Answer:
        async with self.gate.admitted(sum(job.stop for job in jobs)):
            self._expect(expected)
            blocks = await self.engine.score(jobs)
            info, version = self.engine.info, self.policy_version
        positions = sum(job.stop - job.start for job in jobs)
        head = {
            "protocol": wire.PROTOCOL_VERSION,
            "teacher": info.fingerprint,
            "tokenizer": info.tokenizer,
            "policy_version": version,
            "positions": positions,
            **extra,
        }
        data = await asyncio.to_thread(_packed, head, blocks, dtype)
        self.metrics.positions.inc(positions)
        self.metrics.evidence.inc(len(data))
        return Answer(data, wire.BLOCKS_TYPE)

    async def generate(self, data: bytes) -> Answer:
        body = bodies.read(bodies.GenerateBody, data)
        job = bodies.generate_job(body, self.engine, self.limits)
        n = job.sampling.samples_per_prompt
        async with self.gate.admitted(sum(n * (len(ids) + job.sampling.max_new_tokens) for ids in job.prompts)):
            self._expect(body.teacher)
            drawn = await self.engine.generate(job)
            fingerprint, version = self.engine.info.fingerprint, self.policy_version
        self.metrics.generated.inc(sum(len(sample.ids) for samples in drawn for sample in samples))
        completions = [[asdict(sample) for sample in samples] for samples in drawn]
        return _json({"teacher": fingerprint, "policy_version": version, "completions": completions})

    # ---------------------------------------------------------------- weights and adapters

    async def load_folder(self, data: bytes) -> Answer:
        body = bodies.read(bodies.WeightsBody, data)
        return await self._load(bodies.allowed_folder(body.path, self.weight_folders), False, body.policy_version)

    async def load_upload(self, request: Request) -> Answer:
        """Weights in the body: written to memory-backed files as they come, then loaded at once."""
        if not self.accept_weights:
            raise Problem(403, "weights", "this service takes no weights; start it with --updatable")
        query = request.query_params
        version, partial = query.get("policy_version", ""), query.get("partial", "false") in ("true", "1")
        if not version.isdecimal():
            raise invalid("policy_version", f"is {version!r}; it must be a whole number")
        root = "/dev/shm" if Path("/dev/shm").is_dir() else None
        folder = Path(tempfile.mkdtemp(prefix="llmdistill-weights-", dir=root))
        try:
            with (folder / "model.safetensors").open("wb") as file:
                received = 0
                async for chunk in request.stream():
                    received += len(chunk)
                    if received > self.limits.weights_bytes:
                        raise bodies.too_large(self.limits.weights_bytes)
                    file.write(chunk)
            return await self._load(folder, partial, int(version))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def _load(self, folder: Path, partial: bool, version: int) -> Answer:
        if not self.accept_weights:
            raise Problem(403, "weights", "this service takes no weights; start it with --updatable")
        _check_files(folder)
        async with self.gate.alone():
            try:
                await self.engine.load_weights(folder, partial)
            except (ValueError, OSError) as error:
                raise invalid("weights", f"were refused, the old ones stay: {error}") from error
            self.policy_version = version
            return _json({"teacher": self.engine.info.fingerprint, "policy_version": version})

    async def add_adapter(self, data: bytes) -> Answer:
        body = bodies.read(bodies.AdapterBody, data)
        folder = bodies.allowed_folder(body.path, self.weight_folders)
        async with self.gate.alone():
            try:
                await self.engine.add_adapter(body.name, folder)
            except Exception as error:
                raise invalid("path", f"holds no adapter for this model: {str(error).splitlines()[0]}") from error
        return _json({"adapters": list(self.engine.adapters)})

    async def remove_adapter(self, name: str) -> Answer:
        if name not in self.engine.adapters:
            raise Problem(404, "adapter", f"adapter {name!r} is not loaded", field="name")
        async with self.gate.alone():
            await self.engine.remove_adapter(name)
        return _json({"adapters": list(self.engine.adapters)})

    # ---------------------------------------------------------------- state

    def info(self) -> dict[str, Any]:
        engine, limits, info = self.engine, self.limits, self.engine.info
        return {
            "protocol": wire.PROTOCOL_VERSION,
            "name": info.name,
            "teacher": info.fingerprint,
            "tokenizer": info.tokenizer,
            "vocab_size": info.vocab_size,
            "eos_ids": list(info.eos_ids),
            "context_length": min(info.context_length, engine.max_model_len),
            "template": info.template,
            "engine": engine.kind,
            "dtype": engine.dtype,
            "policy_version": self.policy_version,
            "chosen_ids": engine.chosen_ids,
            "weights": self.accept_weights,
            "adapters": list(engine.adapters),
            "limits": {
                "top_k": min(limits.top_k, engine.max_top_k),
                "sequence_tokens": min(limits.sequence_tokens, engine.max_model_len),
                "sequences": limits.sequences,
                "positions": limits.positions,
                "new_tokens": limits.new_tokens,
                "body_bytes": limits.body_bytes,
                "in_flight": limits.in_flight,
            },
        }

    def exposition(self) -> bytes:
        """The metrics as they are now."""
        m, gate = self.metrics, self.gate
        m.in_house.set(gate.requests)
        m.tokens.set(gate.tokens)
        m.version.set(self.policy_version)
        m.replayed.set(self.answers.replayed)
        m.kept.set(self.answers.bytes)
        return m.text()

    def died(self) -> None:
        if not self.dead:
            self.dead = True
            self.on_dead()

    def _expect(self, fingerprint: str | None) -> None:
        mine = self.engine.info.fingerprint
        if fingerprint is not None and fingerprint != mine:
            raise Problem(
                409,
                "fingerprint",
                f"the request expects weights {fingerprint}; here are {mine}",
                field="teacher",
            )


def create_app(service: Service) -> FastAPI:
    """The routes of ``service``."""
    app = FastAPI(title="llmdistill", docs_url=None, redoc_url=None, openapi_url=None)

    def posted(path: str, compute: Compute) -> None:
        async def endpoint(request: Request) -> Response:
            data = await bodies.read_body(request, service.limits.body_bytes)
            name = request.headers.get("x-request-id")
            if name is not None and not REQUEST_ID.fullmatch(name):
                raise invalid("X-Request-Id", "must be 1 to 128 letters, digits or _.:-")
            # the path is part of what is asked
            answer = await service.answers.get(name, path.encode() + b"\0" + data, lambda: compute(data))
            return Response(answer.body, media_type=answer.media_type)

        app.post(path)(endpoint)

    posted(wire.SCORE, service.score)
    posted(wire.SCORE_TEXT, service.score_text)
    posted(wire.GENERATE, service.generate)
    posted(wire.ADAPTERS, service.add_adapter)

    @app.post(wire.WEIGHTS)
    async def weights(request: Request) -> Response:
        if request.headers.get("content-type") == wire.TENSORS_TYPE:
            answer = await service.load_upload(request)
        else:
            answer = await service.load_folder(await bodies.read_body(request, service.limits.body_bytes))
        return Response(answer.body, media_type=answer.media_type)

    @app.delete(wire.ADAPTERS + "/{name}")
    async def remove_adapter(name: str) -> Response:
        answer = await service.remove_adapter(name)
        return Response(answer.body, media_type=answer.media_type)

    @app.get(wire.INFO)
    async def info() -> dict[str, Any]:
        return service.info()

    @app.get(wire.HEALTH)
    async def health() -> Response:
        if service.dead:
            raise Problem(503, "dead", "the engine has died")
        return JSONResponse({"status": "ok"})

    @app.get(wire.READY)
    async def ready() -> Response:
        if service.dead or service.gate.draining:
            raise Problem(503, "draining", "the service is going down", retry_after_s=5)
        return JSONResponse({"status": "ready", "teacher": service.engine.info.fingerprint})

    @app.get(wire.METRICS)
    async def metrics() -> Response:
        return Response(service.exposition(), media_type="text/plain; version=0.0.4")

    from llmdistill.service.openai import add_routes

    add_routes(app, service)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
        return _problem(Problem(error.status_code, "route", f"{request.method} {request.url.path}: {error.detail}"))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return _problem(Problem(500, "internal", f"{type(error).__name__}; the service's log has the details"))

    @app.middleware("http")
    async def around(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        """Token, errors, counters."""
        started = time.monotonic()
        try:
            _check_token(request, service.token)
            response = await call_next(request)
        except Problem as problem:
            response = _problem(problem)
        except EngineDead as error:
            service.died()
            response = _problem(Problem(503, "dead", str(error), retry_after_s=10))
        route = request.scope.get("route")
        endpoint = getattr(route, "path", "unknown")  # never the raw path: a label for each would be kept for ever
        service.metrics.requests.labels(endpoint, response.status_code).inc()
        service.metrics.seconds.labels(endpoint).observe(time.monotonic() - started)
        return response

    return app


def _check_token(request: Request, token: str | None) -> None:
    if token is None or request.url.path in OPEN:
        return
    given = request.headers.get("authorization", "")
    if not secrets.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise Problem(401, "token", "the Authorization header must be 'Bearer' and this service's token")


def _check_files(folder: Path) -> None:
    """Refuses what is no safetensors file before the engine hears of it."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise invalid("weights", f"are missing: no safetensors files in {folder.name!r}")
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise invalid("weights", f"were refused, the old ones stay: no safetensors file: {error}") from None


def _packed(head: dict[str, Any], blocks: Sequence[ScoreBlock], dtype: str) -> bytes:
    return wire.pack_frames([json.dumps(head).encode(), *(encode(block, dtype) for block in blocks)])


def _json(content: dict[str, Any]) -> Answer:
    return Answer(json.dumps(content).encode(), "application/json")


def _problem(problem: Problem) -> Response:
    headers = {} if problem.retry_after_s is None else {"Retry-After": str(math.ceil(problem.retry_after_s))}
    return JSONResponse(problem.body(), problem.status, headers)
