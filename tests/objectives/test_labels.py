"""Labels as targets, alone and mixed with the teacher."""

import pytest
import torch
from objective_cases import INF, logits, value_and_grad

from llmdistill.objectives.labels import cross_entropy, mixed_target
from llmdistill.objectives.selection import entropy

XIS = [0.0, 0.3, 1.0, 1.7]


def inputs(n=5, width=9):
    student, teacher = (logits(seed, n, width, dtype=torch.float64) for seed in (0, 1))
    return student, teacher, torch.randint(width, (n,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_torch_s(dtype):
    student, _, ids = inputs()
    z = student.to(dtype)
    found = value_and_grad(lambda z: cross_entropy(z, ids), z)
    exact = value_and_grad(lambda z: torch.nn.functional.cross_entropy(z.float(), ids, reduction="none"), z)
    torch.testing.assert_close(found, exact)
    assert found[0].dtype == torch.float32


@pytest.mark.parametrize("xi", XIS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mixed_target_is_written_out(xi, temperature):
    """-sum_v ((1 - xi) onehot + xi T) log S, a loop over tokens; each part at its own temperature."""
    student, teacher, ids = inputs()

    def plain(z):
        hard, soft = z.log_softmax(-1), (z / temperature).log_softmax(-1)
        target = (teacher / temperature).softmax(-1)
        rows = []
        for i, y in enumerate(ids.tolist()):
            rows.append(-(1 - xi) * hard[i, y] - xi * sum(target[i, v] * soft[i, v] for v in range(z.shape[-1])))
        return torch.stack(rows)

    found = value_and_grad(lambda z: mixed_target(z, teacher, ids, xi=xi, temperature=temperature), student)
    torch.testing.assert_close(found, value_and_grad(plain, student))


@pytest.mark.parametrize("xi", [0.3, 0.8, 1.0])
def test_a_student_at_the_mixed_target_has_no_gradient(xi):
    """For 0 < xi <= 1 the target is a distribution: it is the optimum, and the loss is its entropy."""
    _, teacher, ids = inputs()
    target = xi * teacher.softmax(-1) + (1 - xi) * torch.nn.functional.one_hot(ids, 9).double()
    value, grad = value_and_grad(lambda z: mixed_target(z, teacher, ids, xi=xi), target.log())
    assert grad.abs().max() < 1e-12
    torch.testing.assert_close(value, entropy(target.log()))


def test_excluded_tokens():
    """What both exclude does not exist; a label the student excludes costs nothing at xi 1."""
    student, teacher, _ = inputs()
    ids = torch.zeros(5, dtype=torch.int64)
    kept = [0, 1, 2, 4, 5, 6, 7, 8]
    expected = value_and_grad(lambda z: mixed_target(z, teacher[:, kept], ids, xi=0.4), student[:, kept])
    student[:, 3] = teacher[:, 3] = -INF
    value, grad = value_and_grad(lambda z: mixed_target(z, teacher, ids, xi=0.4), student)
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(grad[:, kept], expected[1])
    assert (grad[:, 3] == 0).all()
    assert mixed_target(student, teacher, ids + 3, xi=1.0).isfinite().all()


def test_only_the_student_gets_gradient():
    student, teacher, ids = inputs()
    teacher.requires_grad_()
    mixed_target(student.requires_grad_(), teacher, ids, xi=0.4).sum().backward()
    assert student.grad is not None and teacher.grad is None
