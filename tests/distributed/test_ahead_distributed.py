"""Rounds made ahead by two processes: alike, resumed to the same weights, and ended together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmdistill.teachers.local import LocalTeacher
from tests import tiny
from tests.distributed.launching import launch
from tests.service.faulty import Faulty


@pytest.mark.proof
@pytest.mark.parametrize("config", ("two_processes", "zero3", "fsdp2"))
def test_two_processes_make_rounds_ahead_and_end_together(tmp_path: Path, config: str) -> None:
    services = [Faulty(LocalTeacher(tiny.llama(seed), tiny.tokenizer())) for seed in (9, 2, 2)]
    with services[0] as student, services[1] as one, services[2] as other:
        launch(config, "-m", "tests.distributed.ahead_worker", str(tmp_path), student.url, one.url, other.url)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first["staleness"] == [0, 1, 1, 1]  # the first rank logs
    assert first["weights"] == second["weights"]
    assert max(first["difference"], second["difference"]) <= 1e-5
    assert first["pushed"] > second["pushed"]  # weights are one rank's business
    assert first["failed"] and first["failed"].removeprefix("another rank failed: ") in second["failed"]
