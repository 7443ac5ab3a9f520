"""On-policy distillation from an autoregressive teacher, exactly: where its fixed point is, by enumeration.

One block of four tokens, two words: a chain that stays in its word with .9, and one whose words differ, in which the
order of entropy is not from left to right. The student is a table over all states and writes one token a step (or two).
Every trace is enumerated, so the distribution of the states that it is trained on is its own, exactly. What a state
teaches about a masked token is the mean over the student's completions of what the teacher says, p(. | x_<i): that is
right where nothing to the right is visible, and only there.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from llmdistill.diffusion import orders
from llmdistill.diffusion.ar_teacher import without_visible_suffix
from llmdistill.diffusion.terms import towards_ar

from .exact import Exact, all_ids, chain, entropy, total_variation

LAW = {"sticky": chain(2, 4, stay=0.9), "uneven": chain(2, 4, seed=3)}
TRUE = {name: Exact(p) for name, p in LAW.items()}
STATES, MASK, LENGTH = TRUE["sticky"].states, TRUE["sticky"].mask_id, 4
TEXTS = all_ids(2, LENGTH)
START = (MASK,) * LENGTH
MASKED = STATES == MASK
STATE_OF = {tuple(s): i for i, s in enumerate(STATES.tolist())}


def next_token(p: Tensor) -> Tensor:
    """p(. | x_<i) of every text, [X, L, V]."""
    law = torch.zeros(len(TEXTS), LENGTH, 2, dtype=torch.float64)
    for x, text in enumerate(TEXTS):
        for i in range(LENGTH):
            agrees = (TEXTS[:, :i] == text[:i]).all(-1).double() * p.flatten()
            law[x, i] = torch.stack([(agrees * (TEXTS[:, i] == v)).sum() for v in range(2)])
    return law / law.sum(-1, keepdim=True)


def given_all_others(p: Tensor) -> Tensor:
    """p(. | x without i) of every text, [X, L, V]."""
    law = torch.zeros(len(TEXTS), LENGTH, 2, dtype=torch.float64)
    for x, text in enumerate(TEXTS):
        for i in range(LENGTH):
            for v in range(2):
                other = text.clone()
                other[i] = v
                law[x, i, v] = p[tuple(other)]
    return law / law.sum(-1, keepdim=True)


@cache
def laws(law: str, targets: str) -> Tensor:
    """What the teacher says of each text."""
    return given_all_others(LAW[law]) if targets == "suffix_corrected" else next_token(LAW[law])


def revealed(table: Tensor, s: int, order: str, width: int) -> list[tuple[float, Tensor]]:
    """(chance, positions) of what the next step reveals in a state."""
    places = MASKED[s].nonzero().flatten()
    if order == "random":
        pairs = torch.combinations(places, min(width, len(places)))
        return [(1 / len(pairs), pair) for pair in pairs]
    if order == "sequential":
        return [(1.0, places[:width])]
    scores = orders.entropy(table[s, places].log(), torch.zeros(len(places)), torch.zeros(len(places)))
    return [(1.0, places[scores.argsort(descending=True, stable=True)[:width]])]


def policy(table: Tensor, order: str, width: int) -> tuple[Tensor, Tensor]:
    """How often each state is met [S], and the texts that come of it [S, X], of a student with these distributions."""
    visits = torch.zeros(len(STATES), dtype=torch.float64)
    visits[STATE_OF[START]] = 1.0
    outcomes = torch.zeros(len(STATES), len(TEXTS), dtype=torch.float64)
    moves = dict[int, list[tuple[float, int]]]()
    for s in sorted(range(len(STATES)), key=lambda s: -int(MASKED[s].sum())):
        moves[s] = []
        for chance, positions in revealed(table, s, order, width) if MASKED[s].any() else []:
            for tokens in all_ids(2, len(positions)):
                new = STATES[s].clone()
                new[positions] = tokens
                weight = chance * float(table[s, positions, tokens].prod())
                moves[s].append((weight, STATE_OF[tuple(new.tolist())]))
                visits[moves[s][-1][1]] += visits[s] * weight
    for s in sorted(range(len(STATES)), key=lambda s: int(MASKED[s].sum())):
        if not moves[s]:
            outcomes[s] = (STATES[s] == TEXTS).all(-1).double()
        for weight, new in moves[s]:
            outcomes[s] += weight * outcomes[new]
    return visits, outcomes


def taught(s: int, targets: str) -> Tensor:
    """The masked tokens of a state that are trained, [L] bool."""
    masked = MASKED[s]
    return without_visible_suffix(masked[None])[0] if targets == "no_suffix" else masked


@cache
def fixed_point(law: str, order: str, targets: str, width: int = 1) -> tuple[Tensor, float]:
    """The student that its own states teach nothing more, and its total variation from the teacher's law."""
    table = torch.full((len(STATES), LENGTH, 2), 0.5, dtype=torch.float64)
    for _ in range(24 if targets == "suffix_corrected" else 6):  # the others end after as many rounds as tokens
        _, outcomes = policy(table, order, width)
        means = torch.einsum("sx,xlv->slv", outcomes, laws(law, targets))
        means = means / means.sum(-1, keepdim=True)  # rounding, which the next rounds would raise to powers
        for s in range(len(STATES)):
            rows = taught(s, targets)
            table[s, rows] = means[s, rows]
    _, outcomes = policy(table, order, width)
    return table, total_variation(outcomes[STATE_OF[START]], LAW[law])


@pytest.mark.parametrize(
    ("law", "order", "targets", "distance"),
    [
        ("sticky", "sequential", "all", 0.0),
        ("uneven", "sequential", "no_suffix", 0.0),
        ("sticky", "random", "all", 0.3258),
        ("uneven", "entropy", "all", 0.1723),
        ("sticky", "random", "suffix_corrected", 0.0),
        ("uneven", "entropy", "suffix_corrected", 0.0),
    ],
)
def test_where_the_fixed_point_is(law: str, order: str, targets: str, distance: float) -> None:
    """From left to right it is the teacher; in other orders OPDLM's targets are off, and corrected ones are not."""
    _, found = fixed_point(law, order, targets)
    assert found == pytest.approx(distance, abs=1e-4)


def test_two_tokens_a_step_cost_what_they_cost_the_teacher_itself() -> None:
    """From left to right in two steps the student is the exact denoiser, whose factorised draw is all that is off."""
    _, found = fixed_point("sticky", "sequential", "all", width=2)
    exact = TRUE["sticky"].table[..., :2].softmax(-1)
    _, outcomes = policy(exact, "sequential", 2)
    assert found == pytest.approx(total_variation(outcomes[STATE_OF[START]], LAW["sticky"]), abs=1e-9)


def test_rows_without_a_suffix_do_not_teach_the_others() -> None:
    """In random order the first masked token behind what is visible becomes exact; what has a suffix stays as it was,
    half a chance, and spoils through the texts that are written what the tokens behind learn."""
    table, found = fixed_point("sticky", "random", "no_suffix")
    exact = TRUE["sticky"].table[..., :2].softmax(-1)
    for s in range(len(STATES)):
        rows = taught(s, "no_suffix")
        assert (table[s, MASKED[s] & ~rows] == 0.5).all()
        if rows.any() and bool((rows == MASKED[s]).all()):
            first = int(rows.nonzero()[0])
            torch.testing.assert_close(table[s, first], exact[s, first], atol=1e-9, rtol=0)
    assert found == pytest.approx(0.4989, abs=1e-3)


@pytest.mark.parametrize(("order", "targets"), [("sequential", "all"), ("random", "all"), ("random", "no_suffix")])
def test_the_loss_that_is_trained_has_that_fixed_point(order: str, targets: str) -> None:
    """Its expected gradient, over all traces, is zero there and not where the student is another."""
    term = towards_ar(MASK, targets)  # type: ignore[arg-type]
    table, _ = fixed_point("sticky", order, targets)

    def gradient(of: Tensor) -> float:
        visits, outcomes = policy(of, order, 1)
        logits = of.clamp_min(1e-12).log().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for s in range(len(STATES)):
            places = MASKED[s].nonzero().flatten()
            no_suffix = without_visible_suffix(MASKED[s : s + 1])[0]
            for x in outcomes[s].nonzero().flatten().tolist():
                weight = torch.ones(len(places))
                given = (laws("sticky", "all")[x, places].log(), TEXTS[x, places], weight, no_suffix[places])
                assert term.loss is not None
                total = total + visits[s] * outcomes[s, x] * term.loss(logits[s, places], *given).sum()
        return float(torch.autograd.grad(total, logits)[0].abs().max())

    assert gradient(table) < 1e-9
    assert gradient(torch.full_like(table, 0.5)) > 1e-2


def test_what_the_bias_is_in_nats() -> None:
    """Of the bound per block, over the entropy of the teacher's law, of students that wrote in random order."""
    costs = {}
    for targets in ("all", "suffix_corrected"):
        table, _ = fixed_point("sticky", "random", targets)
        total = 0.0
        for x, text in enumerate(TEXTS):
            for s in range(len(STATES)):
                count = int(MASKED[s].sum())
                if count and bool(((STATES[s] == text) | MASKED[s]).all()):
                    ce = -table[s, MASKED[s], text[MASKED[s]]].log().sum()
                    total += float(LAW["sticky"].flatten()[x] * ce) / count / math.comb(LENGTH, count)
        costs[targets] = total - entropy(LAW["sticky"])
    assert costs["suffix_corrected"] == pytest.approx(0.0, abs=1e-5)
    assert costs["all"] == pytest.approx(0.4667, abs=1e-3)
