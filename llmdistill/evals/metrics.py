"""Statistics over problems or sequences, with intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bootstrap_ci(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the (weighted) mean, resampling whole items.

    Items are the independent units: problems, or sequences. For a mean per token give each sequence's mean as value
    and its length as weight: tokens of one sequence are not independent, resampling them would narrow the interval.

    Returns:
        Lower and upper bound. Both are the mean itself when there is a single item.

    Raises:
        ValueError: no values, lengths differ, or ``confidence`` outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be in (0, 1)")
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    if x.size == 0 or x.shape != w.shape:
        raise ValueError(f"bootstrap_ci needs equally many values and weights, at least one; got {x.size} and {w.size}")
    picks = np.random.default_rng(seed).integers(0, x.size, (num_resamples, x.size))
    totals = w[picks].sum(1)
    means = np.divide((w * x)[picks].sum(1), totals, out=np.zeros(num_resamples), where=totals > 0)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
