"""A service that is down to one process only: all end with its message, and none waits in a collective meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmdistill.teachers.local import LocalTeacher
from tests import tiny
from tests.distributed.launching import launch
from tests.evals import made
from tests.service.faulty import Faulty
from tests.service.small import Seen


@pytest.mark.slow
def test_an_outage_of_one_process_is_everybodys_and_outlives_a_collective(tmp_path: Path) -> None:
    """The process group gives up after 8 s, the service is given 10: in a collective the other process would end with
    a time-out of its own before it heard why. Likewise what is measured, and the evaluation during training."""
    made.suite(tmp_path)
    asked = 0

    def down_after_two_requests(seen: Seen) -> str | None:
        nonlocal asked
        asked += 1
        return "503" if asked > 2 else None

    teacher = LocalTeacher(tiny.llama(2), tiny.tokenizer())
    with Faulty(teacher) as sound, Faulty(teacher, plan=down_after_two_requests) as failing:
        launch("two_processes", "-m", "tests.distributed.outage_worker", str(tmp_path), sound.url, failing.url)
        first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
        assert 0 < first["steps"] == second["steps"] < 3
        for what, seconds in (("train", 10), ("measure", 0.5)):
            assert first[what] == second[what]  # the same words to both
            kind, message = first[what]
            assert kind == "UserError"
            assert message.startswith(f"teacher {failing.url} gave no answer for {seconds:g} s: ") and "503" in message
        assert first["callback"][0] in ("NotADirectoryError", "FileExistsError")
        assert second["callback"] == ["RankFailed", f"another rank failed: {first['callback'][1]}"]
