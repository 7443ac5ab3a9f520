"""From clean ids to masked ones. Every draw is an argument ``u``, uniform on [0, 1), so that every draw can be tested.

B sequences, L tokens; ``maskable`` [B, L] bool says which tokens may ever be masked: never a prompt's, never padding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llmdistill.errors import UserError


def check_maskable(maskable: Tensor) -> None:
    """Raises:
    UserError: a sequence has no token that may be masked: it would train nothing, and its bound is a sum over none.
    """
    empty = (~maskable.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise UserError(
            f"sequence {empty[0]} of the batch has no maskable token ({len(empty)} such sequences); it trains nothing. "
            "Fix: leave out rows with an empty completion."
        )


def corrupt(ids: Tensor, maskable: Tensor, keep: Tensor, mask_id: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """Masks every maskable token with probability 1 - keep.

    Args:
        ids: [B, L]. keep: alpha at the token's time, [B, 1] or [B, L] (one time per block). u: [B, L].

    Returns:
        ids with ``mask_id`` [B, L], and where it stands now because of this call [B, L] bool.
    """
    masked = (u < 1 - keep) & maskable
    return ids.masked_fill(masked, mask_id), masked


def couple(
    ids: Tensor, maskable: Tensor, keep_t: Tensor, keep_s: Tensor, mask_id: int, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same sequence at t and at an earlier s, with one uniform number per token: the masks are nested.

    This is the deterministic trajectory of MCD (arXiv 2602.00792): equal in law to :func:`gaussian_latent` and to
    taking x_s from x_t by the ordinary posterior.

    Returns:
        x_t, x_s [B, L], and where each is masked [B, L] bool.
    """
    x_t, masked_t = corrupt(ids, maskable, keep_t, mask_id, u)
    x_s, masked_s = corrupt(ids, maskable, keep_s, mask_id, u)
    return x_t, x_s, masked_t, masked_s


def gaussian_latent(noise: Tensor, ids: Tensor) -> Tensor:
    """Y [...], the signal-to-noise ratio a/s at which argmax(a onehot(ids) + s noise) becomes the token.

    ``noise`` [..., K] is standard normal and stays with its token along the trajectory, so a token unmasks once.
    """
    own = noise.gather(-1, ids.unsqueeze(-1))
    others = noise.scatter(-1, ids.unsqueeze(-1), -torch.inf)
    return others.max(-1).values - own.squeeze(-1)


def keep_of_ratio(ratio: Tensor, vocab_size: int, nodes: int = 4001) -> Tensor:
    """F_Y(ratio) = E_e[Phi(e + ratio)^(K-1)], e standard normal: the share of tokens whose latent shows them at a/s.

    By the trapezoid rule on [-12, 12]; F_Y(0) = 1/K, so a Gaussian grid reaches alpha = 0 only at minus infinity.
    """
    e = torch.linspace(-12, 12, nodes, dtype=torch.float64)
    density = torch.exp(-e * e / 2) / math.sqrt(2 * math.pi)
    power = (torch.special.log_ndtr(e + ratio.double().unsqueeze(-1)) * (vocab_size - 1)).exp()
    return torch.trapezoid(density * power, e, dim=-1)


def count_masks(maskable: Tensor, counts: Tensor, u: Tensor) -> Tensor:
    """Masks exactly ``counts`` [B] maskable tokens of every sequence, uniformly among subsets of that size: those with
    the smallest ``u`` [B, L]. Returns [B, L] bool."""
    order = u.masked_fill(~maskable, torch.inf).argsort(-1).argsort(-1)
    return (order < counts.unsqueeze(-1)) & maskable


def times_of_blocks(times: Tensor, length: int, block_size: int) -> Tensor:
    """One time per block [B, ceil(L / block)] -> one per token [B, L]."""
    return times.repeat_interleave(block_size, -1)[..., :length]
