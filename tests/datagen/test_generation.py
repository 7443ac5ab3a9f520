"""Generation asks once for what is finished, whatever breaks; the file is the same in whatever order answers come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from llmdistill.datagen.generation import generate
from llmdistill.datagen.prompts import Prompts
from llmdistill.datagen.schema import Trace
from llmdistill.datagen.tables import read_rows, write_rows
from llmdistill.errors import UserError
from llmdistill.record.manifest import read_manifest
from tests.datagen.chat_endpoint import PROMPTS, ChatEndpoint, served
from tests.service.faulty import Faulty

SAMPLING = {"max_new_tokens": 64, "temperature": 0.8}
QUICK = {"timeout_s": 2.0, "max_outage_s": 20.0, "concurrency": 8}


@pytest.fixture
def endpoint() -> ChatEndpoint:
    return ChatEndpoint()


@pytest.fixture
def server(endpoint: ChatEndpoint) -> Iterator[Faulty]:
    with served(endpoint, stall_s=3.0) as running:
        yield running


def write(server: Faulty, out: Path, rows: Any = PROMPTS, writer: Any = "plain", **options: Any) -> Any:
    role = {"url": server.url, **QUICK, **options.pop("role", {})}
    roles = {"teacher": role, **{name: role for name in options.pop("others", ())}}
    return generate(rows, writer, roles, out, sampling=SAMPLING, **{"n": 2, **options})


def test_traces_say_who_wrote_what_how(server: Faulty, tmp_path: Path) -> None:
    made = write(server, tmp_path / "t.jsonl", judge="math")
    rows = list(read_rows(tmp_path / "t.jsonl"))
    assert len(rows) == made.counts["written"] == 2 * len(PROMPTS) and len({r["id"] for r in rows}) == len(rows)
    first = Trace.of(rows[0])
    assert first.prompt == [{"role": "user", "content": "What is 2 + 3?"}] and first.answer == "5"
    assert (first.teacher, first.fingerprint, first.style) == ("adder", "name:adder", "plain")
    assert first.sampling["temperature"] == 0.8 and first.logprobs_of == "model"
    assert len(first.token_ids or ()) == len(first.logprobs or ()) == first.tokens == len(first.completion.split())
    by_gold = {str(r["passed"]): r["completion"].rpartition("boxed{")[2].rstrip(".}") == r["answer"] for r in rows}
    assert by_gold == {"True": True, "False": False}
    told = made.details
    assert told["authors"]["name:adder"]["traces"] == len(rows) and sum(told["finish"].values()) == len(rows)
    assert told["verdicts"]["right"] == sum(r["passed"] for r in rows)


def test_a_finished_dataset_asks_nothing_and_more_samples_ask_the_rest(
    server: Faulty, endpoint: ChatEndpoint, tmp_path: Path
) -> None:
    write(server, tmp_path / "t.jsonl")
    before = list(read_rows(tmp_path / "t.jsonl"))
    write(server, tmp_path / "t.jsonl")
    assert endpoint.seeds.total() == 2 * len(PROMPTS)
    write(server, tmp_path / "t.jsonl", n=3)
    after = list(read_rows(tmp_path / "t.jsonl"))
    assert endpoint.seeds.total() == 3 * len(PROMPTS) == len(after)
    assert {json.dumps(r) for r in before} < {json.dumps(r) for r in after}


@pytest.mark.parametrize("writer", ["plain", "debate"])
def test_a_flaky_endpoint_loses_and_doubles_nothing(
    endpoint: ChatEndpoint, server: Faulty, tmp_path: Path, writer: str
) -> None:
    """Every fault in turn, at every third call; an answer that has a choice too many is damaged too."""
    few = {"writer": writer, "rows": PROMPTS if writer == "plain" else PROMPTS[:8], "n": 1}
    write(server, tmp_path / "calm.jsonl", **few)
    asked = set(endpoint.seeds)
    faults = ("500", "429", "503", "reset", "reset_after", "half", "wrong_type", "corrupt", "slow")
    turns = cycle(turn for fault in faults for turn in (fault, None, None))
    with served(endpoint, plan=lambda seen: next(turns), stall_s=1.0, retry_after="0.02") as flaky:
        endpoint.extra_choices = 4
        write(flaky, tmp_path / "flaky.jsonl", **few, role={"max_outage_s": 60.0})
        assert {seen.fault for seen in flaky.seen if seen.fault} == set(faults)
    assert (tmp_path / "flaky.jsonl").read_bytes() == (tmp_path / "calm.jsonl").read_bytes()
    assert set(endpoint.seeds) == asked


def test_an_endpoint_that_is_gone_stops_the_run_and_keeps_what_was_answered(
    server: Faulty, endpoint: ChatEndpoint, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no answer for 1 s"):
        server.next(*[None] * 10, *["reset"] * 500)
        write(server, tmp_path / "t.jsonl", role={"max_outage_s": 1.0})
    assert not (tmp_path / "t.jsonl").exists()
    kept = set(endpoint.seeds)
    assert len(kept) == 10
    server._queue.clear()
    write(server, tmp_path / "t.jsonl")
    assert all(endpoint.seeds[seed] == 1 for seed in kept) and endpoint.seeds.total() == 2 * len(PROMPTS)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "seed 0, now it is 1"),
        ({"temperatures": [0.6, 1.0]}, "sampling.temperature 0.8, now it is 0.6"),
        ({"writer": "planned"}, 'writer "plain", now it is "planned"'),
        ({"rows": Prompts("", template="boxed")}, "template"),
    ],
)
def test_other_settings_under_one_output_are_refused(
    server: Faulty, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    write_rows(tmp_path / "p.jsonl", PROMPTS[:3])
    source = Prompts(str(tmp_path / "p.jsonl"))
    write(server, tmp_path / "t.jsonl", rows=source)
    if "rows" in changed:
        changed["rows"] = Prompts(str(tmp_path / "p.jsonl"), template="boxed")
    with pytest.raises(UserError, match=said):
        write(server, tmp_path / "t.jsonl", **{"rows": source, **changed})
    (tmp_path / "t.jsonl.manifest.json").unlink()  # an interrupted run has none: its calls know
    with pytest.raises(UserError, match=said):
        write(server, tmp_path / "t.jsonl", **{"rows": source, **changed})


def test_another_model_behind_the_endpoint_is_noticed(server: Faulty, endpoint: ChatEndpoint, tmp_path: Path) -> None:
    write(server, tmp_path / "t.jsonl", rows=PROMPTS[:3])
    (tmp_path / "t.jsonl.manifest.json").unlink()
    endpoint.root = "adder-v2"
    with pytest.raises(UserError, match='roles.teacher.fingerprint "name:adder", now it is "name:adder adder-v2"'):
        write(server, tmp_path / "t.jsonl", rows=PROMPTS[:3])


def test_a_model_that_changes_while_it_is_asked_is_noticed(
    server: Faulty, endpoint: ChatEndpoint, tmp_path: Path
) -> None:
    async def changing(row: Any, ask: Any) -> list[Trace]:
        await ask("teacher", row["prompt"])
        endpoint.system = "two"
        await ask("teacher", row["prompt"])
        return []

    endpoint.system = "one"
    with pytest.raises(UserError, match="was system 'one' and is now 'two'"):
        write(server, tmp_path / "t.jsonl", rows=PROMPTS[:1], writer=changing, n=1)


def test_other_weights_under_one_name_are_noticed_when_a_dataset_is_gone_on_with(
    server: Faulty, endpoint: ChatEndpoint, tmp_path: Path
) -> None:
    """By the log-probs of a few fixed prompts, which may differ by rounding; an endpoint that gives none is named."""
    made = write(server, tmp_path / "t.jsonl", rows=PROMPTS[:3])
    assert len(made.details["probes"]["teacher"]["logprobs"][0]) == 6
    write(server, tmp_path / "t.jsonl", rows=PROMPTS[:3], n=3)
    endpoint.weights = 1
    with pytest.raises(UserError, match="of other weights than teacher has now under the same name"):
        write(server, tmp_path / "t.jsonl", rows=PROMPTS[:3], n=4)
    endpoint.tells = False
    made = write(server, tmp_path / "silent.jsonl", rows=PROMPTS[:3], progress=True)
    assert made.details["probes"] == {"teacher": None}


@pytest.mark.parametrize("away_s", [0.0, 1.0])
def test_a_teacher_that_comes_back_with_other_weights_is_noticed(
    server: Faulty, endpoint: ChatEndpoint, tmp_path: Path, away_s: float
) -> None:
    """Where it was away long enough to be given up for a while, before it is asked anything; else in the end."""

    async def restarting(row: Any, ask: Any) -> list[Trace]:
        await ask("teacher", row["prompt"])
        endpoint.weights = 1
        server.stop()
        await asyncio.sleep(away_s)
        server.start()
        await ask("teacher", row["prompt"])
        return []

    with pytest.raises(UserError, match="has other weights than before under the name 'adder'"):
        write(server, tmp_path / "t.jsonl", rows=PROMPTS[:1], writer=restarting, n=1)


def test_low_temperatures_come_first(server: Faulty, endpoint: ChatEndpoint, tmp_path: Path) -> None:
    write(server, tmp_path / "t.jsonl", temperatures=[0.6, 1.0])
    drawn = [row["sampling"]["temperature"] for row in read_rows(tmp_path / "t.jsonl")]
    assert drawn == [0.6] * len(PROMPTS) + [1.0] * len(PROMPTS)
    assert sorted({body["temperature"] for body in endpoint.bodies}) == [0.6, 1.0]


def test_what_an_endpoint_refuses_is_rejected_with_the_reason(
    server: Faulty, endpoint: ChatEndpoint, tmp_path: Path
) -> None:
    endpoint.refused = "What is 2 + 3?"
    made = write(server, tmp_path / "t.jsonl")
    assert made.counts == {"read": 48, "written": 46, "rejected": 2}
    reject = json.loads((tmp_path / "t.jsonl.rejects.jsonl").read_text().splitlines()[0])
    assert "this is not answered" in reject["reason"] and reject["content"]["answer"] == "5"


def test_an_endpoint_that_refuses_everything_is_given_up_early_and_asked_again_later(
    server: Faulty, endpoint: ChatEndpoint, tmp_path: Path
) -> None:
    endpoint.refused = "What"
    with pytest.raises(UserError, match="calls were refused.*this is not answered"):
        write(server, tmp_path / "t.jsonl")
    endpoint.refused = ""
    assert write(server, tmp_path / "t.jsonl").counts["written"] == 48


def test_a_cap_of_costs_is_never_exceeded_and_counts_what_was_spent_before(
    server: Faulty, endpoint: ChatEndpoint, tmp_path: Path
) -> None:
    """A token costs 1; an answer has at most 64, its prompt 7 or 8 at 2 characters a token."""
    role = {"completion_price": 1e6}
    for cap in (300.0, 330.0):
        with pytest.raises(UserError, match=f"max_cost is {cap:g}"):
            write(server, tmp_path / "t.jsonl", role=role, max_cost=cap)
        spent = sum(json.loads(line)["drawn"]["tokens"] for line in (tmp_path / "t.jsonl.calls/calls.jsonl").open())
        assert cap - 64 < spent <= cap
    made = write(server, tmp_path / "t.jsonl", role=role, max_cost=48 * 64.0)
    assert made.details["cost"] == sum(row["tokens"] for row in read_rows(tmp_path / "t.jsonl"))
    assert set(endpoint.seeds.values()) == {1}


def test_rows_that_are_no_prompts_are_rejected_and_prompts_come_once(server: Faulty, tmp_path: Path) -> None:
    write_rows(tmp_path / "p.jsonl", [*PROMPTS, {"prompt": "  "}, PROMPTS[0]])
    made = write(server, tmp_path / "t.jsonl", rows=tmp_path / "p.jsonl", n=1)
    assert made.counts == {"read": 24, "written": 24, "rejected": 1}
    assert "prompt is empty" in (tmp_path / "t.jsonl.rejects.jsonl").read_text()


def test_shards_are_the_whole(server: Faulty, tmp_path: Path) -> None:
    write_rows(tmp_path / "p.jsonl", PROMPTS)
    write(server, tmp_path / "all.jsonl", rows=tmp_path / "p.jsonl", n=1)
    for i in range(3):
        write(server, tmp_path / f"{i}.jsonl", rows=Prompts(str(tmp_path / "p.jsonl"), shard=(i, 3)), n=1)
    parts = [row for i in range(3) for row in read_rows(tmp_path / f"{i}.jsonl")]
    whole = list(read_rows(tmp_path / "all.jsonl"))
    assert sorted(parts, key=lambda r: r["id"]) == sorted(whole, key=lambda r: r["id"])


def test_an_output_in_a_notebook(server: Faulty, tmp_path: Path) -> None:
    """Where an event loop is running already."""

    async def cell() -> Any:
        return write(server, tmp_path / "t.jsonl", n=1)

    assert asyncio.run(cell()).counts["written"] == len(PROMPTS)
    assert read_manifest(tmp_path / "t.jsonl") is not None
