"""The store of calls: whose answers it holds, and that one without answers is anybody's."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmdistill.datagen.call_store import CallStore
from llmdistill.errors import UserError


def test_a_command_that_failed_before_its_first_answer_ties_nobody_to_its_settings(tmp_path: Path) -> None:
    """As one whose prompts were not there: it is given again with another engine, and its output is new still."""
    folder = str(tmp_path / "traces.jsonl.calls")
    CallStore(folder, {"engine": "vllm"}).close()
    again = CallStore(folder, {"engine": "hf"})
    again.calls.put("ab", {"text": "4"})
    again.close()
    with pytest.raises(UserError, match='made with engine "hf", now it is "vllm"'):
        CallStore(folder, {"engine": "vllm"})
    same = CallStore(folder, {"engine": "hf"})
    assert (same.calls.get("ab") or {})["text"] == "4"
    same.close()
