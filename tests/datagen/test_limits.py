"""What generation holds at one time, and a disk that is full."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest

from llmdistill.datagen.engines.endpoint import CHAT
from llmdistill.datagen.generation import generate
from llmdistill.datagen.prompts import Prompts
from llmdistill.datagen.schema import Trace
from llmdistill.datagen.tables import write_rows
from llmdistill.datagen.writing import trace
from llmdistill.errors import UserError
from tests.datagen.chat_endpoint import PROMPTS, ChatEndpoint, is_probe, served

ROWS = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(120)]
SAMPLING = {"max_new_tokens": 32}


def test_rows_are_read_as_the_model_keeps_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 120 prompts no more are under way than twice the four that the engine takes."""
    read = asked = most = 0
    original = Prompts.read

    def counting(self: Prompts, row: Any) -> Any:
        nonlocal read
        read += 1
        return original(self, row)

    async def write(row: Any, ask: Any) -> list[Trace]:
        nonlocal asked, most
        most = max(most, read - asked)
        reply = await ask("teacher", row["prompt"])
        asked += 1
        return [trace(row, ask, "plain", reply)]

    monkeypatch.setattr(Prompts, "read", counting)
    write_rows(tmp_path / "p.jsonl", ROWS)
    with served(ChatEndpoint()) as server:
        role = {"url": server.url, "concurrency": 4}
        generate(Prompts(str(tmp_path / "p.jsonl")), write, {"teacher": role}, tmp_path / "t.jsonl", sampling=SAMPLING)
        assert server.most_at_once <= 4
    assert 4 <= most <= 8 and read == 2 * len(ROWS)


def test_an_engine_has_its_fill_before_its_first_answer(tmp_path: Path) -> None:
    """How many calls it likes is known once it is open: it must not wait with a few until one of them is answered."""

    class Waiting(ChatEndpoint):
        asked_before_the_first = 0

        def answer(self, seen: Any) -> Any:
            first = seen.method == "POST" and not is_probe(seen) and not self.bodies
            end = time.monotonic() + 20
            while first and len(calls()) < 32 and time.monotonic() < end:
                time.sleep(0.002)
            if first:
                self.asked_before_the_first = len(calls())
            return super().answer(seen)

    def calls() -> list[Any]:
        return [seen for seen in server.posts(CHAT) if not is_probe(seen)]

    endpoint = Waiting()
    with served(endpoint) as server:
        generate(ROWS, "plain", {"teacher": {"url": server.url, "concurrency": 32}}, tmp_path / "t.jsonl")
    assert endpoint.asked_before_the_first == 32


@pytest.mark.parametrize("limit", [3000, 20_000])
def test_a_full_disk_stops_cleanly_and_what_was_written_is_whole(tmp_path: Path, limit: int) -> None:
    """In the middle of the calls; and between the calls and the file of traces, which is larger than any of theirs."""
    endpoint = ChatEndpoint()
    with served(endpoint) as server:
        roles, out = {"teacher": {"url": server.url, "concurrency": 2}}, tmp_path / "t.jsonl"
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(UserError, match="cannot be written: File too large. What was written before is whole"):
                generate(PROMPTS, "plain", roles, out, sampling=SAMPLING)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not out.exists()
        before = dict(endpoint.seeds)
        whole = (Path(f"{out}.calls") / "calls.jsonl").read_bytes().split(b"\n")[:-1]
        kept = {int(json.loads(line)["name"][:16], 16) >> 1 for line in whole}
        generate(PROMPTS, "plain", roles, out, sampling=SAMPLING)
    assert kept and all(endpoint.seeds[seed] == before[seed] for seed in kept)
    assert len(out.read_text().splitlines()) == len(PROMPTS)
