"""Calls that end in time, and processes that never outlive whoever asked for them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmdistill.verify.workers import Pool
from tests.verify.jobs import job

JOB = "tests.verify.jobs:job"
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def pool() -> Iterator[Pool]:
    with contextlib.closing(Pool(JOB, time_limit_s=0.8, memory_limit_mb=256)) as one:
        yield one


def alive(pid: int) -> bool:
    """Whether a process runs. One that is dead and not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def soon(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def children() -> set[int]:
    """Our own children, zombies included."""
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


@pytest.mark.parametrize("text", ["plain", "line\nbreak", "\x00", "\ud800", "ü" * 300_000])
def test_requests_arrive_as_they_were_sent(pool: Pool, text: str) -> None:
    assert pool.call({"do": "echo", "echo": text}) == {"echo": text}


@pytest.mark.parametrize("request_", [{"do": "sleep", "s": 60}, {"do": "compute"}], ids=["sleeps", "computes"])
def test_a_call_that_takes_too_long_is_stopped(pool: Pool, request_: dict[str, Any]) -> None:
    before = pool.call({"do": "pid"})
    start = time.perf_counter()
    assert pool.call(request_) == {"timeout": "stopped after 0.8 s"}
    assert time.perf_counter() - start < 4
    after = pool.call({"do": "pid"})
    assert after["keeper"] == before["keeper"] and after["pid"] != before["pid"], "a new child of the same keeper"
    assert not alive(before["pid"])


def test_memory_is_limited(pool: Pool) -> None:
    assert pool.call({"do": "eat", "mb": 16}) == {"size": 16 << 20}
    assert pool.call({"do": "eat", "mb": 4096})["memory"]
    assert pool.call({"do": "echo", "echo": 1}) == {"echo": 1}


def test_a_crash_is_an_answer(pool: Pool) -> None:
    assert pool.call({"do": "exit"}) == {"timeout": "the worker process ended with status 3"}
    assert pool.call({"do": "crash"}) == {"timeout": f"the worker process ended with signal {int(signal.SIGSEGV)}"}
    assert "nothing here" in pool.call({"do": "raise"})["failed"]
    assert pool.call({"do": "print", "echo": 2}) == {"echo": 2}, "what is printed stays out of the replies"


@linux
def test_what_takes_a_worker_over_reaches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file, no network, no process, no token; the control is the same attempt here, which reaches all of it."""
    monkeypatch.setenv("ATTACK_TOKEN", "sesame")
    secret = tmp_path / "secret"
    secret.write_text("sesame")
    with contextlib.closing(Pool(JOB, time_limit_s=30)) as pool, socket.create_server(("127.0.0.1", 0)) as listener:
        request = {"do": "reach", "secret": str(secret), "port": listener.getsockname()[1]}
        assert pool.call(request) == {"reached": []}
        assert pool.call({"do": "fork"}) == {"timeout": f"the worker process ended with signal {int(signal.SIGSYS)}"}
        environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in pool.processes()]
        assert environments and not any(b"sesame" in text for text in environments)
        assert {"Landlock", "a system-call filter", "a limit on tasks"} <= set(pool.confinement())
        reached = job(request)["reached"]
    assert len(reached) == 7 and {"a file", "the network", "the environment"} <= set(reached)


def test_a_keeper_that_is_killed_is_replaced(pool: Pool) -> None:
    first = pool.call({"do": "pid"})
    os.kill(first["keeper"], signal.SIGKILL)
    second = pool.call({"do": "pid"})
    assert second["keeper"] != first["keeper"]
    assert soon(lambda: not alive(first["pid"]))


@linux
def test_a_child_that_computes_dies_with_its_keeper() -> None:
    pool = Pool(JOB, time_limit_s=60)
    first = pool.call({"do": "pid"})

    def compute() -> None:
        with contextlib.suppress(RuntimeError):  # the pool is closed under it
            pool.call({"do": "compute"})

    thread = threading.Thread(target=compute)
    thread.start()
    time.sleep(0.2)
    os.kill(first["keeper"], signal.SIGKILL)
    assert soon(lambda: not alive(first["pid"])), "it reads no pipe: only the kernel can tell it"
    pool.close()
    thread.join(10)
    assert not thread.is_alive() and pool.processes() == []


def test_closing_ends_the_calls_that_run() -> None:
    pool, raised = Pool(JOB, workers=2, time_limit_s=60), []

    def compute() -> None:
        try:
            pool.call({"do": "compute"})
        except RuntimeError as error:
            raised.append(str(error))

    threads = [threading.Thread(target=compute) for _ in range(3)]  # the third waits for a worker
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    pool.close()
    for thread in threads:
        thread.join(10)
    assert raised == ["the pool of worker processes is closed"] * 3 and pool.processes() == []


@linux
def test_time_outs_leave_nothing_behind() -> None:
    """50 time-outs: no child, zombie or open file more than before."""
    with contextlib.closing(Pool(JOB, time_limit_s=0.02)) as pool:
        pool.call({"do": "echo"})
        keeper = pool.processes()[0]

        def belongings() -> tuple[int, set[int], int, list[str]]:
            offspring = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
            return len(os.listdir("/proc/self/fd")), children(), len(os.listdir(f"/proc/{keeper}/fd")), offspring

        pool.call({"do": "echo"})
        before = belongings()
        for _ in range(50):
            assert "timeout" in pool.call({"do": "sleep", "s": 60})
        pool.call({"do": "echo"})
        after = belongings()
        assert after[:3] == before[:3]
        assert len(after[3]) == len(before[3]) == 1
    assert not alive(keeper)


@linux
def test_closing_leaves_nothing_behind() -> None:
    fds, mine = len(os.listdir("/proc/self/fd")), children()
    pool = Pool(JOB, workers=2)
    pids = [pid for reply in pool.map(lambda _: pool.call({"do": "pid"}), range(8)) for pid in reply.values()]
    pool.close()
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == fds and children() == mine
    assert soon(lambda: not any(alive(pid) for pid in pids))
    with pytest.raises(RuntimeError, match="closed"):
        pool.call({"do": "echo"})


PARENT = """
import json, os, sys, time
from llmdistill.verify import workers
pool = workers.Pool("tests.verify.jobs:job", time_limit_s=60)
found = pool.call({"do": "pid"})
if sys.argv[1] == "forked":  # as by a library that forks without Python's knowledge: nobody closes the pipe's copy
    workers._pools.clear()
    found["sibling"] = os.fork()
    if found["sibling"] == 0:
        time.sleep(60)
print(json.dumps(found), flush=True)
if sys.argv[1] == "busy":
    pool.call({"do": "compute"})
elif sys.argv[1] != "exits":
    time.sleep(60)
"""


@linux
@pytest.mark.parametrize("how", ["idle", "busy", "exits"])
def test_no_worker_outlives_its_parent(how: str) -> None:
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, how], stdout=subprocess.PIPE, cwd=root)
    assert parent.stdout is not None
    found = json.loads(parent.stdout.readline())
    if how == "exits":
        assert parent.wait(30) == 0
    else:
        assert alive(found["pid"]) and alive(found["keeper"])
        time.sleep(0.2 if how == "busy" else 0)
        parent.kill()
        parent.wait()
    parent.stdout.close()
    assert soon(lambda: not alive(found["pid"]) and not alive(found["keeper"])), found


@linux
def test_no_worker_outlives_its_parent_because_of_a_fork() -> None:
    """A forked sibling that keeps the keeper's pipe open does not keep the keeper."""
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, "forked"], stdout=subprocess.PIPE, cwd=root)
    assert parent.stdout is not None
    found = json.loads(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait()
        assert alive(found["sibling"])
        assert soon(lambda: not alive(found["pid"]) and not alive(found["keeper"])), found
    finally:
        os.kill(found["sibling"], signal.SIGKILL)
        parent.stdout.close()


def test_a_forked_child_has_workers_of_its_own(pool: Pool) -> None:
    keeper = pool.call({"do": "pid"})["keeper"]
    child = os.fork()
    if child == 0:
        try:
            mine = pool.processes() == [] and pool.call({"do": "pid"})["keeper"] not in (0, keeper)
            pool.close()
            os._exit(0 if mine else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert pool.call({"do": "pid"})["keeper"] == keeper, "the parent's worker has not noticed"


def test_calls_from_many_threads_share_the_workers() -> None:
    with contextlib.closing(Pool(JOB, workers=2, time_limit_s=10)) as pool:
        replies: list[Any] = []
        threads = [
            threading.Thread(target=lambda n=n: replies.append((n, pool.call({"do": "echo", "echo": n})["echo"])))
            for n in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(replies) == [(n, n) for n in range(16)]
        assert 1 <= len(pool.processes()) <= 2


def test_map_keeps_the_order_and_reads_little_ahead() -> None:
    taken = []

    def items() -> Iterator[int]:
        for n in range(100):
            taken.append(n)
            yield n

    with contextlib.closing(Pool(JOB, workers=2, time_limit_s=10)) as pool:
        results = pool.map(lambda n: pool.call({"do": "sleep", "s": 0.01 * (n % 3), "echo": n})["echo"], items())
        assert [next(results) for _ in range(10)] == list(range(10))
        assert len(taken) <= 10 + 4 * 2 + 1, "an endless stream of samples is not read into memory"
        results.close()  # type: ignore[attr-defined]


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="workers is 0"):
        Pool(JOB, workers=0)
    with pytest.raises(ValueError, match="time_limit_s is 0"):
        Pool(JOB, time_limit_s=0)
    pool = Pool("no.such.module:job")
    with contextlib.closing(pool), pytest.raises(RuntimeError, match="cannot start.*no.such|No module"):
        pool.call({})
