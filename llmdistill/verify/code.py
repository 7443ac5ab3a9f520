"""Verdicts on programs: run them in a sandbox, against asserts, cases of standard input, or calls with literals.

    run_tests("def double(x): return 2 * x", "assert double(3) == 6").passed

The program never runs where its verdict is made. With asserts and calls it runs in one confined process, the tests in
another; only plain data crosses, rebuilt as exact builtin types, and the program's process never holds the tests or
the expected values, not even in inherited memory. With standard input the parent compares the text. So exiting early,
raising what ends a loop, patching builtins or modules, providing names of the tests or of the judge, objects that equal
everything, reading the stack, and writing to every open file get a program nowhere.

What remains: a program decides what its functions answer, and that can be more than the author of a test thought of.
If a test compares two objects of the program's own classes, or asks such an object for its truth, its length or its
text, or one of a class that the tests name whether something is in it, or calls a method of it that plain data has not,
the program's own methods decide. Such an object equals no plain value, whatever its ``__eq__`` says. If a test calls a
helper of the program's making, that helper is the program's: give trusted helpers as ``setup``. And a test that a
constant passes is passed by that constant.

Time is wall time: on a machine whose cores are all busy, give more of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from llmdistill.errors import UserError
from llmdistill.verify import printed
from llmdistill.verify.sandbox import Limits, Outcome, Sandbox, SandboxFailure, shared_sandbox

T = TypeVar("T")
Kind = Literal["pass", "wrong", "runtime_error", "timeout", "memory", "violation", "syntax_error", "no_program"]

PREAMBLE = """\
from typing import *
from collections import *
from itertools import *
from functools import *
from heapq import *
from bisect import *
from math import *
from string import *
from operator import *
import bisect, collections, copy, datetime, functools, heapq, itertools, math, operator, random, re, string, sys
from builtins import pow
inf = float("inf")


class ListNode:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next


class TreeNode:
    def __init__(self, val=0, left=None, right=None):
        self.val, self.left, self.right = val, left, right
"""
"""What LeetCode-style programs may use without importing it."""

DEFAULT_TIME_LIMIT_S = {"asserts": 120.0, "stdin": 15.0, "functional": 60.0}
"""Wall seconds that judge_program gives where a row says nothing: a whole test script, one stdin case, all calls of a
problem. Reference solutions of HumanEval+ and MBPP+ take up to 53 s on two busy cores (EVALUATION.md, section 6), so
the 3 to 10 s of other harnesses would fail correct programs; a program in an endless loop costs the difference."""

LARGEST_PROGRAM = 1 << 22
"""Bytes of program text that are looked at; compiling tens of megabytes takes gigabytes."""

_SIGSYS, _SIGXCPU, _SIGXFSZ = 31, 24, 25
_OUT_OF_MEMORY = 77  # sandbox_candidate.OUT_OF_MEMORY, which lives in the child's world
_SIGNALS = {4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE", 9: "SIGKILL", 11: "SIGSEGV"}


@dataclass(frozen=True)
class Verdict:
    """What came of running a program.

    Attributes:
        passed: every test passed.
        kind: "pass"; "wrong" (an answer differs); "runtime_error" (it raised, exited or died, or lacks the function);
            "timeout"; "memory" (over the limit); "violation" (it did what the sandbox forbids, as far as that can be
            told from failing at it: a program may catch the refusal and go on); "syntax_error"; "no_program".
        detail: why, in a line or a few. Parts of it are the program's own words.
        seconds: wall time of the run.
    """

    passed: bool
    kind: Kind
    detail: str
    seconds: float


def run_tests(
    program: str,
    tests: str,
    *,
    entry_point: str | None = None,
    setup: str = "",
    preamble: str = "",
    time_limit_s: float = 10.0,
    memory_limit_mb: int = 1024,
    allow_unsafe_exec: bool = False,
    sandbox: Sandbox | None = None,
) -> Verdict:
    """Run test code (asserts, unittest, functions that pytest would collect) against a program.

    Names in the tests that neither the tests nor the builtins define are the program's. Its functions get copies of
    their arguments; what they do to a list, dict or set passed in is carried back for calls that are a statement of
    their own (``sort(xs)``), and for no others. Tests that are defined and that nobody calls are called. Tests that use
    nothing of the program do not pass.

    Args:
        program: Python source.
        tests: Python source; passes if it runs to its end.
        entry_point: the function (or "Solution().method") under test. Only needed to let it win over a builtin or
            over a definition of the same name in ``setup``.
        setup: trusted code that runs before the tests, away from the program: helpers, imports.
        preamble: code that runs before the program and before the setup, in both processes.
        time_limit_s: wall seconds for all of it.
        memory_limit_mb: MiB of address space beyond the interpreter's own.
        allow_unsafe_exec: run even on machines that offer no confinement.
        sandbox: the pool to run in; default: one that all calls of this process share.
    Raises:
        UserError: no confinement here and not allow_unsafe_exec; a limit that is not above 0; tests, setup or
            preamble that are no Python.
    """
    tests = tests.removeprefix("\ufeff")
    task = {"mode": "asserts", "tests": tests, "setup": setup, "preamble": preamble, "entry_point": entry_point}
    return _judged(program, preamble, task, Limits(time_limit_s, memory_limit_mb), allow_unsafe_exec, sandbox)


def run_functional(
    program: str,
    entry_point: str,
    cases: Sequence[tuple[str, str]],
    *,
    preamble: str = PREAMBLE,
    time_limit_s: float = 10.0,
    memory_limit_mb: int = 1024,
    allow_unsafe_exec: bool = False,
    sandbox: Sandbox | None = None,
) -> Verdict:
    """Call a function, or a method of a fresh instance of class Solution, with literals.

    Args:
        entry_point: "f", "method" (of class Solution, if there is no function of that name) or "Solution().method".
        cases: (arguments, expected) texts. Arguments are "n = 5, queries = [[2,4]]" or one JSON value a line; null,
            true and false are understood. Results agree within 1e-6 where floats are involved, and lists and tuples
            of the same items agree.
        preamble, time_limit_s (for all cases), memory_limit_mb, allow_unsafe_exec, sandbox: see run_tests.
    Raises:
        UserError: as run_tests; no cases.
    """
    _check_cases("functional", cases)
    task = {
        "mode": "functional",
        "preamble": preamble,
        "entry_point": entry_point,
        "cases": [list(case) for case in cases],
    }
    return _judged(program, preamble, task, Limits(time_limit_s, memory_limit_mb), allow_unsafe_exec, sandbox)


def run_stdin(
    program: str,
    cases: Sequence[tuple[str, str]],
    *,
    time_limit_s: float = 10.0,
    memory_limit_mb: int = 1024,
    allow_unsafe_exec: bool = False,
    sandbox: Sandbox | None = None,
) -> Verdict:
    """Run a whole program (``__main__`` included) once per case and compare what it prints.

    Args:
        cases: (standard input, expected standard output). Lines are compared without trailing whitespace and blank
            lines at the end; words of a line that differs as numbers, exactly between integers, within 1e-6 (absolute
            or relative) where the expected number has a fraction (printed.py says what a number is).
        time_limit_s: wall seconds for each case.
        memory_limit_mb, allow_unsafe_exec, sandbox: see run_tests.
    Raises:
        UserError: as run_tests; no cases.
    """
    _check_cases("stdin", cases)
    limits = Limits(time_limit_s, memory_limit_mb)
    pool = sandbox or shared_sandbox(allow_unsafe_exec)
    if early := _unfit(program):
        return early
    seconds = 0.0
    for index, (given, expected) in enumerate(cases):
        outcome = _retried(lambda given=given: pool.script(program, given, limits))  # type: ignore[misc]
        seconds += outcome.seconds
        kind, detail = _script_verdict(outcome, expected, limits)
        if kind != "pass":
            return Verdict(False, kind, f"case {index}: {detail}", seconds)
    return Verdict(True, "pass", f"{len(cases)} cases", seconds)


def find_program(
    completion: str,
    *,
    entry_point: str | None = None,
    prompt: str | None = None,
    allow_unsafe_exec: bool = False,
    sandbox: Sandbox | None = None,
) -> str | None:
    """The program in a completion (programs.extract_program says which), found in a confined process: a model's text
    may be written against the parser. None also where that takes over ten seconds or half a gigabyte."""
    pool = sandbox or shared_sandbox(allow_unsafe_exec)
    return _retried(lambda: pool.extract(completion, entry_point, prompt))


def judge_program(
    program: str | None,
    tests: Mapping[str, Any],
    *,
    time_limit_s: float | None = None,
    memory_limit_mb: int | None = None,
    allow_unsafe_exec: bool = False,
    sandbox: Sandbox | None = None,
) -> Verdict:
    """The verdict on a program by a benchmark row's tests.

    Args:
        program: what find_program found; None gives "no_program".
        tests: one of

            - ``{"style": "asserts", "test": code, "entry_point": name, "setup": code, "preamble": code}``: run_tests.
              Only "test" is required. Where it defines ``check`` and does not call it, ``check(entry_point)`` is added
              (HumanEval). For HumanEval and HumanEval+ give the prompt as "setup": its helpers and imports serve the
              tests and cannot be replaced by the program. For MBPP give test_setup_code and test_imports as "setup".
            - ``{"style": "stdin", "cases": [[input, output], ...]}``: run_stdin. A case may also be
              ``{"input": ..., "output": ...}``, as LiveCodeBench has it.
            - ``{"style": "functional", "entry_point": name, "cases": [[arguments, expected], ...],
              "preamble": code}``: run_functional; "preamble" defaults to PREAMBLE.

            Each may hold "time_limit_s" and "memory_limit_mb".
        time_limit_s: overrides the row's, which overrides DEFAULT_TIME_LIMIT_S. Seconds of a whole test script, of
            one stdin case, of all functional cases.
        memory_limit_mb: overrides the row's; default 1024, and 4096 for asserts (as EvalPlus).
        allow_unsafe_exec, sandbox: see run_tests.
    Raises:
        UserError: as the function used; tests of another form.
    """
    style = tests.get("style")
    required = {"asserts": ["test"], "stdin": ["cases"], "functional": ["cases", "entry_point"]}.get(str(style))
    if required is None:
        raise UserError(f"tests.style is {style!r}; it must be asserts, stdin or functional")
    known = {"style", "test", "entry_point", "setup", "preamble", "cases", "time_limit_s", "memory_limit_mb"}
    if wrong := [name for name in required if not tests.get(name)] or sorted(set(tests) - known):
        raise UserError(f"tests of style {style}: {wrong[0]!r} is missing or not known; known are {sorted(known)}")
    if not program or not program.strip():
        return Verdict(False, "no_program", "the completion holds no program", 0.0)
    memory = memory_limit_mb or tests.get("memory_limit_mb") or (4096 if style == "asserts" else 1024)
    common: dict[str, Any] = {
        "time_limit_s": time_limit_s or tests.get("time_limit_s") or DEFAULT_TIME_LIMIT_S[str(style)],
        "memory_limit_mb": memory,
        "allow_unsafe_exec": allow_unsafe_exec,
        "sandbox": sandbox,
    }
    entry_point = tests.get("entry_point")
    if style == "asserts":
        code, setup, preamble = (tests.get(name) or "" for name in ("test", "setup", "preamble"))
        if entry_point and "def check(" in code and not any(x.startswith("check(") for x in code.splitlines()):
            code += f"\n\ncheck({entry_point})\n"
        return run_tests(program, code, entry_point=entry_point, setup=setup, preamble=preamble, **common)
    cases = [(c["input"], c["output"]) if isinstance(c, Mapping) else (c[0], c[1]) for c in tests["cases"]]
    if style == "stdin":
        return run_stdin(program, cases, **common)
    return run_functional(program, str(entry_point), cases, preamble=tests.get("preamble") or PREAMBLE, **common)


def _judged(
    program: str, preamble: str, task: dict[str, Any], limits: Limits, allow_unsafe_exec: bool, sandbox: Sandbox | None
) -> Verdict:
    pool = sandbox or shared_sandbox(allow_unsafe_exec)
    if early := _unfit(program):
        return early
    outcome = _retried(lambda: pool.calls(program, preamble, task, limits))
    kind, detail = _task_verdict(outcome, limits)
    return Verdict(kind == "pass", kind, detail, outcome.seconds)


def _retried(run: Callable[[], T]) -> T:
    """A fork server that died takes its job with it; a second one gets another chance, and then it is an error."""
    try:
        return run()
    except SandboxFailure:
        return run()


def _unfit(program: str) -> Verdict | None:
    if not program.strip():
        return Verdict(False, "no_program", "the program is empty", 0.0)
    if len(program) > LARGEST_PROGRAM:
        return Verdict(False, "violation", f"{len(program)} characters of program; {LARGEST_PROGRAM} are allowed", 0.0)
    return None


def _task_verdict(outcome: Outcome, limits: Limits) -> tuple[Kind, str]:
    if outcome.timeout:
        return "timeout", f"over {limits.time_s:g} s"
    death = _death(outcome.program, limits)
    try:
        reported = json.loads(outcome.output)
    except ValueError:  # the judge's process was killed: by its own limits, for the program cannot reach it
        return death or ("timeout" if outcome.judge == -_SIGXCPU else "memory", f"the tests died ({outcome.judge})")
    if reported["kind"] == "broken_tests":
        raise UserError(reported["detail"])
    if reported["kind"] == "pass":
        return ("pass", reported["detail"]) if outcome.judge == 0 else ("runtime_error", "the program's process ended")
    # A program that was killed shows in the tests as a process that ended; the reason is in how it was killed.
    return death if death and outcome.judge != 0 else (reported["kind"], reported["detail"])


def _script_verdict(outcome: Outcome, expected: str, limits: Limits) -> tuple[Kind, str]:
    if outcome.timeout:
        return "timeout", f"over {limits.time_s:g} s"
    errors = outcome.errors.decode("utf-8", "replace").strip()
    if death := _death(outcome.program, limits):
        return death
    if outcome.program == _OUT_OF_MEMORY:
        return "memory", f"over {limits.memory_mb} MiB"
    if len(outcome.output) >= limits.output_mb << 20:
        return "violation", f"more than {limits.output_mb} MiB of output"
    if outcome.program != 0:
        last = errors.splitlines()[-1] if errors else f"exit status {outcome.program}"
        if last.startswith(("SyntaxError", "IndentationError", "TabError")) or "null bytes" in last:
            return "syntax_error", last
        refused = "Operation not permitted" in last or "Permission denied" in last or "File too large" in last
        return ("violation" if refused else "runtime_error"), last[:1000]
    if problem := printed.too_long(expected, outcome.output):
        return "wrong", problem
    got = outcome.output.decode("utf-8", "replace")
    if difference := printed.differs(expected, got):
        return "wrong", difference
    return "pass", ""


def _death(status: int | None, limits: Limits) -> tuple[Kind, str] | None:
    """What a process died of, if a signal says it. One that ended by itself says nothing here."""
    if status is None or status >= 0:
        return None
    if status == -_SIGSYS:
        return "violation", "a forbidden system call (processes, signals, tracing, namespaces, io_uring)"
    if status == -_SIGXCPU:
        return "timeout", f"over {limits.time_s:g} s of processor time"
    if status == -_SIGXFSZ:
        return "violation", "a file over the limit"
    return "runtime_error", f"killed by {_SIGNALS.get(-status, f'signal {-status}')}"


def _check_cases(style: str, cases: Sequence[tuple[str, str]]) -> None:
    if not cases:
        raise UserError(f"{style} tests without cases pass every program; give at least one (input, output) pair")
