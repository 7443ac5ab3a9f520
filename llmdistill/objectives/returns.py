"""What a token is to blame for later: discounted sums of the divergences behind it, and a baseline for them.

Rows are N tokens, sequence by sequence. Nothing here carries gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@torch.no_grad()
def discounted_future(costs_N: Tensor, counts: Sequence[int], discount: float) -> Tensor:
    """sum over k > t of discount^(k - t) costs_k in the same sequence -> [N].

    Args:
        costs_N: of every token, such as KL(S || T) at its place.
        counts: tokens of each sequence.
    """
    if not counts:
        return costs_N
    rows_BT = pad_sequence([*costs_N.split(list(counts))], batch_first=True)  # [B, T], 0 behind the end
    future_BT, after_B = torch.zeros_like(rows_BT), rows_BT.new_zeros(len(rows_BT))
    for t in reversed(range(rows_BT.shape[1])):
        future_BT[:, t] = after_B
        after_B = discount * (rows_BT[:, t] + after_B)
    return torch.cat([row[:n] for row, n in zip(future_BT, counts, strict=True)])


@torch.no_grad()
def less_others_mean(values_N: Tensor, counts: Sequence[int]) -> Tensor:
    """Each value less the mean of those at the same place of the *other* sequences, where there are any -> [N].

    A baseline may not depend on the token it is for: so its own sequence is left out.
    """
    if not counts:
        return values_N
    places_N = torch.cat([torch.arange(n, device=values_N.device) for n in counts])
    width = max(counts)
    sums_T = values_N.new_zeros(width).index_add_(0, places_N, values_N)
    sequences_T = values_N.new_zeros(width).index_add_(0, places_N, torch.ones_like(values_N))
    others_N = sequences_T[places_N] - 1
    means_N = (sums_T[places_N] - values_N) / others_N.clamp(min=1)
    return values_N - means_N
