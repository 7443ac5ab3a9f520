"""A run killed with SIGKILL at any moment, and resumed, ends with the weights of one that nobody disturbed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def killed(*options: str) -> str:
    """What eval/proof/kills.py prints; it fails where a weight differs by more than its mode allows."""
    words = [sys.executable, str(ROOT / "eval/proof/kills.py"), "--out", "", *options]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_killed_once_with_rounds_under_way() -> None:
    assert "| overlap | 1e-05 | 1 | 1 |" in killed("--kills", "1", "--modes", "overlap", "--steps", "4")


@pytest.mark.proof
def test_killed_at_twenty_random_moments() -> None:
    """Half of them while a checkpoint is written; synchronous bit by bit."""
    said = killed("--kills", "20")
    assert "| synchronous | 0 | 20 | 20 | 0 |" in said and "| overlap | 1e-05 | 20 | 20 |" in said
