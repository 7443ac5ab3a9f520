"""Distances of hidden states, and the mutual-information bound against loops in float64."""

import math

import pytest
import torch
from objective_cases import logits, value_and_grad

from llmdistill.objectives.layers import cosine_distance, mi_alpha_loss, mse


def states():
    return logits(0, 5, 8, dtype=torch.float64), logits(1, 5, 8, dtype=torch.float64)


def test_distances_written_out():
    student, teacher = states()
    value, grad = value_and_grad(lambda h: mse(h, teacher), student)
    torch.testing.assert_close(value, ((student - teacher) ** 2).mean(-1))
    torch.testing.assert_close(grad, (student - teacher) / 4)

    def cosine(h):
        return 1 - (h * teacher).sum(-1) / (h.square().sum(-1).sqrt() * teacher.square().sum(-1).sqrt())

    found = value_and_grad(lambda h: cosine_distance(h, teacher), student)
    torch.testing.assert_close(found, value_and_grad(cosine, student))
    assert cosine_distance(student, 3 * student).abs().max() < 1e-12 and mse(student, student).abs().max() == 0


@pytest.mark.parametrize("distance", [cosine_distance, mse])
def test_float32_shapes_and_a_detached_teacher(distance):
    student, teacher = (h.bfloat16().requires_grad_() for h in states())
    value = distance(student, teacher)
    value.sum().backward()
    assert value.dtype == torch.float32 and student.grad.dtype == torch.bfloat16 and teacher.grad is None
    assert distance(student * 0, teacher).isfinite().all()
    with pytest.raises(ValueError, match="project one to the width"):
        distance(student, teacher[:, :4])


def bound(f, b, alpha_logit):
    """The definition, index by index; f [B, B] and b [B] as tensors of float64 so that autograd follows."""
    size, w = len(f), torch.sigmoid(torch.as_tensor(alpha_logit, dtype=torch.float64))

    def a(i, j):
        others = sum(f[i, k].exp() for k in range(size) if k != j) / (size - 1)
        return torch.log(w * others + (1 - w) * b[i].exp())

    pairs = [(i, j) for i in range(size) for j in range(size) if i != j]
    joint = sum(f[i, i] - a(i, j) for i, j in pairs) / len(pairs)
    marginal = sum((f[i, j] - a(i, i)).exp() for i, j in pairs) / len(pairs)
    return 1 + joint - marginal


@pytest.mark.parametrize("alpha_logit", [-2.0, 0.0, 0.5, 3.0])
@pytest.mark.parametrize("size", [2, 5])
def test_mi_alpha_by_loops(alpha_logit, size):
    f, b = logits(2, size, size, dtype=torch.float64), logits(3, size, dtype=torch.float64)
    found = value_and_grad(lambda f: mi_alpha_loss(f, b, alpha_logit), f)
    torch.testing.assert_close(found, value_and_grad(lambda f: -bound(f, b, alpha_logit), f))
    found = value_and_grad(lambda b: mi_alpha_loss(f, b, alpha_logit), b)
    torch.testing.assert_close(found, value_and_grad(lambda b: -bound(f, b, alpha_logit), b))
    logit = torch.tensor(alpha_logit, dtype=torch.float64)
    found = value_and_grad(lambda x: mi_alpha_loss(f, b, x), logit)
    torch.testing.assert_close(found, value_and_grad(lambda x: -bound(f, b, x), logit))


def test_mi_alpha_tends_to_infonce():
    """At alpha_logit +inf the marginal term is 1 in every row: mean of f_ii - log mean_{k != j} e^f_ik, b unread.

    A perfect critic (f_ii large) reaches its ceiling, and the loss of ties, log((B - 1) / (B - 1)) = 0.
    """
    f, b = logits(2, 6, 6, dtype=torch.float64), logits(3, 6, dtype=torch.float64)
    nce = 0.0
    for i in range(6):
        for j in range(6):
            if i != j:
                nce += (f[i, i] - torch.log(sum(f[i, k].exp() for k in range(6) if k != j) / 5)) / 30
    for alpha_logit in (50.0, math.inf):
        torch.testing.assert_close(mi_alpha_loss(f, b, alpha_logit), -nce)
        assert mi_alpha_loss(1e3 * torch.eye(6, dtype=torch.float64), b, alpha_logit).item() == pytest.approx(
            -math.log(5), rel=1e-6
        )
        assert mi_alpha_loss(torch.zeros(6, 6), b, alpha_logit).abs().item() < 1e-6


def test_mi_alpha_at_dominating_scores_and_wrong_shapes():
    """One score that is all of its row's sum, in float32: the mean of the others keeps its digits, and its gradient."""
    f = torch.tensor([[0.0, 60.0, 1.0], [0.0, 0.0, 0.0], [2.0, -50.0, 50.0]])
    b = torch.zeros(3)
    value, grad = value_and_grad(lambda f: mi_alpha_loss(f, b, 2.0), f)
    exact = value_and_grad(lambda f: -bound(f, b.double(), 2.0), f.double())
    torch.testing.assert_close(value.double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), exact[1], rtol=1e-4, atol=1e-6)
    for scores, baseline in ((f[:2], b[:2]), (f[:1, :1], b[:1]), (f, b[:2])):
        with pytest.raises(ValueError, match="B >= 2"):
            mi_alpha_loss(scores, baseline, 0.0)
