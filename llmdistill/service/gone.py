"""Work that ends with its caller: one who hangs up is noticed, and nothing is computed for nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

T = TypeVar("T")


class CallerGone(Exception):
    """The caller has hung up; there is nobody to answer."""


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What ``work`` gives, once the request's body has been read.

    Raises:
        CallerGone: the caller went first, and ``work`` was cancelled.
    """
    working = asyncio.ensure_future(work)
    going = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({working, going}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise CallerGone
        return working.result()
    finally:
        for task in (working, going):
            if not task.done():
                task.cancel()
        await asyncio.gather(working, going, return_exceptions=True)
        del working, going  # an error would hold them


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
