"""The process that runs the tests. The program is in another one (sandbox_candidate.py) and is called from here.

Results arrive as plain data, rebuilt as exact builtin types, so the asserts below compare what they seem to compare.
An object of a class that the program defines stays on its side; here it is a Remote, which equals no plain value
whatever its own ``__eq__`` says. Names that the tests use are looked up in the tests, their setup and the builtins
first, then in the program.
"""

from __future__ import annotations

import ast
import builtins
import errno
import importlib
import json
import re
import sys
import types
from typing import Any

from llmdistill.verify.sandbox_literals import arguments, expected_value
from llmdistill.verify.sandbox_remote import SHARED_MODULES, FromProgram, Gone, Link, Remote, raised
from llmdistill.verify.sandbox_wire import Channel, Closed, Failed, same

Result = tuple[str, str]  # kind of verdict, detail

_STOPPED = {errno.EPERM, errno.EACCES, errno.EROFS, errno.EFBIG, errno.ENOSPC}


def judge(task: dict[str, Any], read_fd: int, write_fd: int) -> tuple[Result, bool]:
    """Run the task against the program behind the two pipes. Never raises.

    Returns:
        The verdict, and whether the program's process ended by itself meanwhile.
    """
    channel = Channel(read_fd, write_fd)
    try:
        codes = _compiled(task)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return ("broken_tests", str(error)), False
    try:
        first = channel.receive()
    except (Closed, ValueError, RecursionError):
        return ("runtime_error", "the program's process ended while it was loaded"), True
    if first[0] == "failed":
        return _load_failure(Failed([str(name) for name in first[1]], str(first[2]), first[3])), False
    link = Link(channel)
    try:
        result = _asserts(task, codes, link) if task["mode"] == "asserts" else _functional(task, link)
    except Gone as gone:
        result = ("runtime_error", str(gone))
    except Failed as failure:
        result = _program_error(raised(failure))
    except MemoryError as error:
        result = ("memory", f"out of memory: {error}")
    except BaseException as error:
        result = ("runtime_error", f"the tests cannot run: {type(error).__name__}: {error}"[:1000])
    if link.broken and result[0] == "pass":  # the tests swallowed the end of the program
        result = ("runtime_error", link.broken)
    return result, link.broken is not None


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


def _functional(task: dict[str, Any], link: Link) -> Result:
    encode = link.codec.encode
    for index, (given, wanted) in enumerate(task["cases"]):
        positional, named = arguments(given)
        expected = expected_value(wanted)
        try:
            got = link.value(link.ask("entry", task["entry_point"], encode(positional), encode(named)))
        except Exception as error:
            if not isinstance(error, FromProgram):
                raise
            kind, detail = _program_error(error)
            return kind, f"case {index}: {detail}"
        if isinstance(got, Remote) or not same(expected, got):
            return "wrong", f"case {index}: expected {_short(expected)}, got {_short(got)}"
    return "pass", f"{len(task['cases'])} cases"


def _short(value: Any) -> str:
    text = "an object of the program's own class" if isinstance(value, Remote) else repr(value)
    return text if len(text) <= 300 else f"{text[:300]}... ({len(text)} characters)"


def _compiled(task: dict[str, Any]) -> list[types.CodeType]:
    """The preamble, and of a test script its setup and the tests. Raises ValueError for what is no Python."""
    codes = []
    for name in ("preamble", "setup", "tests"):
        try:
            codes.append(compile(_mark_statements(ast.parse(task.get(name) or "")), f"<{name}>", "exec"))
        except Exception as error:
            raise ValueError(f"{name}: not Python that can be compiled ({error})") from None
    return codes


def _asserts(task: dict[str, Any], codes: list[types.CodeType], link: Link) -> Result:
    _strict_comparisons()
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["tests"]
    names = module.__dict__
    names["__builtins__"], names["__statement__"] = builtins, _statement
    entry = re.match(r"\w*", task.get("entry_point") or "")
    root = entry.group() if entry else ""
    used = set().union(*(_names(code) for code in codes))
    found = _bind(link, names, {name for name in used if name == root or not hasattr(builtins, name)}, root)
    if root and root not in found:
        return "runtime_error", f"the program defines no {root!r}"
    exec(codes[0], names)
    exec(codes[1], names)
    if root:
        names[root] = found[root]  # the setup may hold an empty definition of it: a HumanEval prompt does
    before = set(names)
    try:
        exec(codes[2], names)
        if not found:
            for name in sorted(set(names) - before):
                if name.startswith("test") and isinstance(names[name], types.FunctionType):
                    names[name]()
    except SystemExit as end:  # unittest.main() ends so
        return ("pass", "") if end.code in (None, 0, False) and found else ("wrong", f"the tests exited: {end.code}")
    except MemoryError as error:
        return ("memory", f"out of memory: {error}") if not isinstance(error, FromProgram) else _program_error(error)
    except Exception as error:
        return _test_error(error, task["tests"])
    if not found:
        return "wrong", "the tests use nothing that the program defines"
    return "pass", ""


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


def _bind(link: Link, names: dict[str, Any], wanted: set[str], root: str) -> dict[str, Any]:
    """Give the tests what the program has under these names."""
    found = {}
    order = sorted(wanted)
    answers = link.ask("names", order)
    if type(answers) is not list or len(answers) != len(order):
        raise Gone("the program's process answers nonsense")
    for name, description in zip(order, answers, strict=True):
        if description is None:
            continue
        kind, payload = str(description[0]), description[1]
        if kind == "exception":  # a class to catch by, which raised() uses from now on
            base = next((getattr(builtins, str(n)) for n in payload if _is_exception(str(n))), Exception)
            names[name] = found[name] = link.exceptions[name] = type(name, (base,), {})
            continue
        if kind == "module":
            if str(payload).partition(".")[0] in SHARED_MODULES:
                names[name] = importlib.import_module(str(payload))
            continue
        if kind == "from" and name != root and payload in SHARED_MODULES | {"_collections", "_functools", "_heapq"}:
            own = importlib.import_module(str(payload).lstrip("_"))
            if hasattr(own, name):
                names[name] = getattr(own, name)
                continue
        names[name] = found[name] = link.value(description[-1])
    return found


def _is_exception(name: str) -> bool:
    kind = getattr(builtins, name, None)
    return isinstance(kind, type) and issubclass(kind, Exception)


def _names(code: types.CodeType) -> set[str]:
    """Every name a code object loads, in nested functions too (and attributes: a few too many does no harm)."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _statement(function: Any, *args: Any, **keywords: Any) -> Any:
    """A call whose result nobody looks at is there for its effect: changes of its arguments are carried back."""
    if isinstance(function, Remote):
        return object.__getattribute__(function, "_link").call(function, args, keywords, True)
    return function(*args, **keywords)


def _mark_statements(tree: ast.Module) -> ast.Module:
    """f(x) as a statement becomes __statement__(f, x). Elsewhere a program cannot change the tests' own data: an
    oracle such as ``assert abs(poly(xs, candidate(xs))) < 1e-4`` would fall for an emptied xs."""
    pending: list[Any] = [tree]
    while pending:
        node = pending.pop()
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, block, None)
            pending += inner if isinstance(inner, list) else []
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = node.value
            if isinstance(call.func, ast.Name) and hasattr(builtins, call.func.id):
                continue
            marker = ast.copy_location(ast.Name("__statement__", ast.Load()), call)
            node.value = ast.copy_location(ast.Call(marker, [call.func, *call.args], call.keywords), call)
    return tree


def _strict_comparisons() -> None:
    """numpy broadcasts, so that [] is close to every number, and the plus suites' oracle would take [] for any float.
    Here allclose wants equal shapes, and nothing empty is close or equal to what is not."""
    if "numpy" not in sys.modules:  # the fork server loads it where it is installed
        return
    import numpy
    import numpy.testing

    def strict(compare: Any, differs: Any, fail: Any) -> Any:
        def compared(a: Any, b: Any, *args: Any, **keywords: Any) -> Any:
            return fail() if differs(a, b) else compare(a, b, *args, **keywords)

        return compared

    def emptiness(a: Any, b: Any) -> bool:
        return bool((numpy.size(a) == 0) != (numpy.size(b) == 0))

    def shape(a: Any, b: Any) -> bool:
        return bool(numpy.shape(a) != numpy.shape(b))

    def error() -> Any:
        raise AssertionError("something empty is compared with something that is not")

    numpy.allclose = strict(numpy.allclose, shape, lambda: False)
    numpy.isclose = strict(numpy.isclose, emptiness, lambda: numpy.False_)
    for name in ("assert_allclose", "assert_equal", "assert_almost_equal", "assert_array_almost_equal"):
        setattr(numpy.testing, name, strict(getattr(numpy.testing, name), emptiness, error))
    numpy.testing.assert_array_equal = strict(numpy.testing.assert_array_equal, emptiness, error)


def run(task_text: bytes, read_fd: int, write_fd: int) -> tuple[bytes, bool]:
    """The judge's whole work: the task as JSON in, the verdict as JSON out (at most 16 kB)."""
    (kind, detail), ended = judge(json.loads(task_text), read_fd, write_fd)
    return json.dumps({"kind": kind, "detail": detail[:4000]}).encode(), ended
