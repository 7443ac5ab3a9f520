"""The service's routes, and what stands around all of them: the token, the counters, the shape of an error."""

from __future__ import annotations

import math
import secrets
import time
import traceback
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmdistill.service.app import Service, Work
from llmdistill.service.engine import EngineDead
from llmdistill.service.openai import add_routes
from llmdistill.service.problems import Problem, first_line
from llmdistill.wire import protocol

OPEN = (protocol.HEALTH, protocol.READY)  # without a token: load balancers ask


def create_app(service: Service) -> ASGIApp:
    """The routes of ``service``."""
    app = FastAPI(title="llmdistill", docs_url=None, redoc_url=None, openapi_url=None)

    def posted(path: str, read: Callable[[bytes], Work]) -> None:
        async def endpoint(request: Request) -> Response:
            try:
                answer = await service.answered(request, path, read)
                return Response(answer.body, media_type=answer.media_type)
            except Problem as problem:
                # the frames of its traceback hold the body, in a cycle with it
                traceback.clear_frames(problem.__traceback__)
                return problem_response(problem)

        app.post(path)(endpoint)

    posted(protocol.SCORE, service.score)
    posted(protocol.SCORE_TEXT, service.score_text)
    posted(protocol.GENERATE, service.generate)
    posted(protocol.ADAPTERS, service.add_adapter)

    @app.post(protocol.WEIGHTS)
    async def weights(request: Request) -> Response:
        if request.headers.get("content-type") == protocol.TENSORS_TYPE:
            answer = await service.load_upload(request)
        else:
            answer = await service.answered(request, protocol.WEIGHTS, service.load_folder)
        return Response(answer.body, media_type=answer.media_type)

    @app.delete(protocol.ADAPTERS + "/{name}")
    async def remove_adapter(name: str) -> Response:
        answer = await service.remove_adapter(name)
        return Response(answer.body, media_type=answer.media_type)

    @app.get(protocol.INFO)
    async def info() -> dict[str, Any]:
        return service.info()

    @app.get(protocol.HEALTH)
    async def health() -> Response:
        if service.dead:
            raise Problem(503, "dead", "the engine has died")
        return JSONResponse({"status": "ok"})

    @app.get(protocol.READY)
    async def ready() -> Response:
        if service.dead or service.gate.draining:
            raise Problem(503, "draining", "the service is going down", retry_after_s=5)
        return JSONResponse({"status": "ready", "teacher": service.engine.info.fingerprint})

    @app.get(protocol.METRICS)
    async def metrics() -> Response:
        return Response(service.exposition(), media_type="text/plain; version=0.0.4")

    add_routes(app, service)

    @app.exception_handler(Problem)
    async def refused(request: Request, problem: Problem) -> Response:
        return problem_response(problem)

    @app.exception_handler(EngineDead)
    async def died(request: Request, error: EngineDead) -> Response:
        service.died()
        return problem_response(Problem(503, "dead", first_line(error), retry_after_s=10))

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
        shown = f"{request.method} {request.scope['path'][:200]}: {error.detail}"
        return problem_response(Problem(error.status_code, "route", shown))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return problem_response(Problem(500, "internal", f"{type(error).__name__}; the service's log has the details"))

    return Around(app, service)


class Around:
    """Token and counters, around everything. Plain ASGI: a middleware class would keep bodies in reference cycles."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), [500]

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        try:
            if self._allowed(scope):
                await self.app(scope, receive, noting)
            else:
                words = "the Authorization header must be 'Bearer' and this service's token"
                await problem_response(Problem(401, "token", words))(scope, receive, noting)
        finally:
            # never the raw path: a label for each would be kept for ever
            endpoint = getattr(scope.get("route"), "path", "unknown")
            self.service.metrics.requests.labels(endpoint, status[0]).inc()
            self.service.metrics.seconds.labels(endpoint).observe(time.monotonic() - started)

    def _allowed(self, scope: Scope) -> bool:
        token = self.service.token
        if token is None or scope["path"] in OPEN:
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return secrets.compare_digest(given, f"Bearer {token}".encode())


def problem_response(problem: Problem) -> Response:
    wait = problem.retry_after_s
    # whole seconds are all that HTTP knows; clients that read the other one come back sooner
    headers = (
        {} if wait is None else {"Retry-After": str(math.ceil(wait)), "Retry-After-Ms": str(math.ceil(1000 * wait))}
    )
    return JSONResponse(problem.body(), problem.status, headers)
