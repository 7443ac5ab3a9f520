"""Hidden states of some layers through projectors: distances, MI-alpha, and the modules they train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill.models.helpers import NAME
from tests import tiny
from tests.methods import rounds


def states(model: Any, layer: int, rows: Any = rounds.SEQUENCES) -> Tensor:
    """What a layer put out at the positions that predict the completions, before the final norm, [N, H]."""
    found = []
    for prompt, completion, *_ in rows:
        kept: list[Tensor] = []
        handle = model.model.layers[layer].register_forward_hook(
            lambda m, i, o, kept=kept: kept.append(o[0] if isinstance(o, tuple) else o)
        )
        model(torch.tensor([list(prompt) + list(completion)]))
        handle.remove()
        found.append(kept[0][0, len(prompt) - 1 : -1])
    return torch.cat(found).double()


def make(tmp_path: Path, **settings: Any) -> tuple[Any, Any, Any]:
    student, teacher = tiny.llama(1), tiny.llama(2, hidden=48, layers=3)
    settings = {"student_layers": [0, -1], "teacher_layers": [1, -1], **settings}
    return rounds.make(tmp_path, "layers", student=student, teacher=teacher, **settings), student, teacher


@pytest.mark.parametrize("distance", ["cosine", "mse"])
@pytest.mark.parametrize("output_weight", [0.0, 0.5])
def test_loss_and_gradients_equal_the_formula(tmp_path: Path, distance: str, output_weight: float) -> None:
    """Mean over tokens and pairs of layers; gradients of student and projectors; widths 32 and 48, layers 2 and 3."""
    t, student, teacher = make(tmp_path, distance=distance, output_weight=output_weight, layer_weight=2.0)
    helpers = getattr(student, NAME)
    total = torch.zeros((), dtype=torch.float64)
    for k, (own, other) in enumerate([(0, 1), (1, 2)]):
        s = states(student, own) @ helpers[f"pair_{k}"].weight.double().T
        q = states(teacher, other).detach()
        cosine = (s * q).sum(-1) / (s.norm(dim=-1) * q.norm(dim=-1))
        total = total + ((1 - cosine) if distance == "cosine" else ((s - q) ** 2).mean(-1)).mean() / 2
    total = 2.0 * total
    if output_weight:
        s, q = torch.cat(rounds.logps(student)), torch.cat(rounds.logps(teacher)).detach()
        total = total + output_weight * rounds.kl(s, q).mean()
    rounds.assert_agree(t, rounds.text(left=2, right=1), student, total, tolerance=1e-4)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_mi_alpha_is_that_of_the_whole_batch_however_it_is_split(tmp_path: Path, parts: int) -> None:
    """-(1 + mean_{i != j}(f_ii - a_ij) - mean_{i != j} e^(f_ij - a_ii)) with a_ij = log(w mean_{k != j} e^f_ik + (1-w)
    e^b_i): the eleven tokens' own loops."""
    t, student, teacher = make(
        tmp_path, distance="mi_alpha", output_weight=0.0, student_layers=[-1], teacher_layers=[-1]
    )
    head = getattr(student, NAME)["pair_0"]
    s, q = states(student, 1), states(teacher, 2).detach()
    scores = s @ head.critic.weight.double().T @ q.T / 48**0.5
    baseline = s @ head.baseline.weight.double()[0] + head.baseline.bias.double()
    w, n = torch.sigmoid(head.alpha_logit.double()), len(s)
    a = [
        [
            torch.log(w * sum(scores[i, k].exp() for k in range(n) if k != j) / (n - 1) + (1 - w) * baseline[i].exp())
            for j in range(n)
        ]
        for i in range(n)
    ]
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    joint = sum(scores[i, i] - a[i][j] for i, j in pairs) / len(pairs)
    marginal = sum((scores[i, j] - a[i][i]).exp() for i, j in pairs) / len(pairs)
    expected = -(1.0 + joint - marginal)
    loss, found = rounds.gradients(t, rounds.text(), parts)
    student.zero_grad()
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    by_hand = {k: p.grad for k, p in student.named_parameters() if p.grad is not None}
    rounds.assert_same({k: g for k, g in found.items() if k in by_hand}, by_hand, 1e-4)
    assert all(not g.any() for k, g in found.items() if k not in by_hand)  # the output's head and norm


def test_a_projector_that_maps_a_student_onto_its_twin_has_no_loss(tmp_path: Path) -> None:
    student = tiny.llama(1)
    settings = {"distance": "mse", "student_layers": [0, 1], "teacher_layers": [0, 1]}
    t = rounds.make(tmp_path, "layers", student=student, teacher=copy.deepcopy(student), **settings)
    with torch.no_grad():
        for helper in t.helpers.values():
            helper.weight.copy_(torch.eye(32))
    loss, found = rounds.gradients(t, rounds.text())
    assert abs(loss) < 1e-9 and all(float(g.abs().max()) < 1e-5 for g in found.values())


def test_projectors_learn_at_their_own_rate(tmp_path: Path) -> None:
    t, student, _ = make(tmp_path, learning_rate=1e-4, projector_learning_rate=0.02, optim="sgd")
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    t.train()
    rates = {id(p): group["initial_lr"] for group in t.optimizer.param_groups for p in group["params"]}
    for name, parameter in student.named_parameters():
        assert rates[id(parameter)] == (0.02 if NAME in name else 1e-4), name
        assert not torch.equal(parameter, before[name]) or "head" in name
