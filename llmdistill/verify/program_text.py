"""Reading text that may be Python: strings and brackets line by line, and what of it parses.

Everything here is linear in the text. Parsing costs more than that, and is bounded by a budget of characters that one
completion may spend, whatever it looks like.
"""

from __future__ import annotations

import ast
import re
import warnings
from typing import Literal

PYTHON = frozenset({"python", "py", "python3", "py3", "ipython", "ipython3"})
"""What the code of a fenced block may be called."""

PARSED_AT_MOST = 1_200_000  # characters, all tries of one completion together: a few seconds
_TRIES = 40
_SHORT_TRIES = 6  # line by line; then statement by statement
_DIGITS = re.compile(r"[0-9]{4000,}")  # what Python refuses to read as a number is no error of the program's
_TOKEN = re.compile(r"#|\"\"\"|'''|\"|'|[()\[\]{}]")
_ONE_LINE = {'"': re.compile(r'"(?:[^"\\]|\\.)*"'), "'": re.compile(r"'(?:[^'\\]|\\.)*'")}
_TRIPLE = {'"""': re.compile(r'\\.|"""'), "'''": re.compile(r"\\.|'''")}
_TELLING: tuple[type[ast.stmt], ...] = (
    *(ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AugAssign),
    *(ast.AnnAssign, ast.For, ast.While, ast.If, ast.With, ast.Try),
)

LineEnd = Literal["code", "comment", "string"]


class Lines:
    """What is open at the end of the lines that were fed: a triple-quoted string, brackets."""

    def __init__(self) -> None:
        self.quote = ""  # the three marks, while a string is open
        self.depth = 0

    @property
    def inside(self) -> bool:
        """Whether the next line belongs to the same statement as the last."""
        return bool(self.quote) or self.depth > 0

    def feed(self, line: str) -> LineEnd:
        """Read one line. Returns in what it ends."""
        at = 0
        while True:
            if self.quote:
                end = next((m for m in _TRIPLE[self.quote].finditer(line, at) if m.group() == self.quote), None)
                if end is None:
                    return "string"
                self.quote, at = "", end.end()
            token = _TOKEN.search(line, at)
            if token is None:
                return "code"
            mark, at = token.group(), token.end()
            if mark == "#":
                return "comment"
            if mark in _TRIPLE:
                self.quote = mark
            elif mark in _ONE_LINE:
                string = _ONE_LINE[mark].match(line, token.start())
                if string is None:
                    return "string"  # never closed: an apostrophe of prose, or a line that goes on after a backslash
                at = string.end()
            else:
                self.depth = max(0, self.depth + (1 if mark in "([{" else -1))

    def copy(self) -> Lines:
        twin = Lines()
        twin.quote, twin.depth = self.quote, self.depth
        return twin


class Parser:
    """ast.parse within a budget of characters; what is beyond it counts as text that does not parse."""

    def __init__(self, budget: int = PARSED_AT_MOST) -> None:
        self.left = budget

    def parse(self, code: str) -> tuple[ast.Module | None, int]:
        """The tree, or None and the line of the error (0: nowhere in particular)."""
        if len(code) > self.left:
            return None, 0
        self.left -= len(code) + 100
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about escapes in strings
                return ast.parse(_DIGITS.sub("1", code)), 0
        except SyntaxError as error:
            return None, max(1, error.lineno or 1)
        except (ValueError, RecursionError, MemoryError):
            return None, 0

    def tree(self, code: str) -> ast.Module | None:
        return self.parse(code)[0]

    def longest_part(self, code: str) -> str | None:
        """The longest beginning, in lines, that is Python; each try goes back to before the error."""
        lines = code.split("\n")
        for number in range(_TRIES):
            tree, error = self.parse("\n".join(lines))
            if tree is not None:
                return "\n".join(lines) + "\n" if "".join(lines).strip() else None
            if not error:
                return None
            kept = min(len(lines), error) - 1
            if number >= _SHORT_TRIES:
                while kept > 0 and (not lines[kept] or lines[kept][0].isspace()):
                    kept -= 1
            lines = lines[:kept]
        return None

    def tells(self, code: str) -> bool:
        """Whether text is a program: "Sure" parses as well."""
        tree = self.tree(code)
        return tree is not None and any(
            isinstance(node, _TELLING) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
            for node in tree.body
        )


def defines(code: str, entry_point: str) -> bool:
    """Whether the code has the entry point at its top level; for "Solution().method" the class or the bare function
    will do. By text, so that code with an error further down counts."""
    names = [re.escape(name) for name in re.findall(r"\w+", entry_point)]
    any_name = "|".join(names)
    start = rf"^(?:async[ \t]+def|def|class)[ \t]+(?:{any_name})\b|^{names[0]}[ \t]*(?::[^\n=]*)?=[^=]"
    return re.search(start, code, re.M) is not None
