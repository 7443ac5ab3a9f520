"""From a benchmark's row to a problem: one function per format.

``rows`` is the format of your own suites; the others exist because the code benchmarks and GSM8K write their tests and
answers in ways of their own.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmdistill.errors import UserError
from llmdistill.evals.hidden_tests import unpacked
from llmdistill.evals.records import Kind, Problem


@dataclass(frozen=True)
class Row:
    """One row: its values, where it stands ("math500.jsonl line 3") and its number from 0."""

    values: Mapping[str, Any]
    where: str
    number: int

    def text(self, name: str) -> str:
        """A field that must be text; numbers are written out.

        Raises:
            UserError: it is missing, empty or something else.
        """
        value = self.values.get(name)
        if isinstance(value, (list, tuple)) and len(value) == 1:  # some benchmarks keep single answers in a list
            value = value[0]
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            value = str(int(value)) if float(value).is_integer() else repr(value)
        if not isinstance(value, str) or not value.strip():
            found = "is missing" if name not in self.values else f"is {value!r}"
            raise UserError(
                f"{self.where}: field {name!r} {found}; it must be text (the row has {', '.join(self.values)}). "
                "Fix: complete the row, or name the right columns under 'columns:'."
            )
        return value


Reader = Callable[[Row, Kind, Mapping[str, str], Sequence[str]], Problem]


def rows(row: Row, kind: Kind, columns: Mapping[str, str], groups: Sequence[str]) -> Problem:
    """``id`` (default: the row's number), ``question``, ``answer`` or ``tests``, under the names in ``columns``."""
    tests = None
    if kind == "code":
        tests = row.values.get(columns.get("tests", "tests"))
        if not isinstance(tests, dict):
            raise UserError(f"{row.where}: field 'tests' is {tests!r}; a code problem needs an object there.")
    gold = row.text(columns.get("answer", "answer")) if kind != "code" else row.values.get("solution")
    return _problem(row, kind, columns, groups, row.text(columns.get("question", "question")), gold, tests)


def olympiad(row: Row, kind: Kind, columns: Mapping[str, str], groups: Sequence[str]) -> Problem:
    """OlympiadBench: a numeric answer may come with the error it allows."""
    given = row.values.get("error_tolerance") or row.values.get("error")
    try:
        tests = {"tolerance": float(given)} if given else None
    except (TypeError, ValueError):  # "1e-1, 1e-2": one for each of several answers, which are compared exactly
        tests = None
    answer = row.text(columns.get("answer", "answer"))
    return _problem(row, kind, columns, groups, row.text(columns.get("question", "question")), answer, tests)


def gsm8k(row: Row, kind: Kind, columns: Mapping[str, str], groups: Sequence[str]) -> Problem:
    """GSM8K as its authors publish it: the answer is what follows ``####`` in the solution."""
    _, mark, answer = row.text(columns.get("answer", "answer")).rpartition("####")
    if not mark:
        raise UserError(f"{row.where}: the answer has no '####'; GSM8K's rows end with it.")
    question = row.text(columns.get("question", "question"))
    return _problem(row, kind, columns, groups, question, answer.strip().replace(",", ""), None)


def humaneval(row: Row, kind: Kind, columns: Mapping[str, str], groups: Sequence[str]) -> Problem:
    """HumanEval and HumanEval+: a header to complete, and ``check(candidate)``."""
    prompt, entry = row.text("prompt"), row.text("entry_point")
    tests = {"style": "asserts", "test": row.text("test"), "entry_point": entry, "setup": prompt}
    solution = prompt + str(row.values.get("canonical_solution", ""))
    return _problem(row, "code", columns, groups, prompt, solution, tests)


def mbpp(row: Row, kind: Kind, columns: Mapping[str, str], groups: Sequence[str]) -> Problem:
    """MBPP, sanitized MBPP and MBPP+: a sentence, shown with the tests that name the function."""
    values = row.values
    task = row.text("prompt" if values.get("prompt") else "text").strip()
    listed = [str(t) for t in values.get("test_list") or ()]
    test = str(values.get("test") or "\n".join(listed))
    if not test:
        raise UserError(f"{row.where}: neither 'test' nor 'test_list' has a test.")
    solution = values.get("canonical_solution") or values.get("code")
    entry = values.get("entry_point") or called(str(solution or ""), "\n".join(listed) or test)
    question = task
    if listed and "assert" not in task:  # MBPP+ writes one into its text
        question = f"{task}\nYour code should pass these tests:\n" + "\n".join(listed)
    setup = "\n".join([str(values.get("test_setup_code") or ""), *map(str, values.get("test_imports") or ())]).strip()
    tests: dict[str, Any] = {"style": "asserts", "entry_point": entry, "test": test, "setup": setup}
    return _problem(row, "code", columns, groups, question, solution, tests)


def called(solution: str, tests: str) -> str | None:
    """The function that the tests call and the solution defines; the last defined, where there are several."""
    try:
        defined = [node.name for node in ast.parse(solution).body if isinstance(node, ast.FunctionDef)]
        calls = (node.func for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Call))
        names = {function.id for function in calls if isinstance(function, ast.Name)}
    except (SyntaxError, ValueError):
        return None
    return next((name for name in reversed(defined) if name in names), None)


def leetcode(row: Row, kind: Kind, columns: Mapping[str, str], groups: Sequence[str]) -> Problem:
    """``class Solution`` items with a preamble of imports and ``check(Solution().method)``."""
    tests = {"style": "asserts", "test": row.text("test"), "entry_point": row.text("entry_point")}
    tests["preamble"] = str(row.values.get("preamble") or "")
    return _problem(row, "code", columns, groups, row.text("prompt"), row.values.get("canonical_solution"), tests)


def livecodebench(row: Row, kind: Kind, columns: Mapping[str, str], groups: Sequence[str]) -> Problem:
    """Items by example: programs that read standard input, and methods called with arguments."""
    given = row.values.get("test")
    try:
        cases = json.loads(given) if isinstance(given, str) else list(given or ())
        pairs = [[str(case["input"]), str(case["output"])] for case in cases]
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{row.where}: field 'test' is no list of objects with 'input' and 'output'.") from error
    if not pairs:
        raise UserError(f"{row.where}: field 'test' is empty; a problem needs at least one case.")
    tests: dict[str, Any] = {"style": "stdin", "cases": pairs}
    if row.values.get("test_type") == "functional":
        tests = {"style": "functional", "entry_point": row.text("entry_point"), "cases": pairs}
    return _problem(row, "code", columns, groups, row.text("prompt"), None, tests)


def livecodebench_release(row: Row, kind: Kind, columns: Mapping[str, str], groups: Sequence[str]) -> Problem:
    """LiveCodeBench as it is released (``code_generation_lite``): public and hidden tests, starter code for methods."""
    cases = []
    for name in ("public_test_cases", "private_test_cases"):
        try:
            cases += [(str(c["testtype"]), [str(c["input"]), str(c["output"])]) for c in unpacked(row.text(name))]
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{row.where}: field {name!r} holds no tests: {error}.") from error
    if len(kinds := {kind_ for kind_, _ in cases}) != 1:
        raise UserError(f"{row.where}: its tests are of the kinds {sorted(kinds)}; a problem has one kind.")
    tests: dict[str, Any] = {"style": "stdin", "cases": [case for _, case in cases]}
    asked = "Read the input from standard input and print the answer; put a complete Python program"
    if kinds == {"functional"}:
        try:
            entry = str(json.loads(row.text("metadata"))["func_name"])
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{row.where}: field 'metadata' names no func_name.") from error
        tests = {"style": "functional", "entry_point": f"Solution().{entry}", "cases": tests["cases"]}
        asked = f"Complete this:\n```python\n{row.text('starter_code').rstrip()}\n```\nPut the whole of it"
    question = f"{row.text('question_content').rstrip()}\n\n{asked} into one markdown code block."
    values = {**row.values, "month": str(row.values.get("contest_date") or "")[:7]}
    named = {"id": "question_id", **columns}
    return _problem(Row(values, row.where, row.number), "code", named, groups, question, None, tests)


def gpqa(row: Row, kind: Kind, columns: Mapping[str, str], groups: Sequence[str]) -> Problem:
    """GPQA: the right answer and three wrong ones, in an order that follows from the question's id."""
    right = row.text("Correct Answer").strip()
    choices = [right, *(row.text(f"Incorrect Answer {i}").strip() for i in (1, 2, 3))]
    name = row.text("Record ID")
    order = sorted(range(4), key=lambda i: hashlib.blake2b(f"{name}:{i}".encode()).digest())
    listed = "\n".join(f"{letter}) {choices[i]}" for letter, i in zip("ABCD", order, strict=True))
    question = f"{row.text('Question').strip()}\n\n{listed}"
    return _problem(row, "choice", {"id": "Record ID", **columns}, groups, question, "ABCD"[order.index(0)], None)


_OF_BENCHMARKS = (olympiad, gsm8k, humaneval, mbpp, leetcode, livecodebench, livecodebench_release, gpqa)
READERS: dict[str, Reader] = {function.__name__: function for function in (rows, *_OF_BENCHMARKS)}
# What a reader takes from "columns", beside the groups.
COLUMNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(READERS, ("id",)),
    "rows": ("id", "question", "answer", "tests"),
    **dict.fromkeys(("olympiad", "gsm8k"), ("id", "question", "answer")),
}


def _problem(
    row: Row,
    kind: Kind,
    columns: Mapping[str, str],
    groups: Sequence[str],
    question: str,
    gold: Any,
    tests: dict[str, Any] | None,
) -> Problem:
    given = row.values.get(columns.get("id", "id"), row.values.get("task_id"))
    values = {name: row.values.get(columns.get(name, name)) for name in groups}
    return Problem(
        id=str(row.number if given is None else given),
        question=question,
        kind=kind,
        gold=None if gold is None else str(gold),
        tests=tests,
        groups={name: str(value) for name, value in values.items() if value not in (None, "")},
    )
