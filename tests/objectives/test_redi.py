"""REDI, SimPO and DPO losses: the released code's values and gradients, and what must hold of them."""

import math

import pytest
import torch
from objective_cases import golden
from torch import Tensor

from llmdistill.objectives.redi import dpo_loss, redi_loss, sequence_means, simpo_loss

REFERENCE = golden("redi_dpo_simpo")
CASES = {case["name"]: case for case in REFERENCE["cases"]}


def sums(side: str, logits: Tensor | None = None) -> Tensor:
    """Summed log-probs [2] of the counted labels."""
    inputs = REFERENCE["inputs"]
    logits = inputs[f"{side}_logits"] if logits is None else logits
    labels = inputs[f"{side.removeprefix('ref_')}_labels"].long()
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (picked * (labels != -100)).sum(1)


def lengths(side: str) -> Tensor:
    return REFERENCE["inputs"][f"{side}_lengths"]


def loss_of(case: dict, chosen: Tensor, rejected: Tensor) -> Tensor:
    """A case's loss from summed log-probs [2]."""
    a, b = chosen / lengths("chosen"), rejected / lengths("rejected")
    if case["method"].startswith("REDI"):
        return redi_loss(a, b, case["alpha"], gamma=case.get("neg_weighting_gamma", 0.0))
    if case["method"] == "SimPO":
        return simpo_loss(a, b, beta=case["beta"], margin=case["gamma"])
    return dpo_loss(chosen, rejected, sums("ref_chosen"), sums("ref_rejected"), beta=case["beta"])


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_of_the_released_code(name):
    """Down to the gradient with respect to every logit of both sides."""
    case = CASES[name]
    leaves = [REFERENCE["inputs"][f"{side}_logits"].clone().requires_grad_() for side in ("chosen", "rejected")]
    loss = loss_of(case, sums("chosen", leaves[0]), sums("rejected", leaves[1]))
    assert loss.item() == pytest.approx(case["expected_loss"], rel=1e-5)
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    for side, grad in zip(("chosen", "rejected"), found, strict=True):
        expected = torch.tensor(case[f"grad_{side}_logits"], dtype=torch.float64)
        torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_every_pair_counts_alike(name):
    """The mean over pairs, and each pair's own value."""
    case = CASES[name]
    chosen, rejected = sums("chosen"), sums("rejected")
    for i, expected in enumerate(case["per_pair"]):
        a, b = chosen[i : i + 1], rejected[i : i + 1]
        a_mean, b_mean = a / lengths("chosen")[i], b / lengths("rejected")[i]
        if case["method"] == "DPO":
            refs = sums("ref_chosen")[i : i + 1], sums("ref_rejected")[i : i + 1]
            value = dpo_loss(a, b, *refs, beta=case["beta"])
        elif case["method"] == "SimPO":
            value = simpo_loss(a_mean, b_mean, beta=case["beta"], margin=case["gamma"])
        else:
            value = redi_loss(a_mean, b_mean, case["alpha"], gamma=case.get("neg_weighting_gamma", 0.0))
        assert value.item() == pytest.approx(expected, rel=1e-5)


def means(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    "loss",
    [
        lambda a, b: redi_loss(a, b, 0.8),
        lambda a, b: redi_loss(a, b, 0.8, gamma=0.7),
        lambda a, b: redi_loss(a, b, 1.0),
        lambda a, b: simpo_loss(a, b, beta=2.0, margin=1.0),
        lambda a, b: dpo_loss(a, b, means(-0.7, -1.8, -3.3), means(-0.7, -1.0, -1.8), beta=0.5),
    ],
    ids=["redi", "redi_gamma", "symmetric", "simpo", "dpo"],
)
def test_gradients_are_the_finite_differences(loss):
    a, b = means(-0.4, -1.5, -3.0), means(-0.9, -1.2, -2.0)
    assert torch.autograd.gradcheck(loss, (a, b), eps=1e-6, atol=1e-7)


def test_alpha_weighs_the_rejected_side_and_nothing_else():
    a, b = means(-0.4, -1.5), means(-0.9, -1.2)
    by_a, by_b = torch.autograd.grad(redi_loss(a, b, 0.8), (a, b))
    assert by_a.tolist() == [-0.5, -0.5]
    assert by_b.tolist() == pytest.approx([0.4, 0.4])
    by_a, by_b = torch.autograd.grad(redi_loss(a, b, 1.0), (a, b))
    assert (by_a == -by_b).all()  # symmetric
    assert redi_loss(a, a, 1.0).item() == 0
    dead = torch.full_like(b, -math.inf)
    assert redi_loss(a, dead, 0.0).item() == pytest.approx(0.95)  # the rejected side is not read at all


def test_gamma_bounds_the_negative_term_where_the_plain_one_has_no_bound():
    a, b = means(-1.0), -torch.logspace(-3, 4, 200, dtype=torch.float64)
    terms = torch.stack([redi_loss(a, x[None], 0.8, gamma=2.0) - redi_loss(a, x[None], 0.0) for x in b])
    assert terms.min().item() == pytest.approx(-0.8 / (2 * math.e), rel=1e-2)  # -alpha / (e gamma), at b = -1 / gamma
    assert b[terms.argmin()].item() == pytest.approx(-0.5, rel=0.1)
    assert redi_loss(a, b[-1:], 0.8).item() < -7000


def test_the_mean_of_every_sequence_is_over_its_own_tokens():
    values = means(1.0, 2.0, 3.0, 10.0, 20.0, 30.0)
    found = sequence_means(values, [3, 1, 2])
    assert found.tolist() == [2.0, 10.0, 25.0]
    (grad,) = torch.autograd.grad(found @ torch.tensor([3.0, 5.0, 8.0], dtype=torch.float64), values)
    assert grad.tolist() == pytest.approx([1, 1, 1, 5, 4, 4])


def test_what_cannot_be():
    a, b = means(-1.0, -2.0), means(-1.0)
    for wrong in (
        lambda: redi_loss(a, b, 0.8),
        lambda: redi_loss(a[:0], b[:0], 0.8),
        lambda: redi_loss(a, a, -0.1),
        lambda: redi_loss(a, a, math.nan),
        lambda: redi_loss(a, a, 0.8, gamma=-1.0),
        lambda: simpo_loss(a, a, beta=0.0, margin=1.0),
        lambda: simpo_loss(a, b, beta=1.0, margin=1.0),
        lambda: dpo_loss(a, a, a, b, beta=0.1),
        lambda: dpo_loss(a, a, a, a, beta=-0.1),
    ):
        with pytest.raises(ValueError):
            wrong()
