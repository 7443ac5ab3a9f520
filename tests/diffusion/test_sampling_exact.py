"""What the sampler draws, by enumeration: its orders and selections, in a world whose denoiser is exact."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from llmdistill.diffusion import orders, selections
from llmdistill.diffusion.generation_config import DiffusionGenerationConfig
from llmdistill.diffusion.sampling import generate
from llmdistill.diffusion.schedules import linear

from .exact import Chooser, Exact, chain, entropy, push, total_variation

P = chain(3, 4, stay=0.8)
EXACT = Exact(P)


def by_quota(order: str, count: int) -> Chooser:
    """One step of the sampler's own order and selection; ``random`` averages over all orders."""

    def choose(logits: Tensor, tokens: Tensor, masked: Tensor) -> list[tuple[float, Tensor]]:
        log_probs, counts = logits.log_softmax(-1), torch.full((len(tokens),), count)
        if order != "random":
            score = getattr(orders, order)(log_probs, tokens, torch.rand(tokens.shape, dtype=torch.float64))
            return [(1.0, selections.top(score, masked, counts))]
        rows = [torch.tensor(o, dtype=torch.float64) for o in itertools.permutations(range(tokens.shape[1]))]
        scores = [orders.random(log_probs, tokens, row.expand(tokens.shape)) for row in rows]
        return [(1 / len(rows), selections.top(score, masked, counts)) for score in scores]

    return choose


def ancestrally(step: int, steps: int) -> Chooser:
    """A step of ancestral sampling: every subset of what is masked has its chance."""
    share = selections.ancestral_share(step, steps, linear)

    def choose(logits: Tensor, tokens: Tensor, masked: Tensor) -> list[tuple[float, Tensor]]:
        where, chosen = masked[0].nonzero().flatten().tolist(), []
        for subset in itertools.product([False, True], repeat=len(where)):
            revealed = torch.zeros_like(masked)
            revealed[:, where] = torch.tensor(subset)
            chosen.append((share ** sum(subset) * (1 - share) ** (len(where) - sum(subset)), revealed))
        return chosen

    return choose


@pytest.mark.parametrize("order", ["random", "sequential", "entropy", "margin"])
def test_one_token_a_step_is_exact_in_every_order_that_does_not_look_at_what_was_drawn(order: str) -> None:
    """Row 6: total variation 0."""
    assert total_variation(push(EXACT, [by_quota(order, 1)] * 4), P) < 1e-12


def test_confidence_at_temperature_one_is_badly_biased() -> None:
    """Row 6, the usual default: measured 0.541 on another chain, entropy 3.59 -> 1.75 nats."""
    drawn = push(EXACT, [by_quota("confidence", 1)] * 4)
    assert total_variation(drawn, P) > 0.3
    assert entropy(drawn) < entropy(P) - 0.7


def test_two_tokens_a_step_cost_what_neighbours_have_in_common() -> None:
    """Row 7: random order is better than those that pick neighbours."""
    found = {o: total_variation(push(EXACT, [by_quota(o, 2)] * 2), P) for o in ("random", "sequential", "entropy")}
    assert 0.05 < found["random"] < found["sequential"]
    assert found["random"] < found["entropy"]


def test_ancestral_error_halves_when_steps_double() -> None:
    """Row 5: .466 .248 .129 .066 .033 on their chain; the ratio tends to 2."""
    found = [total_variation(push(EXACT, [ancestrally(k, t) for k in range(t)]), P) for t in (1, 2, 4, 8)]
    ratios = [a / b for a, b in itertools.pairwise(found)]
    assert all(1.7 < ratio < 2.1 for ratio in ratios), ratios
    assert ratios[-1] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    "settings, bound",
    [
        ({}, 0.05),  # the default
        ({"order": "random"}, 0.05),
        ({"select": "first_hitting"}, 0.05),
        ({"block_length": 2}, 0.05),
        ({"select": "ancestral", "denoising_steps": 24}, 0.07),
    ],
    ids=lambda x: "-".join(map(str, x.values())) or "default" if isinstance(x, dict) else "",
)
def test_generate_draws_from_the_model(settings: dict, bound: float) -> None:
    """The whole sampler, by 20,000 draws: TV of as many exact draws is 0.02 +- 0.002, of the biased order above 0.3."""
    drawn = frequencies(DiffusionGenerationConfig(max_new_tokens=4, **settings))
    assert total_variation(drawn, P) < bound


def test_generate_in_the_order_of_confidence_is_the_biased_one_that_was_enumerated() -> None:
    drawn = frequencies(DiffusionGenerationConfig(max_new_tokens=4, order="confidence"))
    assert total_variation(drawn, push(EXACT, [by_quota("confidence", 1)] * 4)) < 0.05


def test_temperature_and_filters_are_those_of_the_distribution() -> None:
    """One position: softmax(l / T), cut by top_k and top_p, by 40,000 draws (TV of exact ones: about 0.005)."""
    world = Exact(torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64))
    p = world.p
    for settings, expected in (
        ({"temperature": 0.5}, p**2 / (p**2).sum()),
        ({"temperature": 2.0}, p**0.5 / (p**0.5).sum()),
        ({"top_k": 2}, torch.tensor([0.625, 0.375, 0, 0])),
        ({"top_p": 0.75}, torch.tensor([0.625, 0.375, 0, 0])),
    ):
        config = DiffusionGenerationConfig(max_new_tokens=1, **settings)
        empty = torch.zeros(40_000, 0, dtype=torch.long)
        out = generate(world, empty, config=config, generator=torch.Generator().manual_seed(0))
        drawn = torch.bincount(out.sequences[:, 0], minlength=4).double() / len(empty)
        assert total_variation(drawn, expected.double()) < 0.015, settings
        torch.testing.assert_close(out.logps[:, 0].exp(), expected.float()[out.sequences[:, 0]], rtol=1e-4, atol=1e-6)


def frequencies(config: DiffusionGenerationConfig) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    out = generate(EXACT, torch.zeros(20_000, 0, dtype=torch.long), config=config, generator=generator)
    numbers = (out.sequences * 3 ** torch.arange(3, -1, -1)).sum(-1)
    return torch.bincount(numbers, minlength=81).double() / len(numbers)
