"""A teacher of another tokenizer in several processes: what was aligned counts over all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launching import launch


@pytest.mark.slow
def test_all_processes_refuse_what_one_of_them_cannot_align(tmp_path: Path) -> None:
    """One process aligns all of its texts, the other none: half of the bytes, more or less, and one word for both."""
    launch("two_processes", "-m", "tests.distributed.chunks_worker", str(tmp_path))
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for message in first["strict"].values():
        assert message.startswith("teacher.min_aligned is 0.9, and 0.") and "no token for what" in message
        assert "0.000 of the bytes" not in message
    assert first["lenient"] == {"train": "", "evaluate": ""}
