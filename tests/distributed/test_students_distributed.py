"""Students of other classes in several processes: towers that text never reaches under DistributedDataParallel with
checkpointing, adapters on experts, heads that can be tried only once ZeRO-3 has its engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed import students_worker
from tests.distributed.launching import launched_once

pytestmark = pytest.mark.slow
LAUNCHES = ("two_processes", "zero3")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Launch file -> what its worker wrote."""
    worker = "tests.distributed.students_worker"

    def of(config: str) -> dict[str, Any]:
        folder = launched_once(tmp_path_factory, config, worker, "{folder}/out.json", "{folder}")
        found: dict[str, Any] = json.loads((folder / "out.json").read_text())
        return found

    return of


@pytest.mark.parametrize("config", LAUNCHES)
@pytest.mark.parametrize("name", students_worker.STUDENTS)
def test_it_is_trained_kept_still_and_saved_as_it_is(results: Any, config: str, name: str) -> None:
    found = results(config)[name]
    assert found["processes"] == 2 and found["sharded"] == (config == "zero3")
    assert found["trained"]
    assert found["still"]  # in the step in which nothing counted
    assert found["saved"] is None
    assert found["towers"] > 0 if "image" in name else found["towers"] == 0  # text never reaches them, nor decay
    assert found["scale"] == (3.0 if name == "scaled head" else 1.0)
