"""A teacher of another tokenizer on disk; tests/service/test_roads.py has the roads that take an engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmdistill.errors import UserError
from llmdistill.teachers.stored import StoredTeacher
from tests.methods.test_chunks import make, other_teacher
from tests.teachers.chunk_roads import assert_same, trained


def test_two_steps_from_disk(tmp_path: Path) -> None:
    """Stored while the teacher is asked, and read again without it: its tokenizer is all that is needed beside."""
    live = other_teacher()
    expected = trained(live, tmp_path / "a", "alm")
    store = StoredTeacher(tmp_path / "store", live, dtype="float32")
    assert_same(trained(store, tmp_path / "b", "alm"), expected, 1e-6)
    store.store.close()
    alone = StoredTeacher(tmp_path / "store", dtype="float32", tokenizer=live.tokenizer)
    assert not alone.live
    assert_same(trained(alone, tmp_path / "c", "alm"), expected, 1e-6)
    with pytest.raises(UserError, match="a StoredTeacher without its tokenizer.*Fix: --teacher.tokenizer"):
        make(tmp_path / "d", "alm", teacher=StoredTeacher(tmp_path / "store"), debias=False)
