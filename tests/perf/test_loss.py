"""The benchmark of the streamed loss runs, and refuses to time work that is not equal."""

import csv
from pathlib import Path

import pytest

from eval.perf import loss


@pytest.mark.slow
def test_contenders_agree_and_are_timed(tmp_path: Path) -> None:
    """Without TRL, whose import takes most of a test's time here; the main session runs all of them."""
    results = tmp_path / "results.csv"
    words = ["--columns", "1000", "--rows", "40", "--hidden", "16", "--runs", "2", "--without", "trl", "liger"]
    loss.main([*words, "--results", str(results)])
    with results.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["cell"].split(",")[0], line["unit"]) for line in lines] == [
        (name, unit) for name in ("ours", "naive") for unit in ("s", "GiB")
    ]


def test_unequal_work_is_refused() -> None:
    ours = {"loss": 1.0, "gradient 0": 2.0}
    loss.agree({"ours": ours, "naive": {"loss": 1.0005, "gradient 0": 2.0}}, 1e-3)
    with pytest.raises(ValueError, match="naive has gradient 0 2.1, ours 2.0"):
        loss.agree({"ours": ours, "naive": {"loss": 1.0, "gradient 0": 2.1}}, 1e-3)
    with pytest.raises(ValueError, match="not equal"):
        loss.agree({"ours": ours, "naive": {"loss": float("nan"), "gradient 0": 2.0}}, 1e-3)
