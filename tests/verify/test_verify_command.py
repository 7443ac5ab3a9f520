"""`llmdistill verify`: verdicts with their reasons."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llmdistill.cli import main


def written(folder: Path, *rows: object) -> str:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return str(file)


def test_each_row_has_its_verdict_and_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(
        tmp_path,
        {"completion": "So \\boxed{\\frac12}.", "answer": "0.5"},
        "",
        {"prediction": "The answer is 4.", "gold": "5"},
        {"response": "Answer: C", "answer": "C", "kind": "choice"},
        {
            "completion": "```python\ndef f(x):\n    return x\n```",
            "tests": {"style": "asserts", "test": "assert f(2) == 2"},
        },
    )
    assert main(["verify", file]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["1", "right", "\\frac12", "for", "0.5"] and "(boxed; quantity)" in lines[0]
    assert lines[1].split()[:2] == ["3", "wrong"] and "(answer_line; quantity)" in lines[1], (
        "lines of the file are named"
    )
    assert lines[2].split()[:2] == ["4", "right"] and lines[3].split()[:2] == ["5", "right"]
    assert lines[-1] == "3 of 4 right; 1 wrong"
    assert main(["verify", file, "--json", "--wrong"]) == 0
    (only,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert only == {
        "line": 3, "verdict": "wrong", "extracted": "4.", "gold": "5", "found_by": "answer_line", "reason": "quantity"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "options", "error"),
    [
        ({"completion": "5"}, [], "line 1 has no answer or gold or solution; it has completion. Fix: --gold COLUMN."),
        (
            {"completion": "5", "answer": "5"},
            ["--completion", "text"],
            "line 1 has no text; it has answer, completion.",
        ),
        ("{", [], "line 1 of .* is no JSON: .* Fix: one object on each line."),
        ("[1]", [], "line 1 of .* is a list; it must be a JSON object"),
    ],
)
def test_errors_name_the_line_and_the_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: object, options: list[str], error: str
) -> None:
    assert main(["verify", written(tmp_path, row), *options]) == 2
    assert re.search(error, capsys.readouterr().err)


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "nowhere.jsonl"]) == 2
    assert "there is no file nowhere.jsonl" in capsys.readouterr().err
