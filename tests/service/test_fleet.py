"""``llmdistill serve --ray``: two replicas on this machine, of which one dies under load."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from llmdistill.errors import UserError
from llmdistill.service.serve import check, parsed
from llmdistill.teachers.remote import RemoteTeacher
from llmdistill.texts import collate
from tests import tiny
from tests.service.inprocess import SEQUENCES, assert_same, expected
from tests.service.process import ServiceProcess

RAY = Path(sys.prefix) / "ray"  # where `make test` puts it, apart from vLLM, which looks for it


def ray_path() -> dict[str, str]:
    """The environment of a process that can import Ray; skips where it is not installed."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), str(RAY), os.environ.get("PYTHONPATH", "")])
    if importlib.util.find_spec("ray") is None and not (RAY / "ray").is_dir():
        pytest.skip("no Ray here: make test installs it")
    return {"PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("fleet")
    tiny.llama(1).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def fleet(model: str, *options: str) -> ServiceProcess:
    common = ("--ray", "--engine", "hf", "--dtype", "float32", "--max_model_len", "128", "--replica_cpus", "0.5")
    return ServiceProcess(model, *common, *options, variables=ray_path())


def replicas() -> set[int]:
    """Their process numbers, of every fleet here: Ray names an actor's process after it."""
    listed = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout
    return {int(line.split()[0]) for line in listed.splitlines() if "ServeReplica:llmdistill" in line}


@pytest.mark.slow
def test_one_of_two_replicas_is_killed_under_load_and_nothing_is_lost(model: str) -> None:
    before = replicas()
    with fleet(model, "--replicas", "2") as service:
        teacher = RemoteTeacher(service.url, lossless=True, in_flight=4, timeout_s=60.0, max_outage_s=300.0)
        rollout = collate([ids[:2] for ids in SEQUENCES], [ids[2:] for ids in SEQUENCES], pad_id=0)
        asked, killed, wanted = [0], threading.Event(), expected(8)
        mine = sorted(replicas() - before)
        assert len(mine) == 2

        def ask(number: int) -> None:
            asked[0] += 1
            if asked[0] == 40:
                os.kill(mine[0], signal.SIGKILL)
                killed.set()
            assert_same(teacher.score(rollout, 8), wanted)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(ask, range(80)))
        assert killed.is_set()
        teacher.close()
        assert service.terminate() == 0


@pytest.mark.proof
def test_replicas_come_with_the_load_and_go_with_it_and_nothing_is_lost(model: str) -> None:
    """One, two while eight ask at one time, one again while one asks: every answer of all that time is right."""
    before, wanted = replicas(), expected(8)
    scaling = (
        "--replicas",
        "1",
        "--max_replicas",
        "2",
        "--queue_depth",
        "2",
        "--scale_up_s",
        "1",
        "--scale_down_s",
        "5",
    )
    rollout = collate([ids[:2] for ids in SEQUENCES], [ids[2:] for ids in SEQUENCES], pad_id=0)
    with fleet(model, *scaling) as service:
        teacher = RemoteTeacher(service.url, lossless=True, in_flight=8, timeout_s=60.0, max_outage_s=120.0)
        began, answers, seen = time.monotonic(), [0], list[tuple[float, int, int]]()

        def until(count: int, at_once: int) -> None:
            """Asks until there are so many replicas."""
            over = threading.Event()

            def ask() -> None:
                while not over.is_set():
                    assert_same(teacher.score(rollout, 8), wanted)
                    answers[0] += 1

            with ThreadPoolExecutor(at_once) as threads:
                asking = [threads.submit(ask) for _ in range(at_once)]
                end = time.monotonic() + 200
                while (
                    len(replicas() - before) != count and time.monotonic() < end and not any(a.done() for a in asking)
                ):
                    time.sleep(0.5)
                over.set()
                for one in asking:
                    one.result()
            assert len(replicas() - before) == count
            seen.append((time.monotonic() - began, count, answers[0]))

        assert len(replicas() - before) == 1
        until(2, at_once=8)
        until(1, at_once=1)
        until(2, at_once=8)
        print("; ".join(f"after {s:.0f} s {count} replicas, {n} answers" for s, count, n in seen))
        print("".join(line for line in service.log if "replicas" in line))
        teacher.close()
        assert service.terminate() == 0


@pytest.mark.proof
def test_nodes_that_die_are_a_line_each_and_no_answer_is_lost(model: str) -> None:
    """A node of two, under load; then the head, without which there is no fleet."""
    command = [sys.executable, "-m", "tests.service.ray_cluster"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    cluster = subprocess.Popen(command, env={**os.environ, **ray_path()}, text=True, **pipes)
    assert cluster.stdin is not None and cluster.stdout is not None
    service = fleet(
        model, "--ray_address", cluster.stdout.readline().strip(), "--replicas", "2", "--replica_cpus", "0.6"
    )
    rollout = collate([ids[:2] for ids in SEQUENCES], [ids[2:] for ids in SEQUENCES], pad_id=0)
    over, answers, wanted = threading.Event(), [0], expected(8)

    def told(words: str) -> bool:
        end = time.monotonic() + 120
        while not any(words in line for line in service.log) and time.monotonic() < end:
            time.sleep(0.5)
        return any(words in line for line in service.log)

    try:
        service.start()
        teacher = RemoteTeacher(service.url, lossless=True, in_flight=2, timeout_s=60.0, max_outage_s=200.0)

        def ask() -> None:
            while not over.is_set():
                assert_same(teacher.score(rollout, 8), wanted)
                answers[0] += 1

        with ThreadPoolExecutor(2) as threads:
            asking = [threads.submit(ask) for _ in range(2)]
            print("kill", file=cluster.stdin, flush=True)
            died = told("1 of 2 replicas: 1 starting, Ray node ")
            over.set()
            for one in asking:
                one.result()
        assert died and answers[0] > 0
        print("headless", file=cluster.stdin, flush=True)
        assert told("the Ray cluster is gone: ") and service.process is not None and service.process.wait(60) == 1
        lines = [line for line in service.log if "task_manager.cc" not in line]  # Ray's own, of the head
        print(f"{answers[0]} answers", "".join(lines), sep="\n")
        assert len([line for line in lines if line.strip()]) <= 5
        teacher.close()
    finally:
        service.__exit__(None, None, None)
        cluster.kill()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--replicas", "0"], "--replicas is 0; it must be at least 1"),
        (["--queue_depth", "0"], "--queue_depth is 0.0; it must be at least 0.1"),
        (["--replicas", "3", "--max_replicas", "2"], "--max_replicas 2 is below --replicas 3"),
        (["--max_replicas", "4", "--updatable"], "--updatable with several replicas needs --versions"),
    ],
)
def test_a_fleet_that_cannot_be_is_refused_in_a_line(options: list[str], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        check(parsed(["--ray", "--model", "M", *options]), None)


@pytest.mark.proof
def test_a_cluster_that_is_not_there_is_named(model: str) -> None:
    with pytest.raises(RuntimeError, match="--ray_address 127.0.0.1:1: no Ray cluster answers there.*Fix: `ray start"):
        fleet(model, "--ray_address", "127.0.0.1:1").start()
