"""The benchmark of starts runs, and memory does not grow with the rows as it does with Python objects."""

import csv
import json
from pathlib import Path

import pytest

from eval.perf import startup


@pytest.mark.slow
def test_lines_of_both_starts(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    startup.main(["--prompts", "50", "--again", "1", "--results", str(results)])
    with results.open(newline="") as file:
        lines = {line["cell"]: float(line["p50"]) for line in csv.DictReader(file)}
    starts = [f"arrow, 50 prompts, {which} start: " for which in ("first", "second")]
    assert set(lines) == {start + what for start in starts for what in ("rows", "start", "anonymous", "resident")}
    assert all(lines[start + "rows"] < lines[start + "start"] for start in starts)


def test_prompts_have_the_length_that_was_asked_for(tmp_path: Path) -> None:
    startup.write_prompts(tmp_path / "p.jsonl", 200, 20)
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    words = [len(row["prompt"][0]["content"].split()) - 1 for row in rows]  # a number comes first
    assert len(words) == 200 and min(words) >= 10 and max(words) <= 30 and 18 <= sum(words) / 200 <= 22
