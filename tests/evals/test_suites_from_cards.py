"""Suites that were written from their cards and never run here: rows made by hand, in the columns the cards name."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from llmdistill.errors import UserError
from llmdistill.evals.hidden_tests import unpacked
from llmdistill.evals.records import Problem, Sample
from llmdistill.evals.suite import load_problems, load_suite
from tests.evals import made


def read(folder: Path, name: str, *rows: dict[str, Any]) -> list[Problem]:
    suite = load_suite(name)
    (folder / suite.file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_problems(suite, folder)


def packed(tests: Any) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def test_hmmt(tmp_path: Path) -> None:
    row = {"problem_idx": 7, "problem": "Compute $2 + 2$.", "answer": "4", "problem_type": ["Algebra"]}
    (problem,) = read(tmp_path, "hmmt25", row)
    assert (problem.id, problem.question, problem.gold, problem.kind) == ("7", "Compute $2 + 2$.", "4", "math")
    assert made.graded([problem], [Sample("7", 0, "It is \\boxed{4}.", 1, "stop", 0)])[0].passed


def gpqa_row(name: str, right: str = "blue") -> dict[str, Any]:
    wrong = {f"Incorrect Answer {i}": f" wrong {i}\n" for i in (1, 2, 3)}
    row = {"Record ID": name, "Question": f"Which ({name})?\n", "Correct Answer": f"{right} ", **wrong}
    return {**row, "High-level domain": "Physics", "Subdomain": "Optics"}


def test_gpqa_choices_are_in_an_order_of_their_own(tmp_path: Path) -> None:
    """The right one stands everywhere alike, and at the same place in every run."""
    problems = read(tmp_path, "gpqa_diamond", *(gpqa_row(f"rec{i}") for i in range(200)))
    for problem in problems:
        assert (
            problem.question.startswith(f"Which ({problem.id})?\n\nA) ")
            and f"\n{problem.gold}) blue" in problem.question
        )
        assert all(f") wrong {i}" in problem.question for i in (1, 2, 3))
    golds = [p.gold for p in problems]
    assert all(30 < golds.count(letter) < 70 for letter in "ABCD")  # 50 each; beyond with a chance under 1 in 1,000
    assert problems == read(tmp_path, "gpqa_diamond", *(gpqa_row(f"rec{i}") for i in range(200)))
    assert problems[0].groups == {"domain": "Physics"} and problems[0].kind == "choice"
    assert made.graded(problems[:1], [Sample("rec0", 0, f"So \\boxed{{{golds[0]}}}", 1, "stop", 0)])[0].passed


def lcb_row(**changes: Any) -> dict[str, Any]:
    case = {"input": "2\n", "output": "4\n", "testtype": "stdin"}
    return {
        **{"question_title": "Double", "question_content": "Double n.\n", "platform": "atcoder", "question_id": "abc1"},
        **{"contest_id": "abc", "contest_date": "2025-02-01T00:00:00", "starter_code": "", "difficulty": "easy"},
        "public_test_cases": json.dumps([case]),
        "private_test_cases": packed([{**case, "input": "5\n", "output": "10\n"}]),
        "metadata": "{}",
        **changes,
    }


def test_livecodebench_programs(tmp_path: Path) -> None:
    """Judged by the hidden tests too: 4 is right for the public one only."""
    (problem,) = read(tmp_path, "livecodebench_v6", lcb_row())
    assert problem.id == "abc1" and problem.question.startswith("Double n.\n\nRead the input from standard input")
    assert problem.groups == {"platform": "atcoder", "difficulty": "easy", "month": "2025-02"}
    assert problem.tests == {"style": "stdin", "cases": [["2\n", "4\n"], ["5\n", "10\n"]]}
    for program, passed in (("print(2 * int(input()))", True), ("print(4)", False)):
        sample = Sample("abc1", 0, f"```python\n{program}\n```", 1, "stop", 0)
        assert made.graded([problem], [sample], allow_unsafe_exec=True)[0].passed is passed


def test_livecodebench_methods(tmp_path: Path) -> None:
    case = {"input": "2\n[1, 2]", "output": "[2, 4]", "testtype": "functional"}
    starter = "class Solution:\n    def times(self, n: int, xs: List[int]) -> List[int]:\n        "
    row = lcb_row(
        starter_code=starter,
        public_test_cases=json.dumps([case]),
        private_test_cases=json.dumps([{**case, "input": "3\n[1]", "output": "[3]"}]),
        metadata=json.dumps({"func_name": "times"}),
    )
    (problem,) = read(tmp_path, "livecodebench_v6", row)
    assert "class Solution:\n    def times(" in problem.question
    for body, passed in (("[n * x for x in xs]", True), ("[2, 4]", False)):
        sample = Sample("abc1", 0, f"```python\n{starter}return {body}\n```", 1, "stop", 0)
        assert made.graded([problem], [sample], allow_unsafe_exec=True)[0].passed is passed


class Runs:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('it was run')",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (base64.b64encode(zlib.compress(pickle.dumps(Runs()))).decode(), "does more than hold a string"),
        (base64.b64encode(zlib.compress(pickle.dumps(["a", "b"]))).decode(), "does more than hold a string"),
        ("no base64", "neither JSON nor packed"),
        (base64.b64encode(b"no zlib").decode(), "neither JSON nor packed"),
    ],
)
def test_a_pickle_is_never_run(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        unpacked(text)
    with pytest.raises(UserError, match=f"line 1: field 'private_test_cases' holds no tests: .*{said}"):
        read(tmp_path, "livecodebench_v6", lcb_row(private_test_cases=text))


def test_rows_that_lack_something_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1: field 'Incorrect Answer 3' is missing"):
        read(tmp_path, "gpqa_diamond", {k: v for k, v in gpqa_row("a").items() if k != "Incorrect Answer 3"})
    mixed = json.dumps([{"input": "1", "output": "1", "testtype": "functional"}])
    with pytest.raises(UserError, match="tests are of the kinds .*functional.*stdin"):
        read(tmp_path, "livecodebench_v6", lcb_row(public_test_cases=mixed))
    functional = {"public_test_cases": mixed, "private_test_cases": mixed, "starter_code": "class Solution: ..."}
    with pytest.raises(UserError, match="'metadata' names no func_name"):
        read(tmp_path, "livecodebench_v6", lcb_row(**functional))
