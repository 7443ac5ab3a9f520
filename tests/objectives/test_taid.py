"""TAID: the released code's values and schedules, and what must hold of the interpolation."""

import math

import pytest
import torch
from objective_cases import golden, logits, value_and_grad

from llmdistill.objectives.divergences import forward_kl
from llmdistill.objectives.streaming import streamed
from llmdistill.objectives.taid import TAIDSchedule, sparse_taid, taid

REFERENCE = golden("taid")
student, teacher, mask = (REFERENCE["inputs"][k] for k in ("student_logits", "teacher_logits", "mask"))


@pytest.mark.parametrize("case", REFERENCE["loss_cases"], ids=lambda case: case["name"])
def test_values_and_gradients_of_the_released_code(case):
    """Its cross-entropy is our KL plus the target's entropy; the gradients are equal."""
    t = case["t"]
    mean, grad = value_and_grad(lambda z: taid(z, teacher, t)[mask].mean(), student)
    assert mean.item() == pytest.approx(case["paper_KL_float64"], rel=1e-5, abs=1e-12)
    expected = torch.tensor(case["grad_student_logits_float64"], dtype=torch.float64)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-9)
    log_p = ((1 - t) * student + t * teacher).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)[mask].mean()
    assert (mean + entropy).item() == pytest.approx(case["code_value_float64"], rel=1e-5)
    in_float32 = taid(student.float(), teacher.float(), t)[mask].mean()
    assert (in_float32 + entropy).item() == pytest.approx(case["expected_code_float32"], rel=1e-5)


@pytest.mark.parametrize("case", REFERENCE["update_sequences"], ids=lambda case: case["name"])
def test_the_schedule_of_the_released_code(case):
    params = dict(case["params"])
    if params.pop("disable_adaptive"):
        params["alpha"] = 0.0  # the line alone
    schedule = TAIDSchedule(**params, num_steps=case["num_train_steps"])
    for i, step in enumerate(case["steps_float32"]):
        assert schedule.update(step["loss"], step["global_step"]) == pytest.approx(case["t_after_float64"][i], rel=1e-9)
        if not case["params"]["disable_adaptive"]:
            assert schedule.momentum == pytest.approx(case["momentum_float64"][i], abs=1e-12)


def test_a_restored_schedule_goes_on_as_if_nothing_had_happened():
    losses = [3.0, 2.5, 2.6, 2.0, 1.9, 1.2]
    whole, first, second = (TAIDSchedule(alpha=0.3, beta=0.5, num_steps=50) for _ in range(3))
    expected = [whole.update(loss, i) for i, loss in enumerate(losses)]
    found = [first.update(loss, i) for i, loss in enumerate(losses[:3])]
    second.load_state_dict(first.state_dict())
    found += [second.update(loss, i) for i, loss in enumerate(losses[3:], start=3)]
    assert found == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_are_no_loss_and_the_forward_kl(dtype):
    s, t = logits(0, 7, 33, dtype=dtype), logits(1, 7, 33, dtype=dtype)
    value, grad = value_and_grad(lambda z: taid(z, t, 0.0), s)
    assert value.abs().max() < 1e-6 and grad.abs().max() < 1e-6
    for mine, exact in zip(
        value_and_grad(lambda z: taid(z, t, 1.0), s), value_and_grad(lambda z: forward_kl(z, t), s), strict=True
    ):
        torch.testing.assert_close(mine, exact)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_student_equal_to_teacher_and_a_permuted_vocabulary(t):
    s, z = logits(0, 5, 21), logits(1, 5, 21)
    value, grad = value_and_grad(lambda x: taid(x, s, t), s)
    assert value.abs().max() < 1e-6 and grad.abs().max() < 1e-6
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(taid(s[:, order], z[:, order], t), taid(s, z, t))


@pytest.mark.parametrize("t", [0.0, 0.25, 0.9, 1.0])
def test_buckets_of_the_whole_vocabulary_are_the_dense_form_and_fewer_are_below(t):
    """Coarse-graining the target and the student alike cannot raise a KL; interpolating buckets is that for K = V."""
    s, z = logits(0, 6, 19), logits(1, 6, 19)
    listed, ids = z.log_softmax(-1).topk(19)
    dense_value, dense_grad = value_and_grad(lambda x: taid(x, z, t), s)
    value, grad = value_and_grad(lambda x: sparse_taid(x, ids, listed, t), s)
    torch.testing.assert_close(value, dense_value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, dense_grad, rtol=1e-5, atol=1e-6)
    few = sparse_taid(s, ids[:, :4], listed[:, :4], t)
    assert (few >= -1e-6).all()


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_tokens_that_one_side_excludes(t):
    s, z = logits(0, 4, 9), logits(1, 4, 9)
    s[:, 2], z[:, 2] = -torch.inf, -torch.inf
    z[:, 5] = -torch.inf
    value, grad = value_and_grad(lambda x: taid(x, z, t), s)
    assert value.isfinite().all() and grad.isfinite().all()
    keep = [0, 1, 3, 4, 5, 6, 7, 8]
    torch.testing.assert_close(value, taid(s[:, keep], z[:, keep], t))


def test_streamed_equals_naive():
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, 31, bias=False)
    hidden = torch.randn(13, 8, generator=generator, requires_grad=True)
    target = logits(3, 13, 31)
    naive = taid(head(hidden), target, 0.4).sum()
    expected = torch.autograd.grad(naive, [hidden, head.weight])
    total, _ = streamed(lambda z, y: taid(z, y, 0.4), hidden, head, target, chunk_tokens=5)
    found = torch.autograd.grad(total, [hidden, head.weight])
    torch.testing.assert_close(total, naive)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan])
def test_a_share_outside_its_range(t):
    with pytest.raises(ValueError, match="share of the teacher"):
        taid(logits(0, 2, 5), logits(1, 2, 5), t)


@pytest.mark.parametrize("params", [{"t_start": 0.9, "t_end": 0.5}, {"alpha": -1.0}, {"beta": 1.0}, {"num_steps": 0}])
def test_a_schedule_that_cannot_be(params):
    with pytest.raises(ValueError):
        TAIDSchedule(**params)
