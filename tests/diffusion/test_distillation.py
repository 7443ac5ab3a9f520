"""Distillation in steps and from autoregressive teachers: what its fixed points are, by enumeration."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from llmdistill.diffusion import steps
from llmdistill.diffusion.ar_teacher import next_token_targets, suffix_corrected, without_visible_suffix
from llmdistill.diffusion.likelihood import exact_bound
from llmdistill.diffusion.losses import subs_log_probs
from llmdistill.diffusion.schedules import linear
from llmdistill.errors import UserError
from llmdistill.objectives.divergences import forward_kl, reverse_kl

from .exact import Exact, all_ids, chain, entropy, golden

P = chain(2, 4, stay=0.9)
TEACHER = Exact(P)


KINDS = all_ids(3, 4)  # of each token: kept at t; revealed between t and s; masked at both
IDS, MASKED_T, MASKED_S = (
    x.flatten(0, 1)
    for x in torch.broadcast_tensors(all_ids(2, 4).unsqueeze(1), (KINDS > 0).unsqueeze(0), (KINDS == 2).unsqueeze(0))
)


def chances(t: float, s: float) -> Tensor:
    """Of every (x, mask at t, mask at s): the sticky chain's, and one uniform a token, so that masks are nested."""
    of_kinds = torch.tensor([1 - t, t - s, s], dtype=torch.float64)[KINDS].prod(-1)
    return (P.flatten().unsqueeze(1) * of_kinds).flatten()


def expected_loss(table: Tensor, teacher: Exact, t: float, s: float, **options: Any) -> Tensor:
    x_t, x_s = IDS.masked_fill(MASKED_T, 2), IDS.masked_fill(MASKED_S, 2)
    loss = steps.mcd_loss(table[teacher.index(x_t)], teacher(x_s), IDS, MASKED_T, MASKED_S, **options)
    return (loss.sum(-1) * chances(t, s)).sum()


def gradient_at_the_teacher(**options: Any) -> float:
    logits = TEACHER.table[..., :2].clone().clamp_min(-60).requires_grad_()
    table = torch.cat([logits, torch.full_like(logits[..., :1], -torch.inf)], -1)
    (gradient,) = torch.autograd.grad(expected_loss(table, TEACHER, 0.7, 0.4, **options), logits)
    return float(gradient.abs().max())


def test_forward_kl_has_the_teacher_for_its_fixed_point_and_the_others_have_not() -> None:
    """Row 9 (measured 4.4e-16): a calibrated teacher at temperature 1 teaches nothing by a forward KL."""
    assert gradient_at_the_teacher(divergence=forward_kl) < 1e-12
    assert gradient_at_the_teacher(divergence=reverse_kl) > 1e-4
    assert gradient_at_the_teacher(divergence=forward_kl, teacher_temperature=0.75) > 1e-4


def test_per_token_divergences_are_the_official_ones() -> None:
    """On SUBS log-probs of masked rows: SDTT's forward and backward KL, and those of the consistency loss."""
    data = golden("sdtt_losses")
    student, teacher = (
        torch.tensor(data["inputs"][k], dtype=torch.float64) for k in ("student_logits", "teacher_logits")
    )
    mask_id = data["inputs"]["mask_id"]
    masks = torch.full((1, len(student)), mask_id)
    log_s, log_t = (subs_log_probs(x.unsqueeze(0), masks, mask_id)[0] for x in (student, teacher))
    assert float(forward_kl(log_s, log_t).mean()) == pytest.approx(data["expected"]["fwd_kl"], rel=1e-6)
    assert float(reverse_kl(log_s, log_t).mean()) == pytest.approx(data["expected"]["bwd_kl"], rel=1e-6)
    paper = next(value for key, value in data["expected"].items() if "PAPER" in key)
    times = steps.teacher_times(torch.tensor([0.5, 0.9]), 1 / 1024, 2)
    torch.testing.assert_close(times, torch.tensor(paper), rtol=0, atol=2e-6)
    coupling = golden("mcd_coupling")
    student, teacher = (
        torch.tensor(coupling["inputs"][k], dtype=torch.float64) for k in ("student_logits", "teacher_logits")
    )
    log_s, log_t = (subs_log_probs(x.unsqueeze(0), masks, mask_id)[0] for x in (student, teacher))
    rows = torch.tensor(coupling["expected"]["kl_bwd_rows"], dtype=torch.float64)
    everywhere = torch.ones(1, 4).bool()
    loss = steps.mcd_loss(log_s.unsqueeze(0), log_t.unsqueeze(0), masks, everywhere, everywhere)
    torch.testing.assert_close(loss[0], rows, rtol=1e-6, atol=1e-8)


def test_sub_steps_of_the_teacher_reveal_by_its_distribution() -> None:
    """SDTT's target of a token: the teacher's answer when it was revealed; of the others that of the last sub-step."""
    noisy = torch.tensor([[2, 2, 0, 2]])
    uniforms = torch.ones(2, 2, 1, 4, dtype=torch.float64)
    uniforms[0, 0, 0, 1] = 0.0  # the second token is revealed in the first sub-step
    uniforms[0, 1, 0, 1] = 0.999  # and is the last word of its distribution
    targets = steps.sdtt_targets(TEACHER, noisy, torch.tensor([0.8]), 0.2, linear, uniforms)
    before = TEACHER(noisy).log_softmax(-1)
    after = TEACHER(torch.tensor([[2, 1, 0, 2]])).log_softmax(-1)
    torch.testing.assert_close(targets[0, 1], before[0, 1])
    torch.testing.assert_close(targets[0, [0, 3]], after[0, [0, 3]])


def test_times_that_cannot_be_are_refused_and_rounds_double() -> None:
    assert [steps.step_of_round(r, 1 / 8) for r in range(3)] == [1 / 8, 1 / 4, 1 / 2]
    with pytest.raises(UserError, match="diffusion.first_step"):
        steps.step_of_round(3, 1 / 8)
    assert [steps.temperature_of_round(r, 2) for r in range(2)] == [0.96, 0.75]
    masked = torch.ones(1, 1).bool()
    with pytest.raises(UserError, match="times are exchanged"):
        steps.mcd_loss(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2), torch.zeros(1, 1).long(), ~masked, masked)


class Autoregressive:
    """The exact next-token model of p, called as a causal language model: logits at t - 1 of the token at t, and a
    beginning that is no token: ids [B, 1 + L], the first of them anything."""

    def __init__(self, exact: Exact) -> None:
        self.exact = exact

    def __call__(self, ids: Tensor, **_: Any) -> Tensor:
        text, logits = ids[:, 1:], []
        for position in range(text.shape[1]):
            state = text.clone()
            state[:, position:] = self.exact.mask_id
            logits.append(self.exact(state)[:, position, : self.exact.vocab])
        return torch.stack([*logits, logits[-1]], 1)


def optimum(targets: Tensor, only: Tensor | None = None) -> Exact:
    """The student that a forward KL to ``targets`` [X, M, L, V] ends at: their mean given what is visible, over clean x
    and masks; the truth where ``only`` [M, L] says that no target counts."""
    student = Exact(WORLD.p)
    ids, masks = all_ids(2, 3), all_masks()
    total, weight = torch.zeros(27, 3, 2, dtype=torch.float64), torch.zeros(27, 3, 1, dtype=torch.float64)
    for m, masked in enumerate(masks):
        counts = masked if only is None else masked & only[m]
        for x, p in enumerate(WORLD.p.flatten()):
            state = WORLD.index(ids[x].masked_fill(masked, 2))
            total[state] += p * counts.unsqueeze(-1) * targets[x, m]
            weight[state] += p * counts.unsqueeze(-1)
    mean = torch.where(weight > 0, total / weight, student.table[..., :2].exp())
    student.table = torch.cat([mean.log(), torch.full_like(mean[..., :1], -torch.inf)], -1)
    return student


def all_masks() -> Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=3)))


WORLD = Exact(chain(2, 3, seed=5))


def gap(student: Exact) -> float:
    """Of the bound over the entropy, in nats."""
    pairs = zip(all_ids(2, 3), WORLD.p.flatten(), strict=True)
    return sum(float(p) * float(exact_bound(student, x)) for x, p in pairs) - entropy(WORLD.p)


def test_next_token_targets_are_biased_where_a_suffix_is_visible_and_only_there() -> None:
    """Row 13: measured gaps of .29 (naive), 0 and 0 on their toy."""
    ids, masks, teacher = all_ids(2, 3), all_masks(), Autoregressive(WORLD)
    begun = torch.cat([torch.zeros(len(ids), 1).long(), ids], 1)
    naive = next_token_targets(teacher(begun))[:, 1:].softmax(-1).unsqueeze(1).expand(-1, len(masks), -1, -1)
    assert gap(optimum(naive)) > 0.01
    allowed = without_visible_suffix(masks)
    assert gap(optimum(naive, allowed)) == pytest.approx(0, abs=1e-12)
    corrected = torch.zeros(len(ids), 1, 3, 2, dtype=torch.float64)
    for x, position in itertools.product(range(len(ids)), range(3)):
        candidates, log_probs = suffix_corrected(teacher, begun, x, position + 1, k=2)
        corrected[x, 0, position, candidates] = log_probs.exp()
    assert gap(optimum(corrected.expand(-1, len(masks), -1, -1))) == pytest.approx(0, abs=1e-12)


def test_what_is_written_from_left_to_right_in_blocks_has_no_visible_suffix() -> None:
    blocks = torch.tensor([[0, 0, 1, 1]])
    masked = torch.tensor([[False, True, True, False]])
    assert without_visible_suffix(masked).tolist() == [[False, False, False, False]]
    assert without_visible_suffix(masked, blocks=blocks).tolist() == [[False, True, False, False]]
    padded = torch.tensor([[1, 1, 1, 0]])
    assert without_visible_suffix(masked, padded).tolist() == [[False, True, True, False]]


def test_few_candidates_hold_the_token_that_is_there() -> None:
    teacher = Autoregressive(WORLD)
    for x in all_ids(2, 3):
        begun = torch.cat([torch.zeros(1).long(), x]).unsqueeze(0)
        candidates, log_probs = suffix_corrected(teacher, begun, 0, 2, k=1)
        assert int(x[1]) in candidates.tolist() and float(log_probs.exp().sum()) == pytest.approx(1.0)
