"""TIP: which tokens of the global batch are trained on, and with what loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.methods import rounds


@pytest.mark.parametrize("keep", [0.3, 0.5, 1.0])
def test_the_kept_tokens_are_those_of_a_ranking_by_hand(tmp_path: Path, keep: float) -> None:
    """h + d - h d of min-max scaled entropy and KL(S || T); then the mean reverse KL over the floor(keep N) best."""
    student, teacher = tiny.llama(1), tiny.llama(2)
    t = rounds.make(tmp_path, "tip", student=student, teacher=teacher, keep=keep)
    s = torch.cat(rounds.logps(student))
    losses = rounds.kl(s, torch.cat(rounds.logps(teacher)).detach())
    h, d = [((x - x.min()) / (x.max() - x.min())).tolist() for x in (-(s.exp() * s).sum(-1), losses)]
    scores = [a + b - a * b for a, b in zip(h, d, strict=True)]
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[: int(keep * len(scores))]
    assert len(best) == {0.3: 3, 0.5: 5, 1.0: 11}[keep]
    rounds.assert_agree(t, rounds.text(), student, losses[best].mean())
