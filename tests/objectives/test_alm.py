"""ALM's numbers: those of its authors' code, zero at agreement, gradients, and what merging does."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill.objectives.alm import (
    alm_loss,
    binary_divergence,
    chunk_credit,
    chunk_sums,
    inverse_norm_weights,
    merged,
)
from llmdistill.objectives.layers import channelwise, mean_square

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/alm_tokenkit.json").read_text())
DIVERGENCES = {"binary_ce": "binary_ce", "reverse_binary_kl": "reverse_binary_kl", "abs_exp": "total_variation"}


class Batch:
    """The two sequences of the golden file: log-probs of every chunk of both sides, and those of a word's end."""

    def __init__(self, requires_grad: bool = False) -> None:
        self.logits = torch.tensor(GOLDEN["inputs"]["student_logits"], dtype=torch.float64, requires_grad=requires_grad)
        teacher = torch.tensor(GOLDEN["inputs"]["teacher_logits"], dtype=torch.float64)
        self.student, student_ends = self._side("student", self.logits, 2)
        self.teacher, teacher_ends = self._side("teacher", teacher, 0)
        self.student_boundary, self.teacher_boundary = student_ends, teacher_ends

    def _side(self, side: str, logits: Tensor, at: int) -> tuple[Tensor, Tensor]:
        ids = torch.tensor(GOLDEN["inputs"][f"{side}_input_ids"])
        words = torch.tensor(GOLDEN["inputs"][f"{side}_space_mask"])
        logp = logits.log_softmax(-1)
        tokens = logp[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        tokens = torch.cat([torch.zeros(2, 1, dtype=tokens.dtype), tokens], 1)  # the first has no prediction
        boundary = logp.masked_fill(~words, -torch.inf).logsumexp(-1)
        sums, ends, self.last = [], [], []
        for row, chunks in enumerate(GOLDEN["alignment"]["rows"]):
            kept = [c for c in chunks if c[at] > 0 or c[at + 1] > 1]
            sums += [tokens[row, c[at] : c[at + 1]].sum() for c in kept]
            ends += [boundary[row, c[at + 1] - 1] for c in kept]
            self.last += [False] * (len(kept) - 1) + [True]
        return torch.stack(sums), torch.stack(ends)

    def chunks(self, mode: str, threshold: float = 0.1) -> tuple[Tensor, Tensor]:
        student, teacher = self.student, self.teacher
        if "merge" in mode:
            into = merged(self.teacher_boundary.exp(), torch.tensor(self.last), threshold)
            count = int(into.max()) + 1
            closes = torch.cat([into[1:] != into[:-1], torch.ones(1, dtype=torch.bool)])
            student, teacher = (chunk_sums(side, into, count) for side in (student, teacher))
            return student + self.student_boundary[closes], teacher + self.teacher_boundary[closes]
        if mode:
            return student + self.student_boundary, teacher + self.teacher_boundary
        return student, teacher


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: c["name"])
def test_values_and_gradients_are_those_of_the_authors_code(case: dict[str, Any]) -> None:
    batch = Batch(requires_grad=True)
    student, teacher = batch.chunks(case["alm_mode"])
    how: Any = {"temperature": case["binarization_temp"], "divergence": DIVERGENCES[case["diff_fn"]]}
    for k, chunk in enumerate(case["independent_chunks"]):
        assert float(student[k].detach()) == pytest.approx(chunk["student_logp"], abs=2e-6)
        assert float(teacher[k]) == pytest.approx(chunk["teacher_logp"], abs=2e-6)
        assert float(binary_divergence(student, teacher, **how)[k].detach()) == pytest.approx(
            chunk["f"], rel=1e-5, abs=1e-7
        )
    loss = alm_loss(student, teacher, **how)
    assert float(loss.detach()) == pytest.approx(case["independent_mean_float64"], rel=1e-5)
    assert float(loss.detach()) == pytest.approx(case["expected_official_float32"], rel=1e-5)
    loss.backward()
    assert batch.logits.grad is not None
    expected = torch.tensor(case["grad_student_logits_float32"], dtype=torch.float64)
    torch.testing.assert_close(batch.logits.grad, expected, rtol=2e-3, atol=2e-6)


@pytest.mark.parametrize("case", GOLDEN["merge_threshold_cases"], ids=lambda c: str(c["threshold_gamma"]))
def test_merging_is_the_papers_mean_and_not_the_codes(case: dict[str, Any]) -> None:
    """The authors' code divides by the merge matrix applied twice: too large by ``inflation`` (METHODS 6.1)."""
    student, teacher = Batch().chunks("merge", case["threshold_gamma"])
    assert len(student) == case["n_chunks_after_merge"]
    loss = float(alm_loss(student, teacher, divergence="binary_ce"))
    assert loss == pytest.approx(case["paper_mean_over_merged_chunks_float64"], rel=1e-5)
    assert loss * case["inflation"] == pytest.approx(case["expected_official_float32"], rel=1e-5)


def test_hidden_states_at_chunk_ends_are_the_authors() -> None:
    """``l2_channelwise`` of the golden file: the states at the last token of every chunk, first tokens included."""
    golden = next(g for g in GOLDEN["latents"] if g["latents_normalization"] == "l2_channelwise")
    states = [torch.tensor(GOLDEN["inputs"][f"{side}_hidden"], dtype=torch.float64) for side in ("student", "teacher")]
    ends = [(b, c[3] - 1, c[1] - 1) for b, row in enumerate(GOLDEN["alignment"]["rows"]) for c in row]
    student = torch.stack([states[0][b, i] for b, i, _ in ends]).requires_grad_()
    teacher = torch.stack([states[1][b, j] for b, _, j in ends])
    scale = mean_square(teacher)
    losses = channelwise(student, teacher, scale)
    assert float(losses.mean().detach()) == pytest.approx(golden["independent_float64"], rel=1e-5)
    assert float(losses.mean().detach()) == pytest.approx(golden["expected_official_float32"], rel=1e-5)
    assert bool((channelwise(teacher, teacher, scale) == 0).all())
    assert torch.autograd.gradcheck(lambda x: channelwise(x, teacher, scale), student)
    torch.testing.assert_close(
        channelwise(10 * student, 10 * teacher, mean_square(10 * teacher)), losses, rtol=1e-5, atol=0
    )


def test_weights_by_gradient_norms_are_the_authors() -> None:
    golden = GOLDEN["gradmag"]
    assert inverse_norm_weights(golden["norms"]) == pytest.approx(golden["weights_normalised"], rel=1e-6)
    assert sum(inverse_norm_weights([0.3, 0.0, 2.0])) == pytest.approx(1.0)


@pytest.mark.parametrize("divergence", ["binary_kl", "reverse_binary_kl", "total_variation"])
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_it_is_a_divergence(divergence: Any, temperature: float) -> None:
    lp = -torch.logspace(-7, 3, 60, dtype=torch.float64)
    how: Any = {"temperature": temperature, "divergence": divergence}
    assert bool((binary_divergence(lp, lp, **how) == 0).all())
    student, teacher = torch.meshgrid(lp, lp, indexing="ij")
    values = binary_divergence(student, teacher, **how)
    assert bool(values.isfinite().all()) and float(values.min()) >= -1e-15
    apart = (student - teacher).abs() / temperature > 1e-3
    shown = apart & (student / temperature > -20) & (teacher / temperature > -20)
    assert float(values[shown].min()) > 0


def test_cross_entropy_and_kl_have_one_gradient() -> None:
    teacher = -torch.rand(9, dtype=torch.float64) * 8
    grads = []
    for divergence in ("binary_ce", "binary_kl"):
        student = (-torch.linspace(0.01, 9, 9, dtype=torch.float64)).requires_grad_()
        alm_loss(student, teacher, divergence=divergence).backward()  # type: ignore[arg-type]
        grads.append(student.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("divergence", ["binary_kl", "binary_ce", "reverse_binary_kl", "total_variation"])
def test_gradients(divergence: Any) -> None:
    student = (-torch.rand(7, dtype=torch.float64) * 5 - 0.01).requires_grad_()
    teacher = -torch.rand(7, dtype=torch.float64) * 5 - 0.02
    assert torch.autograd.gradcheck(lambda x: alm_loss(x, teacher, temperature=3.0, divergence=divergence), student)


def test_chunk_credit_is_the_gradient_of_the_reverse_kl_of_texts() -> None:
    """All texts of two chunks of two binary tokens: the expected gradient against autograd of the KL itself."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(15, 2, generator=generator, dtype=torch.float64).requires_grad_()  # a node of the tree each
    teacher_logits = torch.randn(15, 2, generator=generator, dtype=torch.float64)

    def chunk_logps(table: Tensor, text: tuple[int, ...]) -> Tensor:
        node, found = 0, []
        for token in text:
            found.append(table[node].log_softmax(-1)[token])
            node = 2 * node + 1 + token
        return torch.stack([found[0] + found[1], found[2] + found[3]])

    texts = list(product((0, 1), repeat=4))
    student = torch.stack([chunk_logps(logits, t) for t in texts])
    teacher = torch.stack([chunk_logps(teacher_logits, t) for t in texts])
    p = student.sum(1).exp()
    (expected,) = torch.autograd.grad((p * (student - teacher).sum(1)).sum(), logits, retain_graph=True)
    # A chunk's credit sees its own difference; what later chunks differ by given this one is discount 0, so the exact
    # gradient is that of the KLs of each chunk at the prefixes the student visits.
    first = student[:, 0].exp().detach()
    per_chunk = 0.0
    for start in range(0, 16, 4):  # the four continuations of one first chunk
        rest = slice(start, start + 4)
        kl = (student[rest, 1].exp() * (student[rest, 1] - teacher[rest, 1])).sum()
        per_chunk = per_chunk + first[start] * kl
    head = student[::4, 0]
    per_chunk = per_chunk + (head.exp() * (head - teacher[::4, 0])).sum()
    (exact,) = torch.autograd.grad(per_chunk, logits, retain_graph=True)
    estimator = (p.detach()[:, None] * chunk_credit(student, teacher)).sum()
    (found,) = torch.autograd.grad(estimator, logits)
    torch.testing.assert_close(found, exact)
    assert float((expected - exact).abs().max()) > 1e-3  # the text's KL has the future in it as well


def test_rows_without_a_chunk_add_nothing() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    sums = chunk_sums(values, torch.tensor([-1, 1, 1, 0]), 3)
    assert sums.tolist() == [8.0, 6.0, 0.0]
    sums.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [0.0, 1.0, 1.0, 1.0]


def test_a_chunk_does_not_merge_into_another_sequence() -> None:
    last = torch.tensor([False, False, True, False, True])
    assert merged(torch.tensor([0.0, 0.5, 0.0, 0.0, 0.0]), last, 0.1).tolist() == [0, 0, 1, 2, 2]
    assert merged(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 0.1).tolist() == []


def test_another_divergence_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of binary_kl"):
        binary_divergence(torch.zeros(1), torch.zeros(1), divergence="kl")  # type: ignore[arg-type]


def test_at_a_high_temperature_it_is_fine_tuning_weighed_by_what_is_left_to_learn() -> None:
    """tau D -> A log(A / B) - A + B for surprisals A of the teacher, B of the student, its gradient (1 - A / B) / tau.

    So a chunk's weight is fine-tuning's where the student is far off, none where it is as sure as its teacher, and
    pushes the chunk down where it is surer: what the text's author was sure of beyond the teacher is not learned.
    """
    teacher = torch.tensor([-0.5, -2.0, -3.0, -1.0], dtype=torch.float64)
    student = torch.tensor([-5.0, -2.0, -1.5, -20.0], dtype=torch.float64, requires_grad=True)
    tau = 1e3
    binary_divergence(student, teacher, temperature=tau).sum().backward()
    assert student.grad is not None
    weight = -tau * student.grad  # of fine-tuning's -1
    torch.testing.assert_close(weight, 1 - teacher / student.detach(), rtol=0.0, atol=1e-2)
    assert weight[0] > 0.89 and abs(weight[1]) < 1e-6 and weight[2] < -0.99
