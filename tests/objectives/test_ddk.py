"""DDK's shares against the formulas written out."""

import math

import pytest

from llmdistill.objectives import ddk


def test_the_formulas():
    ratios = {"math": 2.0, "code": 1.2, "chat": 1.0}
    first = ddk.first_weights(ratios)
    z = sum(math.exp(r) for r in ratios.values())
    assert first == pytest.approx({n: math.exp(r) / z for n, r in ratios.items()})
    new = {"math": 1.5, "code": 1.4, "chat": 1.1}
    psi = {n: first[n] * math.exp(new[n]) for n in new}
    expected = {n: 0.5 * psi[n] / sum(psi.values()) + 0.5 / 3 for n in new}
    assert ddk.next_weights(first, new) == pytest.approx(expected)


def test_perplexities_give_ratios_and_huge_ones_do_not_overflow():
    assert ddk.ratio(2.0, 1.5) == pytest.approx(math.exp(2.0) / math.exp(1.5))
    assert ddk.ratio(900.0, 1.0) == ddk.MOST
    weights = ddk.first_weights({"known": 1.0, "unknown": ddk.ratio(900.0, 1.0)})
    for _ in range(1000):
        weights = ddk.next_weights(weights, {"known": 1.0, "unknown": ddk.MOST})
    assert weights == pytest.approx({"known": 0.25, "unknown": 0.75})


def test_equal_discrepancies_move_nothing():
    weights = {"a": 0.5, "b": 0.5}
    assert ddk.next_weights(weights, {"a": 3.0, "b": 3.0}) == pytest.approx(weights)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ddk.first_weights({}), "no domain"),
        (lambda: ddk.first_weights({"a": -1.0}), "ratio of a"),
        (lambda: ddk.first_weights({"a": math.nan}), "ratio of a"),
        (lambda: ddk.next_weights({"a": 1.0}, {"b": 1.0}), "ratios are of b"),
        (lambda: ddk.next_weights({"a": 1.0}, {"a": 1.0}, alpha=1.5), "alpha is 1.5"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
