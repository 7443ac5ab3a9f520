"""Every track of the arena, a step of a cell or two: mechanics only, with teachers that learned nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import direction
import models
import pytest
import recovery_models
import recovery_scores
import told
import tracks
import ways
from clock import Budget
from entries import METHODS
from recovery_models import LongSize
from teachers import Text

CELLS = [
    ("main", "fkl_noised"),
    ("main", "opd"),
    ("main", "adaptive"),
    ("capacity", "opsa"),
    ("negatives", "redi"),
    ("negatives", "sft_noised"),
    ("negatives", "opsa"),
    ("experts", "opd"),
    ("hacking", "opsa"),
    ("digits", "alm"),
    ("digits", "simct"),
    ("groups", "opd_classes"),
    ("digits", "opsa"),
    ("groups", "opsa"),
    ("groups", "chunk_opd"),
    ("groups", "sft_noised"),
    ("recovery", "sft_mistakes"),
    ("recovery", "fkl_mistakes"),
    ("recovery", "gkd_half"),
    ("recovery", "opd_blind"),
    ("recovery", "returns_fixed"),
    ("recovery_long", "opd"),
    ("recovery_negatives", "redi_first"),
    ("recovery_negatives", "dpo_traces"),
    ("recovery_six", "opd"),
    ("ways", "returns"),
    ("ways", "fkl_noised"),
    ("direction", "exopd_1.5"),
    ("direction", "opd_reward"),
    ("told", "opsd"),
    ("told", "sdpo"),
    ("told", "context_given"),
]
COMMON = {"step", "tokens", "cpu_seconds"}
RECOVERY = {"exact", "exact_t1", "reverse_kl", "forward_kl", "steps_right", "corrected"}
SCORES = {
    "negatives": {"exact", "exact_t1"},
    "hacking": {"golden"},
    "ways": {"exact", "exact_t1", "reverse_kl", "best_way", "right_on_best"},
    "direction": {"exact", "exact_t1", "reverse_kl"},
    "told": {"exact", "exact_t1"},
    **dict.fromkeys(("main", "capacity"), {"exact", "reverse_kl"}),
    **dict.fromkeys((name for name in tracks.TRACKS if name.startswith("recovery")), RECOVERY),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Teachers and starts of no training at all, under a folder of their own."""
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("arena")
    for module in (models, tracks):
        patch.setattr(module, "CACHE", folder)
    patch.setattr(recovery_scores, "SCORED", 4)
    patch.setattr(recovery_scores, "COMPARED", 2)
    about = {"exact": 0.0, "cpu_seconds": 0.0}

    def of_traces(*_: Any) -> Any:
        return models.cached("untrained", lambda: (LongSize(16, 1, 2, 32).build(1), about))

    def of_sums(*_: Any, vocabulary: int = models.VOCABULARY, **__: Any) -> Any:
        return models.cached(
            f"untrained-sums-{vocabulary}", lambda: (models.Size(16, 1, 2, 32).build(1, vocabulary), about)
        )

    def teacher(name: str, note: Any) -> Any:
        if name == "ways" or name.startswith("recovery"):
            return of_traces()
        return of_sums(vocabulary=len(models.GROUPED if name == "grouped" else models.TOKENIZER))

    sampled = tracks.sample

    def sample(name: str, *args: Any) -> Text:
        text = sampled(name, *args)
        if name != "weak":
            return text
        return Text(text.problems, [[p.completion, p.completion[:-1] + "x"] for p in text.problems], 0.0)

    patch.setattr(tracks, "teacher", teacher)
    patch.setattr(tracks, "sample", sample)
    patch.setattr(recovery_models, "start", of_traces)
    patch.setattr(ways, "start", of_traces)
    patch.setattr(told, "start", of_sums)
    patch.setattr(tracks, "start", of_sums)
    patch.setattr(tracks, "SCORED", 8)
    for name, few in {"STEPS": 1, "BATCH": 2, "SAMPLES": 2}.items():
        patch.setattr(direction, name, few)
    yield folder
    patch.undo()


def test_every_track_is_here_and_every_method_of_a_track_there_is() -> None:
    assert {name for name, _ in CELLS} == set(tracks.TRACKS)
    for name, track in tracks.TRACKS.items():
        assert set(track.methods) <= set(METHODS)
        assert {method for of, method in CELLS if of == name} <= set(track.methods)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), CELLS)
def test_a_cell_trains(small: Path, name: str, method: str) -> None:
    track = tracks.TRACKS[name]
    few = 32 if track.pairs else 0
    track = replace(track, fresh=32, fixed=8, labels=min(track.labels, 16), pairs=few, budget=Budget(1, 0.0, 1))
    prepared = tracks.prepare(track, tracks.Cell(name, method, 0))
    trainer = METHODS[method].build(prepared.setting)
    trainer.train()
    points = prepared.setting.curve.points
    assert trainer.state.global_step == 1 and [p["step"] for p in points] == [0, 1]
    assert points[-1]["tokens"] > 0 and COMMON | SCORES.get(name, {"exact"}) <= set(points[-1])
