"""What must hold of every objective that training composes: equality, renaming of tokens, chunks, all tokens listed.

The divergences alone are in test_divergences, test_sparse_divergences and test_streaming.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from objective_cases import CASES, logits, value_and_grad
from torch import Tensor

from llmdistill.objectives import divergences, policy
from llmdistill.objectives.baseline import kl_baseline, optimal_baseline, with_baseline
from llmdistill.objectives.composed import extrapolated, extrapolated_sampled, on_samples
from llmdistill.objectives.f_policy import sampled_f
from llmdistill.objectives.power import power_sampled
from llmdistill.objectives.rows import LogitRows, PairedRows, SparseRows, TeacherRows, TokenRows
from llmdistill.objectives.streaming import streamed
from llmdistill.objectives.taid import sparse_taid, taid

N, V = 9, 31


@dataclass(frozen=True)
class Composed:
    """An objective and the rows it reads, from (teacher, reference, behavior) logits [N, V], tokens and advantages."""

    name: str
    loss: Callable[..., Tensor]
    rows: Callable[..., TeacherRows]
    vanishes: bool = True  # where student, teacher and reference are the same


def dense(teacher, reference, behavior, ids, advantage):
    return LogitRows(teacher)


def listed(k: int):
    def rows(teacher, reference, behavior, ids, advantage):
        found = teacher.log_softmax(-1).topk(k)
        return SparseRows(found.indices, found.values)

    return rows


def drawn(teacher, reference, behavior, ids, advantage):
    return TokenRows(ids, policy.token_logprobs(teacher, ids))


def with_reference(rows):
    return lambda teacher, reference, *rest: PairedRows((rows(teacher, None, *rest), rows(reference, None, *rest)))


def rewarded(teacher, reference, behavior, ids, advantage):
    return TokenRows(ids, advantage)


def with_rows(*kinds):
    return lambda *about: PairedRows(tuple(rows(*about) for rows in kinds))


def with_samples(rows):
    def both(teacher, reference, behavior, ids, advantage):
        samples = TokenRows(ids, policy.token_logprobs(behavior, ids))
        return PairedRows((rows(teacher, reference, behavior, ids, advantage), samples))

    return both


OBJECTIVES = [
    *(Composed(f"taid_{t}", partial(taid, t=t), dense) for t in (0.0, 0.1, 0.4, 0.9, 1.0)),
    *(Composed(f"sparse_taid_{t}", partial(sparse_taid, t=t), listed(6)) for t in (0.0, 0.4, 1.0)),
    *(
        Composed(f"exopd_full_{x}", extrapolated(divergences.reverse_kl, x), with_reference(dense))
        for x in (0.0, 0.5, 1.0, 1.25, 1.5)
    ),
    Composed("opd_sampled", policy.sampled_token, drawn),
    Composed("opd_nucleus", partial(policy.sampled_token, temperature=0.6, top_k=9, top_p=0.9), drawn),
    Composed("exopd_nucleus", extrapolated_sampled(1.25, 0.6, top_p=0.9), with_reference(drawn)),
    *(
        Composed(f"exopd_sampled_{x}", extrapolated_sampled(x), with_reference(drawn))
        for x in (0.0, 0.5, 1.0, 1.25, 1.5)
    ),
    Composed("plausible_exopd", extrapolated(divergences.reverse_kl, 1.25, plausibility=0.1), with_reference(dense)),
    *(Composed(f"f_sampled_{n}", partial(sampled_f, name=n), drawn) for n in ("kl_forward", "jensen_shannon")),
    Composed("power_sampled", partial(power_sampled, alpha=0.5), drawn),
    Composed("vopd", with_baseline(kl_baseline), with_rows(drawn, dense)),
    Composed("vopd_optimal", with_baseline(optimal_baseline), with_rows(drawn, dense)),
    *(Composed(f"weighed_{c.name}", on_samples(c.dense, cap=2.0), with_samples(dense)) for c in CASES),
    Composed("weighed_taid", on_samples(partial(taid, t=0.4), cap=2.0), with_samples(dense)),
    Composed("weighed_sparse_taid", on_samples(partial(sparse_taid, t=0.4), cap=2.0), with_samples(listed(6))),
    Composed(
        "weighed_exopd_sampled", on_samples(extrapolated_sampled(1.25), cap=2.0), with_samples(with_reference(drawn))
    ),
    Composed("reward", policy.policy_gradient, rewarded, vanishes=False),
    Composed("weighed_reward", on_samples(policy.policy_gradient, cap=2.0), with_samples(rewarded), vanishes=False),
]
every_objective = pytest.mark.parametrize("case", OBJECTIVES, ids=lambda case: case.name)


def inputs() -> tuple[Tensor, ...]:
    """Student, and what the rows are made from."""
    student, teacher, reference, behavior = (logits(seed, N, V, scale=2.0) for seed in range(4))
    generator = torch.Generator().manual_seed(0)
    return student, teacher, reference, behavior, torch.randint(V, (N,), generator=generator), logits(8, N)


def value(case: Composed, student: Tensor, *about: Tensor) -> tuple[Tensor, Tensor]:
    return value_and_grad(lambda z: case.loss(z, *case.rows(*about).chunk(slice(None), None)), student)


@every_objective
def test_the_same_model_on_all_sides_has_no_loss_and_no_gradient(case: Composed) -> None:
    student, *_, ids, advantage = inputs()
    found, grad = value(case, student, student + 0.5, student - 0.25, student, ids, advantage)
    if not case.vanishes:
        assert found.abs().max() > 0.1
        return
    assert found.abs().max() < 1e-5
    if "total_variation" not in case.name:  # a kink there
        assert grad.abs().max() < 1e-5


@every_objective
def test_renaming_tokens_renames_the_gradient(case: Composed) -> None:
    student, *about, ids, advantage = inputs()
    order = torch.randperm(V, generator=torch.Generator().manual_seed(1))
    expected, expected_grad = value(case, student, *about, ids, advantage)
    renamed = [z[:, order] for z in about]
    found, grad = value(case, student[:, order], *renamed, order.argsort()[ids], advantage)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad[:, order], rtol=1e-4, atol=1e-5)


@every_objective
@pytest.mark.parametrize("chunk_tokens", [1, 4, 100])
def test_chunks_change_nothing(case: Composed, chunk_tokens: int) -> None:
    """Value, gradient of the hidden states and of the head; two micro-batches add up to the whole."""
    _, *about = inputs()
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, V, bias=False)
    torch.nn.init.normal_(head.weight, generator=generator)
    hidden = torch.randn(N, 8, generator=generator, requires_grad=True)
    rows = case.rows(*about)
    naive = case.loss(head(hidden), *rows.chunk(slice(None), None)).sum()
    expected = torch.autograd.grad(naive, [hidden, head.weight])
    total, _ = streamed(case.loss, hidden, head, rows, chunk_tokens=chunk_tokens)
    parts = sum(streamed(case.loss, hidden[s], head, rows[s], chunk_tokens=3)[0] for s in (slice(0, 5), slice(5, N)))
    for whole in (total, parts):
        torch.testing.assert_close(whole, naive, rtol=1e-5, atol=1e-5)
        for a, b in zip(torch.autograd.grad(whole, [hidden, head.weight]), expected, strict=True):
            assert (a - b).abs().max() <= 1e-5 * max(b.abs().max(), 1.0)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.4, 1.0])
def test_all_tokens_listed_is_the_whole_distribution_also_streamed(t: float) -> None:
    student, *about = inputs()
    whole = Composed("", partial(taid, t=t), dense)
    buckets = Composed("", partial(sparse_taid, t=t), listed(V))
    weigh = partial(on_samples, cap=2.0)
    for a, b in (
        (whole, buckets),
        (
            Composed("", weigh(whole.loss), with_samples(dense)),
            Composed("", weigh(buckets.loss), with_samples(listed(V))),
        ),
    ):
        for mine, exact in zip(value(b, student, *about), value(a, student, *about), strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-6)
