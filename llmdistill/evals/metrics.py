"""Metrics of repeated samples, and their uncertainty.

Two shapes recur: per-problem counts (n samples, c right) and per-problem scores (the mean of a problem's verdicts).
Problems are the independent units everywhere: samples of one problem are correlated, so intervals, errors and tests
resample or flip whole problems. Nothing here draws from numpy's global random state; the same arguments give the same
numbers. What belongs to single samples (truncation, repetition) is in ``health``, the calibration in ``calibration``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, comb
from typing import Any, Literal, overload

import numpy as np

from llmdistill.evals.majority import expected_over_subsets, over_subsets, vote
from llmdistill.record.intervals import (
    PairedDifference,
    bootstrap_ci,
    differences,
    paired_bootstrap,
    paired_permutation,
    share_interval,
    wilson_interval,
)

__all__ = [
    "McNemar",
    "PairedDifference",
    "avg_at_n",
    "bootstrap_ci",
    "clustered_error",
    "distinct_at_k",
    "g_pass_at_k",
    "maj_at_k",
    "mcnemar_exact",
    "mean_g_pass_at_k",
    "paired_bootstrap",
    "paired_permutation",
    "pass_at_k",
    "seed_sd",
    "share_interval",
    "wilson_interval",
]

Ties = Literal["expected", "first"]

_EXACT_N = 256  # beyond it the binomials of the exact maj@k come near the end of float64


@overload
def pass_at_k(n: int, c: int, k: int) -> float: ...
@overload
def pass_at_k(n: Any, c: Any, k: int) -> Any: ...
def pass_at_k(n: Any, c: Any, k: int) -> Any:
    """Chance that at least one of k samples, drawn without replacement from n of which c are right, is right.

    The unbiased estimator ``1 - C(n-c, k) / C(n, k)`` of Chen et al. 2021 (arXiv:2107.03374), as a product so that
    nothing overflows.

    Args:
        n: samples per problem, a number or an array [P].
        c: right ones among them, broadcast against n.
        k: draws.

    Returns:
        A float for numbers, float64 [P] for arrays. The benchmark's pass@k is the mean over problems.

    Raises:
        ValueError: k < 1, n < k, or c outside [0, n].
    """
    if k < 1:
        raise ValueError(f"pass@k needs k >= 1; k is {k}")
    n_P, c_P = np.broadcast_arrays(np.asarray(n, dtype=np.int64), np.asarray(c, dtype=np.int64))
    if (n_P < k).any():
        raise ValueError(
            f"pass@{k} needs at least {k} samples of every problem; {int((n_P < k).sum())} of {n_P.size} have fewer, "
            f"the least {int(n_P.min())}. Ask for k <= {int(n_P.min())}, or sample more."
        )
    if ((c_P < 0) | (c_P > n_P)).any():
        where = int(np.flatnonzero(((c_P < 0) | (c_P > n_P)).ravel())[0])
        raise ValueError(f"{c_P.flat[where]} right of n = {n_P.flat[where]} samples; c must be in [0, n]")
    all_wrong = np.ones(n_P.shape)
    for drawn in range(k):
        all_wrong = all_wrong * (np.maximum(n_P - c_P - drawn, 0) / (n_P - drawn))
    return float(1 - all_wrong) if all_wrong.ndim == 0 else 1 - all_wrong


def distinct_at_k(classes: Sequence[int | None], k: int) -> float:
    """Different answers among k of ONE problem's n samples, in expectation over all subsets of k (pass@k of each class,
    summed): how much of the answers' variety so many samples show.

    Args:
        classes: [n] number of the sample's answer class, None for no answer, which is none.

    Raises:
        ValueError: as :func:`pass_at_k`.
    """
    n, labels = len(classes), [label for label in classes if label is not None]
    pass_at_k(n, 0, k)  # for its checks
    counts = np.unique(np.array(labels, dtype=np.int64), return_counts=True)[1]
    return float(np.sum(pass_at_k(np.full(len(counts), n), counts, k))) if labels else 0.0


def avg_at_n(scores: Sequence[Sequence[float]]) -> float:
    """Mean over problems of the mean of each one's verdicts ("pass@1 over n samples").

    Raises:
        ValueError: no problems, or problems with different numbers of samples.
    """
    return float(_rectangle(scores, "avg@n").mean())


def maj_at_k(
    classes: Sequence[int | None],
    correct: Sequence[bool],
    k: int | None = None,
    *,
    ties: Ties = "expected",
    draws: int = 1000,
    seed: int = 0,
) -> float:
    """Chance that the most frequent answer among k of ONE problem's n samples is right (self-consistency,
    Wang et al. 2022, arXiv:2203.11171).

    Answers are compared by equivalence class, not by string. A sample without an answer takes its place among the k
    but cannot win; k samples without any answer count 0. Where grading and classes disagree (a class with right and
    wrong members) the class is worth its share of right ones.

    Args:
        classes: [n] number of the sample's answer class, None for no answer.
        correct: [n] verdicts, in the same order.
        k: size of the vote; n when None.
        ties: "expected": the mean over the tied classes, as if the winner were drawn by lot. "first": the class that
            was seen first among the k wins, the convention of most harnesses. With k = n "first" depends on the order
            of the samples; its expectation over orders is "expected".
        draws: number of subsets where they are sampled, see Returns.
        seed: of that sampling.

    Returns:
        k = n: the vote itself. k < n: the expectation over all subsets of k samples. It is exact for ties="expected"
        up to n = 256, and wherever there are no more than ``draws`` subsets; elsewhere the mean of ``draws`` random
        subsets, in which samples keep their order.

    Raises:
        ValueError: lengths differ, no samples, k outside [1, n], or an unknown tie rule.
    """
    n = len(classes)
    k = n if k is None else k
    if n == 0 or n != len(correct):
        raise ValueError(f"maj@k needs equally many classes and verdicts, at least one; got {n} and {len(correct)}")
    if not 1 <= k <= n:
        raise ValueError(f"maj@{k} needs at least {k} samples and k >= 1; there are {n}. Ask for k <= {n}.")
    if ties not in ("expected", "first"):
        raise ValueError(f"ties is {ties!r}; it must be 'expected' or 'first'")
    labels = np.array([-1 if label is None else label for label in classes], dtype=np.int64)
    if any(label is not None and label < 0 for label in classes):
        raise ValueError(f"class {int(labels.min())}: classes are numbered from 0, None stands for no answer")
    right = np.asarray(correct, dtype=np.float64)
    if k == n:
        return vote(labels, right, ties == "first")
    if ties == "expected" and n <= _EXACT_N:
        return expected_over_subsets(labels, right, k)
    return over_subsets(labels, right, k, ties == "first", draws, seed)


def g_pass_at_k(n: int, c: int, k: int, tau: float) -> float:
    """Chance that at least ceil(tau k) of k samples, drawn without replacement from n of which c are right, are right.

    G-Pass@k of Liu et al. 2024 (arXiv:2412.13147). tau = 1: all k; tau -> 0: pass@k, and tau = 0 is taken
    as that limit.

    Raises:
        ValueError: n < k, k < 1, c outside [0, n], or tau outside [0, 1].
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"tau is {tau}; it must be in [0, 1]")
    pass_at_k(n, c, k)  # for its checks
    least = max(1, ceil(round(tau * k, 9)))  # 0.7 * 10 is 7.000000000000001
    return sum(comb(c, j) * comb(n - c, k - j) for j in range(least, min(c, k) + 1)) / comb(n, k)


def mean_g_pass_at_k(n: int, c: int, k: int) -> float:
    """mG-Pass@k: twice the area under G-Pass@k over tau in [0.5, 1], ``2/k sum_{i=ceil(k/2)+1..k} G-Pass@k_{i/k}``
    (Liu et al. 2024, arXiv:2412.13147). 1 when every sample is right and k is even.

    Raises:
        ValueError: as :func:`g_pass_at_k`.
    """
    pass_at_k(n, c, k)
    return 2 / k * sum(g_pass_at_k(n, c, k, i / k) for i in range(ceil(k / 2) + 1, k + 1))


def clustered_error(scores: Sequence[Sequence[float]]) -> float:
    """Standard error of avg@n with samples clustered by problem: sd over problems of the per-problem mean / sqrt(P).

    Right for repeated samples, where sd over all verdicts / sqrt(P n) is too small (Miller 2024, arXiv:2411.00640).
    It holds both parts of the variance: the choice of problems and the luck of the samples.

    Args:
        scores: [P][n] verdicts.

    Returns:
        The error; nan for a single problem, which says nothing about others.

    Raises:
        ValueError: no problems, or different numbers of samples.
    """
    means_P = _rectangle(scores, "clustered_error").mean(1)
    return float(means_P.std(ddof=1) / means_P.size**0.5) if means_P.size > 1 else float("nan")


def seed_sd(scores: Sequence[Sequence[float]]) -> float:
    """Standard deviation of the benchmark's mean over repetitions; column i of scores [P][n] is the i-th repetition.

    What a second evaluation of the same model may differ by, problems held fixed. Nan for n = 1.

    Raises:
        ValueError: no problems, or different numbers of samples.
    """
    runs_n = _rectangle(scores, "seed_sd").mean(0)
    return float(runs_n.std(ddof=1)) if runs_n.size > 1 else float("nan")


@dataclass(frozen=True)
class McNemar:
    """Problems that only one of two models solves, and the two-sided p-value of "both are as likely to be the one"."""

    only_a: int
    only_b: int
    p_value: float


def mcnemar_exact(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """McNemar's exact test for one verdict per problem and model: a binomial test on the problems only one solves.

    Raises:
        ValueError: no verdicts, lengths differ, or values other than 0 and 1.
    """
    d = differences(a, b)
    values = set(np.unique(np.asarray(a, dtype=np.float64))) | set(np.unique(np.asarray(b, dtype=np.float64)))
    if not values <= {0.0, 1.0}:
        raise ValueError(
            f"mcnemar_exact needs one verdict per problem, 0 or 1; found {sorted(values - {0.0, 1.0})[0]:.3g}. "
            "For means over several samples use paired_permutation."
        )
    only_a, only_b = int((d > 0).sum()), int((d < 0).sum())
    m = only_a + only_b
    tail = sum(comb(m, i) for i in range(min(only_a, only_b) + 1))
    return McNemar(only_a, only_b, min(1.0, 2 * tail / 2**m))


def _rectangle(scores: Sequence[Sequence[float]], what: str) -> np.ndarray:
    counts = sorted({len(row) for row in scores})
    if len(counts) != 1 or counts[0] == 0:
        found = "no problems" if not counts else f"problems with {counts[0]} to {counts[-1]} samples"
        raise ValueError(f"{what} needs the same number of samples, at least one, of every problem; got {found}")
    return np.asarray(scores, dtype=np.float64)
