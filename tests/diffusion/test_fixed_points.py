"""What distillation in steps ends at, exactly: rows 10 to 12 of the derivation, on a sticky chain (V = 2, L = 4).

The 81 states are rows of a table. A step of the ancestral sampler is a matrix over them, so what a sampler of k steps
draws is a product of matrices, exact and differentiable. A round's fixed point is the student's answer in every state
that makes the expected loss least; where it has no closed form, it is found state by state. Times are uniform on
[dt, 1], dt is 1/8, then 1/4, then 1/2. The numbers in the asserts are those of the derivation, to its three digits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmdistill.diffusion import steps
from llmdistill.diffusion.likelihood import exact_bound
from llmdistill.diffusion.schedules import linear
from llmdistill.objectives.divergences import forward_kl, reverse_kl

from .exact import Exact, all_ids, chain, entropy, total_variation
from .test_distillation import expected_loss

P = chain(2, 4, stay=0.9)
WORLD = Exact(P)
MASKED = WORLD.states == WORLD.mask_id  # [81, 4]
CLEAN = WORLD.index(WORLD.ids)
KINDS = all_ids(3, 4)  # of each token: there at t; revealed between t and s; masked at both
TEACHER = WORLD.table[..., :2].log_softmax(-1).clamp_min(-60)
FIRST = 1 / 8
_EXACT: dict[str, Any] = {"tolerance_grad": 1e-12, "tolerance_change": 1e-16}
Round = Callable[..., Tensor]  # teacher's log-probs [81, 4, 2], dt, number of times -> the student's


def times(dt: float, number: int = 32) -> list[float]:
    return [dt + (1 - dt) * (i + 0.5) / number for i in range(number)]


def step(log_probs: Tensor, share: float) -> Tensor:
    """One ancestral step that reveals each masked token with probability ``share``, [81, 81]."""
    hidden = torch.cat([share * log_probs.exp(), torch.full_like(log_probs[..., :1], 1 - share)], -1)
    of_token = torch.where(MASKED.unsqueeze(-1), hidden, F.one_hot(WORLD.states, 3).double())
    return torch.einsum("sa,sb,sc,sd->sabcd", *of_token.unbind(1)).reshape(81, 81)


def drawn(log_probs: Tensor, k: int) -> Tensor:
    """What k ancestral steps draw, [16]."""
    mass = F.one_hot(torch.tensor(80), 81).double()
    for j in range(k):
        mass = mass @ step(log_probs, 1 / (k - j))
    return mass[CLEAN]


def away(log_probs: Tensor) -> list[float]:
    return [total_variation(drawn(log_probs, k), P) for k in (2, 4, 8)]


def pairs(dt: float, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every clean text, kinds of its tokens and time: states at t and at s [N], chance [N], kinds [N, 4]."""
    found = []
    for t in times(dt, number):
        chance = torch.tensor([1 - t, dt, t - dt], dtype=torch.float64)[KINDS].prod(-1) / number
        for x, p in zip(WORLD.ids, P.flatten(), strict=True):
            at_t, at_s = (WORLD.index(torch.where(hidden, 2, x)) for hidden in (KINDS > 0, KINDS == 2))
            found.append((at_t, at_s, p * chance, KINDS))
    return tuple(map(torch.cat, zip(*found, strict=True)))  # type: ignore[return-value]


def mcd(divergence: str, temperature: float = 1.0, with_revealed: bool = True) -> Round:
    def of_round(teacher: Tensor, dt: float, number: int = 32) -> Tensor:
        at_t, at_s, chance, kinds = pairs(dt, number)
        sharpened = (teacher / temperature).log_softmax(-1)
        said = (sharpened if divergence == "reverse" else sharpened.exp())[at_s]
        weight = chance[:, None, None] * (kinds == 2).unsqueeze(-1)
        mean = torch.zeros(81, 4, 2, dtype=torch.float64).index_add(0, at_t, weight * said)
        mass = torch.zeros(81, 4, 1, dtype=torch.float64).index_add(0, at_t, weight)
        shown = WORLD.states[at_s].clamp_max(1)  # the tokens, where they are
        revealed = F.one_hot(shown, 2) * (chance[:, None, None] * (kinds == 1).unsqueeze(-1))
        counts = torch.zeros_like(mean).index_add(0, at_t, revealed) if with_revealed else torch.zeros_like(mean)
        if divergence == "forward":  # the mean of what is said, tokens included
            total = mean + counts
            return log_of(total / total.sum(-1, keepdim=True).clamp_min(1e-300), MASKED, teacher)
        return least(mean, mass, counts, teacher)

    return of_round


def log_of(p: Tensor, where: Tensor, otherwise: Tensor) -> Tensor:
    return torch.where(where.unsqueeze(-1), p.clamp_min(1e-26).log(), otherwise)


def least(mean_log: Tensor, mass: Tensor, counts: Tensor, otherwise: Tensor) -> Tensor:
    """The S that minimises mass sum S log S - S . mean_log - counts . log S; without counts its softmax."""
    start = torch.where(mass > 0, (mean_log / mass.clamp_min(1e-300)).log_softmax(-1), otherwise)
    if float(counts.sum()) == 0:
        return start.clamp_min(-60)
    z = (start[..., 1] - start[..., 0]).clamp(-12, 12).requires_grad_()
    optimizer = torch.optim.LBFGS([z], max_iter=400, line_search_fn="strong_wolfe", **_EXACT)

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_s = torch.stack([F.logsigmoid(-z), F.logsigmoid(z)], -1)
        s = log_s.exp()
        loss = (mass.squeeze(-1) * (s * log_s).sum(-1) - (s * mean_log).sum(-1) - (counts * log_s).sum(-1)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    z = z.detach()
    return torch.stack([F.logsigmoid(-z), F.logsigmoid(z)], -1)


def sdtt_target(teacher: Tensor, t: float, dt: float, divergence: str) -> Tensor:
    """The mean over the teacher's first sub-step of what a token learns: of its log-probs, or of its probabilities.

    A token that the sub-step reveals learns what was said before it, one that stays masked what is said after it.
    """
    said, share = teacher if divergence == "reverse" else teacher.exp(), dt / t
    after = torch.einsum("ab,biv->aiv", step(teacher, share), said.masked_fill(~MASKED.unsqueeze(-1), 0.0))
    return share * said + after


def sdtt(divergence: str) -> Round:
    def of_round(teacher: Tensor, dt: float) -> Tensor:
        mean, mass = torch.zeros(81, 4, 2, dtype=torch.float64), torch.zeros(81, 1, 1, dtype=torch.float64)
        for t in times(dt):
            weight = torch.zeros(81, dtype=torch.float64)
            for x, p in zip(WORLD.ids, P.flatten(), strict=True):
                masks = all_ids(2, 4)
                chance = p * torch.tensor([1 - t, t], dtype=torch.float64)[masks].prod(-1)
                weight.index_add_(0, WORLD.index(torch.where(masks == 1, 2, x)), chance)
            mean += weight[:, None, None] * sdtt_target(teacher, t, dt, divergence)
            mass += weight[:, None, None]
        mean = mean / mass.clamp_min(1e-300)
        if divergence == "forward":
            return log_of(mean / mean.sum(-1, keepdim=True).clamp_min(1e-300), MASKED, teacher)
        return torch.where(MASKED.unsqueeze(-1), mean.log_softmax(-1), teacher).clamp_min(-60)

    return of_round


STUDENTS: dict[str, tuple[Round, int]] = {
    "mcd, reverse": (mcd("reverse", with_revealed=False), 3),
    "mcd, reverse and ce": (mcd("reverse"), 3),
    "mcd, forward, temperature .75": (mcd("forward", 0.75), 3),
    "mcd, forward": (mcd("forward"), 3),
    "sdtt, reverse": (sdtt("reverse"), 2),
    "sdtt, forward": (sdtt("forward"), 2),
}


@cache
def student(name: str) -> Tensor:
    of_round, rounds = STUDENTS[name]
    log_probs = TEACHER
    for number in range(rounds):
        log_probs = of_round(log_probs, steps.step_of_round(number, FIRST)).log_softmax(-1)
    return log_probs


def as_world(log_probs: Tensor) -> Exact:
    world = Exact(P)
    world.table = torch.cat([log_probs, torch.full_like(log_probs[..., :1], -torch.inf)], -1)
    return world


@pytest.mark.slow
def test_the_teacher_and_its_students_are_as_far_as_the_derivation_says() -> None:
    """Row 10, at k = 2, 4, 8 steps. SDTT's numbers are those after the rounds of 1/8 and 1/4."""
    expected = {
        "mcd, reverse": (0.309, 0.129, 0.037),
        "mcd, reverse and ce": (0.334, 0.165, 0.074),
        "mcd, forward, temperature .75": (0.334, 0.162, 0.070),
        "sdtt, reverse": (0.325, 0.151, 0.059),
    }
    assert away(TEACHER) == pytest.approx((0.345, 0.180, 0.092), abs=6e-4)
    for name, numbers in expected.items():
        assert away(student(name)) == pytest.approx(numbers, abs=6e-4), name
    for name in ("mcd, forward", "sdtt, forward"):
        assert away(student(name)) == pytest.approx(away(TEACHER), abs=1e-9), f"{name}: a forward KL teaches nothing"


@pytest.mark.slow
def test_reverse_kl_is_nearer_at_every_number_of_steps_and_never_sixteen_times_as_fast() -> None:
    """Row 10: eight steps of the student are twenty of the teacher's; one step is as far as ever."""
    teacher, of_mcd, of_sdtt = away(TEACHER), away(student("mcd, reverse")), away(student("sdtt, reverse"))
    assert all(a < b < c for a, b, c in zip(of_mcd, of_sdtt, teacher, strict=True))
    assert of_mcd[2] == pytest.approx(total_variation(drawn(TEACHER, 20), P), abs=5e-4)
    one = [total_variation(drawn(x, 1), P) for x in (TEACHER, student("mcd, reverse"))]
    assert one == pytest.approx([0.604, 0.604], abs=6e-4)


@pytest.mark.slow
def test_no_time_free_factorised_student_is_below_the_bound() -> None:
    """Row 11: the least distance of any table, by gradient on the exact sampler; every student is at or above it."""
    best, generator = {}, torch.Generator().manual_seed(0)
    for k in (1, 2, 4):  # from the best student there is, its symmetries broken
        start = student("mcd, reverse").clamp_min(-4)
        z = start[..., 1] - start[..., 0] + 0.3 * torch.randn(81, 4, generator=generator, dtype=torch.float64)
        optimizer = torch.optim.Adam([z.requires_grad_()], lr=0.1)
        for iteration in range(300):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - iteration / 300)
            optimizer.zero_grad()
            log_probs = torch.stack([F.logsigmoid(-z), F.logsigmoid(z)], -1)
            loss = (drawn(log_probs, k) - P.flatten()).abs().sum() / 2
            loss.backward()
            optimizer.step()
        best[k] = float(loss.detach())
    assert [best[k] for k in (1, 2, 4)] == pytest.approx([0.444, 0.192, 0.004], abs=1.5e-3)
    for k, name in ((k, name) for k in best for name in STUDENTS):
        assert total_variation(drawn(student(name), k), P) >= best[k] - 1e-3, (k, name)


@pytest.mark.slow
def test_seeking_modes_is_paid_for_in_likelihood_and_entropy() -> None:
    """Row 12: the bound over the entropy, and the entropy of what eight steps draw (1.926 -> 1.771, of 1.668)."""

    def cost(log_probs: Tensor) -> float:
        world = as_world(log_probs)
        bounds = zip(WORLD.ids, P.flatten(), strict=True)
        return sum(float(p) * float(exact_bound(world, x)) for x, p in bounds) - entropy(P)

    assert cost(TEACHER) == pytest.approx(0, abs=1e-12)
    assert cost(student("mcd, reverse")) == pytest.approx(0.042, abs=6e-4)
    assert cost(student("sdtt, reverse")) == pytest.approx(0.010, abs=6e-4)
    assert cost(student("mcd, forward, temperature .75")) == pytest.approx(0.002, abs=6e-4)
    found = [entropy(drawn(x, 8)) for x in (TEACHER, student("mcd, reverse"))]
    assert [*found, entropy(P)] == pytest.approx([1.926, 1.771, 1.668], abs=6e-4)


@pytest.mark.parametrize(
    "name, options",
    [
        ("mcd, reverse and ce", {"divergence": reverse_kl}),
        ("mcd, forward, temperature .75", {"divergence": forward_kl, "teacher_temperature": 0.75}),
    ],
)
def test_the_first_rounds_fixed_point_is_where_the_librarys_loss_has_no_gradient(name: str, options: Any) -> None:
    of_round, _ = STUDENTS[name]
    logits = of_round(TEACHER, FIRST, 4).requires_grad_()

    def gradient(logits: Tensor) -> float:
        table = torch.cat([logits, torch.full_like(logits[..., :1], -torch.inf)], -1)
        losses = [expected_loss(table, WORLD, t, t - FIRST, **options) for t in times(FIRST, 4)]
        (found,) = torch.autograd.grad(torch.stack(losses).mean(), logits)
        return float(found.abs().max())

    assert gradient(logits) < 1e-6 < 1e-4 < gradient(TEACHER.clone().requires_grad_())


def test_the_librarys_sdtt_targets_have_the_mean_that_was_enumerated() -> None:
    """Of a state with three masks; 20,000 draws of the teacher's sub-steps, 5 standard errors (below 1e-5 a number)."""
    noisy, t, dt = torch.tensor([[2, 0, 2, 2]]).expand(20_000, -1), 0.8, 0.25
    uniforms = torch.rand(2, 2, 20_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = steps.sdtt_targets(
        as_world(TEACHER), noisy, torch.full((20_000,), t, dtype=torch.float64), dt, linear, uniforms
    )
    found = targets[:, [0, 2, 3], :2].exp()
    expected = sdtt_target(TEACHER, t, dt, "forward")[WORLD.index(noisy[0])][[0, 2, 3]]
    error = found.std(0) / len(found) ** 0.5
    assert bool(((found.mean(0) - expected).abs() < 5 * error + 1e-9).all())
