"""Benchmarks append what they measured to one CSV."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eval.perf.record import COLUMNS, RESULTS, ROOT, note, quantile


@pytest.mark.parametrize("values", [[3.0], [2.0, 1.0], [5.0, 1.0, 4.0], [7.0, 3.0, 9.0, 1.0, 2.0, 2.0]])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_quantiles_are_numpys(values: list[float], share: float) -> None:
    assert quantile(values, share) == pytest.approx(np.quantile(values, share), rel=1e-12)


def test_a_line_is_added_below_the_others_and_the_header_written_once(tmp_path: Path, capsys) -> None:
    path = tmp_path / "results.csv"
    first = note("loss", "ours, 32k columns", "s", [3.0, 1.0, 2.0], path)
    note("step", 'a "cell", quoted', "ratio", [1.05], path)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[0] == first and tuple(first) == COLUMNS
    assert [lines[0][p] for p in ("p20", "p50", "p80", "runs")] == ["1.4", "2", "2.6", "3"]
    assert lines[1]["cell"] == 'a "cell", quoted' and len(lines) == 2
    assert all(lines[0][name] for name in COLUMNS)
    assert capsys.readouterr().out.splitlines()[0] == "loss: ours, 32k columns: 2 s (1.4 to 2.6, 3 runs)"


def test_two_processes_that_write_at_one_time_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    code = """
import sys
from eval.perf.record import note
for i in range(40):
    note(sys.argv[1], str(i), "s", [1], sys.argv[2])
"""
    writers = [
        subprocess.Popen([sys.executable, "-c", code, name, str(path)], cwd=ROOT, stdout=subprocess.DEVNULL)
        for name in "ab"
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert sorted((x["benchmark"], int(x["cell"])) for x in lines) == [(name, i) for name in "ab" for i in range(40)]


def test_the_committed_results_have_these_columns() -> None:
    if RESULTS.exists():
        with RESULTS.open(newline="") as file:
            assert tuple(next(csv.reader(file))) == COLUMNS
