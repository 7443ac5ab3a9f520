"""The program in a completion: fenced, bare, or the continuation of a function that the prompt began.

The text is a model's and may be anything: the rules are linear in its length, parsing has a budget (program_text.py),
and grading runs all of it in a confined process with a time limit (llmdistill.verify.code.find_program).

Simplified away: programs spread over several fenced blocks; languages other than Python.
"""

from __future__ import annotations

import ast
import builtins
import re

from llmdistill.verify.program_blocks import Block, begins_code, blocks
from llmdistill.verify.program_prompt import BegunProgram
from llmdistill.verify.program_text import PYTHON, Parser, defines

LONGEST_TEXT = 1 << 20
"""Characters of a completion that are looked at: its last ones."""

_STARTS = 20  # lines at which bare code is tried to begin
_TAG = re.compile(
    r"[ \t]*(?:\[(/?)(?:PYTHON|CODE|ANSWER|BEGIN|DONE|END)\]|<(/?)(?:python|code|answer|solution)>)[ \t]*", re.I
)
_INLINE_TAG = re.compile(r"^([ \t]{0,9}\[(?:PYTHON|CODE)\])[ \t]+(?=\S)", re.I | re.M)
_MARGIN = re.compile(r"^[ \t\u00a0]*\u00a0[ \t\u00a0]*", re.M)  # web pages indent with blanks that do not break
_PROMPTED = re.compile(r"(?:>>>|\.\.\.)(?: |$)")
_END = re.compile(r"(?:<\|[A-Za-z_ ]{1,30}\|>|<｜[^｜<>\n]{1,30}｜>|</s>|<(?:eos|end_of_turn)>)\s*\Z")


def extract_program(completion: str, *, entry_point: str | None = None, prompt: str | None = None) -> str | None:
    """The program that a completion means, or None where it holds none.

    What comes up to the last ``</think>`` is left out; a completion that never stops thinking holds no program. Then,
    the first of these that there is: the last complete fenced block that defines the entry point (without an entry
    point: the last complete Python block that is a program, not an example of its use or of what it prints); a fenced
    block that was cut off, or whose opening fence was part of the prompt; bare code, with prose around it cut; with
    ``prompt``, the body that continues it, and functions after it.

    Args:
        completion: the model's text, without the prompt. Of more than LONGEST_TEXT characters the last count.
        entry_point: the function, or "Solution().method", that the tests call; None for whole programs.
        prompt: of a completion task, the code that it continues (HumanEval). Its imports and helper functions are
            put before a program that defines the entry point anew, which is never doubled. A prompt that is no
            Python (a question) is of no use here and does no harm.
    """
    text = _answer(completion)
    if text is None:
        return None
    parser = Parser()
    begun = BegunProgram.read(prompt, entry_point)
    found = blocks(text, parser)
    unfenced = not any(block.closed for block in found)
    if begun and unfenced and text.lstrip("\n")[:1].isspace() and (continued := begun.continued(text, parser)):
        return continued  # it begins indented: whatever comes later, this is the function's body
    program = _fenced(found, entry_point, parser)
    if program is None and unfenced:
        program = _bare(text, entry_point, parser)
    if program is not None and (entry_point is None or defines(program, entry_point)):
        return begun.complete(program) if begun else program
    if begun:
        body = next((block.code for block in reversed(found) if block.closed), text)
        if continued := begun.continued(body, parser):
            return continued
    if program is None and found:
        program = found[-1].code  # it lacks the entry point: let the verdict say so
    return program if program and program.strip() else None


def extract_request(request: dict[str, str | None]) -> str | None:
    """extract_program for a process that is asked by JSON: completion, entry_point, prompt."""
    return extract_program(request["completion"] or "", entry_point=request["entry_point"], prompt=request["prompt"])


def _answer(completion: str) -> str | None:
    """The text after thoughts, without the marks of chat formats; None for thoughts alone."""
    text = completion[-LONGEST_TEXT:].removeprefix("\ufeff").rpartition("</think>")[2]
    if "<think>" in text:  # opened and never closed: what follows are thoughts
        return None
    text = text.rpartition("<|message|>")[2]  # of several channels, the last
    for _ in range(4):
        end = _END.search(text, max(0, len(text) - 60))
        if end is None:
            break
        text = text[: end.start()]
    text = _MARGIN.sub(lambda m: m.group().replace("\u00a0", " "), text.replace("\r\n", "\n"))
    return text if "```" in text or "~~~" in text else _tags_as_fences(text)


def _tags_as_fences(text: str) -> str:
    lines = []
    text = _INLINE_TAG.sub(lambda m: f"{m.group(1)}\n", text)
    for line in text.split("\n"):
        tag = _TAG.fullmatch(line) if len(line) < 100 else None
        if tag is None:
            lines.append(line)
        else:
            closing = "/" in tag.group() or tag.group().strip(" \t[]").upper() in ("DONE", "END")
            lines.append("```" if closing else "```python")
    return "\n".join(lines)


def _fenced(found: list[Block], entry_point: str | None, parser: Parser) -> str | None:
    code = [block for block in found if block.python or (not block.language and parser.tree(block.code) is not None)]
    code = [_without_prompts(block) for block in code or [block for block in found if not block.language]]
    for closed in (True, False):
        candidates = [block for block in code if block.closed is closed and block.code.strip()]
        if entry_point is not None:
            candidates = [block for block in candidates if defines(block.code, entry_point)]
            chosen = next((b.code for b in reversed(candidates) if parser.tree(b.code) is not None), None)
        else:
            if any(block.python for block in candidates):  # untagged ones are examples of output, mostly
                candidates = [block for block in candidates if block.python]
            chosen = _last_program([block.code for block in candidates], parser)
        if candidates:
            last = chosen or candidates[-1].code
            return last if closed else parser.longest_part(last) or last
    return None


def _without_prompts(block: Block) -> Block:
    """What was typed into a session, where a block is one: the lines behind >>> and ..., without what was printed."""
    lines = block.code.split("\n")
    if not lines[0].startswith(">>> ") or not any(line.startswith("... ") for line in lines):
        return block
    typed = [line[4:] for line in lines if _PROMPTED.match(line)]
    return Block("\n".join(typed) + "\n", block.language, block.closed)


def _last_program(codes: list[str], parser: Parser) -> str | None:
    """The last that is a program of its own: no transcript of a session, no output, no call of what another defines."""
    defined: list[set[str]] = [_defined_names(parser.tree(code)) for code in codes]
    for index in range(len(codes) - 1, -1, -1):
        if not parser.tells(codes[index]):
            continue
        elsewhere = set().union(*defined[:index]) - defined[index] if index else set()
        if not elsewhere & _missing_names(parser.tree(codes[index])):
            return codes[index]
    return None


def _defined_names(tree: ast.Module | None) -> set[str]:
    """Functions and classes at the top of a program."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {node.name for node in tree.body if isinstance(node, kinds)} if tree else set()


def _missing_names(tree: ast.Module | None) -> set[str]:
    """Names that a program reads and nowhere binds."""
    read: set[str] = set()
    bound = set(dir(builtins))
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
    return read - bound


def _bare(text: str, entry_point: str | None, parser: Parser) -> str | None:
    """Code without fences: from the first line that looks like code to the last that parses."""
    if "\n```" in text:
        text = text.partition("\n```")[0]
    lines = text.split("\n")
    if lines[0].strip().lower() in PYTHON:
        lines[0] = ""
    starts = [0] + [i for i, line in enumerate(lines) if i and begins_code(line)]
    for start in starts[:_STARTS]:
        part = parser.longest_part("\n".join(lines[start:]))
        if part and (entry_point is None or defines(part, entry_point)) and parser.tells(part):
            return part
    return None
