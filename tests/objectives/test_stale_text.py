"""Text that older weights drew: the expected gradient by enumeration, and the clipped loss by its definition."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill import OPDConfig, RolloutConfig
from llmdistill.objectives.clipped import clipped_samples, given_advantage, kl_advantage
from llmdistill.objectives.divergences import reverse_kl
from llmdistill.objectives.policy import sampled_token

V, T = 5, 2
STALE = RolloutConfig(engine="remote", url="http://a", staleness=1)


class Tabular:
    """A policy of two tokens: logits for the first, and for the second after each first one."""

    def __init__(self, seed: int, near: Tabular | None = None, distance: float = 1.0) -> None:
        noise = torch.randn(1 + V, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.logits = noise if near is None else near.logits.detach() + distance * noise
        self.logits.requires_grad_()

    def rows(self, tokens: tuple[int, ...]) -> Tensor:
        """The logits that each of the tokens was drawn from, [T, V]."""
        return self.logits[[0, *(1 + t for t in tokens[:-1])]]


def expected_gradient(loss: Any, student: Tabular, old: Tabular, teacher: Tabular, **evidence: Any) -> Tensor:
    """Of the sum of ``loss`` over the tokens of every text, each as likely as the old student writes it."""
    total = torch.zeros((), dtype=torch.float64)
    for text in itertools.product(range(V), repeat=T):
        ids = torch.tensor(text)
        lp = {name: p.rows(text).detach().log_softmax(-1)[range(T), ids] for name, p in (("o", old), ("t", teacher))}
        total = total + lp["o"].sum().exp() * loss(student.rows(text), ids, lp["t"], ids, lp["o"]).sum()
    return torch.autograd.grad(total, student.logits)[0]


def kl_gradient(student: Tabular, old: Tabular, teacher: Tabular) -> Tensor:
    """Of the reverse KL of the student of now, at the prefixes that the old one visits: independent of any sampling."""
    total = torch.zeros((), dtype=torch.float64)
    visits = torch.cat([torch.ones(1, dtype=torch.float64), old.logits[0].detach().softmax(-1)])
    for weight, s, t in zip(visits, student.logits, teacher.logits.detach(), strict=True):
        total = total + weight * (s.softmax(-1) * (s.log_softmax(-1) - t.log_softmax(-1))).sum()
    return torch.autograd.grad(total, student.logits)[0]


def shipped(tmp_path: Path, **settings: Any) -> Any:
    """The loss of the settings' own term."""
    (term,) = OPDConfig(output_dir=str(tmp_path), rollouts=STALE, estimator="sampled", **settings).build().terms
    assert term.reads == ("tokens", "behavior")
    return term.loss


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 4}], ids=["weights", "clipped"])
def test_sampled_tokens_of_old_text_have_the_gradient_of_the_kl_of_now(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """At the defaults; ratios here stay within both bounds, 5 and 1 +- 0.2."""
    old, teacher = Tabular(1), Tabular(2)
    student = Tabular(3, near=old, distance=0.05)
    ratios = (student.logits.log_softmax(-1) - old.logits.log_softmax(-1)).exp()
    assert 0.8 < ratios.min() < 0.95 and 1.05 < ratios.max() < 1.2
    expected = kl_gradient(student, old, teacher)
    found = expected_gradient(shipped(tmp_path, **settings), student, old, teacher)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    unweighted = expected_gradient(lambda s, i, t, *_: sampled_token(s, i, t), student, old, teacher)
    assert (unweighted - expected).norm() > 0.02 * expected.norm()


def test_far_off_only_the_truncation_of_the_default_is_missing(tmp_path: Path) -> None:
    """With ratios above 5 the gradient is that with these rows' weights cut, and no other is touched."""
    old, teacher = Tabular(1), Tabular(2)
    student = Tabular(3, near=old, distance=5.0)
    ratio = (student.logits.log_softmax(-1) - old.logits.log_softmax(-1)).exp().detach()
    assert ratio.max() > 5
    advantage = (teacher.logits.log_softmax(-1) - student.logits.log_softmax(-1)).detach()
    visits = torch.cat([torch.ones(1, dtype=torch.float64), old.logits[0].detach().softmax(-1)])
    drawn = old.logits.detach().softmax(-1) * ratio.clamp(max=5)
    total = -(visits[:, None] * drawn * advantage * student.logits.log_softmax(-1)).sum()
    (expected,) = torch.autograd.grad(total, student.logits)
    torch.testing.assert_close(
        expected_gradient(shipped(tmp_path), student, old, teacher), expected, rtol=1e-6, atol=1e-9
    )


def test_whole_distributions_need_no_ratio() -> None:
    """The full estimator's loss on old text is the divergence of now at each visited prefix."""
    old, teacher = Tabular(1), Tabular(2)
    student = Tabular(3, near=old, distance=0.5)
    total = torch.zeros((), dtype=torch.float64)
    for text in itertools.product(range(V), repeat=T):
        weight = old.rows(text).detach().log_softmax(-1)[range(T), torch.tensor(text)].sum().exp()
        total = total + weight * reverse_kl(student.rows(text), teacher.rows(text).detach()).sum()
    (found,) = torch.autograd.grad(total, student.logits)
    torch.testing.assert_close(found.float(), kl_gradient(student, old, teacher).float(), rtol=1e-5, atol=1e-6)


def by_definition(ratio: float, advantage: float, clip: float, dual: float) -> float:
    """arXiv 1707.06347 eq. 7 as a loss, and 1912.09729 eq. 5 below it."""
    objective = min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
    return -max(objective, dual * advantage) if advantage < 0 else -objective


@pytest.mark.parametrize("clip", [0.1, 0.3])
def test_the_clipped_loss_is_ppos_on_every_side(clip: float) -> None:
    ratios, advantages, loss = (0.3, 0.95, 1.05, 2.0, 9.0), (-1.5, 0.7), clipped_samples(given_advantage, clip=clip)
    for ratio, advantage in itertools.product(ratios, advantages):
        logits = torch.randn(1, V, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).requires_grad_()
        ids, lp = torch.tensor([2]), logits.detach().log_softmax(-1)[:, 2]
        evidence = ids, torch.tensor([advantage], dtype=torch.float64), ids, lp - torch.tensor(ratio).log()
        value = loss(logits, *evidence)
        assert value.item() == pytest.approx(by_definition(ratio, advantage, clip, 3.0), rel=1e-6)
        assert torch.autograd.gradcheck(lambda z, e=evidence: loss(z, *e), (logits,))
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        flat = ratio > 1 + clip if advantage > 0 else ratio < 1 - clip or ratio > 3.0
        assert bool((gradient == 0).all()) == flat, (ratio, advantage)


@pytest.mark.parametrize("sampler", [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8}])
def test_at_ratio_1_its_gradient_is_the_policy_gradient(sampler: dict[str, float]) -> None:
    """Of every sampler, where text is new; a token nobody drew (NaN) has ratio 1 too."""
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(6, V, dtype=torch.float64, generator=g).requires_grad_()
    ids, teacher_lp = torch.randint(0, V, (6,), generator=g), -torch.rand(6, dtype=torch.float64, generator=g) * 3
    tau = {"temperature": sampler.get("temperature", 1.0)}
    loss = clipped_samples(lambda *e: kl_advantage(*e, **tau), clip=0.2, **sampler)
    nobody = torch.full((6,), torch.nan, dtype=torch.float64)
    (found,) = torch.autograd.grad(loss(logits, ids, teacher_lp, ids, nobody).sum(), logits)
    (expected,) = torch.autograd.grad(sampled_token(logits, ids, teacher_lp, **sampler).sum(), logits)
    torch.testing.assert_close(found, expected)
