"""Which tokens a block lists: the teacher's likeliest, those the caller chose, or both."""

from __future__ import annotations

import torch
from torch import Tensor

from llmdistill.wire.blocks import Support


def support_of(top_k: int, chosen: Tensor | None) -> Support:
    """As a block's header names it."""
    if chosen is None:
        return "teacher"
    return "union" if top_k else "caller"


def columns(top_k: int, chosen: Tensor | None, vocab_size: int) -> int:
    """K of the blocks: every row of a call has as many."""
    return min(top_k + (chosen.shape[1] if chosen is not None else 0), vocab_size)


def listed(logprobs_nV: Tensor, top_k: int, chosen_nC: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ids [n, K] int32 and log-probs [n, K], descending, of rows of full log-softmaxes."""
    top_lp, top_ids = logprobs_nV.topk(top_k, dim=-1)
    if chosen_nC is None:
        return top_ids.int(), top_lp
    chosen_nC = chosen_nC.to(logprobs_nV.device).long()
    chosen_lp = logprobs_nV.gather(1, chosen_nC.clamp(min=0))
    return merged(top_ids, top_lp, chosen_nC, chosen_lp, logprobs_nV.shape[1])


def merged(
    top_ids_nK: Tensor, top_lp_nK: Tensor, chosen_nC: Tensor, chosen_lp_nC: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """The two lists as one, descending, no id twice; what is left over is id -1 at -inf, at the end."""
    ids = torch.cat([top_ids_nK.long(), chosen_nC.long()], 1)
    lp = torch.cat([top_lp_nK, chosen_lp_nC], 1)
    in_order, order = ids.sort(dim=1, stable=True)
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = in_order[:, 1:] == in_order[:, :-1]
    drop = torch.zeros_like(again).scatter_(1, order, again) | (ids < 0)
    lp = lp.masked_fill(drop, -torch.inf)
    # an id of probability 0 is listed too: it comes before the padding
    rank = torch.where(drop, -torch.inf, lp.clamp(min=torch.finfo(lp.dtype).min))
    best = rank.argsort(dim=1, descending=True, stable=True)[:, : min(ids.shape[1], vocab_size)]
    return ids.masked_fill(drop, -1).gather(1, best).int(), lp.gather(1, best)
