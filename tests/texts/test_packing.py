"""Packed views: the same tokens, positions and rows as padded ones, in other places."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs, prepare_fa_kwargs_from_position_ids

from llmdistill.errors import UserError
from llmdistill.texts import Rollout, collate
from llmdistill.texts.batches import Passes, by_length, needed, spread
from llmdistill.texts.packing import Layout, packed
from llmdistill.texts.views import View, plain
from tests.trainer.test_loss import padded

LAYOUTS: tuple[Layout, ...] = ("kernel", "row", "rows")
LENGTHS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), min_size=1, max_size=7)


def text(lengths: list[tuple[int, int]]) -> Rollout:
    """Every token another id."""
    ids = iter(range(1, 1000))
    prompts = [[next(ids) for _ in range(p)] for p, _ in lengths]
    completions = [[next(ids) for _ in range(c)] for _, c in lengths]
    return collate(prompts, completions, pad_id=0)


def state_of(view: View) -> Tensor:
    """Of every state something that its token and position decide, [B, T, 2]."""
    return torch.stack([view.input_ids, view.position_ids], -1)


@given(LENGTHS, st.sampled_from(LAYOUTS), st.integers(0, 2), st.integers(0, 2))
def test_every_row_reads_the_state_it_read_before(
    lengths: list[tuple[int, int]], layout: Layout, left: int, right: int
) -> None:
    before = plain(padded(text(lengths), left, right))
    view = packed(before, layout)
    assert torch.equal(view.rows(state_of(view)), before.rows(state_of(before)))
    assert torch.equal(view.targets, before.targets)
    tokens = [p + c for p, c in lengths]
    assert view.there is not None and int(view.there.sum()) == sum(tokens)
    assert view.input_ids.shape[1] == (max(tokens) if layout == "rows" else sum(tokens))
    if layout != "rows":
        assert len(view.input_ids) == 1 and bool(view.there.all())  # no padding


@given(LENGTHS)
def test_positions_begin_again_where_a_sequence_does_and_nowhere_else(lengths: list[tuple[int, int]]) -> None:
    tokens = [p + c for p, c in lengths]
    view = packed(plain(text(lengths)), "kernel")
    begins = (view.position_ids[0] == 0).nonzero().flatten().tolist()
    assert [*begins, sum(tokens)] == view.extras["cu_seq_lens_q"].tolist() == view.extras["cu_seq_lens_k"].tolist()
    assert view.extras["max_length_q"] == max(tokens) and "attention_mask" not in view.inputs()
    (ends, _), (longest, _) = prepare_fa_kwargs_from_position_ids(view.position_ids)  # what transformers reads of them
    assert view.extras["cu_seq_lens_q"].equal(ends) and view.extras["max_length_q"] == longest
    assert view.extras.keys() <= FlashAttentionKwargs.__annotations__.keys()
    rows = packed(plain(text(lengths)), "rows")
    assert rows.there is not None
    steps = rows.position_ids.diff(dim=1)
    assert bool(((steps == 1) | (rows.position_ids[:, 1:] == 0)).all())  # padding too is a sequence of its own
    assert bool((rows.position_ids[:, 0] == 0).all()) and bool(rows.there[:, 0].all())


def test_rows_as_long_as_the_longest_are_filled_before_another_begins() -> None:
    view = packed(plain(text([(2, 8), (1, 3), (2, 2), (1, 1), (1, 5)])), "rows")
    assert view.there is not None and view.there.sum(1).tolist() == [10, 10, 6]  # 10; 6 + 4; 4 + 2


def test_biases_of_denoisers_are_those_of_each_sequence_and_nothing_between() -> None:
    rollout = text([(1, 2), (2, 3), (1, 1)])
    both = packed(plain(rollout), "rows", both_ways=True)
    given_ = torch.rand(3, 1, 5, 5)
    sees_itself = torch.where(rollout.attention_mask, 0.0, -1.0)
    given_.diagonal(dim1=-2, dim2=-1)[:, 0] = sees_itself
    own = packed(replace(plain(rollout), attention_mask=given_), "rows")
    assert both.attention_mask is not None and own.attention_mask is not None
    assert both.attention_mask.shape == own.attention_mask.shape == (2, 1, 5, 5)
    assert both.input_ids.tolist() == own.input_ids.tolist() and both.input_ids[1].tolist()[:3] == [1, 5, 6]
    lowest = torch.finfo(torch.float32).min
    block = torch.full((5, 5), lowest)
    block[:3, :3], block[3:, 3:] = given_[0, 0, :3, :3], given_[2, 0, :2, :2]
    assert torch.equal(own.attention_mask[1, 0], block)
    assert torch.equal(both.attention_mask[1, 0] == 0, block != lowest)


def test_images_are_refused() -> None:
    view = replace(plain(text([(1, 2)])), extras={"pixel_values": torch.zeros(1)})
    with pytest.raises(UserError, match="the texts have pixel_values beside their tokens.* Fix: --objective.packing"):
        packed(view, "row")


# ---------------------------------------------------------------- budgets


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(30, 120))
def test_a_budget_counts_the_tokens_there_are(lengths: list[int], budget: int) -> None:
    parts = needed(lengths, budget, packed=True)
    bounds = spread(lengths, parts, packed=True)
    largest = max(sum(lengths[a:b]) for a, b in bounds)
    assert largest <= budget and parts <= needed(lengths, max(budget, max(lengths)))
    assert parts == 1 or sum(lengths) > budget
    assert all(sum(lengths[i] for i in group) <= budget for group in by_length(lengths, budget, packed=True))


def test_a_budget_below_one_text_is_refused() -> None:
    with pytest.raises(UserError, match="objective.batch_tokens is 9, and there is text of 12 tokens that one pass"):
        needed([3, 12], 9, packed=True)


def test_passes_are_marked_and_every_rank_makes_as_many() -> None:
    rollout = text([(1, 1), (2, 2), (5, 5), (2, 2)])
    passes = Passes(3, 14, lambda count: max(count(), 3), packed=True)
    parts = list(passes.of(rollout, "cpu"))
    assert [int(part.attention_mask.sum()) for part in parts] == [6, 10, 4] and all(part.packed for part in parts)
    assert sum(part.num_rows for part in parts) == rollout.num_rows
    assert [len(part) for part in Passes(3, packed=True).of(rollout, "cpu")] == [3, 1]
