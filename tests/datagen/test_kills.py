"""kill -9 at any point of generation: the same file, byte for byte, and nothing that was kept is asked again."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmdistill.cli import main
from llmdistill.datagen.generation import generate
from llmdistill.datagen.prompts import Prompts
from llmdistill.datagen.tables import write_rows
from tests.datagen.chat_endpoint import PROMPTS, ChatEndpoint, served
from tests.datagen.processes import PROCESSES

SETTINGS: dict[str, Any] = {"n": 2, "sampling": {"max_new_tokens": 64, "temperature": 0.8}, "judge": "math"}
CALLS = 5 * 2 * len(PROMPTS)  # of debate: two answers, two revisions, the judge
PATIENCE_S = 600.0  # a machine may be very busy


def started(prompts: Path, out: Path, *role: str, writer: str) -> Any:
    words = ["generate", "--prompts", str(prompts), "--writer", writer, "--out", str(out), "--n", "2", *role]
    process = PROCESSES.Process(
        target=command, args=([*words, "--max_new_tokens", "64", "--temperature", "0.8", "--judge", "math"],)
    )
    process.start()
    return process


def command(words: list[str]) -> None:
    sys.exit(main(words))


def killed_when(process: Any, reached: Callable[[], bool]) -> None:
    """kill -9 as soon as that is so, or not at all where it ends before."""
    end = time.monotonic() + PATIENCE_S
    while not reached() and process.is_alive():
        assert time.monotonic() < end, "the process came to nothing"
        time.sleep(0.002)
    process.kill()
    process.join()


def ended_well(process: Any) -> bool:
    process.join(PATIENCE_S)
    process.kill()  # none is left behind
    return process.exitcode == 0


def kept(out: Path) -> set[int]:
    """Seeds of the calls whose answers are on disk as whole lines."""
    file = Path(f"{out}.calls") / "calls.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return {int(json.loads(line)["name"][:16], 16) >> 1 for line in lines}


def kill_and_go_on(tmp_path: Path, writer: str, points: list[int], concurrency: int) -> None:
    """Kills the command when so many more calls were answered, again and again, then lets it end."""
    write_rows(tmp_path / "p.jsonl", PROMPTS)
    endpoint, out = ChatEndpoint(), tmp_path / "killed.jsonl"
    with served(endpoint) as server:
        calm = {"teacher": {"url": server.url}}
        generate(Prompts(str(tmp_path / "p.jsonl")), writer, calm, tmp_path / "calm.jsonl", **SETTINGS)
        asked = set(endpoint.seeds)
        endpoint.delay_s = 0.01
        role = ["--teacher", server.url, "--teacher.concurrency", str(concurrency)]
        kills = 0
        for more in [*points, None]:
            before, endpoint.bodies = kept(out), []
            process = started(tmp_path / "p.jsonl", out, *role, writer=writer)
            if more is None:
                assert ended_well(process)
            else:
                killed_when(process, lambda more=more: len(endpoint.bodies) >= more)
                kills += process.exitcode == -signal.SIGKILL
            again = {body["seed"] for body in endpoint.bodies}
            assert not again & before, "an answer that was on disk was asked for again"
            assert again <= asked
    assert kills == len(points)
    assert out.read_bytes() == (tmp_path / "calm.jsonl").read_bytes()


@pytest.mark.slow
def test_a_kill_in_the_middle_of_a_debate(tmp_path: Path) -> None:
    kill_and_go_on(tmp_path, "debate", [CALLS // 2], concurrency=4)


@pytest.mark.proof
@pytest.mark.parametrize("writer", ["plain", "debate"])
def test_twenty_kills_at_random_points(tmp_path: Path, writer: str) -> None:
    """Of 240 calls, four at a time; and of 48, one by one, so that there are some left for every kill."""
    drawn, most, concurrency = random.Random(writer), *((8, 4) if writer == "debate" else (1, 1))
    kill_and_go_on(tmp_path, writer, [drawn.randint(1, most) for _ in range(20)], concurrency)


@pytest.mark.proof
def test_a_kill_while_transformers_writes_in_float32(tmp_path: Path, tiny_run: Path) -> None:
    """Batches of one: in others the rounding of log-probs depends on the company, which a kill changes."""
    write_rows(tmp_path / "p.jsonl", PROMPTS[:12])
    role = {"model": str(tiny_run / "teacher"), "engine": "hf", "dtype": "float32", "batch_size": 1}
    words = [word for key, value in role.items() for word in (f"--teacher.{key}", str(value))]
    generate(Prompts(str(tmp_path / "p.jsonl")), "plain", {"teacher": role}, tmp_path / "calm.jsonl", **SETTINGS)
    out = tmp_path / "killed.jsonl"
    for more in (5, 12):
        process = started(tmp_path / "p.jsonl", out, *words, writer="plain")
        killed_when(process, lambda more=more: len(kept(out)) >= more)
        assert process.exitcode == -signal.SIGKILL and not out.exists()
    assert ended_well(started(tmp_path / "p.jsonl", out, *words, writer="plain"))
    assert out.read_bytes() == (tmp_path / "calm.jsonl").read_bytes()
