r"""Sets of real numbers: intervals, their unions and differences, and the inequalities that say the same.

Endpoints are expressions. Where they are numbers, sets are sorted and merged; where not, a set is one interval.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fractions import Fraction
from functools import cmp_to_key

from llmdistill.verify.answers.algebra import sign_of_difference
from llmdistill.verify.answers.expression import parse
from llmdistill.verify.answers.notation import split_top, unwrap
from llmdistill.verify.answers.tree import Node, number, symbols
from llmdistill.verify.answers.values import Interval, RealSet

INFINITY = Node("infinity")
MINUS_INFINITY = Node("minus", (INFINITY,))
ALL = Interval(MINUS_INFINITY, INFINITY, True, True)
_EMPTY = {
    "no solution",
    "no solutions",
    "no real solution",
    "no real solutions",
    "empty set",
    "the empty set",
    "none exist",
}


_SIGNED = re.compile(r"\\math(?:bb|bf) ?\{R\} ?(?:\^ ?\{? ?(?P<plus>\+) ?\}?|_ ?\{? ?(?P<bound>> ?0|\\ge ?0) ?\}?)")


def read_set(text: str) -> RealSet | None:
    r"""(a, b], unions with \cup, differences with \setminus, \mathbb{R}, \emptyset; None for other texts."""
    pieces = split_top(text, r"\\cup(?![A-Za-z])|\\bigcup(?![A-Za-z])|(?<=[\])}]) ?U ?(?=[\[(])")
    if len(pieces) > 1:
        found = [_minuend(piece) for piece in pieces]
        if any(f is None for f in found):
            return None
        return merged(interval for f in found if f for interval in f.intervals)
    return _minuend(text)


def _minuend(text: str) -> RealSet | None:
    pieces = split_top(text, r"\\setminus(?![A-Za-z])|\\cap(?![A-Za-z])|(?<=[\])}RZ]) ?[-\\/] ?(?=\\?[\[({])")
    found = _simple(pieces[0])
    if found is None or len(pieces) == 1:
        return found
    if len(pieces) > 2:
        return None
    other = _simple(pieces[1])
    if other is None:
        return None
    if re.search(r"\\cap(?![A-Za-z])", text):
        return intersection(found, other)
    rest = complement(other)
    return None if rest is None else intersection(found, rest)


def _simple(text: str) -> RealSet | None:
    text = text.strip()
    if text.replace(" ", "") in (r"\mathbb{R}", r"\mathbf{R}", r"\Reals", r"\R", "R"):
        return RealSet((ALL,)) if text != "R" else None
    signed = _SIGNED.fullmatch(text)
    if signed:
        low_open = not (signed["bound"] or "").startswith(r"\ge")
        return RealSet((Interval(number(0), INFINITY, low_open, True),))
    if text.strip() == r"\emptyset" or text in (r"\{\}", r"\{ \}") or unwrap(text).lower() in _EMPTY:
        return RealSet(())
    if len(text) < 3:
        return None
    if text.startswith(r"\{") and text.endswith(r"\}"):
        points = [parse(point) for point in split_top(text[2:-2])]
        if any(point is None for point in points):
            return None
        return merged(Interval(point, point, False, False) for point in points if point)
    if text[0] not in "([]" or text[-1] not in ")][":
        return None
    ends = split_top(text[1:-1])
    if len(ends) != 2:
        return None
    low, high = parse(ends[0]), parse(ends[1])
    if low is None or high is None:
        return None
    found = Interval(low, high, text[0] in "(]", text[-1] in ")[")
    order = sign_of_difference(low, high)
    if order is not None and (order > 0 or (order == 0 and (found.low_open or found.high_open))):
        return None
    if order is None and not (symbols(low) or symbols(high)):
        return None
    return RealSet((found,))


def _order(a: Node, b: Node) -> int:
    order = sign_of_difference(a, b)
    if order is None:
        raise ValueError("ends that cannot be compared")
    return order


def merged(intervals: Iterable[Interval]) -> RealSet | None:
    """Sorted, and joined where they overlap or touch; None where ends cannot be compared."""
    pieces = list(intervals)
    if len(pieces) < 2:
        return RealSet(tuple(pieces))
    try:
        pieces.sort(key=cmp_to_key(lambda a, b: _order(a.low, b.low) or (a.low_open - b.low_open)))
        result = [pieces[0]]
        for piece in pieces[1:]:
            last = result[-1]
            gap = _order(piece.low, last.high)
            if gap > 0 or (gap == 0 and piece.low_open and last.high_open):
                result.append(piece)
                continue
            order = _order(piece.high, last.high)
            if order > 0 or (order == 0 and last.high_open):
                result[-1] = Interval(last.low, piece.high, last.low_open, piece.high_open)
    except ValueError:
        return None
    return RealSet(tuple(result))


def complement(found: RealSet) -> RealSet | None:
    edge, edge_open = MINUS_INFINITY, True
    rest = []
    for piece in found.intervals:
        if piece.low != MINUS_INFINITY:
            rest.append(Interval(edge, piece.low, edge_open, not piece.low_open))
        edge, edge_open = piece.high, not piece.high_open
    if edge != INFINITY:
        rest.append(Interval(edge, INFINITY, edge_open, True))
    return merged(rest)


def intersection(a: RealSet, b: RealSet) -> RealSet | None:
    found = []
    try:
        for left in a.intervals:
            for right in b.intervals:
                low = _order(left.low, right.low)
                high = _order(left.high, right.high)
                start = left if low > 0 else right
                end = left if high < 0 else right
                low_open = start.low_open if low else left.low_open or right.low_open
                high_open = end.high_open if high else left.high_open or right.high_open
                size = _order(start.low, end.high)
                if size < 0 or (size == 0 and not low_open and not high_open):
                    found.append(Interval(start.low, end.high, low_open, high_open))
    except ValueError:
        return None
    return merged(found)


def from_inequality(sides: list[Node], signs: list[str]) -> RealSet | None:
    """The set of one symbol that chained inequalities with numbers or parameters say: 0 < k < 3, 7 >= y > 3, n != 5."""
    if len(sides) == 2:
        left, right = sides
        if _is_variable(left):
            return _one_sided(left, signs[0], right)
        return _one_sided(right, _flipped(signs[0]), left) if _is_variable(right) else None
    if len(sides) == 3 and _is_variable(sides[1]) and "!=" not in signs and "=" not in signs:
        name = _name(sides[1])
        if signs[0][0] != signs[1][0] or name in symbols(sides[0]) | symbols(sides[2]):
            return None
        low, high = (sides[0], sides[2]) if signs[0][0] == "<" else (sides[2], sides[0])
        first, last = (signs[0], signs[1]) if signs[0][0] == "<" else (signs[1], signs[0])
        order = sign_of_difference(low, high)
        if order is not None and order > 0:
            return None
        return RealSet((Interval(low, high, first in "<>", last in "<>"),), name)
    return None


def _is_variable(tree: Node) -> bool:
    return tree.op == "symbol" or (tree.op == "unknown" and tree.args[0].op == "symbol")


def _name(tree: Node) -> str:
    return tree.name if tree.op == "symbol" else f"{tree.name}({tree.args[0].name})"


def _flipped(sign: str) -> str:
    return sign.translate(str.maketrans("<>", "><"))


def _one_sided(variable: Node, sign: str, bound: Node) -> RealSet | None:
    name = _name(variable)
    if name in symbols(bound) or variable.name in symbols(bound):
        return None
    if sign == "!=":
        found = complement(RealSet((Interval(bound, bound, False, False),)))
        return None if found is None else RealSet(found.intervals, name)
    if sign == "=":
        return None
    opened = sign in ("<", ">")
    piece = Interval(MINUS_INFINITY, bound, True, opened) if sign[0] == "<" else Interval(bound, INFINITY, opened, True)
    return RealSet((piece,), name)


def probes(found: RealSet) -> list[tuple[Node, bool]] | None:
    """Numbers with whether they are in the set: its ends, what is just beside them and between them, and far away."""
    ends = [e for piece in found.intervals for e in (piece.low, piece.high) if e not in (INFINITY, MINUS_INFINITY)]
    if any(symbols(end) for end in ends):
        return None
    tests: list[Node] = [number(-1013), number(1013)]
    for end in ends:
        tests += [end, *(Node("sum", (end, number(step))) for step in _STEPS)]
    return [(test, contains(found, test)) for test in tests]


_STEPS = [
    sign * size for size in (Fraction(1, 10**80), Fraction(1, 1000), Fraction(1, 7), Fraction(3, 2)) for sign in (-1, 1)
]


def contains(found: RealSet, point: Node) -> bool:
    for piece in found.intervals:
        low, high = _order(piece.low, point), _order(point, piece.high)
        if (low < 0 or (low == 0 and not piece.low_open)) and (high < 0 or (high == 0 and not piece.high_open)):
            return True
    return False
