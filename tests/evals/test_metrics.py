"""Metrics against enumeration of all subsets, published figures, and the distributions their errors promise."""

from __future__ import annotations

import json
import os
import random
from collections import defaultdict
from collections.abc import Callable
from itertools import combinations
from math import isnan
from pathlib import Path

import numpy as np
import pytest

from llmdistill.evals.calibration import (
    brier_score,
    calibration_bins,
    expected_calibration_error,
    majority_confidence,
)
from llmdistill.evals.health import examine, repetition
from llmdistill.evals.metrics import (
    avg_at_n,
    bootstrap_ci,
    clustered_error,
    distinct_at_k,
    g_pass_at_k,
    maj_at_k,
    mcnemar_exact,
    mean_g_pass_at_k,
    paired_bootstrap,
    paired_permutation,
    pass_at_k,
    seed_sd,
    share_interval,
    wilson_interval,
)

DATA = Path(os.environ.get("LLMDISTILL_DATA") or Path(__file__).parents[3] / "shared" / "data")
MAJ8 = DATA / "traces" / "qwen25math_maj8_sample.jsonl"


def all_subsets(verdicts: list[bool], k: int, worth: Callable[[list[bool]], float]) -> float:
    return float(np.mean([worth([verdicts[i] for i in pick]) for pick in combinations(range(len(verdicts)), k)]))


@pytest.mark.parametrize("n", range(1, 9))
def test_pass_and_g_pass_are_the_mean_over_all_subsets(n: int) -> None:
    for c in range(n + 1):
        verdicts = [i < c for i in range(n)]
        for k in range(1, n + 1):
            assert pass_at_k(n, c, k) == pytest.approx(all_subsets(verdicts, k, any), abs=1e-12)
            for tau in (0.0, 0.25, 0.5, 0.7, 1.0):
                expected = all_subsets(verdicts, k, lambda v, tau=tau, k=k: sum(v) >= max(tau * k - 1e-9, 1))
                assert g_pass_at_k(n, c, k, tau) == pytest.approx(expected, abs=1e-12)


def test_mean_g_pass_is_twice_the_area_over_the_upper_half_of_tau() -> None:
    for n, c, k in [(8, 5, 4), (16, 11, 8), (48, 30, 16)]:
        taus = 0.5 + (np.arange(4000) + 0.5) / 8000
        area = 2 * 0.5 * np.mean([g_pass_at_k(n, c, k, float(t)) for t in taus])
        assert mean_g_pass_at_k(n, c, k) == pytest.approx(area, abs=1e-3)
    assert mean_g_pass_at_k(16, 16, 8) == 1


def test_distinct_at_k_is_the_mean_over_all_subsets() -> None:
    """Six samples, three answers and one without: all subsets of k counted."""
    classes = [0, 0, 0, 1, 2, None]
    for k in range(1, 7):
        subsets = list(combinations(classes, k))
        expected = sum(len({c for c in s if c is not None}) for s in subsets) / len(subsets)
        assert distinct_at_k(classes, k) == pytest.approx(expected)
    assert distinct_at_k([None, None], 2) == 0
    with pytest.raises(ValueError, match="needs at least 7"):
        distinct_at_k(classes, 7)


def test_pass_at_k_takes_arrays_and_refuses_fewer_samples_than_draws() -> None:
    assert pass_at_k([4, 8], [1, 0], 2).tolist() == pytest.approx([0.5, 0.0])
    with pytest.raises(ValueError, match="pass@8 needs at least 8 samples.* 1 of 2 have fewer, the least 4"):
        pass_at_k([16, 4], [1, 1], 8)
    with pytest.raises(ValueError, match="5 right of n = 4"):
        pass_at_k(4, 5, 1)


def plain_vote(classes: list[int | None], correct: list[bool], first: bool) -> float:
    """The definition, written out."""
    seen: dict[int, list[bool]] = {}
    for label, ok in zip(classes, correct, strict=True):
        if label is not None:
            seen.setdefault(label, []).append(ok)
    if not seen:
        return 0.0
    top = max(map(len, seen.values()))
    tied = [v for v in seen.values() if len(v) == top]  # dicts keep the order of first appearance
    return float(tied[0][0]) if first else float(np.mean([v[0] for v in tied]))


@pytest.mark.parametrize("n", range(1, 9))
def test_maj_at_k_is_the_mean_vote_over_all_subsets(n: int) -> None:
    rng = random.Random(n)
    for _ in range(12):
        classes = [rng.choice([None, 0, 1, 2, 3][: rng.randint(2, 5)]) for _ in range(n)]
        winners = {i for i in range(4) if rng.random() < 0.4}  # classes that are right
        correct = [label in winners for label in classes]
        for k in range(1, n + 1):
            for first in (False, True):
                votes = [
                    plain_vote([classes[i] for i in pick], [correct[i] for i in pick], first)
                    for pick in combinations(range(n), k)
                ]
                got = maj_at_k(classes, correct, k, ties="first" if first else "expected")
                assert got == pytest.approx(float(np.mean(votes)), abs=1e-12)


def test_maj_at_k_sampled_subsets_are_deterministic_and_near_the_exact_value() -> None:
    """Samples in random order: ties by first appearance then have the expectation of ties by lot."""
    rng = random.Random(3)
    classes = [rng.choice([None, 0, 0, 1, 1, 2]) for _ in range(48)]
    correct = [label == 0 for label in classes]
    exact = maj_at_k(classes, correct, 8)
    sampled = [maj_at_k(classes, correct, 8, ties="first", draws=4000, seed=s) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    # Binomial error of 4,000 draws: 0.008; ties by order shift it by less than the rest of the bound.
    assert abs(sampled[0] - exact) < 0.06


def test_samples_without_answer_cannot_win_but_take_a_place() -> None:
    assert maj_at_k([None, None, 0], [False, False, True]) == 1
    assert maj_at_k([None, None], [False, False]) == 0
    assert maj_at_k([None, None, 0], [False, False, True], 1) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0], [True], 2), "maj@2 needs at least 2 samples"),
        (([0, 1], [True]), "2 and 1"),
        (([-1], [True]), "numbered from 0"),
    ],
)
def test_maj_at_k_says_what_is_wrong(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        maj_at_k(*arguments)


@pytest.mark.skipif(not MAJ8.is_file(), reason=f"{MAJ8} is not there")
def test_known_values_of_a_published_example() -> None:
    """100 problems x 8 samples of Qwen2.5-Math-7B-Instruct; the figures were computed by other code."""
    groups = defaultdict(list)
    for line in MAJ8.read_text().splitlines():
        row = json.loads(line)
        groups[row["group"]].append(row)
    scores = [[float(r["correct"]) for r in rows] for rows in groups.values()]
    right = [int(sum(s)) for s in scores]
    assert len(groups) == 100
    assert avg_at_n(scores) == pytest.approx(0.91125)
    for k, value in ((1, 0.91125), (2, 0.93536), (4, 0.956), (8, 0.970)):
        assert pass_at_k([8] * 100, right, k).mean() == pytest.approx(value, abs=5e-6)
    votes = []
    for rows in groups.values():
        number: dict[str, int] = {}
        classes = [number.setdefault(r["extracted"], len(number)) for r in rows]
        votes.append(maj_at_k(classes, [bool(r["correct"]) for r in rows], 8, ties="first"))
    assert np.mean(votes) == pytest.approx(0.930)


def test_where_all_are_alike_the_interval_says_what_that_many_can_tell() -> None:
    """0 of 8 is not "0.0 to 0.0"; where they differ it is the bootstrap's."""
    assert share_interval([0.0] * 8) == wilson_interval(0, 8) == (0.0, pytest.approx(0.3244, abs=1e-4))
    assert share_interval([1.0] * 8) == wilson_interval(8, 8) and share_interval([1.0] * 8)[0] < 0.68
    low, high = share_interval([0.25] * 4)  # a quarter of every problem's samples
    assert low < 0.05 < 0.25 < 0.6 < high
    mixed = [0.0, 1.0, 0.5, 0.5]
    assert share_interval(mixed, seed=3) == bootstrap_ci(mixed, seed=3)
    for bad in ([], [1.5]):
        with pytest.raises(ValueError, match="share_interval needs"):
            share_interval(bad)


def test_wilson_interval_matches_published_ones() -> None:
    for share, n, low, high in ((83.9, 500, 80.4, 86.9), (28.9, 30, 15.8, 46.8), (85, 1319, 83.0, 86.8)):
        assert wilson_interval(share / 100 * n, n) == pytest.approx((low / 100, high / 100), abs=6e-4)
    assert wilson_interval(0, 10)[0] == 0
    assert wilson_interval(10, 10)[1] == 1


def test_bootstrap_interval_covers_the_true_mean() -> None:
    """300 benchmarks of 60 problems with Beta(2, 1) means and 4 samples: coverage of the nominal 95%.

    Percentile intervals of 60 items cover about 94%; fewer than 265 of 300 has a probability below 1e-3 then.
    """
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        means = rng.binomial(4, rng.beta(2, 1, 60)) / 4
        low, high = bootstrap_ci(means.tolist(), num_resamples=500, seed=trial)
        covered += low <= 2 / 3 <= high
    assert 265 <= covered <= 299


def test_clustered_error_sees_that_samples_of_a_problem_are_alike() -> None:
    scores = [[1.0] * 16] * 5 + [[0.0] * 16] * 5
    assert clustered_error(scores) == pytest.approx((0.25 * 10 / 9 / 10) ** 0.5)
    assert isnan(clustered_error([[1.0, 0.0]]))
    assert seed_sd([[1.0, 0.0], [1.0, 0.0]]) == pytest.approx(0.5**0.5)
    assert isnan(seed_sd([[1.0]]))
    with pytest.raises(ValueError, match="1 to 2 samples"):
        clustered_error([[1.0], [1.0, 0.0]])


@pytest.mark.parametrize("test", ["bootstrap", "permutation", "mcnemar"])
def test_p_values_hold_their_level_where_there_is_no_difference(test: str) -> None:
    """400 pairs of equal models on 40 problems: P(p <= level) must not exceed the level.

    Exact tests: more than 32 of 400 at level 0.05 has probability 0.004, more than 105 at 0.2 has 0.001. The bootstrap
    is approximate (about 0.06 at 0.05 with 40 problems): the same bounds fail with probability 0.05 and 0.02; the
    seed is fixed. That p is not far too large either is asked of the tests with fine-grained scores.
    """
    rng = np.random.default_rng(4)
    p = []
    for trial in range(400):
        chance = rng.beta(1, 1, 40)
        n = 1 if test == "mcnemar" else 8
        a, b = rng.binomial(n, chance) / n, rng.binomial(n, chance) / n
        if test == "bootstrap":
            p.append(paired_bootstrap(a.tolist(), b.tolist(), num_resamples=300, seed=trial).p_value)
        elif test == "permutation":
            p.append(paired_permutation(a.tolist(), b.tolist(), num_flips=300, seed=trial))
        else:
            p.append(mcnemar_exact(a.tolist(), b.tolist()).p_value)
    values = np.array(p)
    assert values.min() > 0
    assert (values <= 0.05).sum() <= 32
    assert (values <= 0.2).sum() <= 105
    if test != "mcnemar":
        assert (values <= 0.5).mean() > 0.4
        assert (values <= 0.2).mean() > 0.12


def test_paired_tests_find_a_difference_that_unpaired_intervals_hide() -> None:
    """Every problem 5 points better, on problems from 0 to 1: the two intervals overlap, the pairs do not doubt."""
    rng = np.random.default_rng(5)
    b = rng.uniform(0, 0.9, 60)
    a = b + 0.05 + rng.normal(0, 0.03, 60)
    assert bootstrap_ci(a.tolist())[0] < bootstrap_ci(b.tolist())[1]
    result = paired_bootstrap(a.tolist(), b.tolist())
    assert 0 < result.low < result.difference < result.high
    assert result.p_value < 1e-3
    assert paired_permutation(a.tolist(), b.tolist()) < 1e-3


def test_permutation_p_value_is_that_of_all_sign_patterns() -> None:
    # d = (3, 2, 1): |sum| >= 6 in 2 of 8 patterns; agreeing problems change nothing.
    assert paired_permutation([3, 2, 1], [0, 0, 0]) == 0.25
    assert paired_permutation([3, 2, 1, 7, 7], [0, 0, 0, 7, 7]) == 0.25
    assert paired_permutation([1, 1], [1, 1]) == 1


def test_mcnemar_counts_and_p_value() -> None:
    # 6 against 1: 2 * (1 + 7) / 2^7
    result = mcnemar_exact([1] * 6 + [0] + [1] * 5, [0] * 6 + [1] + [1] * 5)
    assert (result.only_a, result.only_b, result.p_value) == (6, 1, 0.125)
    assert mcnemar_exact([1, 0], [1, 0]).p_value == 1
    with pytest.raises(ValueError, match="0.5"):
        mcnemar_exact([0.5], [1])


def test_calibration_of_hand_made_cases() -> None:
    # Right half the time at confidence 0.9: off by 0.4; always right at 0.6: off by 0.4.
    confidence, correct = [0.9, 0.9, 0.6, 0.6], [1, 0, 1, 1]
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.4)
    assert brier_score(confidence, correct) == pytest.approx((0.01 + 0.81 + 0.16 + 0.16) / 4)
    bins = calibration_bins([0.0, 0.1, 0.3, 1.0], [0, 0, 0, 1])
    assert [b["count"] for b in bins] == [2, 0, 1, 0, 0, 0, 0, 0, 0, 1]  # edges belong to the bin below
    assert expected_calibration_error([0.25] * 4, [1, 0, 0, 0]) == 0
    assert majority_confidence([0, 1, 1, None], [False, True, True, False]) == (0.5, 1.0)
    assert majority_confidence([None], [False]) == (0.0, 0.0)


def test_health_finds_loops_and_open_thinking_and_nothing_in_ordinary_text() -> None:
    prose = "Let the first number be x, then the second is " + " ".join(f"{i} plus {i * i}" for i in range(150))
    assert repetition(prose) is None
    assert repetition(prose + " Wait, let me check again." * 60) == "words"
    assert repetition("所以答案是三" * 400) == "bytes"
    assert repetition("no " * 10) is None
    assert examine("<think>a</think>b", "stop").unfinished_thinking is False
    assert examine("<think>a", "length").unfinished_thinking is True
    assert examine("a", "stop", thinking=True).unfinished_thinking is True  # the template opened it
    assert examine("a</think>b", "stop", thinking=True).unfinished_thinking is False
    assert examine("a", "length").truncated is True
