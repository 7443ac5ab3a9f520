"""Fenced blocks of a completion, as models write them: fences within docstrings, glued to code, begun in the prompt.

A block is closed by a bare fence of the same mark, at least as long as its own, that does not stand in a string of the
block's. Where reading strings leads nowhere (prose with stray quotes), the first such fence closes it after all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmdistill.verify.program_text import PYTHON, Lines, Parser

_CODE = re.compile(
    r"(?:from[ \t]+\S+[ \t]+import\b|import[ \t]+\w|(?:async[ \t]+)?def[ \t]+\w|class[ \t]+\w|@\w|print\()"
)
_WORD = re.compile(r"[A-Za-z][\w+#.-]*")
_GLUED_WORD = re.compile(r"[ \t]*python3?(?=(?:def|class|import|from|async)[ \t])", re.I)  # ```pythondef f(x):
_REJECTED_AT_MOST = 3  # blocks whose strings led nowhere; then strings are not looked at any more


def begins_code(line: str) -> bool:
    """Whether a line at the left margin looks like the first of a program."""
    return _CODE.match(line) is not None


@dataclass(frozen=True)
class Fence:
    """An opening or closing line: its marks, indentation, language, and what else stands behind them."""

    marks: str
    indent: int
    language: str
    rest: str

    @classmethod
    def read(cls, line: str) -> Fence | None:
        bare = line.lstrip(" \t")
        mark = bare[:1]
        if not bare.startswith(("```", "~~~")):
            return None
        info = bare.lstrip(mark)
        if mark == "`" and "`" in info:  # code within a line
            return None
        glued = _GLUED_WORD.match(info)
        if glued:
            return cls(mark * (len(bare) - len(info)), len(line) - len(bare), "python", info[glued.end() :].strip())
        words = _WORD.search(info[:200])
        language = words.group().lower() if words and not info[: words.start()].strip(" \t{.") else ""
        rest = info[words.end() :] if words and language else info
        return cls(mark * (len(bare) - len(info)), len(line) - len(bare), language, rest.strip())

    @property
    def bare(self) -> bool:
        return not self.language and not self.rest

    def closes(self, opening: Fence) -> bool:
        """Nothing behind it, or prose; never the start of another block."""
        same = self.marks.startswith(opening.marks)
        return same and (self.bare or (opening.language in PYTHON and bool(self.rest) and self.language not in PYTHON))


@dataclass(frozen=True)
class Block:
    """Code between fences, its language in small letters ("": untagged), and whether there was a closing fence."""

    code: str
    language: str
    closed: bool

    @property
    def python(self) -> bool:
        return self.language in PYTHON


def blocks(text: str, parser: Parser) -> list[Block]:
    """All fenced blocks, in order. What stands before a closing fence that nothing opened is one too, if it is a
    program: the prompt ended with the opening fence."""
    head, rest = _opened_before(text, parser)
    return [*head, *_Scan(rest, parser).blocks()]


def _opened_before(text: str, parser: Parser) -> tuple[list[Block], str]:
    head, marks, tail = text.partition("```")
    first, _, others = head.partition("\n")
    if first.strip().lower() in PYTHON:  # what stood behind the prompt's fence
        head = others
    fence = Fence.read(marks + tail.partition("\n")[0]) if marks else None
    if fence is None or fence.language in PYTHON or not head.strip() or not parser.tells(head):
        return [], text
    return [Block(head.rstrip("\n") + "\n", "python", True)], tail.partition("\n")[2]


class _Scan:
    def __init__(self, text: str, parser: Parser) -> None:
        self.lines, self.parser = text.split("\n"), parser
        self.rejected = 0

    def blocks(self) -> list[Block]:
        found: list[Block] = []
        at = 0
        while at < len(self.lines):
            opening = Fence.read(self.lines[at]) or _glued_opening(self.lines[at])
            at += 1
            if opening is not None:
                block, at = self._block(opening, at)
                found.append(block)
        return found

    def _block(self, opening: Fence, start: int) -> tuple[Block, int]:
        """The block that begins at this line, and the line after it."""
        aware = self.rejected < _REJECTED_AT_MOST and (opening.language in PYTHON or not opening.language)
        block, after, passed = self._until_fence(opening, start, aware)
        if passed is None:
            return block, after
        if block.closed and self.parser.tree(block.code) is not None:
            return block, after
        self.rejected += 1 if block.closed else _REJECTED_AT_MOST  # the whole rest was read: not a second time
        plain, after_plain, _ = self._until_fence(opening, start, False)
        return plain, after_plain

    def _until_fence(self, opening: Fence, start: int, aware: bool) -> tuple[Block, int, int | None]:
        """The block up to the fence that closes it (strings are read if ``aware``), the line after it, and the first
        closing fence that was passed over because it stood in a string."""
        state = Lines()
        body = [opening.rest] if opening.language in PYTHON and begins_code(opening.rest) else []
        passed: int | None = None
        for at in range(start, len(self.lines)):
            line = self.lines[at]
            fence = Fence.read(line)
            if fence is not None and aware and state.quote:
                passed = at if passed is None and fence.closes(opening) else passed
            elif fence is not None and fence.closes(opening):
                return _block(opening, body, closed=True), at + 1, passed
            elif fence is not None and fence.language in PYTHON:  # the one before was never closed: begin again
                return _block(opening, body, closed=False), at, passed
            elif (head := _glued_closing(line, opening, state)) is not None:
                return _block(opening, [*body, head], closed=True), at + 1, passed
            body.append(line)
            if aware:
                state.feed(line)
        return _block(opening, body, closed=False), len(self.lines), passed


def _glued_opening(line: str) -> Fence | None:
    """``Here it is: ```python`` at the end of a line of prose."""
    start = line.rfind("```")
    if start < 0 or line[start + 3 :].strip().lower() not in PYTHON:
        return None
    return Fence("```", 0, "python", "")


def _glued_closing(line: str, opening: Fence, state: Lines) -> str | None:
    """The code before marks at the end of a line of Python, where they stand in no string and no comment."""
    bare = line.rstrip()
    if opening.language not in PYTHON or not bare.endswith(opening.marks):
        return None
    head = bare.rstrip(opening.marks[0])
    return head if head.strip() and state.copy().feed(head) == "code" else None


def _block(opening: Fence, lines: list[str], *, closed: bool) -> Block:
    indent = opening.indent  # a block within a list item is indented with it
    code = "\n".join(line[indent:] if not line[:indent].strip() else line for line in lines)
    return Block(code + "\n", opening.language, closed)
