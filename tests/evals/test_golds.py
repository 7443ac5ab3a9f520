"""The numbers of the harness itself: right answers score 100 %, somebody else's right answers about nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmdistill.evals.records import Problem, Sample
from llmdistill.evals.suite import DATA_ENV, load_problems, load_suite, subsample
from tests.evals import made

DATA = Path(os.environ.get(DATA_ENV) or Path(__file__).resolve().parents[3] / "shared" / "data")
here = pytest.mark.skipif(not (DATA / "benchmarks").is_dir(), reason="the benchmarks' files are not here")


def answered(problems: list[Problem], golds: list[str | None]) -> list[bool]:
    """Verdicts on completions that give ``golds`` for ``problems``, a boxed answer or a fenced program each."""
    samples = []
    for problem, gold in zip(problems, golds, strict=True):
        text = f"```python\n{gold}\n```" if problem.kind == "code" else f"Therefore it is $\\boxed{{{gold}}}$."
        samples.append(Sample(problem.id, 0, text, 1, "stop", 0))
    return [g.passed for g in made.graded(problems, samples)]


def test_golds_of_a_made_up_suite(tmp_path: Path) -> None:
    problems = load_problems(load_suite(made.suite(tmp_path)))
    golds = [p.gold for p in problems]
    assert all(answered(problems, golds))
    assert not any(answered(problems, [*golds[1:], golds[0]]))


def test_choices_and_programs_of_ones_own(tmp_path: Path) -> None:
    """The documented row formats: an option letter, and programs judged by each style of test."""
    rows = [{"id": "c", "question": "2+2? (A) 3 (B) 4", "answer": "B"}]
    choice = load_problems(load_suite(made.suite(tmp_path, rows, kind="choice", template="choice")))
    assert answered(choice, ["B"]) == answered(choice, ["(B)"]) == [True]
    assert answered(choice, ["A"]) == answered(choice, ["4"]) == [False]
    double = "def double(x):\n    return 2 * x"
    rows = [
        {"id": "a", "question": "double", "tests": {"style": "asserts", "test": "assert double(2) == 4"}},
        {"id": "s", "question": "double", "tests": {"style": "stdin", "cases": [["2\n", "4\n"]]}},
        {
            "id": "f",
            "question": "double",
            "tests": {"style": "functional", "entry_point": "Solution().double", "cases": [["x = 2", "4"]]},
        },
    ]
    code = load_problems(load_suite(made.suite(tmp_path, rows, kind="code")))
    golds: list[str | None] = [double, "print(2 * int(input()))", f"class Solution:\n    {METHOD}"]
    assert answered(code, golds) == [True, True, True]
    assert not any(answered(code, [str(program).replace("2 *", "3 *") for program in golds]))


METHOD = "def double(self, x: int) -> int:\n        return 2 * x"


@here
@pytest.mark.slow
@pytest.mark.parametrize("name", ["math500", "aime24", "aime25", "amc23", "gsm8k", "minerva_math", "olympiadbench"])
def test_golds_of_the_mathematics_suites(name: str) -> None:
    problems = load_problems(load_suite(name), DATA)
    golds = [p.gold for p in problems]
    assert [p.id for p, right in zip(problems, answered(problems, golds), strict=True) if not right] == []
    turned = answered(problems, [*golds[7:], *golds[:7]])
    alike = sum(a == b for a, b in zip(golds, [*golds[7:], *golds[:7]], strict=True))
    assert sum(turned) <= alike + 0.01 * len(problems)  # others may be equal without being spelt alike


@here
@pytest.mark.slow
@pytest.mark.parametrize("name", ["humaneval", "mbpp", "leetcode"])
def test_golds_of_code_suites_through_the_harness(name: str) -> None:
    """A fifth of each: that every reference passes is proven in tests/verify; here the road from a completion is."""
    problems = load_problems(load_suite(name), DATA)
    problems = subsample(problems, len(problems) // 5)
    golds = [p.gold for p in problems]
    assert [p.id for p, right in zip(problems, answered(problems, golds), strict=True) if not right] == []
    assert not any(answered(problems, [*golds[1:], golds[0]]))
