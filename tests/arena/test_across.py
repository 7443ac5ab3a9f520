"""The cells across tokenizers: two vocabularies of the one task, and every method in both directions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import across
import methods
import pytest
import torch
from models import GROUPED, TOKENIZER, Size, as_prompt, ids, tokenizer_of
from task import heldout, problems
from tracks import ACROSS, TRACKS
from transformers import TrainerCallback

from llmdistill import methods as compositions
from llmdistill.teachers.local import LocalTeacher


class Curve(TrainerCallback):
    tokens = 0
    sequences = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 2


def setting(folder: Path, student: Any, teacher: Any) -> methods.Setting:
    size, rows = Size(16, 1, 2, 32), [p.row() for p in problems(16, 3)]
    torch.manual_seed(0)
    return methods.Setting(
        model=size.build(0, len(student)),
        teacher=LocalTeacher(size.build(1, len(teacher)), teacher),
        data=methods.Data(labelled=rows, fresh=rows),
        curve=Curve(),  # type: ignore[arg-type]
        folder=folder,
        seed=0,
        lr=1e-3,
        batch=8,
        steps=2,
        tokenizer=student,
        same=LocalTeacher(size.build(2, len(student)), student),
    )


def test_numerals_are_taken_in_groups_from_the_left() -> None:
    assert GROUPED.convert_ids_to_tokens(ids("417+385=7+5+0=12;802", GROUPED)) == (
        ["41", "7", "+", "38", "5", "=", "7", "+", "5", "+", "0", "=", "12", ";", "80", "2"]
    )
    for problem in heldout(50):
        assert GROUPED.decode(as_prompt(problem, tok=GROUPED).completion[:-1]) == problem.completion
    assert tokenizer_of(Size(16, 1, 2, 32).build(0, len(GROUPED))) is GROUPED


DIGITS, GROUPS = (TOKENIZER, GROUPED), (GROUPED, TOKENIZER)  # the student's, the teacher's
CELLS = [
    *((name, DIGITS) for name in ACROSS if name not in ("sft_noised", "opsa")),
    *((name, GROUPS) for name in ("alm", "uld", "dskd", "mined")),
]


@pytest.mark.parametrize(
    ("name", "pair"), CELLS, ids=[f"{n}-{'digits' if p is DIGITS else 'groups'}" for n, p in CELLS]
)
def test_every_cell_trains(tmp_path: Path, name: str, pair: tuple[Any, Any]) -> None:
    made = setting(tmp_path, *pair)
    before = [p.detach().clone() for p in made.model.parameters()]
    trainer = {**methods.METHODS, **across.METHODS}[name].build(made)
    assert math.isfinite(trainer.train().training_loss)
    assert made.curve.tokens > 0 and trainer.state.global_step == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))
    share = across.aligned_share(trainer)
    if name in compositions.names():
        assert share == 1.0
    elif name in ("uld", "gold", "mined"):
        assert share is not None and 0.1 < share < 1
    if name == "uld" and pair[0] is TOKENIZER:
        # "7+5+0=12;...": 12 is one token of the teacher, and all that stands behind it has moved
        assert share == pytest.approx(6 / 34, abs=0.1)


def test_projectors_are_trained_beside_the_student(tmp_path: Path) -> None:
    trainer = across.METHODS["dskd"].build(setting(tmp_path, TOKENIZER, GROUPED))
    before = [p.detach().clone() for p in trainer.projectors.parameters()]  # type: ignore[attr-defined]
    trainer.train()
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.projectors.parameters(), strict=True))  # type: ignore[attr-defined]


def test_earlier_results_keep_their_keys() -> None:
    """The tracks of one tokenizer were measured before there were two: 5fa1b84."""
    assert TRACKS["main"].key() == "609112826dee"
    assert TRACKS["digits"].key() != TRACKS["groups"].key()
