"""The bound, checked by enumerating every state of small worlds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from llmdistill.diffusion.likelihood import elbo, exact_bound, loglikelihood, perplexity, sample_entropy
from llmdistill.diffusion.losses import token_ce
from llmdistill.diffusion.schedules import linear
from llmdistill.errors import UserError

from .exact import Exact, all_ids, chain, entropy

P = chain(3, 4)
TRUE, PERTURBED = Exact(P), Exact(P, perturb=0.7)


def bounds(exact: Exact) -> torch.Tensor:
    return torch.stack([exact_bound(exact, ids) for ids in all_ids(3, 4)])


def log_any_order(exact: Exact, ids: torch.Tensor) -> torch.Tensor:
    """log of the mean over orders of the product of the denoiser's answers along each, of ids [X, L]."""
    logs = []
    for order in itertools.permutations(range(ids.shape[1])):
        state, total = torch.full_like(ids, exact.mask_id), torch.zeros(len(ids), dtype=torch.float64)
        for position in order:
            total = total - token_ce(exact(state), ids)[:, position]
            state = state.clone()
            state[:, position] = ids[:, position]
        logs.append(total)
    return torch.stack(logs).logsumexp(0) - math.log(len(logs))


def test_bound_of_the_exact_posterior_is_the_likelihood_itself() -> None:
    """Row 1: measured gap 2.7e-15."""
    assert float((bounds(TRUE) + P.flatten().log()).abs().max()) < 1e-12


def test_bound_of_another_denoiser_is_jensens_against_the_mixture_over_orders() -> None:
    """Row 2: above -log p_anyorder for every x, which is a distribution; on average above the entropy."""
    mixture = log_any_order(PERTURBED, all_ids(3, 4))
    gap = bounds(PERTURBED) + mixture
    assert float(gap.min()) > 0.01 and float(mixture.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    assert float((bounds(PERTURBED) * P.flatten()).sum()) > entropy(P) + 0.05


def test_time_count_and_order_forms_agree() -> None:
    """Row 3: the integral over t by Gauss-Legendre, exact for these polynomials; the mean over all 24 orders."""
    nodes, weights = map(torch.tensor, np.polynomial.legendre.leggauss(8))
    t = (nodes + 1) / 2
    for ids in all_ids(3, 4)[::7]:
        by_time = torch.zeros((), dtype=torch.float64)
        for masked in itertools.product([False, True], repeat=4):
            mask = torch.tensor(masked)
            ce = token_ce(PERTURBED(ids.masked_fill(mask, 3).unsqueeze(0)), ids.unsqueeze(0))[0][mask].sum()
            chance = t ** int(mask.sum()) * (1 - t) ** int((~mask).sum())
            by_time = by_time + (weights / 2 * linear.weight(t) * chance).sum() * ce
        orders = []
        for order in itertools.permutations(range(4)):
            state, total = torch.full_like(ids, 3), 0.0
            for position in order:
                total += float(token_ce(PERTURBED(state.unsqueeze(0)), ids.unsqueeze(0))[0, position])
                state = state.index_fill(0, torch.tensor(position), int(ids[position]))
            orders.append(total)
        expected = float(exact_bound(PERTURBED, ids))
        assert float(by_time) == pytest.approx(expected, rel=1e-10)
        assert sum(orders) / 24 == pytest.approx(expected, rel=1e-10)


def test_estimators_are_unbiased_and_the_count_form_has_a_small_part_of_the_variance() -> None:
    """Row 4. z of 700 single draws, |z| < 4 fails falsely once in 16,000; measured ratios 81 / 2.3 and 81 / 1.2."""
    ids, draws = torch.tensor([[0, 2, 1, 1]]), 700
    expected, variances = float(exact_bound(PERTURBED, ids[0])), {}
    for estimator in ("count", "time"):
        generator = torch.Generator().manual_seed(0)
        values = torch.stack(
            [elbo(PERTURBED, ids, n=1, estimator=estimator, generator=generator).nats[0] for _ in range(draws)]
        )
        z = (values.mean() - expected) / (values.std() / math.sqrt(draws))
        assert abs(float(z)) < 4, estimator
        variances[estimator] = float(values.var())
    generator = torch.Generator().manual_seed(0)
    stratified = torch.stack([elbo(PERTURBED, ids, n=4, generator=generator).nats[0] for _ in range(200)])
    assert variances["time"] > 5 * variances["count"]
    assert float(stratified.var()) * 4 < variances["count"], "each count once: less than four draws without strata"


def test_error_is_that_of_the_mean_and_one_token_needs_one_draw() -> None:
    ids = torch.tensor([[0, 2, 1, 1], [1, 1, 0, 2]])
    few, many = (elbo(PERTURBED, ids, n=n, generator=torch.Generator().manual_seed(1)) for n in (16, 256))
    assert bool((many.error < few.error).all())
    expected = torch.stack([exact_bound(PERTURBED, row) for row in ids])
    assert bool(((many.nats - expected).abs() < 4 * many.error).all())
    one = elbo(PERTURBED, ids[:1], torch.tensor([[False, False, True, False]]))
    assert one.error.tolist() == [0.0] and one.tokens.tolist() == [1]


def test_a_prompt_is_never_masked() -> None:
    seen: list[torch.Tensor] = []

    def watched(ids: torch.Tensor, **_: object) -> torch.Tensor:
        seen.append(ids)
        return TRUE(ids)

    watched.mask_token_id = 3  # type: ignore[attr-defined]
    found, error = loglikelihood(watched, torch.tensor([0, 2]), torch.tensor([1, 1]), n=64)
    conditional = P[0, 2, 1, 1] / P[0, 2].sum()
    assert found == pytest.approx(float(conditional.log()), abs=4 * error + 1e-12)
    assert bool((torch.cat(seen)[:, :2] == torch.tensor([0, 2])).all())


def test_perplexity_comes_with_the_entropy_of_samples() -> None:
    found = perplexity(TRUE, [torch.tensor([0, 2, 1, 1])], samples=torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]]), n=64)
    assert found.perplexity == pytest.approx(float(P[0, 2, 1, 1]) ** -0.25, rel=0.3)
    assert found.sample_entropy == pytest.approx(math.log(2) / 2)
    assert sample_entropy(torch.tensor([[5, 5, 6]]), torch.tensor([[True, True, False]])).tolist() == [0.0]


def test_what_has_no_bound_is_refused() -> None:
    ids = torch.tensor([[0, 1, 2, 0]])
    with pytest.raises(UserError, match="no maskable token"):
        elbo(TRUE, ids, torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(UserError, match="mask token"):
        elbo(TRUE, torch.tensor([[0, 3, 2, 0]]))
    with pytest.raises(UserError, match="n is 0"):
        elbo(TRUE, ids, n=0)
    with pytest.raises(UserError, match="estimator"):
        elbo(TRUE, ids, estimator="order")
    with pytest.raises(UserError, match="no sequences"):
        perplexity(TRUE, [])
