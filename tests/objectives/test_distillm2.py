"""DistiLLM-2 against a derivation of its own: loops over tokens in float64, gradients by autograd."""

import math

import pytest
import torch
from objective_cases import logits, value_and_grad

from llmdistill.objectives import divergences
from llmdistill.objectives.distillm2 import (
    adaptive_alpha,
    gradual_beta,
    on_student_text,
    on_teacher_text,
    pair_loss,
    probability_gap,
)

ALPHA = torch.tensor([0.1, 0.03, 0.1, 0.5], dtype=torch.float64)


def models(n=4, width=7):
    return tuple(logits(seed, n, width, dtype=torch.float64) for seed in (0, 1))


def written_out(direction, student, teacher, alpha):
    rows = []
    for z, t, a in zip(student.softmax(-1), teacher.softmax(-1), alpha.tolist(), strict=True):
        total = torch.zeros((), dtype=torch.float64)
        for v in range(len(z)):
            if direction == "teacher":
                total = total + t[v] * torch.log(t[v] / (a * t[v] + (1 - a) * z[v]))
            else:
                total = total + z[v] * torch.log(z[v] / ((1 - a) * t[v] + a * z[v].detach()))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("direction", ["teacher", "student"])
class TestRows:
    def loss(self, direction):
        return on_teacher_text if direction == "teacher" else on_student_text

    def test_value_and_gradient(self, direction):
        student, teacher = models()
        found = value_and_grad(lambda z: self.loss(direction)(z, teacher, ALPHA), student)
        exact = value_and_grad(lambda z: written_out(direction, z, teacher, ALPHA), student)
        torch.testing.assert_close(found, exact)

    def test_one_alpha_for_all_rows_is_distillm_s_value(self, direction):
        student, teacher = models()
        old = divergences.skew_forward_kl if direction == "teacher" else divergences.skew_reverse_kl
        found = value_and_grad(lambda z: self.loss(direction)(z, teacher, torch.full((4,), 0.1)), student)
        value, grad = value_and_grad(lambda z: old(z, teacher, alpha=0.1), student)
        torch.testing.assert_close(found[0], value)
        assert torch.allclose(found[1], grad) == (direction == "teacher")  # the detached mixture

    def test_a_student_that_is_its_teacher_has_no_loss(self, direction):
        student, _ = models()
        value, grad = value_and_grad(lambda z: self.loss(direction)(z, student + 1.0, ALPHA), student)
        assert value.abs().max() < 1e-12 and grad.abs().max() < 1e-12

    def test_excluded_tokens_and_shapes(self, direction):
        student, teacher = models()
        student[0, 2] = teacher[1, 2] = -math.inf
        student[2, 2] = teacher[2, 2] = -math.inf
        value, grad = value_and_grad(lambda z: self.loss(direction)(z, teacher, ALPHA), student)
        assert value.isfinite().all() and grad.isfinite().all()
        with pytest.raises(ValueError, match=r"alpha is \(1,\), the rows \(4,\)"):
            self.loss(direction)(student, teacher, ALPHA[:1])


def test_adaptive_alpha_by_hand():
    """Two sequences surer under the teacher, one under the student; the anchor is the mean gap of a first batch."""
    student_lp = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
    teacher_lp = torch.tensor([-0.8, -0.9, -1.5], dtype=torch.float64)
    gap = probability_gap(student_lp, teacher_lp)
    by_hand = [math.exp(-0.8) - math.exp(-1.0), math.exp(-0.9) - math.exp(-2.0), math.exp(-1.5) - math.exp(-0.5)]
    torch.testing.assert_close(gap, torch.tensor(by_hand, dtype=torch.float64))
    for sign in (1.0, -1.0):  # teacher's text, student's text
        anchor = sign * 0.083
        expected = [min(0.1, max(0.01, 1 - 0.9 * anchor / (sign * g + 1e-5))) for g in by_hand]
        torch.testing.assert_close(adaptive_alpha(sign * gap, anchor), torch.tensor(expected, dtype=torch.float64))
    assert adaptive_alpha(torch.tensor([0.083]), 0.083).item() == pytest.approx(0.1, abs=2e-4)
    middle = adaptive_alpha(torch.tensor([0.08]), 0.083).item()
    assert 0.01 < middle < 0.1 and (1 - middle) * 0.08 == pytest.approx(0.9 * 0.083, rel=1e-3)
    with pytest.raises(ValueError, match="lowest is 0.5"):
        adaptive_alpha(gap, 0.1, lowest=0.5)


def test_beta_and_the_pair_loss():
    assert [gradual_beta(step, 100) for step in (0, 25, 50, 100)] == [1.0, 1.25, 1.5, 1.5]
    x, y = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 5.0])
    assert pair_loss(x, y).item() == pytest.approx((1 + 2 + 3 + 5) / 2)
    assert pair_loss(x, y, 1.5).item() == pytest.approx((0.5 * 4 + 1.5 * 7) / 2)
    with pytest.raises(ValueError, match="one per pair"):
        pair_loss(x, y[:1])
    with pytest.raises(ValueError, match="beta is 2.5"):
        pair_loss(x, y, 2.5)
