"""From an answer, whole or still being written, to what goes over the wire."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmdistill.service.answers import Answer
from llmdistill.service.gone import CallerGone, unless_gone
from llmdistill.service.limits import Limits
from llmdistill.service.parts import CutOff, Reading


def response(request: Request, answer: Answer, limits: Limits) -> Response:
    """What the caller of ``request`` gets."""
    if isinstance(answer.body, bytes):
        return Response(answer.body, media_type=answer.media_type)
    return PartsResponse(request, answer.body, answer.media_type, limits.silence_s)


class PartsResponse(Response):
    """A body in parts. Where it breaks off the connection ends before the body does, which its caller notices.

    Args:
        request: ends the reading when its caller hangs up.
        parts: read to their end, or closed before.
        silence_s: a caller that takes no part of it for so long is one that has hung up.
    """

    def __init__(self, request: Request, parts: Reading, media_type: str, silence_s: float) -> None:
        super().__init__(media_type=media_type)
        del self.headers["content-length"]
        self.request, self.parts, self.silence_s = request, parts, silence_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(CallerGone, TimeoutError, CutOff):
                await unless_gone(self.request, self._send(send))
        finally:
            self.parts.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self.parts:
            async with asyncio.timeout(self.silence_s):
                await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
