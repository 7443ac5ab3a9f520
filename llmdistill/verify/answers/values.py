"""The types of answers. A text may have several readings, "(1, 2)" is a pair and an interval; each is one of these."""

from __future__ import annotations

from dataclasses import dataclass

from llmdistill.verify.answers.tree import Node
from llmdistill.verify.answers.units import Unit


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number or an expression, perhaps with a unit.

    Attributes:
        totals: 5.5 and 66 of "5 feet 6 inches".
        comma: written with a decimal comma, and so perhaps a list of two.
    """

    tree: Node
    unit: Unit | None = None
    totals: tuple[Node, ...] = ()
    comma: bool = False


@dataclass(frozen=True, slots=True)
class Time:
    """Minutes after midnight, and whether am or pm was said."""

    minutes: int
    marked: bool


@dataclass(frozen=True, slots=True)
class Ratio:
    """2:3:5."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Digits:
    """Digits in a base that is named, or not."""

    digits: str
    base: str


@dataclass(frozen=True, slots=True)
class Residue:
    """3 (mod 7)."""

    value: Node
    modulus: Node


@dataclass(frozen=True, slots=True)
class Sizes:
    """12 x 18 x 11: the sides of a thing, in any order."""

    factors: tuple[Node, ...]
    unit: Unit | None = None


@dataclass(frozen=True, slots=True)
class Sequence:
    """Several answers in brackets or without.

    Attributes:
        kind: "tuple" (round brackets), "bracket" (square ones), "set" (curly ones), "list" (none).
        items: the readings of each.
    """

    kind: str
    items: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True, slots=True)
class Interval:
    low: Node
    high: Node
    low_open: bool
    high_open: bool


@dataclass(frozen=True, slots=True)
class RealSet:
    """A union of intervals, sorted and merged; points are closed intervals. ``variable``: whose set it is, if said."""

    intervals: tuple[Interval, ...]
    variable: str = ""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A name and its value: x = 5, f(2) = 7, \\angle A = 50.

    Attributes:
        name: the name's text, without blanks.
        value: the readings of what it is.
        label: whether the name is one, not an expression ("p + q = 122").
        argument: a function's variable, x of f(x); "" of others.
    """

    name: str
    value: tuple[Value, ...]
    label: bool
    argument: str = ""


@dataclass(frozen=True, slots=True)
class Equation:
    """A difference of sides that is zero."""

    difference: Node


@dataclass(frozen=True, slots=True)
class Chain:
    """Inequalities between expressions: sides and the signs between them, "<", "<=", "!=", "="."""

    sides: tuple[Node, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class System:
    """Named values: x = 1, y = 2."""

    parts: tuple[Assignment, ...]


@dataclass(frozen=True, slots=True)
class Family:
    """All values of an expression in parameters: {3k | k in Z}."""

    tree: Node
    parameter: str
    domain: str


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows of readings; ``kind`` is "matrix", "determinant" or "cases"."""

    kind: str
    rows: tuple[tuple[tuple[Value, ...], ...], ...]


@dataclass(frozen=True, slots=True)
class Permutation:
    """A permutation, by what it does to the points it moves."""

    moves: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Option:
    """The letter of an option."""

    letter: str


@dataclass(frozen=True, slots=True)
class Words:
    """Words, lower case, without articles."""

    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """What is none of these: equal to itself only."""

    text: str


Value = (
    Quantity | Time | Ratio | Digits | Residue | Sizes | Sequence | RealSet | Assignment | Equation | Chain | System
    | Family | Matrix | Permutation | Option | Words | Text
)  # fmt: skip
Readings = tuple[Value, ...]
