"""The service's routes and the shape of an error."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from llmdistill.service import openai, openai_chat
from llmdistill.service.answers import Answer
from llmdistill.service.app import Read, Service
from llmdistill.service.around import Around, problem_response
from llmdistill.service.bodies import content_type
from llmdistill.service.engine import EngineDead
from llmdistill.service.gone import CallerGone
from llmdistill.service.problems import Problem, first_line
from llmdistill.service.responses import response
from llmdistill.wire import protocol


def create_app(service: Service) -> ASGIApp:
    """The routes of ``service``."""
    app = FastAPI(title="llmdistill", docs_url=None, redoc_url=None, openapi_url=None)

    async def responded(request: Request, answer: Awaitable[Answer]) -> Response:
        try:
            return response(request, await answer, service.limits)
        except Problem as problem:
            # the frames of its traceback hold the body, in a cycle with it
            traceback.clear_frames(problem.__traceback__)
            return problem_response(problem)

    def posted(path: str, read: Read, *, kept: bool = True, waits: bool = False) -> None:
        async def endpoint(request: Request) -> Response:
            return await responded(request, service.answered(request, path, read, kept=kept, waits=waits))

        app.post(path)(endpoint)

    posted(protocol.SCORE, service.score)
    posted(protocol.SCORE_TEXT, service.score_text)
    posted(protocol.GENERATE, service.generate)
    posted(protocol.ADAPTERS, service.add_adapter, waits=True)
    posted(protocol.OFFER, service.offer, kept=False)  # what is true of it changes

    posted(protocol.JOIN, service.join, kept=False)
    posted(protocol.RECEIVE, service.receive)

    @app.post(protocol.WEIGHTS)
    async def weights(request: Request) -> Response:
        if content_type(request) == protocol.TENSORS_TYPE:
            return await responded(request, service.load_upload(request))
        return await responded(request, service.answered(request, protocol.WEIGHTS, service.load_folder, waits=True))

    @app.delete(protocol.ADAPTERS + "/{name}")
    async def remove_adapter(request: Request, name: str) -> Response:
        return await responded(request, service.remove_adapter(name))

    @app.get(protocol.HEAD)
    async def head(request: Request) -> Response:
        return await responded(request, service.answered(request, protocol.HEAD, service.head, kept=False))

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
        if service.weights.behind:
            raise Problem(503, "version", "weights that another replica has are still to be loaded", retry_after_s=1)
        return JSONResponse({"status": "ready", "teacher": service.engine.info.fingerprint})

    @app.get(protocol.METRICS)
    async def metrics() -> Response:
        return Response(await service.exposition(), media_type="text/plain; version=0.0.4")

    openai.add_routes(app, service)
    openai_chat.add_routes(app, service)

    @app.exception_handler(Problem)
    async def refused(request: Request, problem: Problem) -> Response:
        return problem_response(problem)

    @app.exception_handler(EngineDead)
    async def died(request: Request, error: EngineDead) -> Response:
        service.died()
        return problem_response(Problem(503, "dead", first_line(error), retry_after_s=10))

    @app.exception_handler(CallerGone)
    async def gone(request: Request, error: CallerGone) -> Response:
        return Response(status_code=499)

    @app.exception_handler(HTTPException)
    async def unrouted(request: Request, error: HTTPException) -> Response:
        shown = f"{request.method} {request.scope['path'][:200]}: {error.detail}"
        return problem_response(Problem(error.status_code, "route", shown))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return problem_response(Problem(500, "internal", f"{type(error).__name__}; the service's log has the details"))

    return Around(app, service)
