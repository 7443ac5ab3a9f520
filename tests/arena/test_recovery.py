"""The task "recovery": what follows from what, what is put in, how a text is judged; and its cells on small budgets."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import recovery_models
import recovery_scores
import recovery_task
import tracks
from clock import Budget
from entries import METHODS
from recovery_models import LongSize, as_prompt, pairs, with_mistakes
from recovery_task import RIGHT, STEPS, Mistakes, Problem, Reading, everything, following, injected, shares, working


@pytest.mark.parametrize("size", [8, 6])
def test_the_table_is_rows_of_permutations_and_every_prompt_has_one_trace(size: int) -> None:
    assert all(sorted(row) == list(range(size)) for row in recovery_task.table(size))
    assert len(everything(size)) == size**3
    for problem in random.Random(0).sample(everything(size), 20):
        a, b, c = problem.a, problem.b, problem.c
        for i in range(0, 3 * STEPS, 3):
            guess, step, verdict = problem.completion[i : i + 3]
            assert (
                int(guess) == recovery_task.table(size)[recovery_task.table(size)[c][b]][a] == following(size, a, b, c)
            )
            assert int(step) == working(size, b, c) and verdict == RIGHT
            a, b, c = b, c, int(guess)
        assert problem.solved_by(problem.completion)
        assert not problem.solved_by(problem.completion[:-1]) and not problem.solved_by(problem.completion + RIGHT)


def test_mistakes_are_what_is_marked_and_all_else_follows() -> None:
    problem, rng = Problem(1, 2, 3), random.Random(3)
    trace = injected(problem, rng, Mistakes(guess=0.5, working=0.2, state=0.2))
    assert 30 < sum(trace.put_in) < 3 * STEPS - 30 and len(trace.text) == 3 * STEPS == len(trace.put_in)
    state = (1, 2, 3)
    for i in range(0, 3 * STEPS, 3):
        (guess, step, verdict), marked = trace.text[i : i + 3], trace.put_in[i : i + 3]
        right = following(8, *state)
        assert marked[0] == (int(guess) != right) and marked[1] == (int(step) != working(8, *state[1:]))
        if not marked[2]:
            assert verdict == (RIGHT if int(guess) == right else str(right))
        state = (*state[1:], int(guess if verdict == RIGHT else verdict))
    prompt = as_prompt(problem, trace.text, trace.put_in)
    assert prompt.counts == (*(not p for p in trace.put_in), True) and len(prompt.completion) == recovery_task.TOKENS


def test_repaired_mistakes_leave_a_trace_exact_and_others_do_not() -> None:
    problem = Problem(4, 0, 7)
    repaired = injected(problem, random.Random(1), Mistakes(guess=1.0)).text
    read = Reading.of(problem, repaired)
    assert (read.exact, read.steps, read.right, read.guessed, read.repaired) == (True, STEPS, STEPS, 0, STEPS)
    right = problem.completion
    lost = right[:2] + str((int(right[0]) + 1) % 8) + right[3:]  # the first digit that stands is a wrong one
    read = Reading.of(problem, lost)
    assert not read.exact and read.steps == STEPS and read.right < STEPS
    found = shares([Reading.of(problem, repaired), Reading.of(problem, lost)])
    assert found["exact"] == 0.5 and 0.5 < found["steps_right"] < 1


@pytest.mark.parametrize("text", ["", "1", "12", "999", "=..", "12.12", "1 2", "....", "\u0664\u0664.", "8" * 500])
def test_what_is_no_trace_is_read_up_to_where_it_is_none(text: str) -> None:
    read = Reading.of(Problem(1, 2, 3), text)
    assert not read.exact and read.steps <= len(text) // 3


def test_pairs_share_a_right_prefix_and_part_at_a_wrong_verdict() -> None:
    for pair in pairs(8, 30, 1):
        problem = Problem(*map(int, pair["prompt"][:3]))
        assert Reading.of(problem, pair["chosen"]).exact and not Reading.of(problem, pair["rejected"]).exact
        place = next(i for i, (x, y) in enumerate(zip(pair["chosen"], pair["rejected"], strict=True)) if x != y)
        assert place % 3 == 2 and place >= 30
        read = Reading.of(problem, pair["rejected"])
        assert read.steps == STEPS and read.right == STEPS - 1  # it goes on rightly from where it is


def test_offline_text_holds_mistakes_and_their_repairs() -> None:
    rows = with_mistakes(8, 20, 1).rows
    read = [Reading.of(Problem(*map(int, r["prompt"][:3])), r["completion"]) for r in rows]
    assert all(r.exact for r in read) and 0.35 < sum(r.guessed for r in read) / (STEPS * 20) < 0.65


# One of every way that cells of these tracks are built; test_methods.py has the others.
CELLS = [
    ("recovery", "sft_mistakes"),
    ("recovery", "fkl_mistakes"),
    ("recovery", "gkd_half"),
    ("recovery", "opd_blind"),
    ("recovery_negatives", "redi_first"),
    ("recovery_negatives", "dpo_traces"),
    ("recovery_six", "opd"),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Teachers and starts of no training at all, under a folder of their own."""
    patch, folder = pytest.MonkeyPatch(), tmp_path_factory.mktemp("arena")
    for module in (models, recovery_models, tracks):
        patch.setattr(module, "CACHE", folder)
    patch.setattr(recovery_scores, "SCORED", 4)
    patch.setattr(recovery_scores, "COMPARED", 2)
    untrained = lambda: (LongSize(16, 1, 2, 32).build(1), {"exact": 0.0, "cpu_seconds": 0.0})  # noqa: E731
    made = lambda *_: models.cached("untrained", untrained)  # noqa: E731
    patch.setattr(tracks, "teacher", made)
    patch.setattr(recovery_models, "start", made)
    yield folder
    patch.undo()


def test_every_method_of_a_track_is_there() -> None:
    for track in tracks.TRACKS.values():
        assert set(track.methods) <= set(METHODS)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), CELLS)
def test_a_cell_trains(small: Path, name: str, method: str) -> None:
    track = replace(
        tracks.TRACKS[name], fresh=32, pairs=32 if tracks.TRACKS[name].pairs else 0, budget=Budget(1, 0.0, 1)
    )
    prepared = tracks.prepare(track, tracks.Cell(name, method, 0))
    trainer = METHODS[method].build(prepared.setting)
    trainer.train()
    points = prepared.setting.curve.points
    assert trainer.state.global_step == 1 and [p["step"] for p in points] == [0, 1]
    assert points[-1]["tokens"] > 0 and {"exact_t1", "steps_right", "corrected", "reverse_kl"} <= set(points[-1])
