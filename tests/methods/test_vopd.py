"""vOPD: the sampled-token estimator with a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.methods import rounds


def baseline(s: Tensor, t: Tensor, kind: str, k: int) -> Tensor:
    """b of one position, from its log-probs [V]."""
    p = s.exp()
    if kind == "kl":  # minus KL(S || T) over the student's k likeliest, both renormalised
        top = sorted(range(len(s)), key=lambda v: -float(s[v].detach()))[:k]
        ps, ts = s[top] - s[top].logsumexp(0), t[top] - t[top].logsumexp(0)
        return -(ps.exp() * (ps - ts)).sum()
    norms = torch.stack([1 - 2 * p[v] + (p * p).sum() for v in range(len(p))])  # |one-hot(v) - p|^2
    return (p * norms * (t - s)).sum() / (p * norms).sum()


def by_hand(student: Any, teacher: Any, kind: str, k: int, cap: float) -> Tensor:
    losses = []
    parts = zip(rounds.logps(student), rounds.logps(teacher), rounds.tokens(), rounds.drawn(), strict=True)
    for s, t, y, behavior in parts:
        lp = rounds.pick(s, y)
        b = torch.stack([baseline(a, c, kind, k) for a, c in zip(s.detach(), t.detach(), strict=True)])
        advantage = rounds.pick(t, y).detach() - lp.detach() - b
        weight = (lp.detach() - behavior).exp().clamp(max=cap) if cap else 1.0
        losses.append(-advantage * lp * weight)
    return torch.cat(losses).mean()


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("kl", {"top_k": 7}), ("kl", {"top_k": 264, "importance_cap": 0.0}), ("optimal", {"importance_cap": 2.0})],
)
def test_loss_and_gradients_equal_the_formula(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    student, teacher = tiny.llama(1), tiny.llama(2)
    t = rounds.make(tmp_path, "vopd", student=student, teacher=teacher, baseline=kind, **settings)
    cap = settings.get("importance_cap", 5.0)
    rounds.assert_agree(t, rounds.text(), student, by_hand(student, teacher, kind, settings.get("top_k", 0), cap))


def test_the_baseline_is_what_tells_it_from_plain_sampling(tmp_path: Path) -> None:
    """Without it the same round has another gradient: b is not a constant of the batch."""
    student = tiny.llama(1)
    _, ours = rounds.gradients(rounds.make(tmp_path, "vopd", student=student), rounds.text())
    plain = rounds.make(tmp_path, "sampled_f", student=tiny.llama(1), f="kl_reverse")
    _, other = rounds.gradients(plain, rounds.text())
    assert max(float((ours[n] - other[n]).abs().max()) for n in ours) > 1e-2
