"""Which sequences share a pass: bounds are kept, nothing is lost or turned round, and no division does with fewer."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmdistill.errors import UserError
from llmdistill.texts import Rollout, collate
from llmdistill.texts.batches import Passes, by_length, groups, needed, split_evenly, spread, uncounted

ITEMS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 2)), min_size=1, max_size=8)


def largest(lengths: list[int], widths: list[int], bounds: list[tuple[int, int]]) -> int:
    """Tokens of the largest pass, padding included."""
    return max(max(lengths[a:b]) * sum(widths[a:b]) for a, b in bounds if a < b)


def divisions(count: int, parts: int) -> list[list[tuple[int, int]]]:
    """Every way to cut ``range(count)`` into at most ``parts`` stretches."""
    found = []
    for k in range(min(parts, count)):
        for cuts in itertools.combinations(range(1, count), k):
            found.append(list(itertools.pairwise((0, *cuts, count))))
    return found


@given(ITEMS, st.integers(1, 9))
def test_the_largest_stretch_is_as_small_as_any_division_makes_it(items: list[tuple[int, int]], parts: int) -> None:
    lengths, widths = [length for length, _ in items], [width for _, width in items]
    bounds = spread(lengths, parts, widths)
    assert len(bounds) == parts and [i for a, b in bounds for i in range(a, b)] == list(range(len(items)))
    assert largest(lengths, widths, bounds) == min(largest(lengths, widths, d) for d in divisions(len(items), parts))


@given(ITEMS, st.integers(1, 200))
def test_no_division_keeps_to_the_budget_with_fewer(items: list[tuple[int, int]], budget: int) -> None:
    lengths, widths = [length for length, _ in items], [width for _, width in items]
    if max(length * width for length, width in items) > budget:
        with pytest.raises(UserError, match=rf"objective.batch_tokens is {budget}, and there .* one pass has to hold"):
            needed(lengths, budget, widths)
        return
    parts = needed(lengths, budget, widths)
    assert largest(lengths, widths, spread(lengths, parts, widths)) <= budget
    assert all(largest(lengths, widths, d) > budget for d in divisions(len(items), parts - 1))


@given(st.lists(st.integers(1, 30), max_size=9), st.integers(1, 90))
def test_groups_by_length_hold_each_sequence_once_and_keep_the_bound(lengths: list[int], budget: int) -> None:
    found = by_length(lengths, budget)
    assert sorted(i for group in found for i in group) == list(range(len(lengths)))
    assert [lengths[i] for group in found for i in group] == sorted(lengths)
    assert all(len(g) == 1 or max(lengths[i] for i in g) * len(g) <= budget for g in found)


def test_nothing_is_divided_into_nothing() -> None:
    assert spread([], 2) == [(0, 0), (0, 0)] and needed([], 5) == 0 and by_length([], 5) == [] and groups([], 5) == []
    assert split_evenly(5, 2) == [(0, 2), (2, 5)] and split_evenly(1, 3) == [(0, 0), (0, 0), (0, 1)]


def rollout() -> Rollout:
    lengths = (1, 2, 5, 2)
    return collate([[5] * length for length in lengths], [[7] * length for length in lengths], pad_id=0)


def test_passes_hold_so_many_sequences_or_tokens_and_every_rank_makes_as_many() -> None:
    text = rollout()
    assert [len(part) for part in Passes(3).of(text, "cpu")] == [3, 1]
    assert [tuple(part.input_ids.shape) for part in Passes(3, 12).of(text, "cpu")] == [(2, 4), (1, 10), (1, 4)]
    asked = []

    def most(count: object) -> int:
        asked.append(count())  # type: ignore[operator]
        return 5

    parts = list(Passes(3, 12, most).of(text, "cpu"))
    assert asked == [3] and len(parts) == 5
    assert sum(part.num_rows for part in parts) == text.num_rows  # of those too many nothing counts
    assert torch.cat([part.token_rows() for part in parts]).equal(text.token_rows())
    assert uncounted(text).num_rows == 0 and len(uncounted(text)) == 1
