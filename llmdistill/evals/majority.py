"""Majority votes among k of one problem's n samples: the vote, its exact expectation, and sampled subsets.

Labels are the samples' answer classes, -1 for no answer, in the order of the samples; ``right`` their verdicts.
``llmdistill.evals.metrics.maj_at_k`` is the door.
"""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from math import comb

import numpy as np


def vote(labels: np.ndarray, right: np.ndarray, first: bool) -> float:
    """Worth of the most frequent class of all samples [n]; ties by first appearance, or the mean over the tied."""
    classes, start, member, size = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    worth = np.bincount(member, right) / size
    size = np.where(classes < 0, 0, size)
    if size.max() == 0:
        return 0.0
    tied = np.flatnonzero(size == size.max())
    return float(worth[tied[np.argmin(start[tied])]]) if first else float(worth[tied].mean())


def expected_over_subsets(labels: np.ndarray, right: np.ndarray, k: int) -> float:
    """Expectation of :func:`vote`, ties by lot, over all subsets of k of the n samples, without listing them.

    A class of s members wins with a votes in ``C(s, a) * sum_t W(a, t) / (t + 1)`` subsets, where W(a, t) counts the
    ways to take the other k - a samples so that t other classes also have a votes and none has more. W is a
    coefficient of a product of polynomials, one per other class, ``sum_{b<a} C(s_i, b) x^b + y C(s_i, a) x^a``, and
    ``sum_t W_t / (t + 1)`` is its integral over y in [0, 1]: Gauss-Legendre nodes give it exactly, W being a
    polynomial in y. All terms are positive, so nothing cancels.
    """
    classes, member, size = np.unique(labels, return_inverse=True, return_counts=True)
    worth = np.bincount(member, right) / size
    silent = int(size[classes < 0].sum())
    size, worth = size[classes >= 0], worth[classes >= 0]
    how_many = Counter(size.tolist())
    total = 0.0
    for s in how_many:
        gain = float(worth[size == s].sum())  # classes of one size win equally often
        if gain == 0:
            continue
        others = how_many - Counter([s])
        for a in range(1, min(s, k) + 1):
            nodes, weights = np.polynomial.legendre.leggauss(k // a // 2 + 1)
            for y, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
                total += gain * comb(s, a) * weight * _ways(others, silent, k - a, a, y)
    return total / comb(len(labels), k)


def _ways(others: Counter[int], silent: int, draws: int, a: int, y: float) -> float:
    """Weighted number of ways to draw from the other classes, at most a of each; ``silent`` samples are free."""
    product = np.array([float(comb(silent, b)) for b in range(min(silent, draws) + 1)])
    for size, many in others.items():
        factor = np.array([comb(size, b) * (y if b == a else 1.0) for b in range(min(size, a, draws) + 1)])
        while many:  # factor ** many by squaring, terms past x^draws dropped
            if many & 1:
                product = np.convolve(product, factor)[: draws + 1]
            factor = np.convolve(factor, factor)[: draws + 1]
            many >>= 1
    return float(product[draws]) if product.size > draws else 0.0


def over_subsets(labels: np.ndarray, right: np.ndarray, k: int, first: bool, draws: int, seed: int) -> float:
    """Mean of :func:`vote` over all subsets of k samples if there are at most ``draws``, else over ``draws`` random."""
    n = len(labels)
    if comb(n, k) <= draws:
        picks = np.array(list(combinations(range(n), k)))
    else:
        rng = np.random.default_rng(seed)
        picks = np.sort(np.argsort(rng.random((draws, n)), axis=1)[:, :k], axis=1)
    return float(np.mean([vote(labels[pick], right[pick], first) for pick in picks]))
