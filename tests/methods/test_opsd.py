"""OPSD: the student judged by itself with the solution in its prompt."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill.teachers.student import StudentTeacher
from tests import tiny
from tests.methods import rounds

HAVE = [i for i, row in enumerate(rounds.SEQUENCES) if row[2] is not None]


def jsd(s: Tensor, t: Tensor, beta: float) -> Tensor:
    if beta in (0.0, 1.0):
        return rounds.kl(s, t) if beta else rounds.kl(t, s)
    m = (beta * t.exp() + (1 - beta) * s.exp()).log()
    return beta * rounds.kl(t, m) + (1 - beta) * rounds.kl(s, m)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("which", ["initial", "live"])
def test_loss_and_gradients_equal_the_formula(tmp_path: Path, beta: float, which: Any) -> None:
    """Both logits over 1.1; samples without a context are in neither sum; the judge's pass has no gradient."""
    student = tiny.llama(1)
    judge = copy.deepcopy(student).requires_grad_(False)
    settings: dict[str, Any] = {"context": rounds.CONTEXT, "beta": beta}
    t = rounds.make(tmp_path, "opsd", student=student, teacher=StudentTeacher(which), **settings)
    s = rounds.logps(student, temperature=1.1)
    q = rounds.logps(judge, temperature=1.1, in_context=True)
    losses = torch.cat([jsd(s[i], q[i], beta) for i in HAVE])
    assert len(losses) == 6  # of eleven tokens
    rounds.assert_agree(t, rounds.text(), student, losses.mean())


def test_a_start_that_training_has_left_is_still_the_judge(tmp_path: Path) -> None:
    student = tiny.llama(1)
    t = rounds.make(tmp_path, "opsd", student=student, teacher=StudentTeacher("initial"), context=rounds.CONTEXT)
    start = copy.deepcopy(student).requires_grad_(False)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    s, q = rounds.logps(student, temperature=1.1), rounds.logps(start, temperature=1.1, in_context=True)
    rounds.assert_agree(t, rounds.text(), student, torch.cat([jsd(s[i], q[i], 0.5) for i in HAVE]).mean())
