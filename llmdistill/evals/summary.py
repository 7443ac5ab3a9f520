"""From problems, samples and grades to the numbers of one suite: the "metrics" of results.json.

Format 1. Shares, accuracies and their errors are in [0, 1]; lengths are tokens of the completion. A number that is not
defined (the spread of one repetition) is None. ::

    format      1
    problems, samples, n                     counts; n samples of every problem
    avg         {value, low, high, se}       avg@n; 95% bootstrap over problems (Wilson where all are alike); standard
                                         error clustered by problem
    pass        {k: {value, low, high}}      unbiased pass@k
    maj         {k: {value, low, high}}      maths and choice only, ties by lot; {} for code
    g_pass      {k: {tau: value, "mean": mG-Pass@k}}     only if asked for
    seed_sd     sd over repetitions of the benchmark's mean, problems fixed
    groups      {name: {value: {problems, avg, low, high}}}
    verdicts    {kind: count}
    stages      {extraction stage: count}
    lengths     {edges: [21], all/right/wrong/truncated: {n, mean, median, p90, counts: [20]}}
    health      {truncated, unfinished_thinking, no_answer, repetitive: shares of samples;
                 finished_avg: mean verdict of samples that were not truncated; tokens: total}
    calibration {ece, brier, bins: [{low, high, count, confidence, accuracy}]}   n > 1, maths and choice; else None
    per_problem {id: [right, n]}

Keys of k and tau are strings, as in JSON. New keys may be added under format 1; none changes its meaning.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from typing import Any

import numpy as np

from llmdistill.evals.calibration import (
    brier_score,
    calibration_bins,
    expected_calibration_error,
    majority_confidence,
)
from llmdistill.evals.health import examine
from llmdistill.evals.metrics import (
    clustered_error,
    g_pass_at_k,
    maj_at_k,
    mean_g_pass_at_k,
    pass_at_k,
    seed_sd,
    share_interval,
)
from llmdistill.evals.records import Grade, Problem, Sample

_BINS = 20  # of the histograms of lengths
_NO_ANSWER = ("no_answer", "no_program")


def summarise(
    problems: Sequence[Problem],
    samples: Iterable[Sample] | Mapping[tuple[str, int], Sample],
    grades: Iterable[Grade],
    *,
    n: int,
    k_pass: Sequence[int] = (1,),
    k_maj: Sequence[int] = (),
    k_g_pass: Sequence[int] = (),
    tau: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
    thinking: bool | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """The numbers of one suite; the schema is in the module's docstring.

    Args:
        problems: all problems that were asked.
        samples: their completions, indices 0 to n - 1 for every problem, in any order.
        grades: one for each sample.
        n: samples per problem that were asked for. Scores are never divided by it: every problem must have just as
            many, so that an interrupted run raises instead of scoring lower.
        k_pass, k_maj, k_g_pass: which pass@k, maj@k and G-Pass@k; each k <= n.
        tau: thresholds of G-Pass@k.
        thinking: see :func:`llmdistill.evals.health.examine`.
        seed: of the bootstrap.

    Raises:
        ValueError: no problems, a problem without exactly n samples and grades, samples of unknown problems, or k > n.
    """
    table = list(samples.values() if isinstance(samples, Mapping) else samples)
    graded = list(grades)
    for key, wanted in (("k_pass", k_pass), ("k_maj", k_maj), ("k_g_pass", k_g_pass)):
        if wanted and not 1 <= min(wanted) <= max(wanted) <= n:
            raise ValueError(
                f"{key} is {list(wanted)} with n = {n} samples; each k must be in [1, n]. Raise n or drop k."
            )
    if not problems:
        raise ValueError("no problems to summarise")
    _complete({p.id for p in problems}, n, table, "samples")
    grade_of = _complete({p.id for p in problems}, n, graded, "grades")
    rows = {p.id: [grade_of[p.id, i] for i in range(n)] for p in problems}
    scores = [[float(g.passed) for g in rows[p.id]] for p in problems]
    means = [sum(s) / n for s in scores]
    right = [int(sum(s)) for s in scores]
    votes = [rows[p.id] for p in problems if p.kind != "code"]
    clusters = [([g.cluster for g in row], [g.passed for g in row]) for row in votes]
    majority = {k: [maj_at_k(c, ok, k, seed=seed) for c, ok in clusters] for k in k_maj} if votes else {}
    return {
        "format": 1,
        "problems": len(problems),
        "samples": len(table),
        "n": n,
        "avg": {**_interval(means, seed), "se": _defined(clustered_error(scores))},
        "pass": {str(k): _interval(pass_at_k(np.full(len(right), n), right, k).tolist(), seed) for k in k_pass},
        "maj": {str(k): _interval(values, seed) for k, values in majority.items()},
        "g_pass": {str(k): _g_pass(n, right, k, tau) for k in k_g_pass},
        "seed_sd": _defined(seed_sd(scores)),
        "groups": _groups(problems, means, seed),
        "verdicts": _counted(g.kind for g in graded),
        "stages": _counted(g.stage for g in graded),
        "lengths": _lengths(table, grade_of),
        "health": _health(table, grade_of, thinking),
        "calibration": _calibration(clusters) if clusters and n > 1 else None,
        "per_problem": {p.id: [c, n] for p, c in zip(problems, right, strict=True)},
    }


def drawn_with(results: Mapping[str, Any]) -> str:
    """What a score cannot be read without: "temperature 0.6, 1,234 tokens"."""
    temperature, mean = results["sampling"].get("temperature"), results["lengths"]["all"].get("mean")
    if temperature is None:
        return "" if mean is None else f"{mean:,.0f} tokens"
    drawn = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    return drawn if mean is None else f"{drawn}, {mean:,.0f} tokens"


def _complete(ids: set[str], n: int, records: Sequence[Any], what: str) -> dict[tuple[str, int], Any]:
    """The records by problem and index, of which there must be exactly n for each problem."""
    by_key = {(r.problem, r.index): r for r in records}
    counts = Counter(r.problem for r in records)
    if strange := [p for p in counts if p not in ids]:
        raise ValueError(f"{what} of {_some(strange)}, which are not among the problems: from another suite?")
    bad = [p for p in sorted(ids) if counts[p] != n or any((p, i) not in by_key for i in range(n))]
    if bad:
        found = [f"{p} ({counts[p]})" for p in bad]
        raise ValueError(
            f"{what}: every problem needs exactly n = {n}, with indices 0 to {n - 1}; {len(bad)} of {len(ids)} "
            f"have not: {_some(found)}. Finish the run, or summarise with the n that it has."
        )
    return by_key


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _interval(values: Sequence[float], seed: int) -> dict[str, float]:
    low, high = share_interval(values, seed=seed)
    return {"value": float(np.mean(values)), "low": low, "high": high}


def _defined(value: float) -> float | None:
    return None if isnan(value) else value


def _g_pass(n: int, right: Sequence[int], k: int, tau: Sequence[float]) -> dict[str, float]:
    by_tau = {f"{t:g}": float(np.mean([g_pass_at_k(n, c, k, t) for c in right])) for t in tau}
    return {**by_tau, "mean": float(np.mean([mean_g_pass_at_k(n, c, k) for c in right]))}


def _groups(problems: Sequence[Problem], means: Sequence[float], seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for problem, mean in zip(problems, means, strict=True):
        for name, value in problem.groups.items():
            found[name][value].append(mean)
    answer: dict[str, dict[str, dict[str, Any]]] = {}
    for name, values in sorted(found.items()):
        answer[name] = {}
        for value in sorted(values):
            interval = _interval(values[value], seed)
            answer[name][value] = {"problems": len(values[value]), "avg": interval.pop("value"), **interval}
    return answer


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _lengths(samples: Sequence[Sample], grade_of: Mapping[tuple[str, int], Grade]) -> dict[str, Any]:
    tokens = np.array([s.tokens for s in samples])
    passed = np.array([grade_of[s.problem, s.index].passed for s in samples])
    cut = np.array([s.finish == "length" for s in samples])
    edges = np.linspace(0, max(int(tokens.max()), 1), _BINS + 1)
    answer: dict[str, Any] = {"edges": edges.tolist()}
    for name, chosen in {"all": passed | ~passed, "right": passed, "wrong": ~passed, "truncated": cut}.items():
        x = tokens[chosen]
        answer[name] = {
            "n": int(x.size),
            "mean": float(x.mean()) if x.size else None,
            "median": float(np.median(x)) if x.size else None,
            "p90": float(np.quantile(x, 0.9)) if x.size else None,
            "counts": np.histogram(x, edges)[0].tolist(),
        }
    return answer


def _health(
    samples: Sequence[Sample], grade_of: Mapping[tuple[str, int], Grade], thinking: bool | None
) -> dict[str, Any]:
    found = [examine(s.text, s.finish, thinking=thinking) for s in samples]
    finished = [grade_of[s.problem, s.index].passed for s in samples if s.finish != "length"]
    grades = [grade_of[s.problem, s.index] for s in samples]
    return {
        "truncated": float(np.mean([h.truncated for h in found])),
        "unfinished_thinking": float(np.mean([h.unfinished_thinking for h in found])),
        "no_answer": float(np.mean([g.kind in _NO_ANSWER for g in grades])),
        "repetitive": float(np.mean([h.repetitive for h in found])),
        "finished_avg": float(np.mean(finished)) if finished else None,
        "tokens": sum(s.tokens for s in samples),
    }


def _calibration(clusters: Sequence[tuple[list[int | None], list[bool]]]) -> dict[str, Any]:
    pairs = [majority_confidence(classes, passed) for classes, passed in clusters]
    confidence, correct = [p[0] for p in pairs], [p[1] for p in pairs]
    return {
        "ece": expected_calibration_error(confidence, correct),
        "brier": brier_score(confidence, correct),
        "bins": calibration_bins(confidence, correct),
    }
