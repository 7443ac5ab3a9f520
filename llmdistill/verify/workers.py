"""Worker processes that can be stopped: calls with a hard limit on time and memory.

A worker is two processes. The *keeper* is started once with the library imported and warm, and does nothing but read a
request, hand it to the *child* that it forked of itself, and wait. A child that takes too long is killed and forked
anew in milliseconds, without another import. Signals and threads play no part, so calls may come from any thread.

    our process  --request, one line of JSON-->  keeper  --the same-->  child
                 <--reply, one line of JSON----          <------------

Text that a worker reads is a model's and may be written against the library: children are confined (confine_worker.py),
and neither they nor keepers have anything of our environment.

Nothing outlives its parent: the child asks the kernel to be killed with its keeper; the keeper ends when its standard
input does or when it is adopted by another process (a forked sibling may hold the other end of its pipe open).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from typing import Any

from llmdistill.verify.confine_identity import die_first
from llmdistill.verify.confine_worker import Confinement, clean_environment

Request = dict[str, Any]
Reply = dict[str, Any]

STARTUP_LIMIT_S = 180.0
GRACE_S = 5.0
LONGEST_LINE = 1 << 28
_START = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from llmdistill.verify.workers import keep; keep()"


class WorkerDied(RuntimeError):
    """A keeper ended that should not have. The call that saw it may be made again."""


class Pool:
    """Worker processes that answer requests with ``function``.

    Args:
        function: "module:name" of ``(request) -> reply``, both JSON objects. It may hang or eat memory.
        warm_up: requests that every keeper answers once before it forks, so that caches are filled.
        workers: how many calls run at a time; a keeper is started when it is first needed.
        time_limit_s: after this long a call's child is killed, and the reply is {"timeout": ...}.
        memory_limit_mb: what a child may allocate on top of what its keeper has.

    A pool that is inherited by a fork starts workers of its own there.
    """

    def __init__(
        self,
        function: str,
        *,
        warm_up: Iterable[Request] = (),
        workers: int = 1,
        time_limit_s: float = 5.0,
        memory_limit_mb: int = 1024,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers is {workers}; at least 1 is needed")
        if not time_limit_s > 0:
            raise ValueError(f"time_limit_s is {time_limit_s}; a number of seconds above 0 is needed")
        self.workers = workers
        self._settings = {
            "function": function,
            "warm_up": list(warm_up),
            "time_limit_s": time_limit_s,
            "memory_limit_mb": memory_limit_mb,
        }
        self._time_limit_s = time_limit_s
        self._begin()
        _pools.add(self)

    def _begin(self) -> None:
        self._closed = False
        self._keepers: list[_Keeper] = []
        self._lock = threading.Lock()
        # A None is the right to start a keeper. Last in, first out: idle slots are never started.
        self._free: queue.LifoQueue[_Keeper | None] = queue.LifoQueue()
        for _ in range(self.workers):
            self._free.put(None)

    def call(self, request: Request) -> Reply:
        """The function's reply; {"timeout": why} if it was stopped, {"failed": why} if it raised.

        Raises:
            RuntimeError: the pool is closed, or no worker can be started.
        """
        keeper = self._free.get()
        try:
            for _ in range(2):
                try:
                    if keeper is None:
                        keeper = self._new_keeper()
                        keeper.start(self._settings)
                    return keeper.call(request, self._time_limit_s)
                except WorkerDied as error:
                    died = error
                    self._discard(keeper)
                    keeper = None
            raise died
        except BaseException:  # a keeper that is left in the middle of an exchange is of no use to the next call
            self._discard(keeper)
            keeper = None
            raise
        finally:
            self._free.put(keeper)
            if self._closed:
                self._stop_idle()

    def _new_keeper(self) -> _Keeper:
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool of worker processes is closed")
            keeper = _Keeper()
            self._keepers.append(keeper)
            return keeper

    def _discard(self, keeper: _Keeper | None) -> None:
        if keeper is None:
            return
        with self._lock:
            if keeper in self._keepers:
                self._keepers.remove(keeper)
        keeper.stop()

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """``function`` of every item, in order, as many at a time as there are workers. Reads a little ahead only."""
        if self.workers == 1:
            yield from map(function, items)
            return
        with ThreadPoolExecutor(self.workers, thread_name_prefix="verdicts") as threads:
            ahead: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
            try:
                for item in items:
                    ahead.put(threads.submit(function, item))
                    if ahead.qsize() >= 4 * self.workers:
                        yield ahead.get().result()
                while not ahead.empty():
                    yield ahead.get().result()
            finally:
                while not ahead.empty():
                    ahead.get().cancel()

    def close(self) -> None:
        """Stop all workers. Calls that are running in other threads fail, with RuntimeError."""
        with self._lock:
            self._closed = True
            keepers = list(self._keepers)
        for keeper in keepers:
            keeper.kill()  # whoever waits for it sees its pipe end, and closes that; nobody closes it under them
        self._stop_idle()

    def _stop_idle(self) -> None:
        idle: list[_Keeper | None] = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._free.get_nowait())
        for keeper in idle:
            self._discard(keeper)
            self._free.put(None)

    def processes(self) -> list[int]:
        """The process ids of the keepers that run."""
        with self._lock:
            return [keeper.process.pid for keeper in self._keepers]

    def confinement(self) -> list[str]:
        """What confines the workers that run, in words."""
        with self._lock:
            return sorted({means for keeper in self._keepers for means in keeper.confined})

    def _after_fork(self) -> None:
        for keeper in self._keepers:
            keeper.disown()
        closed = self._closed
        self._begin()
        self._closed = closed


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _in_forked_child() -> None:
    for pool in list(_pools):
        pool._after_fork()


def _at_exit() -> None:
    for pool in list(_pools):
        pool.close()


os.register_at_fork(after_in_child=_in_forked_child)
atexit.register(_at_exit)


class _Keeper:
    """Our end of one keeper."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # its group is ours to kill, and Ctrl-C at the terminal is not its business
            env=clean_environment(),  # what takes a worker over finds no token in it
            bufsize=0,
        )
        assert self.process.stdin and self.process.stdout
        self.confined: list[str] = []
        self._in, self._out = self.process.stdin.fileno(), self.process.stdout.fileno()
        self._rest = b""

    def start(self, settings: dict[str, Any]) -> None:
        started = self._exchange(settings, STARTUP_LIMIT_S)
        if "failed" in started:
            raise RuntimeError(f"a worker process cannot start: {started['failed']}")
        self.confined = list(started["confined"])

    def call(self, request: Request, time_limit_s: float) -> Reply:
        # The keeper holds the time limit. Ours is for a keeper that is itself beyond hope.
        return self._exchange(request, time_limit_s + GRACE_S + 60.0)

    def _exchange(self, message: Request, limit_s: float) -> Reply:
        try:
            _write(self._in, json.dumps(message).encode() + b"\n", time.monotonic() + limit_s)
            line, self._rest = _read_line(self._out, self._rest, time.monotonic() + limit_s)
        except (OSError, EOFError, TimeoutError) as error:
            raise WorkerDied(f"a worker process ended without an answer ({type(error).__name__})") from error
        return dict(json.loads(line))

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Kill it, wait for it and close its pipes. For the thread that uses it."""
        self.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()

    def disown(self) -> None:
        """In a forked child: let go of the parent's pipes, and never touch its process."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.process.returncode = 0  # so that Popen's finaliser does not wait for somebody else's child


def _write(fd: int, data: bytes, deadline: float | None) -> None:
    view = memoryview(data)
    while view:
        _wait(fd, select.POLLOUT, deadline)
        view = view[os.write(fd, view[: select.PIPE_BUF]) :]


def _read_line(fd: int, rest: bytes, deadline: float | None) -> tuple[bytes, bytes]:
    chunks, size = [rest], len(rest)
    while b"\n" not in chunks[-1]:
        if size > LONGEST_LINE:  # no message of ours: nobody fills the memory of the one who reads
            raise OSError(f"a message of more than {LONGEST_LINE} bytes")
        _wait(fd, select.POLLIN, deadline)
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            raise EOFError
        chunks.append(chunk)
        size += len(chunk)
    line, _, rest = b"".join(chunks).partition(b"\n")
    return line, rest


def _wait(fd: int, event: int, deadline: float | None) -> None:
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


# The keeper's side ----------------------------------------------------------------------------------------------------


def keep() -> None:
    """Run as a keeper: the settings come first, then requests, on standard input."""
    requests, replies = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)  # what libraries print must not get between the replies
    parent = os.getppid()
    die_first()
    rest = b""
    child: _Child | None = None
    try:
        line, rest = _read_request(requests, rest, parent)
        settings = json.loads(line)
        try:
            module, _, name = settings["function"].partition(":")
            function = getattr(import_module(module), name)
            for request in settings["warm_up"]:
                function(request)
        except BaseException as error:
            _send(replies, {"failed": f"{type(error).__name__}: {error}"})
            return
        confinement = Confinement()
        _send(replies, {"ready": True, "confined": confinement.means})
        while True:
            line, rest = _read_request(requests, rest, parent)
            if child is None:
                child = _Child(function, settings["memory_limit_mb"], confinement)
            reply = child.answer(line, settings["time_limit_s"], requests, parent)
            if reply is None:
                return
            if reply.get("memory") and child.answered:
                # What earlier requests left in its caches is not this one's fault: once more in a fresh child.
                child.kill()
                child = _Child(function, settings["memory_limit_mb"], confinement)
                reply = child.answer(line, settings["time_limit_s"], requests, parent)
                if reply is None:
                    return
            if reply.get("memory"):
                child.kill()
            if "timeout" in reply or reply.get("memory"):
                child = None
            else:
                child.answered += 1
            _send(replies, reply)
    except (EOFError, OSError):
        pass
    finally:
        if child is not None:
            child.kill()


def _read_request(fd: int, rest: bytes, parent: int) -> tuple[bytes, bytes]:
    while True:
        if b"\n" in rest:
            line, _, rest = rest.partition(b"\n")
            return line, rest
        with contextlib.suppress(TimeoutError):
            _wait(fd, select.POLLIN, time.monotonic() + 1.0)
            line, rest = _read_line(fd, rest, time.monotonic() + STARTUP_LIMIT_S)
            return line, rest
        if os.getppid() != parent:
            raise EOFError


def _send(fd: int, reply: Reply) -> None:
    data = memoryview(json.dumps(reply).encode() + b"\n")
    while data:
        data = data[os.write(fd, data) :]


class _Child:
    """The keeper's end of the process that does the work."""

    def __init__(self, function: Callable[[Request], Reply], memory_limit_mb: int, confinement: Confinement) -> None:
        self._requests, self._replies = os.pipe(), os.pipe()
        self._rest = b""
        self.answered = 0
        keeper = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                _limit_memory(memory_limit_mb)
                confinement.enter(keeper, (self._requests[0], self._replies[1]))
                _work(function, self._requests[0], self._replies[1])
                status = 0
            finally:
                os._exit(status)
        os.close(self._requests[0])
        os.close(self._replies[1])

    def answer(self, line: bytes, time_limit_s: float, requests: int, parent: int) -> Reply | None:
        """The reply; None if nobody waits for it any more."""
        deadline = time.monotonic() + time_limit_s
        try:
            _write(self._requests[1], line + b"\n", deadline)
            while True:
                step = min(deadline, time.monotonic() + 0.5)
                with contextlib.suppress(TimeoutError):
                    reply, self._rest = _read_line(self._replies[0], self._rest, step)
                    return dict(json.loads(reply))
                if os.getppid() != parent or _hung_up(requests):
                    self.kill()
                    return None
                if time.monotonic() >= deadline:
                    self.kill()
                    return {"timeout": f"stopped after {time_limit_s:g} s"}
        except TimeoutError:
            self.kill()
            return {"timeout": f"stopped after {time_limit_s:g} s"}
        except (EOFError, OSError):
            status = self.kill()
            signalled = (
                f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
            )
            return {"timeout": f"the worker process ended with {signalled}"}

    def kill(self) -> int:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self._requests[1])
        os.close(self._replies[0])
        return status


def _hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)  # POLLHUP and POLLERR are always reported
    return bool(poll.poll(0))


def _work(function: Callable[[Request], Reply], requests: int, replies: int) -> None:
    rest = b""
    while True:
        try:
            line, rest = _read_line(requests, rest, None)
        except EOFError:
            return
        try:
            reply = function(json.loads(line))
        except MemoryError:
            reply = {"failed": "MemoryError", "memory": True}
        except RecursionError:
            reply = {"failed": "RecursionError"}
        except Exception as error:
            reply = {"failed": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc(limit=-3)[:2000]}
        _send(replies, reply)


def _limit_memory(megabytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm") as sizes:
            pages = int(sizes.read().split()[0])
        limit = pages * resource.getpagesize() + (megabytes << 20)
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
