"""The boxes of a completion."""

from __future__ import annotations

import re

from llmdistill.verify.answers.units import parse_unit
from llmdistill.verify.phrases import CALLED_WRONG, CORRECTS, CROSSED_OUT

BOX_WORD = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])")
_BRACE = re.compile(r"\\{1,4}(?:boxed|fbox|framebox)(?![A-Za-z])|\\[\\{}]|[{}]")
# Without braces: a command, a number or one letter. "\boxed as asked" is prose.
_BARE_BOX = re.compile(
    r"\\{1,4}(?:boxed|fbox)[ \t]{0,9}(?!\\{1,4}(?:boxed|fbox))"
    r"(\\[A-Za-z]{1,20}(?:\{[^{}]{0,60}\}){0,2}|[-+.]?\d[\w.,/]{0,60}|[A-Za-z](?![\w'’]| [a-z]))"
)
# Between boxes that make one answer: marks and joiners, a unit or two before them, the next one's name after them.
_MARKS = (
    r"(?:\s|\\\\|\\[()\[\],;!:]|\$|\\q?quad(?![A-Za-z])|[,;&.]|\b(?:and|or)\b"
    r"|\\(?:text|mathrm)\s*\{\s*(?:,?\s*(?:and|or)\s*)?,?\s*\})*"
)
_BETWEEN_BOXES = re.compile(
    rf"{_MARKS}(?:(?:[a-z]{{2,12}} ){{1,2}}(?:and|or)\b|(?:[a-z]{{2,12}} ?){{1,2}},)?{_MARKS}"
    r"(?:[A-Za-z](?:_\{?\w\}?)?\s*=)?\s*"
)
# Sub-questions answered in turn: "(1) \\boxed{5} (2) \\boxed{7}".
_NUMBERED = re.compile(
    r"[\s$.,;)\\]{0,9}(?:and\s)?(?:[Pp]art\s)?\(?(?P<label>[2-9]|[b-h]|ii|iii|iv)\)\s?:?[\s$\\(]{0,6}"
)
_FIRST = re.compile(r"\(?(?:1|a|i)\)\s?:?[\s$\\(]{0,6}$")
# What a prompt writes into the box, and a completion repeats.
_PLACEHOLDER = re.compile(
    r"(?:\\text\s*\{)?\W{0,3}(?:(?:your|the|insert|final)\s){0,3}(?:final\s)?(?:answer|ans|result)(?:\shere)?\W{0,3}\}?"
    r"|[.…?_\s]{1,9}|\\[lc]?dots",
    re.I,
)
_DENIAL = re.compile(
    r"(?:\bnot|n['’]t(?:\sbe)?|\bcannot\sbe|\brather\sthan|\binstead\sof|\bother\sthan)\s{1,3}"
    r"(?:equal\s(?:to\s)?|simply\s|just\s)?[$\\(\[]{0,3}\s?\Z"
)
_LONGEST_DENIAL = 48  # characters before a box
_SIMPLE_BOX = re.compile(r"\\boxed\{[^{}]{0,200}\}")


def without_denied(text: str) -> str:
    """A text without the boxes that it says are not the answer: "45, not \\boxed{44}", "\\boxed{44} (wrong)"."""
    kept, done = list[str](), 0
    for box in _SIMPLE_BOX.finditer(text):  # few: what stands before each is looked at, and not every place of the text
        before = text[max(done, box.start() - _LONGEST_DENIAL) : box.start()]
        if denial := _DENIAL.search(before):
            kept += [text[done : box.start() - len(before) + denial.start()], "not"]
            done = box.end()
        elif CROSSED_OUT.match(text, box.end()) or (
            CALLED_WRONG.match(text, box.end()) and re.search(r"\d", box.group())
        ):
            kept += [text[done : box.start()], "not"]
            done = box.end()
    return "".join([*kept, text[done:]])


_JOINER = re.compile(r"[,;]|\b(?:and|or)\b")
_UNIT_WORDS = re.compile(r"[A-Za-z]{2,}")


def last_boxes(text: str) -> tuple[list[str], int]:
    """The contents of the last run of boxes, in order, and where it ends; ([], 0) without a closed, filled box."""
    if not BOX_WORD.search(text):
        return [], 0
    # One pass with a stack. An entry is the start of a box's command, or None for an ordinary brace.
    stack: list[tuple[int, int] | None] = []
    found: list[tuple[int, int, str]] = []  # begin, end, content
    pending: tuple[int, int] | None = None  # a box command: its begin, and where its brace must be
    for token in _BRACE.finditer(text):
        word = token.group()
        if word.startswith("\\") and len(word) > 2:
            brace = _argument(text, token.end())
            pending = (token.start(), brace) if brace is not None else None
            if brace is None:
                bare = _BARE_BOX.match(text, token.start())
                if bare:
                    found.append((token.start(), bare.end(), bare.group(1).rstrip(".,;:")))
        elif word == "{":
            stack.append(pending if pending and pending[1] == token.start() else None)
        elif word == "}" and stack:
            box = stack.pop()
            if box is not None:
                content = text[box[1] + 1 : token.start()].strip()
                while found and found[-1][0] > box[0]:  # boxes inside this one
                    found.pop()
                if content and not _PLACEHOLDER.fullmatch(content[:80]):
                    found.append((box[0], token.end(), content))
    if not found:
        return [], 0
    run = [found[-1]]
    for box_before in reversed(found[:-1]):
        gap = text[box_before[1] : run[0][0]]
        numbered = _NUMBERED.fullmatch(gap) if len(gap) < 40 else None
        if numbered and (
            numbered["label"] not in ("2", "b", "ii") or _FIRST.search(text[max(0, box_before[0] - 16) : box_before[0]])
        ):
            run.insert(0, box_before)
            continue
        if len(gap) > 80 or not _BETWEEN_BOXES.fullmatch(gap) or ("\n\n" in gap and not _JOINER.search(gap)):
            break
        if CORRECTS.search(gap) or not all(map(_is_unit, _UNIT_WORDS.findall(gap))):
            break  # "\\boxed{1}, wait, \\boxed{2}" is a correction
        run.insert(0, box_before)
        if len(run) == 32:
            break
    return list(dict.fromkeys(content for _, _, content in run)), run[-1][1]


def _argument(text: str, at: int) -> int | None:
    """Where the brace of a box's argument stands, past blanks and [options]; None if it has none."""
    while at < len(text) and text[at] in " \t\n":
        at += 1
    while at < len(text) and text[at] == "[":
        close = text.find("]", at, at + 40)
        if close < 0:
            return None
        at = close + 1
    return at if at < len(text) and text[at] == "{" else None


def _is_unit(word: str) -> bool:
    return word in ("and", "or", "text", "mathrm", "quad", "qquad") or parse_unit(word, wrapped=True) is not None
