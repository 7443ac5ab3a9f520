"""Intervals and tests over independent units (problems, prompts, sequences): bootstrap and sign flips.

Nothing here draws from numpy's global random state; the same arguments give the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist, stdev

import numpy as np

_CHUNK = 4_000_000  # random numbers held at a time by the resampling loops: 32 MB
_EXACT_FLIPS = 16  # 65,536 sign patterns are enumerated; more are sampled


# 97.5 % quantiles of Student's t by degrees of freedom, 1 to 9.
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = len(T_QUANTILE) + 1


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over problems, its percentile interval, and the two-sided p-value of "no difference"."""

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap_ci(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the (weighted) mean, resampling whole items (Efron 1979).

    Items are the independent units: problems, or sequences. For a mean per token give each sequence's mean as value
    and its length as weight: tokens of one sequence are not independent, resampling them would narrow the interval.

    Returns:
        Lower and upper bound. Both are the mean itself when there is a single item.

    Raises:
        ValueError: no values, lengths differ, or ``confidence`` outside (0, 1).
    """
    check_confidence(confidence)
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    if x.size == 0 or x.shape != w.shape:
        raise ValueError(f"bootstrap_ci needs equally many values and weights, at least one; got {x.size} and {w.size}")
    means = np.concatenate(
        [
            np.divide((w * x)[picks].sum(1), total := w[picks].sum(1), out=np.zeros(len(picks)), where=total > 0)
            for picks in _resamples(x.size, num_resamples, seed)
        ]
    )
    return _percentiles(means, confidence)


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    *,
    confidence: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> PairedDifference:
    """Difference of two models on the same problems, resampling problems.

    The interval is the percentile interval of the mean difference. The p-value resamples the differences after moving
    their mean to 0 (the null hypothesis), widened by sqrt(P / (P - 1)) because resampling P values underestimates
    their variance by that factor, and counts means at least as far from 0 as the one observed, the observed one
    included, so that it is never 0. Below about 30 problems use :func:`paired_permutation`, whose level is exact.

    Args:
        a, b: [P] per-problem scores in the same order of problems.

    Raises:
        ValueError: no values, lengths differ, or ``confidence`` outside (0, 1).
    """
    check_confidence(confidence)
    d = differences(a, b)
    observed = float(d.mean())
    null = (d - observed) * (d.size / max(d.size - 1, 1)) ** 0.5
    means, extreme = [], 0
    for picks in _resamples(d.size, num_resamples, seed):
        means.append(d[picks].mean(1))
        extreme += int((np.abs(null[picks].mean(1)) >= abs(observed) - 1e-12).sum())
    low, high = _percentiles(np.concatenate(means), confidence)
    p_value = (1 + extreme) / (1 + num_resamples) if d.size > 1 else 1.0
    return PairedDifference(observed, low, high, p_value)


def paired_permutation(a: Sequence[float], b: Sequence[float], *, num_flips: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of the sign-flip test: under "no difference" each problem's a - b is as likely as b - a.

    Never rejects more often than its level says, at any number of problems (Fisher 1935; Phipson and Smyth 2010,
    arXiv:1603.05766, for counting the observed pattern among the sampled ones). Exact by enumeration up to 16 problems
    that differ; problems on which a and b agree carry no evidence.

    Raises:
        ValueError: no values, or lengths differ.
    """
    d = differences(a, b)
    d = d[d != 0]
    if d.size == 0:
        return 1.0
    reach = abs(float(d.sum())) - 1e-9
    if d.size <= _EXACT_FLIPS:
        signs = 1.0 - 2.0 * ((np.arange(2**d.size)[:, None] >> np.arange(d.size)) & 1)
        return float((np.abs(signs @ d) >= reach).mean())
    rng = np.random.default_rng(seed)
    extreme = 0
    for size in _chunks(num_flips, d.size):
        signs = 1.0 - 2.0 * rng.integers(0, 2, (size, d.size), dtype=np.int8)
        extreme += int((np.abs(signs @ d) >= reach).sum())
    return (1 + extreme) / (1 + num_flips)


def share_interval(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Interval of the mean of shares in [0, 1], items resampled; Wilson's where all items are alike.

    Resampling equal values gives them again: 0 of 8 would be "0.0 to 0.0", as if nothing could be learnt of a ninth.
    Wilson's interval for as many items says what that many can tell (0 of 8: up to 0.32).

    Args:
        values: [P] the share of each item, an item being what is independent of others (a problem, a pair).

    Raises:
        ValueError: no values, one outside [0, 1], or ``confidence`` outside (0, 1).
    """
    if not len(values) or not all(-1e-9 <= value <= 1 + 1e-9 for value in values):  # rounding
        raise ValueError(f"share_interval needs values in [0, 1], at least one; got {len(values)}: {list(values)[:3]}")
    if max(values) - min(values) > 1e-9:
        return bootstrap_ci(values, confidence=confidence, seed=seed)
    return wilson_interval(min(max(values[0], 0.0), 1.0) * len(values), len(values), confidence)


def t_half_width(values: Sequence[float]) -> float:
    """Half the width of Student's 95 % interval of the mean of a few seeds: t(n-1) s/√n.

    Raises:
        ValueError: fewer than two values, or more than ten.
    """
    n = len(values)
    if not 2 <= n <= MOST_SEEDS:
        raise ValueError(f"{n} values; an interval is of 2 to {MOST_SEEDS}")
    return T_QUANTILE[n - 2] * stdev(values) / math.sqrt(n)


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927): right near 0 and 1 and for small n, where p +- 1.96 se is not.

    For one verdict per item. Repeated verdicts of one item are not independent: use :func:`share_interval`.

    Raises:
        ValueError: n < 1, successes outside [0, n], or ``confidence`` outside (0, 1).
    """
    check_confidence(confidence)
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"wilson_interval needs 0 <= successes <= n and n >= 1; got {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    # The bounds are exactly 0 and 1 there; rounding must not say otherwise.
    return middle - half if successes > 0 else 0.0, middle + half if successes < n else 1.0


def differences(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.size == 0 or x.shape != y.shape:
        raise ValueError(f"a paired test needs one value of both for every problem; got {x.size} and {y.size}")
    return x - y


def check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be in (0, 1)")


def _chunks(total: int, width: int) -> Iterator[int]:
    step = max(1, _CHUNK // width)
    for start in range(0, total, step):
        yield min(step, total - start)


def _resamples(size: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """``count`` resamples of ``size`` items, [chunk, size] at a time; what is drawn does not depend on the chunks."""
    rng = np.random.default_rng(seed)
    for chunk in _chunks(count, size):
        yield rng.integers(0, size, (chunk, size))


def _percentiles(means: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
