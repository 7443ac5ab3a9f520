"""OPD with returns: what a token answers for, and the expected gradient by going through all texts there are."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmdistill.methods.returns import with_return
from llmdistill.objectives.returns import discounted_future, less_others_mean
from tests import tiny
from tests.methods import rounds

COLUMNS, LENGTH = 3, 3
PREFIXES = [p for n in range(LENGTH) for p in product(range(COLUMNS), repeat=n)]
TEXTS = list(product(range(COLUMNS), repeat=LENGTH))


def test_by_hand() -> None:
    costs = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    future = discounted_future(costs, [3, 2], 0.5)
    assert future.tolist() == [0.5 * 2 + 0.25 * 4, 0.5 * 4, 0.0, 0.5 * 16, 0.0]
    assert less_others_mean(future, [3, 2]).tolist() == [2 - 8, 2 - 0, 0.0, 8 - 2, 0 - 2]
    assert discounted_future(costs, [5], 1.0).tolist() == [30.0, 28.0, 24.0, 16.0, 0.0]
    assert not discounted_future(costs, [3, 2], 0.0).any()
    assert less_others_mean(costs, [5]).tolist() == costs.tolist()  # nobody else
    assert len(discounted_future(torch.zeros(0), [], 0.9)) == 0 == len(less_others_mean(torch.zeros(0), []))


def rows_of(table: Tensor, text: tuple[int, ...]) -> Tensor:
    return torch.stack([table[PREFIXES.index(text[:t])] for t in range(LENGTH)])


def kl_rows(s: Tensor, t: Tensor) -> Tensor:
    return (s.log_softmax(-1).exp() * (s.log_softmax(-1) - t.log_softmax(-1))).sum(-1)


def log_prob(table: Tensor, text: tuple[int, ...]) -> Tensor:
    return rows_of(table, text).log_softmax(-1).gather(-1, torch.tensor(text)[:, None]).sum()


@pytest.mark.parametrize("discount", [0.9, 1.0, 0.0])
def test_expected_gradient_by_enumeration(discount: float) -> None:
    """Of batches of two texts, all 27 x 27 of them weighed by their probability. 0.9 is the default."""
    torch.manual_seed(0)
    student = torch.randn(len(PREFIXES), COLUMNS, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(len(PREFIXES), COLUMNS, dtype=torch.float64)
    found = torch.zeros((), dtype=torch.float64)
    for pair in product(TEXTS, repeat=2):
        probability = sum(log_prob(student, text) for text in pair).exp().detach()
        s = torch.cat([rows_of(student, text) for text in pair])
        t = torch.cat([rows_of(teacher, text) for text in pair])
        future = discounted_future(kl_rows(s, t), [LENGTH, LENGTH], discount)
        blame = less_others_mean(future, [LENGTH, LENGTH])
        ids = torch.tensor([i for text in pair for i in text])
        found = found + probability * with_return(s, t, ids, blame).sum() / 2
    (gradient,) = torch.autograd.grad(found, student)

    # Independently: the divergence of whole texts by its definition, or, discounted, by the policy gradient's sum.
    if discount == 1.0:
        expected = sum(
            log_prob(student, text).exp() * (log_prob(student, text) - log_prob(teacher, text)) for text in TEXTS
        )
    else:
        expected = torch.zeros((), dtype=torch.float64)
        for text in TEXTS:
            s, costs = rows_of(student, text), kl_rows(rows_of(student, text), rows_of(teacher, text))
            own = s.log_softmax(-1).gather(-1, torch.tensor(text)[:, None]).squeeze(-1)
            for t in range(LENGTH):
                later = sum(discount ** (k - t) * costs[k].detach() for k in range(t + 1, LENGTH))
                expected = expected + log_prob(student, text).exp().detach() * (costs[t] + later * own[t])
    (right,) = torch.autograd.grad(expected, student)
    assert float(right.abs().max()) > 1e-2
    torch.testing.assert_close(gradient, right, atol=1e-10, rtol=1e-8)


def test_loss_and_gradients_of_the_trainer_equal_the_formula(tmp_path: Path) -> None:
    student, teacher = tiny.llama(1), tiny.llama(2)
    t = rounds.make(tmp_path, "returns", student=student, teacher=teacher, discount=0.7)
    logps, others = rounds.logps(student), [x.detach() for x in rounds.logps(teacher)]
    costs = [rounds.kl(s, o) for s, o in zip(logps, others, strict=True)]
    future = [
        [sum(0.7 ** (k - i) * float(c[k].detach()) for k in range(i + 1, len(c))) for i in range(len(c))] for c in costs
    ]
    losses = []
    for b, (s, cost, ids, drawn) in enumerate(zip(logps, costs, rounds.tokens(), rounds.drawn(), strict=True)):
        own = rounds.pick(s, ids)
        for i in range(len(cost)):
            others_here = [f[i] for j, f in enumerate(future) if j != b and len(f) > i]
            blame = future[b][i] - (sum(others_here) / len(others_here) if others_here else 0.0)
            weight = (own[i].detach() - drawn[i]).exp().clamp(max=5.0)
            losses.append(weight * (cost[i] + blame * own[i]))
    rounds.assert_agree(t, rounds.text(), student, torch.stack(losses).mean())


def test_without_a_discount_it_is_per_token_opd(tmp_path: Path) -> None:
    student = tiny.llama(1)
    ours = rounds.gradients(rounds.make(tmp_path, "returns", student=student, discount=0.0), rounds.text())
    with_returns = rounds.gradients(rounds.make(tmp_path, "returns", student=student), rounds.text())
    assert max(float((ours[1][n] - with_returns[1][n]).abs().max()) for n in ours[1]) > 1e-3
