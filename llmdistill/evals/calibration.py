"""How far a model's agreement with itself tells whether it is right.

Confidence here is the share of samples that gave the majority answer; correct says whether that answer is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmdistill.evals.majority import vote


def majority_confidence(classes: Sequence[int | None], correct: Sequence[bool]) -> tuple[float, float]:
    """Share of one problem's n samples in the largest answer class, and whether that answer is right.

    Samples without an answer count in n. Ties go to the class seen first. (0, 0) when no sample has an answer.
    """
    labels = np.array([-1 if label is None else label for label in classes], dtype=np.int64)
    answered = labels[labels >= 0]
    if answered.size == 0:
        return 0.0, 0.0
    return float(np.bincount(answered).max() / labels.size), vote(labels, np.asarray(correct, np.float64), True)


def calibration_bins(confidence: Sequence[float], correct: Sequence[float], bins: int = 10) -> list[dict[str, Any]]:
    """Equal-width bins (low, high] over [0, 1] (the first holds 0 too) with count, mean confidence and accuracy.

    Empty bins are listed with None for the means.

    Raises:
        ValueError: no values, lengths differ, a confidence outside [0, 1], or bins < 1.
    """
    conf, right = _checked(confidence, correct)
    if bins < 1:
        raise ValueError(f"bins is {bins}; it must be at least 1")
    place = np.clip(np.ceil(np.round(conf * bins, 9)).astype(int) - 1, 0, bins - 1)
    rows = []
    for b in range(bins):
        inside = place == b
        some = bool(inside.any())
        rows.append(
            {
                "low": b / bins,
                "high": (b + 1) / bins,
                "count": int(inside.sum()),
                "confidence": float(conf[inside].mean()) if some else None,
                "accuracy": float(right[inside].mean()) if some else None,
            }
        )
    return rows


def expected_calibration_error(confidence: Sequence[float], correct: Sequence[float], bins: int = 10) -> float:
    """Mean over problems of |accuracy - confidence| of the bin they are in (Naeini et al. 2015; Guo et al. 2017,
    arXiv:1706.04599, equation 3). 0 is perfect. It depends on the bins: compare at the same number only.

    Raises:
        ValueError: as :func:`calibration_bins`.
    """
    rows = [row for row in calibration_bins(confidence, correct, bins) if row["count"]]
    return float(sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / len(confidence))


def brier_score(confidence: Sequence[float], correct: Sequence[float]) -> float:
    """Mean squared difference of confidence and outcome (Brier 1950). 0 is perfect, 0.25 what 0.5 always scores.

    Raises:
        ValueError: no values, lengths differ, or a confidence outside [0, 1].
    """
    conf, right = _checked(confidence, correct)
    return float(((conf - right) ** 2).mean())


def _checked(confidence: Sequence[float], correct: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    conf, right = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if conf.size == 0 or conf.shape != right.shape:
        raise ValueError(f"calibration needs equally many values of both, at least one; got {conf.size}, {right.size}")
    if (conf < 0).any() or (conf > 1).any():
        raise ValueError(f"confidence {conf.min():.3g} to {conf.max():.3g}; it must be in [0, 1]")
    return conf, right
