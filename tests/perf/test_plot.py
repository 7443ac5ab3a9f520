"""The picture of the results takes the last line of each cell."""

from pathlib import Path

import pytest

from eval.perf import plot
from eval.perf.record import note


def test_it_draws_what_is_there(tmp_path: Path) -> None:
    results, out = tmp_path / "results.csv", tmp_path / "out.svg"
    for seconds in (9.0, 2.0):  # measured again
        note("loss", "ours, 256 rows, 32000 columns, hidden 256, float32: time", "s", [seconds], results)
    note("loss", "trl, 256 rows, 32000 columns, hidden 256, float32: time", "s", [3.0, 4.0], results)
    note("step", "ours_vllm, 8 x 40 new tokens, float32, 2 threads: step", "s", [1.0], results)
    lines = plot.latest(results)
    assert plot.found(lines, "loss", plot._LOSS, "time") == {
        "32k, 256 rows": {"ours": (2, 2, 2), "trl": (3.2, 3.5, 3.8)}
    }
    assert plot.found(lines, "step", plot._STEP, "step") == {"8x40": {"ours_vllm": (1, 1, 1)}}
    pytest.importorskip("matplotlib", reason="no dependency of ours; others bring it")
    plot.main(["--results", str(results), "--out", str(out)])
    assert "ours_vllm" in out.read_text() or out.stat().st_size > 1000
