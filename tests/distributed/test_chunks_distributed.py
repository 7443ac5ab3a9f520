"""A teacher of another tokenizer in several processes: they train as one does, and what was aligned counts over all.

One launch for all of it; see ``chunks_worker``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.chunks_worker import CASES, STEPS, trained
from tests.distributed.launching import launched_once

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes wrote."""
    return launched_once(tmp_path_factory, "two_processes", "tests.distributed.chunks_worker", "{folder}")


def of_rank(folder: Path, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"rank-{rank}.json").read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one_does(folder: Path, tmp_path: Path, case: str) -> None:
    """Losses, those of each term, the norms of their gradients, what was aligned, and the weights in the end."""
    expected, weights = trained(tmp_path, case)
    found = of_rank(folder, 0)[case]
    assert len(expected) == STEPS and all(line["grad_norm"] > 0 for line in expected)
    assert expected[0]["teacher/aligned_bytes"] == 1.0
    for line, alone in zip(found, expected, strict=True):
        assert line == pytest.approx(alone, rel=1e-5, abs=1e-5)
    others = torch.load(folder / f"{case}.pt")
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-5, atol=1e-5, msg=name)


def test_all_processes_refuse_what_one_of_them_cannot_align(folder: Path) -> None:
    """One process aligns all of its texts, the other none: half of the bytes, more or less, and one word for both."""
    first, second = (of_rank(folder, rank) for rank in range(2))
    for name in ("strict", "lenient"):
        assert first[name] == second[name]
    for message in first["strict"].values():
        assert message.startswith("teacher.min_aligned is 0.9, and 0.") and "no token for what" in message
        assert "0.000 of the bytes" not in message
    assert first["lenient"] == {"train": "", "evaluate": ""}
