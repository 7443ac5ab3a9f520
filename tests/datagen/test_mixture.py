"""Rows in the proportions of a mixture."""

from hypothesis import given
from hypothesis import strategies as st

from llmdistill.datagen import mixture


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
