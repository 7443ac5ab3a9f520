"""The reference files that were derived here: they are what their makers say, and the library agrees with them."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmdistill.diffusion import losses, policy, schedules
from llmdistill.diffusion.likelihood import elbo, exact_bound
from llmdistill.diffusion.masking import count_masks
from llmdistill.diffusion.slicing import NEVER, coupled_slices, full_slices

from .exact import golden
from .golden_makers import MAKERS


def doubles(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", MAKERS)
def test_files_are_their_makers(name: str) -> None:
    made = json.loads(json.dumps(MAKERS[name]()))

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(same, a, b))
        return a == pytest.approx(b, rel=1e-12, abs=1e-15) if isinstance(a, float) else a == b

    assert same(made, golden(name))


def test_subs_and_the_losses_of_mdlm_in_continuous_time_and_in_ten_steps() -> None:
    """The second is D3PM's sum of KL divergences between posteriors: under SUBS again cross-entropy by 1 / t."""
    data = golden("mdlm_loss")
    given, expected = data["inputs"], data["expected"]
    logits, ids, masked = doubles(given["logits"]), torch.tensor(given["x0"]), torch.tensor(given["masked"])
    noisy = ids.masked_fill(masked, given["mask_id"])
    log_probs = losses.subs_log_probs(logits, noisy, given["mask_id"])
    torch.testing.assert_close(log_probs.exp(), doubles(expected["subs_probabilities"]), rtol=1e-12, atol=1e-14)
    ce = losses.token_ce(log_probs, ids)
    t = doubles(given["t"]).unsqueeze(-1)
    weight = schedules.log_linear.weight(t)
    torch.testing.assert_close((ce * weight).masked_fill(~masked, 0.0), doubles(expected["continuous"]))
    everywhere = torch.ones_like(masked)
    loss = losses.weighted_nll(ce, weight, masked, everywhere, "token")
    assert float(loss) == pytest.approx(expected["continuous_loss"], rel=1e-12)
    snapped = schedules.linear.weight(doubles(expected["snapped_t"]).unsqueeze(-1))
    torch.testing.assert_close((ce * snapped).masked_fill(~masked, 0.0), doubles(expected["discrete"]))


def test_schedules_are_mdlms_by_their_total_noise_and_its_rate() -> None:
    for name, rows in golden("mdlm_loss")["expected"]["schedules"].items():
        t, sigma, weight = (doubles([row[key] for row in rows]) for key in ("t", "sigma", "weight"))
        found = schedules.schedule(name)
        torch.testing.assert_close(found.alpha(t), (-sigma).exp(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found.weight(t), weight, rtol=1e-10, atol=0)


def test_the_bound_does_not_change_with_the_variable_it_is_integrated_over() -> None:
    """By the masked share with 1 / m, and by its logarithm with a constant weight (MDLM's change of variables)."""
    data = golden("mdlm_loss")
    least, expected = data["inputs"]["least_masked_share"], data["expected"]["change_of_variables"]
    patterns = torch.tensor(list(itertools.product([False, True], repeat=3)))
    ce = doubles(data["inputs"]["ce_by_pattern"])
    nodes, weights = map(torch.tensor, np.polynomial.legendre.leggauss(40))
    u, weights = (nodes + 1) / 2, weights / 2

    def by(share: Tensor, weight: Tensor) -> float:
        total = torch.zeros((), dtype=torch.float64)
        for m, w, part in zip(share, weight, weights, strict=True):
            chance = torch.where(patterns, m, 1 - m).prod(-1)
            of_patterns = torch.stack(
                [
                    losses.weighted_nll(c[None], w.view(1, 1), p[None], torch.ones_like(p[None]), "batch")
                    for c, p in zip(ce, patterns, strict=True)
                ]
            )
            total = total + part * (chance * of_patterns).sum()
        return float(total)

    linearly = least + (1 - least) * u
    assert by(linearly, (1 - least) * schedules.linear.weight(linearly)) == pytest.approx(expected, rel=1e-10)
    by_logarithm = doubles(least) ** (1 - u)
    constant = torch.full_like(u, -float(doubles(least).log()))
    assert by(by_logarithm, constant) == pytest.approx(expected, rel=1e-10)


class Table:
    """A denoiser by its table."""

    def __init__(self, data: dict) -> None:
        self.mask_token_id, self.logits = data["mask_id"], data["logits"]
        self.seen: list[Tensor] = []

    def __call__(self, ids: Tensor, **_: Any) -> Tensor:
        self.seen.append(ids)
        return doubles([self.logits["".join(map(str, row))] for row in ids.tolist()])


def test_likelihood_is_lladas_on_its_masks_and_the_chain_rule_over_all_orders() -> None:
    data = golden("log_likelihood")
    given, expected = data["inputs"], data["expected"]
    table, x = Table(given), torch.tensor(given["x"])
    assert float(exact_bound(table, x)) == pytest.approx(expected["bound"], rel=1e-12)
    theirs, ours = Counter[int](), Counter[int]()
    for case in expected["estimates"]:
        counts = torch.tensor(case["counts"])
        masks = count_masks(torch.ones(len(counts), 4).bool(), counts, doubles(case["u"]))
        assert [row.nonzero().flatten().tolist() for row in masks] == case["masked"]
        clean = x.expand(len(counts), -1)
        ce = losses.token_ce(table(clean.masked_fill(masks, table.mask_token_id)), clean)
        weight = (4 / counts.double()).unsqueeze(-1)
        estimate = losses.weighted_nll(ce, weight, masks, torch.ones_like(masks), "batch")
        assert float(estimate) == pytest.approx(-case["estimate"], rel=1e-12)
        table.seen.clear()
        elbo(table, x.unsqueeze(0), n=given["draws"], generator=torch.Generator().manual_seed(case["k"]))
        drawn = (torch.cat(table.seen) == table.mask_token_id).sum(-1).tolist()
        theirs.update(case["counts"])
        ours.update(drawn)
        assert set(Counter(drawn).values()) == {2}, "ours: every count equally often in every estimate"
    assert set(ours.values()) == {8}
    assert theirs == {1: 4, 2: 12, 3: 4, 4: 12}, "theirs: what lies between two counts is rounded to the even one"


def test_returns_advantages_and_value_losses_are_the_sums_that_define_them() -> None:
    data = golden("tracerl_value")
    given = data["inputs"]
    steps = torch.tensor([given["step_map"]])
    rewards, values = doubles([given["rewards"]]), doubles([given["values"]])
    for case in data["expected"]["gae"]:
        returns, advantages = policy.step_gae(steps, rewards, values, case["gamma"], case["lam"])
        torch.testing.assert_close(returns, doubles([case["returns"]]))
        torch.testing.assert_close(advantages, doubles([case["advantages"]]))
    assert bool((returns[steps == NEVER] == 0).all())
    now, old, target = (doubles(given[key]) for key in ("new_values", "old_values", "targets"))
    found = policy.clipped_value_loss(now, old, target, given["eps"])
    torch.testing.assert_close(found, doubles(data["expected"]["clipped_value_loss"]))


def test_the_loss_is_diffu_grpos_and_the_estimate_coupled_grpos() -> None:
    data = golden("diffu_and_coupled_grpo")
    given, expected = data["inputs"], data["expected"]
    new, old, reference = (doubles(given[key]) for key in ("new", "old", "reference"))
    finished = torch.ones(1, 4).bool()
    advantages, _ = policy.group_advantages(doubles([given["rewards"]]), finished, scale=False)
    torch.testing.assert_close(advantages, doubles([expected["advantages"]]))
    target = torch.tensor(given["mask"]).bool()
    for case in expected["losses"]:
        options = {"eps": given["eps"], "beta": case["beta"], "reference_logps": reference}
        loss = policy.policy_loss(new, old, advantages.T, target, norm="tokens", **options)
        assert float(loss) == pytest.approx(case["loss"], rel=1e-12)
    valid, prompt = torch.tensor([[False] * 2 + [True] * 3] * 4), torch.tensor([[True] * 2 + [False] * 3] * 4)
    u = torch.cat([doubles(given["prompt_u"]), torch.zeros(4, 3)], 1)
    slices = full_slices(valid, prompt, u, given["prompt_share"])
    assert slices.masked[:, :2].int().tolist() == expected["prompt_masked"] and bool(slices.masked[:, 2:].all())
    assert torch.equal(slices.target, valid)
    ids, everywhere = torch.tensor([given["ids"]]), torch.ones(1, 3).bool()
    coupled = coupled_slices(everywhere, doubles([given["u"]]), doubles([(given["t"] - 0.2) / 0.6]))
    logits = doubles([given[f"logits_{name}"] for name in ("full", "part", "rest")])
    logps = -losses.token_ce(logits, ids.expand(3, -1))
    found = torch.where(coupled.target, logps * coupled.weight, 0.0).sum(0)
    torch.testing.assert_close(found, doubles(expected["coupled"]), rtol=1e-6, atol=1e-7)
