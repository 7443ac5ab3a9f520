"""The benchmark of evidence over HTTP runs as it is written down, on rows of a small vocabulary."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_both_sides_and_the_loop_are_measured(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    command = [sys.executable, "-m", "eval.perf.evidence", "--vocab", "300", "--top-k", "8", "--seconds", "0.2"]
    command += ["--sequences", "4", "--completion", "16", "--results", str(results)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with results.open() as file:
        lines = list(csv.DictReader(file))
    assert [line["unit"] for line in lines] == ["positions/s", "positions/CPU s", "positions/CPU s", "ms", "ms"]
    assert all(float(line["p50"]) >= 0 and line["commit"] for line in lines)
