"""OPSA, the control without a teacher: which tokens are pushed down, and how far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.methods import rounds


@pytest.mark.parametrize("settings", [{}, {"fraction": 0.5, "strongest": -1.0}, {"fraction": 1.0, "advantage": -0.2}])
def test_loss_and_gradients_equal_the_formula(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Of the batch's tokens the floor(fraction N) least likely; A, or from A to the strongest by min-max entropy; the
    mean of -A log S over these tokens."""
    student = tiny.llama(1)
    t = rounds.make(tmp_path, "opsa", student=student, **settings)
    logps = torch.cat(rounds.logps(student))
    own = rounds.pick(logps, torch.cat(rounds.tokens()))
    fraction, weakest = settings.get("fraction", 0.2), settings.get("advantage", -0.5)
    chosen = sorted(range(len(own)), key=lambda i: float(own[i].detach()))[: int(fraction * len(own))]
    assert len(chosen) == {0.2: 2, 0.5: 5, 1.0: 11}[fraction]
    advantages = [weakest] * len(chosen)
    if "strongest" in settings:
        entropies = [-float((logps[i].exp() * logps[i]).sum().detach()) for i in chosen]
        low, high = min(entropies), max(entropies)
        advantages = [weakest + (settings["strongest"] - weakest) * (e - low) / (high - low) for e in entropies]
    expected = torch.stack([-a * own[i] for a, i in zip(advantages, chosen, strict=True)]).mean()
    rounds.assert_agree(t, rounds.text(), student, expected)


def test_a_step_makes_them_less_likely_whatever_the_teacher_says(tmp_path: Path) -> None:
    student = tiny.llama(1)
    found = [
        rounds.gradients(rounds.make(tmp_path, "opsa", student=student, teacher=tiny.llama(seed)), rounds.text())
        for seed in (2, 3)
    ]
    assert found[0][0] == found[1][0] < 0
    for name, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name])
