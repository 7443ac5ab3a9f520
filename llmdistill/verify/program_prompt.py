"""A prompt that is the beginning of a program (HumanEval), and completions that continue it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from llmdistill.verify.program_text import Lines, Parser, defines

_LATER = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)


@dataclass(frozen=True)
class BegunProgram:
    """The prompt's text, and what stands in it besides the entry point."""

    text: str
    entry_point: str
    helpers: str

    @classmethod
    def read(cls, prompt: str | None, entry_point: str | None) -> BegunProgram | None:
        """None for a prompt that is no Python or does not define the entry point: a question."""
        if not prompt or not entry_point or not defines(prompt, entry_point):
            return None
        code = prompt.replace("\r\n", "\n").rstrip() + "\n"
        parser = Parser()
        # A signature without a docstring is no whole function yet.
        tree = parser.tree(code) or parser.tree(code + "    pass\n")
        if tree is None:
            return None
        names = set(re.findall(r"\w+", entry_point))
        lines = code.split("\n")
        parts = []
        for node in tree.body:
            own = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name in names
            if not own and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
                parts.append("\n".join(lines[first - 1 : node.end_lineno]))
        return cls(prompt.replace("\r\n", "\n"), entry_point, "\n\n".join(parts))

    def complete(self, program: str) -> str:
        """The program after the prompt's imports and helpers; its own definitions come later and win."""
        if not self.helpers or program.startswith(self.text.strip()):
            return program
        future = re.compile(r"^from __future__ import .*$", re.M)  # these must come first
        return "\n".join([*future.findall(program), self.helpers, "", future.sub("", program)])

    def continued(self, body: str, parser: Parser) -> str | None:
        """The prompt, its function's body, and the functions and imports after it, up to anything else."""
        if not self.text.endswith("\n"):  # it ends within a line
            joined = parser.longest_part(self.text + body)
            if joined and len(joined) > len(self.text):
                return joined
        lines = body.split("\n")
        while lines and not lines[0].strip():
            lines.pop(0)
        if not lines:
            return None
        base = self.text.rstrip() + "\n"
        best: str | None = None
        for version in self._indented(lines):
            program = parser.longest_part(base + "\n".join(_body(version)))
            if program and len(program.rstrip()) > max(len(base.rstrip()), len(best or "")):
                best = program
        return best and self._with_later(best, body, parser)

    def _indented(self, lines: list[str]) -> Iterator[list[str]]:
        """The body as it stands; its first line moved to the function's indentation (a tokenizer ate the spaces);
        all of it moved there."""
        margin = self._margin()
        if "\n\t" not in self.text:  # the prompt indents by blanks: tabs among them are an error
            lines = list(_without_tabs(lines))
        yield lines
        yield [" " * margin + lines[0].lstrip(" \t"), *lines[1:]]
        shift = margin - _indent(lines[0])
        if shift:
            yield list(_shifted(lines, shift))

    def _margin(self) -> int:
        """The indentation of the prompt's last line: the docstring's, or one level within the signature."""
        lines = [line for line in self.text.rstrip().split("\n") if line.strip()]
        last = lines[-1]
        return _indent(last) + (4 if last.rstrip().endswith(":") else 0) or 4

    def _with_later(self, program: str, body: str, parser: Parser) -> str:
        """The program and the functions, classes and imports that follow the body: it may call them."""
        tail = body.split("\n")
        kept = len(program.rstrip("\n").split("\n")) - len(self.text.rstrip().split("\n"))
        while tail and not tail[0].strip():
            tail.pop(0)
        rest = "\n".join(tail[kept:])
        part = parser.longest_part(rest) if rest.strip() else None
        tree = parser.tree(part) if part else None
        if tree is None or part is None:
            return program
        names, last = set(re.findall(r"\w+", self.entry_point)), 0
        for node in tree.body:
            if not isinstance(node, _LATER) or getattr(node, "name", None) in names:
                break
            last = node.end_lineno or 0
        return program + "\n".join(part.split("\n")[:last]) + "\n" if last else program


def _body(lines: list[str]) -> list[str]:
    """The indented lines at the beginning, with those at the margin that belong to a string, a bracket or a comment."""
    state = Lines()
    kept: list[str] = []
    for line in lines:
        goes_on = state.inside or (kept and kept[-1].endswith("\\"))
        if line.strip() and not line[0].isspace() and not goes_on and not line.startswith("#"):
            break
        state.feed(line)
        kept.append(line)
    return kept


def _without_tabs(lines: list[str]) -> Iterator[str]:
    state = Lines()
    for line in lines:
        bare, inside = line.lstrip(" \t"), bool(state.quote)
        state.feed(line)
        yield line if inside or not bare else " " * _indent(line) + bare


def _indent(line: str) -> int:
    expanded = line.expandtabs(4)
    return len(expanded) - len(expanded.lstrip(" "))


def _shifted(lines: list[str], shift: int) -> Iterator[str]:
    """Every line that begins a statement, moved; lines within strings and brackets stay."""
    state = Lines()
    for line in lines:
        inside = state.inside
        state.feed(line)
        if inside or not line.strip():
            yield line
        elif shift > 0:
            yield " " * shift + line
        else:
            yield line[min(-shift, len(line) - len(line.lstrip(" "))) :]
