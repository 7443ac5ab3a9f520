"""The process that runs the tests. The program is in another one (sandbox_candidate.py) and is called from here.

Results arrive as plain data, rebuilt as exact builtin types, so the asserts below compare what they seem to compare.
An object of a class that the program defines stays on its side; here it is a Remote, which equals no plain value
whatever its own ``__eq__`` says. Names that the tests use are looked up in the tests, their setup and the builtins
first, then in the program. Cases of arguments and expected values need none of that (sandbox_cases.py).
"""

from __future__ import annotations

import builtins
import errno
import inspect
import json
import re
import sys
import types
import unittest
from typing import Any

from llmdistill.verify.sandbox_bindings import Bindings, askable
from llmdistill.verify.sandbox_cases import CaseFailed, compare_cases
from llmdistill.verify.sandbox_numpy import strict_comparisons
from llmdistill.verify.sandbox_remote import FromProgram, Gone, Link, Remote, raised
from llmdistill.verify.sandbox_tests import (
    STATEMENT,
    UnitTests,
    compiled,
    names_loaded,
    names_read,
    names_stored,
    names_used,
    uncalled,
)
from llmdistill.verify.sandbox_wire import Channel, Closed, Failed

Result = tuple[str, str]  # kind of verdict, detail

_STOPPED = {errno.EPERM, errno.EACCES, errno.EROFS, errno.EFBIG, errno.ENOSPC}
_NAME = re.compile(r"\w*")
_PARTS = ("preamble", "setup", "tests")


def judge(task: dict[str, Any], read_fd: int, write_fd: int) -> tuple[Result, bool]:
    """Run the task against the program behind the two pipes. Never raises.

    Returns:
        The verdict, and whether the program's process ended by itself meanwhile.
    """
    channel = Channel(read_fd, write_fd)
    try:
        parts = [compiled(task.get(name) or "", name) for name in _PARTS]
    except (ValueError, RecursionError, MemoryError) as error:
        return ("broken_tests", str(error)), False
    try:
        mark, *rest = channel.receive()
        failure = None if mark == "loaded" else Failed([str(name) for name in rest[0]], str(rest[1]), None)
    except Exception:
        return ("runtime_error", "the program's process ended while it was loaded"), True
    if failure is not None:
        return _load_failure(failure), False
    return _functional(task, channel) if task["mode"] == "functional" else _scripted(task, parts, Link(channel))


def _functional(task: dict[str, Any], channel: Channel) -> tuple[Result, bool]:
    try:
        agree, detail = compare_cases(task, channel)
    except CaseFailed as case:
        kind, detail = _program_error(raised(case.failure))
        return (kind, f"case {case.index}: {detail}"), False
    except Closed as end:
        return ("runtime_error", f"the program's process ended {end}".strip()), True
    except MemoryError as error:
        return ("memory", f"out of memory: {error}"), False
    except Exception as error:
        return ("runtime_error", f"the tests cannot run: {type(error).__name__}: {error}"[:1000]), False
    return ("pass" if agree else "wrong", detail), False


def _scripted(task: dict[str, Any], parts: list[Any], link: Link) -> tuple[Result, bool]:
    try:
        result = _asserts(task, parts, link)
    except Gone as gone:
        result = ("runtime_error", str(gone))
    except MemoryError as error:
        result = ("memory", f"out of memory: {error}")
    except BaseException as error:
        result = _program_error(error) if isinstance(error, FromProgram) else _cannot_run(error)
    if link.broken and result[0] == "pass":  # the tests swallowed the end of the program
        result = ("runtime_error", link.broken)
    return result, link.broken is not None


def _cannot_run(error: BaseException) -> Result:
    return "runtime_error", f"the tests cannot run: {type(error).__name__}: {error}"[:1000]


def _load_failure(failure: Failed) -> Result:
    if "SyntaxError" in failure.classes or (failure.classes[:1] == ["ValueError"] and "null" in failure.message):
        return "syntax_error", failure.message
    if "SystemExit" in failure.classes:
        return "runtime_error", f"the program exited while it was loaded (status {failure.message})"
    kind, detail = _program_error(raised(failure))
    return kind, f"while it was loaded: {detail}"


def _program_error(error: BaseException) -> Result:
    detail = f"{type(error).__name__}: {error}"[:2000]
    if isinstance(error, MemoryError):
        return "memory", detail
    if getattr(error, "number", None) in _STOPPED:
        return "violation", f"the sandbox refused: {detail}"
    return "runtime_error", detail


def _asserts(task: dict[str, Any], parts: list[Any], link: Link) -> Result:
    strict_comparisons()
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["tests"]
    names = module.__dict__
    names["__builtins__"], names[STATEMENT] = builtins, _statement
    entry = _NAME.match(task.get("entry_point") or "")
    root = entry.group() if entry else ""
    used = names_used(code for code, _ in parts)
    units = UnitTests()
    if "unittest" in used or "TestCase" in used:
        units.watch(lambda value: isinstance(value, Remote))
    own = set().union(*(defined for _, defined in parts))
    bindings = Bindings(link, names, root, names_stored(code for code, _ in parts))
    bindings.bind(askable(names_loaded(code for code, _ in parts) - own | {root} - {""}, root))
    if root and root not in bindings.found:
        return "runtime_error", f"the program defines no {root!r}"
    for code, _ in parts[:2]:
        exec(code, names)
    if root in bindings.found:
        names[root] = bindings.found[root]  # the setup may hold an empty definition: a HumanEval prompt does
    before = {name: names[name] for name in names}
    try:
        ended = _run(parts[2][0], names)
        new = {name: value for name, value in names.items() if before.get(name, link) is not value}
        if not units.failures:  # what is known to fail needs no more tests
            _run_uncalled(new, task["tests"], units)
    except MemoryError as error:
        return ("memory", f"out of memory: {error}") if not isinstance(error, FromProgram) else _program_error(error)
    except Exception as error:
        return _test_error(error, task["tests"])
    if link.failed_assertion is not None:  # in a callback: the program may have caught it
        return _test_error(link.failed_assertion, task["tests"])
    if units.failures:
        test, failure = units.failures[0]
        failed_by_program = isinstance(failure, FromProgram) and isinstance(failure, BaseException)
        return _program_error(failure) if failed_by_program else ("wrong", f"{test}: {failure}"[:1000])
    if ended not in (None, 0, False):
        return "wrong", f"the tests exited: {ended}"
    if not (link.asked or bindings.constants() & names_read(task["tests"], in_functions=False)):
        return "wrong", "the tests use nothing that the program defines"
    return "pass", ""


def _run(code: types.CodeType, names: dict[str, Any]) -> Any:
    """Run the tests. Returns the status with which they end by themselves, as unittest.main() does; else None."""
    try:
        exec(code, names)
    except SystemExit as end:
        return end.code
    return None


def _run_uncalled(new: dict[str, Any], source: str, units: UnitTests) -> None:
    """Tests that were defined and are left for a runner to call."""
    new = {name: value for name, value in new.items() if getattr(value, "__module__", None) == "__main__"}
    if cases := [v for v in new.values() if isinstance(v, type) and issubclass(v, unittest.TestCase)]:
        units.run(cases)
    for test in uncalled(new, source):
        result = test()
        if inspect.iscoroutine(result):
            import asyncio

            asyncio.run(result)


def _test_error(error: Exception, tests: str) -> Result:
    where = _line(error, tests)
    if isinstance(error, FromProgram):
        kind, detail = _program_error(error)
        return kind, f"{detail} in {where}"
    if isinstance(error, AssertionError):
        return "wrong", f"{where} {str(error)[:500]}".strip()
    kind = "runtime_error" if isinstance(error, NameError) else "wrong"
    return kind, f"{type(error).__name__}: {str(error)[:500]} in {where}"


def _line(error: Exception, tests: str) -> str:
    number, step = 0, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<tests>":
            number = step.tb_lineno
        step = step.tb_next
    lines = tests.split("\n")
    return lines[number - 1].strip()[:300] if 0 < number <= len(lines) else "the tests"


def _statement(function: Any, *args: Any, **keywords: Any) -> Any:
    """A call whose result nobody looks at is there for its effect: changes of its arguments are carried back."""
    if isinstance(function, Remote):
        return object.__getattribute__(function, "_link").call(function, args, keywords, True)
    return function(*args, **keywords)


def run(task_text: bytes, read_fd: int, write_fd: int) -> tuple[bytes, bool]:
    """The judge's whole work: the task as JSON in, the verdict as JSON out (at most 16 kB)."""
    (kind, detail), ended = judge(json.loads(task_text), read_fd, write_fd)
    return json.dumps({"kind": kind, "detail": detail[:4000]}).encode(), ended
