"""The program in a completion: fenced, bare, or the continuation of a function that the prompt began.

Simplified away: programs spread over several fenced blocks; languages other than Python.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

_FENCE = re.compile(r"^[ \t]*(?P<marks>`{3,}|~{3,})[ \t]*(?P<info>[^`\n]*)$")
_PYTHON = {"python", "py", "python3", "py3"}
_CODE_LINE = re.compile(r"(?:from\s+\S+\s+import\b|import\s+\w|(?:async\s+)?def\s+\w|class\s+\w|@\w)")
_TELLING: tuple[type[ast.stmt], ...] = (
    ast.Import,
    ast.ImportFrom,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AugAssign,
)
_TELLING += (ast.AnnAssign, ast.For, ast.While, ast.If, ast.With, ast.Try)


def extract_program(completion: str, *, entry_point: str | None = None, prompt: str | None = None) -> str | None:
    """The program that a completion means, or None where it holds none.

    What comes up to the last ``</think>`` is left out; a completion that never stops thinking holds no program. Then,
    the first of these that there is: the last complete fenced block that defines the entry point (without an entry
    point: the last complete Python block); a fenced block that was cut off, or whose opening fence was part of the
    prompt; bare code, with prose around it cut; with ``prompt``, the body that continues it, up to the first line
    that is not indented.

    Args:
        completion: the model's text, without the prompt.
        entry_point: the function, or "Solution().method", that the tests call; None for whole programs.
        prompt: of a completion task, the code that it continues (HumanEval). Its imports and helper functions are
            put before a program that defines the entry point anew, which is never doubled. A prompt that is no
            Python (a question) is of no use here and does no harm.
    """
    text = completion.rpartition("</think>")[2]
    if "<think>" in text:  # opened and never closed: what follows are thoughts
        return None
    text = text.replace("\r\n", "\n")
    begun = _Prompt.read(prompt, entry_point)
    blocks = _blocks(text)
    program = _fenced(blocks, entry_point)
    if program is None and not any(block.closed for block in blocks):
        program = _opened_in_prompt(text, entry_point, begun) or _bare(text, entry_point)
    if program is not None and (entry_point is None or _defines(program, entry_point)):
        return begun.complete(program) if begun else program
    if begun:
        body = next((block.code for block in reversed(blocks) if block.closed), text)
        if continued := begun.continued(body):
            return continued
    if program is None and blocks:
        program = blocks[-1].code  # it lacks the entry point: let the verdict say so
    return program if program and program.strip() else None


@dataclass(frozen=True)
class _Block:
    code: str
    language: str
    closed: bool


def _blocks(text: str) -> list[_Block]:
    """Fenced blocks in order. A fence is closed by one of the same mark, at least as long and bare."""
    found: list[_Block] = []
    opening: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.split("\n"):
        fence = _FENCE.match(line)
        if opening is None:
            if fence:
                opening, lines = fence, []
        elif fence and not fence["info"].strip() and fence["marks"].startswith(opening["marks"]):
            found.append(_block(opening, lines, closed=True))
            opening = None
        elif fence and fence["info"].strip().lower() in _PYTHON:  # the one before was never closed: begin again
            found.append(_block(opening, lines, closed=False))
            opening, lines = fence, []
        else:
            lines.append(line)
    if opening is not None:
        found.append(_block(opening, lines, closed=False))
    return found


def _block(opening: re.Match[str], lines: list[str], *, closed: bool) -> _Block:
    indent = len(opening.group()) - len(opening.group().lstrip())  # a block within a list item is indented with it
    code = "\n".join(line[indent:] if not line[:indent].strip() else line for line in lines)
    info = opening["info"].strip().lower()
    return _Block(code + "\n", re.split(r"[\s{:,]", info)[0], closed)


def _fenced(blocks: list[_Block], entry_point: str | None) -> str | None:
    code = [block for block in blocks if block.language in _PYTHON or (not block.language and _parses(block.code))]
    code = code or [block for block in blocks if not block.language]
    for closed in (True, False):
        candidates = [block for block in code if block.closed is closed and block.code.strip()]
        if entry_point is not None:
            candidates = [block for block in candidates if _defines(block.code, entry_point)]
        elif any(block.language in _PYTHON for block in candidates):  # untagged ones are examples of output, mostly
            candidates = [block for block in candidates if block.language in _PYTHON]
        if candidates:
            last = candidates[-1].code
            return last if closed else _parseable_part(last) or last
    return None


def _opened_in_prompt(text: str, entry_point: str | None, begun: _Prompt | None) -> str | None:
    """Code up to a lone closing fence: the prompt ended with the opening one."""
    head, fence, _ = text.partition("\n```")
    if not fence or text.lstrip().startswith("```") or not _parses(head):
        return None
    return head + "\n" if _tells(head) and (entry_point is None or _defines(head, entry_point)) else None


def _bare(text: str, entry_point: str | None) -> str | None:
    """Code without fences: from the first line that looks like code to the last that parses."""
    if _FENCE.search(text) and "\n```" in text:
        text = text.partition("\n```")[0]
    lines = text.split("\n")
    starts = [0] + [i for i, line in enumerate(lines) if i and _CODE_LINE.match(line)]
    for start in starts[:20]:
        part = _parseable_part("\n".join(lines[start:]))
        if part and _tells(part) and (entry_point is None or _defines(part, entry_point)):
            return part
    return None


def _parseable_part(code: str) -> str | None:
    """The longest beginning, in lines, that is Python; each try goes back to before the line of the error."""
    lines = code.split("\n")
    for _ in range(200):
        try:
            ast.parse("\n".join(lines))
        except SyntaxError as error:
            lines = lines[: max(0, min(len(lines), error.lineno or 1) - 1)]
            if not lines:
                return None
        except (ValueError, RecursionError, MemoryError):
            return None
        else:
            return "\n".join(lines) + "\n" if "".join(lines).strip() else None
    return None


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _tells(code: str) -> bool:
    """Whether parseable text is a program: "Sure" parses as well."""
    body = ast.parse(code).body
    return any(isinstance(n, _TELLING) or (isinstance(n, ast.Expr) and isinstance(n.value, ast.Call)) for n in body)


def _defines(code: str, entry_point: str) -> bool:
    """Whether the code has the entry point at its top level; for "Solution().method" the class or the bare function
    will do. By text, so that code with an error further down counts."""
    names = [re.escape(name) for name in re.findall(r"\w+", entry_point)]
    return (
        re.search(rf"^(?:async\s+def|def|class)\s+(?:{'|'.join(names)})\b|^{names[0]}\s*=[^=]", code, re.M) is not None
    )


@dataclass(frozen=True)
class _Prompt:
    """A prompt that is the beginning of the program: its text, and what stands in it besides the entry point."""

    text: str
    entry_point: str
    helpers: str

    @classmethod
    def read(cls, prompt: str | None, entry_point: str | None) -> _Prompt | None:
        if not prompt or not entry_point or not _defines(prompt, entry_point):
            return None
        code = prompt.replace("\r\n", "\n").rstrip() + "\n"
        try:
            tree = ast.parse(code)
        except SyntaxError:  # a signature without a docstring is no whole function yet
            try:
                tree = ast.parse(code + "    pass\n")
            except SyntaxError:
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

    def continued(self, body: str) -> str | None:
        """The prompt and its function's body: the indented lines that come next."""
        if not self.text.endswith("\n"):
            whole = self.text + body
            joined = _parseable_part(whole)
            if joined and len(joined) > len(self.text):
                return joined
        lines = body.split("\n")
        while lines and not lines[0].strip():
            lines.pop(0)
        if not lines:
            return None
        indented = ["    " + lines[0], *lines[1:]]  # a tokenizer ate the first line's spaces
        shifted = ["    " + line for line in lines]  # the body alone, at the left margin
        for version in (lines, indented, shifted):
            kept = []
            for line in version:
                if line.strip() and not line[0].isspace():
                    break
                kept.append(line)
            program = _parseable_part(self.text.rstrip() + "\n" + "\n".join(kept))
            if program and any(line.strip() for line in kept) and len(program.rstrip()) > len(self.text.rstrip()):
                return program
        return None
