"""DDK's weights against the formulas written out, and the rows that follow from them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.datagen import mixture


def test_the_formulas():
    ratios = {"math": 2.0, "code": 1.2, "chat": 1.0}
    first = mixture.first_weights(ratios)
    z = sum(math.exp(r) for r in ratios.values())
    assert first == pytest.approx({n: math.exp(r) / z for n, r in ratios.items()})
    new = {"math": 1.5, "code": 1.4, "chat": 1.1}
    psi = {n: first[n] * math.exp(new[n]) for n in new}
    expected = {n: 0.5 * psi[n] / sum(psi.values()) + 0.5 / 3 for n in new}
    assert mixture.next_weights(first, new) == pytest.approx(expected)


def test_perplexities_give_ratios_and_huge_ones_do_not_overflow():
    assert mixture.ratio(2.0, 1.5) == pytest.approx(math.exp(2.0) / math.exp(1.5))
    assert mixture.ratio(900.0, 1.0) == mixture.MOST
    weights = mixture.first_weights({"known": 1.0, "unknown": mixture.ratio(900.0, 1.0)})
    for _ in range(1000):
        weights = mixture.next_weights(weights, {"known": 1.0, "unknown": mixture.MOST})
    assert weights == pytest.approx({"known": 0.25, "unknown": 0.75})


def test_equal_discrepancies_move_nothing():
    weights = {"a": 0.5, "b": 0.5}
    assert mixture.next_weights(weights, {"a": 3.0, "b": 3.0}) == pytest.approx(weights)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mixture.first_weights({}), "no domain"),
        (lambda: mixture.first_weights({"a": -1.0}), "ratio of a"),
        (lambda: mixture.first_weights({"a": math.nan}), "ratio of a"),
        (lambda: mixture.next_weights({"a": 1.0}, {"b": 1.0}), "ratios are of b"),
        (lambda: mixture.next_weights({"a": 1.0}, {"a": 1.0}, alpha=1.5), "alpha is 1.5"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rows_follow_the_weights():
    weights = {"a": 0.6, "b": 0.3, "c": 0.1}
    assert mixture.counts(weights, {"a": 1000, "b": 1000, "c": 1000}, 100) == {"a": 60, "b": 30, "c": 10}
    assert mixture.counts(weights, {"a": 1000, "b": 1000, "c": 10}) == {"a": 60, "b": 30, "c": 10}
    assert mixture.counts(weights, {"a": 20, "b": 1000, "c": 1000}, 100) == {"a": 20, "b": 60, "c": 20}
    assert mixture.counts(weights, {"a": 20, "b": 20, "c": 5}, 100) == {"a": 20, "b": 20, "c": 5}


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.floats(0.01, 1), st.integers(0, 60)), min_size=1),
    st.integers(0, 200),
)
def test_as_many_rows_as_asked_and_no_more_than_there_are(domains, total):
    weights = {n: w / sum(v[0] for v in domains.values()) for n, (w, _) in domains.items()}
    available = {n: a for n, (_, a) in domains.items()}
    taken = mixture.counts(weights, available, total)
    assert all(0 <= taken[n] <= available[n] for n in taken)
    assert sum(taken.values()) == min(total, sum(available.values()))


def test_the_rows_of_a_domain_do_not_depend_on_the_others():
    one = mixture.draw({"a": 100, "b": 50}, {"a": 10, "b": 5}, seed=3)
    other = mixture.draw({"a": 100, "z": 7}, {"a": 10, "z": 7}, seed=3)
    assert one["a"] == other["a"] and len(set(one["a"])) == 10 and other["z"] == list(range(7))
