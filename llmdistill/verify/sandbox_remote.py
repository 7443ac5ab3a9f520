"""The program's functions and objects as the tests see them. Used in the judge's process (sandbox_judge.py)."""

from __future__ import annotations

import builtins
import collections.abc
import importlib
import itertools
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from llmdistill.verify.sandbox_wire import Channel, Closed, Codec, Failed, Peer

# Where the tests rely on a function that the program imported, this process imports its own: a program can choose
# among these, and cannot slip in one of its making.
SHARED_MODULES = frozenset(
    ["bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools"]
    + ["json", "math", "numpy", "operator", "random", "re", "statistics", "string", "sys", "time", "typing"]
)


# Methods of plain data that hear what is looked for. An object that a function returned in the place of a set, list or
# text would say yes to all of them.
SEARCHES = frozenset(
    ["count", "difference", "endswith", "index", "intersection", "isdisjoint", "issubset", "issuperset", "startswith"]
    + ["symmetric_difference"]
)


class Gone(BaseException):
    """The program's process ended, or answers nonsense. No ``except Exception`` of the tests hides it."""


class FromProgram:
    """Mixed into exceptions that the program raised: same builtin class for the tests' ``except``, another verdict."""

    number: int | None = None


class Link:
    """The tests' end of the conversation."""

    def __init__(self, channel: Channel) -> None:
        self.peer = Peer(channel, self._serve)
        self.codec = Codec(self._outside, self._inside)
        self.known: dict[int, Remote] = {}
        self.callbacks: list[Any] = []
        self.exceptions: dict[str, type[Exception]] = {}
        self.classes: set[str] = set()  # of the program, that the tests use by name
        self.rebind: Callable[[list[Any]], None] = lambda changed: None
        self.asked = 0  # calls and operations; names are asked for before the tests run
        self.broken: str | None = None
        self.failed_assertion: AssertionError | None = None

    def lost(self, reason: str) -> Gone:
        """From now on nothing is asked any more, and no test passes, whatever it catches."""
        self.broken = self.broken or reason[:500]
        return Gone(self.broken)

    def ask(self, *request: Any) -> Any:
        if self.broken:
            raise Gone(self.broken)
        self.asked += request[0] != "names"
        try:
            return self.peer.ask(*request)
        except Failed as failure:
            error = raised(failure, self.exceptions, may_end_iteration=request[:2] == ("operation", "next"))
        except MemoryError:
            raise
        except Exception as problem:  # whatever a message that says nothing runs into
            raise self.lost(f"the program's process ended {problem}".strip()) from None
        raise error

    def value(self, form: Any) -> Any:
        """Decode what the program answered."""
        try:
            return self.codec.decode(form)
        except MemoryError:
            raise
        except Exception as problem:
            raise self.lost(f"the program's answer is no plain data: {type(problem).__name__}: {problem}") from None

    def knows_class(self, value: Remote) -> bool:
        """Whether the tests use a class of the program's by the name that this object's class has."""
        return object.__getattribute__(value, "_type_name") in self.classes

    def exception(self, name: str, classes: list[str]) -> type[Exception]:
        """A class for the tests to catch the program's own exception of this name by."""
        base = next((getattr(builtins, n) for n in classes if _is_exception(n)), Exception)
        kind = self.exceptions[name] = type(name, (base,), {})
        return kind

    def operation(self, name: str, *args: Any) -> Any:
        return self.value(self._answer(self.ask("operation", name, [self.codec.encode(arg) for arg in args]), 1)[0])

    def _answer(self, answer: Any, parts: int) -> list[Any]:
        """What was asked for, without the program's globals that changed meanwhile, which go to the tests."""
        if type(answer) is not list or len(answer) != parts + 1 or type(answer[-1]) is not list:
            raise self.lost("the program's process answers nonsense")
        if answer[-1]:
            try:
                self.rebind([(str(name), description) for name, description in answer[-1]])
            except Exception as problem:
                raise self.lost(f"the program's process answers nonsense: {problem}") from None
        return answer

    def call(self, target: Remote, args: tuple[Any, ...], keywords: dict[str, Any], carry_back: bool) -> Any:
        forms = [self.codec.encode(arg) for arg in args]
        named = {name: self.codec.encode(arg) for name, arg in keywords.items()}
        answer = self._answer(self.ask("call", self.codec.encode(target), forms, named, carry_back), 3)
        if answer[2]:  # what the call printed: for tests that capture it
            sys.stdout.write(str(answer[2]))
        if carry_back:
            self._carry_back(args, answer[1])
        return self.value(answer[0])

    def _carry_back(self, args: tuple[Any, ...], changed: Any) -> None:
        """Changes of arguments, into the tests' own objects."""
        try:
            forms = {int(index): form for index, form in changed}
        except Exception:
            raise self.lost("the program's process answers nonsense") from None
        for index, argument in enumerate(args):
            if index in forms:
                _overwrite(argument, self.value(forms[index]))

    def _serve(self, request: list[Any]) -> Any:
        kind, number, forms = request
        if kind != "callback":
            raise Closed(f"a request of kind {kind!r}"[:100])
        try:
            return self.codec.encode(self.callbacks[number](*[self.value(form) for form in forms]))
        except AssertionError as failed:  # counts, whatever the program makes of it
            self.failed_assertion = self.failed_assertion or failed
            raise

    def _outside(self, value: Any) -> dict[str, Any]:
        if isinstance(value, Remote):
            return {"handle": object.__getattribute__(value, "_number")}
        if isinstance(value, collections.abc.Iterator):
            return {"iterator": [self.codec.encode(item) for item in itertools.islice(value, 1_000_000)]}
        module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
        if callable(value):
            if module in SHARED_MODULES or module == "builtins":
                with_name = getattr(importlib.import_module(str(module)), name, None)
                if with_name is value:
                    return {"from": [module, name]}
            self.callbacks.append(value)
            return {"callback": len(self.callbacks) - 1}
        if hasattr(value, "__dict__") and type(value).__module__ == "__main__":
            return self._objects(value)
        raise TypeError(f"a {type(value).__name__} cannot be passed to the program: plain data and functions can")

    def _objects(self, root: Any) -> dict[str, Any]:
        """Objects of the preamble's classes with what they refer to. No recursion: linked lists are long."""
        order, index = [root], {id(root): 0}
        table = []
        for value in order:  # grows while it is walked
            attributes = {}
            for name, item in vars(value).items():
                if type(item).__module__ == "__main__" and hasattr(item, "__dict__"):
                    if id(item) not in index:
                        index[id(item)] = len(order)
                        order.append(item)
                    attributes[name] = {"ref": index[id(item)]}
                else:
                    attributes[name] = self.codec.encode(item)
            table.append([type(value).__name__, attributes])
        return {"objects": [table, 0]}

    def _inside(self, tag: str, payload: Any) -> Any:
        if tag != "handle":
            raise ValueError(f"unknown kind of value {tag!r}"[:100])
        number, type_name = int(payload[0]), str(payload[1])
        if number not in self.known:
            self.known[number] = Remote(self, number, type_name)
        if type_name == "coroutine":
            return _awaitable(self, self.known[number])
        return self.known[number]


class Remote:
    """An object that stays in the program's process. Equality and order are between two of them only. Arithmetic must
    give another: no number can be had by it, so ``abs(result - 2.5) < 1e-6`` fails on a Remote."""

    __slots__ = ("_link", "_number", "_type_name", "__weakref__")

    def __init__(self, link: Link, number: int, type_name: str) -> None:
        for name, value in (("_link", link), ("_number", number), ("_type_name", type_name)):
            object.__setattr__(self, name, value)

    def _do(self, operation: str, *args: Any) -> Any:
        return object.__getattribute__(self, "_link").operation(operation, self, *args)

    def _exact(self, kind: type, operation: str, *args: Any) -> Any:
        result = self._do(operation, *args)
        if type(result) is not kind:
            raise TypeError(f"{operation} of the program's object gave a {type(result).__name__}")
        return result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__name__", "__doc__", "__dict__", "__annotations__"):
            raise AttributeError(name)
        if name in SEARCHES and not object.__getattribute__(self, "_link").knows_class(self):
            kind = object.__getattribute__(self, "_type_name")
            raise AttributeError(f"{name}() of a {kind}, which the tests do not know by name, decides nothing")
        return self._do("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._do("setattr", name, value)

    def __delattr__(self, name: str) -> None:
        self._do("delattr", name)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return object.__getattribute__(self, "_link").call(self, args, keywords, False)

    def __eq__(self, other: object) -> Any:
        return self._exact(bool, "eq", other) if isinstance(other, Remote) else NotImplemented

    def __hash__(self) -> int:
        return hash(object.__getattribute__(self, "_number"))

    def __lt__(self, other: object) -> Any:
        return self._exact(bool, "lt", other) if isinstance(other, Remote) else NotImplemented

    def __le__(self, other: object) -> Any:
        return self._exact(bool, "le", other) if isinstance(other, Remote) else NotImplemented

    def __bool__(self) -> bool:
        return bool(self._exact(bool, "bool"))

    def __len__(self) -> int:
        return int(self._exact(int, "len"))

    def __iter__(self) -> Any:
        return self._exact(Remote, "iter")

    def __next__(self) -> Any:
        return self._do("next")

    def __getitem__(self, key: Any) -> Any:
        return self._do("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._do("setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        self._do("delitem", key)

    def __contains__(self, item: Any) -> bool:
        """The program's own method where the tests know the class by name. An object of another one, returned where
        the tests look for a plain value, is searched here: its method would hear what is looked for and say yes."""
        if object.__getattribute__(self, "_link").knows_class(self) or isinstance(item, Remote):
            return bool(self._exact(bool, "contains", item))
        return any(found is item or found == item for found in self)

    def __str__(self) -> str:
        return str(self._exact(str, "str"))

    def __repr__(self) -> str:
        return str(self._exact(str, "repr"))

    def __enter__(self) -> Any:
        return self._do("enter")

    def __exit__(self, *_: object) -> None:
        self._do("exit")

    def __mro_entries__(self, bases: Any) -> Any:
        raise TypeError("tests cannot derive from a class of the program's")

    def __instancecheck__(self, instance: object) -> bool:
        if not isinstance(instance, Remote):
            return False
        return bool(object.__getattribute__(self, "_link").operation("isinstance", instance, self) is True)


def _arithmetic(operation: str, *, turned: bool = False) -> Callable[..., Any]:
    def method(self: Remote, *others: Any) -> Any:
        operands = (*others, self) if turned else (self, *others)
        result = object.__getattribute__(self, "_link").operation(operation, *operands)
        return result if isinstance(result, Remote) else NotImplemented

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(Remote, f"__{_name}__", _arithmetic(_name))
    setattr(Remote, f"__r{_name}__", _arithmetic(_name, turned=True))
setattr(Remote, "__neg__", _arithmetic("neg"))  # noqa: B010


def _awaitable(link: Link, coroutine: Remote) -> Coroutine[Any, Any, Any]:
    """Stands for a coroutine of the program: awaiting it runs the whole of it over there."""

    async def wait() -> Any:
        return link.operation("await", coroutine)

    return wait()


def raised(
    failure: Failed, known: dict[str, type[Exception]] | None = None, *, may_end_iteration: bool = False
) -> BaseException:
    """The nearest exception of an error in the program that the tests know, marked: one of its own classes (``known``)
    or a builtin. What is no Exception (SystemExit, KeyboardInterrupt, GeneratorExit) becomes RuntimeError: a program
    must not end the tests. So does StopIteration of anything but next(), as in a generator (PEP 479): ``all(map(f,
    xs))`` would take it for the end of xs."""
    for name in (*failure.classes[:64], "RuntimeError"):
        base = (known or {}).get(name) or getattr(builtins, name, None)
        if not (isinstance(base, type) and issubclass(base, Exception)):
            continue
        if issubclass(base, StopIteration | StopAsyncIteration) and not may_end_iteration:
            return _marked("RuntimeError", RuntimeError, f"the program raised {name}", failure.number)
        try:
            return _marked(name, base, failure.message or name, failure.number)
        except TypeError:  # UnicodeError and ExceptionGroup take more than a message; their bases do not
            continue
    return Gone("the program's process answers nonsense")


def _marked(name: str, base: type[Exception], message: str, number: int | None) -> BaseException:
    error: BaseException = type(name, (base, FromProgram), {})(message)
    error.number = number  # type: ignore[attr-defined]
    return error


def _is_exception(name: str) -> bool:
    kind = getattr(builtins, name, None)
    return isinstance(kind, type) and issubclass(kind, Exception)


def _overwrite(target: Any, value: Any) -> None:
    """Carry a change of an argument back into the tests' own object."""
    if type(target) is not type(value):
        return
    if type(target) in (list, bytearray):
        target[:] = value
    elif type(target) in (dict, set, collections.deque):
        target.clear()
        (target.extend if type(target) is collections.deque else target.update)(value)
