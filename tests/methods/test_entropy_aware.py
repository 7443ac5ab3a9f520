"""Entropy-aware OPD: the sampled reverse KL everywhere, the forward KL where the teacher is unsure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.methods import rounds


@pytest.mark.parametrize(("threshold", "open_"), [(0.0, "all"), (4.35, "some"), (9.0, "none")])
def test_loss_and_gradients_equal_the_formula(tmp_path: Path, threshold: float, open_: str) -> None:
    """The gate is on the entropy of the teacher's whole row; the sum is over its 5 likeliest tokens."""
    student, teacher = tiny.llama(1), tiny.llama(2)
    settings = {"threshold": threshold, "top_k": 5, "importance_cap": 3.0}
    t = rounds.make(tmp_path, "entropy_aware", student=student, teacher=teacher, **settings)
    losses, gates = [], []
    parts = zip(rounds.logps(student), rounds.logps(teacher), rounds.tokens(), rounds.drawn(), strict=True)
    for s, full, y, behavior in parts:
        q = full.detach()
        lp = rounds.pick(s, y)
        weight = (lp.detach() - behavior).exp().clamp(max=3.0)
        gate = -(q.exp() * q).sum(-1) > threshold
        top = q.argsort(-1, descending=True)[:, :5]
        listed = (q.gather(1, top).exp() * (q.gather(1, top) - s.gather(1, top))).sum(-1)
        losses.append(weight * (-(rounds.pick(q, y) - lp.detach()) * lp + torch.where(gate, listed, 0.0)))
        gates.append(gate)
    share = torch.cat(gates).float().mean()
    assert {"all": share == 1, "some": 0 < share < 1, "none": share == 0}[open_]
    rounds.assert_agree(t, rounds.text(), student, torch.cat(losses).mean())
