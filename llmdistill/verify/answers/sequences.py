r"""Texts of several answers: lists, tuples, sets, systems of named values, permutations, ratios."""

from __future__ import annotations

import re
from collections.abc import Callable

from llmdistill.verify.answers.algebra import rational
from llmdistill.verify.answers.expression import parse
from llmdistill.verify.answers.notation import TEXT, split_top
from llmdistill.verify.answers.values import Assignment, Permutation, Ratio, Readings, Sequence, System, Value

_JOINER = re.compile(
    rf",? ?(?:{TEXT}\{{\s*,?\s*(?:and|or|und|et|y)\s*,?\s*\}}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])|\\lor(?![A-Za-z]))"
)
MOST = 200
Reader = Callable[[str], Readings]


def read_sequence(text: str, read: Reader) -> list[Value]:
    """The readings of a text as several answers; [] where it is one."""
    if len(text) > 1 and text[0] == "(" and text[-1] == ")" and _outer(text) and not split_list(text[1:-1])[1:]:
        inner = text[1:-1].strip()
        if r"\begin" in inner:
            return read_sequence(inner, read)
    for opening, closing, kind in (
        ("(", ")", "tuple"),
        ("[", "]", "bracket"),
        (r"\{", r"\}", "set"),
        ("{", "}", "list"),
    ):
        if text.startswith(opening) and text.endswith(closing) and _outer(text):
            parts = split_list(text[len(opening) : -len(closing)])
            if len(parts) < 2 and kind != "set":
                return []
            return _sequence(kind, parts, read)
    parts = split_list(text)
    if alternatives(text, parts):
        return []
    signs = _both_signs(text)
    if len(signs) > 1 and len(parts) < 2:
        return [Sequence("list", tuple(read(sign) for sign in signs))]
    if len(parts) < 2:
        return []
    return system_of(parts, read) or _sequence("list", parts, read)


def _sequence(kind: str, parts: list[str], read: Reader) -> list[Value]:
    if len(parts) > MOST:
        return []
    parts = [sign for part in parts for sign in _both_signs(part)]
    if kind == "list":
        parts = _with_common_name(parts)
    items = tuple(read(part) for part in parts)
    return [Sequence(kind, items)] if all(items) and items else []


def _with_common_name(parts: list[str]) -> list[str]:
    """k = 4, 5, 6 names all three."""
    named = [
        re.match(
            r"(?P<name>[A-Za-z](?:_\w)?(?:\([a-z]\))?|\([A-Za-z](?:, ?[A-Za-z])+\)) ?= ?(?P<value>[^=<>]+)$",
            part,
        )
        for part in parts
    ]
    if (
        named[0]
        and not any(named[1:])
        and not any(re.search(r"[=<>]|\\[lg]e|\\ne|\\in(?![A-Za-z])", part) for part in parts[1:])
    ):
        return [parts[0], *(f"{named[0]['name']} = {part}" for part in parts[1:])]
    return parts


def split_list(text: str) -> list[str]:
    """The elements between commas, semicolons, "and" and "or" outside of brackets."""
    text = _JOINER.sub(" , ", text)
    return [part for part in split_top(re.sub(r"(?:, ?)+(?=,)", "", text)) if part]


def alternatives(text: str, parts: list[str]) -> bool:
    """Whether options are guessed at: "A or B"."""
    return bool(re.search(r"\bor\b", text)) and all(
        re.fullmatch(r"(?:\\text\{)?\(?[A-Z]\)?\}?", part) for part in parts
    )


def _outer(text: str) -> bool:
    r"""Whether the bracket that begins a text is closed at its end only."""
    depth = 0
    tokens = list(re.finditer(r"\\[{}]|[()\[\]{}]", text))
    for match in tokens:
        depth += 1 if match.group() in ("(", "[", "{", r"\{") else -1
        if depth == 0:
            return match is tokens[-1] and match.end() == len(text)
    return False


def _both_signs(text: str) -> list[str]:
    r"""(1 \pm x)/2 as the two that it stands for; \mp has the other sign. Two signs of \pm are independent."""
    count = text.count(r"\pm")
    if not count or count > 3 or (count > 1 and r"\mp" in text):
        return [text]
    found = [text]
    for _ in range(count):
        found = [
            f.replace(r"\pm", sign, 1).replace(r"\mp", "-" if sign == "+" else "+") for f in found for sign in "+-"
        ]
    return [re.sub(r"^\+ ?", "", f.strip()) for f in found]


def system_of(parts: list[str], read: Reader) -> list[Value]:
    found: list[Assignment] = []
    for part in parts:
        named = [value for value in read(part) if isinstance(value, Assignment) and value.label]
        if not named:
            return []
        found.append(named[0])
    if len({a.name for a in found}) < len(found):
        return []  # x = 3 or x = -8: two values of one name
    return [System(tuple(found))]


def read_ratio(text: str) -> Ratio | None:
    """2:3:5."""
    if re.fullmatch(r"\d+ ?(?:\\(?:text|mathrm)\{ ?)?(?<=[ {])to ?\}? ?\d+", text):
        text = re.sub(r"[^\d]+", ":", text)  # 3 to 2
    parts = split_top(text, r":") if ":" in text else []
    trees = [parse(part) for part in parts]
    known = tuple(tree for tree in trees if tree is not None)
    if any(rational(tree) == 0 for tree in known):
        return None  # 12:00
    return Ratio(known) if 2 <= len(parts) == len(known) <= 8 else None


def read_permutation(text: str) -> Permutation | None:
    """Cycles of numbers with blanks between them, (1 3 2)(4 5)."""
    if not re.fullmatch(r"(?:\( ?\d{1,2}(?: \d{1,2})+ ?\) ?)+", text):
        return None
    moves: dict[int, int] = {}
    for cycle in reversed(re.findall(r"\(([^()]*)\)", text)):
        points = [int(point) for point in cycle.split()]
        if len(set(points)) < len(points):
            return None
        step = dict(zip(points, points[1:] + points[:1], strict=True))
        moves = {p: step.get(moves.get(p, p), moves.get(p, p)) for p in {*moves, *points}}
    return Permutation(tuple(sorted((a, b) for a, b in moves.items() if a != b)))
