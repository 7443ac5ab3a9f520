"""The process that runs the program under judgement. It never sees the tests: it answers calls.

Whatever the program does to this interpreter (builtins, modules, frames, the objects below), it can only change which
plain values it answers with. It is confined before any of this runs.
"""

from __future__ import annotations

import atexit
import builtins
import importlib
import inspect
import io
import json
import operator
import os
import re
import sys
import threading
import traceback
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

from llmdistill.verify.sandbox_surroundings import surround
from llmdistill.verify.sandbox_wire import Channel, Closed, Codec, Peer, describe_exception

OUT_OF_MEMORY = 77  # exit status of a stdin program that ran into its memory limit

_OPERATIONS: dict[str, Callable[..., Any]] = {
    **{
        name: getattr(operator, name) for name in ("eq", "lt", "le", "contains", "getitem", "setitem", "delitem", "neg")
    },
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")},
    **{name: getattr(operator, f"{name}_") for name in ("and", "or")},
    "xor": operator.xor,
    **{name: getattr(builtins, name) for name in ("getattr", "setattr", "delattr", "len", "iter", "next", "bool")},
    **{name: getattr(builtins, name) for name in ("str", "repr", "isinstance")},
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value: type(value).__exit__(value, None, None, None),
    "await": lambda value: importlib.import_module("asyncio").run(value),
}
_PRINTED_AT_MOST = 1 << 20
_WATCHED_AT_MOST = 1 << 16  # characters of a global that is compared after each call: tables are taken to be constant


class _Printed(io.BytesIO):
    """What a call prints, up to a limit; the rest is dropped."""

    def write(self, data: Any) -> int:
        if self.tell() < _PRINTED_AT_MOST:
            super().write(data)
        return len(data)

    def take(self) -> str:
        text = self.getvalue().decode("utf-8", "replace")
        self.seek(0)
        self.truncate()
        return text


def run_script(program: str) -> NoReturn:
    """As ``python program.py``: __main__, standard input and output; ends the process with the program's status."""
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "wb", closefd=False)), "utf-8", errors="replace")
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "wb", closefd=False), "utf-8", errors="replace", write_through=True)
    # The stream under stdin is buffered as usual: programs read sys.stdin.buffer.
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "rb", closefd=False)), "utf-8", errors="replace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr  # type: ignore[misc]
    output = sys.stdout
    atexit._clear()
    module = _module("__main__")
    surround(module)
    status = 0
    try:
        exec(_compiled(program), module.__dict__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException as error:
        status = OUT_OF_MEMORY if isinstance(error, MemoryError) else 1
        _show(error)
    with suppress(BaseException):  # as the interpreter does when a script ends: threads, then exit functions
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
    for stream in (sys.stdout, output):
        try:
            stream.flush()
        except BaseException as error:
            status = status or 1
            _show(error)
    os._exit(status & 0xFF)


def _compiled(program: str) -> types.CodeType:
    return compile(program.removeprefix("\ufeff"), "<program>", "exec")  # as from a file that begins with a BOM


def _show(error: BaseException) -> None:
    with suppress(BaseException):
        text = "".join(traceback.format_exception_only(error))[-1500:]
        os.write(2, text.encode("utf-8", "replace"))


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    return module


def answer_calls(program: str, preamble: str, read_fd: int, write_fd: int) -> NoReturn:
    """Load the program as a module (its ``__main__`` block does not run), then answer the judge until it hangs up."""
    channel = Channel(read_fd, write_fd)
    module = _module("solution")
    surround(module)
    printed = _Printed()
    sys.stdout = io.TextIOWrapper(printed, "utf-8", errors="replace", write_through=True)
    with suppress(Closed):
        try:
            exec(compile(preamble, "<preamble>", "exec"), module.__dict__)
            exec(_compiled(program), module.__dict__)
        except BaseException as error:
            channel.send(["failed", *describe_exception(error)])
            os._exit(1)
        channel.send(["loaded"])
        _Server(module, channel, printed).peer.listen()
    os._exit(0)


class _Server:
    def __init__(self, module: types.ModuleType, channel: Channel, printed: _Printed) -> None:
        self.names: Mapping[str, Any] = module.__dict__
        self.printed = printed
        self.peer = Peer(channel, self.serve)
        self.codec = Codec(self._outside, self._inside)
        self.objects: dict[int, Any] = {}  # by id; held, so that an id is never used twice
        self.watched: dict[str, str] = {}  # globals that the tests have as plain values, or miss: what they were told

    def serve(self, request: list[Any]) -> Any:
        kind, *rest = request
        decode, encode = self.codec.decode, self.codec.encode
        if kind == "names":
            return [self._describe(name) for name in rest[0]]
        if kind == "operation":
            return [encode(_OPERATIONS[rest[0]](*self.codec.decode_all(rest[1]))), self._changed_globals()]
        if kind == "entry":
            return encode(self._entry(rest[0], *(decode(form) for form in rest[1:])))
        _, target, forms, keywords, carry_back = request
        positional = self.codec.decode_all(forms)
        result = decode(target)(*positional, **{name: decode(form) for name, form in keywords.items()})
        # Encoded before anything else runs: a generator or a view would change with the arguments.
        answer = encode(result)
        changed = []
        if carry_back:
            after = [encode(value) for value in positional]
            changed = [[i, form] for i, form in enumerate(after) if form != forms[i]]
        return [answer, changed, self.printed.take() if self.printed.tell() else "", self._changed_globals()]

    def _entry(self, path: str, positional: list[Any], named: dict[str, Any]) -> Any:
        """Call "Solution().method" on a fresh instance, or "name", a method of class Solution or else a function. Named
        arguments go by name where the signature has these names, else in the order given."""
        match = re.fullmatch(r"\s*(\w+)\(\)\.(\w+)\s*", path)
        owner, name = match.groups() if match else ("Solution", path.strip())
        if hasattr(self.names.get(owner), name):  # first: the preamble has functions of many names
            function = getattr(self.names[owner](), name)
        elif callable(self.names.get(name)):
            function = self.names[name]
        else:
            raise NameError(f"the program defines no {path}")
        if named:
            try:
                inspect.signature(function).bind(*positional, **named)
            except (TypeError, ValueError):
                return function(*positional, *named.values())
        return function(*positional, **named)

    def _describe(self, name: str) -> Any:
        """What the tests should see under this name: [kind, ...], or None where the program has nothing."""
        value = self.names.get(name, self)
        description = self._description(name, value)
        if description is None or description[0] == "value" and not callable(value):
            text = json.dumps(description)
            if len(text) <= _WATCHED_AT_MOST:
                self.watched[name] = text
        return description

    def _description(self, name: str, value: Any) -> Any:
        if value is self:
            return None
        if isinstance(value, types.ModuleType):
            return ["module", value.__name__]
        if isinstance(value, type) and issubclass(value, Exception) and not hasattr(builtins, name):
            return ["exception", [kind.__name__ for kind in value.__mro__]]
        origin = getattr(value, "__module__", None)
        if callable(value) and isinstance(origin, str) and origin != "solution":
            return ["from", origin, self.codec.encode(value)]
        if isinstance(value, type):
            return ["class", value.__name__, self.codec.encode(value)]
        return ["value", self.codec.encode(value)]

    def _changed_globals(self) -> list[Any]:
        """[name, description] of what has another value than the tests know."""
        told = list(self.watched.items())
        return [[name, now] for name, text in told if json.dumps(now := self._describe(name)) != text]

    def _outside(self, value: Any) -> dict[str, Any]:
        self.objects[id(value)] = value
        return {"handle": [id(value), type(value).__name__]}

    def _inside(self, tag: str, payload: Any) -> Any:
        if tag == "handle":
            return self.objects[payload]
        if tag == "from":
            return getattr(importlib.import_module(payload[0]), payload[1])
        if tag == "iterator":
            return iter(self.codec.decode_all(payload))
        if tag == "callback":
            return self._callback(payload)
        if tag == "objects":
            return self._instances(*payload)
        raise ValueError(f"unknown kind of value {tag!r}")

    def _callback(self, number: int) -> Callable[..., Any]:
        def call_the_tests(*args: Any) -> Any:
            return self.codec.decode(self.peer.ask("callback", number, [self.codec.encode(arg) for arg in args]))

        return call_the_tests

    def _instances(self, table: list[Any], root: int) -> Any:
        """Objects of classes that the preamble defines on both sides (ListNode), which may refer to each other."""
        made = [object.__new__(self.names[name]) for name, _ in table]

        def value(form: Any) -> Any:
            return made[form["ref"]] if type(form) is dict and "ref" in form else self.codec.decode(form)

        for instance, (_, attributes) in zip(made, table, strict=True):
            for name, form in attributes.items():
                object.__setattr__(instance, name, value(form))
        return made[root]
