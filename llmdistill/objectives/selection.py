"""Which tokens count: statistics per row, and selections over all counted rows of a batch.

A selection that ranks rows is of the global batch. On several devices gather the scores [N] first, or, for
`tip_scores`, reduce the `extremes`: ranked per shard or micro-batch, the same batch would select other tokens. Nothing
here carries gradient.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llmdistill.objectives.fused import check_temperature, compute_dtype


@torch.no_grad()
def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """-sum p log p -> [...] in nats, of softmax(logits / temperature) over [..., V]."""
    check_temperature(temperature)
    log_p = (logits.to(compute_dtype(logits)) / temperature).log_softmax(-1)
    p = log_p.exp()
    return -(p * log_p).masked_fill_(p == 0, 0.0).sum(-1)


@torch.no_grad()
def extremes(entropy_N: Tensor, kl_N: Tensor) -> Tensor:
    """Least and largest values -> [2 (low, high), 2 (entropy, KL)]: what `tip_scores` needs of other devices' rows."""
    both_N2 = torch.stack([entropy_N, kl_N], -1)
    return torch.stack([both_N2.amin(0), both_N2.amax(0)])


@torch.no_grad()
def tip_scores(entropy_N: Tensor, kl_N: Tensor, low_high: Tensor | None = None) -> Tensor:
    """h + d - h d -> [N] in [0, 1]: high where the student is unsure or wrong (TIP, arXiv 2604.14084, eq. 5).

    h and d are the student's entropies and KL(S || T) [N], scaled to [0, 1] by their `extremes` over the counted
    tokens of the global batch, which one outlier moves; by default those of these rows. All equal, they count as 0.
    """
    low, high = extremes(entropy_N, kl_N) if low_high is None else low_high
    both_N2 = torch.stack([entropy_N, kl_N], -1)
    span = torch.where(high > low, high - low, 1.0)
    h_N, d_N = ((both_N2 - low) / span).unbind(-1)
    return h_N + d_N - h_N * d_N


@torch.no_grad()
def keep_top(scores_N: Tensor, fraction: float) -> Tensor:
    """The floor(fraction N) rows with the largest scores, at least one -> bool [N]; of equal ones the earlier rows.

    Raises ValueError for a fraction outside (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}; it is the share of tokens that count and must lie in (0, 1]")
    count = max(1, math.floor(fraction * len(scores_N) + 1e-9))  # .29 * 100 is 28.999...
    kept_N = torch.zeros(len(scores_N), dtype=torch.bool, device=scores_N.device)
    kept_N[scores_N.sort(descending=True, stable=True).indices[:count]] = True
    return kept_N


def first_tokens(positions_N: Tensor, count: int) -> Tensor:
    """The first `count` tokens of each completion -> bool [N], from 0-based positions [N] in it (prefix OPD, arXiv
    2602.15260).

    The rest is neither a loss nor a target: a completion cut here has no end-of-sequence to learn.
    """
    return positions_N < count


def not_in(token_ids_N: Tensor, ids: Sequence[int]) -> Tensor:
    """Tokens that are none of `ids`, such as the chat template's -> bool [N]; every occurrence counts."""
    return ~torch.isin(token_ids_N, torch.tensor(list(ids), dtype=token_ids_N.dtype, device=token_ids_N.device))


@torch.no_grad()
def opsa_advantages(
    student_lp_N: Tensor,
    entropy_N: Tensor | None = None,
    *,
    fraction: float = 0.2,
    weakest: float = -0.5,
    strongest: float = -1.0,
) -> Tensor:
    """The control without a teacher: a fixed negative advantage -> [N], 0 on rows not selected (OPSA, arXiv
    2608.31046).

    Selected are the `fraction` of rows with the lowest student log-prob. Their advantage is `weakest`, or, given the
    student's entropies [N], goes from `weakest` to `strongest` with their entropy (`strongest` if all are equal). Loss:
    `policy.policy_gradient` with it, summed, over the number of SELECTED rows. A gain that this reaches too says
    nothing about the teacher.
    """
    selected_N = keep_top(-student_lp_N, fraction)
    advantage_N = torch.full_like(student_lp_N, weakest)
    if entropy_N is not None:
        low, high = entropy_N[selected_N].aminmax()
        share_N = (entropy_N - low) / (high - low) if high > low else torch.ones_like(entropy_N)
        advantage_N = weakest + (strongest - weakest) * share_N
    return advantage_N.masked_fill(~selected_N, 0.0)
