"""DistiLLM-2: two texts of a prompt, a loss for each, and what moves in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from tests import tiny
from tests.methods import rounds

OTHER = [([5, 6, 7, 8], [60, 61], None, [0.0] * 2), ([11, 12], [62, 63, 64], None, [0.0] * 3)]
OWN = [(row[0], row[1], None, row[3]) for row in rounds.SEQUENCES[:2]]


def texts() -> dict[str, Any]:
    return {"teacher": rounds.text(OTHER), "student": rounds.text(OWN)}


def side(s: list[Tensor], t: list[Tensor], alphas: list[float], own: bool) -> Tensor:
    """Mean over sequences of their token means."""
    means = []
    for log_s, full, a in zip(s, t, alphas, strict=True):
        q = full.detach()
        if own:  # KL(S || (1 - a) T + a sg[S])
            mixture = ((1 - a) * q.exp() + a * log_s.detach().exp()).log()
            means.append(rounds.kl(log_s, mixture).mean())
        else:  # KL(T || a T + (1 - a) S)
            means.append(rounds.kl(q, (a * q.exp() + (1 - a) * log_s.exp()).log()).mean())
    return torch.stack(means).mean()


@pytest.mark.parametrize("beta", [1.0, 1.3])
def test_loss_and_gradients_equal_the_formula(tmp_path: Path, beta: float) -> None:
    """(2 - beta) of the teacher's text and beta of the student's; a long sequence weighs as much as a short one."""
    student, teacher = tiny.llama(1), tiny.llama(2)
    t = rounds.make(tmp_path, "distillm2", student=student, teacher=teacher, alpha=0.2)
    t.method.schedules["beta"].now = beta
    s, q = (lambda rows: rounds.logps(student, rows)), (lambda rows: rounds.logps(teacher, rows))
    expected = (2 - beta) * side(s(OTHER), q(OTHER), [0.2] * 2, False) + beta * side(s(OWN), q(OWN), [0.2] * 2, True)
    rounds.assert_agree(t, texts(), student, expected)


def test_alpha_per_sequence_from_the_first_round_s_gap(tmp_path: Path) -> None:
    """a = 1 - (1 - base) anchor / gap in [.01, base], gap = +-(e^mean log T - e^mean log S), anchor its first mean."""
    student, teacher = tiny.llama(1), tiny.llama(2)
    t = rounds.make(tmp_path, "distillm2", student=student, teacher=teacher, alpha=0.2, adaptive_alpha=True)
    first = rounds.gradients(t, texts())
    anchors = {name: t.method.schedules[name].anchor for name in ("on_teacher", "on_student")}
    expected = torch.zeros((), dtype=torch.float64)
    alphas = {}
    for name, rows, sign in (("on_teacher", OTHER, 1), ("on_student", OWN, -1)):
        s, q = rounds.logps(student, rows), rounds.logps(teacher, rows)
        means = [
            [rounds.pick(x, y).mean().exp().item() for x, y in zip(m, rounds.tokens(rows), strict=True)] for m in (s, q)
        ]
        gaps = [sign * (b - a) for a, b in zip(*means, strict=True)]
        anchor = sum(gaps) / 2
        assert anchors[name] == pytest.approx(anchor, rel=1e-4)
        alphas[name] = [min(0.2, max(0.01, 1 - 0.8 * anchor / (gap + 1e-5))) for gap in gaps]
        expected = expected + side(s, q, alphas[name], name == "on_student")
    assert len({round(a, 6) for values in alphas.values() for a in values}) > 1
    assert first[0] == pytest.approx(float(expected.detach()), rel=1e-5)
    rounds.assert_agree(t, texts(), student, expected)
    assert anchors == {name: t.method.schedules[name].anchor for name in anchors}  # the first round's stays


def test_the_texts_are_of_two_authors_and_beta_moves(tmp_path: Path) -> None:
    """1 + progress until half of the run, at most 1.5; a run without gradual_beta stays at 1."""
    t = rounds.make(tmp_path, "distillm2", gradual_beta=True, max_steps=4)
    drawn = t.draw(t.train_dataset[:3])
    assert {name: text.author for name, text in drawn.items()} == {"teacher": "dataset", "student": "student"}
    assert [p.row for p in drawn["teacher"].prompts] == [p.row for p in drawn["student"].prompts]
    seen, weights = [], {term.name: term for term in t.method.terms}

    class See(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            seen.append((weights["on_teacher"].weight_now, weights["on_student"].weight_now))

    t.add_callback(See())
    t.train()
    assert seen == [(1.0, 1.0), (0.75, 1.25), (0.5, 1.5), (0.5, 1.5)]


def test_the_teacher_s_completion_may_be_sampled_anew(tmp_path: Path) -> None:
    t = rounds.make(tmp_path, "distillm2", teacher_text="teacher", rows=tiny.rows(8, completion=False))
    assert {name: x.author for name, x in t.draw(t.train_dataset[:2]).items()} == {
        "teacher": "teacher",
        "student": "student",
    }
