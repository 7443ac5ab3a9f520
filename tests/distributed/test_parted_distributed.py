"""Every text parted among two processes ends where texts of their own do: losses and weights."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed import parted_worker
from tests.distributed.launching import launched_once

LAUNCHES = ("two_processes", "zero3")


@pytest.mark.proof  # minutes; a run of it is in test_students_distributed
@pytest.mark.parametrize("config", LAUNCHES)
@pytest.mark.parametrize("name", parted_worker.RUNS)
def test_it_is_the_run_without(config: str, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """1e-5: weights of about 0.3 in float32 after three steps of Adam, whose first ones divide by small numbers."""
    worker = "tests.distributed.parted_worker"
    folder = launched_once(tmp_path_factory, config, worker, "{folder}/out.json", "{folder}")
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())[name]
    assert len(found["losses"]) == 3
    assert found["parted_losses"] == pytest.approx(found["losses"], rel=1e-5)
    assert found["gap"] < 1e-4
