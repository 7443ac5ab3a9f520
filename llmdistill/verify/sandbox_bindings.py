"""Names of the tests that are the program's: bound before the tests run, and again when a call changed their values.

The program is asked for the names that the tests use, can answer for no others, and never for what the tests define.
"""

from __future__ import annotations

import builtins
import importlib
from typing import Any

from llmdistill.verify.sandbox_remote import SHARED_MODULES, Link, Remote

_HOMES = SHARED_MODULES | {"_collections", "_functools", "_heapq"}


class Bindings:
    """The tests' globals as far as the program provides them.

    Args:
        link: the conversation with the program.
        names: the tests' globals.
        root: the entry point's name, which the program provides even where it is a builtin's.
        stored: what the tests assign. Nothing that the program does later changes it: a counter of failures that both
            set to 0 would look as if it were still the program's.
    """

    def __init__(self, link: Link, names: dict[str, Any], root: str, stored: set[str]) -> None:
        self.link, self.names, self.root, self.stored = link, names, root, stored
        self.found: dict[str, Any] = {}  # what the program provided, by name, as it was bound last
        self._asked: set[str] = set()
        link.rebind = self.rebind

    def bind(self, wanted: set[str]) -> None:
        """Ask for all of these. Raises Gone for an answer that is none."""
        order = sorted(wanted)
        answers = self.link.ask("names", order)
        if type(answers) is not list or len(answers) != len(order):
            raise self.link.lost("the program's process answers nonsense")
        self._asked = wanted
        for name, description in zip(order, answers, strict=True):
            self._bind(name, description)

    def rebind(self, changed: list[Any]) -> None:
        """Take over what a call did to the program's own globals, where the tests have not rebound them."""
        for name, description in changed:
            untouched = name in self.found and self.names.get(name) is self.found[name]
            absent = name not in self.found and name not in self.names
            if name in self._asked - self.stored and name != self.root and (untouched or absent):
                self._bind(name, description)

    def _bind(self, name: str, description: Any) -> None:
        if description is None:
            return
        kind, payload = str(description[0]), description[1]
        if kind == "exception":  # a class to catch by, which raised() uses from now on
            self._take(name, self.link.exception(name, [str(word) for word in payload]))
        elif kind == "module":
            self._module(name, str(payload))
        elif kind == "from" and name != self.root and payload in _HOMES and self._own_function(name, payload):
            return
        else:
            if kind == "class" and _is_name_of_a_class(name):
                self.link.classes.add(str(payload))
            self._take(name, self.link.value(description[-1]))

    def _take(self, name: str, value: Any) -> None:
        self.names[name] = self.found[name] = value

    def _module(self, name: str, path: str) -> None:
        """The judge's own module. A name that is a module's is that module's: ``math`` is not what the program says."""
        path = name if name in SHARED_MODULES else path
        if path.partition(".")[0] in SHARED_MODULES:
            self.names[name] = importlib.import_module(path)

    def _own_function(self, name: str, home: str) -> bool:
        own = importlib.import_module(home.lstrip("_"))
        if not hasattr(own, name):
            return False
        self.names[name] = getattr(own, name)
        return True

    def constants(self) -> set[str]:
        """Names that the program provided as plain values, or types: ``to_text = str``."""
        return {name for name, value in self.found.items() if not isinstance(value, Remote)}


def _is_name_of_a_class(name: str) -> bool:
    """Whether tests that use it mean a class, whose objects they then ask what these hold. ``f`` is a function's name,
    whatever the program makes of it, and Solution holds nothing."""
    return name.lstrip("_")[:1].isupper() and name != "Solution"


def askable(used: set[str], root: str) -> set[str]:
    """The names worth asking for: not builtins, except for the entry point."""
    return {name for name in used if name == root or not hasattr(builtins, name)}
