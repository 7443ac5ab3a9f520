"""What the tables say: the point a budget is read at, the intervals, the charge for text sampled beforehand."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import table
import torch
from claims import CLAIMS, verdict
from clock import Budget, Charge, Curve, at
from decision import DECISION
from guide_entries import GUIDE
from tracks import TRACKS, Cell

ARENA = Path(table.__file__).parent
OTHERS = ["exact+", "exact-", "exact_t0.6", "exact_t1", "forward_kl", "reverse_kl", "golden", "proxy", "proxy_train"]
OTHERS += ["steps_right", "corrected", "best_way", "right_on_best"]
POINTS = [
    {"step": 0, "tokens": 0, "cpu_seconds": 0.0, "exact": 0.1},
    {"step": 5, "tokens": 1000, "cpu_seconds": 2.0, "exact": 0.2},
    {"step": 9, "tokens": 2100, "cpu_seconds": 4.5, "exact": 0.4},
]


def test_a_budget_is_read_where_it_is_first_used_up() -> None:
    assert at(POINTS, "tokens", 1000)["exact"] == 0.2
    assert at(POINTS, "tokens", 1001)["exact"] == 0.4
    assert at(POINTS, "cpu_seconds", 4.0)["exact"] == 0.4
    with pytest.raises(ValueError, match="before its budget"):
        at(POINTS, "tokens", 3000)


def test_a_start_is_scored_once_for_all_that_begin_there() -> None:
    scored: list[int] = []

    def score(model: Any) -> dict[str, float]:
        scored.append(1)
        return {"exact": 0.5}

    first = Curve(Budget(10, 1.0), score)
    first.on_train_begin(None, None, None, model=torch.nn.Linear(1, 1))
    second = Curve(Budget(10, 1.0), score, before=first.before)
    second.on_train_begin(None, None, None, model=torch.nn.Linear(1, 1))
    assert len(scored) == 1 and first.points[0]["exact"] == second.points[0]["exact"] == 0.5
    second._note(3, torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    assert len(scored) == 2


def test_interval_is_student_s_t() -> None:
    found = table.mean([0.1, 0.2, 0.3])
    # s = 0.1, t(0.975, 2) = 4.303: 4.303 * 0.1 / sqrt(3)
    assert found.value == pytest.approx(0.2)
    assert found.half == pytest.approx(0.24844, abs=1e-5)
    assert math.isnan(table.mean([0.5]).half)
    with pytest.raises(ValueError):
        table.mean([])


def test_differences_are_taken_within_a_seed() -> None:
    # The seeds lie far apart, the difference is 0.1 in each: its interval has no width.
    found = table.paired({0: 0.2, 1: 0.9, 2: 0.5}, {0: 0.1, 1: 0.8})
    assert found is not None
    assert (found.value, found.half, found.n) == (pytest.approx(0.1), pytest.approx(0.0), 2)
    assert table.paired({0: 1.0}, {1: 1.0}) is None


def test_sampled_text_is_paid_once() -> None:
    charge = Charge(0.01, 200)
    assert charge.due(150) == pytest.approx(1.5)
    assert charge.due(5000) == pytest.approx(2.0)


def written(folder: Path, track: str, method: str, seed: int, key: str | None = None) -> None:
    budget = TRACKS[track].budget
    points = [
        {
            "step": i,
            "tokens": budget.tokens * i // 4,
            "cpu_seconds": budget.cpu_seconds * i / 4,
            "exact": 0.2 * i + 0.01 * seed,
            **dict.fromkeys(OTHERS, 0.5),
        }
        for i in range(5)
    ]
    file = folder / f"{track}/{method}-{seed}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {"key": key or TRACKS[track].key(), "machine": "m", "commit": "c", "points": points}
    file.write_text(json.dumps(found))


def test_report_has_every_track_and_only_results_of_these_settings(tmp_path: Path) -> None:
    for name, track in TRACKS.items():
        for seed in range(3):
            for method in track.methods:
                written(tmp_path / "results", name, method, seed)
    written(tmp_path / "results", "main", "opd", 0, key="of other settings")
    assert not table.current(tmp_path / "results", Cell("main", "opd", 0))
    (tmp_path / "notes.md").write_text("## What came out\n\nby hand")
    table.report(tmp_path / "results", tmp_path, table.all_curves(tmp_path / "results"))
    text = (tmp_path / "RESULTS.md").read_text()
    for track in TRACKS.values():
        assert f"## {track.title}" in text
    assert "by hand" in text
    # seeds 1 and 2: 12.7 * .00707 / 1.41
    assert "| OPD (reverse KL) (2 seeds) | fresh | student | no | yes | 81.5 ± 6.4 |" in text
    rows = [row for row in text.split("## Claims")[1].split("by hand")[0].splitlines() if row.startswith("| ")]
    assert len(rows) == 1 + len(CLAIMS)
    assert all("+0.0 ± 0.0 | +0.0 ± 0.0 | not told apart" in row for row in rows[1:])  # all methods have one curve
    for section in text.split("\n## "):
        assert len({row.count("|") for row in section.splitlines() if row.startswith("|")}) <= 1
    ET.parse(tmp_path / "accuracy.svg")


def test_cells_that_began_at_two_starts_are_not_compared(tmp_path: Path) -> None:
    for method in ("opd", "taid"):
        written(tmp_path, "main", method, 0)
    assert set(table.curves(tmp_path, "main")) == {"opd", "taid"}
    file = tmp_path / "main/taid-0.json"
    result = json.loads(file.read_text())
    result["points"][0]["exact"] += 0.01
    file.write_text(json.dumps(result))
    with pytest.raises(ValueError, match="main, seed 0: opd and taid began at .*--again"):
        table.curves(tmp_path, "main")


def test_a_claim_is_judged_by_its_interval() -> None:
    assert verdict(0.1, 0.05) == "yes" and verdict(-0.1, 0.05) == "**the other way round**"
    assert verdict(0.04, 0.05) == verdict(0.3, math.nan) == verdict(-0.04, 0.05, equal=True) == "not told apart"
    assert verdict(0.1, 0.05, equal=True) == "**no**"


def test_every_claim_is_about_methods_of_its_track() -> None:
    for claim in CLAIMS:
        assert {claim.better, claim.worse} <= set(TRACKS[claim.track].methods)


def test_keys_change_with_the_settings_and_not_with_the_list_of_methods() -> None:
    from dataclasses import replace

    track = TRACKS["main"]
    assert replace(track, lr=track.lr * 2).key() != track.key()
    assert replace(track, methods=("opd",), seeds=(0,)).key() == track.key()
    assert track.smaller(0.5).key() != track.key()


def test_the_committed_pages_are_those_of_the_committed_cells(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text((ARENA / "notes.md").read_text())
    (tmp_path / "sweeps").symlink_to(ARENA / "sweeps")
    found = table.all_curves(ARENA / "results")
    table.report(ARENA / "results", tmp_path, found)
    assert (tmp_path / "RESULTS.md").read_text() == (ARENA / "RESULTS.md").read_text()
    for page, guide in (("docs/methods.md", True), ("README.md", False)):
        text = (ARENA.parents[1] / page).read_text()
        assert table.with_figures(found, text, guide=guide) == text


def test_every_line_of_the_guide_is_about_methods_of_its_track() -> None:
    for shown in (*(s for entry in GUIDE for s in entry.shown), *(s for _, of_line in DECISION for s in of_line)):
        assert {shown.method, shown.against} <= set(TRACKS[shown.track].methods)
