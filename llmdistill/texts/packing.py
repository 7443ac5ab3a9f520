"""Packed views: sequences stand one behind another, each with positions from 0, and next to nothing is padding.

By the positions that begin again transformers tells them apart where it is given no mask.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from llmdistill.errors import UserError
from llmdistill.texts.views import View

# All in one row, which variable-length attention takes apart: that of kernels (flash attention) by arguments of the
# model's forward, that of compat/attention.py without. Or in rows as long as the longest sequence, in each the first
# that has room for it: masks are [rows, T, T] then, and not of all sequences together.
Layout = Literal["kernel", "row", "rows"]


def packed(view: View, layout: Layout, *, both_ways: bool = False) -> View:
    """The same rows in the same order, of the same sequences packed.

    Args:
        view: one sequence in each of its rows, padded anywhere.
        layout: of a view with biases, rows.
        both_ways: every token of a sequence reads all of it, where the view's mask says no more than what is padding.

    Raises:
        UserError: the view has images, or what else belongs to a sequence and is not in its tokens.
    """
    if view.extras:
        raise UserError(
            f"objective.packing is true, and the texts have {', '.join(view.extras)} beside their tokens, which cannot "
            "be packed. Fix: --objective.packing false."
        )
    mask = view.attention_mask
    assert mask is not None
    biased = mask.dim() == 4
    layout = "rows" if biased else layout
    # A token is there that sees itself.
    there_BT = (mask.diagonal(dim1=-2, dim2=-1)[:, 0] == 0) if biased else mask.bool()
    lengths = there_BT.sum(1).tolist()
    width = max(lengths) if layout == "rows" else sum(lengths)
    places = _places(lengths, width) if layout == "rows" else [(0, end) for end in accumulate(lengths[:-1], initial=0)]
    count = max(row for row, _ in places) + 1
    # Of every token, sequence by sequence, its place in the packed rows laid end to end.
    starts = [row * width + start for row, start in places]
    to = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)]).to(there_BT.device)

    def moved(values_BT: Tensor, padding_RT: Tensor | None = None) -> Tensor:
        found = values_BT.new_zeros(count * width) if padding_RT is None else padding_RT.flatten().clone()
        found[to] = values_BT[there_BT]
        return found.view(count, width)

    there = moved(there_BT)
    used = there.sum(1, keepdim=True)
    behind = (torch.arange(width, device=used.device) - used).clamp_min(0)  # padding is a sequence of its own
    slots_N = to[view.at[there_BT]]
    order_N = slots_N.argsort().argsort()
    attention, extras = None, {}
    if layout == "rows" and (biased or both_ways):
        attention = _biases(mask if biased else None, there_BT, places, lengths, (count, width))
    elif layout == "kernel":
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=there.device)
        longest = max(lengths)
        extras = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return replace(
        view,
        input_ids=moved(view.input_ids),
        attention_mask=attention,
        position_ids=moved(view.position_ids, behind),
        at=moved(view.at),
        order=order_N if view.order is None else order_N[view.order],
        extras=extras,
        there=there,
        lengths=lengths if layout == "row" else None,
    )


def _places(lengths: list[int], width: int) -> list[tuple[int, int]]:
    """(row, start in it) of every sequence: the longest first, each in the first row with room."""
    used, places = list[int](), dict[int, tuple[int, int]]()
    for b in sorted(range(len(lengths)), key=lambda b: (-lengths[b], b)):
        row = next((r for r, taken in enumerate(used) if taken + lengths[b] <= width), len(used))
        if row == len(used):
            used.append(0)
        places[b] = row, used[row]
        used[row] += lengths[b]
    return [places[b] for b in range(len(lengths))]


def _biases(
    bias_B1TT: Tensor | None,
    there_BT: Tensor,
    places: list[tuple[int, int]],
    lengths: list[int],
    shape: tuple[int, int],
) -> Tensor:
    """What is added to attention's logits, [R, 1, T, T]: of every sequence its own, or nothing; between two, and on
    padding, the lowest finite number."""
    dtype = torch.float32 if bias_B1TT is None else bias_B1TT.dtype
    count, width = shape
    found = torch.full((count, 1, width, width), torch.finfo(dtype).min, dtype=dtype, device=there_BT.device)
    for b, ((row, a), n) in enumerate(zip(places, lengths, strict=True)):
        own = 0.0 if bias_B1TT is None else bias_B1TT[b, 0][there_BT[b]][:, there_BT[b]]
        found[row, 0, a : a + n, a : a + n] = own
    return found
