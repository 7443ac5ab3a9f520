"""What stands around all routes: who may ask, how many at one time, and the counters.

Plain ASGI: a middleware class would keep bodies in reference cycles.
"""

from __future__ import annotations

import ipaddress
import math
import re
import secrets
import time

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmdistill.service.app import Service
from llmdistill.service.fair import CLIENT
from llmdistill.service.problems import Problem
from llmdistill.wire import protocol

OPEN = (protocol.HEALTH, protocol.READY)  # without a token, and at any load: load balancers ask
# What a page of another origin cannot send without asking first, which nobody here answers.
TYPES = (protocol.JSON_TYPE, protocol.IDS_TYPE, protocol.TENSORS_TYPE)

NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


class Around:
    """Wraps the routes of a service."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service
        self.callers = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), [500]

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                message["headers"] = [*message.get("headers", ()), *self._weights()]
            await send(message)

        self.callers += 1
        asking = CLIENT.set(_client(scope))
        try:
            if refusal := self._refusal(scope):
                await problem_response(refusal)(scope, receive, noting)
            else:
                await self.app(scope, receive, noting)
        finally:
            self.callers -= 1
            CLIENT.reset(asking)
            # never the raw path: a label for each would be kept for ever
            endpoint = getattr(scope.get("route"), "path", "unknown")
            self.service.metrics.requests.labels(endpoint, status[0]).inc()
            self.service.metrics.seconds.labels(endpoint).observe(time.monotonic() - started)

    def _weights(self) -> list[tuple[bytes, bytes]]:
        """Which weights are here, in every answer."""
        version, teacher = self.service.weights.policy_version, self.service.engine.info.fingerprint
        return [(protocol.VERSION_HEADER, str(version).encode()), (protocol.TEACHER_HEADER, teacher.encode())]

    def _refusal(self, scope: Scope) -> Problem | None:
        """Why the request is not looked at."""
        headers, secrets_here = Headers(scope=scope), self.service.secrets
        if secrets_here and scope["path"] not in OPEN and not _shows_one_of(headers, secrets_here):
            return Problem(401, "token", "the Authorization header must be 'Bearer' and this service's token")
        if not secrets_here and not _is_local(headers.get("host", "")):
            words = "there is no token, so only this machine is answered, by a name of its own (localhost, 127.0.0.1)"
            return Problem(421, "host", words, field="Host")
        if scope["path"] in OPEN:
            return None
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if scope["method"] == "POST" and kind not in TYPES:
            shown = repr(kind[:60]) if kind else "missing"
            return Problem(415, "type", f"the content type is {shown}; it must be one of {', '.join(TYPES)}")
        if self.callers > self.service.limits.callers:
            return Problem(503, "busy", f"{self.callers} callers at one time", retry_after_s=1)
        return None


def _client(scope: Scope) -> str:
    """Whom a request is for, among whom the engine is shared out: who it says, else where it comes from."""
    said = Headers(scope=scope).get("x-client-id", "")
    return said if NAME.fullmatch(said) else str((scope.get("client") or ("",))[0])


def _shows_one_of(headers: Headers, known: list[str]) -> bool:
    given = headers.get("authorization", "").encode()
    # each is compared: how long it takes does not tell which one it is
    return any([secrets.compare_digest(given, f"Bearer {secret}".encode()) for secret in known])


def _is_local(host: str) -> bool:
    """Whether a Host header names this machine as such: a name that somebody else's DNS leads here does not."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name.lower() == "localhost" or name.lower().endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def problem_response(problem: Problem) -> Response:
    wait = problem.retry_after_s
    # whole seconds are all that HTTP knows; clients that read the other one come back sooner
    headers = (
        {} if wait is None else {"Retry-After": str(math.ceil(wait)), "Retry-After-Ms": str(math.ceil(1000 * wait))}
    )
    return JSONResponse(problem.body(), problem.status, headers)
