"""The numbers of a suite: against hand-counted ones, and that incomplete runs never score."""

from __future__ import annotations

import json

import pytest

from llmdistill.evals.metrics import wilson_interval
from llmdistill.evals.records import Grade, Problem, Sample
from llmdistill.evals.summary import summarise

RIGHT = {"a": [1, 1, 0, 1], "b": [0, 0, 0, 0], "c": [1, 0, 0, 0]}
CLUSTERS = {"a": [0, 0, 1, 0], "b": [None, 0, 0, 1], "c": [0, 1, 1, 2]}


def make(n: int = 4) -> tuple[list[Problem], list[Sample], list[Grade]]:
    problems = [Problem(i, f"question {i}", "math", "1", groups={"level": "2" if i == "a" else "5"}) for i in RIGHT]
    samples = [
        Sample(p.id, i, "<think>x</think> answer", 10 * (i + 1), "length" if (p.id, i) == ("b", 0) else "stop", 0)
        for p in problems
        for i in range(n)
    ]
    grades = [
        Grade(
            p.id,
            i,
            bool(RIGHT[p.id][i]),
            "right" if RIGHT[p.id][i] else "wrong" if CLUSTERS[p.id][i] is not None else "no_answer",
            "1",
            "boxed" if i else "none",
            "",
            CLUSTERS[p.id][i],
        )
        for p in problems
        for i in range(n)
    ]
    return problems, samples, grades


def test_hand_counted_suite() -> None:
    problems, samples, grades = make()
    got = summarise(problems, samples, grades, n=4, k_pass=(1, 4), k_maj=(1, 4), k_g_pass=(2,), tau=(0.5, 1.0))
    assert got["avg"]["value"] == pytest.approx(4 / 12)
    assert got["avg"]["low"] <= 4 / 12 <= got["avg"]["high"]
    assert got["pass"]["1"]["value"] == pytest.approx(4 / 12)
    assert got["pass"]["4"]["value"] == pytest.approx(2 / 3)
    assert got["maj"]["4"]["value"] == pytest.approx(1 / 3)  # only a's majority is right
    assert got["maj"]["1"]["value"] == pytest.approx(4 / 12)
    assert got["distinct"] == {"4": pytest.approx((2 + 2 + 3) / 3)}  # of one sample there is nothing to say
    assert got["g_pass"]["2"]["1"] == pytest.approx((3 / 6) / 3)  # two of a's three right ones out of four
    low, high = wilson_interval(0.75, 1)  # one problem says next to nothing of others
    assert got["groups"]["level"]["2"] == {"problems": 1, "avg": 0.75, "low": low, "high": high} and low < 0.2
    assert got["groups"]["level"]["5"]["avg"] == pytest.approx(1 / 8)
    assert got["verdicts"] == {"wrong": 7, "right": 4, "no_answer": 1}
    assert got["stages"] == {"boxed": 9, "none": 3}
    assert got["seed_sd"] == pytest.approx(0.2721655)  # of 2/3, 1/3, 0, 1/3
    assert got["health"] == {
        "truncated": pytest.approx(1 / 12),
        "unfinished_thinking": 0,
        "no_answer": pytest.approx(1 / 12),
        "repetitive": 0,
        "finished_avg": pytest.approx(4 / 11),
        "tokens": 300,
    }
    lengths = got["lengths"]
    assert (lengths["all"]["n"], lengths["all"]["mean"], lengths["right"]["median"]) == (12, 25, 15)
    assert sum(lengths["all"]["counts"]) == 12
    assert lengths["truncated"]["n"] == 1
    assert got["calibration"]["brier"] == pytest.approx((0.25**2 + 0.5**2 + 0.5**2) / 3)
    assert got["per_problem"] == {"a": [3, 4], "b": [0, 4], "c": [1, 4]}
    assert json.loads(json.dumps(got, allow_nan=False)) == got


def test_one_sample_per_problem_leaves_out_what_it_cannot_tell() -> None:
    problems, samples, grades = make(1)
    got = summarise(problems, {(s.problem, s.index): s for s in samples}, grades, n=1)
    assert got["seed_sd"] is None
    assert got["calibration"] is None
    assert got["maj"] == {}


def test_code_has_no_majority() -> None:
    problems, samples, grades = make()
    code = [Problem(p.id, p.question, "code") for p in problems]
    got = summarise(code, samples, grades, n=4, k_maj=(4,))
    assert got["maj"] == {} and got["calibration"] is None


def test_a_missing_sample_raises_instead_of_lowering_the_score() -> None:
    problems, samples, grades = make()
    with pytest.raises(ValueError, match=r"samples: every problem needs exactly n = 4.* 1 of 3 have not: b \(3\)"):
        summarise(problems, [s for s in samples if (s.problem, s.index) != ("b", 2)], grades, n=4)
    with pytest.raises(ValueError, match=r"grades: .*c \(3\)"):
        summarise(problems, samples, grades[:-1], n=4)
    with pytest.raises(ValueError, match=r"n = 2, .* a \(4\), b \(4\)"):  # a longer run is not cut to fit
        summarise(problems, samples, grades, n=2)
    with pytest.raises(ValueError, match="n = 64"):
        summarise(problems, samples, grades, n=64)


def test_other_mistakes_are_named() -> None:
    problems, samples, grades = make()
    with pytest.raises(ValueError, match="of c, which are not among the problems"):
        summarise(problems[:2], samples, grades, n=4)
    with pytest.raises(ValueError, match=r"k_pass is \[8\] with n = 4"):
        summarise(problems, samples, grades, n=4, k_pass=(8,))
