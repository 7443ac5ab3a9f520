"""Rows of each domain in the proportions of a mixture, such as those of :mod:`llmdistill.objectives.ddk`."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping


def counts(weights: Mapping[str, float], available: Mapping[str, int], total: int | None = None) -> dict[str, int]:
    """{domain: rows to take} in the proportions of ``weights``, never more than there are.

    Args:
        weights: shares.
        available: rows of each domain.
        total: rows in all; None: as many as the scarcest domain allows at exact proportions. Where a domain has too
            few for its share of ``total``, what it lacks is taken from the others, in their proportions.
    """
    if total is None:
        limits = [available.get(n, 0) / w for n, w in weights.items() if w > 0]
        total = math.floor(min(limits, default=0) + 1e-9)
    taken = dict.fromkeys(weights, 0)
    open_, left = {n: w for n, w in weights.items() if w > 0}, float(total)
    while open_ and left > 0:
        unit = left / sum(open_.values())
        full = [n for n, w in open_.items() if available.get(n, 0) <= w * unit]
        if not full:
            break
        for name in full:
            taken[name] = available.get(name, 0)
            left -= taken[name]
            del open_[name]
    shares = {n: w * left / sum(open_.values()) for n, w in open_.items()} if left > 0 else {}
    for name, share in shares.items():
        taken[name] = math.floor(share)
    rest = sorted(shares, key=lambda n: (taken[n] - shares[n], n))  # the largest remainders first
    for name in rest[: round(left) - sum(taken[n] for n in shares)]:
        taken[name] += 1
    return taken


def draw(rows: Mapping[str, int], taken: Mapping[str, int], seed: int) -> dict[str, list[int]]:
    """{domain: numbers of the rows to take, ascending}: a seeded sample without repetition of each domain."""
    return {n: sorted(random.Random(f"{seed}/{n}").sample(range(rows[n]), k)) for n, k in taken.items()}
