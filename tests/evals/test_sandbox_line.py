"""An evaluation of programs says what confined them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmdistill.evals.command import run
from llmdistill.evals.records import Problem
from llmdistill.verify.sandbox import describe
from tests.evals.test_nothing_lost import folder_of


def test_what_confined_the_programs_is_printed_and_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tests = {"style": "asserts", "test": "assert f() == 1", "entry_point": "f"}
    folder = folder_of(tmp_path / "run", [Problem("p0", "Write f.", "code", None, tests)])
    assert run(["--grade", str(folder.path)]) == 0
    results = json.loads(folder.results_file.read_text())
    assert results["sandbox"] == describe() and results["avg"]["value"] == 1.0
    assert f"sandbox {describe()}" in capsys.readouterr().out
