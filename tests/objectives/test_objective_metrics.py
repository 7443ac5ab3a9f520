"""The metrics are the quantities that their names say."""

import pytest
import torch
from objective_cases import INF, logits

from llmdistill.objectives import divergences, policy, sparse
from llmdistill.objectives.metrics import dense_metrics, sampled_metrics, sparse_metrics


def test_dense_metrics_are_the_divergences():
    student, teacher = logits(0, 4, 9), logits(1, 4, 9)
    metrics = dense_metrics(student, teacher)
    torch.testing.assert_close(metrics["reverse_kl"], divergences.reverse_kl(student, teacher))
    torch.testing.assert_close(metrics["forward_kl"], divergences.forward_kl(student, teacher))
    torch.testing.assert_close(metrics["acceptance"], 1 - divergences.total_variation(student, teacher))
    torch.testing.assert_close(metrics["entropy"], torch.distributions.Categorical(logits=student).entropy())
    torch.testing.assert_close(metrics["top1_agreement"], (student.argmax(-1) == teacher.argmax(-1)).float())


@pytest.mark.parametrize("k", [1, 4, 9])
def test_sparse_metrics_bound_the_dense_ones(k):
    """Equal at K = V; below it the KLs are lower bounds, the acceptance an upper one, the rest exact."""
    student, teacher = logits(0, 50, 9), logits(1, 50, 9)
    ids = student.topk(k).indices  # the student's list: the teacher's likeliest token need not be on it
    logprobs = teacher.log_softmax(-1).gather(-1, ids)
    metrics, exact = sparse_metrics(student, ids, logprobs), dense_metrics(student, teacher)
    torch.testing.assert_close(metrics["reverse_kl"], sparse.reverse_kl(student, ids, logprobs))
    torch.testing.assert_close(metrics["forward_kl"], sparse.forward_kl(student, ids, logprobs))
    torch.testing.assert_close(metrics["entropy"], exact["entropy"])
    tail = 1 - logprobs.double().exp().sum(-1)
    torch.testing.assert_close(metrics["tail_mass"].double(), tail, rtol=1e-4, atol=1e-6)
    assert (metrics["reverse_kl"] <= exact["reverse_kl"] + 1e-4).all()
    assert (metrics["forward_kl"] <= exact["forward_kl"] + 1e-4).all()
    assert (metrics["acceptance"] >= exact["acceptance"] - 1e-5).all()
    if k == 9:
        for name, values in exact.items():
            torch.testing.assert_close(metrics[name], values, rtol=1e-5, atol=1e-5)


def test_top1_agreement_does_not_depend_on_the_order_of_the_list():
    student, teacher = logits(0, 50, 9), logits(1, 50, 9)
    logprobs, ids = teacher.log_softmax(-1).topk(4)
    expected = dense_metrics(student, teacher)["top1_agreement"]
    assert 0 < expected.sum() < 50
    torch.testing.assert_close(sparse_metrics(student, ids, logprobs)["top1_agreement"], expected)
    flipped = sparse_metrics(student, ids.flip(-1), logprobs.flip(-1))
    torch.testing.assert_close(flipped["top1_agreement"], expected)


def test_sampled_metrics_estimate_the_reverse_kl():
    """Averaged over every token with the student's probability, the estimate is the exact value."""
    student, teacher = logits(0, 7), logits(1, 7)
    rows, tokens = student.expand(7, 7), torch.arange(7)
    metrics = sampled_metrics(rows, tokens, policy.token_logprobs(teacher.expand(7, 7), tokens))
    mean = (student.softmax(-1) * metrics["reverse_kl"]).sum()
    torch.testing.assert_close(mean, divergences.reverse_kl(student, teacher))
    torch.testing.assert_close(metrics["entropy"], dense_metrics(rows, rows)["entropy"])


def test_masked_tokens_and_gradients():
    """Columns at -inf on both sides are as good as absent, and nothing carries gradient."""
    student, teacher = logits(0, 4, 9), logits(1, 4, 9)
    student[:, 3] = teacher[:, 3] = -INF
    kept = [0, 1, 2, 4, 5, 6, 7, 8]
    metrics = dense_metrics(student.requires_grad_(), teacher)
    for name, values in dense_metrics(student[:, kept], teacher[:, kept]).items():
        assert not metrics[name].requires_grad
        torch.testing.assert_close(metrics[name], values)
    logprobs, ids = teacher.log_softmax(-1).topk(9)
    for name, values in sparse_metrics(student, ids, logprobs).items():
        assert values.isfinite().all() and not values.requires_grad, name
