"""The losses of others: the values and gradients of their authors' code, and small cases by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peers
import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
ULD = json.loads((GOLDEN / "uld_gold.json").read_text())
DSKD = json.loads((GOLDEN / "dskd_cma.json").read_text())


def case(name: str) -> Any:
    return next(c for c in ULD["cases"] if c["name"] == name)


def completions(side: str, logits: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Distributions and ids of every sequence's counted tokens."""
    ids, labels = (torch.tensor(ULD["inputs"][f"{side}_{what}"]) for what in ("input_ids", "labels"))
    return [(p[:-1][m[1:]], i[m]) for p, i, m in zip(logits.softmax(-1), ids, labels != -100, strict=True)]


def starts(side: str) -> list[int]:
    """Where the completions begin: the groups count positions of whole texts."""
    return [next(i for i, label in enumerate(labels) if label != -100) for labels in ULD["inputs"][f"{side}_labels"]]


@pytest.mark.parametrize(("name", "temperatures"), [("extended", (1.0, 1.0)), ("extended_T2_0.7", (2.0, 0.7))])
def test_gold_is_that_of_its_authors(name: str, temperatures: tuple[float, float]) -> None:
    expected = case(f"gold_bayesian_{name}")
    logits = torch.tensor(ULD["inputs"]["student_logits"], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor(ULD["inputs"]["teacher_logits"], dtype=torch.float64)
    own = completions("student", logits / temperatures[0])
    other = completions("teacher", teacher / temperatures[1])
    places = zip(ULD["aligned_groups"], starts("student"), starts("teacher"), strict=True)
    aligned = [[([i - a for i in g], [j - b for j in h]) for g, h in groups] for groups, a, b in places]
    losses = [peers.gold(s[0], t[0], s[1], t[1], groups) for s, t, groups in zip(own, other, aligned, strict=True)]
    torch.testing.assert_close(torch.stack(losses).tolist(), expected["per_sequence"], rtol=1e-9, atol=0)
    torch.stack(losses).mean().backward()
    torch.testing.assert_close(logits.grad, torch.tensor(expected["grad_student_logits"], dtype=torch.float64))


def test_uld_is_that_of_dskds_authors() -> None:
    own = completions("student", torch.tensor(ULD["inputs"]["student_logits"], dtype=torch.float64))
    other = completions("teacher", torch.tensor(ULD["inputs"]["teacher_logits"], dtype=torch.float64))
    total = sum(float(peers.uld(s[0], t[0]).sum()) for s, t in zip(own, other, strict=True))
    assert total == pytest.approx(ULD["dskd"]["independent_sum_float64"], rel=1e-9)


def test_dskd_is_that_of_its_authors() -> None:
    inputs = {
        k: torch.tensor(v, dtype=torch.int64 if "ids" in k or "labels" in k else torch.float64)
        for k, v in DSKD["inputs"].items()
    }
    inputs["stu_hidden"].requires_grad_(True)
    sides = [
        peers.Side(*(inputs[f"{s}_{what}"] for what in ("hidden", "input_ids", "labels", "embed", "head")))
        for s in ("stu", "tea")
    ]
    projectors = peers.Projectors(4, 6).double()
    for name in ("query", "s2t", "t2s"):
        getattr(projectors, name).weight.data.copy_(inputs[f"proj_{name}"])
    found = peers.dskd_cma(*sides, projectors)
    for name, value in found.items():
        assert float(value.detach()) == pytest.approx(DSKD["expected"][name], rel=1e-9)
    sum(found.values()).backward()  # type: ignore[union-attr]
    grads = {
        "stu_hidden": inputs["stu_hidden"].grad,
        **{f"proj_{n}": getattr(projectors, n).weight.grad for n in ("query", "s2t", "t2s")},
    }
    for name, grad in grads.items():
        torch.testing.assert_close(grad, torch.tensor(DSKD[f"grad_{name}"], dtype=torch.float64))


def test_minimum_edit_distance_by_hand() -> None:
    assert [peers.edit_distance(a, b) for a, b in (("", "ab"), ("kitten", "sitting"), ("12", "2"))] == [2, 3, 1]
    assert peers.nearest_tokens(["a", "12", "1"], ["12", "a", "123", "b"]).tolist() == [1, 0, 1, 0]
    # "41" stands over "4" and "1", "=" over "="
    assert peers.min_ed_alignment(["4", "1", "="], ["41", "="]) == [0, 0, 1]
    assert peers.min_ed_alignment(["41", "="], ["4", "1", "="]) in ([0, 2], [1, 2])
    student = torch.tensor([[0.5, 0.25, 0.25]]).log()
    teacher = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    # 12 and 123 both on student's 1: mass (.25 + .125, .5 + .125, 0) in the order a, 12, 1
    found = float(peers.min_ed(student, teacher, [0], torch.tensor([1, 0, 1, 0])))
    p = (0.25 + 0.125, 0.5 + 0.125)
    assert found == pytest.approx(p[0] * math.log(p[0] / 0.5) + p[1] * math.log(p[1] / 0.25), rel=1e-6)
