"""The arena's cells of llmdistill.methods: each is built and takes two steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import methods
import pytest
import told
import torch
from models import TOKENIZER, Size
from task import problems
from tracks import TRACKS
from transformers import TrainerCallback

from llmdistill import methods as compositions
from llmdistill.teachers.local import LocalTeacher

CELLS = [
    "distillm2",
    "sampled_f",
    "vopd",
    "tip",
    "entropy_aware",
    "selected",
    "layers",
    "context",
    "opsd",
    "sdpo",
    "returns",
    "opsa",
]
# They need a track with two tokenizers, and are nothing new on one.
ACROSS_TOKENIZERS = {"alm", "chunk_opd", "p_kl", "h_kl", "simct"}


class Curve(TrainerCallback):
    tokens = 0
    sequences = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 2


def test_every_method_of_the_package_has_a_cell() -> None:
    assert len(CELLS) == len(set(compositions.names()) - ACROSS_TOKENIZERS)
    assert set(CELLS) <= {*TRACKS["main"].methods, *TRACKS["told"].methods}


def test_noise_is_of_digits_alone_and_of_a_tenth_of_them() -> None:
    rows = [p.row() for p in problems(400, 3)]
    made = methods.noised(rows, "0123456789", 5)
    pairs = [
        (old, new)
        for row, other in zip(rows, made, strict=True)
        for old, new in zip(row["completion"], other["completion"], strict=True)
    ]
    assert [r["prompt"] for r in made] == [r["prompt"] for r in rows]
    assert all(old == new or (old.isdigit() and new.isdigit()) for old, new in pairs)
    digits = [(old, new) for old, new in pairs if old.isdigit()]
    assert 0.08 < sum(old != new for old, new in digits) / len(digits) < 0.1  # one draw of ten is the same digit


@pytest.mark.parametrize("cell", CELLS)
def test_it_trains(tmp_path: Path, cell: str) -> None:
    torch.manual_seed(0)
    size = Size(16, 1, 2, 32)
    rows = told.rows(16, 3)
    setting = methods.Setting(
        model=size.build(0),
        teacher=LocalTeacher(size.build(1), TOKENIZER),
        data=methods.Data(labelled=rows, fresh=rows),
        curve=Curve(),  # type: ignore[arg-type]
        folder=tmp_path,
        seed=0,
        lr=1e-3,
        batch=8,
        steps=2,
    )
    trainer = methods.METHODS[cell].build(setting)
    assert math.isfinite(trainer.train().training_loss)
    assert setting.curve.tokens > 0 and trainer.state.global_step == 2
