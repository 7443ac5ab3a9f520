"""From problems, samples and grades to the numbers of one suite: the "metrics" of results.json.

Format 1. Shares, accuracies and their errors are in [0, 1]; lengths are tokens of the completion. A number that is not
defined (the spread of one repetition) is None. ::

    format      1
    problems, samples, n                     counts; n samples of every problem
    avg         {value, low, high, se}       avg@n; 95% bootstrap over problems (Wilson where all are alike); standard
                                         error clustered by problem
    pass        {k: {value, low, high}}      unbiased pass@k
    maj         {k: {value, low, high}}      maths and choice only, ties by lot; {} for code
    distinct    {k: different answers among k samples, mean over problems}     k > 1, maths and choice; {} for code
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
    distinct_at_k,
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
    tally = Tally(n, k_pass=k_pass, k_maj=k_maj, k_g_pass=k_g_pass, tau=tau, thinking=thinking, seed=seed)
    known = {p.id for p in problems}
    for what, records in (("samples", table), ("grades", graded)):
        if strange := sorted({r.problem for r in records} - known):
            raise ValueError(f"{what} of {_some(strange)}, which are not among the problems: from another suite?")
    by_problem: dict[str, tuple[list[Sample], list[Grade]]] = {p.id: ([], []) for p in problems}
    for sample in table:
        by_problem[sample.problem][0].append(sample)
    for grade in graded:
        by_problem[grade.problem][1].append(grade)
    for i, what in enumerate(("samples", "grades")):
        bad = [p for p, found in by_problem.items() if sorted(r.index for r in found[i]) != list(range(n))]  # type: ignore[attr-defined]
        if bad:
            counted = _some([f"{p} ({len(by_problem[p][i])})" for p in bad])
            raise ValueError(
                f"{what}: every problem needs exactly n = {n}, with indices 0 to {n - 1}; {len(bad)} of {len(known)} "
                f"have not: {counted}. Finish the run, or summarise with the n that it has."
            )
    for problem in problems:
        tally.add(problem, *by_problem[problem.id])
    return tally.numbers()


class Tally:
    """As :func:`summarise`, problem by problem: of a sample it keeps a few numbers, and not its text."""

    def __init__(
        self,
        n: int,
        *,
        k_pass: Sequence[int] = (1,),
        k_maj: Sequence[int] = (),
        k_g_pass: Sequence[int] = (),
        tau: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        thinking: bool | None = None,
        seed: int = 0,
    ) -> None:
        for key, wanted in (("k_pass", k_pass), ("k_maj", k_maj), ("k_g_pass", k_g_pass)):
            if wanted and not 1 <= min(wanted) <= max(wanted) <= n:
                raise ValueError(
                    f"{key} is {list(wanted)} with n = {n} samples; each k must be in [1, n]. Raise n or drop k."
                )
        self.n, self.k_pass, self.k_maj, self.k_g_pass, self.tau = n, k_pass, k_maj, k_g_pass, tau
        self.thinking, self.seed = thinking, seed
        self.right: dict[str, int] = {}  # by problem
        self.scores: list[list[float]] = []
        self.groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.clusters: list[tuple[list[int | None], list[bool]]] = []
        self.kinds, self.stages, self.ill = Counter[str](), Counter[str](), Counter[str]()
        self.tokens, self.passed, self.cut = list[int](), list[bool](), list[bool]()

    def add(self, problem: Problem, samples: Sequence[Sample], grades: Sequence[Grade]) -> None:
        """Raises ValueError where there are not exactly n samples and as many grades, 0 to n - 1."""
        for what, records in (("samples", samples), ("grades", grades)):
            if sorted(r.index for r in records) != list(range(self.n)):
                raise ValueError(f"{what}: problem {problem.id} has {len(records)}; it needs 0 to {self.n - 1}")
        row = sorted(grades, key=lambda g: g.index)
        passed = [g.passed for g in row]
        score = [float(p) for p in passed]
        self.scores.append(score)
        self.right[problem.id] = int(sum(score))
        for name, value in problem.groups.items():
            self.groups[name][value].append(sum(score) / self.n)
        if problem.kind != "code":
            self.clusters.append(([g.cluster for g in row], passed))
        self.kinds.update(g.kind for g in row)
        self.stages.update(g.stage for g in row)
        self.ill["no_answer"] += sum(g.kind in _NO_ANSWER for g in row)
        for sample in sorted(samples, key=lambda s: s.index):
            health = examine(sample.text, sample.finish, thinking=self.thinking)
            self.ill["unfinished_thinking"] += health.unfinished_thinking
            self.ill["repetitive"] += health.repetitive
            self.tokens.append(sample.tokens)
            self.cut.append(sample.finish == "length")
        self.passed += passed

    def numbers(self) -> dict[str, Any]:
        """The numbers of all problems added.

        Raises:
            ValueError: there are none.
        """
        if not self.scores:
            raise ValueError("no problems to summarise")
        means, right, seed, n = [sum(s) / self.n for s in self.scores], list(self.right.values()), self.seed, self.n
        majority = {
            k: [maj_at_k(classes, passed, k, seed=seed) for classes, passed in self.clusters]
            for k in (self.k_maj if self.clusters else ())
        }
        return {
            "format": 1,
            "problems": len(self.scores),
            "samples": len(self.tokens),
            "n": n,
            "avg": {**_interval(means, seed), "se": _defined(clustered_error(self.scores))},
            "pass": {
                str(k): _interval(pass_at_k(np.full(len(right), n), right, k).tolist(), seed) for k in self.k_pass
            },
            "maj": {str(k): _interval(values, seed) for k, values in majority.items()},
            "distinct": {
                str(k): float(np.mean([distinct_at_k(classes, k) for classes, _ in self.clusters]))
                for k in (self.k_pass if self.clusters else ())
                if k > 1
            },
            "g_pass": {str(k): _g_pass(n, right, k, self.tau) for k in self.k_g_pass},
            "seed_sd": _defined(seed_sd(self.scores)),
            "groups": self._groups(),
            "verdicts": dict(self.kinds.most_common()),
            "stages": dict(self.stages.most_common()),
            "lengths": self._lengths(),
            "health": self._health(),
            "calibration": _calibration(self.clusters) if self.clusters and n > 1 else None,
            "per_problem": {problem: [count, n] for problem, count in self.right.items()},
        }

    def _groups(self) -> dict[str, dict[str, dict[str, Any]]]:
        answer: dict[str, dict[str, dict[str, Any]]] = {}
        for name, values in sorted(self.groups.items()):
            answer[name] = {}
            for value in sorted(values):
                interval = _interval(values[value], self.seed)
                answer[name][value] = {"problems": len(values[value]), "avg": interval.pop("value"), **interval}
        return answer

    def _lengths(self) -> dict[str, Any]:
        tokens, passed, cut = np.array(self.tokens), np.array(self.passed), np.array(self.cut)
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

    def _health(self) -> dict[str, Any]:
        finished = [passed for passed, cut in zip(self.passed, self.cut, strict=True) if not cut]
        shares = {key: self.ill[key] / len(self.tokens) for key in ("unfinished_thinking", "no_answer", "repetitive")}
        return {
            "truncated": sum(self.cut) / len(self.cut),
            **shares,
            "finished_avg": float(np.mean(finished)) if finished else None,
            "tokens": sum(self.tokens),
        }


def drawn_with(results: Mapping[str, Any]) -> str:
    """What a score cannot be read without: "temperature 0.6, 1,234 tokens"."""
    temperature, mean = results["sampling"].get("temperature"), results["lengths"]["all"].get("mean")
    if temperature is None:
        return "" if mean is None else f"{mean:,.0f} tokens"
    drawn = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    return drawn if mean is None else f"{drawn}, {mean:,.0f} tokens"


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


def _calibration(clusters: Sequence[tuple[list[int | None], list[bool]]]) -> dict[str, Any]:
    pairs = [majority_confidence(classes, passed) for classes, passed in clusters]
    confidence, correct = [p[0] for p in pairs], [p[1] for p in pairs]
    return {
        "ece": expected_calibration_error(confidence, correct),
        "brier": brier_score(confidence, correct),
        "bins": calibration_bins(confidence, correct),
    }
