"""Options of a command line: written as the settings are called (``--max_model_len``), taken with dashes as well."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Container, Iterable, Sequence
from typing import Any, NoReturn

from llmdistill.errors import UserError


class OptionParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that takes dashes for underscores and the other way round, no abbreviations, and says what
    is wrong in a line.

    Raises:
        UserError: where argparse would print its usage and exit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(as_declared(words, self._option_string_actions), namespace)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {in_our_words(message)}. Fix: {self.prog} --help lists the settings.")


def in_our_words(message: str) -> str:
    """What argparse says of a value that is no number."""
    found = re.fullmatch(r"argument (\S+): invalid (int|float) value: (.*)", message, re.DOTALL)
    if found is None:
        return message
    name, kind, value = found.groups()
    return f"{name} is {value}; it must be a {'whole ' * (kind == 'int')}number"


def as_declared(words: Iterable[str], declared: Container[str]) -> list[str]:
    """The words, with the names of options in the form in which they are declared."""
    return [_as_declared(word, declared) if word.startswith("--") else word for word in words]


def underscored(name: str) -> str:
    """The name of a setting as it is declared: ``rollouts.max_new_tokens`` of ``rollouts.max-new-tokens``. What stands
    before the last dot may be a name of the user's."""
    section, dot, key = name.rpartition(".")
    return section + dot + key.replace("-", "_")


def _as_declared(word: str, declared: Container[str]) -> str:
    name, given, value = word.partition("=")
    body = name[2:]
    forms = (name, f"--{body.replace('-', '_')}", f"--{body.replace('_', '-')}")
    return next((form for form in forms if form in declared), name) + given + value
