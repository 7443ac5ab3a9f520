"""The KL to the student as it began: what it is worth by enumeration, and that the loop adds just that."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from llmdistill.diffusion import policy
from llmdistill.diffusion.rl_stage import DiffusionRLConfig, surrogate
from llmdistill.errors import UserError
from llmdistill.recipe.config import RolloutConfig

from . import runs
from .test_rl_trainer import is_even, logps, trainer

EVERY: dict[str, Any] = {"keep_low": 0.0, "keep_high": 1.0}
MASK = 4


def test_its_value_is_the_reverse_kl_and_its_gradient_that_of_the_forward_one() -> None:
    """All tokens of a vocabulary of five, the last the mask token, each with the student's probability; advantages are
    0, so that nothing but the KL is there. In float32."""
    generator = torch.Generator().manual_seed(0)
    student, reference = torch.randn(2, MASK + 1, generator=generator).unbind()
    student.requires_grad_()
    ours, theirs = (x[:MASK].double().log_softmax(-1) for x in (student, reference))
    (expected,) = torch.autograd.grad((theirs.exp() * (theirs - ours)).sum(), student, retain_graph=True)
    term = surrogate(MASK, reference_beta=0.5)
    tokens = torch.arange(MASK)
    assert term.loss is not None
    values = term.loss(student.expand(MASK, -1), reference.expand(MASK, -1), tokens, torch.zeros(MASK))
    chance = ours.exp().detach()
    assert float(values.detach() @ chance.float()) == pytest.approx(
        0.5 * float((ours.exp() * (ours - theirs)).sum().detach()), rel=1e-5
    )
    (found,) = torch.autograd.grad((values * chance).sum(), student)
    torch.testing.assert_close(found, 0.5 * expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("updates", [1, 2])
def test_the_loss_is_that_of_the_surrogate_and_the_kl(tmp_path: Path, updates: int) -> None:
    """Through the loop, of a student that has moved away from its start; diffu-GRPO's mean over all tokens."""
    t = trainer(tmp_path, is_even, reference_beta=0.3, updates=updates, **EVERY)
    start = copy.deepcopy(t.model)
    with torch.no_grad():
        for parameter in t.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    t.sync_engine()
    text = t.draw(runs.examples(t, 4))["main"]
    rows, now = text.rollout.completion_mask, logps(t, text)
    moved, t.model = t.model, start
    before = logps(t, text)
    t.model = moved
    assert float((now - before).abs().max()) > 0.1
    one = torch.ones(1, len(now), dtype=torch.bool)
    weights, zero = text.rollout.noise.weight[rows][None], torch.zeros(1, len(now))
    given = {"norm": "tokens", "beta": 0.3, "reference_logps": before[None]}
    expected = policy.policy_loss(now[None], now[None], weights, one, **given)
    kl = policy.policy_loss(now[None], now[None], zero, one, **given)
    assert float(kl) > 1e-3
    t.model.eval()
    found = sum(t.compute_loss(t.model, {"micro_batch": b}) for b in t.batches({"main": text}, 2))
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)


def test_at_the_start_it_adds_nothing_and_by_default_nobody_is_asked(tmp_path: Path) -> None:
    with_kl, without = (trainer(tmp_path / str(beta), is_even, reference_beta=beta, **EVERY) for beta in (0.3, 0.0))
    assert not without.judges and set(with_kl.judges) == {"reference"}
    found = []
    for t in (with_kl, without):
        t.sync_engine()
        found.append(runs.gradients(t, 1, t.draw(runs.examples(t, 2))))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6)


def test_a_weight_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match="reference_beta is -1"):
        DiffusionRLConfig(
            output_dir="x", reward="math", rollouts=RolloutConfig(samples_per_prompt=2), reference_beta=-1
        )
