"""Baselines: the same expectation, the authors' advantages, and the variance they leave."""

from functools import partial

import pytest
import torch
from objective_cases import INF, golden, logits, value_and_grad

from llmdistill.objectives import divergences, policy
from llmdistill.objectives.baseline import kl_baseline, optimal_baseline, topk_kl_baseline, with_baseline
from llmdistill.objectives.sampler import nucleus, token_logprobs

V = 7


def models(n=4, scale=1.5):
    return tuple(logits(seed, n, V, scale=scale, dtype=torch.float64) for seed in (0, 1))


def evidence(kind, student, teacher):
    if kind is not topk_kl_baseline:
        return (teacher,)
    ids = student.topk(3).indices
    return ids, teacher.log_softmax(-1).gather(-1, ids)


def variance(student, teacher, baseline):
    """Of the one-sample gradient of the logits [n]: sum_y S_y |g_y|^2 - |E g|^2, g_y formed in full."""
    s = student.softmax(-1)
    advantage = teacher.log_softmax(-1) - student.log_softmax(-1) - baseline[:, None]
    each = -advantage[..., None] * (torch.eye(V, dtype=s.dtype) - s[:, None, :])  # [n, y, V]
    mean = (s[..., None] * each).sum(1)
    return (s * each.square().sum(-1)).sum(-1) - mean.square().sum(-1)


every_baseline = pytest.mark.parametrize("kind", [kl_baseline, topk_kl_baseline, optimal_baseline])


@every_baseline
@pytest.mark.parametrize("setting", [(1.0, 0, 1.0), (1.0, 3, 1.0), (0.6, 0, 0.9)], ids=str)
def test_the_expected_gradient_stays(kind, setting):
    """Under any sampler, to 1e-12; at the plain one it is the reverse KL's."""
    student, teacher = models()
    given = dict(zip(("temperature", "top_k", "top_p"), setting, strict=True))
    kept = nucleus(student / setting[0], top_k=setting[1], top_p=setting[2])
    drawn = (student / setting[0]).masked_fill(~kept, -INF).softmax(-1)
    found, plain, more = torch.zeros_like(student), torch.zeros_like(student), evidence(kind, student, teacher)
    for y in range(V):
        ids = torch.full((4,), y)
        lp = token_logprobs(teacher, ids)
        loss, without = with_baseline(kind, **given), partial(policy.sampled_token, **given)
        found += drawn[:, y, None] * value_and_grad(lambda z, y=ids, t=lp, f=loss: f(z, y, t, *more), student)[1]
        plain += drawn[:, y, None] * value_and_grad(lambda z, y=ids, t=lp, f=without: f(z, y, t), student)[1]
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)
    if setting == (1.0, 0, 1.0):
        exact = value_and_grad(lambda z: divergences.reverse_kl(z, teacher), student)[1]
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", golden("vopd")["cases"], ids=lambda c: f"top_{c['kl_top_k']}")
def test_the_authors_advantages_and_loss(case):
    i = golden("vopd")["inputs"]
    student, teacher, tokens, mask = i["student_logits"], i["teacher_logits"], i["tokens"], i["mask"]
    lp, more, kind = token_logprobs(teacher, tokens), (teacher,), kl_baseline
    if case["kl_top_k"]:
        ids = student.topk(case["kl_top_k"]).indices
        more, kind = (ids, teacher.log_softmax(-1).gather(-1, ids)), topk_kl_baseline
    advantage = lp - token_logprobs(student, tokens) - kind(student, *more)
    expected = torch.tensor(case["advantages"], dtype=torch.float64)
    torch.testing.assert_close(advantage[mask], expected[mask], rtol=1e-6, atol=1e-8)
    value, grad = value_and_grad(lambda z: with_baseline(kind)(z, tokens, lp, *more)[mask].mean(), student)
    assert value.item() == pytest.approx(case["loss"], rel=1e-6)
    expected = torch.tensor(case["grad_student_logits"], dtype=torch.float64)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-8)


def test_the_published_variances():
    """vopd.json, without a baseline and with the KL's."""
    data = golden("vopd")
    student, teacher, mask = (data["inputs"][k] for k in ("student_logits", "teacher_logits", "mask"))
    student, teacher = student[mask], teacher[mask]
    for name, baseline in (
        ("no_baseline", torch.zeros(len(student), dtype=torch.float64)),
        ("with_full_baseline", kl_baseline(student, teacher)),
    ):
        expected = torch.tensor(data["exact_gradient_variance"][name], dtype=torch.float64)[mask]
        torch.testing.assert_close(variance(student, teacher, baseline), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scale", [0.1, 1.5, 4.0])
def test_no_constant_leaves_less_variance_than_the_optimal_one(scale):
    student, teacher = models(50, scale)
    best = optimal_baseline(student, teacher)
    least = variance(student, teacher, best)
    for other in (torch.zeros_like(best), kl_baseline(student, teacher), best + 0.1, best - 0.1):
        assert (least <= variance(student, teacher, other) + 1e-12).all()
    s = student.softmax(-1)  # the formula, term by term
    w = 1 - 2 * s + s.square().sum(-1, keepdim=True)
    a = teacher.log_softmax(-1) - student.log_softmax(-1)
    torch.testing.assert_close(best, (s * a * w).sum(-1) / (s * w).sum(-1))


@every_baseline
def test_equal_models_extremes_padding_and_gradients(kind):
    student, _ = models()
    assert kind(student, *evidence(kind, student, student + 1.0)).abs().max() < 1e-12
    certain = torch.tensor([[1e4, 0.0, -INF, 1.0]])
    unsure = torch.tensor([[0.0, 1.0, -INF, 2.0]])
    for pair in ((certain, unsure), (unsure, certain)):
        assert (
            kind(pair[0], *(e[:, :2] if kind is topk_kl_baseline else e for e in evidence(kind, *pair)))
            .isfinite()
            .all()
        )
    assert not kind(student.clone().requires_grad_(), *evidence(kind, student, student)).requires_grad


def test_padding_of_the_list_is_no_token():
    student, teacher = models()
    ids, lp = evidence(topk_kl_baseline, student, teacher)
    longer = torch.cat([ids, torch.full((4, 2), -1)], -1), torch.cat([lp, torch.zeros(4, 2)], -1)
    torch.testing.assert_close(topk_kl_baseline(student, *longer), topk_kl_baseline(student, ids, lp))
    nothing = torch.full((4, 2), -1), torch.zeros(4, 2)
    assert (topk_kl_baseline(student, *nothing) == 0).all()
