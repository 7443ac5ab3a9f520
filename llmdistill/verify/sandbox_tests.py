"""Test code before and after it runs: what it looks up, which of its calls are statements, which tests nobody called.

Used in the judge's process (sandbox_judge.py). Nothing here asks the program anything by itself.
"""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import io
import types
import unittest
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

_LOADS = {"LOAD_NAME", "LOAD_GLOBAL", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_GLOBALS"}
STATEMENT = "a statement of the tests"
"""The global of the judge's that marked calls go through. It is no identifier: no source can spell it, so the tests
cannot hide it, and the program, which is asked for identifiers only, cannot provide it."""


def compiled(source: str, name: str) -> tuple[types.CodeType, set[str]]:
    """A part of the task: its code with the calls that are statements marked, and the functions, classes and imports
    at its top, which are never the program's, whatever that calls its own.

    Raises:
        ValueError: no Python.
    """
    try:
        tree = ast.parse(source)
        defined = set(_defined(tree))
        return compile(_mark_statements(tree), f"<{name}>", "exec"), defined
    except Exception as error:
        raise ValueError(f"{name}: not Python that can be compiled ({error})") from None


def _defined(tree: ast.Module) -> Iterator[str]:
    pending: list[Any] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).partition(".")[0] for alias in node.names if alias.name != "*")
        else:
            pending += _blocks(node)


def _blocks(node: Any) -> Iterator[Any]:
    """What stands in a compound statement: try, if, with, a loop."""
    for name in ("body", "orelse", "finalbody", "handlers", "cases"):
        inner = getattr(node, name, None)
        yield from inner if isinstance(inner, list) else []


def _mark_statements(tree: ast.Module) -> ast.Module:
    """f(x) as a statement becomes STATEMENT(f, x). Elsewhere a program cannot change the tests' own data: an oracle
    such as ``assert abs(poly(xs, candidate(xs))) < 1e-4`` would fall for an emptied xs."""
    pending: list[Any] = [tree]
    while pending:
        node = pending.pop()
        pending += _blocks(node)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            call = node.value
            if isinstance(call.func, ast.Name) and hasattr(builtins, call.func.id):
                continue
            marker = ast.copy_location(ast.Name(STATEMENT, ast.Load()), call)
            node.value = ast.copy_location(ast.Call(marker, [call.func, *call.args], call.keywords), call)
    return tree


def names_used(codes: Iterable[types.CodeType]) -> set[str]:
    """Every identifier in code objects, attributes and imports included, in nested functions too, without those between
    two underscores: they are the interpreter's."""
    found: set[str] = set()
    pending = list(codes)
    while pending:
        code = pending.pop()
        found.update(code.co_names)
        pending += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return {name for name in found if name.isidentifier() and not (name.startswith("__") and name.endswith("__"))}


def names_loaded(codes: Iterable[types.CodeType]) -> set[str]:
    """The globals that code looks up, in nested functions and classes too, without those between two underscores. What
    is only an attribute in the tests is nothing that a program may provide."""
    found = {step.argval for code, _ in _nested(codes) for step in dis.get_instructions(code) if step.opname in _LOADS}
    return {name for name in found if name.isidentifier() and not (name.startswith("__") and name.endswith("__"))}


def names_stored(codes: Iterable[types.CodeType]) -> set[str]:
    """Every global that code assigns or deletes, in whatever way: from then on it is not the program's."""
    found: set[str] = set()
    for code, outermost in _nested(codes):
        stores = {"STORE_GLOBAL", "DELETE_GLOBAL"} | ({"STORE_NAME", "DELETE_NAME"} if outermost else set())
        found.update(step.argval for step in dis.get_instructions(code) if step.opname in stores)
    return found


def _nested(codes: Iterable[types.CodeType]) -> Iterator[tuple[types.CodeType, bool]]:
    """Code objects with those within them, and whether each is one of the outermost."""
    pending = [(code, True) for code in codes]
    while pending:
        code, outermost = pending.pop()
        yield code, outermost
        pending += [(constant, False) for constant in code.co_consts if isinstance(constant, types.CodeType)]


def names_read(source: str, *, in_functions: bool = True) -> set[str]:
    """The names that test code reads; without ``in_functions`` only where nothing would have to be called for it."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            found.add(node.id)
        if in_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return found


class UnitTests:
    """Watches unittest while the tests run, so that a result that nobody looks at (``unittest.main(exit=False)``,
    ``TextTestRunner().run(suite)``) counts, and a class that nobody runs is run."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, Any]] = []  # the test, and what it raised or what is wrong with it
        self.ran: set[type] = set()

    def watch(self, stays_away: Callable[[Any], bool]) -> None:
        """Patch unittest, in this process and for good.

        Args:
            stays_away: whether a value is an object that stayed with the program, which is no set.
        """
        run, ran, failures = unittest.TestCase.run, self.ran, self.failures

        def noted_run(case: unittest.TestCase, result: Any = None) -> Any:
            ran.add(type(case))
            return run(case, result)

        unittest.TestCase.run = noted_run  # type: ignore[method-assign, assignment]
        equal = unittest.TestCase.assertSetEqual

        def sets_only(case: unittest.TestCase, first: Any, second: Any, msg: Any = None) -> None:
            if stays_away(first) or stays_away(second):  # whose own difference() would hear what is expected
                case.fail(f"an object of the program's own class is no set{f': {msg}' if msg else ''}")
            equal(case, first, second, msg)

        unittest.TestCase.assertSetEqual = sets_only  # type: ignore[method-assign, assignment]
        for name in ("addFailure", "addError", "addSubTest"):
            setattr(unittest.TestResult, name, _noting(getattr(unittest.TestResult, name), failures))
        unexpected = unittest.TestResult.addUnexpectedSuccess

        def noted_success(result: Any, test: Any) -> None:
            failures.append((str(test), "an unexpected success"))
            unexpected(result, test)

        unittest.TestResult.addUnexpectedSuccess = noted_success  # type: ignore[method-assign, assignment]

    def run(self, classes: list[type[unittest.TestCase]]) -> None:
        """Run what did not run by itself."""
        load = unittest.defaultTestLoader.loadTestsFromTestCase
        suite = unittest.TestSuite(load(kind) for kind in classes if kind not in self.ran)
        unittest.TextTestRunner(stream=io.StringIO()).run(suite)


def _noting(method: Any, failures: list[tuple[str, Any]]) -> Any:
    def noted(result: Any, test: Any, *details: Any) -> None:
        error = details[-1]  # (class, exception, traceback); of a subtest that passed: None
        if error is not None:
            failures.append((str(test), error[1]))
        method(result, test, *details)

    return noted


def uncalled(defined: dict[str, Any], source: str) -> Iterator[Any]:
    """Functions that pytest would collect and that the tests themselves do not use: ``test*`` without arguments, or
    with those of ``pytest.mark.parametrize``, and such methods of classes ``Test*`` that are no unittest.TestCase."""
    collected = {name: value for name, value in sorted(defined.items()) if name.lower().startswith("test")}
    used = names_read(source) if collected else set()
    for name, value in collected.items():
        if isinstance(value, types.FunctionType) and name.startswith("test") and name not in used:
            yield from _calls(value, value)
        elif isinstance(value, type) and name.startswith("Test") and not issubclass(value, unittest.TestCase):
            if name in used or "__init__" in vars(value):
                continue
            for method in sorted(name for name in dir(value) if name.startswith("test")):
                yield from _calls(_Method(value, method), inspect.getattr_static(value, method))


class _Method:
    """A test method, on an instance of its own, after the class's set-up."""

    def __init__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, **values: Any) -> Any:
        instance = self.owner()
        for name in ("setup_method", "setUp"):
            if set_up := getattr(instance, name, None):
                set_up(*([None] if _asked(set_up) else []))
                break
        return getattr(instance, self.name)(**values)


def _calls(call: Callable[..., Any], function: Any) -> Iterator[Callable[[], Any]]:
    """``call`` with every choice of the values that ``function`` is marked with; none for one that asks for more."""
    chosen: list[dict[str, Any]] = [{}]
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            given = {**dict(zip(("argnames", "argvalues"), mark.args, strict=False)), **mark.kwargs}
            in_words = isinstance(given["argnames"], str)
            names = given["argnames"].split(",") if in_words else given["argnames"]
            rows = [_values(row, alone=in_words and len(names) == 1) for row in given["argvalues"]]
            chosen = [
                {**before, **{name.strip(): value for name, value in zip(names, row, strict=True)}}
                for before in chosen
                for row in rows
            ]
    asked = _asked(function)[1 if isinstance(call, _Method) and isinstance(function, types.FunctionType) else 0 :]
    yield from (partial(call, **values) for values in chosen if set(asked) <= values.keys())


def _values(row: Any, *, alone: bool) -> tuple[Any, ...]:
    """One row of marked values: ``pytest.param`` has them, of a single name they may stand alone."""
    if type(row).__name__ == "ParameterSet":
        return tuple(row.values)
    return (row,) if alone else tuple(row)


def _asked(function: Any) -> list[str]:
    """The arguments that a call must give."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind in kinds]
