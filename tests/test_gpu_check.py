"""The script for a lent GPU runs, on a CPU with tiny shapes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[1] / "eval" / "gpu" / "check.py"


@pytest.mark.slow
def test_it_runs_to_the_end_and_prints_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMDISTILL_KERNELS", "auto")  # it sets this itself
    spec = importlib.util.spec_from_file_location("gpu_check", FILE)
    assert spec is not None and spec.loader is not None
    check: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    assert check.main(["--tiny"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["left_out"] == [] and not [part for part in found.values() if "error" in str(part)]
    assert set(found["kernels"]) == set(check.LOSSES) and all(row["right"] for row in found["kernels"].values())
    whole, chunked = found["head whole rows"], found["head pytorch"]
    assert whole["jsd"]["loss"] == pytest.approx(chunked["jsd"]["loss"], rel=0.05)  # logits in bfloat16
    assert found["step"]["seconds"] > 0 and found["step"]["estimated_gib"] > 0
