"""Coroutines from where none is running, and from where one is (a notebook)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class EventLoop:
    """Runs coroutines to their end, one after another, on a loop of its own. A context manager."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> EventLoop:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result, or what it raises. Ctrl-C ends it."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._to_the_end(work)
        return _in_thread(lambda: self._to_the_end(work))  # a thread has one running loop at most

    def _to_the_end(self, work: Coroutine[Any, Any, T]) -> T:
        task = self._loop.create_task(work)
        try:
            return self._loop.run_until_complete(task)
        except BaseException:
            task.cancel()
            self._loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
            raise


def _in_thread(work: Callable[[], T]) -> T:
    future: Future[T] = Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=do, daemon=True).start()
    return future.result()
