"""Divergences across vocabularies: 0 wherever two models agree on the text, which the published ones are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill.objectives.classes import (
    NONE,
    Classes,
    class_kl,
    given_open,
    hybrid_kl,
    log_open,
    shared_kl,
    span_kl,
)
from llmdistill.objectives.divergences import forward_kl, reverse_kl
from tests.objectives import published

GOLDEN = Path(__file__).parents[1] / "golden"
X, S = (json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("xtoken", "simct"))


def tensor(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


# ---------------------------------------------------------------- the published forms agree with their authors' code


def dense_projection(indices: Any, weights: Any, columns: int) -> Tensor:
    rows = torch.zeros(len(indices), columns, dtype=torch.float64)
    for i, (js, ws) in enumerate(zip(indices, weights, strict=True)):
        for j, w in zip(js, ws, strict=True):
            if j >= 0:
                rows[i, j] += w
    return rows / rows.sum(-1, keepdim=True)


@pytest.mark.parametrize("case", X["cases"], ids=lambda c: c["name"])
def test_the_published_x_token_is_its_authors(case: dict[str, Any]) -> None:
    given, options = X["inputs"], case["options"]
    student, teacher = tensor(given["student_logits"][0]).requires_grad_(), tensor(given["teacher_logits"][0])
    own, other = given["student_chunk_id"][0], given["teacher_chunk_id"][0]
    if case["name"].startswith("p_kl"):
        projection = dense_projection(given["projection_indices"], given["projection_weights"], teacher.shape[-1])
        how = {"k": options.get("k"), "temperature": options.get("T", 1.0), "reverse": options.get("rev", False)}
        loss = published.p_kl(student, teacher, own, other, projection, exact=options.get("exact", False), **how)
    else:
        pairs = X["exact_map_relaxed" if options["xtoken_loss"] else "exact_map_strict"]
        common = pairs["common_student"], pairs["common_teacher"]
        uncommon = pairs["uncommon_student"], pairs["uncommon_teacher"]
        parts = published.h_kl(student, teacher, own, other, common, uncommon, reverse=options.get("rev", False))
        assert [float(p.detach()) for p in parts] == pytest.approx([case["kl_common"], case["l1_uncommon"]], abs=1e-6)
        loss = parts[0] + parts[1]
    assert float(loss.detach()) == pytest.approx(case["loss"], abs=1e-6)
    torch.testing.assert_close(gradient(loss, student), tensor(case["grad_student_logits"][0]), atol=1e-6, rtol=1e-5)


def test_the_published_simct_is_its_papers() -> None:
    given = S["inputs"]
    student, teacher = tensor(given["student_logits"]).requires_grad_(), tensor(given["teacher_logits"])
    ids, overlap = (given["student_ids"], given["teacher_ids"]), (given["overlap_student"], given["overlap_teacher"])
    losses = published.simct(student, teacher, ids, S["paper"]["units"], overlap)
    assert losses.tolist() == pytest.approx(S["paper"]["per_unit_loss"], abs=1e-8)
    expected = tensor(S["paper"]["grad_student_logits"])
    torch.testing.assert_close(gradient(losses.sum(), student), expected, atol=1e-8, rtol=1e-6)


# ---------------------------------------------------------------- a student that agrees about a numeral


@pytest.mark.parametrize("which", ["numeral_student_splits", "numeral_student_groups"])
def test_a_student_that_agrees_about_a_numeral_has_nothing_to_learn(which: str) -> None:
    """The published loss is 18.4 with a gradient away from the right digit, or less than 0 (METHODS-2026 9.3.2)."""
    case = X[which]
    student, teacher = (tensor(case[f"{side}_probs"]).log().requires_grad_() for side in ("student", "teacher"))
    own, other = [0] * len(student), [0] * len(teacher)
    loss = published.p_kl(student, teacher, own, other, tensor(case["projection"]) + 1e-10)
    assert float(loss.detach()) == pytest.approx(case["loss"], abs=2e-3)
    vocabularies = case["student_vocab"], case["teacher_vocab"]
    shared = sorted(set(vocabularies[0]) & set(vocabularies[1]), key=vocabularies[0].index)
    maps = [torch.tensor([shared.index(_begin(t, shared)) for t in v]) for v in vocabularies]
    same = torch.tensor([sum(int(k in x) and x.tolist().count(k) for x in maps) == 2 for k in range(len(shared))])
    s, t = (Classes(m, len(shared)).logprobs(x[:1]) for m, x in zip(maps, (student, teacher), strict=True))
    for found in (class_kl(s, t), class_kl(s, t, direction="reverse"), shared_kl(s, t, same)):
        assert -1e-12 < float(found.sum().detach()) < 2e-5  # the file's own rounding of "exactly alike"
        assert float(gradient(found.sum(), student).abs().max()) < 2e-5
    assert float(hybrid_kl(s, t, same).sum().detach()) < 2e-5  # whose L1 has a corner there


def _begin(token: str, shared: list[str]) -> str:
    return max((b for b in shared if token.startswith(b)), key=len)


# ---------------------------------------------------------------- what they are


def made(n: int = 6, seed: int = 0, vocabulary: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(n, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


MAP = Classes(torch.tensor([0, 1, 1, 2, 4, 3, 0, 3, 4]), 4)
SAME = torch.tensor([False, False, True, False])
LOSSES = {
    "forward": class_kl,
    "reverse": lambda s, t: class_kl(s, t, direction="reverse"),
    "shared": lambda s, t: shared_kl(s, t, SAME),
    "hybrid": lambda s, t: hybrid_kl(s, t, SAME),
}


def test_classes_are_sums_of_probabilities() -> None:
    logits, _ = made()
    found = MAP.logprobs(logits).exp()
    expected = torch.stack([logits.softmax(-1)[:, MAP.of_V == k].sum(-1) for k in range(5)], -1)
    torch.testing.assert_close(found, expected)
    wider = torch.cat([logits, logits.new_full((6, 2), -2.0)], -1)  # columns past the vocabulary are in none
    extra = wider.softmax(-1)[:, 9:].sum(-1)
    torch.testing.assert_close(MAP.logprobs(wider).exp()[:, 4], (wider.softmax(-1)[:, [4, 8]]).sum(-1) + extra)
    assert Classes(torch.tensor([0, 0, 0]), 1).logprobs(torch.randn(2, 3))[:, 1].tolist() == pytest.approx([NONE] * 2)


def test_tiny_probabilities_keep_their_gradient() -> None:
    """exp(-200) is 0 in float32: summed as it is, a class of such tokens would have no logarithm."""
    logits = torch.tensor([[0.0, -200.0, -201.0]], requires_grad=True)
    found = Classes(torch.tensor([0, 1, 1]), 2).logprobs(logits)
    assert float(found[0, 1].detach()) == pytest.approx(-200 + 0.3132617)
    assert gradient(found[0, 1], logits).tolist()[0] == pytest.approx([-1.0, 0.7310586, 0.2689414], abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_they_are_divergences(name: str) -> None:
    student, teacher = made()
    loss = LOSSES[name]
    s, t = MAP.logprobs(student), MAP.logprobs(teacher)
    assert float(loss(s, t).min()) > 0.001 and float(loss(t, t).abs().max()) < 1e-12
    shifted = student + torch.arange(6, dtype=torch.float64)[:, None]  # the same distributions
    torch.testing.assert_close(loss(MAP.logprobs(shifted), t), loss(s, t))
    leaf = student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(MAP.logprobs(x), t), leaf)


def test_a_coarsening_is_never_above_the_whole() -> None:
    student, teacher = made()
    s, t = MAP.logprobs(student), MAP.logprobs(teacher)
    assert bool((class_kl(s, t) <= forward_kl(student, teacher) + 1e-12).all())
    assert bool((shared_kl(s, t, SAME) <= class_kl(s, t, direction="reverse") + 1e-12).all())


def test_of_one_vocabulary_they_are_the_kl_themselves() -> None:
    """And the published P-KL too, where every chunk is one token on either side."""
    student, teacher = made()
    every = Classes(torch.arange(9), 9)
    s, t = every.logprobs(student), every.logprobs(teacher)
    torch.testing.assert_close(class_kl(s, t), forward_kl(student, teacher), atol=1e-6, rtol=1e-6)
    same = torch.ones(9, dtype=torch.bool)
    torch.testing.assert_close(shared_kl(s, t, same), reverse_kl(student, teacher), atol=1e-6, rtol=1e-6)
    rows = list(range(6))
    theirs = published.p_kl(student, teacher, rows, rows, torch.eye(9, dtype=torch.float64))
    torch.testing.assert_close(class_kl(s, t).mean(), theirs, atol=1e-6, rtol=1e-6)


def test_the_part_of_a_chunk_is_a_binary_kl_where_nothing_else_is() -> None:
    p, q = (
        torch.tensor([0.2, 0.9, 1.0 - 1e-12], dtype=torch.float64),
        torch.tensor([0.6, 0.9, 0.5], dtype=torch.float64),
    )
    found = span_kl(p.log(), q.log(), 1 - p, 1 - q)
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).clamp_min(1e-30).log()
    torch.testing.assert_close(found[:2], expected[:2])
    assert bool(found.isfinite().all())


# ---------------------------------------------------------------- given that some digits cannot come next


def test_what_is_open_is_all_but_the_closed_digits() -> None:
    """Ids 0 to 3 begin with 1, 1, 7 and none; columns past the vocabulary begin with none."""
    torch.manual_seed(0)
    digits = Classes(torch.tensor([1, 1, 7, 10]), 10)
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    closed = torch.zeros(3, 10, dtype=torch.bool)
    closed[0, 1], closed[2, [1, 7]] = True, True
    p = logits.softmax(-1)
    expected = torch.stack([p[0, 2:].sum().log(), p.new_zeros(()), p[2, 3:].sum().log()])
    found = log_open(logits, digits, closed)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found.sum(), logits), gradient(expected.sum(), logits))
    assert torch.autograd.gradcheck(lambda x: log_open(x, digits, closed), logits)
    assert log_open(logits.float(), digits, closed[[1]].expand(3, 10)).tolist() == [0.0, 0.0, 0.0]


def test_classes_are_compared_given_that_none_of_the_closed_comes() -> None:
    torch.manual_seed(0)
    logp, other = (torch.randn(2, 5, dtype=torch.float64).log_softmax(-1).requires_grad_() for _ in range(2))
    closed = torch.tensor([[True, False, True, False, False], [False] * 5])
    found = given_open(logp, closed)
    assert torch.equal(found[1], logp[1])
    left = logp[0, [1, 3, 4]].exp()
    torch.testing.assert_close(found[0, [1, 3, 4]].exp(), left / left.sum())
    kl = class_kl(found, given_open(other, closed), direction="reverse")
    q = other[0, [1, 3, 4]].exp()
    p, q = left / left.sum(), q / q.sum()
    torch.testing.assert_close(kl[0], (p * (p / q).log()).sum())
    grad = gradient(kl[0], logp)
    assert bool(grad.isfinite().all()) and grad[0, [0, 2]].tolist() == [0.0, 0.0]
